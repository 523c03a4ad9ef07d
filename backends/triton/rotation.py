"""Rotating queries and keys inside a kernel.

Their dimensions are taken in the cache's order: the first dimension of each rotated pair, then the second ones, then
those that are not rotated. For NeoX pairs (`n` with `n + rotary_dim / 2`) that is the order they come in.
"""

import triton
import triton.language as tl


@triton.jit
def source(dims, ROTARY_DIM: tl.constexpr, INTERLEAVED: tl.constexpr):
    """Where the dimensions `dims` of the cache's order lie in a query or a key as it comes."""
    half: tl.constexpr = ROTARY_DIM // 2
    if INTERLEAVED:
        dims = tl.where(dims < half, 2 * dims, tl.where(dims < ROTARY_DIM, 2 * (dims - half) + 1, dims))
    return dims


@triton.jit
def load_cos_sin(cos_sin, steps, mask, pairs, ROTARY_DIM: tl.constexpr):
    """The cosines and the sines of the pairs `pairs` at `steps`, `[steps, pairs]` each."""
    pointers = cos_sin + (steps * ROTARY_DIM)[:, None] + pairs
    return tl.load(pointers, mask=mask, other=0.0), tl.load(pointers + ROTARY_DIM // 2, mask=mask, other=0.0)


@triton.jit
def load_grouped_cos_sin(
    cos_sin,
    position,
    mask,
    pairs,
    NEIGHBOR_WINDOW: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    ROTARY_DIM: tl.constexpr,
):
    """What turns queries at `position` so that their scores with keys as they lie are the grouped ones."""
    steps = NEIGHBOR_WINDOW - NEIGHBOR_WINDOW // GROUP_SIZE - (position - position // GROUP_SIZE)
    cosine, sine = load_cos_sin(cos_sin, tl.abs(steps), mask, pairs, ROTARY_DIM)
    return cosine, tl.where(steps < 0, -1.0, 1.0)[:, None] * sine


@triton.jit
def turn(first, second, cosine, sine, DTYPE: tl.constexpr):
    """Pairs of float32, rotated, in `DTYPE`."""
    return (first * cosine - second * sine).to(DTYPE), (second * cosine + first * sine).to(DTYPE)
