"""Self-Extend in PyTorch, on any device and in any floating dtype: the oracle (in float64) and the fallback.

`attend` is the attention itself, over keys and values at hand; the kernel set around it reads them from a paged cache.
Block interior: `[..., :head_size]` is the key, `[..., head_size:]` the value. float16 and bfloat16 are computed in
float32. Whole-tensor operations; a step's memory is bounded by `MAX_ELEMENTS`.
"""

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from .interface import NO_HOST, AttentionBatch, AttentionParams, GroupSizes, Host, Kernels, LayerKernels, Rotation, lag
from .limits import EIGHTHS
from .paged_cache import KEY_THEN_VALUE, store_by_indexing

MAX_ELEMENTS = 1 << 20
"""How many scores, or gathered cache values, are held at once (a single query's are always)."""

TURNED_ELEMENTS = 1 << 19
"""How many elements of turned keys are held at once: 2 MB in float32, which a processor keeps near."""


class ReferenceKernels(Kernels):
    """See `interface.Kernels`."""

    CACHE_LAYOUT = KEY_THEN_VALUE
    VARIANT = "PyTorch"

    def prepare(self, params: AttentionParams, host: Host = NO_HOST) -> "ReferenceLayer":
        """See `interface.Kernels.prepare`."""
        return ReferenceLayer(params)


KERNELS = ReferenceKernels()


