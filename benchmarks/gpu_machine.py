"""The GPU a benchmark runs on: what it is, what it does at best, and how calls are timed on it."""

import statistics
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import triton
from rich.table import Table

MOST_BUFFER_BYTES = 4 << 30  # far more than any GPU's caches hold
MATRIX_SIZE = 8192

ENOUGH_MS = 100.0
ROUNDS = 10


@dataclass(frozen=True)
class Machine:
    """What the GPU is called and what it was measured to do."""

    device: str
    l2_bytes: int
    copies_gb_per_s: float
    reads_gb_per_s: float
    matrix_tflop_per_s: float

    def bound_ms(self, num_bytes: float, operations: float) -> float:
        """The time below which memory and matrix units, each at its measured best, cannot do it."""
        return max(num_bytes / self.copies_gb_per_s / 1e6, operations / self.matrix_tflop_per_s / 1e9)


def measure(dtype: torch.dtype) -> Machine:
    """Measure the current GPU; takes some seconds."""
    properties = torch.cuda.get_device_properties()
    return Machine(properties.name, properties.L2_cache_size, *_bandwidths(), _matrix_rate(dtype))


def _bandwidths() -> tuple[float, float]:
    """Of a copy, bytes read and bytes written, and of a sum, GB/s."""
    num_bytes = min(MOST_BUFFER_BYTES, torch.cuda.mem_get_info()[0] // 4)
    source = torch.ones(num_bytes // 4, device="cuda")
    target = torch.empty_like(source)
    copy_ms, read_ms = medians([lambda: target.copy_(source), source.sum])
    return 2 * num_bytes / copy_ms / 1e6, num_bytes / read_ms / 1e6


def _matrix_rate(dtype: torch.dtype) -> float:
    """Of a product of square matrices, TFLOP/s."""
    left, right = torch.randn(2, MATRIX_SIZE, MATRIX_SIZE, device="cuda").to(dtype)
    return 2 * MATRIX_SIZE**3 / medians([lambda: left @ right])[0] / 1e9


def table(machine: Machine, dtype: torch.dtype) -> Table:
    """The machine as a benchmark's reader has to know it."""
    properties = torch.cuda.get_device_properties()
    rows = Table(title="The machine", show_header=False)
    rows.add_row("GPU", f"{machine.device}, compute capability {properties.major}.{properties.minor}")
    rows.add_row("multiprocessors", str(properties.multi_processor_count))
    rows.add_row("memory, L2 cache", f"{properties.total_memory / 1e9:.0f} GB, {machine.l2_bytes / 1e6:.0f} MB")
    platform = f"ROCm {torch.version.hip}" if torch.version.hip else f"CUDA {torch.version.cuda}"
    rows.add_row("torch, Triton", f"{torch.__version__} for {platform}, {triton.__version__}")
    rows.add_row("driver", driver())
    rows.add_row("copies memory at", f"{machine.copies_gb_per_s:,.0f} GB/s, read and written")
    rows.add_row("reads memory at", f"{machine.reads_gb_per_s:,.0f} GB/s")
    rate = f"at {machine.matrix_tflop_per_s:,.0f} TFLOP/s ({MATRIX_SIZE} x {MATRIX_SIZE})"
    rows.add_row(f"multiplies {str(dtype).removeprefix('torch.')}", rate)
    return rows


def driver() -> str:
    """The driver's version, as far as NVIDIA's own tool tells it."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, check=True, text=True).stdout.split()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        return "unknown"


def medians(calls: Sequence[Callable[[], object]]) -> list[float]:
    """The median time of each call on the GPU, ms; they are called in turns, after one round that is not counted.

    There are `ROUNDS` rounds, and more while they take less than `ENOUGH_MS` together. Nothing waits within them, so
    that the GPU never waits for Python where a call takes it longer than Python takes to launch it.
    """
    for call in calls:
        call()
    times: list[list[float]] = []
    while len(times) < ROUNDS or sum(map(sum, times)) < ENOUGH_MS:
        stamps = [[_stamped(call) for call in calls] for _ in range(ROUNDS)]
        torch.cuda.synchronize()
        times += [[begin.elapsed_time(end) for begin, end in one] for one in stamps]
    return [statistics.median(column) for column in zip(*times, strict=True)]


def _stamped(call: Callable[[], object]) -> tuple[torch.cuda.Event, torch.cuda.Event]:
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    call()
    end.record()
    return begin, end
