"""Where a prefill works out what it works out on its way: one workspace, how large it is, what lies where."""

import math
from typing import NamedTuple

import torch

from ..interface import Host
from .launches import cdiv

MAX_ROWS = 8192
"""How many tokens' queries are done at a time."""

MAX_KEYS = 32768
"""How many tokens' keys and values a slab has."""


class Room(NamedTuple):
    """How large a prefill's buffers are, in tokens."""

    num_rows: int
    num_keys: int

    @staticmethod
    def of(host: Host) -> "Room":
        """As much as the host can use, up to what is enough."""
        return Room(min(MAX_ROWS, host.max_num_tokens), min(MAX_KEYS, host.max_seq_len))


class Buffers(NamedTuple):
    """What a prefill works out on its way.

    Attributes:
        scaled: `[num_rows, num_heads, head_size]`: queries, scaled.
        turned: Like `scaled`: scaled and turned.
        far_out: Like `scaled`: answers over grouped keys.
        keys: `[num_keys, num_kv_heads, head_size]`: a slab's, turned.
        values: Like `keys`.
        lse: `[num_heads * num_rows]`, float32: the log-sum-exp of what is in `out`.
        far_lse: Like `lse`: of `far_out`.

    """

    scaled: torch.Tensor
    turned: torch.Tensor
    far_out: torch.Tensor
    keys: torch.Tensor
    values: torch.Tensor
    lse: torch.Tensor
    far_lse: torch.Tensor


def buffer_shapes(
    num_heads: int, num_kv_heads: int, head_size: int, dtype: torch.dtype, room: Room
) -> list[tuple[tuple[int, ...], torch.dtype]]:
    """Of `Buffers`, in their order."""
    rows, keys = (room.num_rows, num_heads, head_size), (room.num_keys, num_kv_heads, head_size)
    lse = (num_heads * room.num_rows,)
    return [*([(rows, dtype)] * 3), *([(keys, dtype)] * 2), *([(lse, torch.float32)] * 2)]


def workspace_bytes(shapes: list[tuple[tuple[int, ...], torch.dtype]]) -> int:
    """How many bytes they need."""
    return sum(_aligned(math.prod(shape) * dtype.itemsize) for shape, dtype in shapes)


def carve(workspace: torch.Tensor, shapes: list[tuple[tuple[int, ...], torch.dtype]]) -> Buffers:
    """They lie one after another in `workspace`, uint8."""
    tensors, offset = [], 0
    for shape, dtype in shapes:
        size = math.prod(shape) * dtype.itemsize
        tensors.append(workspace[offset : offset + size].view(dtype).view(shape))
        offset += _aligned(size)
    return Buffers(*tensors)


def _aligned(size: int) -> int:
    return cdiv(size, 256) * 256
