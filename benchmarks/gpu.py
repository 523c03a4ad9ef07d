"""Our Triton kernels on a GPU: are they right, and how near do they come to what it can do? `python -m benchmarks.gpu`.

Needs torch, triton, typer and rich, neither vLLM nor an installed package. Correctness first (`tests/gpu`), then
decode and prefill, one layer's call each; a prefill on FlashAttention where there is one (vLLM's, or a package `fa3`):

- **Bound** is a time that cannot be beaten: bytes over the GPU's measured bandwidth (of a copy) or operations
  over its measured matrix rate, whichever is longer. Bytes are those of keys, values, queries and outputs, once each;
  cosines and sines, a row per tile of grouped keys and a few that all tiles share, lie in caches and do not count.
- **Ordinary** is ours on the same cache without group sizes: ordinary attention, a prefill's FlashAttention alone.
- **Turning** is a prefill without its attention: queries and keys turned, values copied, answers joined.
- **Others** (`gpu_others.py`) read the same cache, as far as they are installed; for prefill also PyTorch's attention
  on contiguous copies. Each must give our ordinary answer. The fastest one's time is shown.

Every system is a CUDA graph of some calls, as vLLM replays them, so that no time of Python's is measured. The calls of
a graph read several caches in turn, so that short contexts do not stay in the L2 cache. Systems are replayed in turns,
and a time is the median. A missed aim is reported; only a wrong answer fails the run. Without a GPU, Triton's
interpreter can do a cut `--correctness-only`, which tests this script (`TRITON_INTERPRET=1`, a minute).
"""

import dataclasses
import functools
import itertools
import json
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import rich.box
import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from benchmarks import gpu_correctness, gpu_machine, gpu_others
from benchmarks.layers import (
    DType,
    Heads,
    check_same,
    dtype_name,
    extended_layer,
    make_batch,
    three_digits,
)
from tests.gpu.checks import NUM_LAYERS, NUM_SMALL_LAYERS, checks
from tests.gpu.flash import find_attention
from tests.gpu.graphs import capture
from vllm_selfextend.backends import choose_kernels
from vllm_selfextend.backends.interface import AttentionBatch, AttentionParams, Host, Kernels

L2_CACHES = 3  # what a graph's calls read, in L2 caches
MOST_COPIES = 16
ENOUGH_GRAPH_MS = 0.5  # a graph much shorter than that would wait for its launch
MOST_CALLS = 200
SPARE_BYTES = 6 << 30

console = Console()
errors = Console(stderr=True)


class Load(NamedTuple):
    """One step's requests, all alike; `context` is the tokens of a request in the cache, the new ones included."""

    phase: str
    batch: int
    query_len: int
    context: int
    is_fp8: bool = False

    def __str__(self) -> str:
        return f"{self.phase} {self.batch} x {self.query_len:,} of {self.context:,} tokens"


DECODE = tuple(
    Load("decode", batch, 1, context)
    for batch, context in itertools.product((1, 16, 64, 256), (4096, 16384, 32768, 131072))
)
DECODE_FP8 = tuple(
    Load("decode", batch, 1, context, is_fp8=True) for batch, context in ((1, 131072), (16, 32768), (64, 16384))
)
PREFILL = tuple(
    Load("prefill", 1, query_len, before + query_len)
    for query_len, before in itertools.product((2048, 8192), (0, 8192, 32768, 131072))
)
LOADS = {"decode": (*DECODE, *DECODE_FP8), "prefill": PREFILL}
QUICK_LOADS = {
    "decode": (Load("decode", 1, 1, 16384), Load("decode", 64, 1, 16384), Load("decode", 64, 1, 16384, is_fp8=True)),
    "prefill": (Load("prefill", 1, 8192, 8192), Load("prefill", 1, 2048, 32768 + 2048)),
}


