"""What a call launches: which kernels, on what grid, with what. It follows from shapes and from the layer alone.

What depends on the layer alone is worked out, and all its kernels are compiled, at the first call with tensors that lie
in memory in one way, or by `warm_up`.
"""

import math
from collections.abc import Hashable, Iterator
from typing import Any, NamedTuple

import torch
import triton

from ..interface import AttentionBatch, AttentionParams, LayerKernels
from .attention import attention_kernel, merge_kernel
from .store import store_kernel
from .tiles import Device, Tiles, decode_tiles, find_device, prefill_tiles

MAX_DECODE_LEN = 16
"""A step of at most so many new tokens per request (speculation verifies a few) is a decode alone."""

PROGRAMS_PER_MULTIPROCESSOR = 4
"""How many programs a decode wants: where requests and KV heads make fewer, programs share a request's context."""

MAX_SPLITS = 64
"""Among how many at most."""

LONGEST_SHARE = 16384
"""Keys that a program takes at most, however many requests there are, while `workspace_size` suffices: else a step of
many short contexts and a long one waits for the long one's program."""

MERGED_SPLITS = 16
"""Shares that are joined at a time."""

STORED_NUMBERS = 2048
"""Numbers of a token's keys that a program stores."""


class LayerKernel:
    """A Triton kernel with what its calls for a layer have in common.

    Triton looks at every argument of every call to find out which of its specialisations is meant. Here that is settled
    once, for tensors that lie in memory in one way (`layout`): numbers of the step are not specialised on.
    """

    def __init__(self, kernel: Any, constants: dict[str, Any]) -> None:
        self.kernel = kernel
        self.constants = constants
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


class Launch(NamedTuple):
    """A kernel of a layer, and what a step calls it with."""

    kernel: LayerKernel
    grid: tuple[int, int, int]
    step: tuple[Any, ...]

    def __call__(self) -> None:
        self.kernel(self.grid, self.step)


