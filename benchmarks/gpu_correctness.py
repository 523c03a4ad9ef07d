"""The checks of `tests/gpu` as a step of the GPU benchmark: a progress bar, a table and lines of JSON."""

import itertools
import multiprocessing
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import replace
from typing import Any

import rich.box
import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from tests.gpu import checks
from vllm_selfextend.backends.interface import Kernels


def compile_all(todo: Sequence[checks.Check], device: torch.device, bar: Progress) -> None:
    """Compile what the checks need, several at a time: one after another would take minutes on a new machine."""
    layers = {(check.numbers, replace(check.case, requests=(), seed=0)): check for check in todo}
    with bar, ProcessPoolExecutor(mp_context=multiprocessing.get_context("spawn")) as pool:
        task = bar.add_task("compiling", total=len(layers))
        # What cannot be compiled is found again, and reported, by its check.
        for _ in as_completed([pool.submit(checks.compile_kernels, check, device) for check in layers.values()]):
            bar.advance(task)


def run(
    todo: Sequence[checks.Check],
    kernels: Kernels,
    device: torch.device,
    console: Console,
    bar: Progress,
    write: Callable[[dict[str, Any]], None],
) -> bool:
    """Check, print, and say whether all is right."""
    name = "CPU, Triton's interpreter" if device.type == "cpu" else torch.cuda.get_device_name()
    results = []
    with bar:
        task = bar.add_task("correctness", total=len(todo))
        for check in todo:
            bar.update(task, description=f"correctness: {check.batch}, {check.variant}")
            results.append(checks.make(check, kernels, device))
            write(results[-1].row(name))
            bar.advance(task)
    console.print(_table(results))
    wrong = [result for result in results if result.problem]
    for result in wrong:
        console.print(f"WRONG: {result.check}: {result.problem}", markup=False)
    return not wrong


def _table(results: list[checks.Result]) -> Table:
    """The worst errors of each dtype and kind of batch, for people."""
    table = Table(
        title="The kernels against the reference in float64",
        box=rich.box.SIMPLE_HEAD,
        collapse_padding=True,
        pad_edge=False,
    )
    for name in ("dtype", "batch"):
        table.add_column(name)
    for name in ("cases", "largest\nerror", "allowed", "error's\nnorm", "allowed", ""):
        table.add_column(name, justify="right")
    for numbers, batch in itertools.product(checks.NUMBERS, checks.BATCHES):
        alike = [result for result in results if (result.check.numbers, result.check.batch) == (numbers, batch)]
        if alike:
            # Not Python's max(), which may lose NaN.
            most, norm = torch.tensor([(result.most, result.norm) for result in alike]).amax(0).tolist()
            verdict = "wrong" if any(result.problem for result in alike) else "right"
            errors = f"{most:.1e}", f"{numbers.most:.0e}", f"{norm:.1e}", f"{numbers.norm:.0e}"
            table.add_row(numbers.name, batch, str(len(alike)), *errors, verdict)
    return table
