"""How `decode_kernel` and `varlen_kernel` are cut into tiles, by head size and GPU.

Chosen so that loops spill no registers and shared memory suffices, which `benchmarks/triton_compile.py` shows; nothing
is tried out at serving time.
"""

import functools
from dataclasses import dataclass
from typing import NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget


@dataclass(frozen=True)
class Device:
    """What the choice depends on; `target` is None for Triton's interpreter."""

    target: GPUTarget | None
    num_multiprocessors: int

    @property
    def has_fp8(self) -> bool:
        """Whether it has instructions that convert float8_e4m3fn: NVIDIA's from Ada on."""
        return self.is_cuda(89)

    @property
    def has_wgmma(self) -> bool:
        """Whether its tensor cores read shared memory, of which a program has 227 KiB: Hopper, large Blackwells."""
        return self.is_cuda(90) and not self.is_cuda(120)

    def is_cuda(self, arch: int) -> bool:
        """Whether it is NVIDIA's, of a compute capability of `arch / 10` or more."""
        return self.target is not None and self.target.backend == "cuda" and self.target.arch >= arch


@functools.lru_cache
def find_device(device: torch.device) -> Device:
    """The GPU that tensors on `device` are on; on a CPU the interpreter, which counts as a small one."""
    if device.type == "cpu":
        return Device(None, 2)
    properties = torch.cuda.get_device_properties(device)
    return Device(triton.runtime.driver.active.get_current_target(), properties.multi_processor_count)


@dataclass(frozen=True)
class Tiles:
    """How `decode_kernel` is cut.

    Attributes:
        rows: Queries times the query heads of a KV head.
        far_keys: Keys of a tile with grouped ones, which holds cosines and sines as well.
        near_keys: Keys of a tile of neighbors, a multiple of `far_keys`.
        far_stages: What Triton calls `num_stages`: the grouped keys have `ceil((far_stages - 2) / 2)` tiles on their
            way, since keys are found through the block table.
        near_stages: The same of the neighbors.
        num_warps: Of a program.
        most_registers: Of a thread; None leaves it to the compiler.

    """

    rows: int
    far_keys: int
    near_keys: int
    far_stages: int
    near_stages: int
    num_warps: int
    most_registers: int | None = None

    def arguments(self) -> dict[str, int]:
        """What it calls them."""
        tiles = {
            "BLOCK_M": self.rows,
            "FAR_N": self.far_keys,
            "NEAR_N": self.near_keys,
            "FAR_STAGES": self.far_stages,
            "NEAR_STAGES": self.near_stages,
            "num_warps": self.num_warps,
        }
        # Triton has no such option for AMD's, not even to leave it open.
        return tiles if self.most_registers is None else {**tiles, "maxnreg": self.most_registers}


def decode_rows(heads: int) -> int:
    """Rows of a decode's tile: tensor cores multiply 16 at least."""
    rows: int = max(16, triton.next_power_of_2(heads))
    return rows


def decode_tiles(heads: int, head_size: int, itemsize: int, is_fp8: bool, device: Device) -> Tiles:
    """Tiles for few queries per request.

    Args:
        heads: Query heads per KV head.
        head_size: Of queries, keys and values.
        itemsize: Bytes of a query's number.
        is_fp8: Whether the cache is.
        device: What it will run on.

    """
    rows = decode_rows(heads)
    if device.target is None:
        return Tiles(rows, far_keys=16, near_keys=32, far_stages=1, near_stages=1, num_warps=1)
    if itemsize == 4:
        return Tiles(rows, far_keys=16, near_keys=16, far_stages=1, near_stages=3, num_warps=8)
    if device.target.backend == "hip":
        far_keys = 32 if head_size <= 128 else 16
        num_warps = 8 if rows > 32 else 4
        return Tiles(rows, far_keys=far_keys, near_keys=2 * far_keys, far_stages=2, near_stages=2, num_warps=num_warps)
    if head_size <= 128:
        num_warps = 8 if rows > 32 else 4
        # Told nothing, some versions of the compiler spill in loops of larger heads to fit a third program.
        most = None if head_size <= 64 else 255
        return Tiles(
            rows, far_keys=32, near_keys=64, far_stages=5, near_stages=5, num_warps=num_warps, most_registers=most
        )
    if is_fp8 and device.is_cuda(100):  # more spills there
        return Tiles(rows, far_keys=16, near_keys=16, far_stages=1, near_stages=3, num_warps=8)
    return Tiles(rows, far_keys=16, near_keys=32, far_stages=3, near_stages=3, num_warps=8)


class VarlenTiles(NamedTuple):
    """How `varlen_kernel` is cut: rows, as of `Tiles`, and keys of a tile, tiles on their way, and warps."""

    rows: int
    keys: int
    stages: int
    num_warps: int


def varlen_tiles(heads: int, head_size: int, itemsize: int, is_fp8: bool, device: Device) -> VarlenTiles:
    """Tiles for many queries per request; arguments as of `decode_tiles`."""
    at_least = triton.next_power_of_2(heads)
    if device.target is None:
        return VarlenTiles(max(64, at_least), keys=32, stages=1, num_warps=1)
    if itemsize == 4:  # without tensor cores, which would round
        return VarlenTiles(max(32, at_least), keys=16, stages=3, num_warps=8)
    if device.target.backend == "hip":
        return VarlenTiles(max(64, at_least), keys=64 if head_size <= 128 else 32, stages=2, num_warps=4)
    if device.has_wgmma and head_size <= 128:
        return VarlenTiles(128, keys=64, stages=5, num_warps=8)
    if device.has_wgmma:
        return VarlenTiles(128, keys=32, stages=3, num_warps=8)
    if head_size <= 64:
        return VarlenTiles(128, keys=64, stages=5, num_warps=8)
    if head_size <= 128:
        return VarlenTiles(max(64, at_least), keys=32, stages=5, num_warps=8 if is_fp8 else 4)
    return VarlenTiles(max(16 if device.is_cuda(120) else 32, at_least), keys=32, stages=3, num_warps=8)