@dataclass(frozen=True)
class ReferenceLayer(LayerKernels):
    """See `interface.LayerKernels`."""

    params: AttentionParams

    def store(self, key: torch.Tensor, value: torch.Tensor, kv_cache: torch.Tensor, batch: AttentionBatch) -> None:
        """See `interface.LayerKernels.store`."""
        store_by_indexing(key, value, kv_cache, batch.slot_mapping, self.params.k_scale, self.params.v_scale)

    def attend(
        self,
        query: torch.Tensor,
        kv_cache: torch.Tensor,
        batch: AttentionBatch,
        out: torch.Tensor,
        workspace: torch.Tensor | None = None,
    ) -> None:
        """See `interface.LayerKernels.attend`."""
        params, dtype = self.params, _compute_dtype(query)
        seq_lens, positions = batch.seq_lens.tolist(), _positions(batch)
        decodes = []
        for request, (begin, end) in enumerate(itertools.pairwise(batch.query_start_loc.tolist())):
            if end == begin:  # padding
                continue
            if end - begin == 1:
                decodes.append(request)
                continue
            seq_len = seq_lens[request]
            key, value, key_pos = _gather(kv_cache, batch, params, [request], seq_len - (end - begin), seq_len, dtype)
            out[begin:end] = attend(query[None, begin:end], key, value, positions[None, begin:end], key_pos, params)[0]
        # Requests with one new token are taken together, those of like length with each other.
        decodes.sort(key=seq_lens.__getitem__)
        while decodes:
            longest = seq_lens[decodes[-1]]
            width = max(1, MAX_ELEMENTS // (longest * kv_cache.shape[1] * kv_cache.shape[3]))
            group, decodes = decodes[-width:], decodes[:-width]
            key, value, key_pos = _gather(kv_cache, batch, params, group, seq_lens[group[0]] - 1, longest, dtype)
            tokens = batch.query_start_loc[group].long()[:, None]
            query_pos = positions[tokens]
            hidden = _is_hidden(query_pos, key_pos, params)
            # Slots that a request does not see may hold anything, and 0 * nan is nan.
            value = value.masked_fill(hidden.mT[:, None], 0.0)
            out[tokens] = attend(query[tokens], key, value, query_pos, key_pos, params, hidden)


def _positions(batch: AttentionBatch) -> torch.Tensor:
    """`[num_tokens]`, int64: the position of each new token in its request. On a GPU this waits for the device."""
    query_lens = batch.query_start_loc.diff().long()
    # A token's position is its index in the step, moved by what its request has before the step's first token.
    moved = batch.seq_lens - query_lens - batch.query_start_loc[:-1]
    moved = torch.repeat_interleave(moved, query_lens)
    return torch.arange(len(moved), device=moved.device) + moved


def _scale(scale: torch.Tensor | None) -> torch.Tensor | float:
    return 1.0 if scale is None else scale


def _gather(
    kv_cache: torch.Tensor,
    batch: AttentionBatch,
    params: AttentionParams,
    requests: list[int],
    first: int,
    last: int,
    dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What queries at positions `first .. last - 1` may see, out of the cache's blocks.

    Returns:
        Keys and values `[len(requests), num_kv_heads, keys, head_size]`, and the keys' positions `[1, keys]`.

    """
    block_size = kv_cache.shape[2]
    begin = max(0, first + 1 - params.sliding_window) if params.sliding_window else 0
    first_block = begin // block_size
    stored_from = first_block * block_size
    blocks = batch.block_table[requests, first_block : -(-last // block_size)].long()
    # [requests, blocks, kv heads, block_size, 2 * head_size] -> [requests, kv heads, keys, 2 * head_size]
    if kv_cache.element_size() == 1:
        kv = kv_cache.view(torch.uint8)[blocks].view(torch.float8_e4m3fn)
    else:
        kv = kv_cache[blocks]
    kv = kv.transpose(1, 2).flatten(2, 3)[:, :, begin - stored_from : last - stored_from].to(dtype)
    key, value = kv.chunk(2, dim=-1)
    if kv_cache.element_size() == 1:
        key, value = key * _scale(params.k_scale), value * _scale(params.v_scale)
    return key, value, torch.arange(begin, last, device=kv_cache.device)[None]


def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    query_pos: torch.Tensor,
    key_pos: torch.Tensor,
    params: AttentionParams,
    hidden: torch.Tensor | None = None,
    max_elements: int = MAX_ELEMENTS,
) -> torch.Tensor:
    """Attention over keys and values at hand, rows of queries at a time.

    Positions count the keys that a request has; a constant added to the positions that queries and keys were rotated
    at does not matter. While torch compiles, nothing is decided by values, and all keys are turned for every group size
    that the queries can have.

    Args:
        query: `[requests, rows, num_heads, head_size]`, rotated at true positions.
        key: `[requests, num_kv_heads, keys, head_size]`, rotated at true positions.
        value: `[requests, num_kv_heads, keys, head_size]`, finite where hidden too.
        query_pos: `[requests or 1, rows]`, not decreasing.
        key_pos: `[requests or 1, keys]`, not decreasing.
        params: The layer.
        hidden: `[requests or 1, rows, keys]`, bool: what a query does not see, the keys after it among them. None: the
            keys after it, and outside of `params.sliding_window`; the queries are then the last keys' tokens.
        max_elements: How many scores are held at once (a single query's are always). Every time anew, the grouped keys
            of those queries are turned.

    Returns:
        Like `query`; zeros for a query that sees nothing.

    """
    num_rows, num_keys, dtype = query.shape[1], key.shape[2], _compute_dtype(query)
    key, value = key.to(dtype), value.to(dtype)
    rows = max(1, max_elements // (query.shape[0] * query.shape[2] * num_keys))
    parts = []
    for row in range(0, num_rows, rows):
        stop = min(row + rows, num_rows)
        keys = num_keys if hidden is not None else num_keys - (num_rows - stop)
        part = query[:, row:stop].to(dtype), key[:, :, :keys], value[:, :, :keys]
        part_hidden = None if hidden is None else hidden[:, row:stop]
        parts.append(_attend(*part, query_pos[:, row:stop], key_pos[:, :keys], params, part_hidden).to(query.dtype))
    return torch.cat(parts, dim=1)


def _attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    query_pos: torch.Tensor,
    key_pos: torch.Tensor,
    params: AttentionParams,
    hidden: torch.Tensor | None,
) -> torch.Tensor:
    """See `attend`."""
    num_heads, num_kv_heads = query.shape[2], key.shape[1]
    weights = _weights(query, key, query_pos, key_pos, params, hidden)
    weights = weights.unflatten(1, (num_kv_heads, num_heads // num_kv_heads)).flatten(2, 3)
    answer: torch.Tensor = (weights @ value).unflatten(2, (-1, query.shape[1])).flatten(1, 2).transpose(1, 2)
    return answer


def attention_weights(
    query: torch.Tensor,
    key: torch.Tensor,
    query_pos: torch.Tensor,
    key_pos: torch.Tensor,
    params: AttentionParams,
    hidden: torch.Tensor | None = None,
) -> torch.Tensor:
    """What `attend` multiplies the values by, all of it at once: `[requests, num_heads, rows, keys]`, like `query`."""
    dtype = _compute_dtype(query)
    return _weights(query.to(dtype), key.to(dtype), query_pos, key_pos, params, hidden).to(query.dtype)


def _weights(
    query: torch.Tensor,
    key: torch.Tensor,
    query_pos: torch.Tensor,
    key_pos: torch.Tensor,
    params: AttentionParams,
    hidden: torch.Tensor | None,
) -> torch.Tensor:
    """See `attention_weights`; in the dtype that is computed in."""
    query = log_scaled(query * params.scale, query_pos, params)
    if params.group_sizes is None or params.rotation is None:  # there is never only one of them
        scores = _scores(query, key)
    else:
        layer = params.group_sizes, params.neighbor_window, params.rotation
        scores = _self_extend_scores(query, key, query_pos, key_pos, *layer)
    if params.soft_cap:
        scores = params.soft_cap * torch.tanh(scores / params.soft_cap)
    if hidden is None:
        # Without a sliding window, everything up to the first query's position is seen by all of them.
        column = 0 if params.sliding_window else _count_until(query_pos.amin(1), key_pos)
        unseen = _is_hidden(query_pos, key_pos[:, column:], params)
        scores[..., column:].masked_fill_(unseen[:, None], float("-inf"))
    else:
        scores.masked_fill_(hidden[:, None], float("-inf"))
    if params.sinks is not None:
        sinks = params.sinks.to(scores.dtype)[None, :, None, None].expand(*scores.shape[:3], 1)
        weights = torch.cat([scores, sinks], dim=-1).softmax(dim=-1)[..., :-1]
    else:
        weights = scores.softmax(dim=-1)
    if hidden is not None:
        weights = weights.masked_fill(hidden.all(2)[:, None, :, None], 0.0)  # the softmax of nothing is nan
    return weights


def _is_hidden(query_pos: torch.Tensor, key_pos: torch.Tensor, params: AttentionParams) -> torch.Tensor:
    """Whether queries `[requests, rows]` do not see keys `[requests or 1, keys]`: `[requests, rows, keys]`."""
    distance = query_pos[:, :, None] - key_pos[:, None]
    hidden = distance < 0
    if params.sliding_window:
        hidden |= distance >= params.sliding_window
    return hidden


def _count_until(position: torch.Tensor, key_pos: torch.Tensor) -> int:
    """How many of the first keys lie at `position` `[requests or 1]` or before, in every request."""
    if torch.compiler.is_compiling():
        return 0
    return int((key_pos <= position[:, None]).sum(1).min())


def _self_extend_scores(
    query: torch.Tensor,
    key: torch.Tensor,
    query_pos: torch.Tensor,
    key_pos: torch.Tensor,
    sizes: GroupSizes,
    window: int,
    rotation: Rotation,
) -> torch.Tensor:
    """Scores `[requests, num_heads, rows, keys]`, each by its neighbor or its grouped relative position."""
    eighths = sizes.eighths[query_pos]
    grouped = eighths > EIGHTHS
    # Keys before `column` are no query's neighbors, those from `stop` on are no query's grouped keys.
    column, stop = 0, key.shape[2]
    if not torch.compiler.is_compiling():
        column = _count_until(query_pos.amin(1) - window, key_pos) if bool(grouped.all()) else 0
        last = torch.where(grouped, query_pos, -1).amax(1) - window
        stop = int((key_pos <= last[:, None]).sum(1).max())
    scores = torch.nn.functional.pad(_scores(query, key[:, :, column:]), (column, 0))
    if stop == 0:
        return scores
    query_steps = lag(torch.full_like(eighths, window), eighths) - lag(query_pos, eighths)
    far_query = rotation.turn(query, query_steps[..., None])
    far_pos = key_pos[:, :stop]
    is_far = grouped[:, :, None] & (query_pos[:, :, None] - far_pos[:, None] >= window)
    # Turned keys are read at once, out of the processor's own memory.
    width = stop if torch.compiler.is_compiling() else max(64, TURNED_ELEMENTS // key[:, :, 0].numel())
    for one in _each_of(eighths, sizes.most_in(query.shape[1])):
        takes = is_far & (eighths == one)[:, :, None]
        for begin in range(0, stop, width):
            keys = slice(begin, min(begin + width, stop))
            far = _scores(far_query, rotation.turn(key[:, :, keys], -lag(far_pos[:, keys], one)[:, None]))
            scores[..., keys] = torch.where(takes[:, None, :, keys], far, scores[..., keys])
    return scores


def _each_of(eighths: torch.Tensor, most: int) -> Iterator[torch.Tensor]:
    """The group sizes above 1 of each request's queries `[requests, rows]`, `most` at most, rising: `[requests, 1]`.

    A request that has fewer than others has its largest again.
    """
    largest = eighths.amax(1, keepdim=True)
    one = torch.full_like(largest, EIGHTHS)
    for _ in range(most):
        one = torch.where(eighths > one, eighths, largest).amin(1, keepdim=True)
        yield one
        if not torch.compiler.is_compiling() and bool((one == largest).all()):
            return


def _scores(query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    """`[requests, rows, heads, size]` by `[requests, kv heads, keys, size]` to `[requests, heads, rows, keys]`."""
    num_kv_heads, rows = key.shape[1], query.shape[1]
    packed = query.transpose(1, 2).unflatten(1, (num_kv_heads, -1)).flatten(2, 3)
    scores: torch.Tensor = (packed @ key.transpose(2, 3)).unflatten(2, (-1, rows)).flatten(1, 2)
    return scores


def log_scaled(query: torch.Tensor, query_pos: torch.Tensor, params: AttentionParams) -> torch.Tensor:
    """Queries `[..., num_heads, head_size]` at `query_pos` `[...]`, multiplied as `params.log_scale_len` says."""
    if not params.log_scale_len:
        return query
    factor = (query_pos + 1).to(query.dtype).log() / math.log(params.log_scale_len)
    return query * factor.clamp(min=1.0)[..., None, None]


def _compute_dtype(tensor: torch.Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)
