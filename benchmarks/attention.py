"""Kernel against kernel: Self-Extend's attention and stock vLLM's on a CPU, `python -m benchmarks.attention`.

Both have caches of the same size that hold the same keys and values in blocks in the same random order, and are called
in turns in one process: ours, stock, ours, stock, and so on. A time is the median of a case's calls.

What is measured is one layer's attention call on a cache that has been filled, and with `--store` the call that fills
it. Stock's scheduler metadata is made once per case, outside the measured calls, as vLLM makes it once per step for all
layers; ours has none, so whatever our kernels work out about a step is measured. Where the context is within the
trained length both must give the same answer, and that is checked. Short contexts stay in the processor's caches from
call to call, ours and stock's alike.
"""

import functools
import itertools
import json
import os
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np
import rich.box
import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")

from vllm import _custom_ops as ops
from vllm.platforms import current_platform
from vllm.v1.attention.backends.cpu_attn import _get_attn_isa

from benchmarks import machine
from benchmarks.layers import (
    DType,
    Heads,
    check_same,
    dtype_name,
    extended_layer,
    make_batch,
    three_digits,
)
from vllm_selfextend.backends import choose_kernels
from vllm_selfextend.backends.interface import AttentionBatch, Kernels

SLOPE_FROM = 8192  # contexts long enough for time to grow with them in a straight line

ENOUGH_SECONDS = 1.0
TOO_MANY_SECONDS = 15.0
FEWEST_ROUNDS = 3

WORK = {
    "decode": "of keys and values read",
    "prefill": "of the two products",
    "store": "of keys and values stored",
}
"""What a rate counts."""

console = Console()
errors = Console(stderr=True)

DEFAULT_DTYPES = [DType.FLOAT32, DType.BFLOAT16]


class Load(NamedTuple):
    """One step's requests, all alike; `context` is the tokens of a request in the cache, the new ones included."""

    phase: str
    batch: int
    query_len: int
    context: int


ISSUE = (
    *(Load("decode", 1, 1, context) for context in (1024, 2048, 4096, 8192, 16384, 32768)),
    Load("decode", 8, 1, 16384),
    Load("decode", 16, 1, 4096),
    Load("prefill", 1, 512, 8192 + 512),
    Load("prefill", 1, 2048, 8192 + 2048),
    Load("prefill", 1, 4096, 4096),
)
SHAPES = (Load("decode", 1, 1, 16384), Load("prefill", 1, 512, 8192 + 512))
OTHER_HEADS = (Heads(32, 4, 64), Heads(8, 8, 128))
STORE = (
    Load("store", 1, 512, 8192 + 512),
    Load("store", 1, 2048, 8192 + 2048),
    Load("store", 1, 1, 4096),
    Load("store", 8, 1, 4096),
    Load("store", 32, 1, 4096),
)


