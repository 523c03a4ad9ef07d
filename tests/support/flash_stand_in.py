"""FlashAttention in PyTorch, as `interface.VarlenAttention` calls it: what it asks for and answers, but for its speed.

Read from `csrc/flash_attn` (FlashAttention 2; vLLM's copy asks for blocks of a multiple of 16 tokens), `hopper` (3) and
`flash_attn/cute` (4). They differ where a query sees no key: here that is an error.
"""

import itertools

import torch

from vllm_selfextend.backends.interface import VarlenLengths


class FlashStandIn:
    """`Host.attention` of layers with such a scale and soft cap.

    `calls` are what it was asked for: whether keys are in blocks, whether it is causal, and the window.
    """

    version = 0

    def __init__(self, scale: float, soft_cap: float = 0.0) -> None:
        self.scale, self.soft_cap = scale, soft_cap
        self.calls: list[tuple[bool, bool, int]] = []

    def __call__(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        out: torch.Tensor,
        lse: torch.Tensor,
        lengths: VarlenLengths,
        block_table: torch.Tensor | None,
        *,
        is_causal: bool,
        window: int,
    ) -> torch.Tensor:
        """See `interface.VarlenAttention`."""
        self.calls.append((block_table is not None, is_causal, window))
        num_rows, num_heads, head_size = query.shape
        num_kv_heads, is_paged = key.shape[-2], block_table is not None
        assert query.dtype == key.dtype == value.dtype == out.dtype
        assert query.stride(-1) == key.stride(-1) == value.stride(-1) == out.stride(-1) == 1
        assert out.shape == query.shape
        assert head_size % 8 == 0
        assert num_heads % num_kv_heads == 0
        assert key.shape == value.shape
        assert key.dim() == (4 if is_paged else 3)
        for numbers in (lengths.query_start_loc, lengths.seq_lens, lengths.key_start_loc):
            assert numbers.dtype == torch.int32
            assert numbers.is_contiguous()
        starts, seq_lens = lengths.query_start_loc.tolist(), lengths.seq_lens.tolist()
        assert starts[0] == 0
        assert starts[-1] == num_rows
        assert len(seq_lens) + 1 == len(starts)
        # Version 2 mixes up the log-sum-exps of several sequences of one query.
        assert len(seq_lens) == 1 or lengths.max_query_len > 1
        if block_table is None:
            assert lengths.key_start_loc.tolist() == [0, len(key)]
            assert seq_lens == [len(key)]
        else:
            assert block_table.dtype == torch.int32
            assert block_table.stride(-1) == 1
            assert len(block_table) == len(seq_lens)
            assert key.shape[1] % 16 == 0
        # Not where the caller has room for it.
        found = torch.full([num_heads, num_rows], float("nan"))
        for n, ((begin, end), num_keys) in enumerate(zip(itertools.pairwise(starts), seq_lens, strict=True)):
            assert 0 < end - begin <= lengths.max_query_len
            assert 0 < num_keys <= lengths.max_seq_len
            keys, values = key, value
            if block_table is not None:
                blocks = block_table[n, : -(-num_keys // key.shape[1])].long()
                keys, values = (x[blocks].flatten(0, 1)[:num_keys] for x in (key, value))
            answer, found[:, begin:end] = self._attend(query[begin:end], keys, values, is_causal, window or num_keys)
            out[begin:end] = answer
        return found

    def _attend(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, is_causal: bool, window: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        num_rows, num_keys = len(query), len(key)
        query, key, value = (x.float().transpose(0, 1) for x in (query, key, value))
        key, value = (x.repeat_interleave(len(query) // len(x), 0) for x in (key, value))
        scores = query @ key.mT * self.scale
        if self.soft_cap:
            scores = self.soft_cap * torch.tanh(scores / self.soft_cap)
        seen = torch.ones(num_rows, num_keys, dtype=torch.bool)
        if is_causal:
            assert num_rows <= num_keys, "a query without keys"
            seen = seen.tril(num_keys - num_rows).triu(num_keys - num_rows - window + 1)
        scores = scores.masked_fill(~seen, float("-inf"))
        # Tiles past the mask are not read.
        value = value.masked_fill(~seen.any(0)[:, None], 0.0)
        return (scores.softmax(-1) @ value).transpose(0, 1), scores.logsumexp(-1)
