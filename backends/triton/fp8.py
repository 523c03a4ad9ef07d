"""float8_e4m3 for every GPU, in integer arithmetic where there are no instructions for it."""

import triton
import triton.language as tl


@triton.jit
def from_fp8(byte, DTYPE: tl.constexpr, NATIVE: tl.constexpr):
    """What the bytes mean, in `DTYPE`; `NATIVE` says whether the GPU has instructions for it."""
    if NATIVE:
        # Through float32: there is no fast way from float16, which it comes to first, to bfloat16.
        return byte.to(tl.float8e4nv, bitcast=True).to(tl.float16).to(tl.float32).to(DTYPE)
    # The sign and the seven bits below it, moved to where float32 has them; the exponent's bias grows by 120.
    bits = (byte.to(tl.int8, bitcast=True).to(tl.int32) << 20) & -0x78100000
    value = bits.to(tl.float32, bitcast=True) * 1.329227995784916e36
    return tl.where((byte & 0x7F) == 0x7F, float("nan"), value).to(DTYPE)


@triton.jit
def load(pointers, mask, MASKED: tl.constexpr, DTYPE: tl.constexpr, IS_FP8: tl.constexpr, HAS_FP8: tl.constexpr):
    """Numbers as they lie in memory, in `DTYPE`; `MASKED` says whether `mask` is more than all true."""
    x = tl.load(pointers, mask=mask, other=0) if MASKED else tl.load(pointers)
    return from_fp8(x, DTYPE, HAS_FP8) if IS_FP8 else x.to(DTYPE)
