"""Paged attention: grouped keys, then tiles with both kinds of keys, then neighbors; one online softmax.

Prefill has a program for each block of queries and KV head. Decode has several: they share a request's context, and
`merge_kernel` joins what they found.
"""

import triton
import triton.language as tl

from .rotation import lag, load, load_cos_sin, load_pairs, load_turned, turn


@triton.jit
def multiply(a, b, added, IS_INTERPRETED: tl.constexpr):
    """`a @ b + added`, summed in float32."""
    if IS_INTERPRETED and a.dtype == tl.bfloat16:  # the interpreter would multiply bfloat16's bits
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, added, input_precision="ieee")


@triton.jit
def tanh(x):
    """To float32's last digits: near 0 by its series, where the quotient would cancel."""
    LOG2_E: tl.constexpr = 1.4426950408889634
    power = tl.exp2(-2.0 * LOG2_E * tl.abs(x))
    far = tl.where(x < 0, -1.0, 1.0) * (1.0 - power) / (1.0 + power)
    square = x * x
    series = 62.0 / 2835.0 + square * (-1382.0 / 155925.0)
    series = 1.0 + square * (-1.0 / 3.0 + square * (2.0 / 15.0 + square * (-17.0 / 315.0 + square * series)))
    return tl.where(square < 0.0625, x * series, far)


@triton.jit
def log_factor(position, log_scale):
    """What `AttentionParams.log_scale_len` multiplies queries by; `log_scale` is the inverse of its logarithm."""
    return tl.maximum(tl.log((position + 1).to(tl.float32)) * log_scale, 1.0)


@triton.jit
def find_request(query_start_loc, block, num_reqs, TOKENS: tl.constexpr):
    """The request of the block `block` of `TOKENS` queries: the last `r` with `start[r] // TOKENS + r <= block`.

    Each request has as many blocks as it needs or one more, whatever the lengths: so the grid is known without looking
    at them.
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
def find_keys(seq_len, first_position, TOKENS: tl.constexpr, SLIDING_WINDOW: tl.constexpr, NEAR_N: tl.constexpr):
    """Which keys `TOKENS` queries from `first_position` on see, whole tiles: the first one's position, and the end."""
    begin = 0
    if SLIDING_WINDOW > 0:
        begin = tl.maximum(first_position - SLIDING_WINDOW + 1, 0) // NEAR_N * NEAR_N
    return begin, tl.minimum(first_position + TOKENS, seq_len)


