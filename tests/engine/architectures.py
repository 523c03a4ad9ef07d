"""Every decoder architecture of vLLM's registry, as a tiny random checkpoint: what `benchmarks.model_matrix` runs.

A checkpoint has float32 weights, 3 or 4 layers with each kind of layer that the architecture knows, heads of 32
dimensions where that is free, and a trained length of 64 tokens.
"""

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PreTrainedConfig

from tests.support.models import CONFIGS, EXPERT_BIASES, SHAPE, random_model, save_tokenizer

WIDE: dict[str, Any] = {**SHAPE, "hidden_size": 128}
"""Heads of 32 dimensions also where these are the hidden size's share."""

FULL, SLIDES = "full_attention", "sliding_attention"
SLIDING = {"sliding_window": 24, "layer_types": [SLIDES, FULL, SLIDES]}
MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48}
LOCAL_MOE = {"num_local_experts": 4, "num_experts_per_tok": 2}
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 2.0, "original_max_position_embeddings": 32}
TEXT_ALONE = {"limit_mm_per_prompt": {"image": 0, "video": 0}}
IMAGES_ALONE = {"limit_mm_per_prompt": {"image": 0}}


def default_rope(**more: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, **more}}


HALF_ROPE = default_rope(partial_rotary_factor=0.5)
GRANITE = {"embedding_multiplier": 2.0, "logits_scaling": 2.0, "residual_multiplier": 0.5, "attention_multiplier": 0.2}
ROUTED_MOE = {
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 48,
    "n_group": 1,
    "topk_group": 1,
}
UNBIASED: dict[str, Any] = {
    "unbiased": True,
    "notes": "(the bias in the choice of experts is 0: vLLM's router on CPUs leaves it out)",
}
QUARTER_ROPE = default_rope(partial_rotary_factor=0.25)
MROPE = default_rope(partial_rotary_factor=0.5, mrope_section=[4, 2, 2], mrope_interleaved=True)
GATED_DELTA = {
    "layer_types": ["linear_attention", FULL, "linear_attention"],
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
}
MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 32, "mamba_n_groups": 1, "mamba_d_state": 16, "mamba_chunk_size": 256}
MLA = {"kv_lora_rank": 32, "qk_rope_head_dim": 16, "v_head_dim": 64, "qk_nope_head_dim": 48}
NO_PREFIXES: dict[str, Any] = {
    "engine": {"enable_prefix_caching": False},
    "notes": "(vLLM's Mamba 2 for CPUs fails with prefix caching; run without)",
}
GEMMA4 = {
    "num_hidden_layers": 4,
    "num_kv_shared_layers": 2,
    "sliding_window": 24,
    "layer_types": [SLIDES, FULL, SLIDES, FULL],
    "vocab_size_per_layer_input": 160,
    "hidden_size_per_layer_input": 16,
    "global_head_dim": 64,
}
VISION = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
CLIP = {"model_type": "clip_vision_model", **VISION}
SIGLIP = {"model_type": "siglip_vision_model", **VISION, "vision_use_head": False}
PIXTRAL = {"model_type": "pixtral", **VISION, "head_dim": 16}
QWEN3_VISION = {
    "depth": 2,
    "num_heads": 2,
    "hidden_size": 32,
    "intermediate_size": 64,
    "out_hidden_size": 128,
    "num_position_embeddings": 16,
    "deepstack_visual_indexes": [0, 1],
}
QWEN3_5_VISION = {name: value for name, value in QWEN3_VISION.items() if name != "deepstack_visual_indexes"}
GLM_VISION = {
    "depth": 2,
    "num_heads": 2,
    "hidden_size": 32,
    "intermediate_size": 64,
    "out_hidden_size": 128,
    "image_size": 28,
}
ONE_MORE: dict[str, Any] = {
    "oracle": {"sliding_window": 25},
    "notes": "(vLLM takes its sliding windows for one token longer than transformers; compared at the same length)",
}
# vLLM 0.32's kernel for CPUs takes queries of [tokens, heads, head size] for [batch, tokens, hidden size].
NATIVE_ROPE: dict[str, Any] = {
    "engine": {"compilation_config": {"custom_ops": ["all", "-rotary_embedding"]}},
    "notes": (
        "(vLLM's rotary kernel for CPUs misreads this model's queries; run with `--compilation-config "
        '\'{"custom_ops": ["all", "-rotary_embedding"]}\'`)'
    ),
}
AXES = default_rope(mrope_section=[4, 6, 6])
GLM_AXES = default_rope(partial_rotary_factor=0.5, mrope_section=[2, 3, 3])
# vLLM turns the temperature on from 32,769 tokens.
LLAMA4 = {
    "intermediate_size_mlp": 96,
    "num_local_experts": 4,
    "num_experts_per_tok": 1,
    "no_rope_layers": [1, 0, 1],
    "interleave_moe_layer_step": 2,
    "attn_temperature_tuning": False,
}


