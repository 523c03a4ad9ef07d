"""A paged cache as vLLM's own backends lay it out.

`[num_blocks, num_kv_heads, block_size, 2 * head_size]`, a token's key and then its value, whatever the strides.
"""

import torch

KEY_THEN_VALUE = "key-value-1"
"""What `Kernels.CACHE_LAYOUT` calls it."""


def key_and_value(kv_cache: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Views of keys and values as FlashAttention wants them: `[num_blocks, block_size, num_kv_heads, head_size]`."""
    key, value = kv_cache.transpose(1, 2).chunk(2, dim=-1)
    if key.shape[2] == 1:  # its stride may be any number, but has to be one that the GPU can copy by
        strides = (*key.stride()[:2], key.stride(1), key.stride(3))
        key, value = (x.as_strided(x.shape, strides) for x in (key, value))
    return key, value


def store_by_indexing(
    key: torch.Tensor,
    value: torch.Tensor,
    kv_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    k_scale: torch.Tensor | None,
    v_scale: torch.Tensor | None,
) -> None:
    """See `interface.LayerKernels.store`. On a GPU this waits for the device."""
    block_size, head_size = kv_cache.shape[2], key.shape[2]
    stored = slot_mapping >= 0
    slots = slot_mapping[stored]
    block, offset = slots // block_size, slots % block_size
    if kv_cache.element_size() == 1:
        kv_cache = kv_cache.view(torch.uint8)
        key, value = _to_fp8(key, k_scale), _to_fp8(value, v_scale)
    kv_cache[block, :, offset, :head_size] = key[stored].to(kv_cache.dtype)
    kv_cache[block, :, offset, head_size:] = value[stored].to(kv_cache.dtype)


def _to_fp8(x: torch.Tensor, scale: torch.Tensor | None) -> torch.Tensor:
    """The bytes of `x / scale` in float8_e4m3fn, rounded once; what is too large becomes the largest."""
    scaled = x.float() if scale is None else x.float() / scale
    return scaled.clamp(-448.0, 448.0).to(torch.float8_e4m3fn).view(torch.uint8)
