"""Other libraries' attention, over the very cache that ours reads: ordinary attention, each called as vLLM calls it.

Our Triton kernels' cache has vLLM's layout, so all of them read the same bytes and must give the same answer as ours
without group sizes. What is not installed or does not take a case raises; the benchmark says so and goes on.
"""

from collections.abc import Callable
from typing import Protocol

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right

from tests.gpu.flash import find_function
from vllm_selfextend.backends.interface import AttentionBatch

FLASHINFER_WORKSPACE_BYTES = 128 << 20

VLLM_TRITON_SEGMENTS = 16
VLLM_TRITON_SMALLEST_GRID = 128
"""`NUM_PAR_SOFTMAX_SEGMENTS` and `MIN_LAUNCH_GRID_SIZE_2D` of `vllm/v1/attention/backends/triton_attn.py`."""

Call = Callable[[], torch.Tensor]
"""A call that is ready to be timed; its answer is `[num_tokens, num_heads, head_size]`."""


class Other(Protocol):
    """What prepares a call; all requests of `batch` have `context` tokens in the cache."""

    def __call__(self, query: torch.Tensor, kv_cache: torch.Tensor, batch: AttentionBatch, context: int, /) -> Call: ...


def vllm_flash_attention(query: torch.Tensor, kv_cache: torch.Tensor, batch: AttentionBatch, context: int) -> Call:
    """As in `vllm/v1/attention/backends/flash_attn.py`, without its scheduler metadata."""
    head_size, out = query.shape[2], torch.empty_like(query)
    key_cache, value_cache = kv_cache.transpose(1, 2).split(head_size, dim=-1)
    found = find_function(head_size)
    if found is None:
        raise ImportError("it is not installed.")
    flash_attn_varlen_func, version = found

    def call() -> torch.Tensor:
        flash_attn_varlen_func(
            q=query,
            k=key_cache,
            v=value_cache,
            out=out,
            cu_seqlens_q=batch.query_start_loc,
            max_seqlen_q=batch.max_query_len,
            seqused_k=batch.seq_lens,
            max_seqlen_k=context,
            softmax_scale=head_size**-0.5,
            causal=True,
            block_table=batch.block_table,
            fa_version=version,
        )
        return out

    return call


def vllm_triton(query: torch.Tensor, kv_cache: torch.Tensor, batch: AttentionBatch, context: int) -> Call:
    """As in `vllm/v1/attention/backends/triton_attn.py`."""
    from vllm.v1.attention.ops.triton_unified_attention import unified_attention

    (num_tokens, num_heads, head_size), out = query.shape, torch.empty_like(query)
    key_cache, value_cache = kv_cache.transpose(1, 2).split(head_size, dim=-1)
    num_kv_heads = key_cache.shape[2]
    scales = torch.ones(1, device=query.device).expand(len(batch.seq_lens), num_kv_heads)
    padded = 1 << (head_size - 1).bit_length()
    segments = num_tokens, num_heads, VLLM_TRITON_SEGMENTS
    outputs, largest, totals = (
        torch.empty(shape, dtype=torch.float32, device=query.device)
        for shape in ((*segments, padded), segments, segments)
    )

    def call() -> torch.Tensor:
        unified_attention(
            q=query,
            k=key_cache,
            v=value_cache,
            out=out,
            cu_seqlens_q=batch.query_start_loc,
            max_seqlen_q=batch.max_query_len,
            seqused_k=batch.seq_lens,
            max_seqlen_k=context,
            softmax_scale=head_size**-0.5,
            causal=True,
            window_size=(-1, -1),
            block_table=batch.block_table,
            softcap=0.0,
            q_descale=None,
            k_descale=scales,
            v_descale=scales,
            seq_threshold_3D=VLLM_TRITON_SMALLEST_GRID // num_kv_heads,
            num_par_softmax_segments=VLLM_TRITON_SEGMENTS,
            softmax_segm_output=outputs,
            softmax_segm_max=largest,
            softmax_segm_expsum=totals,
        )
        return out

    return call