@dataclass(frozen=True)
class Architecture:
    """One row of the table.

    Attributes:
        name: In vLLM's registry.
        known_as: The families that people know it by.
        config: Makes the checkpoint's config.
        variant: Tells an architecture's rows apart.
        engine: More arguments for vLLM.
        task: "generate", "embed" (the last token's state, normalised) or "classify".
        base: Save the model without its head.
        convert: Turns transformers' checkpoint in a folder into the one that vLLM reads.
        oracle: What the text config that the oracle reads says otherwise.
        served: What the config that vLLM reads says more.
        unbiased: No bias in the choice of experts: vLLM's router for CPUs leaves it out where experts have no groups.
        dtype: The engine's; weights are numbers of that dtype.
        notes: For the table.

    """

    name: str
    known_as: str
    config: Callable[[], PreTrainedConfig]
    variant: str = ""
    engine: Mapping[str, Any] = field(default_factory=dict)
    task: str = "generate"
    base: bool = False
    convert: Callable[[Path], None] | None = None
    oracle: Mapping[str, Any] = field(default_factory=dict)
    served: Mapping[str, Any] = field(default_factory=dict)
    unbiased: bool = False
    dtype: str = "float32"
    notes: str = ""

    @property
    def title(self) -> str:
        return f"{self.name} ({self.variant})" if self.variant else self.name

    def save(self, folder: Path) -> tuple[str, str]:
        """Write the checkpoint, the same at every run, and return its path and that of the oracle's."""
        named = getattr(transformers, self.name, None)
        make = AutoModelForCausalLM.from_config if named is None or self.base else named._from_config
        model = random_model(self.config(), seed=len(self.title), make=make)
        if self.dtype != "float32":
            model.to(getattr(torch, self.dtype)).float()
        if self.unbiased:
            for name, tensor in model.state_dict().items():
                if name.endswith(EXPERT_BIASES):
                    tensor.zero_()
        path, for_oracle = folder / "checkpoint", folder / "oracle"
        (model.base_model if self.base else model).save_pretrained(path)
        save_tokenizer(path)
        config_file = path / "config.json"
        config = json.loads(config_file.read_text()) | {"architectures": [self.name]}
        config.get("text_config", {}).pop("architectures", None)  # transformers names a class that has no head
        config_file.write_text(json.dumps(config))
        shutil.copytree(path, for_oracle)
        config.get("text_config", config).update(self.oracle)
        (for_oracle / "config.json").write_text(json.dumps(config))
        if self.served:
            config_file.write_text(json.dumps(json.loads(config_file.read_text()) | self.served))
        if self.convert is not None:
            self.convert(path)
        return str(path), str(for_oracle)


def of(config_class: str, *without: str, **values: Any) -> Callable[[], PreTrainedConfig]:
    """A function that makes a config of transformers': the common shape, and these values."""

    def make() -> PreTrainedConfig:
        kept = {name: value for name, value in {**WIDE, **values}.items() if name not in without}
        return getattr(transformers, config_class)(**kept)

    return make


def beside(
    config_class: str, text: Callable[[], PreTrainedConfig], tower: dict[str, Any], **more: Any
) -> Callable[[], PreTrainedConfig]:
    """A function that makes the config of a model that has a language model and a vision tower."""

    def make() -> PreTrainedConfig:
        return getattr(transformers, config_class)(text_config=text().to_dict(), vision_config=tower, **more)

    return make


def known(name: str) -> Callable[[], PreTrainedConfig]:
    """One of the models of the tests."""
    return partial(CONFIGS.__getitem__, name)


def _renamed(path: Path, names: Mapping[str, str]) -> dict[str, torch.Tensor]:
    """The weights, in whose names these parts are others."""
    weights = {}
    for name, weight in load_file(path / "model.safetensors").items():
        for before, after in names.items():
            name = name.replace(before, after)
        weights[name] = weight
    return weights


def packed_as_internlm2(path: Path) -> None:
    """Of each head of keys: its queries' heads, then itself, then its values."""
    names = {
        "embed_tokens": "tok_embeddings",
        "self_attn.o_proj": "attention.wo",
        "mlp.gate_proj": "feed_forward.w1",
        "mlp.down_proj": "feed_forward.w2",
        "mlp.up_proj": "feed_forward.w3",
        "input_layernorm": "attention_norm",
        "post_attention_layernorm": "ffn_norm",
        "lm_head": "output",
    }
    weights = _renamed(path, names)
    for layer in range(WIDE["num_hidden_layers"]):
        parts = [weights.pop(f"model.layers.{layer}.self_attn.{part}_proj.weight") for part in "qkv"]
        heads = [part.view(WIDE["num_key_value_heads"], -1, WIDE["head_dim"], WIDE["hidden_size"]) for part in parts]
        weights[f"model.layers.{layer}.attention.wqkv.weight"] = torch.cat(heads, 1).flatten(0, 2).contiguous()
    save_file(weights, path / "model.safetensors")


def named_as_exaone(path: Path) -> None:
    names = {
        "model.embed_tokens": "transformer.wte",
        "model.layers": "transformer.h",
        "model.norm": "transformer.ln_f",
        "self_attn.o_proj": "attn.attention.out_proj",
        "self_attn": "attn.attention",
        "mlp.gate_proj": "mlp.c_fc_0",
        "mlp.up_proj": "mlp.c_fc_1",
        "mlp.down_proj": "mlp.c_proj",
        "input_layernorm": "ln_1",
        "post_attention_layernorm": "ln_2",
    }
    save_file(_renamed(path, names), path / "model.safetensors")


def with_experts_as_published(path: Path) -> None:
    """Qwen3-VL's experts lie the other way around in published checkpoints than in what transformers 5 writes."""
    weights = load_file(path / "model.safetensors")
    turned = {name: weight.transpose(1, 2).contiguous() for name, weight in weights.items() if ".experts." in name}
    save_file({**weights, **turned}, path / "model.safetensors")


