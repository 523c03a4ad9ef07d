"""What the kernel benchmarks share: the layers they time, when two answers are the same, and numbers for people."""

import math
from enum import Enum
from typing import NamedTuple

import torch

from vllm_selfextend.backends.interface import (
    AttentionBatch,
    AttentionParams,
    GroupSizes,
    Rotation,
    num_rotation_steps,
)
from vllm_selfextend.method.positions import default_window, group_sizes
from vllm_selfextend.method.rope import cos_sin

ROPE_BASE = 10000.0

SAME_ANSWER = {torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 2e-3}
"""How far two kernels' answers may be apart: the norm of the difference over the norm of one."""


class DType(str, Enum):
    """What the queries and the cache may be in."""

    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"


class Heads(NamedTuple):
    """The shape of a layer."""

    num_heads: int
    num_kv_heads: int
    head_size: int

    def __str__(self) -> str:
        return f"{self.num_heads}/{self.num_kv_heads}x{self.head_size}"


def extended_layer(
    head_size: int, context: int, trained_length: int, device: torch.device | str = "cpu"
) -> AttentionParams:
    """A layer with automatic group sizes up to `context`, all dimensions rotated."""
    window = default_window(trained_length)
    sizes = GroupSizes.of(group_sizes(context, trained_length, window, "auto", trained_length), device)
    frequencies = ROPE_BASE ** (-torch.arange(0, head_size, 2, dtype=torch.float32) / head_size)
    table = cos_sin(frequencies, 0, num_rotation_steps(context, sizes.largest, window))
    return AttentionParams(
        scale=head_size**-0.5, group_sizes=sizes, neighbor_window=window, rotation=Rotation(table.to(device))
    )


def make_batch(
    block_table: torch.Tensor, context: int, query_len: int, block_size: int, decode_len: int = 1
) -> AttentionBatch:
    """The last `query_len` of each request's `context` tokens are new."""
    num_reqs, device = len(block_table), block_table.device
    positions = torch.arange(context - query_len, context, device=device)
    slots = block_table[:, positions // block_size].long() * block_size + positions % block_size
    query_start_loc = torch.arange(num_reqs + 1, dtype=torch.int32) * query_len
    seq_lens = torch.full((num_reqs,), context, dtype=torch.int32)
    return AttentionBatch(
        query_start_loc=query_start_loc.to(device),
        seq_lens=seq_lens.to(device),
        block_table=block_table,
        slot_mapping=slots.flatten(),
        max_query_len=query_len,
        max_seq_len=context,
        decode_len=decode_len,
        query_start_loc_cpu=query_start_loc,
        seq_lens_cpu=seq_lens,
    )


def check_same(what: str, answer: torch.Tensor, other: torch.Tensor) -> None:
    """Refuse to time two kernels that do not compute the same where they should.

    Raises:
        RuntimeError: `answer` is off `other`; the message begins with `what`.

    """
    error = float((answer.float() - other.float()).norm() / other.float().norm())
    # Not `error > ...`, which lets NaN through.
    if not error <= SAME_ANSWER[answer.dtype]:
        raise RuntimeError(f"{what} is off by {error:.1e} of its norm.")


def dtype_name(dtype: torch.dtype) -> str:
    """Without the module."""
    return str(dtype).removeprefix("torch.")


def three_digits(number: float, decimals: int = 3) -> str:
    """Three significant digits, four where the first is a thousand or more, at most so many decimals."""
    return f"{number:,.{min(decimals, max(0, 2 - math.floor(math.log10(number))))}f}"