def flashinfer(query: torch.Tensor, kv_cache: torch.Tensor, batch: AttentionBatch, context: int) -> Call:
    """As in `vllm/v1/attention/backends/flashinfer.py`; decodes only."""
    from flashinfer import BatchDecodeWithPagedKVCacheWrapper  # type: ignore[import-not-found]

    num_reqs, num_heads, head_size = query.shape
    _, num_kv_heads, block_size, _ = kv_cache.shape
    device, out = query.device, torch.empty_like(query)
    num_blocks = -(-context // block_size)
    indptr = torch.arange(num_reqs + 1, dtype=torch.int32, device=device) * num_blocks
    indices = batch.block_table[:, :num_blocks].flatten()
    last_page_len = torch.full_like(batch.seq_lens, (context - 1) % block_size + 1)
    wrapper = BatchDecodeWithPagedKVCacheWrapper(
        torch.zeros(FLASHINFER_WORKSPACE_BYTES, dtype=torch.uint8, device=device),
        "HND",
        use_cuda_graph=True,
        use_tensor_cores=True,
        paged_kv_indptr_buffer=torch.empty_like(indptr),
        paged_kv_indices_buffer=torch.empty_like(indices),
        paged_kv_last_page_len_buffer=torch.empty_like(last_page_len),
    )
    wrapper.plan(
        indptr,
        indices,
        last_page_len,
        num_heads,
        num_kv_heads,
        head_size,
        block_size,
        sm_scale=head_size**-0.5,
        q_data_type=query.dtype,
        kv_data_type=kv_cache.dtype,
    )
    caches = kv_cache.split(head_size, dim=-1)

    def call() -> torch.Tensor:
        wrapper.run(query, caches, out=out)
        return out

    return call


def torch_flash(query: torch.Tensor, kv_cache: torch.Tensor, batch: AttentionBatch, context: int) -> Call:
    """`scaled_dot_product_attention`'s FlashAttention, on contiguous keys and values; one request only."""
    return _torch(SDPBackend.FLASH_ATTENTION, query, kv_cache, batch, context)


def torch_cudnn(query: torch.Tensor, kv_cache: torch.Tensor, batch: AttentionBatch, context: int) -> Call:
    """Its cuDNN attention; torch calls that for queries after other tokens only with the mask as a tensor.

    Raises:
        ValueError: There are other tokens before.

    """
    if len(query) != context:
        raise ValueError("causal without a mask tensor only where no tokens come before the queries.")
    return _torch(SDPBackend.CUDNN_ATTENTION, query, kv_cache, batch, context)


def _torch(kind: SDPBackend, query: torch.Tensor, kv_cache: torch.Tensor, batch: AttentionBatch, context: int) -> Call:
    num_tokens, num_heads, head_size = query.shape
    # [blocks, kv heads, block_size, 2 * head_size] -> [1, kv heads, context, 2 * head_size]
    kv = kv_cache[batch.block_table[0].long()].transpose(0, 1).flatten(1, 2)[None, :, :context]
    key, value = (x.contiguous() for x in kv.split(head_size, dim=-1))
    mask = causal_lower_right(num_tokens, context)
    grouped = num_heads != kv_cache.shape[1]

    def call() -> torch.Tensor:
        with sdpa_kernel(kind):
            answer = torch.nn.functional.scaled_dot_product_attention(
                query.transpose(0, 1)[None], key, value, attn_mask=mask, enable_gqa=grouped
            )
        return answer[0].transpose(0, 1)

    return call


DECODE: dict[str, Other] = {
    "vLLM Flash": vllm_flash_attention,
    "vLLM Triton": vllm_triton,
    "FlashInfer": flashinfer,
}
PREFILL: dict[str, Other] = {"vLLM Flash": vllm_flash_attention, "torch Flash": torch_flash, "torch cuDNN": torch_cudnn}