@dataclass(frozen=True)
class Case:
    """What is timed: a load on a layer."""

    load: Load
    heads: Heads
    dtype: torch.dtype
    trained_length: int
    block_size: int

    @property
    def num_blocks(self) -> int:
        """Cache blocks of one request."""
        return -(-self.load.context // self.block_size)

    @property
    def work(self) -> float:
        """Prefill: floating-point operations of the products. Otherwise: bytes of keys and values read or stored."""
        _, batch, query_len, context = self.load
        if self.load.phase == "prefill":
            visible = query_len * context - query_len * (query_len - 1) / 2
            return 4 * self.heads.head_size * self.heads.num_heads * batch * visible
        tokens = batch * (query_len if self.load.phase == "store" else context)
        return tokens * self.heads.num_kv_heads * 2 * self.heads.head_size * self.dtype.itemsize

    def make_cache(self) -> torch.Tensor:
        """A cache of exactly the blocks that the requests need."""
        _, num_kv_heads, head_size = self.heads
        num_blocks = self.load.batch * self.num_blocks
        return torch.zeros(num_blocks, num_kv_heads, self.block_size, 2 * head_size, dtype=self.dtype)

    def make_step(self, block_table: torch.Tensor, query_len: int) -> AttentionBatch:
        """The step in which the last `query_len` tokens of each request in `block_table` are new."""
        return make_batch(block_table, self.load.context, query_len, self.block_size)

    def draw(self, step: AttentionBatch, num_heads: int) -> torch.Tensor:
        """Random queries, keys or values of a step's new tokens."""
        return torch.randn(len(step.slot_mapping), num_heads, self.heads.head_size, dtype=self.dtype)


class SelfExtend:
    """A layer of ours and its cache; its methods prepare a call, and the call is what gets timed."""

    def __init__(self, case: Case, kernels: Kernels) -> None:
        self.cache = case.make_cache()
        self.layer = kernels.prepare(extended_layer(case.heads.head_size, case.load.context, case.trained_length))

    def store(self, key: torch.Tensor, value: torch.Tensor, step: AttentionBatch) -> Callable[[], None]:
        return functools.partial(self.layer.store, key, value, self.cache, step)

    def attention(self, query: torch.Tensor, step: AttentionBatch, out: torch.Tensor) -> Callable[[], None]:
        return functools.partial(self.layer.attend, query, self.cache, step, out)


class Stock:
    """The same for vLLM's, called as `vllm/v1/attention/backends/cpu_attn.py` does."""

    def __init__(self, case: Case) -> None:
        self.case = case
        self.isa = _get_attn_isa(case.dtype, case.block_size, case.heads.head_size)
        cache = case.make_cache()
        # vLLM's view of a block: all its keys, then all its values.
        blocks = cache.view(*cache.shape[:2], 2 * case.block_size, case.heads.head_size)
        self.key_cache, self.value_cache = blocks.chunk(2, dim=2)

    def store(self, key: torch.Tensor, value: torch.Tensor, step: AttentionBatch) -> Callable[[], None]:
        caches = self.key_cache, self.value_cache
        return functools.partial(ops.cpu_attn_reshape_and_cache, key, value, *caches, step.slot_mapping, self.isa)

    def attention(self, query: torch.Tensor, step: AttentionBatch, out: torch.Tensor) -> Callable[[], None]:
        metadata = ops.cpu_attn_get_scheduler_metadata(
            num_reqs=len(step.seq_lens),
            num_heads=self.case.heads.num_heads,
            num_kv_heads=self.case.heads.num_kv_heads,
            head_dim=self.case.heads.head_size,
            seq_lens=step.seq_lens,
            dtype=self.case.dtype,
            query_start_loc=step.query_start_loc,
            causal=True,
            sliding_window_size=-1,
            isa=self.isa,
            enable_kv_split=True,
        )
        return functools.partial(
            ops.cpu_attention_with_kv_cache,
            query=query,
            key_cache=self.key_cache,
            value_cache=self.value_cache,
            output=out,
            query_start_loc=step.query_start_loc,
            seq_lens=step.seq_lens,
            scale=self.case.heads.head_size**-0.5,
            causal=True,
            alibi_slopes=None,
            sliding_window=-1,
            block_table=step.block_table,
            softcap=0.0,
            scheduler_metadata=metadata,
            s_aux=None,
        )


def measure(case: Case, kernels: Kernels, repeats: int) -> tuple[float, float]:
    """Our time of a case and vLLM's, ms."""
    systems: list[SelfExtend | Stock] = [SelfExtend(case, kernels), Stock(case)]
    block_table = torch.randperm(case.load.batch * case.num_blocks, dtype=torch.int32).view(case.load.batch, -1)
    step = case.make_step(block_table, case.load.query_len)
    if case.load.phase == "store":
        key, value = case.draw(step, case.heads.num_kv_heads), case.draw(step, case.heads.num_kv_heads)
        ours, stock = medians([system.store(key, value, step) for system in systems], repeats)
        return ours, stock
    for row in block_table.split(1):
        old = case.make_step(row, case.load.context)
        key, value = case.draw(old, case.heads.num_kv_heads), case.draw(old, case.heads.num_kv_heads)
        for system in systems:
            system.store(key, value, old)()
    query = case.draw(step, case.heads.num_heads)
    outs = torch.empty_like(query), torch.empty_like(query)
    calls = [system.attention(query, step, out) for system, out in zip(systems, outs, strict=True)]
    ours, stock = medians(calls, repeats)
    if case.load.context <= case.trained_length:
        check_same(f"{case}: our answer", *outs)
    return ours, stock


def medians(calls: Sequence[Callable[[], None]], repeats: int) -> list[float]:
    """The median time of each call, ms; they are called in turns, after one round that is not counted.

    There are `repeats` rounds; more while they take less than `ENOUGH_SECONDS`, and, once they take
    `TOO_MANY_SECONDS`, no more than `FEWEST_ROUNDS`.
    """
    for call in calls:
        call()
    times: list[list[float]] = []
    begin = time.perf_counter()
    while True:
        times.append([_milliseconds(call) for call in calls])
        seconds = time.perf_counter() - begin
        wanted = repeats if seconds < TOO_MANY_SECONDS else min(repeats, FEWEST_ROUNDS)
        if len(times) >= wanted and seconds >= ENOUGH_SECONDS:
            return [statistics.median(column) for column in zip(*times, strict=True)]


def _milliseconds(call: Callable[[], None]) -> float:
    begin = time.perf_counter()
    call()
    return 1e3 * (time.perf_counter() - begin)


def make_row(case: Case, device: str, ours: float, stock: float) -> dict[str, Any]:
    """A case's line in the JSON file."""
    return {
        "device": device,
        "dtype": dtype_name(case.dtype),
        **case.load._asdict(),
        **case.heads._asdict(),
        "trained_length": case.trained_length,
        "self_extend_ms": ours,
        "vllm_ms": stock,
        "speedup": stock / ours,
    }


def result_table(dtype: torch.dtype, phase: str, results: Sequence[tuple[Case, dict[str, Any]]]) -> Table:
    """Times and rates, for people."""
    unit = "GFLOP/s" if phase == "prefill" else "GB/s"
    table = _table(f"{phase}, {dtype_name(dtype)} ({unit} {WORK[phase]})")
    shape, times = ("batch", "new", "context", "heads/kv\nx size"), ("ours\nms", "vLLM\nms", "speedup")
    for name in (*shape, *times, f"ours\n{unit}", f"vLLM\n{unit}"):
        table.add_column(name, justify="right")
    for case, row in results:
        ours, stock = row["self_extend_ms"], row["vllm_ms"]
        table.add_row(
            str(case.load.batch),
            f"{case.load.query_len:,}",
            f"{case.load.context:,}",
            str(case.heads),
            three_digits(ours),
            three_digits(stock),
            f"{stock / ours:.2f}",
            three_digits(case.work / ours / 1e6),
            three_digits(case.work / stock / 1e6),
        )
    return table


def _table(title: str) -> Table:
    """A table whose nine columns fit into 80 characters."""
    return Table(title=title, box=rich.box.SIMPLE_HEAD, collapse_padding=True, pad_edge=False)


def slope_table(results: Sequence[tuple[Case, dict[str, Any]]]) -> Table:
    """How the time of a decode step of one request grows with its context, fitted from `SLOPE_FROM` tokens."""
    table = _table(f"decode, batch 1: ms per 1,000 tokens past {SLOPE_FROM:,}")
    for name in ("dtype", "heads/kv x size", "ours", "vLLM"):
        table.add_column(name, justify="right")
    lines: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for case, row in results:
        if (case.load.phase, case.load.batch) == ("decode", 1) and case.load.context >= SLOPE_FROM:
            lines.setdefault((dtype_name(case.dtype), str(case.heads)), []).append(row)
    for layer, rows in lines.items():
        if len(rows) > 1:
            thousands = [row["context"] / 1000 for row in rows]
            times = [[row["self_extend_ms"], row["vllm_ms"]] for row in rows]
            table.add_row(*layer, *(f"{slope:.4f}" for slope in np.polyfit(thousands, times, 1)[0]))
    return table


def main(
    suite: Annotated[Literal["issue", "shapes", "all"], typer.Option(help="Which cases.")] = "issue",
    store: Annotated[bool, typer.Option("--store", help="Time storing keys and values too.")] = False,
    kernel: Annotated[str, typer.Option(help="Our kernel set.")] = "auto",
    dtype: Annotated[list[DType], typer.Option(help="May be given more than once.")] = DEFAULT_DTYPES,
    threads: Annotated[int, typer.Option(min=1)] = 2,
    repeats: Annotated[int, typer.Option(min=1, help="Rounds of a case; fast ones get more, slow ones 3.")] = 5,
    max_context: Annotated[int | None, typer.Option(min=1, help="Leave out cases with more tokens.")] = None,
    num_heads: Annotated[int, typer.Option(min=1, help='Of the cases of "issue" and of --store.')] = 32,
    num_kv_heads: Annotated[int, typer.Option(min=1, help="The same.")] = 8,
    head_size: Annotated[int, typer.Option(min=1, help="The same.")] = 128,
    trained_length: Annotated[int, typer.Option(min=4, help="Longer contexts have grouped positions.")] = 4096,
    block_size: Annotated[int, typer.Option(min=16, help="Tokens per cache block.")] = 128,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write one JSON line per case to this file.")] = None,
) -> None:
    """Time Self-Extend's attention against stock vLLM's, on a CPU."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    current_platform.import_kernels()
    kernels = choose_kernels(kernel, torch.device("cpu")).kernels
    dtypes = [getattr(torch, name.value) for name in dtype]
    chosen = Heads(num_heads, num_kv_heads, head_size)
    loads = [(load, chosen) for load in ISSUE] if suite != "shapes" else []
    loads += [(load, heads) for heads in OTHER_HEADS for load in SHAPES] if suite != "issue" else []
    loads += [(load, chosen) for load in STORE] if store else []
    cases = [
        Case(load, heads, one, trained_length, block_size)
        for one in dtypes
        for load, heads in loads
        if max_context is None or load.context <= max_context
    ]
    console.print(machine.table(threads, dtypes))
    if json_file is not None:
        json_file.write_text("", encoding="utf-8")
    results: list[tuple[Case, dict[str, Any]]] = []
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=errors) as progress:
        bar = progress.add_task("", total=len(cases))
        for case in cases:
            load = case.load
            now = f"{dtype_name(case.dtype)} {load.phase} {load.batch} x {load.query_len} of {load.context:,} tokens"
            progress.update(bar, description=now)
            row = make_row(case, machine.device(threads), *measure(case, kernels, repeats))
            results.append((case, row))
            if json_file is not None:  # line by line: a run that is ended early leaves what it has
                with json_file.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(row) + "\n")
            progress.advance(bar)
    for one, phase in itertools.product(dtypes, WORK):
        alike = [(case, row) for case, row in results if (case.dtype, case.load.phase) == (one, phase)]
        if alike:
            console.print(result_table(one, phase, alike))
    slopes = slope_table(results)
    if slopes.row_count:
        console.print(slopes)


if __name__ == "__main__":
    typer.run(main)
