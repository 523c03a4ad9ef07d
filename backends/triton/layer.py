"""The Triton kernels of a layer."""

from collections.abc import Hashable
from typing import NamedTuple

import torch

from ..interface import NO_HOST, AttentionBatch, AttentionParams, Host, LayerKernels
from ..paged_cache import key_and_value, store_by_indexing
from .buffers import Buffers, Room, buffer_shapes, carve, workspace_bytes
from .decode_launches import DecodeKernels, workspace_numbers
from .launches import as_stored, cache_layout, layout
from .prefill_launches import PrefillKernels
from .tiles import Device, find_device
from .varlen_launches import TritonVarlen


def workspace_size(
    num_heads: int, num_kv_heads: int, head_size: int, dtype: torch.dtype, device: Device, room: Room
) -> int:
    """How many bytes any step needs: decodes are done before prefills, in the same place."""
    decode = 4 * workspace_numbers(num_heads, num_kv_heads, head_size, device)
    return max(decode, workspace_bytes(buffer_shapes(num_heads, num_kv_heads, head_size, dtype, room)))


class Made(NamedTuple):
    """Kernels for tensors that lie in memory in one way, and how many bytes of workspace they need."""

    decode: DecodeKernels
    prefill: PrefillKernels
    workspace_size: int


class Cache(NamedTuple):
    """A cache, an fp8 one as bytes, and its halves as `interface.Store` has them."""

    whole: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor


class TritonLayer(LayerKernels):
    """See `interface.LayerKernels`.

    Attributes:
        made: Its kernels, by how the tensors lie that they are compiled for.

    """

    def __init__(
        self,
        params: AttentionParams,
        host: Host = NO_HOST,
        device: Device | None = None,
        room: Room | None = None,
    ) -> None:
        """Nothing is compiled yet.

        Args:
            params: The layer.
            host: What there is beside these kernels.
            device: What launches will run on, if not what the tensors are on.
            room: How large buffers are, if not as large as the host can use.

        """
        self._params, self._host, self._device = params, host, device
        self._room = room or Room.of(host)
        self.made: dict[Hashable, Made] = {}
        self._seen: tuple[torch.Tensor, Cache] | None = None
        self._carved: tuple[int, Buffers] | None = None

    def warm_up(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, kv_cache: torch.Tensor, out: torch.Tensor
    ) -> None:
        """See `interface.LayerKernels.warm_up`."""
        cache = self._cache(kv_cache)
        self._kernels(query, cache.whole, out).prefill.warm_up(query, (cache.key, cache.value), out)

    def store(self, key: torch.Tensor, value: torch.Tensor, kv_cache: torch.Tensor, batch: AttentionBatch) -> None:
        """See `interface.LayerKernels.store`."""
        params, slots = self._params, batch.slot_mapping
        if slots.shape[0] == 0:  # a microbatch without requests; a launch of no programs is an error
            return
        if self._host.store is None:
            store_by_indexing(key, value, kv_cache, slots, params.k_scale, params.v_scale)
        else:
            cache = self._cache(kv_cache)
            self._host.store(key, value, cache.key, cache.value, slots)

    def attend(
        self,
        query: torch.Tensor,
        kv_cache: torch.Tensor,
        batch: AttentionBatch,
        out: torch.Tensor,
        workspace: torch.Tensor | None = None,
    ) -> None:
        """See `interface.LayerKernels.attend`.

        Raises:
            ValueError: `workspace` is too small.

        """
        if batch.max_query_len == 0:  # padding only: this rank has no requests, others have
            return
        cache = self._cache(kv_cache)
        made = self._kernels(query, cache.whole, out)
        workspace = self._checked(workspace, made.workspace_size, query.device)
        spans = made.prefill.spans(batch) if batch.max_query_len > batch.decode_len else []
        # A request alone is either.
        if not spans or batch.seq_lens.shape[0] > 1:
            made.decode(query, cache.whole, batch, out, workspace.view(torch.float32))
        if spans:
            if self._carved is None or self._carved[0] != workspace.data_ptr():
                self._carved = workspace.data_ptr(), carve(workspace, made.prefill.shapes)
            for span in spans:
                made.prefill(query, cache.whole, (cache.key, cache.value), batch, out, self._carved[1], span)

    def _checked(self, workspace: torch.Tensor | None, size: int, device: torch.device) -> torch.Tensor:
        """The workspace, or one that is made for the call."""
        if workspace is None:
            return torch.empty(size, dtype=torch.uint8, device=device)
        if workspace.numel() < size:
            raise ValueError(f"workspace holds {workspace.numel()} bytes; this layer needs {size}.")
        return workspace

    def _kernels(self, query: torch.Tensor, kv_cache: torch.Tensor, out: torch.Tensor) -> Made:
        """Those for such tensors."""
        found = layout(query), layout(out), cache_layout(kv_cache)
        kernels = self.made.get(found)
        if kernels is None:
            device = self._device or find_device(query.device)
            over_buffer = self._host.attention or TritonVarlen(self._params, device)
            # FlashAttention wants keys of the queries' dtype.
            over_cache = over_buffer if kv_cache.dtype == query.dtype else TritonVarlen(self._params, device)
            layer = query, kv_cache, out, self._params, device
            _, num_heads, head_size = query.shape
            size = workspace_size(num_heads, kv_cache.shape[1], head_size, query.dtype, device, self._room)
            kernels = Made(DecodeKernels(*layer), PrefillKernels(*layer, over_cache, over_buffer, self._room), size)
            self.made[found] = kernels
        return kernels

    def _cache(self, kv_cache: torch.Tensor) -> Cache:
        """Its views, made anew for another cache only."""
        if self._seen is None or self._seen[0] is not kv_cache:
            whole = as_stored(kv_cache)
            self._seen = kv_cache, Cache(whole, *key_and_value(whole))
        return self._seen[1]