def workspace_size(num_heads: int, num_kv_heads: int, head_size: int, device: Device) -> int:
    """How many float32 numbers of `AttentionBatch.workspace` the launches of a layer need at most."""
    rows = decode_tiles(num_heads // num_kv_heads, head_size, 2, False, device).rows
    return _most_programs(rows, device) * rows * (head_size + 2)


def _most_programs(rows: int, device: Device) -> int:
    """How many programs share contexts at most."""
    # Where requests are fewer than programs wanted, less than twice as many come of it. More is for LONGEST_SHARE.
    wanted = PROGRAMS_PER_MULTIPROCESSOR * device.num_multiprocessors
    return wanted * max(2, 128 // rows)


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


class StoreKernels:
    """What `TritonLayer.store` launches, for tensors that lie in memory in one way."""

    def __init__(self, key: torch.Tensor, value: torch.Tensor, kv_cache: torch.Tensor, params: AttentionParams) -> None:
        num_kv_heads, head_size = key.shape[1:]
        head_size_padded = triton.next_power_of_2(head_size)
        heads = min(triton.next_power_of_2(num_kv_heads), max(1, STORED_NUMBERS // head_size_padded))
        self.num_blocks = cdiv(num_kv_heads, heads)
        constants = {
            "k_scale": params.k_scale,
            "v_scale": params.v_scale,
            **stride_arguments("key", key),
            **stride_arguments("value", value),
            **_cache_strides(kv_cache),
            "NUM_KV_HEADS": num_kv_heads,
            "HEADS": heads,
            "BLOCK_SIZE": kv_cache.shape[2],
            "HEAD_SIZE": head_size,
            "HEAD_SIZE_PADDED": head_size_padded,
            "IS_FP8": kv_cache.dtype == torch.uint8,
        }
        self.kernel = LayerKernel(store_kernel, constants)
        self.kernel.compile(key, value, kv_cache, torch.empty(2, dtype=torch.int64, device=key.device))


class AttentionKernels:
    """What `TritonLayer.attend` launches, for tensors that lie in memory in one way."""

    def __init__(
        self,
        query: torch.Tensor,
        kv_cache: torch.Tensor,
        out: torch.Tensor,
        params: AttentionParams,
        device: Device,
    ) -> None:
        _, num_heads, head_size = query.shape
        self.num_kv_heads, self.heads = kv_cache.shape[1], num_heads // kv_cache.shape[1]
        self.sliding_window = params.sliding_window
        is_fp8 = kv_cache.dtype == torch.uint8
        shape = self.heads, head_size, query.element_size(), is_fp8, device
        decode, prefill = decode_tiles(*shape), prefill_tiles(*shape)
        self.decode_rows = decode.rows
        self.decode_tokens, self.prefill_tokens = decode.rows // self.heads, prefill.rows // self.heads
        self.wanted_programs = PROGRAMS_PER_MULTIPROCESSOR * device.num_multiprocessors
        self.most_programs = _most_programs(decode.rows, device)
        merged = {
            "sinks": params.sinks,
            "v_scale": params.v_scale,
            **stride_arguments("out", out),
            "SLIDING_WINDOW": params.sliding_window,
            "HEADS": self.heads,
            "HEAD_SIZE": head_size,
            # What tensor cores multiply has 16 dimensions at least.
            "HEAD_SIZE_PADDED": max(16, triton.next_power_of_2(head_size)),
            "LONGEST_SHARE": LONGEST_SHARE,
        }
        common = {
            **merged,
            "k_scale": params.k_scale,
            **stride_arguments("query", query),
            **_cache_strides(kv_cache),
            "scale": params.scale,
            "log_scale": 1.0 / math.log(params.log_scale_len) if params.log_scale_len else 0.0,
            "soft_cap": params.soft_cap,
            "NEIGHBOR_WINDOW": params.neighbor_window,
            **_group_arguments(params, head_size),
            "HAS_SOFT_CAP": params.soft_cap != 0.0,
            "HAS_LOG_SCALE": params.log_scale_len != 0,
            "BLOCK_SIZE": kv_cache.shape[2],
            "IS_FP8": is_fp8,
            "HAS_FP8": device.has_fp8,
            "IS_INTERPRETED": device.target is None,
        }

        def attention(tiles: Tiles, *, is_decode: bool, is_split: bool) -> LayerKernel:
            flags = {"IS_DECODE": is_decode, "IS_SPLIT": is_split}
            tokens = tiles.rows // self.heads
            return LayerKernel(attention_kernel, {**common, **flags, "TOKENS": tokens, **tiles.arguments()})

        self.decode = attention(decode, is_decode=True, is_split=False)
        self.split_decode = attention(decode, is_decode=True, is_split=True)
        self.prefill = attention(prefill, is_decode=False, is_split=False)
        shares = {"TOKENS": self.decode_tokens, "BLOCK_M": decode.rows, "NEAR_N": decode.near_keys}
        self.merge = LayerKernel(merge_kernel, {**merged, **shares, "SPLITS": MERGED_SPLITS})

        int32 = torch.empty(2, dtype=torch.int32, device=query.device)
        floats = int32.float()
        lengths = int32, int32
        for kernel, workspace in ((self.decode, None), (self.split_decode, floats), (self.prefill, None)):
            kernel.compile(query, kv_cache, out, workspace, *lengths, int32, 1, 1, 1, 1)
        self.merge.compile(out, floats, *lengths, 1, 1, 1)

    def num_splits(self, num_blocks: int, max_seq_len: int) -> tuple[int, int]:
        """Among how many programs to share contexts, and how many one that is not long wants."""
        if self.sliding_window:
            max_seq_len = min(max_seq_len, self.sliding_window + MAX_DECODE_LEN)
        num_programs = num_blocks * self.num_kv_heads
        wanted = min(cdiv(self.wanted_programs, num_programs), MAX_SPLITS)
        # As many as LONGEST_SHARE asks for, while there is room for what they find.
        long = min(cdiv(max_seq_len, LONGEST_SHARE), self.most_programs // num_programs, MAX_SPLITS)
        return max(wanted, long), wanted


class TritonLayer(LayerKernels):
    """See `interface.LayerKernels`.

    Attributes:
        made: Its kernels, by how the tensors lie that they are compiled for.

    """

    def __init__(self, params: AttentionParams, device: Device | None = None) -> None:
        """`device` is what the launches will run on, if not what the tensors are on."""
        self._params, self._device = params, device
        self.made: dict[Hashable, StoreKernels | AttentionKernels] = {}

    def warm_up(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, kv_cache: torch.Tensor, out: torch.Tensor
    ) -> None:
        """See `interface.LayerKernels.warm_up`."""
        kv_cache = as_stored(kv_cache)
        self._store_kernels(key, value, kv_cache)
        self._attention_kernels(query, kv_cache, out)

    def store(self, key: torch.Tensor, value: torch.Tensor, kv_cache: torch.Tensor, batch: AttentionBatch) -> None:
        """See `interface.LayerKernels.store`."""
        self.store_launch(key, value, kv_cache, batch)()

    def attend(self, query: torch.Tensor, kv_cache: torch.Tensor, batch: AttentionBatch, out: torch.Tensor) -> None:
        """See `interface.LayerKernels.attend`."""
        for launch in self.attention_launches(query, kv_cache, batch, out):
            launch()

    def store_launch(
        self, key: torch.Tensor, value: torch.Tensor, kv_cache: torch.Tensor, batch: AttentionBatch
    ) -> Launch:
        """The launch that `store` makes."""
        kv_cache = as_stored(kv_cache)
        kernels = self._store_kernels(key, value, kv_cache)
        return Launch(kernels.kernel, (key.shape[0], kernels.num_blocks, 1), (key, value, kv_cache, batch.slot_mapping))

    def attention_launches(
        self, query: torch.Tensor, kv_cache: torch.Tensor, batch: AttentionBatch, out: torch.Tensor
    ) -> Iterator[Launch]:
        """The launches that `attend` makes, in their order.

        Raises:
            ValueError: `batch.workspace` is too small.

        """
        if batch.max_query_len == 0:  # padding only: this rank has no requests, others have
            return
        kv_cache = as_stored(kv_cache)
        kernels = self._attention_kernels(query, kv_cache, out)
        num_tokens, num_heads, head_size = query.shape
        num_reqs, max_query_len = batch.seq_lens.shape[0], batch.max_query_len
        lengths, table = (batch.query_start_loc, batch.seq_lens), batch.block_table
        is_decode = max_query_len <= MAX_DECODE_LEN
        decode_len = max_query_len if is_decode else kernels.decode_tokens
        # A request alone is either a decode or a prefill.
        if is_decode or num_reqs > 1:
            num_blocks = num_reqs * cdiv(decode_len, kernels.decode_tokens)
            num_splits, wanted = kernels.num_splits(num_blocks, batch.max_seq_len)
            numbers = (num_reqs, decode_len, wanted, table.stride(0))
            workspace = None
            if num_splits > 1:
                num_rows = num_blocks * kernels.num_kv_heads * num_splits * kernels.decode_rows
                workspace = _checked(batch.workspace, num_rows * (head_size + 2), query.device)
            yield Launch(
                kernels.decode if workspace is None else kernels.split_decode,
                (num_blocks, kernels.num_kv_heads, num_splits),
                (query, kv_cache, out, workspace, *lengths, table, *numbers),
            )
            if workspace is not None:
                step = (out, workspace, *lengths, decode_len, wanted, num_splits)
                yield Launch(kernels.merge, (num_reqs * decode_len, num_heads, 1), step)
        if not is_decode:
            if num_reqs == 1:
                decode_len = 0
            numbers = (num_reqs, decode_len, 1, table.stride(0))
            yield Launch(
                kernels.prefill,
                (num_tokens // kernels.prefill_tokens + num_reqs, kernels.num_kv_heads, 1),
                (query, kv_cache, out, None, *lengths, table, *numbers),
            )

    def _store_kernels(self, key: torch.Tensor, value: torch.Tensor, kv_cache: torch.Tensor) -> StoreKernels:
        found = layout(key), layout(value), cache_layout(kv_cache)
        kernels = self.made.get(found)
        if not isinstance(kernels, StoreKernels):
            kernels = self.made[found] = StoreKernels(key, value, kv_cache, self._params)
        return kernels

    def _attention_kernels(self, query: torch.Tensor, kv_cache: torch.Tensor, out: torch.Tensor) -> AttentionKernels:
        found = "attend", layout(query), layout(out), cache_layout(kv_cache)
        kernels = self.made.get(found)
        if not isinstance(kernels, AttentionKernels):
            device = self._device or find_device(query.device)
            kernels = self.made[found] = AttentionKernels(query, kv_cache, out, self._params, device)
        return kernels


def _checked(workspace: torch.Tensor | None, size: int, device: torch.device) -> torch.Tensor:
    """The workspace, or one that is made for the call."""
    if workspace is None:
        return torch.empty(size, dtype=torch.float32, device=device)
    if workspace.numel() < size:
        raise ValueError(f"workspace holds {workspace.numel()} numbers; this step needs {size}.")
    return workspace


def _group_arguments(params: AttentionParams, head_size: int) -> dict[str, Any]:
    """The tables of group sizes and of turns, None where there are none, and how dimensions are taken apart."""
    sizes, rotation = params.group_sizes, params.rotation if params.group_sizes else None
    rotary_dim = rotation.cos_sin.shape[1] if rotation else 0
    return {
        "group_sizes": sizes and sizes.eighths,
        "cos_sin": rotation and rotation.cos_sin,
        "ROTARY_DIM": rotary_dim,
        "INTERLEAVED": bool(rotation and rotation.interleaved),
        "HALF_PADDED": max(16, triton.next_power_of_2(rotary_dim // 2)),
        "REST_PADDED": max(16, triton.next_power_of_2(head_size - rotary_dim)),
    }


def stride_arguments(name: str, tensor: torch.Tensor) -> dict[str, int]:
    """The strides of queries, keys, values or outputs."""
    _, _, _, *strides = layout(tensor)[:6]
    return {f"{name}_{kind}_stride": stride for kind, stride in zip(("token", "head", "dim"), strides, strict=True)}


def _cache_strides(kv_cache: torch.Tensor) -> dict[str, int]:
    return {f"cache_{kind}_stride": kv_cache.stride(index) for index, kind in enumerate(("block", "head", "token"))}


def cdiv(number: int, divisor: int) -> int:
    """As `triton.cdiv`, which takes 2 microseconds: it is made for kernels too."""
    return -(-number // divisor)


def as_stored(kv_cache: torch.Tensor) -> torch.Tensor:
    """The cache, an fp8 one as bytes."""
    return kv_cache.view(torch.uint8) if kv_cache.dtype == torch.float8_e4m3fn else kv_cache