@dataclass(frozen=True)
class Case:
    """What is timed: a load on a layer."""

    load: Load
    heads: Heads
    dtype: torch.dtype
    trained_length: int
    block_size: int

    @property
    def is_extended(self) -> bool:
        """Whether anything is past the trained length."""
        return self.load.context > self.trained_length

    @property
    def cache_dtype(self) -> torch.dtype:
        return torch.float8_e4m3fn if self.load.is_fp8 else self.dtype

    @property
    def num_blocks(self) -> int:
        """Cache blocks of one request."""
        return -(-self.load.context // self.block_size)

    @property
    def block_shape(self) -> tuple[int, int, int]:
        return self.heads.num_kv_heads, self.block_size, 2 * self.heads.head_size

    @property
    def cache_bytes(self) -> int:
        """The cache of the load's requests."""
        return self.load.batch * self.num_blocks * math.prod(self.block_shape) * self.cache_dtype.itemsize

    @property
    def num_bytes(self) -> int:
        """Bytes that have to be read and written."""
        _, batch, query_len, context, _ = self.load
        num_heads, num_kv_heads, head_size = self.heads
        token = 2 * num_kv_heads * head_size
        queries_and_outputs = 2 * batch * query_len * num_heads * head_size * self.dtype.itemsize
        return batch * context * token * self.cache_dtype.itemsize + queries_and_outputs

    @property
    def operations(self) -> float:
        """Floating-point operations of the two products."""
        _, batch, query_len, context, _ = self.load
        visible = query_len * context - query_len * (query_len - 1) / 2
        return 4.0 * self.heads.head_size * self.heads.num_heads * batch * visible

    def copies(self, l2_bytes: int) -> int:
        """How many different inputs take turns; a prefill is not over before it has swept the L2 cache by itself."""
        if self.load.phase == "prefill":
            return 1
        return min(MOST_COPIES, -(-L2_CACHES * l2_bytes // self.num_bytes))

    def params(self, device: torch.device) -> AttentionParams:
        """The layer."""
        return extended_layer(self.heads.head_size, self.load.context, self.trained_length, device)

    def make_cache(self, num_blocks: int, device: torch.device) -> torch.Tensor:
        """Random keys and values: how they got there makes no difference to a reader's time."""
        cache = torch.empty(num_blocks, *self.block_shape, dtype=self.cache_dtype, device=device)
        for part in cache.split(4096):
            part.copy_(torch.randn(part.shape, device=device))
        return cache.view(torch.uint8) if self.load.is_fp8 else cache

    def make_step(self, block_table: torch.Tensor) -> AttentionBatch:
        """The step in which the last `query_len` tokens of each request in `block_table` are new."""
        return make_batch(block_table, self.load.context, self.load.query_len, self.block_size)

    def draw(self, num_heads: int, device: torch.device) -> torch.Tensor:
        """Random queries, keys or values of a step's new tokens."""
        shape = self.load.batch * self.load.query_len, num_heads, self.heads.head_size
        return torch.randn(shape, device=device).to(self.dtype)


class Times(NamedTuple):
    """What came of a case, ms; a decode has no time of turning. `notes` says who else has no time, and why."""

    self_extend: float
    ordinary: float
    turning: float | None
    others: dict[str, float]
    notes: dict[str, str]


def measure(case: Case, kernels: Kernels, machine: gpu_machine.Machine, device: torch.device) -> Times:
    """Time a case."""
    copies, batch = case.copies(machine.l2_bytes), case.load.batch
    num_blocks = copies * batch * case.num_blocks
    cache = case.make_cache(num_blocks, device)
    tables = torch.randperm(num_blocks, dtype=torch.int32, device=device).view(copies, batch, case.num_blocks)
    params = case.params(device)
    ordinary_params = dataclasses.replace(params, group_sizes=None, rotation=None)
    is_prefill = case.load.phase == "prefill"
    host = Host(attention=find_attention(params, case.heads.head_size, case.dtype))
    size = kernels.workspace_size(*case.heads, case.dtype, device, host)
    workspace = torch.empty(size, dtype=torch.uint8, device=device)
    steps = [case.make_step(table) for table in tables]
    layers = [kernels.prepare(params, host), kernels.prepare(ordinary_params, host)]
    if is_prefill:
        layers.append(kernels.prepare(params, Host(attention=no_attention)))
    queries = [case.draw(case.heads.num_heads, device) for _ in steps]
    outs = [torch.empty_like(query) for query in queries]
    systems = [
        [
            functools.partial(layer.attend, query, cache, step, out, workspace)
            for query, step, out in zip(queries, steps, outs, strict=True)
        ]
        for layer in layers
    ]
    num_calls = min(MOST_CALLS, math.ceil(ENOUGH_GRAPH_MS / machine.bound_ms(case.num_bytes, case.operations)))
    num_calls = max(copies, num_calls)
    graphs = [capture_turns(calls, num_calls) for calls in systems]
    kept_alive: list[list[gpu_others.Call]] = []  # by their calls, tensors that a graph uses
    names, notes = [], {}
    for name, other in others_of(case).items():
        try:
            calls = [other(query, cache, step, case.load.context) for query, step in zip(queries, steps, strict=True)]
            systems[1][0]()
            check_same("its answer", calls[0](), outs[0])
            graphs.append(capture_turns(calls, num_calls))
            kept_alive.append(calls)
            names.append(name)
        except Exception as error:  # what another library cannot do is no reason to stop
            notes[name] = (str(error).strip() or type(error).__name__).splitlines()[0]
    times = [time / num_calls for time in gpu_machine.medians(graphs)]
    ours, rest = times[: len(systems)], times[len(systems) :]
    others = dict(zip(names, rest, strict=True))
    return Times(ours[0], ours[1], ours[2] if is_prefill else None, others, notes)


def no_attention(*arguments: Any, **options: Any) -> torch.Tensor:
    """Stands in for FlashAttention: the log-sum-exp's room, as it is."""
    lse: torch.Tensor = arguments[4]
    return lse


def capture_turns(calls: Sequence[Callable[[], object]], num_calls: int) -> Callable[[], None]:
    """`num_calls` calls, these in turns, as one graph."""
    return capture(list(itertools.islice(itertools.cycle(calls), num_calls)))


def others_of(case: Case) -> dict[str, gpu_others.Other]:
    """Whom a case is measured against, besides ourselves."""
    if case.load.is_fp8:
        return {}
    return gpu_others.DECODE if case.load.phase == "decode" else gpu_others.PREFILL


class Result(NamedTuple):
    """A case, the time that cannot be beaten and its times, ms."""

    case: Case
    bound: float
    times: Times

    @property
    def fastest(self) -> tuple[str, float] | None:
        """The fastest of the others."""
        return min(self.times.others.items(), key=lambda item: item[1], default=None)

    def row(self, device: str) -> dict[str, Any]:
        """Its line in the JSON file."""
        case = self.case
        return {
            "device": device,
            "dtype": dtype_name(case.dtype),
            "cache_dtype": dtype_name(case.cache_dtype),
            **{name: value for name, value in case.load._asdict().items() if name != "is_fp8"},
            **case.heads._asdict(),
            "trained_length": case.trained_length,
            "block_size": case.block_size,
            "bytes": case.num_bytes,
            "operations": case.operations,
            "bound_ms": self.bound,
            "self_extend_ms": self.times.self_extend,
            "ordinary_ms": self.times.ordinary,
            "turning_ms": self.times.turning,
            "others_ms": self.times.others,
            "others_missing": self.times.notes,
        }


def result_table(phase: str, results: Sequence[Result]) -> Table:
    """Times, rates and ratios of one phase and cache dtype, for people."""
    case = results[0].case
    unit = "TFLOP/s" if phase == "prefill" else "GB/s"
    shape = {"decode": ("batch", "context"), "prefill": ("new", "context")}[phase]
    cache = f", {dtype_name(case.cache_dtype)} cache" if case.load.is_fp8 else ""
    title = f"{phase}, {dtype_name(case.dtype)}{cache}, {case.heads}, trained length {case.trained_length:,}"
    columns = [*shape, "bound\nms", "ours\nms", f"ours\n{unit}", "of\nbound"]
    columns += ["ordinary\nms", "of\nordinary"]
    if phase == "prefill":
        columns += ["turning\nms"]
    if any(result.fastest for result in results):
        columns += ["of\nother", "other\nms", "fastest\nother"]
    table = _table(title)
    for name in columns:
        table.add_column(name, justify="left" if name.startswith("fastest") else "right")
    for result in results:
        load, ours = result.case.load._asdict(), result.times.self_extend
        load["new"] = load["query_len"]
        done = result.case.operations / 1e3 if phase == "prefill" else result.case.num_bytes
        cells = [f"{load[name]:,}" for name in shape]
        cells += [three_digits(number, 4) for number in (result.bound, ours, done / ours / 1e6)]
        cells += [f"{result.bound / ours:.2f}"]
        ordinary, turning = result.times.ordinary, result.times.turning
        cells += [three_digits(ordinary, 4), f"{ordinary / ours:.2f}"]
        if turning is not None:
            cells += [three_digits(turning, 4)]
        if result.fastest:
            which, other = result.fastest
            cells += [f"{other / ours:.2f}", three_digits(other, 4), which]
        table.add_row(*cells)
    return table


def _table(title: str) -> Table:
    """A table whose columns fit into 80 characters."""
    return Table(title=title, box=rich.box.SIMPLE_HEAD, padding=0, pad_edge=False)


def aims_table(results: Sequence[Result], machine: gpu_machine.Machine) -> Table:
    """What the project wants of its kernels (fp8 caches aside), and what the worst case gave."""
    decodes = [result for result in results if result.case.load in DECODE and result.case.load.context >= 16384]
    prefills = [result for result in results if result.case.load.phase == "prefill"]
    bandwidth = [
        (result.case.num_bytes / result.times.self_extend / 1e6 / machine.copies_gb_per_s, result) for result in decodes
    ]
    flash = [
        (r.times.others["vLLM Flash"] / r.times.self_extend, r) for r in prefills if "vLLM Flash" in r.times.others
    ]
    aims = (
        ("decode from 16k on, of copies' bandwidth", 0.85, bandwidth),
        ("decode from 16k on, of ordinary", 0.9, [(r.times.ordinary / r.times.self_extend, r) for r in decodes]),
        ("prefill, of vLLM's FlashAttention", 0.85, [pair for pair in flash if pair[1].case.is_extended]),
        ("the same within the trained length", 0.97, [pair for pair in flash if not pair[1].case.is_extended]),
    )
    table = _table("Aims")
    for name in ("speed", "aim", "worst", "met", "worst case"):
        table.add_column(name)
    for name, aim, ratios in aims:
        if ratios:
            worst, result = min(ratios, key=lambda pair: pair[0])
            load = result.case.load
            at = f"{load.batch} x {load.query_len:,} of {load.context:,}"
            table.add_row(name, f"{aim:.2f}", f"{worst:.2f}", "yes" if worst >= aim else "no", at)
    return table


class Output:
    """Where results go as they come: lines of JSON, if a file is named, and a progress bar."""

    def __init__(self, json_file: Path | None) -> None:
        self.json_file = json_file
        if json_file is not None:
            json_file.write_text("", encoding="utf-8")

    def write(self, row: dict[str, Any]) -> None:
        """Line by line: a run that is ended early leaves what it has."""
        if self.json_file is not None:
            with self.json_file.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")

    def progress(self) -> Progress:
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        return Progress(*columns, console=errors)


def run_phase(
    phase: str,
    cases: Sequence[Case],
    kernels: Kernels,
    machine: gpu_machine.Machine,
    device: torch.device,
    output: Output,
) -> list[Result]:
    """Time and print."""
    results: list[Result] = []
    lines: dict[str, str] = {}  # each once
    with output.progress() as progress:
        bar = progress.add_task(phase, total=len(cases))
        for case in cases:
            progress.update(bar, description=str(case.load))
            torch.cuda.empty_cache()
            missing = case.copies(machine.l2_bytes) * case.cache_bytes + SPARE_BYTES - torch.cuda.mem_get_info()[0]
            if missing > 0:
                lines[str(case.load)] = f"Left out for {missing / 1e9:,.0f} GB of memory more: {case.load}."
            else:
                bound = machine.bound_ms(case.num_bytes, case.operations)
                result = Result(case, bound, measure(case, kernels, machine, device))
                results.append(result)
                output.write(result.row(machine.device))
                lines |= {why: f"No time of {name}: {why}" for name, why in result.times.notes.items()}
            progress.advance(bar)
    for is_fp8 in (False, True):
        alike = [result for result in results if result.case.load.is_fp8 == is_fp8]
        if alike:
            console.print(result_table(phase, alike))
    for line in lines.values():
        console.print(line, markup=False)
    return results


def main(
    suite: Annotated[Literal["correctness", "decode", "prefill", "all"], typer.Option(help="What to do.")] = "all",
    correctness_only: Annotated[
        bool, typer.Option("--correctness-only", help="The same as --suite correctness.")
    ] = False,
    quick: Annotated[bool, typer.Option("--quick", help="Fewer cases.")] = False,
    dtype: Annotated[DType, typer.Option(help="Of what is timed, as all that follows.")] = DType.BFLOAT16,
    num_heads: Annotated[int, typer.Option(min=1)] = 32,
    num_kv_heads: Annotated[int, typer.Option(min=1)] = 8,
    head_size: Annotated[int, typer.Option(min=1)] = 128,
    trained_length: Annotated[int, typer.Option(min=4, help="Longer contexts have grouped positions.")] = 8192,
    block_size: Annotated[int, typer.Option(min=16, help="Tokens per cache block.")] = 16,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write one JSON line per case to this file.")] = None,
) -> None:
    """Check and time the kernels for GPUs on this machine's."""
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    suite = "correctness" if correctness_only else suite
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu" and not (suite == "correctness" and os.environ.get("TRITON_INTERPRET") == "1"):
        errors.print(
            "There is no GPU here that torch can use; without one only --correctness-only runs, if Triton is to "
            "interpret (TRITON_INTERPRET=1)."
        )
        raise typer.Exit(1)
    kernels = choose_kernels("triton", device).kernels
    torch.manual_seed(0)
    output = Output(json_file)
    all_right = True
    if suite in ("correctness", "all"):
        small = device.type == "cpu"
        num_layers = NUM_SMALL_LAYERS if quick or small else NUM_LAYERS
        todo = checks(small=small, num_layers=num_layers)
        if not small:
            gpu_correctness.compile_all(todo, device, output.progress())
        all_right = gpu_correctness.run(todo, kernels, device, console, output.progress(), output.write)
    if suite != "correctness":
        timed = getattr(torch, dtype.value)
        machine = gpu_machine.measure(timed)
        console.print(gpu_machine.table(machine, timed))
        layer = Heads(num_heads, num_kv_heads, head_size), timed, trained_length, block_size
        results: list[Result] = []
        for phase, loads in (QUICK_LOADS if quick else LOADS).items():
            if suite in (phase, "all"):
                cases = [Case(load, *layer) for load in loads]
                results += run_phase(phase, cases, kernels, machine, device, output)
        console.print(aims_table(results, machine))
    raise typer.Exit(0 if all_right else 1)


if __name__ == "__main__":
    typer.run(main)
