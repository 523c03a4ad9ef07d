"""Rotating rows of any shape inside a kernel."""

import triton
import triton.language as tl

from .fp8 import from_fp8


@triton.jit
def rotate(
    x, pointers, mask, dims, cos_sin, sign, ROTARY_DIM: tl.constexpr, INTERLEAVED: tl.constexpr, IS_FP8: tl.constexpr
):
    """`x`, which was loaded from `pointers`, rotated by the angles whose cosines and sines begin at `cos_sin`.

    Every dimension is turned with its partner, which is loaded a second time, from the cache just filled by the first.
    `dims` (the dimensions' numbers), `cos_sin` and `sign` (1, or -1 to rotate backwards) broadcast to the shape of `x`.
    `IS_FP8` says whether bytes of fp8 lie at `pointers`.
    """
    half: tl.constexpr = ROTARY_DIM // 2
    if INTERLEAVED:
        pair = dims // 2
        is_first = dims % 2 == 0
        partner = tl.where(is_first, 1, -1)
    else:
        pair = dims % half
        is_first = dims < half
        partner = tl.where(is_first, half, -half)
    turned = mask & (dims < ROTARY_DIM)
    other = tl.load(pointers + partner, mask=turned, other=0)
    other = from_fp8(other) if IS_FP8 else other.to(tl.float32)
    cosine = tl.load(cos_sin + pair, mask=turned, other=1.0)
    sine = tl.load(cos_sin + half + pair, mask=turned, other=0.0)
    return x * cosine + other * (tl.where(is_first, -sine, sine) * sign)
