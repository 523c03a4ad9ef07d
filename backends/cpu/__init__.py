"""Self-Extend's CPU kernels in C++: float32, bfloat16, float16 and fp8 (e4m3) caches, computed in float32.

The vector code is chosen at run time (AVX-512, AVX2, or a portable one that is NEON on Arm). `kernel.h` describes the
interior of a cache block. Importing this raises `ImportError` where the library was not built.
"""

import importlib

import torch

from ..interface import AttentionBatch, AttentionParams

importlib.import_module("._kernels", __package__)  # registers the operators
_ops = torch.ops.vllm_selfextend_cpu

INSTRUCTION_SETS: list[str] = _ops.instruction_sets()
"""What this machine can run, best first."""

instruction_set = INSTRUCTION_SETS[0]
"""What runs."""


def supports_head_size(head_size: int) -> bool:
    """See `interface.Kernels.supports_head_size`."""
    return head_size % 16 == 0 and head_size <= 512


def workspace_size(num_heads: int, num_kv_heads: int, head_size: int, device: torch.device) -> int:
    """See `interface.Kernels.workspace_size`."""
    return 0


def store_kv(
    key: torch.Tensor,
    value: torch.Tensor,
    kv_cache: torch.Tensor,
    batch: AttentionBatch,
    params: AttentionParams,
) -> None:
    """See `interface.Kernels.store_kv`."""
    rotation = params.rotation
    _ops.store_kv(
        key,
        value,
        kv_cache,
        batch.positions,
        batch.slot_mapping,
        params.group_size,
        rotation and rotation.cos_sin,
        bool(rotation and rotation.interleaved),
        params.k_scale,
        params.v_scale,
        instruction_set,
    )


def attention(
    query: torch.Tensor,
    kv_cache: torch.Tensor,
    batch: AttentionBatch,
    params: AttentionParams,
    out: torch.Tensor,
) -> None:
    """See `interface.Kernels.attention`."""
    rotation = params.rotation
    _ops.attention(
        query,
        kv_cache,
        batch.query_start_loc,
        batch.seq_lens,
        batch.block_table,
        out,
        params.scale,
        params.group_size,
        params.neighbor_window,
        params.exact_len,
        params.log_scale_len,
        params.soft_cap,
        params.sliding_window,
        rotation and rotation.cos_sin,
        bool(rotation and rotation.interleaved),
        params.sinks,
        params.k_scale,
        params.v_scale,
        instruction_set,
    )
