"""Turning queries and keys inside a kernel: their rotated pairs apart, first dimensions and second ones."""

import triton
import triton.language as tl

from .. import limits
from .fp8 import load

EIGHTHS = tl.constexpr(limits.EIGHTHS)


@triton.jit
def lag(positions, eighths):
    """`interface.lag`; positions are not negative."""
    return positions - positions * EIGHTHS // eighths


@triton.jit
def load_cos_sin(cos_sin, steps, mask, pairs, ROTARY_DIM: tl.constexpr):
    """The cosines and the sines of the pairs `pairs` at `steps`, `[steps, pairs]` each."""
    pointers = cos_sin + (steps.to(tl.int64) * ROTARY_DIM)[:, None] + pairs
    return tl.load(pointers, mask=mask, other=0.0), tl.load(pointers + ROTARY_DIM // 2, mask=mask, other=0.0)


@triton.jit
def turn(first, second, cosine, sine, DTYPE: tl.constexpr):
    """Pairs, turned in float32, in `DTYPE`."""
    first, second = first.to(tl.float32), second.to(tl.float32)
    return (first * cosine - second * sine).to(DTYPE), (second * cosine + first * sine).to(DTYPE)


@triton.jit
def load_pairs(
    rows,
    row_mask,
    dim_stride,
    MASKED: tl.constexpr,
    ROTARY_DIM: tl.constexpr,
    HALF_PADDED: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    DTYPE: tl.constexpr,
    IS_FP8: tl.constexpr,
    HAS_FP8: tl.constexpr,
):
    """The first and the second dimensions of the rotated pairs of queries or keys at `rows`, `[rows, pairs]` each."""
    if INTERLEAVED:  # together, lest numbers that lie side by side be loaded one by one
        dims = tl.arange(0, 2 * HALF_PADDED)[None, :]
        mask = row_mask[:, None] & (dims < ROTARY_DIM)
        x = load(rows[:, None] + dims * dim_stride, mask, MASKED, DTYPE, IS_FP8, HAS_FP8)
        first, second = tl.split(tl.reshape(x, (rows.shape[0], HALF_PADDED, 2)))
    else:
        half: tl.constexpr = ROTARY_DIM // 2
        pairs = tl.arange(0, HALF_PADDED)[None, :]
        mask = row_mask[:, None] & (pairs < half)
        pointers = rows[:, None] + pairs * dim_stride
        first = load(pointers, mask, MASKED, DTYPE, IS_FP8, HAS_FP8)
        second = load(pointers + half * dim_stride, mask, MASKED, DTYPE, IS_FP8, HAS_FP8)
    return first, second


@triton.jit
def store_pairs(rows, first, second, pairs, mask, ROTARY_DIM: tl.constexpr, INTERLEAVED: tl.constexpr):
    """What `load_pairs` loads, to `rows`, whose dimensions lie side by side."""
    if INTERLEAVED:
        tl.store(rows[:, None] + 2 * pairs, first, mask=mask)
        tl.store(rows[:, None] + 2 * pairs + 1, second, mask=mask)
    else:
        tl.store(rows[:, None] + pairs, first, mask=mask)
        tl.store(rows[:, None] + pairs + ROTARY_DIM // 2, second, mask=mask)


@triton.jit
def load_turned_queries(
    rows,
    row_mask,
    dim_stride,
    steps,
    cos_sin,
    ROTARY_DIM: tl.constexpr,
    HALF_PADDED: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """The pairs of the queries at `rows`, each turned by its `steps`, of either sign."""
    pairs = tl.arange(0, HALF_PADDED)[None, :]
    mask = row_mask[:, None] & (pairs < ROTARY_DIM // 2)
    cosine, sine = load_cos_sin(cos_sin, tl.abs(steps), mask, pairs, ROTARY_DIM)
    sine = tl.where(steps < 0, -1.0, 1.0)[:, None] * sine
    first, second = load_pairs(
        rows, row_mask, dim_stride, True, ROTARY_DIM, HALF_PADDED, INTERLEAVED, DTYPE, False, False
    )
    return turn(first, second, cosine, sine, DTYPE)


@triton.jit
def load_turned(
    slot,
    first_key,
    keys,
    key_mask,
    eighths,
    cos_sin,
    MASKED: tl.constexpr,
    IN_STEPS: tl.constexpr,
    ROTARY_DIM: tl.constexpr,
    HALF_PADDED: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    DTYPE: tl.constexpr,
    IS_FP8: tl.constexpr,
    HAS_FP8: tl.constexpr,
):
    """The pairs of the keys at the positions `keys`, which lie at `slot`, turned for a group size.

    With `IN_STEPS` cosines and sines are the first key's, turned on by those of the few steps from its lag to the
    others', for all tiles the same: a row for each key would be as many bytes as keys and values.
    """
    first, second = load_pairs(slot, key_mask, 1, MASKED, ROTARY_DIM, HALF_PADDED, INTERLEAVED, DTYPE, IS_FP8, HAS_FP8)
    pairs = tl.arange(0, HALF_PADDED)[None, :]
    pair_mask = pairs < ROTARY_DIM // 2
    mask = key_mask[:, None] & pair_mask if MASKED else pair_mask
    steps = lag(keys, eighths)
    if IN_STEPS:
        base = lag(first_key, eighths)
        base_cosine, base_sine = load_cos_sin(cos_sin, tl.full([1], base, tl.int32), pair_mask, pairs, ROTARY_DIM)
        step_cosine, step_sine = load_cos_sin(cos_sin, steps - base, mask, pairs, ROTARY_DIM)
        cosine = base_cosine * step_cosine - base_sine * step_sine
        sine = base_sine * step_cosine + base_cosine * step_sine
    else:
        cosine, sine = load_cos_sin(cos_sin, steps, mask, pairs, ROTARY_DIM)
    return turn(first, second, cosine, -sine, DTYPE)
