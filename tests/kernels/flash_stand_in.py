"""FlashAttention's attention over a paged cache in PyTorch: what it asks for and what it answers, but for its speed.

Read from `csrc/flash_attn` (FlashAttention 2; vLLM's copy asks for blocks of a multiple of 16 tokens, the original of
256), `hopper` (3) and `flash_attn/cute` (4). They differ where a query sees no key: the log-sum-exp is infinite, of
either sign, or lies elsewhere. Here that is an error.
"""

import itertools
import math

import torch

from vllm_selfextend.backends.flash import FlashAttention, FlashKernels

HALF_DTYPES = (torch.float16, torch.bfloat16)
DTYPES = (*HALF_DTYPES, torch.float32)
"""What the real ones take, and what tests want besides."""


def attend(
    *,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    max_seqlen_q: int,
    seqused_k: torch.Tensor,
    max_seqlen_k: int,
    block_table: torch.Tensor,
    softmax_scale: float,
    softcap: float,
    nan_lse: float = math.inf,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `backends.flash.functions.Attend`; `nan_lse` is the log-sum-exp of a row whose scores are not numbers."""
    num_rows, num_heads, head_size = q.shape
    num_reqs, (_, block_size, num_kv_heads, _) = len(seqused_k), k.shape
    assert q.dtype == k.dtype == v.dtype
    assert q.dtype in DTYPES
    assert q.stride(-1) == k.stride(-1) == v.stride(-1) == block_table.stride(-1) == 1
    assert head_size % 8 == 0
    assert head_size <= 256
    assert k.shape == v.shape == (len(k), block_size, num_kv_heads, head_size)
    assert block_size % 16 == 0
    assert num_heads % num_kv_heads == 0
    assert cu_seqlens_q.dtype == seqused_k.dtype == block_table.dtype == torch.int32
    assert cu_seqlens_q.is_contiguous()
    assert seqused_k.is_contiguous()
    assert cu_seqlens_q.shape == (num_reqs + 1,)
    assert len(block_table) == num_reqs

    # What belongs to no request is left as it was allocated.
    output = torch.full_like(q, float("nan"))
    lse = torch.full([num_heads, num_rows], float("nan"))
    starts = cu_seqlens_q.tolist()
    assert starts[0] == 0
    assert starts[-1] <= num_rows
    for (begin, end), num_keys, blocks in zip(itertools.pairwise(starts), seqused_k.tolist(), block_table, strict=True):
        assert 0 <= end - begin <= max_seqlen_q
        assert 0 <= num_keys <= max_seqlen_k
        if begin == end:
            continue
        assert end - begin <= num_keys, "a query without keys"
        blocks = blocks[: -(-num_keys // block_size)].long()
        key, value = (
            x[blocks].flatten(0, 1)[:num_keys].float().repeat_interleave(num_heads // num_kv_heads, 1).transpose(0, 1)
            for x in (k, v)
        )
        scores = q[begin:end].float().transpose(0, 1) @ key.mT * softmax_scale
        if softcap:
            scores = softcap * torch.tanh(scores / softcap)
        hidden = torch.ones(end - begin, num_keys, dtype=torch.bool).triu(num_keys - (end - begin) + 1)
        scores = scores.masked_fill(hidden, float("-inf"))
        # Tiles past the mask are not read.
        value = value.masked_fill(hidden.all(0)[:, None], 0.0)
        output[begin:end] = (scores.softmax(-1) @ value).transpose(0, 1).to(q.dtype)
        lse[:, begin:end] = scores.logsumexp(-1).nan_to_num(nan_lse, math.inf, -math.inf)
    return output, lse


FLASH = FlashKernels(FlashAttention("the stand-in", attend, majors=(), dtypes=DTYPES))
"""The flash kernels with it."""
