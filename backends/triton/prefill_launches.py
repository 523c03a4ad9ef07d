"""What a step's prefills launch: the calls of `prefill_spans.py`, through FlashAttention or a kernel of ours."""

import itertools
from typing import NamedTuple

import torch

from ..interface import AttentionBatch, AttentionParams, VarlenAttention, VarlenLengths
from .buffers import Buffers, Room, buffer_shapes
from .launches import (
    LayerKernel,
    cache_strides,
    cdiv,
    group_arguments,
    least_aligned,
    log_scale_arguments,
    padded,
    stride_arguments,
)
from .merge import merge_kernel
from .prefill_spans import Kind, Layer, Part, Span, find_prefills, take_apart
from .tiles import Device
from .turn_kernels import turn_keys_kernel, turn_queries_kernel

TOKENS_A_PROGRAM = 16
"""Of a kernel that turns queries or keys, or joins answers."""

MANY = 1024
"""Queries of a sequence for which FlashAttention 4 compiles other code than for few."""


class SpanCalls(NamedTuple):
    """A span and its parts, each with the lengths of its call on the device."""

    span: Span
    lengths: VarlenLengths
    parts: list[tuple[Part, VarlenLengths]]


def on_device(spans: list[Span], device: torch.device) -> list[SpanCalls]:
    """With all lengths in one tensor, which is on its way to the device when this returns."""
    numbers: list[int] = []
    for span in spans:
        numbers += [0, *itertools.accumulate(one.num_rows for one in span.prefills), 0, *span.seq_lens]
        for part in span.parts:
            numbers += [0, part.num_rows, 0, part.num_keys]
    host = torch.tensor(numbers, dtype=torch.int32, pin_memory=device.type == "cuda")
    there = iter(host.to(device, non_blocking=True).split(_counts(spans)))

    def lengths(max_query_len: int, max_seq_len: int) -> VarlenLengths:
        query_start_loc, key_start_loc = next(there), next(there)
        return VarlenLengths(query_start_loc, key_start_loc[1:], key_start_loc, max_query_len, max_seq_len)

    return [
        SpanCalls(
            span,
            lengths(max(one.num_rows for one in span.prefills), max(span.seq_lens)),
            [(part, lengths(part.num_rows, part.num_keys)) for part in span.parts],
        )
        for span in spans
    ]


def _counts(spans: list[Span]) -> list[int]:
    """How many numbers each call's two rows of lengths have."""
    return [n for span in spans for calls in (len(span.prefills), *[1] * len(span.parts)) for n in [calls + 1] * 2]


