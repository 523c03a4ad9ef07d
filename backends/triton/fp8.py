"""float8_e4m3 for every GPU: in integer arithmetic where there are no instructions for it."""

import triton
import triton.language as tl


@triton.jit
def to_fp8(x):
    """The bytes of float32 `x`, rounded to the nearest, ties to even; what is larger than 448 becomes 448."""
    bits = x.to(tl.uint32, bitcast=True)
    sign = (bits >> 24) & 0x80
    magnitude = tl.minimum((bits & 0x7FFFFFFF).to(tl.float32, bitcast=True), 448.0)
    rounded = magnitude.to(tl.uint32, bitcast=True)
    normal = (rounded - (120 << 23) + 0x7FFFF + ((rounded >> 20) & 1)) >> 20
    # Below 2^-6 numbers are 2^-9 apart: so are float32's from 2^14 on.
    subnormal = (magnitude + 16384.0).to(tl.uint32, bitcast=True) - 0x46800000
    byte = tl.where(magnitude < 0.015625, subnormal, normal)
    byte = tl.where(x == x, byte, 0x7F)
    return (sign | byte).to(tl.uint8)


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
