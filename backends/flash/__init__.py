"""Self-Extend with FlashAttention for the grouped keys of a prefill; all else is the Triton kernels', the cache too.

Grouped attention is ordinary attention over keys as they lie in the cache: of a request of `n` tokens, the query at
position `i` sees the keys `j <= i - W`, which is FlashAttention's causal mask, aligned to the last query and the last
key, over the first `n - W` keys. So FlashAttention is given the queries that have grouped keys, turned to their grouped
positions, and the Triton kernel goes on from its output and log-sum-exp with the neighbors, in the same softmax.

FlashAttention reads float16 and bfloat16. Layers in float32 or with an fp8 cache (which it reads for fp8 queries only),
sliding windows and layers that group nothing are wholly Triton's, as decodes are.
"""

import functools

import torch

from .. import triton
from ..interface import AttentionBatch, AttentionParams
from ..triton import launches
from .functions import FlashAttention, find_flash_attention
from .grouped import attend_far, far_layer

__all__ = ["FlashAttention", "FlashKernels", "find_flash_attention"]


class FlashKernels:
    """The kernel set (see `interface.Kernels`) with a FlashAttention."""

    IS_CAPTURABLE = triton.IS_CAPTURABLE
    CACHE_LAYOUT = triton.CACHE_LAYOUT
    VARIANT = triton.VARIANT

    store_kv = staticmethod(triton.store_kv)
    workspace_size = staticmethod(triton.workspace_size)

    def __init__(self, flash_attention: FlashAttention) -> None:
        self.flash_attention = flash_attention

    def unsupported_device(self, device: torch.device, capability: tuple[int, int] | None) -> str | None:
        """See `interface.Kernels.unsupported_device`."""
        return triton.unsupported_device(device, capability) or self.flash_attention.unsupported_device(
            device, capability
        )

    def unsupported_head_size(self, head_size: int) -> str | None:
        """See `interface.Kernels.unsupported_head_size`."""
        return triton.unsupported_head_size(head_size) or self.flash_attention.unsupported_head_size(head_size)

    def warm_up(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        params: AttentionParams,
        out: torch.Tensor,
    ) -> None:
        """See `interface.Kernels.warm_up`."""
        if self._takes(query, kv_cache, params):
            launches.store_layer(key, value, kv_cache, params)
            launches.attention_layer(query, kv_cache, out, params, has_far=True)
            far_layer(query, params)
        else:
            triton.warm_up(query, key, value, kv_cache, params, out)

    def attention(
        self,
        query: torch.Tensor,
        kv_cache: torch.Tensor,
        batch: AttentionBatch,
        params: AttentionParams,
        out: torch.Tensor,
    ) -> None:
        """See `interface.Kernels.attention`.

        Raises:
            ValueError: FlashAttention does not take blocks of this size.

        """
        takes = self._takes(query, kv_cache, params)
        far = functools.partial(attend_far, self.flash_attention, query, kv_cache, batch, params) if takes else None
        for launch in launches.attention_launches(query, kv_cache, batch, params, out, far):
            launch()

    def _takes(self, query: torch.Tensor, kv_cache: torch.Tensor, params: AttentionParams) -> bool:
        """Whether the grouped keys of a layer's prefills are FlashAttention's."""
        is_grouped = params.group_size > 1 and not params.sliding_window
        return is_grouped and self.flash_attention.takes(query.dtype, kv_cache.dtype)
