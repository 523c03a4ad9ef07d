"""What launches of any kernel have in common: what a kernel is compiled for is settled once a layer, not in a call."""

import math
from typing import Any

import torch
import triton

from ..interface import AttentionParams


class LayerKernel:
    """A Triton kernel with what its calls for a layer have in common.

    Triton looks at every argument of every call to find out which of its specialisations is meant. Here that is settled
    once, for tensors that lie in memory in one way (`layout`): numbers of the step are not specialised on.
    """

    def __init__(self, kernel: Any, constants: dict[str, Any]) -> None:
        self.kernel = kernel
        # A multiplication and an addition in one instruction, which Triton will not do by itself from 3.10 on.
        self.constants = constants = {**constants, "enable_fp_fusion": True}
        self._last_arguments = tuple(constants[name] for name in kernel.arg_names if name in constants)
        self._compiled: Any = None

    def compile(self, *step: Any) -> Any:
        """Compile it for a step's arguments, or such as they are; in the interpreter there is nothing to compile."""
        if not triton.knobs.runtime.interpret:
            self._compiled = self.kernel.warmup(*step, grid=(1, 1, 1), **self.constants)
        return self._compiled

    def __call__(self, grid: tuple[int, int, int], step: tuple[Any, ...]) -> None:
        if self._compiled is None:
            self.kernel[grid](*step, **self.constants)
        else:
            self._compiled[grid](*step, *self._last_arguments)


def layout(x: torch.Tensor) -> tuple[Any, ...]:
    """How queries, keys, values or outputs lie in memory, as far as a kernel is specialised on it.

    That is the dtype, heads, the size of one, the strides of tokens, heads and dimensions, whether the first number's
    address is a multiple of 16 bytes, and the device.
    """
    num_tokens, num_heads, head_size = x.shape
    token_stride, head_stride, dim_stride = x.stride()
    if num_tokens == 1:  # then it can be any number
        token_stride = num_heads * head_size
    is_aligned = x.data_ptr() % 16 == 0
    return x.dtype, num_heads, head_size, token_stride, head_stride, dim_stride, is_aligned, x.device


def cache_layout(kv_cache: torch.Tensor) -> tuple[Any, ...]:
    """The same of the cache, whose blocks, heads and tokens have strides."""
    return kv_cache.dtype, kv_cache.shape[2], *kv_cache.stride()[:3], kv_cache.data_ptr() % 16 == 0


def group_arguments(params: AttentionParams, head_size: int) -> dict[str, Any]:
    """The tables of group sizes and of turns, None where there are none, and how dimensions are taken apart."""
    sizes, rotation = params.group_sizes, params.rotation if params.group_sizes else None
    rotary_dim = rotation.cos_sin.shape[1] if rotation else 0
    return {
        "group_sizes": sizes and sizes.eighths,
        "cos_sin": rotation and rotation.cos_sin,
        "ROTARY_DIM": rotary_dim,
        "INTERLEAVED": bool(rotation and rotation.interleaved),
        "HALF_PADDED": padded(rotary_dim // 2),
        "REST_PADDED": padded(head_size - rotary_dim),
    }


def log_scale_arguments(params: AttentionParams) -> dict[str, Any]:
    """What queries are multiplied by: see `arithmetic.log_factor`."""
    length = params.log_scale_len
    return {"log_scale": 1.0 / math.log(length) if length else 0.0, "HAS_LOG_SCALE": length != 0}


def padded(size: int) -> int:
    """What a tile has of so many dimensions: a power of 2, and 16 at least, or tensor cores do not multiply them."""
    power: int = triton.next_power_of_2(size)
    return max(16, power)


def stride_arguments(name: str, tensor: torch.Tensor) -> dict[str, int]:
    """The strides of queries, keys, values or outputs."""
    _, _, _, *strides = layout(tensor)[:6]
    return {f"{name}_{kind}_stride": stride for kind, stride in zip(("token", "head", "dim"), strides, strict=True)}


def cache_strides(kv_cache: torch.Tensor) -> dict[str, int]:
    return {f"cache_{kind}_stride": kv_cache.stride(index) for index, kind in enumerate(("block", "head", "token"))}


def cdiv(number: int, divisor: int) -> int:
    """As `triton.cdiv`, which takes 2 microseconds: it is made for kernels too."""
    return -(-number // divisor)


def as_stored(kv_cache: torch.Tensor) -> torch.Tensor:
    """The cache, an fp8 one as bytes."""
    return kv_cache.view(torch.uint8) if kv_cache.dtype == torch.float8_e4m3fn else kv_cache


def least_aligned(x: torch.Tensor) -> torch.Tensor:
    """`x` if its tokens lie as well in memory as the first, else what lies less well, as any tokens of it may."""
    token_stride = layout(x)[3]
    if x.data_ptr() % 16 or token_stride * x.element_size() % 16 == 0:
        return x
    return x.new_empty(2)[1:]
