"""What a step's decodes launch: which kernels, on what grid, with what. It follows from shapes and the layer alone."""

import torch

from ..interface import AttentionBatch, AttentionParams
from .decode import decode_kernel, merge_splits_kernel
from .launches import LayerKernel, cache_strides, cdiv, group_arguments, log_scale_arguments, padded, stride_arguments
from .tiles import Device, decode_rows, decode_tiles

PROGRAMS_PER_MULTIPROCESSOR = 4
"""How many programs a decode wants: where requests and KV heads make fewer, programs share a request's context."""

MAX_SPLITS = 64
"""Among how many at most."""

LONGEST_SPLIT = 16384
"""Keys that a program takes at most, however many requests there are, while `workspace_numbers` suffice: else a step of
many short contexts and a long one waits for the long one's program."""

MERGED_SPLITS = 16
"""Splits that are joined at a time."""

PREFILL_PASSES = 3
"""How often a prefill goes over a context in memory: it reads it, writes it turned, and reads that."""


def decode_len(heads: int) -> int:
    """Up to how many new tokens a request's keys are better turned by each block of queries than once for all.

    Counted in bytes: a decode reads keys and values once for each block of queries.
    """
    return PREFILL_PASSES * (decode_rows(heads) // heads)


def workspace_numbers(num_heads: int, num_kv_heads: int, head_size: int, device: Device) -> int:
    """How many float32 numbers of workspace the launches of a layer need at most."""
    rows = decode_rows(num_heads // num_kv_heads)
    return _most_programs(rows, device) * rows * (head_size + 1)


def _most_programs(rows: int, device: Device) -> int:
    """How many programs share contexts at most."""
    # Those that are wanted, and more for LONGEST_SPLIT.
    wanted = PROGRAMS_PER_MULTIPROCESSOR * device.num_multiprocessors
    return wanted * max(2, 128 // rows)


class DecodeKernels:
    """The kernels of a layer's decodes, for tensors that lie in memory in one way."""

    def __init__(
        self,
        query: torch.Tensor,
        kv_cache: torch.Tensor,
        out: torch.Tensor,
        params: AttentionParams,
        device: Device,
    ) -> None:
        _, num_heads, head_size = query.shape
        self.num_kv_heads, self.heads = kv_cache.shape[1], num_heads // kv_cache.shape[1]
        self.sliding_window = params.sliding_window
        is_fp8 = kv_cache.dtype == torch.uint8
        tiles = decode_tiles(self.heads, head_size, query.element_size(), is_fp8, device)
        self.rows, self.tokens = tiles.rows, tiles.rows // self.heads
        self.wanted_programs = PROGRAMS_PER_MULTIPROCESSOR * device.num_multiprocessors
        self.most_programs = _most_programs(tiles.rows, device)
        merged = {
            "sinks": params.sinks,
            "v_scale": params.v_scale,
            **stride_arguments("out", out),
            "SLIDING_WINDOW": params.sliding_window,
            "HEADS": self.heads,
            "HEAD_SIZE": head_size,
            "HEAD_SIZE_PADDED": padded(head_size),
            "LONGEST_SPLIT": LONGEST_SPLIT,
            "TOKENS": self.tokens,
        }
        common = {
            **merged,
            "k_scale": params.k_scale,
            **stride_arguments("query", query),
            **cache_strides(kv_cache),
            "scale": params.scale,
            **log_scale_arguments(params),
            "soft_cap": params.soft_cap,
            "NEIGHBOR_WINDOW": params.neighbor_window,
            **group_arguments(params, head_size),
            "HAS_SOFT_CAP": params.soft_cap != 0.0,
            "BLOCK_SIZE": kv_cache.shape[2],
            "IS_FP8": is_fp8,
            "HAS_FP8": device.has_fp8,
            "IS_INTERPRETED": device.target is None,
            **tiles.arguments(),
        }
        self.whole, self.split = (LayerKernel(decode_kernel, {**common, "IS_SPLIT": split}) for split in (False, True))
        joined = {"BLOCK_M": tiles.rows, "NEAR_N": tiles.near_keys, "SPLITS": MERGED_SPLITS}
        self.merge = LayerKernel(merge_splits_kernel, {**merged, **joined})

        int32 = torch.empty(2, dtype=torch.int32, device=query.device)
        floats = int32.float()
        for kernel, workspace in ((self.whole, None), (self.split, floats)):
            kernel.compile(query, kv_cache, out, workspace, int32, int32, int32, 1, 1, 1)
        self.merge.compile(out, floats, int32, int32, 1, 1, 1)

    def num_splits(self, num_blocks: int, max_seq_len: int, decode_len: int) -> tuple[int, int]:
        """Among how many programs to share contexts, and how many one that is not long wants."""
        if self.sliding_window:
            max_seq_len = min(max_seq_len, self.sliding_window + decode_len)
        num_programs = num_blocks * self.num_kv_heads
        # Not more than wanted: the last ones would run alone.
        wanted = min(max(1, self.wanted_programs // num_programs), MAX_SPLITS)
        # As many as LONGEST_SPLIT asks for, while there is room for what they find.
        long = min(cdiv(max_seq_len, LONGEST_SPLIT), self.most_programs // num_programs, MAX_SPLITS)
        return max(wanted, long), wanted

    def __call__(
        self,
        query: torch.Tensor,
        kv_cache: torch.Tensor,
        batch: AttentionBatch,
        out: torch.Tensor,
        workspace: torch.Tensor,
    ) -> None:
        """Answer the step's decodes; `workspace` is of float32, and large enough."""
        num_reqs = batch.seq_lens.shape[0]
        lengths, table = (batch.query_start_loc, batch.seq_lens), batch.block_table
        decode_len = min(batch.max_query_len, batch.decode_len)
        num_blocks = num_reqs * cdiv(decode_len, self.tokens)
        num_splits, wanted = self.num_splits(num_blocks, batch.max_seq_len, decode_len)
        numbers = (decode_len, wanted, table.stride(0))
        if num_splits == 1:
            whole = (query, kv_cache, out, None, *lengths, table, *numbers)
            self.whole((num_blocks, self.num_kv_heads, 1), whole)
            return
        split = (query, kv_cache, out, workspace, *lengths, table, *numbers)
        self.split((num_blocks, self.num_kv_heads, num_splits), split)
        merged = (out, workspace, *lengths, decode_len, wanted, num_splits)
        self.merge((num_reqs * decode_len, query.shape[1], 1), merged)
