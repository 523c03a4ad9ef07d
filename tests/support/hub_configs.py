"""Configs of models as the Hugging Face hub has them, for tests that know no network and need no weights.

What decides how a model is served and what it takes is here, under the hub's names; the rest of each file is left out.
"""

import json
from pathlib import Path
from typing import Any

_QWEN_2_5: dict[str, Any] = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "hidden_act": "silu",
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "sliding_window": 131072,
    "use_sliding_window": False,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "vocab_size": 152064,
}
_QWEN_2_5_7B: dict[str, Any] = {
    **_QWEN_2_5,
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "max_window_layers": 28,
    "num_attention_heads": 28,
    "num_hidden_layers": 28,
    "num_key_value_heads": 4,
}

CONFIGS: dict[str, dict[str, Any]] = {
    "Qwen/Qwen2.5-1.5B-Instruct": {
        **_QWEN_2_5,
        "hidden_size": 1536,
        "intermediate_size": 8960,
        "max_window_layers": 21,
        "num_attention_heads": 12,
        "num_hidden_layers": 28,
        "num_key_value_heads": 2,
        "sliding_window": 32768,
        "tie_word_embeddings": True,
        "vocab_size": 151936,
    },
    "Qwen/Qwen2.5-7B-Instruct": _QWEN_2_5_7B,
    "Qwen/Qwen2.5-7B-Instruct-AWQ": {
        **_QWEN_2_5_7B,
        "torch_dtype": "float16",
        "quantization_config": {
            "bits": 4,
            "group_size": 128,
            "modules_to_not_convert": None,
            "quant_method": "awq",
            "version": "gemm",
            "zero_point": True,
        },
    },
    "Qwen/Qwen2.5-72B-Instruct": {
        **_QWEN_2_5,
        "hidden_size": 8192,
        "intermediate_size": 29568,
        "max_window_layers": 70,
        "num_attention_heads": 64,
        "num_hidden_layers": 80,
        "num_key_value_heads": 8,
    },
    "meta-llama/Meta-Llama-3-8B-Instruct": {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "attention_bias": False,
        "hidden_act": "silu",
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "max_position_embeddings": 8192,
        "num_attention_heads": 32,
        "num_hidden_layers": 32,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-05,
        "rope_scaling": None,
        "rope_theta": 500000.0,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "vocab_size": 128256,
    },
    "google/gemma-2-9b-it": {
        "architectures": ["Gemma2ForCausalLM"],
        "model_type": "gemma2",
        "attention_bias": False,
        "attn_logit_softcapping": 50.0,
        "cache_implementation": "hybrid",
        "final_logit_softcapping": 30.0,
        "head_dim": 256,
        "hidden_act": "gelu_pytorch_tanh",
        "hidden_activation": "gelu_pytorch_tanh",
        "hidden_size": 3584,
        "intermediate_size": 14336,
        "max_position_embeddings": 8192,
        "num_attention_heads": 16,
        "num_hidden_layers": 42,
        "num_key_value_heads": 8,
        "query_pre_attn_scalar": 256,
        "rms_norm_eps": 1e-06,
        "rope_theta": 10000.0,
        "sliding_window": 4096,
        "sliding_window_size": 4096,
        "torch_dtype": "bfloat16",
        "vocab_size": 256000,
    },
}

WEIGHTS = {
    "Qwen/Qwen2.5-1.5B-Instruct": 3_087_428_608,
    "Qwen/Qwen2.5-7B-Instruct": 15_231_233_024,
    "Qwen/Qwen2.5-72B-Instruct": 145_412_407_296,
    "meta-llama/Meta-Llama-3-8B-Instruct": 16_060_522_496,
    "google/gemma-2-9b-it": 18_483_411_968,
}
"""Bytes of a checkpoint's tensors as it is published: what has to follow from its config."""


def save_configs(folder: Path) -> None:
    """Write every config to where its name leads from `folder`, which then is to vLLM what the hub would be."""
    for name, config in CONFIGS.items():
        path = folder / name
        path.mkdir(parents=True)
        (path / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
