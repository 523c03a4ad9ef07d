"""A step's keys and values into the paged cache: one launch."""

import triton
import triton.language as tl

from .fp8 import to_fp8


@triton.jit(do_not_specialize_on_alignment=["slot_mapping"])
def store_kernel(
    key,
    value,
    kv_cache,
    slot_mapping,
    k_scale,
    v_scale,
    key_token_stride,
    key_head_stride,
    key_dim_stride,
    value_token_stride,
    value_head_stride,
    value_dim_stride,
    cache_block_stride,
    cache_head_stride,
    cache_token_stride,
    NUM_KV_HEADS: tl.constexpr,
    HEADS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    HEAD_SIZE_PADDED: tl.constexpr,
    IS_FP8: tl.constexpr,
):
    """One program per token and `HEADS` of its KV heads.

    Arguments up to `slot_mapping` are the step's, the others the layer's.
    """
    token = tl.program_id(0)
    slot = tl.load(slot_mapping + token)
    if slot >= 0:
        heads = tl.program_id(1) * HEADS + tl.arange(0, HEADS)[:, None]
        dims = tl.arange(0, HEAD_SIZE_PADDED)[None, :]
        mask = (heads < NUM_KV_HEADS) & (dims < HEAD_SIZE)
        from_key = key + token.to(tl.int64) * key_token_stride + heads * key_head_stride
        from_value = value + token.to(tl.int64) * value_token_stride + heads * value_head_stride
        to = kv_cache + (slot // BLOCK_SIZE) * cache_block_stride + heads * cache_head_stride
        to += (slot % BLOCK_SIZE) * cache_token_stride + dims
        k = tl.load(from_key + dims * key_dim_stride, mask=mask)
        v = tl.load(from_value + dims * value_dim_stride, mask=mask)
        store(to, k, mask, k_scale, IS_FP8)
        store(to + HEAD_SIZE, v, mask, v_scale, IS_FP8)


@triton.jit
def store(pointers, x, mask, scale, IS_FP8: tl.constexpr):
    """`x` to the cache, in the cache's dtype; an fp8 cache holds it divided by `scale`'s number."""
    if IS_FP8:
        x = x.to(tl.float32)
        if scale is not None:
            x /= tl.load(scale)
        tl.store(pointers, to_fp8(x), mask=mask)
    else:
        tl.store(pointers, x.to(pointers.dtype.element_ty), mask=mask)
