"""What a call launches: which kernels, on what grid, with what. It follows from shapes and from the layer alone."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import triton

from ..interface import AttentionBatch, AttentionParams
from .attention import attention_kernel, merge_kernel
from .store import store_kernel
from .tiles import Device, decode_tiles, prefill_tiles

MAX_DECODE_LEN = 16
"""A step of at most so many new tokens per request (speculation verifies a few) is a decode alone."""

PROGRAMS_PER_MULTIPROCESSOR = 4
"""How many programs a decode wants: where requests and KV heads make fewer, programs share a request's context."""

MAX_SPLITS = 64
"""Among how many at most."""

MERGED_SPLITS = 16
"""Shares that are joined at a time."""

STORED_NUMBERS = 2048
"""Numbers of a token's keys that a program stores."""


@dataclass(frozen=True)
class Launch:
    """A kernel, and what it is called with."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]

    def __call__(self) -> None:
        self.kernel[self.grid](**self.arguments)


@dataclass(frozen=True)
class Far:
    """What was found elsewhere in the grouped keys of a prefill; its other queries see none.

    Attributes:
        output: `[num_rows, num_heads, head_size]`: a row for each of the last queries of each request.
        lse: `[num_heads, num_rows]`, float32: the natural logarithm of the sum of the scores' exponentials.
        start_loc: `[num_reqs + 1]`, int32: request `r` has the rows `start_loc[r]` to `start_loc[r + 1]`.

    """

    output: torch.Tensor
    lse: torch.Tensor
    start_loc: torch.Tensor

    def arguments(self) -> dict[str, Any]:
        """What the kernel calls them; the last dimensions are contiguous."""
        return {
            "far_output": self.output,
            "far_lse": self.lse,
            "far_start_loc": self.start_loc,
            "far_token_stride": self.output.stride(0),
            "far_head_stride": self.output.stride(1),
            "far_lse_stride": self.lse.stride(0),
            "HAS_FAR": True,
        }


NO_FAR = {
    **dict.fromkeys(
        ("far_output", "far_lse", "far_start_loc", "far_token_stride", "far_head_stride", "far_lse_stride")
    ),
    "HAS_FAR": False,
}


def workspace_size(num_heads: int, num_kv_heads: int, head_size: int, device: Device) -> int:
    """How many float32 numbers of `AttentionBatch.workspace` the launches of a layer need at most."""
    # A context is shared where there are fewer blocks of queries and KV heads than programs wanted: fewer than twice as
    # many programs come of it.
    num_programs = 2 * PROGRAMS_PER_MULTIPROCESSOR * device.num_multiprocessors
    return num_programs * decode_tiles(num_heads // num_kv_heads, head_size, 2, False, device).rows * (head_size + 2)


def store_launch(
    key: torch.Tensor,
    value: torch.Tensor,
    kv_cache: torch.Tensor,
    batch: AttentionBatch,
    params: AttentionParams,
) -> Launch:
    """The launch that `store_kv` makes."""
    num_tokens, num_kv_heads, head_size = key.shape
    head_size_padded = triton.next_power_of_2(head_size)
    heads = min(triton.next_power_of_2(num_kv_heads), max(1, STORED_NUMBERS // head_size_padded))
    kv_cache, is_fp8 = _as_stored(kv_cache)
    arguments = {
        "key": key,
        "value": value,
        "kv_cache": kv_cache,
        "query_start_loc": batch.query_start_loc,
        "seq_lens": batch.seq_lens,
        "slot_mapping": batch.slot_mapping,
        "num_reqs": batch.seq_lens.shape[0],
        **stride_arguments("key", key),
        **stride_arguments("value", value),
        **_cache_strides(kv_cache),
        "k_scale": params.k_scale,
        "v_scale": params.v_scale,
        "ONE_TOKEN": batch.max_query_len == 1,
        "NUM_KV_HEADS": num_kv_heads,
        "HEADS": heads,
        "BLOCK_SIZE": kv_cache.shape[2],
        "HEAD_SIZE": head_size,
        "HEAD_SIZE_PADDED": head_size_padded,
        **rotation_arguments(params, head_size),
        "IS_FP8": is_fp8,
    }
    return Launch(store_kernel, (num_tokens, triton.cdiv(num_kv_heads, heads)), arguments)


def attention_launches(
    query: torch.Tensor,
    kv_cache: torch.Tensor,
    batch: AttentionBatch,
    params: AttentionParams,
    out: torch.Tensor,
    device: Device,
    attend_far: Callable[[int], Far] | None = None,
) -> Iterator[Launch]:
    """The launches that `attention` makes, in their order.

    Args:
        query: As of `interface.Kernels.attention`, like what follows.
        kv_cache: Read.
        batch: The step's requests.
        params: The layer.
        out: Written.
        device: What the launches will run on.
        attend_far: Attends to a prefill's grouped keys; the prefill's launch then does the neighbors. It is given how
            many new tokens a request may have and still be a decode, which sees to all its keys by itself.

    Raises:
        ValueError: `batch.workspace` is too small.

    """
    if batch.max_query_len == 0:  # padding only: this rank has no requests, others have
        return
    num_tokens, num_heads, head_size = query.shape
    num_kv_heads, num_reqs = kv_cache.shape[1], batch.seq_lens.shape[0]
    heads = num_heads // num_kv_heads
    kv_cache, is_fp8 = _as_stored(kv_cache)
    merged = {
        "out": out,
        "query_start_loc": batch.query_start_loc,
        "sinks": params.sinks,
        **stride_arguments("out", out),
        "v_scale": params.v_scale,
        "HAS_SINKS": params.sinks is not None,
        "HEADS": heads,
        "HEAD_SIZE": head_size,
        "HEAD_SIZE_PADDED": triton.next_power_of_2(head_size),
    }
    common = {
        **merged,
        "query": query,
        "kv_cache": kv_cache,
        "partial_output": None,
        "partial_largest": None,
        "partial_total": None,
        "seq_lens": batch.seq_lens,
        "block_table": batch.block_table,
        **NO_FAR,
        "num_reqs": num_reqs,
        **stride_arguments("query", query),
        **_cache_strides(kv_cache),
        "table_stride": batch.block_table.stride(0),
        "scale": params.scale * params.k_scale,
        "log_scale": log_scale(params),
        "soft_cap": params.soft_cap,
        "EXACT_LEN": params.exact_len if params.group_size > 1 else 0,
        "NEIGHBOR_WINDOW": params.neighbor_window,
        "SLIDING_WINDOW": params.sliding_window,
        **rotation_arguments(params, head_size),
        "HAS_SOFT_CAP": params.soft_cap != 0.0,
        "HAS_LOG_SCALE": params.log_scale_len != 0,
        "BLOCK_SIZE": kv_cache.shape[2],
        "IS_FP8": is_fp8,
        "HAS_FP8": device.has_fp8,
        "IS_INTERPRETED": device.target is None,
    }

    tiles = decode_tiles(heads, head_size, query.element_size(), is_fp8, device)
    tokens = tiles.rows // heads
    is_decode = batch.max_query_len <= MAX_DECODE_LEN
    decode_len = batch.max_query_len if is_decode else tokens
    num_blocks = num_reqs * triton.cdiv(decode_len, tokens)
    num_splits = triton.cdiv(PROGRAMS_PER_MULTIPROCESSOR * device.num_multiprocessors, num_blocks * num_kv_heads)
    num_splits = min(num_splits, MAX_SPLITS)
    # A request alone is either a decode or a prefill.
    if is_decode or num_reqs > 1:
        shape = {"decode_len": decode_len, "TOKENS": tokens, "BLOCK_M": tiles.rows}
        partial: dict[str, Any] = {}
        if num_splits > 1:
            partial = _partial(batch.workspace, num_blocks * num_kv_heads * num_splits * tiles.rows, head_size, query)
        yield Launch(
            attention_kernel,
            (num_blocks, num_kv_heads, num_splits),
            {
                **common,
                **shape,
                **partial,
                "IS_DECODE": True,
                "IS_SPLIT": num_splits > 1,
                **tiles.arguments(),
            },
        )
        if num_splits > 1:
            arguments = {**merged, **shape, **partial, "num_splits": num_splits, "SPLITS": MERGED_SPLITS}
            yield Launch(merge_kernel, (num_reqs * decode_len, num_heads), arguments)
    if not is_decode:
        tiles = prefill_tiles(heads, head_size, query.element_size(), is_fp8, device)
        tokens = tiles.rows // heads
        if num_reqs == 1:
            decode_len = 0
        yield Launch(
            attention_kernel,
            (num_tokens // tokens + num_reqs, num_kv_heads),
            {
                **common,
                **(attend_far(decode_len).arguments() if attend_far else {}),
                "decode_len": decode_len,
                "TOKENS": tokens,
                "IS_DECODE": False,
                "IS_SPLIT": False,
                **tiles.arguments(),
            },
        )


def _partial(workspace: torch.Tensor | None, num_rows: int, head_size: int, query: torch.Tensor) -> dict[str, Any]:
    """Where `num_rows` rows of a split decode put what they found."""
    size = num_rows * (head_size + 2)
    if workspace is None:
        workspace = torch.empty(size, dtype=torch.float32, device=query.device)
    if workspace.numel() < size:
        raise ValueError(f"workspace holds {workspace.numel()} numbers; this step needs {size}.")
    output, largest, total = workspace[:size].split([num_rows * head_size, num_rows, num_rows])
    return {"partial_output": output, "partial_largest": largest, "partial_total": total}


def rotation_arguments(params: AttentionParams, head_size: int) -> dict[str, Any]:
    """The table of cosines and sines, None where no positions are grouped, and how dimensions are taken apart."""
    rotation = params.required_rotation() if params.group_size > 1 else None
    rotary_dim = rotation.cos_sin.shape[1] if rotation else 0
    return {
        "cos_sin": rotation and rotation.cos_sin,
        "GROUP_SIZE": params.group_size,
        "ROTARY_DIM": rotary_dim,
        "INTERLEAVED": bool(rotation and rotation.interleaved),
        # What tensor cores multiply has 16 dimensions at least.
        "HALF_PADDED": max(16, triton.next_power_of_2(rotary_dim // 2)),
        "REST_PADDED": max(16, triton.next_power_of_2(head_size - rotary_dim)),
    }


def log_scale(params: AttentionParams) -> float:
    """What the logarithms of positions are multiplied by."""
    return 1.0 / math.log(params.log_scale_len) if params.log_scale_len else 0.0


def stride_arguments(name: str, tensor: torch.Tensor) -> dict[str, int]:
    """The strides of queries, keys, values or outputs."""
    return {f"{name}_{kind}_stride": tensor.stride(index) for index, kind in enumerate(("token", "head", "dim"))}


def _cache_strides(kv_cache: torch.Tensor) -> dict[str, int]:
    return {f"cache_{kind}_stride": kv_cache.stride(index) for index, kind in enumerate(("block", "head", "token"))}


def _as_stored(kv_cache: torch.Tensor) -> tuple[torch.Tensor, bool]:
    """The cache, an fp8 one as bytes, and whether it is one."""
    is_fp8 = kv_cache.element_size() == 1
    return kv_cache.view(torch.uint8) if is_fp8 else kv_cache, is_fp8
