"""The grouped keys of a prefill, by FlashAttention. What is launched follows from shapes alone, as in `triton/`."""

from typing import NamedTuple

import torch
import triton

from ..interface import AttentionBatch, AttentionParams
from ..triton.launches import (
    STORED_NUMBERS,
    Far,
    Launch,
    LayerKernel,
    layout,
    log_scale,
    once,
    rotation_arguments,
    stride_arguments,
)
from .functions import FlashAttention
from .queries import count_kernel, turn_kernel

COUNTED_REQUESTS = 256
"""Requests whose queries are counted at a time."""


class FarQueries(NamedTuple):
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


class FarLayer:
    """What finds and turns a layer's `FarQueries`."""

    def __init__(self, query: torch.Tensor, params: AttentionParams) -> None:
        _, num_heads, head_size = query.shape
        heads = triton.next_power_of_2(num_heads)
        heads = min(heads, max(1, STORED_NUMBERS // triton.next_power_of_2(head_size)))
        self.num_blocks = triton.cdiv(num_heads, heads)
        window = params.neighbor_window
        first_position = max(window, params.exact_len)
        self.count = LayerKernel(
            count_kernel,
            {"FIRST_POSITION": first_position, "NEIGHBOR_WINDOW": window, "REQUESTS": COUNTED_REQUESTS},
        )
        self.turn = LayerKernel(
            turn_kernel,
            {
                **stride_arguments("query", query),
                "log_scale": log_scale(params),
                "NUM_HEADS": num_heads,
                "HEADS": heads,
                "HEAD_SIZE": head_size,
                "NEIGHBOR_WINDOW": window,
                **rotation_arguments(params, head_size),
                "HAS_LOG_SCALE": params.log_scale_len != 0,
            },
        )
        far = FarQueries.empty(query, 1)
        for launch in self.launches(query, far, far.keys, far.keys, 0):
            launch.kernel.compile(*launch.step)

    def launches(
        self,
        query: torch.Tensor,
        far: FarQueries,
        query_start_loc: torch.Tensor,
        seq_lens: torch.Tensor,
        decode_len: int,
    ) -> tuple[Launch, Launch]:
        """The launches that fill `far`; requests with at most `decode_len` new tokens have none of its queries."""
        num_reqs = far.keys.shape[0]
        count = (far.start_loc, far.keys, query_start_loc, seq_lens, num_reqs, decode_len)
        turn = (query, far.query, query_start_loc, seq_lens, far.start_loc, num_reqs)
        return Launch(self.count, (1, 1, 1), count), Launch(self.turn, (query.shape[0], self.num_blocks, 1), turn)


def far_layer(query: torch.Tensor, params: AttentionParams) -> FarLayer:
    """What finds and turns a layer's `FarQueries`, made at its first call."""
    return once(params, ("far", layout(query)), lambda: FarLayer(query, params))


def attend_far(
    flash_attention: FlashAttention,
    query: torch.Tensor,
    kv_cache: torch.Tensor,
    batch: AttentionBatch,
    params: AttentionParams,
    decode_len: int,
) -> Far:
    """What queries see in grouped keys; arguments as of `interface.Kernels.attention` and of `FarLayer.launches`.

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
    layer = far_layer(query, params)
    for launch in layer.launches(query, far, batch.query_start_loc, batch.seq_lens, decode_len):
        launch()
    key_cache, value_cache = kv_cache.transpose(1, 2).split(head_size, dim=3)
    output, lse = flash_attention.attend(
        q=far.query,
        k=key_cache,
        v=value_cache,
        cu_seqlens_q=far.start_loc,
        max_seqlen_q=batch.max_query_len,
        seqused_k=far.keys,
        max_seqlen_k=batch.max_seq_len,
        block_table=batch.block_table,
        softmax_scale=params.scale,
        softcap=params.soft_cap,
    )
    return Far(output.contiguous(), lse, far.start_loc)
