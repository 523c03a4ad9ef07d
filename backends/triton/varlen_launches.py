"""What launches the attention of `varlen.py`."""

from collections.abc import Hashable

import torch

from ..interface import AttentionParams, VarlenLengths
from .launches import LayerKernel, layout, padded, stride_arguments
from .tiles import Device, varlen_tiles
from .varlen import varlen_kernel


class TritonVarlen:
    """`VarlenAttention` by a kernel of ours, for the layers and types that FlashAttention does not do.

    One for each layout of a cache: strides of keys and values are those of the first call with keys in blocks, or not.
    """

    def __init__(self, params: AttentionParams, device: Device) -> None:
        self._params, self._device = params, device
        self._made: dict[Hashable, tuple[LayerKernel, int]] = {}

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
        found = block_table is not None, is_causal, window, layout(query), layout(out), key.dtype
        if found not in self._made:
            self._made[found] = self._make(query, key, value, out, lse, is_causal, window)
        kernel, tokens = self._made[found]
        num_seqs, num_tokens = lengths.seq_lens.shape[0], query.shape[0]
        numbers = num_seqs, 0 if block_table is None else block_table.stride(0), lse.stride(0)
        step = (query, key, value, out, lse, lengths.query_start_loc, lengths.seq_lens, block_table, *numbers)
        kernel((num_tokens // tokens + num_seqs, key.shape[-2], 1), step)
        return lse

    def _make(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        out: torch.Tensor,
        lse: torch.Tensor,
        is_causal: bool,
        window: int,
    ) -> tuple[LayerKernel, int]:
        """What serves such tensors, and how many tokens a program takes."""
        params, device = self._params, self._device
        num_heads, head_size = query.shape[1:]
        heads, is_paged = num_heads // key.shape[-2], key.dim() == 4
        is_fp8 = key.dtype == torch.uint8
        tiles = varlen_tiles(heads, head_size, query.element_size(), is_fp8, device)
        tokens = tiles.rows // heads

        def strides(name: str, tensor: torch.Tensor) -> dict[str, int]:
            block, token, head = tensor.stride()[:3] if is_paged else (0, *tensor.stride()[:2])
            return {f"{name}_block_stride": block, f"{name}_token_stride": token, f"{name}_head_stride": head}

        constants = {
            # The buffer holds what they have been multiplied into.
            "k_scale": params.k_scale if is_paged else None,
            "v_scale": params.v_scale if is_paged else None,
            **stride_arguments("query", query),
            **stride_arguments("out", out),
            **strides("key", key),
            **strides("value", value),
            "scale": params.scale,
            "soft_cap": params.soft_cap,
            "WINDOW": window,
            "IS_CAUSAL": is_causal,
            "HAS_SOFT_CAP": params.soft_cap != 0.0,
            "HEADS": heads,
            "HEAD_SIZE": head_size,
            "HEAD_SIZE_PADDED": padded(head_size),
            "BLOCK_SIZE": key.shape[1] if is_paged else 0,
            "TOKENS": tokens,
            "BLOCK_M": tiles.rows,
            "BLOCK_N": tiles.keys,
            "STAGES": tiles.stages,
            "IS_FP8": is_fp8,
            "HAS_FP8": device.has_fp8,
            "IS_INTERPRETED": device.target is None,
            "num_warps": tiles.num_warps,
        }
        kernel = LayerKernel(varlen_kernel, constants)
        int32 = torch.empty(2, dtype=torch.int32, device=query.device)
        kernel.compile(query, key, value, out, lse, int32, int32, int32 if is_paged else None, 1, 1, 1)
        return kernel, tokens
