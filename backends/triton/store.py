"""A step's keys, rotated to their group positions, and its values, into the paged cache: one launch."""

import triton
import triton.language as tl

from .fp8 import to_fp8
from .rotation import rotate


@triton.jit
def store_kernel(
    key,
    value,
    kv_cache,
    positions,
    slot_mapping,
    cos_sin,
    key_token_stride,
    key_head_stride,
    value_token_stride,
    value_head_stride,
    cache_block_stride,
    cache_head_stride,
    cache_token_stride,
    k_scale,
    v_scale,
    BLOCK_SIZE: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    HEAD_SIZE_PADDED: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    ROTARY_DIM: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    IS_FP8: tl.constexpr,
):
    """One program a token and KV head."""
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    slot = tl.load(slot_mapping + token)
    if slot >= 0:
        dims = tl.arange(0, HEAD_SIZE_PADDED)
        mask = dims < HEAD_SIZE
        from_key = key + token * key_token_stride + head * key_head_stride + dims
        from_value = value + token * value_token_stride + head * value_head_stride + dims
        k = tl.load(from_key, mask=mask, other=0.0).to(tl.float32)
        v = tl.load(from_value, mask=mask, other=0.0).to(tl.float32)
        if GROUP_SIZE > 1:
            position = tl.load(positions + token)
            steps = position - position // GROUP_SIZE
            k = rotate(k, from_key, mask, dims, cos_sin + steps * ROTARY_DIM, -1.0, ROTARY_DIM, INTERLEAVED, False)
        block = kv_cache + (slot // BLOCK_SIZE) * cache_block_stride + head * cache_head_stride
        to = block + (slot % BLOCK_SIZE) * cache_token_stride + dims
        if IS_FP8:
            tl.store(to, to_fp8(k / k_scale), mask=mask)
            tl.store(to + HEAD_SIZE, to_fp8(v / v_scale), mask=mask)
        else:
            tl.store(to, k.to(kv_cache.dtype.element_ty), mask=mask)
            tl.store(to + HEAD_SIZE, v.to(kv_cache.dtype.element_ty), mask=mask)
