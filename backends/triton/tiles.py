"""How the attention kernel is cut into tiles, by head size and GPU; `benchmarks/triton_compile.py` shows what comes of it.

Chosen so that no register is spilled and shared memory suffices; nothing is tried out at serving time.
"""

import functools
from dataclasses import dataclass

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
        return self.target is not None and self.target.backend == "cuda" and self.target.arch >= 89


@functools.lru_cache
def find_device(device: torch.device) -> Device:
    """The GPU that tensors on `device` are on; on a CPU the interpreter, which counts as a small one."""
    if device.type == "cpu":
        return Device(None, 8)
    properties = torch.cuda.get_device_properties(device)
    return Device(triton.runtime.driver.active.get_current_target(), properties.multi_processor_count)


@dataclass(frozen=True)
class Tiles:
    """One launch's tiles.

    Attributes:
        rows: Queries times the query heads of a KV head.
        far_keys: Keys of a tile of the grouped run.
        near_keys: Keys of the other tiles, which hold cosines and sines as well.
        far_stages: What Triton calls `num_stages`: the grouped run has `ceil((far_stages - 2) / 2)` tiles on their way,
            since keys are found through the block table.
        near_stages: The same of the neighbors' tiles.
        num_warps: Of a program.

    """

    rows: int
    far_keys: int
    near_keys: int
    far_stages: int
    near_stages: int
    num_warps: int

    def constants(self) -> dict[str, int]:
        """What the kernel calls them."""
        return {
            "BLOCK_M": self.rows,
            "FAR_N": self.far_keys,
            "NEAR_N": self.near_keys,
            "FAR_STAGES": self.far_stages,
            "NEAR_STAGES": self.near_stages,
            "num_warps": self.num_warps,
        }


def decode_tiles(heads: int, head_size: int, itemsize: int, device: Device) -> Tiles:
    """Tiles for few queries a request, of `heads` query heads a KV head; `itemsize` is of a query's number."""
    # Tensor cores multiply 16 rows at least.
    rows = max(16, triton.next_power_of_2(heads))
    if device.target is None:
        return Tiles(rows, 32, 16, 1, 1, 1)
    return Tiles(rows, 64, 32, 5, 5, 4)


def prefill_tiles(heads: int, head_size: int, itemsize: int, device: Device) -> Tiles:
    """Tiles for many queries a request."""
    if device.target is None:
        return Tiles(max(64, triton.next_power_of_2(heads)), 32, 16, 1, 1, 1)
    rows = max(128, triton.next_power_of_2(heads))
    return Tiles(rows, 64, 32, 5, 5, 8)
