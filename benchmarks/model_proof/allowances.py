"""What single rows need to be compared at all, and what docs/models.md says of it: keywords of `Architecture`."""

from typing import Any

from .conversions import named_as_exaone, packed_as_internlm2
from .parts import FULL

Allowance = dict[str, Any]

NO_IMAGES = {"limit_mm_per_prompt": {"image": 0}}
NO_IMAGES_OR_VIDEO = {"limit_mm_per_prompt": {"image": 0, "video": 0}}
"""For vLLM, which then serves texts alone."""

BFLOAT16: Allowance = {"dtype": "bfloat16"}
"""vLLM's code for it on a CPU knows no other."""

ONE_MORE: Allowance = {
    "oracle": {"sliding_window": 25},
    "notes": "(vLLM takes its sliding windows for one token longer than transformers; compared at the same length)",
}
# vLLM 0.32's kernel for CPUs takes queries of [tokens, heads, head size] for [batch, tokens, hidden size].
NATIVE_ROPE: Allowance = {
    "engine": {"compilation_config": {"custom_ops": ["all", "-rotary_embedding"]}},
    "notes": (
        "(vLLM's rotary kernel for CPUs misreads this model's queries; run with `--compilation-config "
        '\'{"custom_ops": ["all", "-rotary_embedding"]}\'`)'
    ),
}
NATIVE_ROPE_NO_IMAGES: Allowance = {**NATIVE_ROPE, "engine": {**NO_IMAGES, **NATIVE_ROPE["engine"]}}
NO_PREFIXES: Allowance = {
    "engine": {"enable_prefix_caching": False},
    "notes": "(vLLM's Mamba 2 for CPUs fails with prefix caching; run without)",
}
UNBIASED: Allowance = {
    "unbiased": True,
    "notes": "(the bias in the choice of experts is 0: vLLM's router on CPUs leaves it out)",
}
NO_CHUNKS: Allowance = {"oracle": {"attention_chunk_size": 4096, "layer_types": [FULL] * 3}}
BOTH_WAYS: Allowance = {"oracle": {"is_causal": False}}
"""vLLM's config says it."""

TABLE_OF_256: Allowance = {"oracle": {"n_positions": 256}}
ROUTING_BIAS: Allowance = {"served": {"use_routing_bias": True}}
NO_HEAD_BIAS: Allowance = {"notes": "(vLLM leaves out the bias of its head; compared without one)"}
XIELU: Allowance = {
    "notes": "(with parameters of its activation that are the same in bfloat16, in which vLLM computes them)"
}
LLAMA_4_SCALING: Allowance = {
    "served": {"llama_4_scaling": {"original_max_position_embeddings": 32, "beta": 0.1}},
    "notes": "(vLLM takes the scale of its queries from Mistral's own form of the config only; given there)",
}
MIMO_V2: Allowance = {
    "served": {
        "hybrid_layer_pattern": [1, 0, 1],
        "moe_layer_freq": [0, 1, 1],
        "swa_head_dim": 48,
        "swa_v_head_dim": 32,
        "swa_num_attention_heads": 4,
        "swa_num_key_value_heads": 4,
        "add_swa_attention_sink_bias": True,
        "layernorm_epsilon": 1e-5,
        "rope_theta": 5000000.0,
        "swa_rope_theta": 10000.0,
        "partial_rotary_factor": 0.334,
        "sliding_window_size": 24,
    }
}

# Those whose code is not in transformers, but is that of another there with other names.
AS_LLAMA: Allowance = {"config": "Llama", "notes": "(vLLM's Llama)"}
AS_QWEN2: Allowance = {"config": "Qwen2", "notes": "(as Qwen2)"}
AS_STABLELM: Allowance = {
    "config": "StableLm",
    "served": {"rms_norm_eps": 1e-5},
    "notes": "(as StableLM that rotates all dimensions)",
}
AS_GRANITE: Allowance = {
    "config": "Granite",
    "served": {"scale_emb": 2.0, "scale_depth": 0.5 * 3**0.5, "dim_model_base": 64, "num_experts": 0},
    "notes": "(as Granite)",
}
LLAMA_PACKED: Allowance = {
    "config": "Llama",
    "convert": packed_as_internlm2,
    "served": {"bias": False},
    "notes": "(as Llama, its weights packed)",
}
LLAMA_RENAMED: Allowance = {
    "config": "Llama",
    "convert": named_as_exaone,
    "served": {"num_layers": 3, "activation_function": "silu", "layer_norm_epsilon": 1e-6},
    "notes": "(as Llama, its weights by other names)",
}
LLAMA_UNSKIPPED: Allowance = {
    "config": "Llama",
    "served": {**{f"bskcn_{n}": [] for n in range(1, 5)}, "bskcn_tv": [1.0, 0.0]},
    "notes": "(as Llama, without its skip connections)",
}
LLAMA_BIASED: Allowance = {"config": "Llama", "served": {"bias": True}, "notes": "(as Llama with biases)"}
