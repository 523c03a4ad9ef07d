"""What a prefill turns once, for attention that knows no group sizes: queries, and the keys of a slab."""

import triton
import triton.language as tl

from .arithmetic import log_factor
from .fp8 import load
from .turning import lag, load_cos_sin, load_pairs, store_pairs, turn


@triton.jit(do_not_specialize=["first_position", "num_rows"])
def turn_queries_kernel(
    query,
    scaled,
    turned,
    first_position,
    num_rows,
    group_sizes,
    cos_sin,
    query_token_stride,
    query_head_stride,
    query_dim_stride,
    log_scale,
    NEIGHBOR_WINDOW: tl.constexpr,
    HAS_LOG_SCALE: tl.constexpr,
    ROTARY_DIM: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    HEADS: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    HEAD_SIZE_PADDED: tl.constexpr,
    HALF_PADDED: tl.constexpr,
    REST_PADDED: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Queries of one request, scaled, and scaled and turned: a program for each `ROWS` tokens of a query head.

    `scaled` and `turned` are `[num_rows, HEADS, HEAD_SIZE]`, contiguous; without `turned` nothing is turned, without
    `HAS_LOG_SCALE` nothing is scaled and `scaled` is not written. Arguments up to `num_rows` are the step's, the others
    the layer's.
    """
    DTYPE: tl.constexpr = query.dtype.element_ty
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    head = tl.program_id(1)
    mask = row < num_rows
    position = first_position + row
    from_query = query + row.to(tl.int64) * query_token_stride + head.to(tl.int64) * query_head_stride
    to = (row.to(tl.int64) * HEADS + head) * HEAD_SIZE
    factor = tl.full([ROWS], 1.0, tl.float32)
    if HAS_LOG_SCALE:
        factor = log_factor(position, log_scale)
        dims = tl.arange(0, HEAD_SIZE_PADDED)[None, :]
        dim_mask = mask[:, None] & (dims < HEAD_SIZE)
        x = tl.load(from_query[:, None] + dims * query_dim_stride, mask=dim_mask, other=0.0)
        tl.store(scaled + to[:, None] + dims, (x.to(tl.float32) * factor[:, None]).to(DTYPE), mask=dim_mask)
    if turned is not None:
        pairs = tl.arange(0, HALF_PADDED)[None, :]
        pair_mask = mask[:, None] & (pairs < ROTARY_DIM // 2)
        eighths = tl.load(group_sizes + position, mask=mask, other=8)
        steps = lag(NEIGHBOR_WINDOW, eighths) - lag(position, eighths)
        cosine, sine = load_cos_sin(cos_sin, tl.abs(steps), pair_mask, pairs, ROTARY_DIM)
        cosine = factor[:, None] * cosine
        sine = (tl.where(steps < 0, -1.0, 1.0) * factor)[:, None] * sine
        first, second = load_pairs(
            from_query, mask, query_dim_stride, True, ROTARY_DIM, HALF_PADDED, INTERLEAVED, DTYPE, False, False
        )
        first, second = turn(first, second, cosine, sine, DTYPE)
        store_pairs(turned + to, first, second, pairs, pair_mask, ROTARY_DIM, INTERLEAVED)
        if ROTARY_DIM < HEAD_SIZE:
            rests = tl.arange(0, REST_PADDED)[None, :] + ROTARY_DIM
            rest_mask = mask[:, None] & (rests < HEAD_SIZE)
            x = tl.load(from_query[:, None] + rests * query_dim_stride, mask=rest_mask, other=0.0)
            tl.store(turned + to[:, None] + rests, (x.to(tl.float32) * factor[:, None]).to(DTYPE), mask=rest_mask)


@triton.jit(
    do_not_specialize=["request", "first_key", "num_keys", "eighths", "table_stride"],
    do_not_specialize_on_alignment=["block_table"],
)
def turn_keys_kernel(
    kv_cache,
    keys,
    values,
    block_table,
    request,
    first_key,
    num_keys,
    eighths,
    table_stride,
    cos_sin,
    k_scale,
    v_scale,
    cache_block_stride,
    cache_head_stride,
    cache_token_stride,
    ROTARY_DIM: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    HEAD_SIZE_PADDED: tl.constexpr,
    HALF_PADDED: tl.constexpr,
    REST_PADDED: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    KEYS: tl.constexpr,
    IS_FP8: tl.constexpr,
    HAS_FP8: tl.constexpr,
):
    """Keys of a request, turned for one group size, and their values: a program for each `KEYS` tokens, all heads.

    `keys` and `values` are `[num_keys, NUM_KV_HEADS, HEAD_SIZE]`, contiguous; without `values` none are copied.
    Arguments up to `table_stride` are the step's, the others the layer's.
    """
    DTYPE: tl.constexpr = keys.dtype.element_ty
    index = tl.program_id(0) * KEYS + tl.arange(0, KEYS)
    mask = index < num_keys
    position = first_key + index
    block = tl.load(block_table + request.to(tl.int64) * table_stride + position // BLOCK_SIZE, mask=mask, other=0)
    slot = kv_cache + block.to(tl.int64) * cache_block_stride + (position % BLOCK_SIZE) * cache_token_stride
    to = index.to(tl.int64) * (NUM_KV_HEADS * HEAD_SIZE)
    pairs = tl.arange(0, HALF_PADDED)[None, :]
    pair_mask = mask[:, None] & (pairs < ROTARY_DIM // 2)
    cosine, sine = load_cos_sin(cos_sin, lag(position, eighths), pair_mask, pairs, ROTARY_DIM)
    scale = 1.0
    if k_scale is not None:
        scale = tl.load(k_scale)
        cosine, sine = cosine * scale, sine * scale
    dims = tl.arange(0, HEAD_SIZE_PADDED)[None, :]
    dim_mask = mask[:, None] & (dims < HEAD_SIZE)
    for head in tl.range(NUM_KV_HEADS):
        from_key = slot + tl.cast(head, tl.int64) * cache_head_stride
        to_head = to + head * HEAD_SIZE
        first, second = load_pairs(
            from_key, mask, 1, True, ROTARY_DIM, HALF_PADDED, INTERLEAVED, DTYPE, IS_FP8, HAS_FP8
        )
        first, second = turn(first, second, cosine, -sine, DTYPE)
        store_pairs(keys + to_head, first, second, pairs, pair_mask, ROTARY_DIM, INTERLEAVED)
        if ROTARY_DIM < HEAD_SIZE:
            rests = tl.arange(0, REST_PADDED)[None, :] + ROTARY_DIM
            rest_mask = mask[:, None] & (rests < HEAD_SIZE)
            x = load(from_key[:, None] + rests, rest_mask, True, DTYPE, IS_FP8, HAS_FP8)
            tl.store(keys + to_head[:, None] + rests, (x.to(tl.float32) * scale).to(DTYPE), mask=rest_mask)
        if values is not None:
            x = load(from_key[:, None] + HEAD_SIZE + dims, dim_mask, True, DTYPE, IS_FP8, HAS_FP8)
            if v_scale is not None:
                x = (x.to(tl.float32) * tl.load(v_scale)).to(DTYPE)
            tl.store(values + to_head[:, None] + dims, x, mask=dim_mask)
