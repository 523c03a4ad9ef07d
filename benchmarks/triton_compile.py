"""Compile the Triton kernels for GPUs that need not be there: `python -m benchmarks.triton_compile`.

Every specialisation that serving a common model would compile is compiled, for each target, from the very launches that
serving makes, on tensors without data. Shown are registers, spills, shared memory, how many programs fit on a
multiprocessor (NVIDIA's), and which matrix instructions the first loop has. The exit code is 1 if a loop that can be
long spills or one has no matrix instructions, if shared memory does not suffice, or if a kernel does not compile.

Machine code is disassembled with the tools that Triton brings along. A loop is what lies between a label and a jump
back to it. Those with matrix instructions are, in their order, a decode's of the grouped keys, of mixed tiles, of
neighbors and of the last ones; a prefill's of the window's edge, of what every row sees, and of the last ones.
"""

import json
import os
import re
import subprocess
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any, NamedTuple
from unittest import mock

os.environ.pop("TRITON_INTERPRET", None)  # kernels defined under it cannot be compiled

import rich.box
import torch
import triton
import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table

from benchmarks.no_device import TARGETS, NoDevice
from vllm_selfextend.backends.interface import AttentionBatch, AttentionParams, GroupSizes, Rotation
from vllm_selfextend.backends.triton.buffers import Room
from vllm_selfextend.backends.triton.launches import LayerKernel
from vllm_selfextend.backends.triton.layer import TritonLayer

SHARED_MEMORY_KIB = {"sm_80": 163, "sm_89": 99, "sm_90": 227, "sm_100": 227, "sm_120": 99, "gfx942": 64}
"""What a program can have: CUDA C++ Programming Guide, compute capabilities; CDNA 3 instruction set, LDS."""

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "fp8": torch.bfloat16, "float32": torch.float32}
"""Of the queries, by the name of the cache's; fp8 is beside bfloat16."""

STEPS = {"split decode": (4, 1), "decode": (256, 1), "prefill": (1, 4096)}
"""Requests, and new tokens of each. A short batch of decodes shares contexts among programs, a long one does not."""

CONTEXT, TRAINED_LENGTH, NEIGHBOR_WINDOW = 16384, 14336, 1024
"""A prefill is on both sides of the trained length."""

REGISTERS = 65536
"""Of a multiprocessor of NVIDIA's."""

ALL = list(TARGETS)
HEAD_SIZES = [64, 80, 96, 128, 256]
CACHES = ["bfloat16", "float16", "fp8"]

NUM_LOOPS = {"decode": (2, 4), "varlen": (2, 3)}
"""With matrix instructions, of the kernels that have any: without group sizes or a window, with them."""

MATRIX = re.compile(r"\b(HGMMA|HMMA|UTC\w*MMA|v_mfma)")
SPILL = re.compile(r"\b(STL|LDL|scratch_store\w*|scratch_load\w*)\b")
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"

console = Console()


class Launch(NamedTuple):
    """A kernel of a layer, and what a step calls it with."""

    kernel: LayerKernel
    step: tuple[Any, ...]


