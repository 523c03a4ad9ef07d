"""Which queries FlashAttention is given, and their turning to grouped positions."""

import triton
import triton.language as tl

from ..triton.attention import log_factor
from ..triton.batch import find_request
from ..triton.rotation import load_grouped_cos_sin, source, turn


@triton.jit(
    do_not_specialize=["num_reqs", "decode_len"], do_not_specialize_on_alignment=["query_start_loc", "seq_lens"]
)
def count_kernel(
    far_start_loc,
    far_keys,
    query_start_loc,
    seq_lens,
    num_reqs,
    decode_len,
    FIRST_POSITION: tl.constexpr,
    NEIGHBOR_WINDOW: tl.constexpr,
    REQUESTS: tl.constexpr,
):
    """One program: where each request's queries from `FIRST_POSITION` on begin, one request after another.

    Requests with at most `decode_len` new tokens are the decode's and have none.
    """
    tl.store(far_start_loc, 0)
    total = tl.full([], 0, tl.int32)
    for first_request in range(0, num_reqs, REQUESTS):
        requests = first_request + tl.arange(0, REQUESTS)
        mask = requests < num_reqs
        query_len = tl.load(query_start_loc + requests + 1, mask=mask, other=0)
        query_len -= tl.load(query_start_loc + requests, mask=mask, other=0)
        seq_len = tl.load(seq_lens + requests, mask=mask, other=0)
        count = tl.maximum(seq_len - tl.maximum(seq_len - query_len, FIRST_POSITION), 0)
        count = tl.where(query_len > decode_len, count, 0)
        tl.store(far_start_loc + requests + 1, total + tl.cumsum(count, 0), mask=mask)
        tl.store(far_keys + requests, tl.where(count > 0, seq_len - NEIGHBOR_WINDOW, 0), mask=mask)
        total += tl.sum(count, 0)


@triton.jit(do_not_specialize=["num_reqs"], do_not_specialize_on_alignment=["query_start_loc", "seq_lens"])
def turn_kernel(
    query,
    far_query,
    query_start_loc,
    seq_lens,
    far_start_loc,
    num_reqs,
    cos_sin,
    query_token_stride,
    query_head_stride,
    query_dim_stride,
    log_scale,
    NUM_HEADS: tl.constexpr,
    HEADS: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    HALF_PADDED: tl.constexpr,
    REST_PADDED: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    NEIGHBOR_WINDOW: tl.constexpr,
    ROTARY_DIM: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    HAS_LOG_SCALE: tl.constexpr,
):
    """One program per row of `far_query` and `HEADS` of its heads: its query, in the cache's order of dimensions."""
    half: tl.constexpr = ROTARY_DIM // 2
    DTYPE: tl.constexpr = far_query.dtype.element_ty
    row = tl.program_id(0)
    if row < tl.load(far_start_loc + num_reqs):
        request = find_request(far_start_loc, row, num_reqs, TOKENS=1, EXTRA=0)
        from_end = row - tl.load(far_start_loc + request + 1)
        token = (tl.load(query_start_loc + request + 1) + from_end).to(tl.int64)
        position = tl.full([1], tl.load(seq_lens + request) + from_end, tl.int32)
        heads = tl.program_id(1) * HEADS + tl.arange(0, HEADS)[:, None]
        head_mask = heads < NUM_HEADS
        from_query = query + token * query_token_stride + heads * query_head_stride
        to = far_query + (row.to(tl.int64) * NUM_HEADS + heads) * HEAD_SIZE
        factor = tl.full([1], 1.0, tl.float32)
        if HAS_LOG_SCALE:
            factor = log_factor(position, log_scale)
        factor = factor[:, None]

        pairs = tl.arange(0, HALF_PADDED)[None, :]
        mask = head_mask & (pairs < half)
        first_dims = source(pairs, ROTARY_DIM, INTERLEAVED)
        second_dims = source(pairs + half, ROTARY_DIM, INTERLEAVED)
        first = tl.load(from_query + first_dims * query_dim_stride, mask=mask, other=0.0).to(tl.float32) * factor
        second = tl.load(from_query + second_dims * query_dim_stride, mask=mask, other=0.0).to(tl.float32) * factor
        cosine, sine = load_grouped_cos_sin(
            cos_sin, position, pairs < half, pairs, NEIGHBOR_WINDOW, GROUP_SIZE, ROTARY_DIM
        )
        first, second = turn(first, second, cosine, sine, DTYPE)
        tl.store(to + pairs, first, mask=mask)
        tl.store(to + half + pairs, second, mask=mask)
        if ROTARY_DIM < HEAD_SIZE:
            rests = tl.arange(0, REST_PADDED)[None, :] + ROTARY_DIM
            mask = head_mask & (rests < HEAD_SIZE)
            rest = tl.load(from_query + rests * query_dim_stride, mask=mask, other=0.0).to(tl.float32) * factor
            tl.store(to + rests, rest.to(DTYPE), mask=mask)
