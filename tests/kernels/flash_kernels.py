"""The flash kernels with a FlashAttention for the CPU."""

from vllm_selfextend.backends.flash import FlashAttention, FlashKernels

from .flash_stand_in import DTYPES, attend

FLASH = FlashKernels(FlashAttention("the stand-in", attend, majors=(), dtypes=DTYPES))