@dataclass(frozen=True)
class Specialisation:
    """What is compiled: a launch of a step of a model's layer."""

    target: str
    head_size: int
    cache: str
    step: str
    heads: int
    is_grouped: bool
    is_interleaved: bool

    def launches(self) -> Iterator[Launch]:
        """The launches of the step, each kernel's first."""
        dtype, num_kv_heads = DTYPES[self.cache], 8
        num_reqs, query_len = STEPS[self.step]
        num_tokens = num_reqs * query_len

        def empty(*shape: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
            return torch.empty(shape, dtype=dtype, device="meta")

        batch = AttentionBatch(
            query_start_loc=empty(num_reqs + 1),
            seq_lens=empty(num_reqs),
            block_table=empty(num_reqs, 1024),
            slot_mapping=empty(num_tokens, dtype=torch.int64),
            max_query_len=query_len,
            max_seq_len=CONTEXT,
            query_start_loc_cpu=torch.arange(num_reqs + 1) * query_len,
            seq_lens_cpu=torch.full([num_reqs], CONTEXT),
        )
        eighths = torch.full([CONTEXT], 8)
        eighths[TRAINED_LENGTH:] = 24
        sizes = GroupSizes.of(eighths, "meta") if self.is_grouped else None
        params = AttentionParams(
            scale=self.head_size**-0.5,
            group_sizes=sizes,
            neighbor_window=NEIGHBOR_WINDOW,
            log_scale_len=TRAINED_LENGTH if self.is_grouped else 0,
            rotation=Rotation(empty(65536, self.head_size, dtype=torch.float32), self.is_interleaved),
        )
        cache_dtype = torch.uint8 if self.cache == "fp8" else dtype
        kv_cache = empty(4096, num_kv_heads, 16, 2 * self.head_size, dtype=cache_dtype)
        query = empty(num_tokens, self.heads * num_kv_heads, self.head_size, dtype=dtype)
        found: dict[int, Launch] = {}

        def record(kernel: LayerKernel, grid: tuple[int, int, int], step: tuple[Any, ...]) -> None:
            found.setdefault(id(kernel), Launch(kernel, step))

        layer = TritonLayer(params, device=TARGETS[self.target], room=Room(8192, 8192))
        with mock.patch.object(LayerKernel, "__call__", record), mock.patch.object(LayerKernel, "compile"):
            layer.attend(query, kv_cache, batch, torch.empty_like(query))
        yield from found.values()


@dataclass(frozen=True)
class Compiled:
    """What came of a launch; spills are instructions that store registers to memory or load them back."""

    specialisation: Specialisation
    kernel: str
    detail: str
    tiles: str
    registers: int
    spills: int
    shared_memory: int
    num_warps: int
    loops: list[dict[str, Any]] = field(default_factory=list)

    @property
    def long_loops(self) -> list[dict[str, Any]]:
        """Those of tiles that every row sees, the others being few; all, where a compiler has made others of them."""
        return self.loops[-2::-2] if len(self.loops) in NUM_LOOPS.get(self.kernel, ()) else self.loops

    @property
    def programs(self) -> int:
        """How many fit on a multiprocessor; 0: not known. Registers are given in pieces of 8 a thread."""
        if not self.specialisation.target.startswith("sm_"):
            return 0
        by_registers = REGISTERS // (32 * self.num_warps * -(-self.registers // 8) * 8)
        shared = 1024 * (SHARED_MEMORY_KIB[self.specialisation.target] + 1)
        return min(by_registers, shared // (self.shared_memory + 1024))

    @property
    def problems(self) -> list[str]:
        """What must not be."""
        found = []
        limit = 1024 * SHARED_MEMORY_KIB[self.specialisation.target]
        if self.shared_memory > limit:
            found.append(f"shared memory {self.shared_memory} of {limit} bytes")
        if self.kernel in NUM_LOOPS and self.specialisation.cache != "float32":
            if len(self.loops) < min(NUM_LOOPS[self.kernel]):
                found.append(f"{len(self.loops)} loops with matrix instructions")
            elif spills := sum(loop["spills"] for loop in self.long_loops):
                found.append(f"{spills} spills in loops that can be long")
        return found


def compile_all(one: Specialisation) -> list[Compiled]:
    """Compile the launches of a specialisation."""
    target = TARGETS[one.target].target
    triton.runtime.driver.set_active(NoDevice(target))
    compiled = []
    for launch in one.launches():
        kernel = launch.kernel.kernel
        kernel.device_caches.clear()  # kernels compiled for another target
        binary = launch.kernel.compile(*launch.step)
        constants = launch.kernel.constants
        shape = ("BLOCK_M", "FAR_N", "NEAR_N") if "FAR_N" in constants else ("BLOCK_M", "BLOCK_N")
        tiles = [constants.get(name, 0) for name in (*shape, "num_warps")]
        code = disassemble(binary)
        compiled.append(
            Compiled(
                one,
                kernel=kernel.__name__.removesuffix("_kernel"),
                detail=_detail(constants),
                tiles="x".join(map(str, tiles)) if all(tiles) else "",
                registers=count_registers(binary),
                spills=len(SPILL.findall(code)),
                shared_memory=binary.metadata.shared,
                num_warps=binary.metadata.num_warps,
                loops=matrix_loops(code),
            )
        )
    return compiled


def _detail(constants: dict[str, Any]) -> str:
    """Which of a prefill's calls it is."""
    if "IS_CAUSAL" not in constants:
        return ""
    if constants["BLOCK_SIZE"]:
        return ", window" if constants["WINDOW"] else ", causal"
    return ", turned, causal" if constants["IS_CAUSAL"] else ", turned"


def disassemble(binary: Any) -> str:
    """A compiled kernel's machine code as text."""
    return binary.asm["amdgcn"] if "amdgcn" in binary.asm else _run_tool("nvdisasm", "-c", binary)


def count_registers(binary: Any) -> int:
    """Registers of a thread."""
    if "amdgcn" in binary.asm:
        found = re.search(r"\.vgpr_count:\s+(\d+)", binary.asm["amdgcn"])
    else:
        found = re.search(r"REG:(\d+)", _run_tool("cuobjdump", "-res-usage", binary))
    if found is None:
        raise RuntimeError("The disassembler does not say how many registers the kernel has.")
    return int(found[1])


def _run_tool(name: str, option: str, binary: Any) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary.asm["cubin"])
        file.flush()
        return subprocess.run([TOOLS / name, option, file.name], capture_output=True, text=True, check=True).stdout


def matrix_loops(code: str) -> list[dict[str, Any]]:
    """The innermost loops that have matrix instructions, in their order: what they have, how many, and spills."""
    lines = code.splitlines()
    labels = {match[1]: n for n, line in enumerate(lines) if (match := re.match(r"\s*(\.L\w+):", line))}
    jumps = [
        (n, match[1])
        for n, line in enumerate(lines)
        if (match := re.search(r"\bs?_?c?BRA\w*\W.*?(\.L\w+)", line, re.I))
    ]
    spans = sorted({(labels[label], n) for n, label in jumps if labels.get(label, n) < n})
    inner = [
        (begin, end)
        for begin, end in spans
        if not any((begin, end) != other and begin <= other[0] and other[1] <= end for other in spans)
    ]
    loops = []
    for begin, end in inner:
        body = "\n".join(lines[begin:end])
        if matrix := MATRIX.findall(body):
            loops.append({"instruction": matrix[0], "count": len(matrix), "spills": len(SPILL.findall(body))})
    return loops


def make_row(one: Compiled) -> dict[str, Any]:
    """A kernel's line in the JSON file."""
    row = asdict(one)
    return {**row.pop("specialisation"), **row, "problems": one.problems}


def result_table(target: str, results: list[Compiled]) -> Table:
    """What became of the attention kernels, for people."""
    title = f"{target} ({SHARED_MEMORY_KIB[target]} KiB of shared memory per program)"
    table = Table(title=title, box=rich.box.SIMPLE_HEAD, collapse_padding=True, pad_edge=False)
    table.add_column("cache")
    table.add_column("head\nsize", justify="right")
    table.add_column("step", no_wrap=True)
    table.add_column("tile\nx warps", justify="right", no_wrap=True)
    for name in ("regis-\nters", "spills,\nin loops", "KiB", "pro-\ngrams"):
        table.add_column(name, justify="right")
    table.add_column("in the\nfirst loop", no_wrap=True)
    for one in results:
        first = one.loops[0] if one.loops else {"instruction": ""}
        table.add_row(
            one.specialisation.cache,
            str(one.specialisation.head_size),
            f"{one.specialisation.step}{one.detail}",
            one.tiles,
            str(one.registers),
            f"{one.spills}, {sum(loop['spills'] for loop in one.loops)}",
            f"{one.shared_memory / 1024:.0f}",
            str(one.programs or ""),
            str(first["instruction"]),
        )
    return table


def main(
    target: Annotated[list[str], typer.Option(help=f"Of {', '.join(TARGETS)}; may be given more than once.")] = ALL,
    head_size: Annotated[list[int], typer.Option(help="May be given more than once.")] = HEAD_SIZES,
    cache: Annotated[list[str], typer.Option(help=f"Of {', '.join(DTYPES)}; may be given more than once.")] = CACHES,
    heads: Annotated[int, typer.Option(min=1, help="Query heads per KV head.")] = 4,
    grouped: Annotated[bool, typer.Option(help="With group sizes, or as ordinary attention.")] = True,
    interleaved: Annotated[bool, typer.Option("--interleaved", help="Rotated pairs lie side by side.")] = False,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write one JSON line per kernel to this file.")
    ] = None,
) -> None:
    """Compile Self-Extend's Triton kernels for GPUs that need not be there."""
    for chosen, known in ((target, list(TARGETS)), (cache, list(DTYPES))):
        for name in chosen:
            if name not in known:
                raise typer.BadParameter(f"{name!r} is not one of {', '.join(known)}.")
    todo = [
        Specialisation(one, size, kind, step, heads, grouped, interleaved)
        for one in target
        for kind in cache
        for size in head_size
        for step in STEPS
    ]
    console.print(f"Triton {triton.__version__}; {heads} query heads per KV head")
    with ProcessPoolExecutor() as pool:
        done = track(pool.map(compile_all, todo), "compiling", total=len(todo), console=Console(stderr=True))
        results = [compiled for several in done for compiled in several]
    if json_file is not None:
        json_file.write_text("".join(json.dumps(make_row(one)) + "\n" for one in results), encoding="utf-8")
    for name in target:
        of_target = [one for one in results if one.specialisation.target == name]
        console.print(result_table(name, [one for one in of_target if one.kernel in NUM_LOOPS]))
        others = [one for one in of_target if one.kernel not in NUM_LOOPS]
        registers, spills = max(one.registers for one in others), sum(one.spills for one in others)
        console.print(f"{len(others)} kernels that turn and join: at most {registers} registers, {spills} spills.\n")
    problems = [(one, problem) for one in results for problem in one.problems]
    for one, problem in problems:
        console.print(f"{one.specialisation}: {one.kernel}: {problem}", style="red")
    if problems:
        raise typer.Exit(1)
    console.print(f"{len(results)} kernels: no spills in the loops that can be long, shared memory suffices.")


if __name__ == "__main__":
    typer.run(main)
