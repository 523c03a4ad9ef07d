"""What configs of the table say beside the common shape: what many share, then by family, then the towers."""

from typing import Any

from tests.support.models import SHAPE

Part = dict[str, Any]

WIDE: Part = {**SHAPE, "hidden_size": 128}
"""The common shape, with heads of 32 dimensions also where these are the hidden size's share."""

FULL, SLIDES = "full_attention", "sliding_attention"


def default_rope(**more: Any) -> Part:
    return {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, **more}}


NO_WINDOW: Part = {"sliding_window": None}
ALL_FULL: Part = {**NO_WINDOW, "layer_types": [FULL] * 3}
SLIDING: Part = {"sliding_window": 24, "layer_types": [SLIDES, FULL, SLIDES]}
EXPERTS: Part = {"num_experts": 4, "num_experts_per_tok": 2}
MOE: Part = {**EXPERTS, "moe_intermediate_size": 48}
LOCAL_MOE: Part = {"num_local_experts": 4, "num_experts_per_tok": 2}
ROUTED_MOE: Part = {
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 48,
    "n_group": 1,
    "topk_group": 1,
}
SHARED_EXPERT: Part = {"shared_expert_intermediate_size": 48}
SHARED_MLP: Part = {"shared_intermediate_size": 48}
DENSE_FIRST: Part = {"mlp_layer_types": ["dense", "sparse", "sparse"]}
ONE_GROUP: Part = {"num_shared_experts": 1, "n_group": 1, "topk_group": 1}

YARN: Part = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 2.0, "original_max_position_embeddings": 32}
HALF_ROPE = default_rope(partial_rotary_factor=0.5)
QUARTER_ROPE = default_rope(partial_rotary_factor=0.25)
WHOLE_ROPE = default_rope(partial_rotary_factor=1.0)
AXES = default_rope(mrope_section=[4, 6, 6])
MROPE = default_rope(partial_rotary_factor=0.5, mrope_section=[4, 2, 2], mrope_interleaved=True)
BIASES: Part = {"attention_bias": True}
CLASSES: Part = {"num_labels": 3}
INNER: Part = {"n_inner": 96}

GATED_DELTA: Part = {
    "layer_types": ["linear_attention", FULL, "linear_attention"],
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
}
MAMBA: Part = {
    "mamba_n_heads": 8,
    "mamba_d_head": 32,
    "mamba_n_groups": 1,
    "mamba_d_state": 16,
    "mamba_chunk_size": 256,
}
MLA: Part = {
    "kv_lora_rank": 32,
    "qk_rope_head_dim": 16,
    "v_head_dim": 64,
    "qk_nope_head_dim": 48,
    "num_key_value_heads": 4,
    "q_lora_rank": 32,
}

