"""Which FlashAttention there is, and how each is called: they are the same attention under different names."""

from dataclasses import dataclass
from typing import Any, Protocol

import torch


class Attend(Protocol):
    """Causal attention over a paged cache; the names are FlashAttention's own.

    The causal mask is aligned to the last query and the last key of a request, and every query sees a key: versions
    differ in what they make of one that does not, and FlashAttention 2 then writes outside the log-sum-exp it returns
    (`csrc/flash_attn/src/flash_fwd_kernel.h`, `compute_attn_1rowblock_splitkv`: where a block of queries has no keys,
    `row_offset_lseaccum` is not that of requests laid one after another).
    """

    def __call__(
        self,
        *,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        cu_seqlens_q: torch.Tensor,
        max_seqlen_q: int,
        seqused_k: torch.Tensor,
        max_seqlen_k: int,
        block_table: torch.Tensor,
        softmax_scale: float,
        softcap: float,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Attend.

        Args:
            q: `[rows, num_heads, head_size]`; rows from `cu_seqlens_q[-1]` on are no request's.
            k: `[num_blocks, block_size, num_kv_heads, head_size]`, the last dimension contiguous.
            v: Like `k`.
            cu_seqlens_q: `[num_reqs + 1]`, int32: where each request's rows begin.
            max_seqlen_q: At least the most rows of a request.
            seqused_k: `[num_reqs]`, int32: keys of each request.
            max_seqlen_k: At least the most keys of a request.
            block_table: `[num_reqs, max_blocks]`, int32.
            softmax_scale: Multiplies scores.
            softcap: If not 0, scores become `softcap * tanh(score / softcap)`.

        Returns:
            The output, like `q`, and `[num_heads, rows]`, float32: the natural logarithm of the sum of the scores'
            exponentials. Rows of no request hold anything.

        """
        ...


@dataclass(frozen=True)
class FlashAttention:
    """A FlashAttention that was found.

    Attributes:
        name: For people.
        attend: Calls it.
        block_multiple: Its cache blocks hold a multiple of so many tokens.
        majors: The major compute capabilities of the NVIDIA GPUs it runs on; empty: it runs anywhere.
        dtypes: Of queries and of the cache.

    """

    name: str
    attend: Attend
    block_multiple: int = 16
    majors: tuple[int, ...] = (8, 9, 10, 11, 12)
    dtypes: tuple[torch.dtype, ...] = (torch.float16, torch.bfloat16)

    def unsupported_device(self, device: torch.device, capability: tuple[int, int] | None) -> str | None:
        """See `interface.Kernels.unsupported_device`."""
        if self.majors and (device.type != "cuda" or torch.version.hip):
            return f"{self.name} runs on NVIDIA's GPUs"
        if self.majors and capability is not None and capability[0] not in self.majors:
            needed = ", ".join(f"{major}.x" for major in self.majors)
            return (
                f"{self.name} runs on compute capabilities {needed}, and this GPU's is {'.'.join(map(str, capability))}"
            )
        return None

    def unsupported_head_size(self, head_size: int) -> str | None:
        """See `interface.Kernels.unsupported_head_size`."""
        return f"{self.name} takes multiples of 8" if head_size % 8 else None

    def takes(self, dtype: torch.dtype, cache_dtype: torch.dtype) -> bool:
        """Whether it reads such queries and such a cache."""
        return dtype in self.dtypes and cache_dtype == dtype


def find_flash_attention() -> FlashAttention:
    """The one that is installed as a package of its own; the newer version first.

    Raises:
        ImportError: None is.

    """
    try:
        return _flash_attention_3()
    except ImportError:
        return _flash_attention_2()


def _flash_attention_3() -> FlashAttention:
    """`hopper/flash_attn_interface.py` of FlashAttention's repository."""
    from flash_attn_interface import flash_attn_with_kvcache  # type: ignore[import-not-found]

    def attend(
        *,
        k: torch.Tensor,
        v: torch.Tensor,
        seqused_k: torch.Tensor,
        max_seqlen_k: int,
        block_table: torch.Tensor,
        **others: Any,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        output, lse, *_ = flash_attn_with_kvcache(
            k_cache=k,
            v_cache=v,
            cache_seqlens=seqused_k,
            page_table=block_table,
            causal=True,
            num_splits=1,
            return_softmax_lse=True,
            **others,
        )
        return output, lse

    return FlashAttention("FlashAttention 3", attend, majors=(9,))


def _flash_attention_2() -> FlashAttention:
    """`flash_attn/flash_attn_interface.py` of FlashAttention's repository; blocks as its `flash_api.cpp` says."""
    try:
        from flash_attn import flash_attn_varlen_func  # type: ignore[import-not-found]
    except ImportError as error:
        raise ImportError(f"{error}. pip install flash-attn") from error

    def attend(*, seqused_k: torch.Tensor, **others: Any) -> tuple[torch.Tensor, torch.Tensor]:
        cu_seqlens_k = torch.nn.functional.pad(seqused_k.cumsum(0, dtype=torch.int32), (1, 0))
        output, lse, _ = flash_attn_varlen_func(
            cu_seqlens_k=cu_seqlens_k, causal=True, return_attn_probs=True, **others
        )
        return output, lse

    return FlashAttention("FlashAttention 2", attend, block_multiple=256)
