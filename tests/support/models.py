"""Small random models of many architectures, their weights large enough that attention, and so positions, matter."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    Glm4Config,
    GptOssConfig,
    LlamaConfig,
    MistralConfig,
    Phi3Config,
    PhiConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

TRAINED_LENGTH = 64
VOCAB_SIZE = 160
EXPERT_BIASES = ("e_score_correction_bias", "expert_bias")
"""Decide which experts are chosen."""

DIGITS = range(10, 20)
"""The tokens that `save_tokenizer` calls "0" to "9"."""

SHAPE: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": TRAINED_LENGTH,
    "initializer_range": 0.15,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}
SLIDING = {"sliding_window": 24, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}


def _without(*names: str) -> dict[str, Any]:
    return {name: value for name, value in SHAPE.items() if name not in names}


CONFIGS: dict[str, PreTrainedConfig] = {
    "llama": LlamaConfig(**SHAPE),
    "llama-mqa": LlamaConfig(**{**SHAPE, "num_key_value_heads": 1}),
    "mistral": MistralConfig(**SHAPE, sliding_window=None),
    "qwen2": Qwen2Config(**_without("head_dim", "hidden_size"), hidden_size=128),
    "qwen3": Qwen3Config(**SHAPE),
    "gemma": GemmaConfig(**SHAPE),
    "gemma2": Gemma2Config(
        **SHAPE, **SLIDING, attn_logit_softcapping=5.0, final_logit_softcapping=10.0, query_pre_attn_scalar=32
    ),
    "gemma3": Gemma3TextConfig(
        **SHAPE,
        **SLIDING,
        query_pre_attn_scalar=32,
        rope_parameters={
            "full_attention": {"rope_type": "linear", "factor": 2.0, "rope_theta": 100000.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 1000.0},
        },
    ),
    "phi": PhiConfig(
        **{**_without("head_dim"), "hidden_size": 128},
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5},
    ),
    "phi3": Phi3Config(**{**_without("head_dim"), "hidden_size": 128}, sliding_window=None),
    "cohere": CohereConfig(**{**_without("head_dim"), "hidden_size": 128}),
    "glm4": Glm4Config(
        **SHAPE, rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}
    ),
    "llama3-rope": LlamaConfig(
        **SHAPE,
        rope_parameters={
            "rope_type": "llama3",
            "rope_theta": 10000.0,
            "factor": 4.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
        },
    ),
    "yarn-rope": LlamaConfig(
        **SHAPE,
        rope_parameters={
            "rope_type": "yarn",
            "rope_theta": 10000.0,
            "factor": 2.0,
            "original_max_position_embeddings": 32,
        },
    ),
    "longrope": Phi3Config(
        **{**_without("head_dim"), "hidden_size": 128},
        sliding_window=None,
        original_max_position_embeddings=32,
        rope_parameters={
            "rope_type": "longrope",
            "rope_theta": 10000.0,
            "short_factor": [1.0 + 0.02 * n for n in range(16)],
            "long_factor": [1.0 + 0.3 * n for n in range(16)],
            "original_max_position_embeddings": 32,
        },
    ),
    # gpt-oss. Every token goes to every expert: a choice of experts would turn rounding into other answers.
    "sinks": GptOssConfig(
        **SHAPE,
        **SLIDING,
        num_local_experts=2,
        num_experts_per_tok=2,
        rope_parameters={
            "rope_type": "yarn",
            "rope_theta": 10000.0,
            "factor": 2.0,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "truncate": False,
            "original_max_position_embeddings": 32,
        },
    ),
}


def random_prompts(lengths: Sequence[int], seed: int) -> list[list[int]]:
    """Random tokens that none of the models takes for a special one."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, VOCAB_SIZE, (length,), generator=generator).tolist() for length in lengths]


def save_random_model(name: str, folder: Path) -> str:
    """Write the random model `name` as a checkpoint, the same at every run, and return its path."""
    path = folder / name
    random_model(CONFIGS[name], seed=sorted(CONFIGS).index(name)).save_pretrained(path)
    return str(path)


def random_model(
    config: PreTrainedConfig, seed: int, make: Callable[..., PreTrainedModel] = AutoModelForCausalLM.from_config
) -> PreTrainedModel:
    """A model whose every weight is drawn at random, the same at every run."""
    torch.manual_seed(seed)
    model = make(config, dtype=torch.float32)
    with torch.no_grad():
        for name, buffer in model.named_buffers():
            if name.endswith(EXPERT_BIASES):
                buffer.normal_(0.0, 0.1)
        for name, parameter in model.named_parameters():
            if name.endswith(EXPERT_BIASES):
                parameter.normal_(0.0, 0.1)
            elif "bias" in name:
                parameter.normal_(0.0, 0.3)
            elif "sink" in name:
                parameter.normal_(3.0, 1.0)
            elif "norm" in name:
                parameter.add_(0.2 * torch.randn_like(parameter))
            elif name.endswith(("act_fn.alpha_p", "act_fn.alpha_n")):  # xIELU's
                parameter.fill_(-20.0)  # vLLM has its softplus in bfloat16; this one is 0
    return model


def save_tokenizer(path: Path) -> None:
    """Put a tokenizer beside a model: a word a token, the digits, and names that no pattern of digits has."""
    words = [f"<{token}>" for token in range(VOCAB_SIZE)]
    words[DIGITS.start : DIGITS.stop] = "0123456789"
    tokenizer = Tokenizer(models.WordLevel({word: token for token, word in enumerate(words)}, unk_token="<2>"))
    tokenizer.decoder = decoders.Fuse()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<1>").save_pretrained(path)
