"""FlashAttention in PyTorch, over a paged cache and not: what it asks for and what it answers, but for its speed.

Read from `csrc/flash_attn` (FlashAttention 2; vLLM's copy asks for blocks of a multiple of 16 tokens, the original of
256), `hopper` (3) and `flash_attn/cute` (4). They differ where a query sees no key: the log-sum-exp is infinite, of
either sign, or lies elsewhere. Here that is an error.
"""

import itertools
import math

import torch

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
        blocks = blocks[: -(-num_keys // block_size)].long()
        key, value = (x[blocks].flatten(0, 1)[:num_keys] for x in (k, v))
        output[begin:end], found = _attend_one(q[begin:end], key, value, softmax_scale, softcap, num_keys)
        lse[:, begin:end] = found.nan_to_num(nan_lse, math.inf, -math.inf)
    return output, lse


def varlen_func(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    *,
    softmax_scale: float,
    causal: bool,
    window_size: tuple[int, int],
    softcap: float,
    return_attn_probs: bool,
) -> tuple[torch.Tensor, torch.Tensor, None]:
    """`flash_attn.flash_attn_varlen_func` of FlashAttention 2, as far as transformers' models are sent through it."""
    num_rows, num_heads, head_size = q.shape
    num_kv_heads = k.shape[1]
    assert q.dtype == k.dtype == v.dtype
    assert k.shape == v.shape == (len(k), num_kv_heads, head_size)
    assert head_size <= 256
    assert num_heads % num_kv_heads == 0
    assert causal
    assert return_attn_probs
    for cu_seqlens, total, longest in ((cu_seqlens_q, num_rows, max_seqlen_q), (cu_seqlens_k, len(k), max_seqlen_k)):
        assert cu_seqlens.dtype == torch.int32
        assert cu_seqlens.is_contiguous()
        assert cu_seqlens[0] == 0
        assert cu_seqlens[-1] == total
        assert cu_seqlens.diff().min() >= 0
        assert cu_seqlens.diff().max() == longest
    output = torch.full_like(q, float("nan"))
    lse = torch.full([num_heads, num_rows], float("nan"), dtype=torch.promote_types(q.dtype, torch.float32))
    places = (itertools.pairwise(cu_seqlens.tolist()) for cu_seqlens in (cu_seqlens_q, cu_seqlens_k))
    for (begin, end), (key_begin, key_end) in zip(*places, strict=True):
        if begin < end:
            key, value = k[key_begin:key_end], v[key_begin:key_end]
            window = window_size[0] + 1 if window_size[0] >= 0 else len(key)
            output[begin:end], lse[:, begin:end] = _attend_one(q[begin:end], key, value, softmax_scale, softcap, window)
    return output, lse, None


def _attend_one(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float, softcap: float, window: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """One request: the last queries of `key`'s tokens, each seeing `window` keys at most."""
    num_rows, num_keys = len(query), len(key)
    assert num_rows <= num_keys, "a query without keys"
    dtype = torch.promote_types(query.dtype, torch.float32)
    query, key, value = (x.to(dtype).transpose(0, 1) for x in (query, key, value))
    key, value = (x.repeat_interleave(len(query) // len(x), 0) for x in (key, value))
    scores = query @ key.mT * scale
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    seen = torch.ones(num_rows, num_keys, dtype=torch.bool).tril(num_keys - num_rows)
    seen &= seen.triu(num_keys - num_rows - window + 1)
    scores = scores.masked_fill(~seen, float("-inf"))
    # Tiles past the mask are not read.
    value = value.masked_fill(~seen.any(0)[:, None], 0.0)
    return (scores.softmax(-1) @ value).transpose(0, 1), scores.logsumexp(-1)
