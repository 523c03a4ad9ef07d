"""What vLLM has on GPUs that our kernels use: the operator that stores keys and values, and FlashAttention."""

import torch
from vllm.platforms import current_platform
from vllm.v1.attention.backend import AttentionLayer

from ..backends.flash_attention import FlashVarlen
from ..backends.interface import Store

HALF_DTYPES = (torch.bfloat16, torch.float16)
"""Of queries, and of the keys in the buffers that grouped ones are turned into."""


def find_store(layer: AttentionLayer, kv_cache_dtype: str) -> Store | None:
    """The operator for a layer's cache, with the layer's scales; None: there is none for this device."""
    if not current_platform.is_cuda_alike():
        return None
    from vllm._custom_ops import reshape_and_cache_flash

    def store(
        key: torch.Tensor,
        value: torch.Tensor,
        key_cache: torch.Tensor,
        value_cache: torch.Tensor,
        slot_mapping: torch.Tensor,
    ) -> None:
        if key_cache.dtype not in (key.dtype, torch.uint8):  # the operator would take one's bytes for the other's
            key, value = key.to(key_cache.dtype), value.to(key_cache.dtype)
        scales: tuple[torch.Tensor, torch.Tensor] = layer._k_scale, layer._v_scale
        reshape_and_cache_flash(key, value, key_cache, value_cache, slot_mapping, kv_cache_dtype, *scales)

    return store


def find_attention(head_size: int, scale: float, soft_cap: float) -> FlashVarlen | None:
    """FlashAttention as vLLM chooses it for such a layer; None: no version of it is here, or none does such a layer.

    While a model is made, since vLLM's choice goes by its current config. It takes `HALF_DTYPES`, and is never told of
    attention sinks: those enter where answers are joined.
    """
    if not current_platform.is_cuda() or head_size % 8:
        return None
    from vllm.v1.attention.backends.fa_utils import get_flash_attn_version

    version = get_flash_attn_version(head_size=head_size, requires_softcap=bool(soft_cap))
    if version is None:
        return None
    from vllm.vllm_flash_attn import flash_attn_varlen_func

    return FlashVarlen(flash_attn_varlen_func, version, scale, soft_cap)
