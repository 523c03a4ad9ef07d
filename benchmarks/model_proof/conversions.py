"""Checkpoints as published, where transformers writes their architecture otherwise or has no code for it."""

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from .parts import WIDE


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
    transposed = {name: weight.transpose(1, 2).contiguous() for name, weight in weights.items() if ".experts." in name}
    save_file({**weights, **transposed}, path / "model.safetensors")