ARCHITECTURES: list[Architecture] = [
    # Those of the tests, the rotations that reach far among them.
    Architecture("LlamaForCausalLM", "Llama 1, 2, 3, Yi, DeepSeek-Coder, SmolLM2, Tulu", known("llama")),
    Architecture("LlamaForCausalLM", "Llama 3.1, 3.2, 3.3", known("llama3-rope"), variant="llama3 RoPE"),
    Architecture("LlamaForCausalLM", "Yarn-Llama-2", known("yarn-rope"), variant="yarn RoPE"),
    Architecture("LlamaForCausalLM", "models with one head of keys", known("llama-mqa"), variant="multi-query"),
    Architecture("MistralForCausalLM", "Mistral 7B v0.2 and v0.3, Mistral Nemo, Codestral", known("mistral")),
    Architecture("Qwen2ForCausalLM", "Qwen2, Qwen2.5, QwQ-32B, DeepSeek-R1-Distill-Qwen", known("qwen2")),
    Architecture("Qwen3ForCausalLM", "Qwen3 0.6B to 32B", known("qwen3")),
    Architecture(
        "Qwen3ForCausalLM",
        "Qwen3 as its card says for long texts",
        of("Qwen3Config", rope_parameters=YARN),
        variant="yarn RoPE",
    ),
    Architecture("GemmaForCausalLM", "Gemma, CodeGemma", known("gemma")),
    Architecture("Gemma2ForCausalLM", "Gemma 2", known("gemma2")),
    Architecture("Gemma3ForCausalLM", "Gemma 3 270M, 1B", known("gemma3")),
    Architecture("PhiForCausalLM", "Phi-1, 1.5, 2", known("phi")),
    Architecture("Phi3ForCausalLM", "Phi-3, Phi-3.5, Phi-4, with 4K", known("phi3")),
    Architecture("Phi3ForCausalLM", "Phi-3 and 3.5 with 128K, Phi-4-mini", known("longrope"), variant="longrope"),
    Architecture("CohereForCausalLM", "Command R, Aya 23", known("cohere")),
    Architecture("Glm4ForCausalLM", "GLM-4-0414", known("glm4")),
    Architecture("GptOssForCausalLM", "gpt-oss-20b, 120b", known("sinks")),
    # Attention and MLPs.
    Architecture("Qwen3MoeForCausalLM", "Qwen3-30B-A3B, Qwen3-235B-A22B, Qwen3-Coder", of("Qwen3MoeConfig", **MOE)),
    Architecture(
        "Qwen2MoeForCausalLM",
        "Qwen1.5-MoE, Qwen2-57B-A14B",
        of("Qwen2MoeConfig", **MOE, shared_expert_intermediate_size=48),
    ),
    Architecture("MixtralForCausalLM", "Mixtral 8x7B, 8x22B", of("MixtralConfig", **LOCAL_MOE)),
    Architecture("OlmoForCausalLM", "OLMo 1B, 7B", of("OlmoConfig")),
    Architecture("Olmo2ForCausalLM", "OLMo 2", of("Olmo2Config")),
    Architecture("Olmo3ForCausalLM", "OLMo 3", of("Olmo3Config", **SLIDING)),
    Architecture("OlmoeForCausalLM", "OLMoE-1B-7B", of("OlmoeConfig", num_experts=4, num_experts_per_tok=2)),
    Architecture("FlexOlmoForCausalLM", "FlexOlmo", of("FlexOlmoConfig", num_experts=4, num_experts_per_tok=2)),
    Architecture("GraniteForCausalLM", "Granite 3.0 to 3.3", of("GraniteConfig", **GRANITE)),
    Architecture("GraniteSWAForCausalLM", "Granite with sliding windows", of("GraniteSWAConfig", **GRANITE, **SLIDING)),
    Architecture(
        "GraniteMoeForCausalLM", "Granite 3 1B-A400M, 3B-A800M", of("GraniteMoeConfig", **GRANITE, **LOCAL_MOE)
    ),
    Architecture(
        "GraniteMoeSharedForCausalLM",
        "Granite MoE with shared experts",
        of("GraniteMoeSharedConfig", **GRANITE, **LOCAL_MOE, shared_intermediate_size=48),
    ),
    Architecture(
        "GraniteMoeSWAForCausalLM",
        "Granite MoE with sliding windows",
        of("GraniteMoeSWAConfig", **GRANITE, **LOCAL_MOE, **SLIDING, shared_intermediate_size=48),
    ),
    Architecture(
        "PhiMoEForCausalLM",
        "Phi-3.5-MoE",
        of("PhimoeConfig", **LOCAL_MOE, attention_bias=True),
        notes="(vLLM leaves out the bias of its head; compared without one)",
    ),
    Architecture(
        "StableLmForCausalLM",
        "StableLM 2, StableLM-3B-4E1T, Stable Code",
        of("StableLmConfig", use_qkv_bias=True, **default_rope(partial_rotary_factor=0.25)),
    ),
    Architecture(
        "FalconForCausalLM",
        "Falcon 7B, 11B, 40B, 180B",
        of("FalconConfig", "head_dim", new_decoder_architecture=True, num_kv_heads=2),
    ),
    Architecture("FalconForCausalLM", "Falcon-RW", of("FalconConfig", "head_dim", alibi=True), variant="ALiBi"),
    Architecture(
        "GPTNeoXForCausalLM",
        "Pythia, GPT-NeoX-20B, Dolly v2",
        of("GPTNeoXConfig", "num_key_value_heads", **default_rope(partial_rotary_factor=0.25)),
    ),
    Architecture(
        "GPTJForCausalLM",
        "GPT-J-6B",
        of("GPTJConfig", "num_key_value_heads", "head_dim", rotary_dim=16, n_inner=96),
        oracle={"n_positions": 256},  # the length of its table
    ),
    Architecture("NemotronForCausalLM", "Nemotron-4, Minitron", of("NemotronConfig")),
    Architecture("Starcoder2ForCausalLM", "StarCoder2", of("Starcoder2Config", sliding_window=None)),
    Architecture("Cohere2ForCausalLM", "Command R7B, Command A", of("Cohere2Config", **SLIDING), **ONE_MORE),
    Architecture(
        "Cohere2MoeForCausalLM",
        "Command MoE",
        of("Cohere2MoeConfig", **SLIDING, num_experts=4, num_experts_per_tok=2),
        **ONE_MORE,
    ),
    Architecture("SmolLM3ForCausalLM", "SmolLM3", of("SmolLM3Config", no_rope_layers=[1, 0, 1])),
    Architecture(
        "Exaone4ForCausalLM",
        "EXAONE 4.0 1.2B",
        of("Exaone4Config", sliding_window=None, layer_types=[FULL] * 3),
        variant="without sliding windows",
    ),
    Architecture("Exaone4ForCausalLM", "EXAONE 4.0 32B", of("Exaone4Config", **SLIDING)),
    Architecture(
        "ExaoneMoeForCausalLM",
        "K-EXAONE",
        of(
            "ExaoneMoeConfig",
            **SLIDING,
            **MOE,
            num_shared_experts=1,
            n_group=1,
            topk_group=1,
            mlp_layer_types=["dense", "sparse", "sparse"],
        ),
    ),
    Architecture(
        "Llama4ForCausalLM",
        "Llama 4 without chunked attention",
        of("Llama4TextConfig", **LLAMA4, attention_chunk_size=None),
        variant="no chunks",
        oracle={"attention_chunk_size": 4096, "layer_types": [FULL] * 3},
    ),
    Architecture(
        "Llama4ForCausalLM", "Llama 4 Scout, Maverick", of("Llama4TextConfig", **LLAMA4, attention_chunk_size=32)
    ),
    Architecture(
        "MiniMaxM2ForCausalLM",
        "MiniMax-M2",
        of("MiniMaxM2Config", **LOCAL_MOE, rotary_dim=16, scoring_func="sigmoid"),
        served={"use_routing_bias": True},
    ),
    Architecture(
        "Glm4MoeForCausalLM",
        "GLM-4.5, 4.6, 4.7, GLM-4.5-Air",
        of("Glm4MoeConfig", **ROUTED_MOE, **HALF_ROPE, use_qk_norm=True, num_mtp_layers=0),
    ),
    Architecture("GlmForCausalLM", "GLM-4-9B-hf, GLM-Edge", of("GlmConfig", **HALF_ROPE)),
    Architecture("Ernie4_5ForCausalLM", "ERNIE 4.5 0.3B", of("Ernie4_5Config")),
    Architecture(
        "Ernie4_5_MoeForCausalLM",
        "ERNIE 4.5 21B-A3B, 300B-A47B",
        of("Ernie4_5_MoeConfig", moe_num_experts=4, moe_k=2, moe_intermediate_size=48, moe_num_shared_experts=1),
        **UNBIASED,
    ),
    Architecture("HunYuanDenseV1ForCausalLM", "Hunyuan 0.5B to 7B, Hunyuan-MT", of("HunYuanDenseV1Config")),
    Architecture(
        "HunYuanMoEV1ForCausalLM",
        "Hunyuan-A13B",
        of(
            "HunYuanMoEV1Config",
            num_experts=4,
            moe_topk=[2, 2, 2],
            num_shared_expert=[1, 1, 1],
            use_mixed_mlp_moe=True,
            moe_intermediate_size=[96, 96, 96],
        ),
    ),
    Architecture("SeedOssForCausalLM", "Seed-OSS-36B", of("SeedOssConfig", attention_bias=True)),
    Architecture(
        "ApertusForCausalLM",
        "Apertus 8B, 70B",
        of("ApertusConfig"),
        notes="(with parameters of its activation that are the same in bfloat16, in which vLLM computes them)",
    ),
    Architecture("ArceeForCausalLM", "AFM-4.5B", of("ArceeConfig")),
    Architecture("CwmForCausalLM", "Code World Model", of("CwmConfig", **SLIDING)),
    Architecture("Jais2ForCausalLM", "Jais 2", of("Jais2Config")),
    Architecture("MellumForCausalLM", "Mellum 2", of("MellumConfig", **SLIDING, **MOE)),
    Architecture("VaultGemmaForCausalLM", "VaultGemma 1B", of("VaultGemmaConfig", **SLIDING, query_pre_attn_scalar=32)),
    Architecture(
        "AfmoeForCausalLM",
        "Trinity Nano, Mini, Large",
        of(
            "AfmoeConfig",
            **SLIDING,
            **MOE,
            num_shared_experts=1,
            score_func="sigmoid",
            route_norm=True,
            n_group=1,
            topk_group=1,
        ),
    ),
    Architecture(
        "DbrxForCausalLM",
        "DBRX",
        of(
            "DbrxConfig",
            "head_dim",
            "num_key_value_heads",
            "intermediate_size",
            attn_config={"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8},
            ffn_config={"ffn_hidden_size": 48, "moe_num_experts": 4, "moe_top_k": 2, "hidden_size": 128},
        ),
    ),
    # Fewer passes through its layers than by default: in float32 those would multiply rounding past the limit.
    Architecture("HrmTextForCausalLM", "HRM-Text", of("HrmTextConfig", prefix_lm=False, H_cycles=1, L_cycles=1)),
    Architecture(
        "HYV3ForCausalLM",
        "Hunyuan 3",
        of(
            "HYV3Config",
            **MOE,
            num_shared_experts=1,
            first_k_dense_replace=1,
            expert_hidden_dim=48,
            qk_norm=True,
            route_norm=True,
            mlp_layer_types=["dense", "sparse", "sparse"],
        ),
    ),
    Architecture("HyperCLOVAXForCausalLM", "HyperCLOVA X SEED Think", of("HyperCLOVAXConfig", **GRANITE)),
    Architecture(
        "LagunaForCausalLM",
        "Laguna",
        of(
            "LagunaConfig",
            **SLIDING,
            **MOE,
            shared_expert_intermediate_size=48,
            mlp_layer_types=["dense", "sparse", "sparse"],
        ),
    ),
    Architecture(
        "Ministral3ForCausalLM",
        "Ministral 3, Devstral 2",
        of("Ministral3Config", rope_parameters={**YARN, "llama_4_scaling_beta": 0.1}),
        served={"llama_4_scaling": {"original_max_position_embeddings": 32, "beta": 0.1}},
        notes="(vLLM takes the scale of its queries from Mistral's own form of the config only; given there)",
    ),
    Architecture(
        "MiMoV2FlashForCausalLM",
        "MiMo-V2-Flash",
        of("MiMoV2FlashConfig", **{**SLIDING, **ROUTED_MOE, "head_dim": 48}, v_head_dim=32),
        served={
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
        },
    ),
    # Attention beside layers with a state of their own.
    Architecture(
        "Qwen3NextForCausalLM",
        "Qwen3-Next-80B-A3B, Qwen3-Coder-Next",
        of("Qwen3NextConfig", **GATED_DELTA, **MOE, **QUARTER_ROPE, shared_expert_intermediate_size=48),
        dtype="bfloat16",
    ),
    Architecture(
        "Qwen3_5ForCausalLM",
        "Qwen3.5 without images",
        of("Qwen3_5TextConfig", **GATED_DELTA, **MROPE),
        dtype="bfloat16",
    ),
    Architecture(
        "Qwen3_5MoeForCausalLM",
        "Qwen3.5 MoE without images",
        of("Qwen3_5MoeTextConfig", **GATED_DELTA, **MOE, **MROPE, shared_expert_intermediate_size=48),
        dtype="bfloat16",
    ),
    Architecture("OlmoHybridForCausalLM", "OLMo Hybrid", of("OlmoHybridConfig", **GATED_DELTA, **default_rope())),
    Architecture(
        "Lfm2ForCausalLM",
        "LFM2 350M to 2.6B",
        of(
            "Lfm2Config",
            layer_types=["conv", FULL, "conv", FULL],
            num_hidden_layers=4,
            block_multiple_of=32,
            block_auto_adjust_ff_dim=False,
            conv_dim=128,
            block_dim=128,
        ),
        **NATIVE_ROPE,
    ),
    Architecture(
        "Lfm2MoeForCausalLM",
        "LFM2-8B-A1B",
        of("Lfm2MoeConfig", **MOE, layer_types=["conv", FULL, "conv", FULL], num_hidden_layers=4, num_dense_layers=1),
        unbiased=True,
        **NATIVE_ROPE,
    ),
    Architecture(
        "FalconH1ForCausalLM",
        "Falcon-H1",
        of("FalconH1Config", **MAMBA, mamba_d_ssm=256, mlp_multipliers=[1.0, 1.0], ssm_multipliers=[1.0] * 5),
        **NO_PREFIXES,
    ),
    Architecture(
        "GraniteMoeHybridForCausalLM",
        "Granite 4.0 Micro (attention alone)",
        of(
            "GraniteMoeHybridConfig",
            **{**GRANITE, **LOCAL_MOE, "num_local_experts": 0},
            shared_intermediate_size=48,
            layer_types=["attention"] * 3,
            position_embedding_type="rope",
            **MAMBA,
        ),
        variant="RoPE",
    ),
    Architecture(
        "GraniteMoeHybridForCausalLM",
        "Granite 4.0 H",
        of(
            "GraniteMoeHybridConfig",
            **GRANITE,
            **LOCAL_MOE,
            shared_intermediate_size=48,
            layer_types=["mamba", "attention", "mamba"],
            **MAMBA,
        ),
    ),
    Architecture(
        "Zamba2ForCausalLM",
        "Zamba2, where use_mem_rope is set",
        of(
            "Zamba2Config",
            "head_dim",
            layers_block_type=["mamba", "hybrid", "mamba", "hybrid"],
            num_hidden_layers=4,
            num_mem_blocks=1,
            use_mem_rope=True,
            mamba_d_state=16,
            n_mamba_heads=8,
            mamba_headdim=32,
            chunk_size=256,
            num_key_value_heads=4,
            use_mamba_kernels=False,
        ),
        **NO_PREFIXES,
    ),
    Architecture(
        "JambaForCausalLM",
        "Jamba 1.5, 1.6, 1.7, Jamba Reasoning",
        of(
            "JambaConfig",
            num_experts=4,
            num_hidden_layers=4,
            attn_layer_period=2,
            attn_layer_offset=1,
            use_mamba_kernels=False,
        ),
    ),
    Architecture(
        "NemotronHForCausalLM",
        "Nemotron-H, Nemotron Nano 2 and 3",
        of(
            "NemotronHConfig",
            "num_hidden_layers",
            layers_block_type=["mamba", "attention", "moe"],
            ssm_state_size=16,
            mamba_num_heads=8,
            mamba_head_dim=32,
            n_groups=1,
            chunk_size=256,
            n_routed_experts=4,
            moe_intermediate_size=48,
            moe_shared_expert_intermediate_size=48,
            use_mamba_kernels=False,
        ),
    ),
    # The gated models of Google's.
    Architecture(
        "Gemma3nForCausalLM",
        "Gemma 3n E2B, E4B, text",
        of(
            "Gemma3nTextConfig",
            num_hidden_layers=4,
            num_kv_shared_layers=2,
            sliding_window=24,
            layer_types=[SLIDES, FULL, SLIDES, FULL],
            intermediate_size=[96] * 4,
            vocab_size_per_layer_input=160,
            hidden_size_per_layer_input=16,
            laurel_rank=8,
            activation_sparsity_pattern=[0.0] * 4,
        ),
    ),
    Architecture("Gemma4ForCausalLM", "Gemma 4 E2B, E4B, text", of("Gemma4TextConfig", **GEMMA4)),
    Architecture(
        "Gemma4ForCausalLM",
        "Gemma 4 26B-A4B, text",
        of(
            "Gemma4TextConfig",
            **{**GEMMA4, "num_kv_shared_layers": 0},
            enable_moe_block=True,
            num_experts=4,
            top_k_experts=2,
            moe_intermediate_size=48,
        ),
        variant="MoE",
    ),
    # Embeddings and scores.
    Architecture("LlamaModel", "embedding models of Llama's", of("LlamaConfig"), task="embed", base=True),
    Architecture(
        "MistralModel",
        "E5-Mistral-7B, Linq-Embed, SFR-Embedding",
        of("MistralConfig", sliding_window=None),
        task="embed",
        base=True,
    ),
    Architecture("Qwen2Model", "gte-Qwen2 (causal)", of("Qwen2Config"), task="embed", base=True),
    Architecture(
        "Gemma2Model",
        "BGE-Multilingual-Gemma2",
        of("Gemma2Config", **SLIDING, query_pre_attn_scalar=32),
        task="embed",
        base=True,
    ),
    Architecture(
        "Gemma3TextModel",
        "EmbeddingGemma",
        of("Gemma3TextConfig", **SLIDING, query_pre_attn_scalar=32, use_bidirectional_attention=True),
        task="embed",
        base=True,
    ),
    Architecture(
        "Qwen3ForCausalLM",
        "Qwen3-Embedding",
        of("Qwen3Config"),
        variant="embeddings",
        task="embed",
        engine={"convert": "embed"},
    ),
    Architecture(
        "Qwen3ForSequenceClassification", "Qwen3-Reranker, converted", of("Qwen3Config", num_labels=3), task="classify"
    ),
    Architecture(
        "Qwen2ForSequenceClassification",
        "Qwen2 classifiers, mxbai-rerank",
        of("Qwen2Config", num_labels=3),
        task="classify",
    ),
    Architecture(
        "LlamaForSequenceClassification",
        "Skywork-Reward, Llama classifiers",
        of("LlamaConfig", num_labels=3),
        task="classify",
    ),
    Architecture(
        "LlamaBidirectionalModel",
        "llama-nemotron-embed",
        of("LlamaConfig", pooling="avg"),
        task="embed",
        base=True,
        oracle={"is_causal": False},  # vLLM's config says it
    ),
    # No RoPE, or keys that cannot be rotated anew.
    Architecture("BloomForCausalLM", "BLOOM, BLOOMZ", of("BloomConfig", "num_key_value_heads", n_layer=3, n_head=4)),
    Architecture("OPTForCausalLM", "OPT", of("OPTConfig", "num_key_value_heads", ffn_dim=96)),
    Architecture("GPT2LMHeadModel", "GPT-2", of("GPT2Config", "num_key_value_heads", "intermediate_size", n_inner=96)),
    Architecture(
        "GPTBigCodeForCausalLM",
        "StarCoder, SantaCoder",
        of("GPTBigCodeConfig", "num_key_value_heads", "intermediate_size", n_inner=96),
    ),
    Architecture("MambaForCausalLM", "Mamba", of("MambaConfig", "intermediate_size")),
    Architecture(
        "Mamba2ForCausalLM",
        "Mamba-2, Codestral Mamba",
        of("Mamba2Config", "intermediate_size", num_heads=8, n_groups=1, state_size=16, chunk_size=16),
    ),
    Architecture("FalconMambaForCausalLM", "Falcon Mamba", of("FalconMambaConfig", "intermediate_size")),
    Architecture(
        "DeepseekV2ForCausalLM",
        "DeepSeek-V2, V2-Lite, V2.5",
        of("DeepseekV2Config", "head_dim", **{**ROUTED_MOE, **MLA}, num_key_value_heads=4, q_lora_rank=None),
    ),
    Architecture(
        "DeepseekV3ForCausalLM",
        "DeepSeek-V3, R1, V3.1, Kimi-K2",
        of("DeepseekV3Config", "head_dim", **ROUTED_MOE, **MLA, num_key_value_heads=4, q_lora_rank=32),
    ),
    Architecture(
        "DeepseekV32ForCausalLM",
        "DeepSeek-V3.2",
        of("DeepseekV32Config", "head_dim", **ROUTED_MOE, **MLA, num_key_value_heads=4, q_lora_rank=32),
    ),
    Architecture(
        "AXK1ForCausalLM",
        "A.X K1",
        of("AXK1Config", "head_dim", **ROUTED_MOE, **MLA, num_key_value_heads=4, q_lora_rank=32),
    ),
    Architecture(
        "Glm4MoeLiteForCausalLM",
        "GLM-4.7-Flash",
        of("Glm4MoeLiteConfig", "head_dim", **ROUTED_MOE, **MLA, num_key_value_heads=4, q_lora_rank=32),
    ),
    Architecture(
        "GlmMoeDsaForCausalLM",
        "GLM-5",
        of("GlmMoeDsaConfig", "head_dim", **ROUTED_MOE, **MLA, num_key_value_heads=4, q_lora_rank=32),
    ),
    Architecture(
        "LongcatFlashForCausalLM",
        "LongCat-Flash",
        of(
            "LongcatFlashConfig",
            "head_dim",
            "intermediate_size",
            "num_hidden_layers",
            **MLA,
            num_layers=2,
            ffn_hidden_size=96,
            moe_topk=2,
            n_routed_experts=4,
            zero_expert_num=2,
            expert_ffn_hidden_size=48,
            num_key_value_heads=4,
            q_lora_rank=32,
        ),
    ),
    Architecture(
        "MiniCPM3ForCausalLM",
        "MiniCPM3-4B",
        of("MiniCPM3Config", "head_dim", **MLA, num_key_value_heads=4, q_lora_rank=32),
    ),
    # Models of images, video or sound, served with text alone.
    Architecture(
        "LlavaForConditionalGeneration",
        "LLaVA 1.5",
        beside("LlavaConfig", of("LlamaConfig"), CLIP),
        engine=IMAGES_ALONE,
    ),
    Architecture(
        "LlavaNextForConditionalGeneration",
        "LLaVA 1.6",
        beside("LlavaNextConfig", of("MistralConfig", sliding_window=None), CLIP),
        engine=IMAGES_ALONE,
    ),
    Architecture(
        "LlavaNextVideoForConditionalGeneration",
        "LLaVA-NeXT-Video",
        beside("LlavaNextVideoConfig", of("LlamaConfig"), CLIP),
        engine=TEXT_ALONE,
    ),
    Architecture(
        "LlavaOnevisionForConditionalGeneration",
        "LLaVA-OneVision",
        beside("LlavaOnevisionConfig", of("Qwen2Config"), SIGLIP),
        engine=TEXT_ALONE,
    ),
    Architecture(
        "Mistral3ForConditionalGeneration",
        "Mistral Small 3.1, 3.2, Magistral",
        beside("Mistral3Config", of("MistralConfig", sliding_window=None), PIXTRAL),
        engine=IMAGES_ALONE,
    ),
    Architecture(
        "Gemma3ForConditionalGeneration",
        "Gemma 3 4B, 12B, 27B, MedGemma",
        beside("Gemma3Config", known("gemma3"), SIGLIP, mm_tokens_per_image=4),
        engine=IMAGES_ALONE,
    ),
    Architecture(
        "PaliGemmaForConditionalGeneration",
        "PaliGemma",
        beside("PaliGemmaConfig", known("gemma"), SIGLIP, projection_dim=64),
        engine=IMAGES_ALONE,
    ),
    Architecture(
        "InternVLForConditionalGeneration",
        "InternVL 3, 3.5 (HF)",
        beside(
            "InternVLConfig",
            of("Qwen3Config"),
            {"model_type": "internvl_vision", **VISION, "image_size": [28, 28], "patch_size": [14, 14]},
        ),
        engine=TEXT_ALONE,
    ),
    Architecture(
        "Idefics3ForConditionalGeneration",
        "Idefics3",
        beside("Idefics3Config", of("LlamaConfig"), {"model_type": "idefics3_vision", **VISION}),
        engine=IMAGES_ALONE,
    ),
    Architecture(
        "SmolVLMForConditionalGeneration",
        "SmolVLM, SmolVLM2",
        beside("SmolVLMConfig", of("LlamaConfig"), {"model_type": "smolvlm_vision", **VISION}),
        engine=IMAGES_ALONE,
    ),
    Architecture(
        "Cohere2VisionForConditionalGeneration",
        "Command A Vision",
        beside("Cohere2VisionConfig", of("Cohere2Config", **SLIDING), SIGLIP, alignment_intermediate_size=64),
        engine=IMAGES_ALONE,
        **ONE_MORE,
    ),
    Architecture(
        "AriaForConditionalGeneration",
        "Aria",
        beside(
            "AriaConfig",
            of("AriaTextConfig", moe_num_experts=4, moe_topk=2, moe_num_shared_experts=1),
            {"model_type": "idefics3_vision", **VISION},
        ),
        engine=IMAGES_ALONE,
    ),
    Architecture(
        "Llama4ForConditionalGeneration",
        "Llama 4 Scout, Maverick with images",
        beside(
            "Llama4Config",
            of("Llama4TextConfig", **LLAMA4, attention_chunk_size=32),
            {
                "model_type": "llama4_vision_model",
                **VISION,
                "vision_output_dim": 32,
                "projector_input_dim": 32,
                "projector_output_dim": 32,
            },
        ),
        engine=IMAGES_ALONE,
    ),
    Architecture(
        "Lfm2VlForConditionalGeneration",
        "LFM2-VL",
        beside(
            "Lfm2VlConfig",
            of(
                "Lfm2Config",
                layer_types=["conv", FULL, "conv"],
                block_multiple_of=32,
                block_auto_adjust_ff_dim=False,
                conv_dim=128,
                block_dim=128,
            ),
            {"model_type": "siglip2_vision_model", **VISION, "num_patches": 16},
            projector_hidden_size=64,
        ),
        engine={**IMAGES_ALONE, **NATIVE_ROPE["engine"]},
        notes=NATIVE_ROPE["notes"],
    ),
    Architecture(
        "Qwen2VLForConditionalGeneration",
        "Qwen2-VL",
        beside(
            "Qwen2VLConfig",
            of("Qwen2VLTextConfig", **AXES),
            {"depth": 2, "embed_dim": 32, "num_heads": 2, "hidden_size": 128},
        ),
        engine=TEXT_ALONE,
    ),
    Architecture(
        "Qwen2_5_VLForConditionalGeneration",
        "Qwen2.5-VL, UI-TARS",
        beside(
            "Qwen2_5_VLConfig",
            of("Qwen2_5_VLTextConfig", **AXES),
            {
                "depth": 2,
                "num_heads": 2,
                "hidden_size": 32,
                "intermediate_size": 64,
                "out_hidden_size": 128,
                "fullatt_block_indexes": [1],
            },
        ),
        engine=TEXT_ALONE,
    ),
    Architecture(
        "Qwen3VLForConditionalGeneration",
        "Qwen3-VL 2B to 32B",
        beside("Qwen3VLConfig", of("Qwen3VLTextConfig", **AXES, head_dim=32), QWEN3_VISION),
        engine=TEXT_ALONE,
    ),
    Architecture(
        "Qwen3VLMoeForConditionalGeneration",
        "Qwen3-VL-30B-A3B, 235B-A22B",
        beside("Qwen3VLMoeConfig", of("Qwen3VLMoeTextConfig", **AXES, **MOE, norm_topk_prob=True), QWEN3_VISION),
        engine=TEXT_ALONE,
        convert=with_experts_as_published,
    ),
    Architecture(
        "Qwen3_5ForConditionalGeneration",
        "Qwen3.5 0.8B to 27B",
        beside("Qwen3_5Config", of("Qwen3_5TextConfig", **GATED_DELTA, **MROPE), QWEN3_5_VISION),
        engine=TEXT_ALONE,
        dtype="bfloat16",
    ),
    Architecture(
        "Qwen3_5MoeForConditionalGeneration",
        "Qwen3.5-35B-A3B, 397B-A17B",
        beside(
            "Qwen3_5MoeConfig",
            of("Qwen3_5MoeTextConfig", **GATED_DELTA, **MOE, **MROPE, shared_expert_intermediate_size=48),
            QWEN3_5_VISION,
        ),
        engine=TEXT_ALONE,
        dtype="bfloat16",
    ),
    Architecture(
        "Glm4vForConditionalGeneration",
        "GLM-4.1V, GLM-4.6V-Flash",
        beside("Glm4vConfig", of("Glm4vTextConfig", **GLM_AXES, attention_bias=True), GLM_VISION),
        engine=TEXT_ALONE,
    ),
    Architecture(
        "Glm4vMoeForConditionalGeneration",
        "GLM-4.5V, 4.6V",
        beside("Glm4vMoeConfig", of("Glm4vMoeTextConfig", **ROUTED_MOE, **GLM_AXES, use_qk_norm=False), GLM_VISION),
        engine=TEXT_ALONE,
    ),
    Architecture(
        "GlmOcrForConditionalGeneration",
        "GLM-OCR",
        beside("GlmOcrConfig", of("GlmOcrTextConfig", **GLM_AXES), GLM_VISION),
        engine=TEXT_ALONE,
    ),
    Architecture(
        "PaddleOCRVLForConditionalGeneration",
        "PaddleOCR-VL",
        beside("PaddleOCRVLConfig", of("PaddleOCRTextConfig", **AXES), VISION),
        engine=TEXT_ALONE,
    ),
    Architecture(
        "Exaone4_5_ForConditionalGeneration",
        "EXAONE 4.5",
        beside(
            "Exaone4_5_Config",
            of("Exaone4Config", **SLIDING),
            {
                "depth": 2,
                "num_heads": 2,
                "num_key_value_heads": 2,
                "hidden_size": 32,
                "intermediate_size": 64,
                "out_hidden_size": 128,
                "fullatt_block_indexes": [1],
            },
        ),
        engine=TEXT_ALONE,
    ),
    # Other names of architectures above.
    *(
        Architecture(name, families, of("LlamaConfig"), notes="(vLLM's Llama)")
        for name, families in {
            "InternLM3ForCausalLM": "InternLM3-8B",
            "IQuestCoderForCausalLM": "IQuest-Coder 40B",
            "LLaMAForCausalLM": "first conversions of Llama 1",
            "TeleChat3ForCausalLM": "TeleChat3",
        }.items()
    ),
    # Those whose code is not in transformers, but is that of another there with other names.
    Architecture("MiMoForCausalLM", "MiMo-7B", of("Qwen2Config"), notes="(as Qwen2)"),
    Architecture(
        "OrionForCausalLM",
        "Orion-14B",
        of("StableLmConfig", **default_rope(partial_rotary_factor=1.0)),
        served={"rms_norm_eps": 1e-5},
        notes="(as StableLM that rotates all dimensions)",
    ),
    Architecture(
        "MiniCPMForCausalLM",
        "MiniCPM 1B, 2B, MiniCPM4",
        of("GraniteConfig", **{**GRANITE, "attention_multiplier": 32**-0.5}),
        served={"scale_emb": 2.0, "scale_depth": 0.5 * 3**0.5, "dim_model_base": 64, "num_experts": 0},
        notes="(as Granite)",
    ),
    Architecture(
        "InternLM2ForCausalLM",
        "InternLM2, InternLM2.5",
        of("LlamaConfig"),
        convert=packed_as_internlm2,
        served={"bias": False},
        notes="(as Llama, its weights packed)",
    ),
    Architecture(
        "ExaoneForCausalLM",
        "EXAONE 3.0, 3.5, Deep",
        of("LlamaConfig"),
        convert=named_as_exaone,
        served={"num_layers": 3, "activation_function": "silu", "layer_norm_epsilon": 1e-6},
        notes="(as Llama, its weights by other names)",
    ),
    Architecture(
        "SolarForCausalLM",
        "Solar Pro",
        of("LlamaConfig"),
        served={**{f"bskcn_{n}": [] for n in range(1, 5)}, "bskcn_tv": [1.0, 0.0]},
        notes="(as Llama, without its skip connections)",
    ),
    Architecture(
        "PanguEmbeddedForCausalLM",
        "openPangu Embedded 1B, 7B",
        of("LlamaConfig", attention_bias=True),
        served={"bias": True},
        notes="(as Llama with biases)",
    ),
]

BY_TITLE = {one.title: one for one in ARCHITECTURES}
