"""Ordinary attention of many queries, over a paged cache or not, with its log-sum-exp: where FlashAttention is not."""

import triton
import triton.language as tl

from .arithmetic import LOG2_E, multiply, tanh, weigh
from .fp8 import load


@triton.jit
def find_sequence(query_start_loc, tile, num_seqs, TOKENS: tl.constexpr):
    """The sequence of the tile `tile` of `TOKENS` queries: the last `s` with `start[s] // TOKENS + s <= tile`.

    Each sequence has as many tiles as it needs or one more, whatever the lengths: so the grid is known without looking
    at them.
    """
    low = tl.full([], 0, tl.int32)
    high = num_seqs
    while high - low > 1:
        middle = (low + high) // 2
        if tl.load(query_start_loc + middle) // TOKENS + middle <= tile:
            low = middle
        else:
            high = middle
    return low


@triton.jit(
    do_not_specialize=["num_seqs", "table_stride", "lse_stride"],
    do_not_specialize_on_alignment=["query_start_loc", "seq_lens", "block_table", "lse"],
)
def varlen_kernel(
    query,
    key,
    value,
    out,
    lse,
    query_start_loc,
    seq_lens,
    block_table,
    num_seqs,
    table_stride,
    lse_stride,
    k_scale,
    v_scale,
    query_token_stride,
    query_head_stride,
    query_dim_stride,
    out_token_stride,
    out_head_stride,
    out_dim_stride,
    key_block_stride,
    key_token_stride,
    key_head_stride,
    value_block_stride,
    value_token_stride,
    value_head_stride,
    scale,
    soft_cap,
    WINDOW: tl.constexpr,
    IS_CAUSAL: tl.constexpr,
    HAS_SOFT_CAP: tl.constexpr,
    HEADS: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    HEAD_SIZE_PADDED: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    TOKENS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STAGES: tl.constexpr,
    IS_FP8: tl.constexpr,
    HAS_FP8: tl.constexpr,
    IS_INTERPRETED: tl.constexpr,
):
    """One program per tile of `TOKENS` queries and KV head; see `interface.VarlenAttention`.

    Rows are tokens times the `HEADS` query heads of a KV head, padded to `BLOCK_M`. With a `BLOCK_SIZE` of 0 keys and
    values are not in blocks. Arguments up to `lse_stride` are the step's, the others the layer's.
    """
    DTYPE: tl.constexpr = query.dtype.element_ty
    IS_PAGED: tl.constexpr = BLOCK_SIZE > 0
    kv_head = tl.program_id(1)
    # The last tiles see most and go first.
    index = tl.num_programs(0) - 1 - tl.program_id(0)
    seq = find_sequence(query_start_loc, index, num_seqs, TOKENS)
    query_start = tl.load(query_start_loc + seq)
    first_token = (index - (query_start // TOKENS + seq)) * TOKENS
    query_len = tl.load(query_start_loc + seq + 1) - query_start
    if first_token < query_len:
        seq_len = tl.load(seq_lens + seq)
        rows = tl.arange(0, BLOCK_M)
        row_token = first_token + rows // HEADS
        row_mask = (rows < TOKENS * HEADS) & (row_token < query_len)
        token = (query_start + row_token).to(tl.int64)
        head = kv_head * HEADS + rows % HEADS
        first_position = seq_len - query_len + first_token
        position = seq_len - query_len + row_token
        end = seq_len
        full_end = seq_len // BLOCK_N * BLOCK_N
        if IS_CAUSAL:
            end = tl.minimum(first_position + TOKENS, seq_len)
            full_end = (first_position + 1) // BLOCK_N * BLOCK_N
        # From `begin` on some row sees keys, from `full_begin` to `full_end`, in whole tiles, every row.
        begin = 0
        full_begin = 0
        if WINDOW > 0:
            begin = tl.maximum(first_position - WINDOW + 1, 0) // BLOCK_N * BLOCK_N
            full_begin = tl.cdiv(tl.maximum(end - WINDOW, 0), BLOCK_N) * BLOCK_N
            full_end = tl.maximum(full_end, begin)
            full_begin = tl.minimum(full_begin, full_end)

        row_scale = tl.full([BLOCK_M], scale, tl.float32)
        if k_scale is not None:
            row_scale *= tl.load(k_scale)
        if not HAS_SOFT_CAP:
            row_scale *= LOG2_E
        dims = tl.arange(0, HEAD_SIZE_PADDED)[None, :]
        dim_mask = dims < HEAD_SIZE
        from_query = query + (token * query_token_stride + head * query_head_stride)
        q = tl.load(from_query[:, None] + dims * query_dim_stride, mask=row_mask[:, None] & dim_mask, other=0.0)
        output = tl.zeros([BLOCK_M, HEAD_SIZE_PADDED], tl.float32)
        largest = tl.full([BLOCK_M], float("-inf"), tl.float32)
        total = tl.zeros([BLOCK_M], tl.float32)
        from_key = key + kv_head.to(tl.int64) * key_head_stride
        from_value = value + kv_head.to(tl.int64) * value_head_stride
        table = block_table + seq.to(tl.int64) * table_stride if IS_PAGED else block_table
        MASKS_DIMS: tl.constexpr = HEAD_SIZE_PADDED > HEAD_SIZE
        # Tiles that begin outside of the window, tiles that every row sees, tiles that end after some row.
        for kind in tl.static_range(0 if WINDOW > 0 else 1, 3):
            if kind == 0:
                tile_begin = begin
                tile_end = full_begin
            elif kind == 1:
                tile_begin = full_begin
                tile_end = full_end
            else:
                tile_begin = full_end
                tile_end = end
            for tile in tl.range(tile_begin, tile_end, BLOCK_N, num_stages=STAGES if kind == 1 else 1):
                keys = tile + tl.arange(0, BLOCK_N)
                # Slots that no row sees may hold anything, and 0 * nan is nan.
                key_mask = keys < end
                if WINDOW > 0:
                    key_mask &= keys > first_position - WINDOW
                if IS_PAGED:
                    if kind != 1:
                        block = tl.load(table + keys // BLOCK_SIZE, mask=key_mask, other=0)
                    else:
                        block = tl.load(table + keys // BLOCK_SIZE)
                    slot = block.to(tl.int64) * key_block_stride + (keys % BLOCK_SIZE) * key_token_stride
                    value_slot = block.to(tl.int64) * value_block_stride + (keys % BLOCK_SIZE) * value_token_stride
                else:
                    slot = keys.to(tl.int64) * key_token_stride
                    value_slot = keys.to(tl.int64) * value_token_stride
                mask = key_mask[:, None] & dim_mask
                k = load((from_key + slot)[:, None] + dims, mask, kind != 1 or MASKS_DIMS, DTYPE, IS_FP8, HAS_FP8)
                scores = multiply(q, tl.trans(k), tl.zeros([BLOCK_M, BLOCK_N], tl.float32), IS_INTERPRETED)
                if HAS_SOFT_CAP:
                    scores = tanh(scores * (row_scale / soft_cap)[:, None]) * (soft_cap * LOG2_E)
                if kind != 1:
                    distance = position[:, None] - keys[None, :]
                    seen = keys[None, :] < seq_len
                    if IS_CAUSAL:
                        seen &= distance >= 0
                    if WINDOW > 0:
                        seen &= distance < WINDOW
                    scores = tl.where(seen, scores, float("-inf"))
                weights, decay, largest, total = weigh(scores, row_scale, largest, total, kind == 1, HAS_SOFT_CAP)
                v = load(
                    (from_value + value_slot)[:, None] + dims, mask, kind != 1 or MASKS_DIMS, DTYPE, IS_FP8, HAS_FP8
                )
                output = multiply(weights.to(DTYPE), v, output * decay[:, None], IS_INTERPRETED)

        if v_scale is not None:
            output *= tl.load(v_scale)
        output = output / total[:, None]
        to = out + (token * out_token_stride + head * out_head_stride)[:, None] + dims * out_dim_stride
        tl.store(to, output.to(out.dtype.element_ty), mask=row_mask[:, None] & dim_mask)
        tl.store(lse + head.to(tl.int64) * lse_stride + token, (largest + tl.log2(total)) / LOG2_E, mask=row_mask)
