"""FlashAttention, from whoever has brought it to this machine."""

import functools
from collections.abc import Callable
from typing import Any

import torch

from vllm_selfextend.backends.flash_attention import FlashVarlen
from vllm_selfextend.backends.interface import AttentionParams


@functools.lru_cache
def find_function(head_size: int, soft_cap: float) -> tuple[Callable[..., Any], int] | None:
    """`flash_attn_varlen_func` and its version: vLLM's, or that of a package `fa3` (vLLM's version 3 by itself)."""
    if not torch.cuda.is_available():
        return None
    try:
        from vllm.v1.attention.backends.fa_utils import get_flash_attn_version

        version = get_flash_attn_version(head_size=head_size, requires_softcap=bool(soft_cap))
        if version is not None:
            from vllm.vllm_flash_attn import flash_attn_varlen_func

            return flash_attn_varlen_func, version
    except ImportError:
        pass  # without vLLM, or with one for other devices
    try:
        from fa3 import flash_attn_varlen_func as function  # type: ignore[import-not-found]
    except ImportError:
        return None
    return function, 3


def find_attention(params: AttentionParams, head_size: int, dtype: torch.dtype) -> FlashVarlen | None:
    """`Host.attention` for such a layer; None: there is none."""
    found = find_function(head_size, params.soft_cap) if dtype in (torch.bfloat16, torch.float16) else None
    return None if found is None else FlashVarlen(*found, params.scale, params.soft_cap)
