"""FlashAttention 2's `flash_attn_varlen_func` in PyTorch: what it asks for and what it answers, but for its speed.

Read from `csrc/flash_attn`. Where a query sees no key its log-sum-exp is infinite; here that is an error.
"""

import itertools

import torch


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
