"""What the rotary modules of a loaded model do, found out from the modules themselves and held against the config.

vLLM's own modules keep a table of cosines and sines; those of models that run through vLLM's Transformers backend
compute them for the positions at hand. Either way a rotation is taken only if it is found equal to one that the config
names.
"""

from typing import Any

import torch
from torch import nn
from vllm.model_executor.layers.rotary_embedding import Phi3LongRoPEScaledRotaryEmbedding
from vllm.model_executor.layers.rotary_embedding.base import RotaryEmbeddingBase

from ..method.rope import Frequencies, cos_sin, inverse_frequencies, rope_parameters
from ..method.rotation_probe import angle_error, probe_positions, rotation_rows

# The longrope module keeps both its tables in one and is not a RotaryEmbeddingBase.
_VLLM_CLASSES = (RotaryEmbeddingBase, Phi3LongRoPEScaledRotaryEmbedding)
_TABLE_NAMES = ("cos_sin_cache", "cos_sin_cache_bf16", "long_short_cos_sin_cache")
_TABLE_WORDS = {"cos", "sin", "freqs", "positions"}
"""One of them is in the name of every such table in vLLM 0.32's and transformers 5's decoders."""


def is_vllm_rotary(module: nn.Module) -> bool:
    """Whether this is one of vLLM's own rotary modules, of a kind that Self-Extend knows."""
    return isinstance(module, _VLLM_CLASSES)


def vllm_frequencies(module: nn.Module, hf_text_config: Any) -> Frequencies:
    """What one of vLLM's modules rotates by: the config's set of RoPE parameters that its table was made with.

    Raises:
        ValueError: There is none.

    """
    table = _rows_read(module, _table(module))
    scaling = _attention_scaling(module)
    positions = probe_positions(len(table))
    rows = table[positions.to(table.device)].to("cpu", torch.float64)
    # vLLM rounds the table to the model's dtype.
    allowed = angle_error(positions) + 2 * torch.finfo(table.dtype).eps
    for rope in rope_parameters(hf_text_config):
        frequencies = inverse_frequencies(rope, table.shape[1], long_factors=not _reads_short_factors(module))
        if bool(((rows / scaling - rotation_rows(frequencies, positions)).abs() <= allowed).all()):
            return frequencies
    raise ValueError(_mismatch(module, hf_text_config))


def lengthen_tables(module: nn.Module, frequencies: Frequencies, length: int) -> None:
    """Append the rows that positions up to `length - 1` need to the table of one of vLLM's modules.

    The table ends at the checkpoint's length (for some RoPE types at a length of its own), and a position past it would
    be read out of bounds. vLLM takes longrope's short factors only where it serves no position past their rows.
    """
    for name in _TABLE_NAMES if not _reads_short_factors(module) else ():
        table = getattr(module, name, None)
        if table is None or (rows := len(_rows_read(module, table))) >= length:
            continue
        more = _attention_scaling(module) * cos_sin(frequencies, rows, length, torch.float64)
        setattr(module, name, torch.cat([table, more.to(table.device, table.dtype)]))


def check_other_tables(module: nn.Module, length: int) -> None:
    """Refuse a module that is none of vLLM's rotary ones, and has a table of rotations with fewer than `length` rows.

    Such are copies that a fused kernel reads, and the tables of some of transformers' older models.

    Raises:
        ValueError: It has one.

    """
    tensors = {**dict(module.named_buffers(recurse=False)), **vars(module)}
    for name, table in tensors.items():
        if (
            not isinstance(table, torch.Tensor)
            or table.dim() < 2
            or not (table.is_floating_point() or table.is_complex())
        ):
            continue
        if _TABLE_WORDS.intersection(name.split("_")) and table.shape[0] < length:
            raise ValueError(
                f"this {type(module).__name__} reads rotations from {name}, a table of its own with {table.shape[0]} "
                f"rows that cannot be lengthened here, and {length} tokens are to be served."
            )


def transformers_frequencies(module: nn.Module, hf_text_config: Any) -> list[Frequencies]:
    """What one of transformers' rotary modules rotates by: a set of frequencies, or one for each kind of layer.

    Empty if the module is none.

    Raises:
        ValueError: The config names no such frequencies, or they change with the batch.

    """
    tables = [buffer for name, buffer in module.named_buffers(recurse=False) if name.endswith("inv_freq")]
    ropes = list(rope_parameters(hf_text_config))
    if tables and any(rope.get("rope_type") == "longrope" for rope in ropes):
        raise ValueError("transformers chooses longrope's factors anew for every batch, and cached keys keep theirs.")
    found = []
    for table in tables:
        frequencies = table.to("cpu", torch.float32)
        if not any(
            torch.allclose(inverse_frequencies(rope, 2 * len(table)), frequencies, rtol=1e-5, atol=0.0)
            for rope in ropes
        ):
            raise ValueError(_mismatch(module, hf_text_config))
        found.append(frequencies)
    return found


def _mismatch(module: nn.Module, hf_text_config: Any) -> str:
    return (
        f"this {type(module).__name__} does not rotate as the RoPE parameters in the model's config say "
        f"({list(rope_parameters(hf_text_config))}), and keys turned otherwise would give wrong answers."
    )


def _table(module: nn.Module) -> torch.Tensor:
    tables = (getattr(module, name, None) for name in _TABLE_NAMES)
    return next(table for table in tables if isinstance(table, torch.Tensor))


def _reads_short_factors(module: nn.Module) -> bool:
    """Whether this is longrope, serving no more than its original length."""
    return isinstance(module, Phi3LongRoPEScaledRotaryEmbedding) and not module.use_long_rope


def _rows_read(module: nn.Module, table: torch.Tensor) -> torch.Tensor:
    """The rows from position 0 on: longrope's table has the short factors' rows first, then those of the long ones."""
    if not isinstance(module, Phi3LongRoPEScaledRotaryEmbedding):
        return table
    original = module.original_max_position_embeddings
    return table[original:] if module.use_long_rope else table[:original]


def _attention_scaling(module: nn.Module) -> float:
    """What yarn and longrope multiply cosines and sines by."""
    if isinstance(module, Phi3LongRoPEScaledRotaryEmbedding):
        return float(module.long_mscale if module.use_long_rope else module.short_mscale)
    return float(getattr(module, "mscale", None) or 1.0)
