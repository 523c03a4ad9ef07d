"""The FlashAttention that vLLM brings along for NVIDIA's GPUs, for the kernel set "flash"."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from .backends.interface import Kernels


def load() -> "Kernels":
    """The kernel set with it: the version that vLLM itself would take.

    Raises:
        ImportError: vLLM has none for this machine.

    """
    from vllm.platforms import current_platform

    if not current_platform.is_cuda():
        raise ImportError("vLLM brings FlashAttention along for NVIDIA's GPUs only")
    from vllm.utils.torch_utils import canonicalize_singleton_dim_strides
    from vllm.v1.attention.backends.fa_utils import flash_attn_varlen_func, get_flash_attn_version

    from .backends.flash import FlashAttention, FlashKernels

    # Asked now, while vLLM's config is current. FlashAttention 4 takes heads of up to 128 everywhere, others take 256.
    version, version_of_large_heads = (get_flash_attn_version(head_size=size) for size in (128, 256))
    if version is None or version_of_large_heads is None:
        raise ImportError("vLLM's FlashAttention does not run here")

    def attend(*, q: "torch.Tensor", k: "torch.Tensor", v: "torch.Tensor", **others: Any) -> Any:
        return flash_attn_varlen_func(
            q=q,
            k=canonicalize_singleton_dim_strides(k),
            v=canonicalize_singleton_dim_strides(v),
            causal=True,
            return_softmax_lse=True,
            num_splits=1,
            fa_version=version if q.shape[2] <= 128 else version_of_large_heads,
            **others,
        )

    return FlashKernels(FlashAttention("vLLM's FlashAttention", attend))
