"""The machine a benchmark runs on: what it is, and what it does at best."""

import time
from collections.abc import Callable, Iterable

import torch
from rich.table import Table

VECTORS = ("avx2", "avx512_f", "avx512_bf16", "avx512_fp16", "amx_bf16", "neon", "sve", "bf16")
READ_BYTES = 1 << 30  # far more than any processor's caches hold
MATRIX_SIZE = 2048
SMALL_MATRIX_SIZE = 256


def device(threads: int) -> str:
    """The processor's model name and the number of threads, for people."""
    name = torch.cpu.get_capabilities().get("cpu_name", "CPU")
    return f"{name}, {threads} thread{'s' if threads > 1 else ''}"


def vector_extensions() -> list[str]:
    """Those of `VECTORS` that the processor has."""
    capabilities = torch.cpu.get_capabilities()
    return [name for name in VECTORS if capabilities.get(name)]


def table(threads: int, dtypes: Iterable[torch.dtype]) -> Table:
    """The machine as a benchmark's reader has to know it; measures for some seconds."""
    import vllm

    rows = Table(title="The machine", show_header=False)
    rows.add_row("processor", device(threads))
    rows.add_row("vector extensions", ", ".join(vector_extensions()))
    rows.add_row("torch, vLLM", f"{torch.__version__}, {vllm.__version__}")
    rows.add_row("reads memory at", f"{read_bandwidth():.1f} GB/s")
    for dtype in dtypes:
        rate, size = matmul_rate(dtype)
        rows.add_row(f"multiplies {str(dtype).removeprefix('torch.')}", f"at {rate:,.0f} GFLOP/s ({size} x {size})")
    return rows


def read_bandwidth() -> float:
    """How fast all of torch's threads together read memory, GB/s."""
    buffer = torch.ones(READ_BYTES // 4)
    return READ_BYTES / _shortest(buffer.sum) / 1e9


def matmul_rate(dtype: torch.dtype) -> tuple[float, int]:
    """The rate of a square matrix product with all of torch's threads, GFLOP/s, and the size it was measured at.

    Processors without instructions for `dtype` can be a hundred times slower at it; there a small product has to do.
    """
    size = SMALL_MATRIX_SIZE
    seconds = _product_seconds(size, dtype)
    if seconds * (MATRIX_SIZE / size) ** 3 < 2.0:
        size = MATRIX_SIZE
        seconds = _product_seconds(size, dtype)
    return 2 * size**3 / seconds / 1e9, size


def _product_seconds(size: int, dtype: torch.dtype) -> float:
    left, right = torch.randn(2, size, size).to(dtype)
    return _shortest(lambda: left @ right)


def _shortest(call: Callable[[], object], repeats: int = 3) -> float:
    """The shortest of some calls, in seconds: what the machine can do. The first one, a warm-up, is not counted."""
    times = []
    for _ in range(repeats + 1):
        begin = time.perf_counter()
        call()
        times.append(time.perf_counter() - begin)
    return min(times[1:])