@triton.jit
def find_share(num_keys, num_splits, wanted_splits, NEAR_N: tl.constexpr, LONGEST_SHARE: tl.constexpr):
    """How many keys of a context each program takes, in whole tiles.

    A `wanted_splits`th, `LONGEST_SHARE` at most, if `num_splits` programs can do all of them then.
    """
    tiles = tl.cdiv(num_keys, NEAR_N)
    share = tl.minimum(tl.cdiv(tiles, wanted_splits), LONGEST_SHARE // NEAR_N)
    return tl.maximum(share, tl.cdiv(tiles, num_splits)) * NEAR_N


@triton.jit(
    do_not_specialize=["num_reqs", "decode_len", "wanted_splits", "table_stride"],
    do_not_specialize_on_alignment=["query_start_loc", "seq_lens", "block_table"],
)
def attention_kernel(
    query,
    kv_cache,
    out,
    workspace,
    query_start_loc,
    seq_lens,
    block_table,
    num_reqs,
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
    IS_DECODE: tl.constexpr,
    IS_SPLIT: tl.constexpr,
    LONGEST_SHARE: tl.constexpr,
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
    """One program per block of `TOKENS` queries, KV head and, in a decode, share of the context.

    Rows are tokens times the `HEADS` query heads of a KV head, padded to `BLOCK_M`. Requests with at most `decode_len`
    new tokens are the decode's, the others the prefill's; each launch leaves the other's alone. Arguments up to
    `table_stride` are the step's, the others the layer's.
    """
    LOG2_E: tl.constexpr = 1.4426950408889634
    DTYPE: tl.constexpr = query.dtype.element_ty
    EIGHTHS: tl.constexpr = 8
    GROUPED: tl.constexpr = group_sizes is not None
    kv_head = tl.program_id(1)
    if IS_DECODE:
        blocks = tl.cdiv(decode_len, TOKENS)
        request = tl.program_id(0) // blocks
        first_token = tl.program_id(0) % blocks * TOKENS
    else:
        # The last blocks see most and go first.
        index = tl.num_programs(0) - 1 - tl.program_id(0)
        request = find_request(query_start_loc, index, num_reqs, TOKENS)
        first_token = (index - (tl.load(query_start_loc + request) // TOKENS + request)) * TOKENS
    query_start = tl.load(query_start_loc + request)
    query_len = tl.load(query_start_loc + request + 1) - query_start
    seq_len = tl.load(seq_lens + request)
    # Which keys: those that any row sees, of these the program's share.
    first_position = seq_len - query_len + first_token
    begin, end = find_keys(seq_len, first_position, TOKENS, SLIDING_WINDOW, NEAR_N)
    last_position = end - 1
    if IS_SPLIT:
        share = find_share(end - begin, tl.num_programs(2), wanted_splits, NEAR_N, LONGEST_SHARE)
        begin += tl.program_id(2) * share
        end = tl.minimum(begin + share, end)
    is_its = (first_token < query_len) & ((query_len <= decode_len) == IS_DECODE)
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

        # Up to `far_end` lie whole tiles of every row's grouped keys; from `near_begin` on, neighbors of every row, up
        # to `near_end` in whole tiles that every row sees.
        smallest = tl.full([], EIGHTHS, tl.int32)
        biggest = smallest
        near_begin = begin
        if GROUPED:
            smallest = tl.load(group_sizes + first_position)
            biggest = tl.load(group_sizes + last_position)
            far_end = tl.maximum(first_position - NEIGHBOR_WINDOW + 1, 0) // FAR_N * FAR_N
            near_begin = tl.cdiv(tl.maximum(last_position - NEIGHBOR_WINDOW + 1, 0), FAR_N) * FAR_N
            near_begin = tl.where(biggest == EIGHTHS, begin, tl.minimum(tl.maximum(near_begin, begin), end))
            far_end = tl.minimum(tl.maximum(far_end, begin), near_begin)
        near_end = near_begin + tl.maximum(tl.minimum(first_position + 1, end) - near_begin, 0) // NEAR_N * NEAR_N

        dims = tl.arange(0, HEAD_SIZE_PADDED)[None, :]
        dim_mask = dims < HEAD_SIZE
        from_query = query + (token * query_token_stride + head * query_head_stride)
        if GROUPED:
            pairs = tl.arange(0, HALF_PADDED)[None, :]
            pair_mask = pairs < ROTARY_DIM // 2
            rests = tl.arange(0, REST_PADDED)[None, :] + ROTARY_DIM
            rest_mask = rests < HEAD_SIZE
            # Of group size 1 nothing is turned.
            eighths = tl.load(group_sizes + position, mask=row_mask, other=biggest)
            steps = lag(NEIGHBOR_WINDOW, eighths) - lag(position, eighths)
            cosine, sine = load_cos_sin(cos_sin, tl.abs(steps), row_mask[:, None] & pair_mask, pairs, ROTARY_DIM)
            sine = tl.where(steps < 0, -1.0, 1.0)[:, None] * sine
            far_first, far_second = load_pairs(
                from_query, row_mask, query_dim_stride, True, ROTARY_DIM, HALF_PADDED, INTERLEAVED, DTYPE, False, False
            )
            far_first, far_second = turn(far_first, far_second, cosine, sine, DTYPE)
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
        MASKS_PAIRS: tl.constexpr = IS_WINDOWED or HALF_PADDED > ROTARY_DIM // 2
        MASKS_RESTS: tl.constexpr = IS_WINDOWED or REST_PADDED > HEAD_SIZE - ROTARY_DIM
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
                            # Of few tiles, or with no registers left, each key has its own row.
                            kind == FAR and (IS_DECODE or HEAD_SIZE <= 128 or BLOCK_M > 32),
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
                    # Scaled after the sum over dimensions, in the same instruction as the subtraction.
                    if HAS_SOFT_CAP:
                        new_largest = tl.maximum(largest, tl.max(scores, 1))
                    else:
                        new_largest = tl.maximum(largest, tl.max(scores, 1) * row_scale)
                    base = new_largest
                    if kind != NEAR or IS_WINDOWED:  # a row that has seen nothing yet has nothing to subtract
                        base = tl.where(new_largest == float("-inf"), 0.0, new_largest)
                    if HAS_SOFT_CAP:
                        weights = tl.exp2(scores - base[:, None])
                    else:
                        weights = tl.exp2(scores * row_scale[:, None] - base[:, None])
                    decay = tl.exp2(largest - base)
                    total = total * decay + tl.sum(weights, 1)
                    largest = new_largest
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
            program = (tl.program_id(0) * tl.num_programs(1) + kv_head) * tl.num_programs(2) + tl.program_id(2)
            num_rows = (tl.num_programs(0) * tl.num_programs(1) * tl.num_programs(2)).to(tl.int64) * BLOCK_M
            row = program.to(tl.int64) * BLOCK_M + rows
            tl.store(workspace + row[:, None] * HEAD_SIZE + dims, output, mask=mask)
            tl.store(workspace + num_rows * HEAD_SIZE + row, largest, mask=row_mask)
            tl.store(workspace + num_rows * (HEAD_SIZE + 1) + row, total, mask=row_mask)
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
def merge_kernel(
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
    LONGEST_SHARE: tl.constexpr,
    TOKENS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    NEAR_N: tl.constexpr,
    SPLITS: tl.constexpr,
):
    """Join the shares of one token's head: one program each, `SPLITS` shares at a time, in the order of their keys.

    Arguments up to `num_splits` are the step's, the others the layer's.
    """
    LOG2_E: tl.constexpr = 1.4426950408889634
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
        shares = tl.cdiv(end - begin, find_share(end - begin, num_splits, wanted_splits, NEAR_N, LONGEST_SHARE))
        num_kv_heads = tl.num_programs(1) // HEADS
        block = request * blocks + request_token // TOKENS
        first_row = (block * num_kv_heads + head // HEADS).to(tl.int64) * num_splits * BLOCK_M
        first_row += request_token % TOKENS * HEADS + head % HEADS
        num_rows = (tl.num_programs(0) // decode_len * blocks * num_kv_heads * num_splits).to(tl.int64) * BLOCK_M
        dims = tl.arange(0, HEAD_SIZE_PADDED)
        output = tl.zeros([HEAD_SIZE_PADDED], tl.float32)
        largest = tl.full([], float("-inf"), tl.float32)
        total = tl.full([], 0.0, tl.float32)
        if sinks is not None:
            largest = tl.load(sinks + head).to(tl.float32) * LOG2_E
            total = tl.full([], 1.0, tl.float32)
        for first_share in range(0, shares, SPLITS):
            share = first_share + tl.arange(0, SPLITS)
            share_mask = share < shares
            row = first_row + share * BLOCK_M
            theirs = tl.load(workspace + num_rows * HEAD_SIZE + row, mask=share_mask, other=float("-inf"))
            their_total = tl.load(workspace + num_rows * (HEAD_SIZE + 1) + row, mask=share_mask, other=0.0)
            new_largest = tl.maximum(largest, tl.max(theirs, 0))
            # A share of what slid out of the window has seen nothing.
            base = tl.where(new_largest == float("-inf"), 0.0, new_largest)
            weight = tl.exp2(theirs - base)
            decay = tl.exp2(largest - base)
            total = total * decay + tl.sum(their_total * weight, 0)
            mask = share_mask[:, None] & (dims < HEAD_SIZE)[None, :]
            parts = tl.load(workspace + row[:, None] * HEAD_SIZE + dims[None, :], mask=mask, other=0.0)
            output = output * decay + tl.sum(parts * weight[:, None], 0)
            largest = new_largest
        if v_scale is not None:
            output *= tl.load(v_scale)
        token = (query_start + request_token).to(tl.int64)
        to = out + token * out_token_stride + head * out_head_stride + dims * out_dim_stride
        tl.store(to, (output / total).to(out.dtype.element_ty), mask=dims < HEAD_SIZE)
