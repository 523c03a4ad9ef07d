"""Decodes, of one new token or few: paged attention by programs that share a request's context.

Each goes through its grouped keys, which it turns in registers, then tiles with both kinds of keys, then neighbors, in
one online softmax; `merge_splits_kernel` joins what they found.
"""

import triton
import triton.language as tl

from .arithmetic import LOG2_E, log_factor, multiply, tanh, weigh
from .fp8 import load
from .merge import merge_all
from .turning import EIGHTHS, lag, load_turned, load_turned_queries


@triton.jit
def find_keys(seq_len, first_position, TOKENS: tl.constexpr, SLIDING_WINDOW: tl.constexpr, NEAR_N: tl.constexpr):
    """Which keys `TOKENS` queries from `first_position` on see, whole tiles: the first one's position, and the end."""
    begin = 0
    if SLIDING_WINDOW > 0:
        begin = tl.maximum(first_position - SLIDING_WINDOW + 1, 0) // NEAR_N * NEAR_N
    return begin, tl.minimum(first_position + TOKENS, seq_len)


@triton.jit
def find_split_len(num_keys, num_splits, wanted_splits, NEAR_N: tl.constexpr, LONGEST_SPLIT: tl.constexpr):
    """How many keys of a context each program takes, in whole tiles.

    A `wanted_splits`th, `LONGEST_SPLIT` at most, if `num_splits` programs can do all of them then.
    """
    tiles = tl.cdiv(num_keys, NEAR_N)
    length = tl.minimum(tl.cdiv(tiles, wanted_splits), LONGEST_SPLIT // NEAR_N)
    return tl.maximum(length, tl.cdiv(tiles, num_splits)) * NEAR_N


@triton.jit
def find_tiles(
    begin,
    end,
    first_position,
    last_position,
    biggest,
    GROUPED: tl.constexpr,
    NEIGHBOR_WINDOW: tl.constexpr,
    FAR_N: tl.constexpr,
    NEAR_N: tl.constexpr,
):
    """Where kinds of tiles end among the keys `begin` to `end`, for queries at positions from a first to a last one.

    Up to the first end lie whole tiles of every row's grouped keys; from the second on neighbors of every row, up to
    the third in whole tiles that every row sees. `biggest` is the largest group size of the rows, in eighths.
    """
    far_end = begin
    near_begin = begin
    if GROUPED:
        far_end = tl.maximum(first_position - NEIGHBOR_WINDOW + 1, 0) // FAR_N * FAR_N
        near_begin = tl.cdiv(tl.maximum(last_position - NEIGHBOR_WINDOW + 1, 0), FAR_N) * FAR_N
        near_begin = tl.where(biggest == EIGHTHS, begin, tl.minimum(tl.maximum(near_begin, begin), end))
        far_end = tl.minimum(tl.maximum(far_end, begin), near_begin)
    near_end = near_begin + tl.maximum(tl.minimum(first_position + 1, end) - near_begin, 0) // NEAR_N * NEAR_N
    return far_end, near_begin, near_end


@triton.jit(
    do_not_specialize=["decode_len", "wanted_splits", "table_stride"],
    do_not_specialize_on_alignment=["query_start_loc", "seq_lens", "block_table"],
)
def decode_kernel(
    query,
    kv_cache,
    out,
    workspace,
    query_start_loc,
    seq_lens,
    block_table,
    decode_len,
    wanted_splits,
    table_stride,
    group_sizes,
    cos_sin,
    sinks,
    k_scale,
    v_scale,
    query_token_stride,
    query_head_stride,
    query_dim_stride,
    out_token_stride,
    out_head_stride,
    out_dim_stride,
    cache_block_stride,
    cache_head_stride,
    cache_token_stride,
    scale,
    log_scale,
    soft_cap,
    NEIGHBOR_WINDOW: tl.constexpr,
    SLIDING_WINDOW: tl.constexpr,
    ROTARY_DIM: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    HAS_SOFT_CAP: tl.constexpr,
    HAS_LOG_SCALE: tl.constexpr,
    HEADS: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    HEAD_SIZE_PADDED: tl.constexpr,
    HALF_PADDED: tl.constexpr,
    REST_PADDED: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    IS_SPLIT: tl.constexpr,
    LONGEST_SPLIT: tl.constexpr,
    TOKENS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    FAR_N: tl.constexpr,
    NEAR_N: tl.constexpr,
    FAR_STAGES: tl.constexpr,
    NEAR_STAGES: tl.constexpr,
    IS_FP8: tl.constexpr,
    HAS_FP8: tl.constexpr,
    IS_INTERPRETED: tl.constexpr,
):
    """One program per block of `TOKENS` queries, KV head and split of the context.

    Rows are tokens times the `HEADS` query heads of a KV head, padded to `BLOCK_M`. Requests with more than
    `decode_len` new tokens are left alone. Arguments up to `table_stride` are the step's, the others the layer's.
    """
    DTYPE: tl.constexpr = query.dtype.element_ty
    GROUPED: tl.constexpr = group_sizes is not None
    kv_head = tl.program_id(1)
    blocks = tl.cdiv(decode_len, TOKENS)
    request = tl.program_id(0) // blocks
    first_token = tl.program_id(0) % blocks * TOKENS
    query_start = tl.load(query_start_loc + request)
    query_len = tl.load(query_start_loc + request + 1) - query_start
    seq_len = tl.load(seq_lens + request)
    # Which keys: those that any row sees, of these the program's split.
    first_position = seq_len - query_len + first_token
    begin, end = find_keys(seq_len, first_position, TOKENS, SLIDING_WINDOW, NEAR_N)
    last_position = end - 1
    if IS_SPLIT:
        # The last ones have the tiles that need masks and are not pipelined, and start first.
        split = tl.num_programs(2) - 1 - tl.program_id(2)
        split_len = find_split_len(end - begin, tl.num_programs(2), wanted_splits, NEAR_N, LONGEST_SPLIT)
        begin += split * split_len
        end = tl.minimum(begin + split_len, end)
    is_its = (first_token < query_len) & (query_len <= decode_len)
    if is_its & (begin < end):
        rows = tl.arange(0, BLOCK_M)
        row_token = first_token + rows // HEADS
        row_mask = (rows < TOKENS * HEADS) & (row_token < query_len)
        token = (query_start + row_token).to(tl.int64)
        head = kv_head * HEADS + rows % HEADS
        position = seq_len - query_len + row_token
        row_scale = tl.full([BLOCK_M], scale, tl.float32)
        if k_scale is not None:
            row_scale *= tl.load(k_scale)
        if HAS_LOG_SCALE:
            row_scale *= log_factor(position, log_scale)
        if not HAS_SOFT_CAP:
            row_scale *= LOG2_E

        smallest = tl.full([], EIGHTHS, tl.int32)
        biggest = smallest
        if GROUPED:
            smallest = tl.load(group_sizes + first_position)
            biggest = tl.load(group_sizes + last_position)
        far_end, near_begin, near_end = find_tiles(
            begin, end, first_position, last_position, biggest, GROUPED, NEIGHBOR_WINDOW, FAR_N, NEAR_N
        )

        dims = tl.arange(0, HEAD_SIZE_PADDED)[None, :]
        dim_mask = dims < HEAD_SIZE
        from_query = query + (token * query_token_stride + head * query_head_stride)
        if GROUPED:
            rests = tl.arange(0, REST_PADDED)[None, :] + ROTARY_DIM
            rest_mask = rests < HEAD_SIZE
            # Of group size 1 nothing is turned.
            eighths = tl.load(group_sizes + position, mask=row_mask, other=biggest)
            steps = lag(NEIGHBOR_WINDOW, eighths) - lag(position, eighths)
            far_first, far_second = load_turned_queries(
                from_query, row_mask, query_dim_stride, steps, cos_sin, ROTARY_DIM, HALF_PADDED, INTERLEAVED, DTYPE
            )
            if ROTARY_DIM < HEAD_SIZE:
                from_rest = from_query[:, None] + rests * query_dim_stride
                far_rest = tl.load(from_rest, mask=row_mask[:, None] & rest_mask, other=0.0)

        output = tl.zeros([BLOCK_M, HEAD_SIZE_PADDED], tl.float32)
        largest = tl.full([BLOCK_M], float("-inf"), tl.float32)
        total = tl.zeros([BLOCK_M], tl.float32)
        table = block_table + request.to(tl.int64) * table_stride
        heads = kv_cache + kv_head.to(tl.int64) * cache_head_stride

        # Of odd kinds some rows do not see all keys.
        FAR: tl.constexpr = 0
        MIXED: tl.constexpr = 1
        NEAR: tl.constexpr = 2
        EDGE: tl.constexpr = 3
        # Whole tiles of unpadded dimensions need no masks.
        IS_WINDOWED: tl.constexpr = SLIDING_WINDOW > 0
        MASKS_DIMS: tl.constexpr = IS_WINDOWED or HEAD_SIZE_PADDED > HEAD_SIZE
        MASKS_PAIRS: tl.constexpr = HALF_PADDED > ROTARY_DIM // 2
        MASKS_RESTS: tl.constexpr = REST_PADDED > HEAD_SIZE - ROTARY_DIM
        for kind in tl.static_range(FAR if GROUPED else NEAR, EDGE + 1):
            if kind == FAR:
                tile_begin = begin
                tile_end = far_end
            elif kind == MIXED:
                tile_begin = far_end
                tile_end = near_begin
            elif kind == NEAR:
                tile_begin = near_begin
                tile_end = near_end
            else:
                tile_begin = near_end
                tile_end = end
            if kind == (MIXED if GROUPED else NEAR):  # no sooner, lest it lie in registers through the grouped keys
                from_dims = from_query[:, None] + dims * query_dim_stride
                q = tl.load(from_dims, mask=row_mask[:, None] & dim_mask, other=0.0)
            # Grouped keys are gone through for one group size of the rows after another, neighbors once.
            size = smallest if kind <= MIXED else biggest
            while size <= biggest:
                for tile in tl.range(
                    tile_begin,
                    tile_end,
                    FAR_N if kind <= MIXED else NEAR_N,
                    num_stages=FAR_STAGES if kind == FAR else (NEAR_STAGES if kind == NEAR else 1),
                ):
                    keys = tile + tl.arange(0, FAR_N if kind <= MIXED else NEAR_N)
                    key_mask = keys < end
                    if IS_WINDOWED:  # slots that no row sees may hold anything, and 0 * nan is nan
                        key_mask &= keys > first_position - SLIDING_WINDOW
                    if kind % 2 == 1 or IS_WINDOWED:
                        block = tl.load(table + keys // BLOCK_SIZE, mask=key_mask, other=0)
                    else:
                        block = tl.load(table + keys // BLOCK_SIZE)
                    slot = heads + block.to(tl.int64) * cache_block_stride + (keys % BLOCK_SIZE) * cache_token_stride
                    scores = tl.zeros([BLOCK_M, FAR_N if kind <= MIXED else NEAR_N], tl.float32)
                    if kind >= MIXED:
                        k_mask = key_mask[:, None] & dim_mask
                        k = load(slot[:, None] + dims, k_mask, kind != NEAR or MASKS_DIMS, DTYPE, IS_FP8, HAS_FP8)
                        near = multiply(q, tl.trans(k), scores, IS_INTERPRETED)
                    if kind <= MIXED:
                        if ROTARY_DIM < HEAD_SIZE:
                            k_mask = key_mask[:, None] & rest_mask
                            k = load(slot[:, None] + rests, k_mask, kind != FAR or MASKS_RESTS, DTYPE, IS_FP8, HAS_FP8)
                            scores = multiply(far_rest, tl.trans(k), scores, IS_INTERPRETED)
                        k_first, k_second = load_turned(
                            slot,
                            tile,
                            keys,
                            key_mask,
                            size,
                            cos_sin,
                            kind != FAR or MASKS_PAIRS,
                            kind == FAR,  # of few tiles each key has its own row
                            ROTARY_DIM,
                            HALF_PADDED,
                            INTERLEAVED,
                            DTYPE,
                            IS_FP8,
                            HAS_FP8,
                        )
                        scores = multiply(far_first, tl.trans(k_first), scores, IS_INTERPRETED)
                        scores = multiply(far_second, tl.trans(k_second), scores, IS_INTERPRETED)
                    distance = position[:, None] - keys[None, :]
                    if kind == MIXED:
                        scores = tl.where(distance < NEIGHBOR_WINDOW, near, scores)
                    elif kind > MIXED:
                        scores = near
                    if HAS_SOFT_CAP:
                        scores = tanh(scores * (row_scale / soft_cap)[:, None]) * (soft_cap * LOG2_E)
                    if kind % 2 == 1 or IS_WINDOWED:
                        # From `end` on are another program's keys, where programs share a context.
                        seen = key_mask[None, :] & (distance >= 0)
                        if IS_WINDOWED:
                            seen &= distance < SLIDING_WINDOW
                        scores = tl.where(seen, scores, float("-inf"))
                    if kind <= MIXED:
                        scores = tl.where((eighths == size)[:, None], scores, float("-inf"))
                    weights, decay, largest, total = weigh(
                        scores, row_scale, largest, total, kind == NEAR and not IS_WINDOWED, HAS_SOFT_CAP
                    )
                    v_mask = key_mask[:, None] & dim_mask
                    v = load(
                        slot[:, None] + HEAD_SIZE + dims,
                        v_mask,
                        kind % 2 == 1 or MASKS_DIMS,
                        DTYPE,
                        IS_FP8,
                        HAS_FP8,
                    )
                    output = multiply(weights.to(DTYPE), v, output * decay[:, None], IS_INTERPRETED)
                size = tl.min(tl.where(eighths > size, eighths, biggest + 1), 0) if kind <= MIXED else biggest + 1

        mask = row_mask[:, None] & dim_mask
        if IS_SPLIT:
            program = (tl.program_id(0) * tl.num_programs(1) + kv_head) * tl.num_programs(2) + split
            num_rows = (tl.num_programs(0) * tl.num_programs(1) * tl.num_programs(2)).to(tl.int64) * BLOCK_M
            row = program.to(tl.int64) * BLOCK_M + rows
            # Of what slid out of the window a row has seen nothing.
            output = output / tl.where(total == 0.0, 1.0, total)[:, None]
            tl.store(workspace + row[:, None] * HEAD_SIZE + dims, output, mask=mask)
            tl.store(workspace + num_rows * HEAD_SIZE + row, largest + tl.log2(total), mask=row_mask)
        else:
            if sinks is not None:
                sink = tl.load(sinks + head, mask=row_mask, other=0.0).to(tl.float32) * LOG2_E
                new_largest = tl.maximum(largest, sink)
                decay = tl.exp2(largest - new_largest)
                output = output * decay[:, None]
                total = total * decay + tl.exp2(sink - new_largest)
            if v_scale is not None:
                output *= tl.load(v_scale)
            output = output / total[:, None]
            to = out + (token * out_token_stride + head * out_head_stride)[:, None] + dims * out_dim_stride
            tl.store(to, output.to(out.dtype.element_ty), mask=mask)


@triton.jit(
    do_not_specialize=["decode_len", "wanted_splits", "num_splits"],
    do_not_specialize_on_alignment=["query_start_loc", "seq_lens"],
)
def merge_splits_kernel(
    out,
    workspace,
    query_start_loc,
    seq_lens,
    decode_len,
    wanted_splits,
    num_splits,
    sinks,
    v_scale,
    out_token_stride,
    out_head_stride,
    out_dim_stride,
    SLIDING_WINDOW: tl.constexpr,
    HEADS: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    HEAD_SIZE_PADDED: tl.constexpr,
    LONGEST_SPLIT: tl.constexpr,
    TOKENS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    NEAR_N: tl.constexpr,
    SPLITS: tl.constexpr,
):
    """Join the splits of one token's head: one program each, `SPLITS` of them at a time, in the order of their keys.

    Arguments up to `num_splits` are the step's, the others the layer's.
    """
    blocks = tl.cdiv(decode_len, TOKENS)
    request = tl.program_id(0) // decode_len
    request_token = tl.program_id(0) % decode_len
    head = tl.program_id(1)
    query_start = tl.load(query_start_loc + request)
    query_len = tl.load(query_start_loc + request + 1) - query_start
    if (request_token < query_len) & (query_len <= decode_len):
        seq_len = tl.load(seq_lens + request)
        first_position = seq_len - query_len + request_token // TOKENS * TOKENS
        begin, end = find_keys(seq_len, first_position, TOKENS, SLIDING_WINDOW, NEAR_N)
        used_splits = tl.cdiv(
            end - begin, find_split_len(end - begin, num_splits, wanted_splits, NEAR_N, LONGEST_SPLIT)
        )
        num_kv_heads = tl.num_programs(1) // HEADS
        block = request * blocks + request_token // TOKENS
        first_row = (block * num_kv_heads + head // HEADS).to(tl.int64) * num_splits * BLOCK_M
        first_row += request_token % TOKENS * HEADS + head % HEADS
        num_rows = (tl.num_programs(0) // decode_len * blocks * num_kv_heads * num_splits).to(tl.int64) * BLOCK_M
        dims = tl.arange(0, HEAD_SIZE_PADDED)
        output = tl.zeros([HEAD_SIZE_PADDED], tl.float32)
        lse = tl.full([], float("-inf"), tl.float32)
        if sinks is not None:
            lse = tl.load(sinks + head).to(tl.float32) * LOG2_E
        for first_split in range(0, used_splits, SPLITS):
            split = first_split + tl.arange(0, SPLITS)
            split_mask = split < used_splits
            row = first_row + split * BLOCK_M
            mask = split_mask[:, None] & (dims < HEAD_SIZE)[None, :]
            theirs = tl.load(workspace + row[:, None] * HEAD_SIZE + dims[None, :], mask=mask, other=0.0)
            their_lse = tl.load(workspace + num_rows * HEAD_SIZE + row, mask=split_mask, other=float("-inf"))
            output, lse = merge_all(output, lse, theirs, their_lse)
        if v_scale is not None:
            output *= tl.load(v_scale)
        token = (query_start + request_token).to(tl.int64)
        to = out + token * out_token_stride + head * out_head_stride + dims * out_dim_stride
        tl.store(to, output.to(out.dtype.element_ty), mask=dims < HEAD_SIZE)