class PrefillKernels:
    """What a layer's prefills launch, for tensors that lie in memory in one way."""

    def __init__(
        self,
        query: torch.Tensor,
        kv_cache: torch.Tensor,
        out: torch.Tensor,
        params: AttentionParams,
        device: Device,
        over_cache: VarlenAttention,
        over_buffer: VarlenAttention,
        room: Room,
    ) -> None:
        """Compile them.

        Args:
            query: Like those of the calls; one token at least.
            kv_cache: The layer's.
            out: Like those of the calls.
            params: The layer.
            device: What launches will run on.
            over_cache: What attends to keys in the paged cache.
            over_buffer: What attends to those in `Buffers`, which have the queries' dtype.
            room: How large those are.

        """
        num_heads, head_size = query.shape[1:]
        num_kv_heads = kv_cache.shape[1]
        self.params, self.over_cache, self.over_buffer = params, over_cache, over_buffer
        self.shapes = buffer_shapes(num_heads, num_kv_heads, head_size, query.dtype, room)
        self.layer = Layer(params.group_sizes, params.neighbor_window, params.log_scale_len, *room)
        is_fp8 = kv_cache.dtype == torch.uint8
        grouping = group_arguments(params, head_size)
        turns = {name: grouping[name] for name in ("ROTARY_DIM", "INTERLEAVED", "HALF_PADDED", "REST_PADDED")}
        sizes = {"HEAD_SIZE": head_size, "HEAD_SIZE_PADDED": padded(head_size)}
        queries = {
            "group_sizes": grouping["group_sizes"],
            "cos_sin": grouping["cos_sin"],
            **stride_arguments("query", query),
            **log_scale_arguments(params),
            "NEIGHBOR_WINDOW": params.neighbor_window,
            **turns,
            "HEADS": num_heads,
            **sizes,
            "ROWS": TOKENS_A_PROGRAM,
        }
        keys = {
            "cos_sin": grouping["cos_sin"],
            "k_scale": params.k_scale,
            "v_scale": params.v_scale,
            **cache_strides(kv_cache),
            **turns,
            "NUM_KV_HEADS": num_kv_heads,
            **sizes,
            "BLOCK_SIZE": kv_cache.shape[2],
            "KEYS": TOKENS_A_PROGRAM,
            "IS_FP8": is_fp8,
            "HAS_FP8": device.has_fp8,
        }
        rows = query.new_empty(2, num_heads, head_size)
        merged = {
            "sinks": params.sinks,
            **stride_arguments("out", out),
            **stride_arguments("other", rows),
            **sizes,
            "ROWS": TOKENS_A_PROGRAM,
        }
        # Those that a layer has no use for are not compiled.
        self.scale_queries, self.turn_queries = (LayerKernel(turn_queries_kernel, queries) for _ in range(2))
        self.turn_keys, self.copy_and_turn = (LayerKernel(turn_keys_kernel, keys) for _ in range(2))
        self.merge, self.merge_sinks = (LayerKernel(merge_kernel, merged) for _ in range(2))
        lse = torch.empty(2, dtype=torch.float32, device=query.device)
        query, out = least_aligned(query), least_aligned(out)
        scaled = rows if params.log_scale_len else None
        if params.log_scale_len:
            self.scale_queries.compile(query, scaled, None, 1, 1)
        if params.group_sizes is not None:
            int32, numbers = lse.int(), (1, 1, 1, 16, 1)
            buffer = query.new_empty(2, num_kv_heads, head_size)
            self.turn_queries.compile(query, scaled, rows, 1, 1)
            self.turn_keys.compile(kv_cache, buffer, None, int32, *numbers)
            self.copy_and_turn.compile(kv_cache, buffer, buffer, int32, *numbers)
            self.merge.compile(out, lse, rows, lse, 1, 1, 1)
        if params.sinks is not None:
            self.merge_sinks.compile(out, lse, None, None, 1, 1, 1)

    def warm_up(self, query: torch.Tensor, caches: tuple[torch.Tensor, torch.Tensor], out: torch.Tensor) -> None:
        """Have the attention compile what it is called for: two tokens of a request, their answer thrown away."""
        params, device = self.params, query.device
        query, out = query[:2], torch.empty_like(out[:2])
        starts = torch.tensor([0, 2], dtype=torch.int32).to(device)
        table, lse = torch.zeros(1, 1, dtype=torch.int32).to(device), torch.zeros(query.shape[1], 2).to(device)
        rows = query.new_zeros(query.shape)
        scaled = rows if params.log_scale_len else query
        windows = [(query, params.sliding_window)]
        if params.log_scale_len:
            windows.append((scaled, params.sliding_window))
        if params.group_sizes is not None:
            windows.append((scaled, params.neighbor_window))
        keys = query.new_zeros(2, *caches[0].shape[2:])
        for most in (2, MANY):
            lengths = VarlenLengths(starts, starts[1:], starts, most, 2)
            for queries, window in windows:
                self.over_cache(queries, *caches, out, lse, lengths, table, is_causal=True, window=window)
            for is_causal in (True, False) if params.group_sizes is not None else ():
                self.over_buffer(rows, keys, keys, rows, lse, lengths, None, is_causal=is_causal, window=0)

    def spans(self, batch: AttentionBatch) -> list[SpanCalls]:
        """The step's calls, the same for all layers that are alike."""
        if self.layer not in batch.prepared:
            starts, lens = batch.query_start_loc_cpu, batch.seq_lens_cpu
            starts = batch.query_start_loc if starts is None else starts
            lens = batch.seq_lens if lens is None else lens
            prefills = find_prefills(starts.tolist(), lens.tolist(), batch.decode_len)
            batch.prepared[self.layer] = on_device(take_apart(prefills, self.layer), batch.seq_lens.device)
        spans: list[SpanCalls] = batch.prepared[self.layer]
        return spans

    def __call__(
        self,
        query: torch.Tensor,
        kv_cache: torch.Tensor,
        caches: tuple[torch.Tensor, torch.Tensor],
        batch: AttentionBatch,
        out: torch.Tensor,
        buffers: Buffers,
        calls: SpanCalls,
    ) -> None:
        """Answer a span of `spans`; `caches` are views of `kv_cache` as `interface.Store` has them."""
        span, params, num_heads = calls.span, self.params, query.shape[1]
        first, num_rows = span.first_token, span.num_rows
        if num_rows < query.shape[0]:
            query, out = query[first : first + num_rows], out[first : first + num_rows]
        near = query if span.kind is Kind.PLAIN else self._turn_queries(query, buffers, span)
        lse = buffers.lse[: num_heads * num_rows].view(num_heads, num_rows)
        window = params.neighbor_window if span.kind is Kind.GROUPED else params.sliding_window
        requests = slice(span.prefills[0].request, span.prefills[-1].request + 1)
        table = batch.block_table[requests]
        lse = self.over_cache(near, *caches, out, lse, calls.lengths, table, is_causal=True, window=window)
        grid = cdiv(num_rows, TOKENS_A_PROGRAM), num_heads, 1
        if params.sinks is not None:
            self.merge_sinks(grid, (out, lse, None, None, num_rows, lse.stride(0), 0))
        for part, lengths in calls.parts:
            self._attend_part(kv_cache, batch, out, lse, buffers, part, lengths)

    def _turn_queries(self, query: torch.Tensor, buffers: Buffers, span: Span) -> torch.Tensor:
        """Fill the buffers' queries; the queries that meet neighbors."""
        has_log_scale, is_grouped = self.params.log_scale_len != 0, span.kind is Kind.GROUPED
        kernel = self.turn_queries if is_grouped else self.scale_queries
        for one in span.prefills:
            rows = slice(one.first_token - span.first_token, one.first_token - span.first_token + one.num_rows)
            scaled = buffers.scaled[rows] if has_log_scale else None
            turned = buffers.turned[rows] if is_grouped else None
            grid = cdiv(one.num_rows, TOKENS_A_PROGRAM), query.shape[1], 1
            kernel(grid, (query[rows], scaled, turned, one.first_position, one.num_rows))
        return buffers.scaled[: span.num_rows] if has_log_scale else query

    def _attend_part(
        self,
        kv_cache: torch.Tensor,
        batch: AttentionBatch,
        out: torch.Tensor,
        lse: torch.Tensor,
        buffers: Buffers,
        part: Part,
        lengths: VarlenLengths,
    ) -> None:
        """Answer a part of a span, whose answer so far is in `out` and `lse`, and join it to that."""
        rows, num_heads = slice(part.row, part.row + part.num_rows), out.shape[1]
        if count := max(part.num_turned, part.num_copied):
            kernel, values = (self.copy_and_turn, buffers.values) if part.num_copied else (self.turn_keys, None)
            numbers = part.request, part.first_key, count, part.eighths, batch.block_table.stride(0)
            step = (kv_cache, buffers.keys, values, batch.block_table, *numbers)
            kernel((cdiv(count, TOKENS_A_PROGRAM), 1, 1), step)
        far_out = buffers.far_out[: part.num_rows]
        far_lse = buffers.far_lse[: num_heads * part.num_rows].view(num_heads, part.num_rows)
        far_lse = self.over_buffer(
            buffers.turned[rows],
            buffers.keys[: part.num_keys],
            buffers.values[: part.num_keys],
            far_out,
            far_lse,
            lengths,
            None,
            is_causal=part.is_causal,
            window=0,
        )
        # Of `lse` too only the part's rows, by an address: it need not be aligned.
        merged = (out[rows], lse[:, rows], far_out, far_lse, part.num_rows, lse.stride(0), far_lse.stride(0))
        self.merge((cdiv(part.num_rows, TOKENS_A_PROGRAM), num_heads, 1), merged)
