"""The grouped keys of a prefill, by FlashAttention. What is launched follows from shapes alone, as in `triton/`."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import triton

from ..interface import AttentionBatch, AttentionParams
from ..triton.launches import STORED_NUMBERS, Far, Launch, log_scale, rotation_arguments, stride_arguments
from .functions import FlashAttention
from .queries import count_kernel, turn_kernel

COUNTED_REQUESTS = 256
"""Requests whose queries are counted at a time."""


@dataclass(frozen=True)
class FarQueries:
    """The queries that see grouped keys, one request after another.

    Attributes:
        query: `[num_tokens, num_heads, head_size]`, at their grouped positions, in the cache's order of dimensions;
            rows past the last request hold anything.
        start_loc: `[num_reqs + 1]`, int32: request `r` has the rows `start_loc[r]` to `start_loc[r + 1]`.
        keys: `[num_reqs]`, int32: how many keys the last one sees.

    """

    query: torch.Tensor
    start_loc: torch.Tensor
    keys: torch.Tensor

    @staticmethod
    def empty(query: torch.Tensor, num_reqs: int) -> "FarQueries":
        """Room for those of a step."""
        start_loc = torch.empty(num_reqs + 1, dtype=torch.int32, device=query.device)
        return FarQueries(
            torch.empty(query.shape, dtype=query.dtype, device=query.device), start_loc, start_loc.new_empty(num_reqs)
        )

    def launches(
        self, query: torch.Tensor, batch: AttentionBatch, params: AttentionParams, decode_len: int
    ) -> Iterator[Launch]:
        """The launches that fill it; requests with at most `decode_len` new tokens have none of its queries."""
        num_tokens, num_heads, head_size = query.shape
        num_reqs = len(self.keys)
        lengths = {
            "far_start_loc": self.start_loc,
            "query_start_loc": batch.query_start_loc,
            "seq_lens": batch.seq_lens,
            "num_reqs": num_reqs,
            "NEIGHBOR_WINDOW": params.neighbor_window,
        }
        yield Launch(
            count_kernel,
            (1,),
            {
                **lengths,
                "far_keys": self.keys,
                "decode_len": decode_len,
                "FIRST_POSITION": max(params.neighbor_window, params.exact_len),
                "REQUESTS": COUNTED_REQUESTS,
            },
        )
        heads = triton.next_power_of_2(num_heads)
        heads = min(heads, max(1, STORED_NUMBERS // triton.next_power_of_2(head_size)))
        yield Launch(
            turn_kernel,
            (num_tokens, triton.cdiv(num_heads, heads)),
            {
                **lengths,
                "query": query,
                "far_query": self.query,
                **stride_arguments("query", query),
                "log_scale": log_scale(params),
                "NUM_HEADS": num_heads,
                "HEADS": heads,
                "HEAD_SIZE": head_size,
                **rotation_arguments(params, head_size),
                "HAS_LOG_SCALE": params.log_scale_len != 0,
            },
        )


def attend_far(
    flash_attention: FlashAttention,
    query: torch.Tensor,
    kv_cache: torch.Tensor,
    batch: AttentionBatch,
    params: AttentionParams,
    decode_len: int,
) -> Far:
    """What queries see in grouped keys; arguments as of `interface.Kernels.attention` and of `FarQueries.launches`.

    Only the queries that see such keys are handed to FlashAttention: see `functions.Attend`.

    Raises:
        ValueError: FlashAttention does not take blocks of this size.

    """
    block_size, head_size = kv_cache.shape[2], query.shape[2]
    if block_size % flash_attention.block_multiple:
        raise ValueError(
            f"{flash_attention.name} takes cache blocks of a multiple of {flash_attention.block_multiple} tokens, and "
            f"these have {block_size}."
        )
    far = FarQueries.empty(query, len(batch.seq_lens))
    for launch in far.launches(query, batch, params, decode_len):
        launch()
    key_cache, value_cache = kv_cache.transpose(1, 2).split(head_size, dim=3)
    output, lse = flash_attention.attend(
        q=far.query,
        k=key_cache,
        v=value_cache,
        cu_seqlens_q=far.start_loc,
        max_seqlen_q=batch.max_query_len,
        seqused_k=far.keys,
        max_seqlen_k=batch.block_table.shape[1] * block_size,
        block_table=batch.block_table,
        softmax_scale=params.scale,
        softcap=params.soft_cap,
    )
    return Far(output, lse, far.start_loc)