# vLLM turns the temperature on from 32,769 tokens.
LLAMA4: Part = {
    "intermediate_size_mlp": 96,
    "num_local_experts": 4,
    "num_experts_per_tok": 1,
    "no_rope_layers": [1, 0, 1],
    "interleave_moe_layer_step": 2,
    "attn_temperature_tuning": False,
    "attention_chunk_size": 32,
}
LLAMA4_NO_CHUNKS: Part = {**LLAMA4, "attention_chunk_size": None}
MINISTRAL3: Part = {"rope_parameters": {**YARN, "llama_4_scaling_beta": 0.1}}
QWEN3_VL_MOE: Part = {**AXES, **MOE, "norm_topk_prob": True}
QWEN3_NEXT: Part = {**GATED_DELTA, **MOE, **QUARTER_ROPE, **SHARED_EXPERT}
QWEN3_5: Part = {**GATED_DELTA, **MROPE}
QWEN3_5_MOE: Part = {**QWEN3_5, **MOE, **SHARED_EXPERT}
GRANITE: Part = {
    "embedding_multiplier": 2.0,
    "logits_scaling": 2.0,
    "residual_multiplier": 0.5,
    "attention_multiplier": 0.2,
}
GRANITE_H: Part = {
    **GRANITE,
    **LOCAL_MOE,
    **SHARED_MLP,
    **MAMBA,
    "layer_types": ["mamba", "attention", "mamba"],
}
GRANITE_MICRO: Part = {
    **GRANITE_H,
    "num_local_experts": 0,
    "layer_types": ["attention"] * 3,
    "position_embedding_type": "rope",
}
SCALED_QUERIES: Part = {"query_pre_attn_scalar": 32}
GEMMA_SHARING: Part = {
    "num_hidden_layers": 4,
    "num_kv_shared_layers": 2,
    "sliding_window": 24,
    "layer_types": [SLIDES, FULL, SLIDES, FULL],
    "vocab_size_per_layer_input": 160,
    "hidden_size_per_layer_input": 16,
}
GEMMA3N: Part = {
    **GEMMA_SHARING,
    "intermediate_size": [96] * 4,
    "laurel_rank": 8,
    "activation_sparsity_pattern": [0.0] * 4,
}
GEMMA4: Part = {**GEMMA_SHARING, "global_head_dim": 64}
GEMMA4_MOE: Part = {
    **GEMMA4,
    "num_kv_shared_layers": 0,
    "enable_moe_block": True,
    "num_experts": 4,
    "top_k_experts": 2,
    "moe_intermediate_size": 48,
}
GLM4_MOE: Part = {**ROUTED_MOE, **HALF_ROPE, "use_qk_norm": True, "num_mtp_layers": 0}
GLM_AXES = default_rope(partial_rotary_factor=0.5, mrope_section=[2, 3, 3])
ERNIE_MOE: Part = {"moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 48, "moe_num_shared_experts": 1}
GLM4V_MOE: Part = {**ROUTED_MOE, **GLM_AXES, "use_qk_norm": False}
HUNYUAN_MOE: Part = {
    "num_experts": 4,
    "moe_topk": [2, 2, 2],
    "num_shared_expert": [1, 1, 1],
    "use_mixed_mlp_moe": True,
    "moe_intermediate_size": [96, 96, 96],
}
HUNYUAN3: Part = {
    **MOE,
    **DENSE_FIRST,
    "num_shared_experts": 1,
    "first_k_dense_replace": 1,
    "expert_hidden_dim": 48,
    "qk_norm": True,
    "route_norm": True,
}
AFMOE: Part = {**SLIDING, **MOE, **ONE_GROUP, "score_func": "sigmoid", "route_norm": True}
MINIMAX: Part = {**LOCAL_MOE, "rotary_dim": 16, "scoring_func": "sigmoid"}
K_EXAONE: Part = {**SLIDING, **MOE, **ONE_GROUP, **DENSE_FIRST}
LAGUNA: Part = {**SLIDING, **MOE, **SHARED_EXPERT, **DENSE_FIRST}
DBRX: Part = {
    "attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8},
    "ffn_config": {"ffn_hidden_size": 48, "moe_num_experts": 4, "moe_top_k": 2, "hidden_size": 128},
}
GPTJ: Part = {**INNER, "rotary_dim": 16}
ARIA: Part = {"moe_num_experts": 4, "moe_topk": 2, "moe_num_shared_experts": 1}
MIMO_V2: Part = {**SLIDING, **ROUTED_MOE, "head_dim": 48, "v_head_dim": 32}
# Fewer passes through its layers than by default: in float32 those would multiply rounding past the limit.
HRM: Part = {"prefix_lm": False, "H_cycles": 1, "L_cycles": 1}
LFM2: Part = {"block_multiple_of": 32, "block_auto_adjust_ff_dim": False, "conv_dim": 128, "block_dim": 128}
CONVOLUTIONS: Part = {"layer_types": ["conv", FULL, "conv", FULL], "num_hidden_layers": 4}
LFM2_OF_VL: Part = {**LFM2, "layer_types": ["conv", FULL, "conv"]}
FALCON: Part = {"new_decoder_architecture": True, "num_kv_heads": 2}
FALCON_H1: Part = {**MAMBA, "mamba_d_ssm": 256, "mlp_multipliers": [1.0, 1.0], "ssm_multipliers": [1.0] * 5}
ZAMBA2: Part = {
    "layers_block_type": ["mamba", "hybrid", "mamba", "hybrid"],
    "num_hidden_layers": 4,
    "num_mem_blocks": 1,
    "use_mem_rope": True,
    "mamba_d_state": 16,
    "n_mamba_heads": 8,
    "mamba_headdim": 32,
    "chunk_size": 256,
    "num_key_value_heads": 4,
    "use_mamba_kernels": False,
}
JAMBA: Part = {
    "num_experts": 4,
    "num_hidden_layers": 4,
    "attn_layer_period": 2,
    "attn_layer_offset": 1,
    "use_mamba_kernels": False,
}
NEMOTRON_H: Part = {
    "layers_block_type": ["mamba", "attention", "moe"],
    "ssm_state_size": 16,
    "mamba_num_heads": 8,
    "mamba_head_dim": 32,
    "n_groups": 1,
    "chunk_size": 256,
    "n_routed_experts": 4,
    "moe_intermediate_size": 48,
    "moe_shared_expert_intermediate_size": 48,
    "use_mamba_kernels": False,
}
MAMBA2: Part = {"num_heads": 8, "n_groups": 1, "state_size": 16, "chunk_size": 16}
LONGCAT: Part = {
    **MLA,
    "num_layers": 2,
    "ffn_hidden_size": 96,
    "moe_topk": 2,
    "n_routed_experts": 4,
    "zero_expert_num": 2,
    "expert_ffn_hidden_size": 48,
}

# The towers of models that see.
VISION: Part = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
CLIP: Part = {"model_type": "clip_vision_model", **VISION}
SIGLIP: Part = {"model_type": "siglip_vision_model", **VISION, "vision_use_head": False}
PIXTRAL: Part = {"model_type": "pixtral", **VISION, "head_dim": 16}
IDEFICS3: Part = {"model_type": "idefics3_vision", **VISION}
SMOLVLM: Part = {"model_type": "smolvlm_vision", **VISION}
SIGLIP2: Part = {"model_type": "siglip2_vision_model", **VISION, "num_patches": 16}
INTERNVL: Part = {"model_type": "internvl_vision", **VISION, "image_size": [28, 28], "patch_size": [14, 14]}
LLAMA4_VISION: Part = {
    "model_type": "llama4_vision_model",
    **VISION,
    "vision_output_dim": 32,
    "projector_input_dim": 32,
    "projector_output_dim": 32,
}
QWEN2_VISION: Part = {"depth": 2, "embed_dim": 32, "num_heads": 2, "hidden_size": 128}
DEEP: Part = {"depth": 2, "num_heads": 2, "hidden_size": 32, "intermediate_size": 64, "out_hidden_size": 128}
QWEN2_5_VISION: Part = {**DEEP, "fullatt_block_indexes": [1]}
QWEN3_5_VISION: Part = {**DEEP, "num_position_embeddings": 16}
QWEN3_VISION: Part = {**QWEN3_5_VISION, "deepstack_visual_indexes": [0, 1]}
GLM_VISION: Part = {**DEEP, "image_size": 28}
EXAONE_VISION: Part = {**QWEN2_5_VISION, "num_key_value_heads": 2}
