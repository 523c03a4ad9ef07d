"""A step's keys, rotated to their group positions, and its values, into the paged cache: one launch."""

import triton
import triton.language as tl

from .batch import find_request
from .fp8 import to_fp8
from .rotation import load_cos_sin, source, turn


@triton.jit(
    do_not_specialize=["num_reqs"], do_not_specialize_on_alignment=["query_start_loc", "seq_lens", "slot_mapping"]
)
def store_kernel(
    key,
    value,
    kv_cache,
    query_start_loc,
    seq_lens,
    slot_mapping,
    num_reqs,
    cos_sin,
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
    ONE_TOKEN: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    HEADS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    HEAD_SIZE_PADDED: tl.constexpr,
    HALF_PADDED: tl.constexpr,
    REST_PADDED: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    ROTARY_DIM: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    IS_FP8: tl.constexpr,
):
    """One program per token and `HEADS` of its KV heads; `ONE_TOKEN` says that request `r` has token `r` alone.

    Arguments up to `num_reqs` are the step's, the others the layer's.
    """
    half: tl.constexpr = ROTARY_DIM // 2
    token = tl.program_id(0)
    slot = tl.load(slot_mapping + token)
    if slot >= 0:
        heads = tl.program_id(1) * HEADS + tl.arange(0, HEADS)[:, None]
        head_mask = heads < NUM_KV_HEADS
        from_key = key + token.to(tl.int64) * key_token_stride + heads * key_head_stride
        from_value = value + token.to(tl.int64) * value_token_stride + heads * value_head_stride
        to = kv_cache + (slot // BLOCK_SIZE) * cache_block_stride + heads * cache_head_stride
        to += (slot % BLOCK_SIZE) * cache_token_stride
        if ROTARY_DIM > 0:
            if ONE_TOKEN:
                position = tl.load(seq_lens + token) - 1
            else:
                request = find_request(query_start_loc, token, num_reqs, TOKENS=1, EXTRA=0)
                position = tl.load(seq_lens + request) - tl.load(query_start_loc + request + 1) + token
            pairs = tl.arange(0, HALF_PADDED)[None, :]
            mask = head_mask & (pairs < half)
            first_dims = source(pairs, ROTARY_DIM, INTERLEAVED)
            second_dims = source(pairs + half, ROTARY_DIM, INTERLEAVED)
            first = tl.load(from_key + first_dims * key_dim_stride, mask=mask, other=0.0).to(tl.float32)
            second = tl.load(from_key + second_dims * key_dim_stride, mask=mask, other=0.0).to(tl.float32)
            steps = tl.full([1], position - position // GROUP_SIZE, tl.int32)
            cosine, sine = load_cos_sin(cos_sin, steps, pairs < half, pairs, ROTARY_DIM)
            first, second = turn(first, second, cosine, -sine, tl.float32)
            store(to + pairs, first, mask, k_scale, IS_FP8)
            store(to + half + pairs, second, mask, k_scale, IS_FP8)
        if ROTARY_DIM < HEAD_SIZE:
            rests = tl.arange(0, REST_PADDED)[None, :] + ROTARY_DIM
            mask = head_mask & (rests < HEAD_SIZE)
            rest = tl.load(from_key + rests * key_dim_stride, mask=mask, other=0.0).to(tl.float32)
            store(to + rests, rest, mask, k_scale, IS_FP8)
        dims = tl.arange(0, HEAD_SIZE_PADDED)[None, :]
        mask = head_mask & (dims < HEAD_SIZE)
        v = tl.load(from_value + dims * value_dim_stride, mask=mask, other=0.0).to(tl.float32)
        store(to + HEAD_SIZE + dims, v, mask, v_scale, IS_FP8)


@triton.jit
def store(pointers, x, mask, scale, IS_FP8: tl.constexpr):
    """Float32 `x` to the cache, in the cache's dtype; an fp8 cache holds it divided by `scale`'s number."""
    if IS_FP8:
        if scale is not None:
            x /= tl.load(scale)
        tl.store(pointers, to_fp8(x), mask=mask)
    else:
        tl.store(pointers, x.to(pointers.dtype.element_ty), mask=mask)
