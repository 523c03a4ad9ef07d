"""After a model is loaded: hold its rotary modules against its config, lengthen their tables, bind the layers.

The table of cosines and sines that vLLM built ends at the checkpoint's length (for some RoPE types at a length of their
own), and a position past it would be read out of bounds. It is lengthened to `max_model_len` rows here, after the rows
that are there have been found equal to what the config says.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from vllm.config import ModelConfig, VllmConfig
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.rotary_embedding import Phi3LongRoPEScaledRotaryEmbedding
from vllm.model_executor.layers.rotary_embedding.base import RotaryEmbeddingBase

from .attention import SelfExtendImpl
from .backends import Rotation
from .config import ExtensionPlan
from .engine_args import worker_plan
from .rotary import Frequencies, cos_sin, inverse_frequencies, rope_parameters

# The longrope module keeps both its tables in one and is not a RotaryEmbeddingBase.
_ROTARY_CLASSES = (RotaryEmbeddingBase, Phi3LongRoPEScaledRotaryEmbedding)
_TABLE_NAMES = ("cos_sin_cache", "cos_sin_cache_bf16", "long_short_cos_sin_cache")


def bind_models(model_runner: Any, vllm_config: VllmConfig) -> None:
    """Bind the served model of a worker, and its draft model if it has one.

    Raises:
        ValueError: A layer's rotation cannot be told or is not what the config says.

    """
    plan = worker_plan(vllm_config)
    bind_model(model_runner.get_model(), vllm_config.model_config, plan)
    drafter = getattr(model_runner, "drafter", None) or getattr(model_runner, "speculator", None)
    if isinstance(draft := getattr(drafter, "model", None), nn.Module):
        bind_model(draft, vllm_config.speculative_config.draft_model_config, plan, may_be_short=True)


def bind_model(model: nn.Module, model_config: ModelConfig, plan: ExtensionPlan, *, may_be_short: bool = False) -> None:
    """Check and lengthen every rotary table of `model`, and give each full-attention layer its rotation."""
    name = model_config.model
    rotations: dict[int, tuple[Frequencies, nn.Module]] = {}
    for path, module in model.named_modules():
        if isinstance(module, _ROTARY_CLASSES) and id(module) not in rotations:
            frequencies = _matching_frequencies(module, model_config, f"{name}: {path}")
            _lengthen_tables(module, frequencies, plan.max_model_len)
            rotations[id(module)] = frequencies, module
    # Every d(p) = p - p // G of a position, and W - W // G: row numbers of the re-rotation table.
    last = max(plan.max_model_len, plan.neighbor_window)
    num_steps = last - last // plan.group_size + 1
    tables: dict[bytes, torch.Tensor] = {}
    bound = 0
    for path, layer, rotary in _attention_layers(model):
        if not layer.impl.extends:
            continue
        if rotary is None or id(rotary) not in rotations:
            raise ValueError(
                f"Self-Extend cannot serve {name}: beside the attention layer {path} there is no rotary embedding of a "
                "kind it knows, so how its keys are rotated cannot be told."
            )
        frequencies, module = rotations[id(rotary)]
        key = frequencies.numpy().tobytes()
        if key not in tables:
            tables[key] = cos_sin(frequencies, 0, num_steps).to(_table(module).device)
        # Only GPT-NeoX pairs exist for longrope, whose module has no such attribute.
        layer.impl.bind(Rotation(tables[key], interleaved=not getattr(module, "is_neox_style", True)))
        bound += 1
    if bound == 0 and not may_be_short:
        raise ValueError(
            f"Self-Extend cannot serve {name}: none of its attention layers sees the whole context, so there is "
            "nothing to extend. If they use a sliding window, add --disable-sliding-window."
        )


def _attention_layers(model: nn.Module) -> Iterator[tuple[str, Attention, nn.Module | None]]:
    """Each Self-Extend layer with the rotary module beside it in its parent, if there is just one that is used."""
    for parent_path, parent in model.named_modules():
        for child_name, child in parent.named_children():
            if isinstance(child, Attention) and isinstance(child.impl, SelfExtendImpl):
                beside = {id(m): m for m in parent.children() if isinstance(m, _ROTARY_CLASSES)}
                rotary = next(iter(beside.values())) if len(beside) == 1 and _uses_rope(parent) else None
                yield f"{parent_path}.{child_name}", child, rotary


def _uses_rope(attention_block: nn.Module) -> bool:
    """False for a block that vLLM's model code marks as one without RoPE, though it may hold a rotary module."""
    flags = [getattr(attention_block, name, True) for name in ("use_rope", "_use_rope", "force_rope")]
    return all(flag is not False for flag in flags) and not getattr(attention_block, "nope", False)


def _matching_frequencies(module: nn.Module, model_config: ModelConfig, name: str) -> Frequencies:
    """The config's frequencies that the module's table was made with."""
    table = _table(module)
    start = _first_row(module)
    scaling = _attention_scaling(module)
    # Dense where one wrong frequency shows, then sparse to the end.
    positions = torch.tensor(sorted({*range(33), *(2**n for n in range(6, 40)), table.shape[0] - start - 1}))
    positions = positions[positions < table.shape[0] - start]
    rows = table[start + positions.to(table.device)].to("cpu", torch.float64)
    # vLLM computes the angles in float32 and rounds the table to the model's dtype.
    allowed = 2 * torch.finfo(table.dtype).eps + positions[:, None] * 2.0**-21
    for rope in rope_parameters(model_config.hf_text_config):
        frequencies = inverse_frequencies(rope, table.shape[1])
        expected = scaling * torch.stack([cos_sin(frequencies, p, p + 1, torch.float64)[0] for p in positions.tolist()])
        if bool(((rows - expected).abs() <= scaling * allowed).all()):
            return frequencies
    raise ValueError(
        f"Self-Extend cannot serve {name}: this {type(module).__name__} does not rotate as the RoPE parameters in the "
        f"model's config say ({list(rope_parameters(model_config.hf_text_config))}), and a key rotated back wrongly "
        "would give wrong answers."
    )


def _lengthen_tables(module: nn.Module, frequencies: Frequencies, length: int) -> None:
    """Append the rows that positions up to `length - 1` need."""
    for name in _TABLE_NAMES:
        table = getattr(module, name, None)
        if table is None or (rows := table.shape[0] - _first_row(module)) >= length:
            continue
        more = _attention_scaling(module) * cos_sin(frequencies, rows, length, torch.float64)
        setattr(module, name, torch.cat([table, more.to(table.device, table.dtype)]))


def _table(module: nn.Module) -> torch.Tensor:
    return next(table for name in _TABLE_NAMES if (table := getattr(module, name, None)) is not None)


def _first_row(module: nn.Module) -> int:
    """The row of position 0: longrope's table begins with the short factors' rows."""
    return module.original_max_position_embeddings if isinstance(module, Phi3LongRoPEScaledRotaryEmbedding) else 0


def _attention_scaling(module: nn.Module) -> float:
    """What yarn and longrope multiply cosines and sines by."""
    return float(getattr(module, "mscale", None) or getattr(module, "long_mscale", None) or 1.0)
