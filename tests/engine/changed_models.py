"""Checkpoints made of another: a LoRA adapter for it, the two merged, its weights in int8."""

import json
import shutil
from collections.abc import Callable
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from tests.support.models import CONFIGS


def save_random_adapter(name: str, folder: Path, seed: int = 1) -> str:
    """Write a LoRA adapter, in PEFT's format, for the attention of the random model `name`, and return its path."""
    config, rank = CONFIGS[name], 8
    heads, kv_heads = (number * config.head_dim for number in (config.num_attention_heads, config.num_key_value_heads))
    sizes = {"q_proj": heads, "k_proj": kv_heads, "v_proj": kv_heads}
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for layer in range(config.num_hidden_layers):
        for module, size in sizes.items():
            prefix = f"base_model.model.model.layers.{layer}.self_attn.{module}"
            for matrix, shape in {"A": (rank, config.hidden_size), "B": (size, rank)}.items():
                drawn = torch.randn(shape, generator=generator)
                weights[f"{prefix}.lora_{matrix}.weight"] = config.initializer_range * drawn
    path = folder / f"{name}-adapter-{seed}"
    path.mkdir(exist_ok=True)
    save_file(weights, path / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "r": rank, "lora_alpha": 2 * rank, "target_modules": list(sizes)}
    (path / "adapter_config.json").write_text(json.dumps(settings))
    return str(path)


def save_merged(checkpoint: str, adapter: str, folder: Path) -> str:
    """Write the model with the adapter's products added to its weights, and return its path."""
    settings = json.loads((Path(adapter) / "adapter_config.json").read_text())
    lora = load_file(Path(adapter) / "adapter_model.safetensors")

    def merge(name: str, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        path = f"base_model.model.{name.removesuffix('.weight')}"
        if f"{path}.lora_A.weight" not in lora:
            return {name: weight}
        product = lora[f"{path}.lora_B.weight"] @ lora[f"{path}.lora_A.weight"]
        return {name: weight + settings["lora_alpha"] / settings["r"] * product}

    return save_changed(checkpoint, folder / f"{Path(adapter).name}-merged", merge)


def save_in_int8(checkpoint: str, folder: Path) -> tuple[str, str]:
    """Write the model with its layers' weights as int8, a scale for each row, and with what these stand for.

    Returns:
        The path of the checkpoint in int8, in the format of compressed-tensors, whose activations vLLM rounds to int8
        too (W8A8), and of the same weights in floating point.

    """

    def scale(weight: torch.Tensor) -> torch.Tensor:
        return weight.abs().amax(1, keepdim=True) / 127

    def quantize(name: str, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        if "_proj." not in name:
            return {name: weight}
        return {name: (weight / scale(weight)).round().to(torch.int8), f"{name}_scale": scale(weight)}

    def round_off(name: str, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        return {name: (weight / scale(weight)).round() * scale(weight) if "_proj." in name else weight}

    rounding = {"num_bits": 8, "type": "int", "symmetric": True}
    layers = {
        "targets": ["Linear"],
        "weights": {**rounding, "strategy": "channel", "dynamic": False},
        "input_activations": {**rounding, "strategy": "token", "dynamic": True},
    }
    quantization = {
        "quant_method": "compressed-tensors",
        "format": "int-quantized",
        "quantization_status": "compressed",
        "ignore": ["lm_head"],
        "config_groups": {"group_0": layers},
    }
    return (
        save_changed(checkpoint, folder / "int8", quantize, quantization_config=quantization),
        save_changed(checkpoint, folder / "rounded", round_off),
    )


def save_changed(
    checkpoint: str, path: Path, change: Callable[[str, torch.Tensor], dict[str, torch.Tensor]], **config: Any
) -> str:
    """Write a checkpoint with each tensor, by name, changed to others, and more in its config; return its path."""
    shutil.copytree(checkpoint, path)
    weights = load_file(path / "model.safetensors")
    save_file(dict(chain.from_iterable(change(*one).items() for one in weights.items())), path / "model.safetensors")
    config_file = path / "config.json"
    config_file.write_text(json.dumps(json.loads(config_file.read_text()) | config))
    return str(path)
