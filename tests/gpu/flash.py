"""The flash kernels with the FlashAttention that is on this machine."""

import functools

from vllm_selfextend import flash_attention
from vllm_selfextend.backends import KERNEL_SETS
from vllm_selfextend.backends.flash import FlashKernels


@functools.cache
def load_flash() -> FlashKernels:
    """With vLLM's, as vLLM would serve, or without vLLM with a package's.

    Raises:
        ImportError: There is neither.

    """
    reasons = []
    for load in (flash_attention.load, KERNEL_SETS["flash"].load):
        try:
            kernels = load()
        except ImportError as error:
            reasons.append(str(error))
        else:
            assert isinstance(kernels, FlashKernels)
            return kernels
    raise ImportError("; ".join(reasons))
