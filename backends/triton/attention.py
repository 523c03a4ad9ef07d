"""Paged attention: the grouped run, then tiles with both kinds of keys, then neighbors; one online softmax."""

import triton
import triton.language as tl

from .fp8 import from_fp8
from .rotation import rotate


@triton.jit
def find_request(query_start_loc, block, num_reqs, TOKENS: tl.constexpr):
    """The request that a block of queries belongs to.

    Request `r` has the blocks from `query_start_loc[r] // TOKENS + r` on: at least as many as it needs, whatever the
    lengths, so that the grid is known without looking at them.
    """
    low = tl.full([], 0, tl.int32)
    high = num_reqs
    while high - low > 1:
        middle = (low + high) // 2
        if tl.load(query_start_loc + middle) // TOKENS + middle <= block:
            low = middle
        else:
            high = middle
    return low


@triton.jit
def multiply(a, b, DTYPE: tl.constexpr, IS_INTERPRETED: tl.constexpr):
    """`a @ b` in `DTYPE`, summed in float32."""
    a = a.to(DTYPE)
    b = b.to(DTYPE)
    if IS_INTERPRETED:  # the interpreter would multiply bfloat16's bits
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, input_precision="ieee")


@triton.jit
def attention_kernel(
    query,
    kv_cache,
    out,
    partial_output,
    partial_largest,
    partial_total,
    query_start_loc,
    seq_lens,
    block_table,
    cos_sin,
    sinks,
    num_reqs,
    num_tokens,
    query_token_stride,
    query_head_stride,
    out_token_stride,
    out_head_stride,
    cache_block_stride,
    cache_head_stride,
    cache_token_stride,
    table_stride,
    scale,
    log_scale,
    soft_cap,
    v_scale,
    exact_len,
    NEIGHBOR_WINDOW: tl.constexpr,
    SLIDING_WINDOW: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    ROTARY_DIM: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    HAS_SOFT_CAP: tl.constexpr,
    HAS_LOG_SCALE: tl.constexpr,
    HAS_SINKS: tl.constexpr,
    HEADS: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    HEAD_SIZE_PADDED: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    TOKENS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    NUM_SPLITS: tl.constexpr,
    IS_FP8: tl.constexpr,
    IS_INTERPRETED: tl.constexpr,
):
    """One program a block of `TOKENS` queries, KV head and split of the context.

    Rows are tokens times the `HEADS` query heads of a KV head, padded to `BLOCK_M`.
    """
    LOG2_E: tl.constexpr = 1.4426950408889634
    # The kinds of key tiles, in the order of their positions.
    GROUPED: tl.constexpr = 0
    MIXED: tl.constexpr = 1
    NEIGHBOR: tl.constexpr = 2
    kv_head = tl.program_id(1)
    split = tl.program_id(2)
    request = find_request(query_start_loc, tl.program_id(0), num_reqs, TOKENS)
    query_start = tl.load(query_start_loc + request)
    query_len = tl.load(query_start_loc + request + 1) - query_start
    first_token = (tl.program_id(0) - (query_start // TOKENS + request)) * TOKENS
    if first_token < query_len:
        seq_len = tl.load(seq_lens + request)
        rows = tl.arange(0, BLOCK_M)
        dims = tl.arange(0, HEAD_SIZE_PADDED)[None, :]
        dim_mask = dims < HEAD_SIZE
        row_token = first_token + rows // HEADS
        row_mask = (rows < TOKENS * HEADS) & (row_token < query_len)
        token = (query_start + row_token).to(tl.int64)
        head = kv_head * HEADS + rows % HEADS
        position = seq_len - query_len + row_token
        mask = row_mask[:, None] & dim_mask

        from_query = query + (token * query_token_stride + head * query_head_stride)[:, None] + dims
        q = tl.load(from_query, mask=mask, other=0.0).to(tl.float32)
        factor = tl.full([BLOCK_M], scale, tl.float32)
        if HAS_LOG_SCALE:
            factor *= tl.maximum(tl.log((position + 1).to(tl.float32)) * log_scale, 1.0)
        dtype: tl.constexpr = query.dtype.element_ty
        near_q = (q * factor[:, None]).to(dtype)
        if GROUP_SIZE > 1:
            steps = NEIGHBOR_WINDOW - NEIGHBOR_WINDOW // GROUP_SIZE - (position - position // GROUP_SIZE)
            row_cos_sin = cos_sin + (tl.abs(steps) * ROTARY_DIM)[:, None]
            sign = tl.where(steps < 0, -1.0, 1.0)[:, None]
            q = rotate(q, from_query, mask, dims, row_cos_sin, sign, ROTARY_DIM, INTERLEAVED, False)
        far_q = (q * factor[:, None]).to(dtype)

        # Which keys: those that any row sees, of these the split's share, whole tiles.
        first_position = seq_len - query_len + first_token
        last_position = tl.minimum(first_position + TOKENS, seq_len) - 1
        begin = 0
        if SLIDING_WINDOW > 0:
            begin = tl.maximum(first_position - SLIDING_WINDOW + 1, 0) // BLOCK_N * BLOCK_N
        share = tl.cdiv(tl.cdiv(last_position + 1 - begin, BLOCK_N), NUM_SPLITS) * BLOCK_N
        begin += split * share
        end = tl.minimum(begin + share, last_position + 1)
        # Where grouped-only tiles end and neighbor-only tiles begin.
        grouped_end = end
        neighbor_begin = end
        if GROUP_SIZE > 1:
            grouped_end = tl.maximum(first_position - NEIGHBOR_WINDOW + 1, 0) // BLOCK_N * BLOCK_N
            grouped_end = tl.where(first_position < exact_len, 0, grouped_end)
            neighbor_begin = tl.cdiv(tl.maximum(last_position - NEIGHBOR_WINDOW + 1, 0), BLOCK_N) * BLOCK_N
            neighbor_begin = tl.where(last_position < exact_len, 0, neighbor_begin)
            grouped_end = tl.minimum(tl.maximum(grouped_end, begin), end)
            neighbor_begin = tl.minimum(tl.maximum(neighbor_begin, grouped_end), end)

        output = tl.zeros([BLOCK_M, HEAD_SIZE_PADDED], tl.float32)
        largest = tl.full([BLOCK_M], float("-inf"), tl.float32)
        total = tl.zeros([BLOCK_M], tl.float32)
        table = block_table + request.to(tl.int64) * table_stride
        heads = kv_cache + kv_head * cache_head_stride

        for kind in tl.static_range(0, 3 if GROUP_SIZE > 1 else 1):
            if kind == GROUPED:
                tile_begin = begin
                tile_end = grouped_end
            elif kind == MIXED:
                tile_begin = grouped_end
                tile_end = neighbor_begin
            else:
                tile_begin = neighbor_begin
                tile_end = end
            for tile in range(tile_begin, tile_end, BLOCK_N):
                keys = tile + tl.arange(0, BLOCK_N)
                key_mask = keys < end
                block = tl.load(table + keys // BLOCK_SIZE, mask=key_mask, other=0).to(tl.int64)
                slot = heads + block * cache_block_stride + (keys % BLOCK_SIZE) * cache_token_stride
                from_cache = slot[:, None] + dims
                kv_mask = key_mask[:, None] & dim_mask
                k = tl.load(from_cache, mask=kv_mask, other=0)
                if IS_FP8:
                    k = from_fp8(k)
                distance = position[:, None] - keys[None, :]
                if kind == NEIGHBOR:
                    scores = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
                else:
                    scores = multiply(far_q, tl.trans(k), dtype, IS_INTERPRETED)
                if kind != GROUPED:
                    lag = keys - keys // GROUP_SIZE
                    near_k = rotate(
                        k.to(tl.float32),
                        from_cache,
                        kv_mask,
                        dims,
                        cos_sin + (lag * ROTARY_DIM)[:, None],
                        1.0,
                        ROTARY_DIM,
                        INTERLEAVED,
                        IS_FP8,
                    )
                    near = multiply(near_q, tl.trans(near_k), dtype, IS_INTERPRETED)
                    if kind == NEIGHBOR:
                        scores = near
                    else:
                        is_near = (distance < NEIGHBOR_WINDOW) | (position[:, None] < exact_len)
                        scores = tl.where(is_near, near, scores)
                if HAS_SOFT_CAP:
                    # tanh through 2^x, which is exact enough for scores
                    power = tl.exp2(-2.0 * LOG2_E * tl.abs(scores / soft_cap))
                    scores = tl.where(scores < 0, -1.0, 1.0) * soft_cap * (1.0 - power) / (1.0 + power)
                scores *= LOG2_E
                seen = (distance >= 0) & key_mask[None, :]
                if SLIDING_WINDOW > 0:
                    seen &= distance < SLIDING_WINDOW
                scores = tl.where(seen, scores, float("-inf"))
                new_largest = tl.maximum(largest, tl.max(scores, 1))
                # A row that has seen nothing yet has nothing to subtract.
                base = tl.where(new_largest == float("-inf"), 0.0, new_largest)
                weights = tl.exp2(scores - base[:, None])
                decay = tl.exp2(largest - base)
                total = total * decay + tl.sum(weights, 1)
                largest = new_largest
                v = tl.load(from_cache + HEAD_SIZE, mask=kv_mask, other=0)
                if IS_FP8:
                    v = from_fp8(v)
                output = output * decay[:, None] + multiply(weights, v, dtype, IS_INTERPRETED)

        if NUM_SPLITS == 1:
            if HAS_SINKS:
                sink = tl.load(sinks + head, mask=row_mask, other=0.0) * LOG2_E
                new_largest = tl.maximum(largest, sink)
                decay = tl.exp2(largest - new_largest)
                output = output * decay[:, None]
                total = total * decay + tl.exp2(sink - new_largest)
            output = output * (v_scale / total)[:, None]
            to = out + (token * out_token_stride + head * out_head_stride)[:, None] + dims
            tl.store(to, output.to(out.dtype.element_ty), mask=mask)
        else:
            row = (split * num_tokens + token) * (tl.num_programs(1) * HEADS) + head
            tl.store(partial_output + row[:, None] * HEAD_SIZE + dims, output, mask=mask)
            tl.store(partial_largest + row, largest, mask=row_mask)
            tl.store(partial_total + row, total, mask=row_mask)


@triton.jit
def merge_kernel(
    partial_output,
    partial_largest,
    partial_total,
    out,
    sinks,
    num_tokens,
    out_token_stride,
    out_head_stride,
    v_scale,
    HAS_SINKS: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    HEAD_SIZE_PADDED: tl.constexpr,
    NUM_SPLITS: tl.constexpr,
):
    """Join the splits of one token's head, in the order of their keys."""
    LOG2_E: tl.constexpr = 1.4426950408889634
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    dims = tl.arange(0, HEAD_SIZE_PADDED)
    mask = dims < HEAD_SIZE
    output = tl.zeros([HEAD_SIZE_PADDED], tl.float32)
    largest = tl.full([], float("-inf"), tl.float32)
    total = tl.zeros([], tl.float32)
    if HAS_SINKS:
        largest = tl.load(sinks + head) * LOG2_E
        total += 1.0
    for split in range(NUM_SPLITS):
        row = (split * num_tokens + token) * tl.num_programs(1) + head
        theirs = tl.load(partial_largest + row)
        new_largest = tl.maximum(largest, theirs)
        base = tl.where(new_largest == float("-inf"), 0.0, new_largest)
        decay = tl.exp2(largest - base)
        their_decay = tl.exp2(theirs - base)
        total = total * decay + tl.load(partial_total + row) * their_decay
        part = tl.load(partial_output + row * HEAD_SIZE + dims, mask=mask, other=0.0)
        output = output * decay + part * their_decay
        largest = new_largest
    to = out + token * out_token_stride + head * out_head_stride + dims
    tl.store(to, (output * (v_scale / total)).to(out.dtype.element_ty), mask=mask)
