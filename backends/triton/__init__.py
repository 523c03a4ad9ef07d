"""Self-Extend's kernels in Triton, for GPUs; under `TRITON_INTERPRET=1` they run on CPU tensors, slowly.

Block interior: `[block_size, 2 * head_size]`, a token's key and then its value, as vLLM's own GPU kernels have it.
float32, bfloat16, float16 and fp8 (e4m3) caches; products in the queries' dtype, sums in float32. Nothing here looks at
device data or waits for it.
"""

import math
from typing import Any

import torch
import triton

from ..interface import AttentionBatch, AttentionParams
from .attention import attention_kernel, merge_kernel
from .store import store_kernel

IS_INTERPRETED: bool = triton.knobs.runtime.interpret
"""Whether `TRITON_INTERPRET` was set when the kernels were defined."""

PREFILL_ROWS, DECODE_ROWS = 64, 16
"""Tokens times query heads of a KV head that a program takes; what tensor cores multiply at least is 16."""

DECODE_SPLITS = 8
BLOCK_N = 32
"""Keys a tile."""


def supports_head_size(head_size: int) -> bool:
    """See `interface.Kernels.supports_head_size`."""
    return head_size <= 256


def store_kv(
    key: torch.Tensor,
    value: torch.Tensor,
    kv_cache: torch.Tensor,
    batch: AttentionBatch,
    params: AttentionParams,
) -> None:
    """See `interface.Kernels.store_kv`."""
    num_tokens, num_kv_heads, head_size = key.shape
    cos_sin, grouping = _rotation(params)
    kv_cache, is_fp8 = _as_stored(kv_cache)
    store_kernel[(num_tokens, num_kv_heads)](
        key,
        value,
        kv_cache,
        batch.positions,
        batch.slot_mapping,
        cos_sin,
        *key.stride()[:2],
        *value.stride()[:2],
        *kv_cache.stride()[:3],
        params.k_scale,
        params.v_scale,
        BLOCK_SIZE=kv_cache.shape[2],
        HEAD_SIZE=head_size,
        HEAD_SIZE_PADDED=triton.next_power_of_2(head_size),
        **grouping,
        IS_FP8=is_fp8,
    )


def attention(
    query: torch.Tensor,
    kv_cache: torch.Tensor,
    batch: AttentionBatch,
    params: AttentionParams,
    out: torch.Tensor,
) -> None:
    """See `interface.Kernels.attention`."""
    num_tokens, num_heads, head_size = query.shape
    num_kv_heads, num_reqs = kv_cache.shape[1], batch.seq_lens.shape[0]
    heads = num_heads // num_kv_heads
    cos_sin, grouping = _rotation(params)
    kv_cache, is_fp8 = _as_stored(kv_cache)
    # Only shapes are looked at, so that a captured graph can be replayed with other lengths. As many tokens as requests
    # are a decode step, and as many as two a request speculation's: few rows, and so the context is split.
    is_decode = num_tokens <= 2 * num_reqs
    num_splits = DECODE_SPLITS if is_decode else 1
    block_m = max(DECODE_ROWS if is_decode else PREFILL_ROWS, triton.next_power_of_2(heads))
    tokens = block_m // heads
    partial_output = partial_largest = partial_total = None
    if num_splits > 1:
        partial_output, partial_largest, partial_total = (
            torch.empty((num_splits, num_tokens, num_heads, *size), dtype=torch.float32, device=query.device)
            for size in ((head_size,), (), ())
        )
    shared = {
        "HAS_SINKS": params.sinks is not None,
        "HEAD_SIZE": head_size,
        "HEAD_SIZE_PADDED": triton.next_power_of_2(head_size),
        "NUM_SPLITS": num_splits,
    }
    attention_kernel[(num_tokens // tokens + num_reqs, num_kv_heads, num_splits)](
        query,
        kv_cache,
        out,
        partial_output,
        partial_largest,
        partial_total,
        batch.query_start_loc,
        batch.seq_lens,
        batch.block_table,
        cos_sin,
        params.sinks,
        num_reqs,
        num_tokens,
        *query.stride()[:2],
        *out.stride()[:2],
        *kv_cache.stride()[:3],
        batch.block_table.stride(0),
        params.scale * params.k_scale,
        1.0 / math.log(params.log_scale_len) if params.log_scale_len else 0.0,
        params.soft_cap,
        params.v_scale,
        params.exact_len,
        NEIGHBOR_WINDOW=params.neighbor_window,
        SLIDING_WINDOW=params.sliding_window,
        **grouping,
        HAS_SOFT_CAP=params.soft_cap != 0.0,
        HAS_LOG_SCALE=params.log_scale_len != 0,
        HEADS=heads,
        BLOCK_SIZE=kv_cache.shape[2],
        TOKENS=tokens,
        BLOCK_M=block_m,
        BLOCK_N=BLOCK_N,
        IS_FP8=is_fp8,
        IS_INTERPRETED=IS_INTERPRETED,
        **shared,
    )
    if num_splits > 1:
        merge_kernel[(num_tokens, num_heads)](
            partial_output,
            partial_largest,
            partial_total,
            out,
            params.sinks,
            num_tokens,
            *out.stride()[:2],
            params.v_scale,
            **shared,
        )


def _rotation(params: AttentionParams) -> tuple[torch.Tensor | None, dict[str, Any]]:
    """The table of cosines and sines, None where no positions are grouped, and what the kernels are compiled for."""
    if params.group_size == 1:
        return None, {"GROUP_SIZE": 1, "ROTARY_DIM": 0, "INTERLEAVED": False}
    rotation = params.required_rotation()
    size = rotation.cos_sin.shape[1]
    return rotation.cos_sin, {
        "GROUP_SIZE": params.group_size,
        "ROTARY_DIM": size,
        "INTERLEAVED": rotation.interleaved,
    }


def _as_stored(kv_cache: torch.Tensor) -> tuple[torch.Tensor, bool]:
    """The cache, an fp8 one as bytes, and whether it is one."""
    is_fp8 = kv_cache.element_size() == 1
    return kv_cache.view(torch.uint8) if is_fp8 else kv_cache, is_fp8
