"""Which architectures are proved: `python -m benchmarks.model_proof`, or with names to run just those.

Every architecture of `architectures.py` is written as a tiny random checkpoint and served with Self-Extend through vLLM
on a CPU. Its greedy tokens and all log-probabilities are held against the second oracle, transformers in eager with
scores from the paper (`tests/support/oracle.py`), on both sides of the window and of the trained length. What
`vllm-selfextend plan` says of its KV cache is held against the engine's. An architecture that is refused, or that
fails, is put to stock vLLM too, with short texts: does that agree with transformers? Then `SelfExtend.apply` extends
the same checkpoint in transformers, and is held against the same oracle. Every step runs in a process of its own; one
that crashes or hangs stops nothing.
"""

import importlib.util
import os
from collections import Counter
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any

from tests.stand_ins import use_stand_ins

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
os.environ["HF_HUB_OFFLINE"] = "1"
if importlib.util.find_spec("torchvision") is None:  # before transformers looks
    use_stand_ins()

import rich.box
import typer
from rich.console import Console
from rich.table import Table

from .architectures import ARCHITECTURES
from .page import DOCS, write_page
from .results import RESULTS, write_json
from .running import run_transformers, run_vllm

console = Console()


def _line(result: dict[str, Any], more: str = "") -> str:
    """What the console says of one outcome."""
    what = f"{result['greatest']:.0e}" if result["status"] == "proved" else result["reason"] + more
    return f"{result['status']}, {what} ({result['seconds']} s)"


def main(
    names: Annotated[list[str] | None, typer.Argument(help="Architectures; all if none is named.")] = None,
    json_file: Annotated[
        Path, typer.Option("--json", help="Results, a line a row; rows run again are replaced.")
    ] = RESULTS,
    write_docs: Annotated[bool, typer.Option("--docs", help=f"Write {DOCS} from the results.")] = False,
    only: Annotated[str, typer.Option(help="'missing': run what has no result; 'unproved': what is not proved.")] = "",
    host: Annotated[str, typer.Option(help="'vllm' or 'transformers': run that one alone; 13 minutes and 3.")] = "",
    log: Annotated[Path | None, typer.Option(help="Where what the processes say goes; else it is dropped.")] = None,
) -> None:
    """Run architectures, each in processes of its own, and write what became of them."""
    chosen = [one for one in ARCHITECTURES if not names or one.name in names or one.title in names]
    if names and (unknown := set(names) - {one.name for one in chosen} - {one.title for one in chosen}):
        raise typer.BadParameter(f"no such architecture: {', '.join(sorted(unknown))}")
    if only not in ("", "missing", "unproved"):
        raise typer.BadParameter(f"--only is {only!r}; it must be missing or unproved.")
    if host not in ("", "vllm", "transformers"):
        raise typer.BadParameter(f"--host is {host!r}; it must be vllm or transformers.")
    merged = write_json(json_file, [])
    if only:
        done = {(one.name, one.variant) for one in merged if only == "missing" or one.status == "proved"}
        chosen = [one for one in chosen if (one.name, one.variant) not in done]
    for number, architecture in enumerate(chosen, 1):
        key = architecture.name, architecture.variant
        result = next((one for one in merged if (one.name, one.variant) == key), None)
        applied = result.applied if result else {}
        if host != "transformers" or result is None:
            result = run_vllm(architecture, log or Path(os.devnull))
        if host != "vllm":
            applied = run_transformers(architecture, log or Path(os.devnull))
        result = replace(result, applied=applied)
        merged = write_json(json_file, [result])
        console.print(f"{number}/{len(chosen)} {architecture.title}:", style="bold", markup=False)
        in_vllm = "" if host == "transformers" else _line(asdict(result), f" [stock: {result.stock}]")
        for where, line in {"vLLM": in_vllm, "transformers": "" if host == "vllm" else _line(applied)}.items():
            if line:
                style = {"proved": "green", "refused": "yellow", "close": "yellow"}.get(line.split(",")[0], "red")
                console.print(f"  {where}: {line}", style=style, markup=False, soft_wrap=True)
    table = Table(box=rich.box.SIMPLE_HEAD)
    table.add_column("")
    table.add_column("rows", justify="right")
    for status, count in Counter(one.status for one in merged).most_common():
        table.add_row(status, str(count))
    console.print(table)
    if write_docs:
        write_page(merged)
    if any({one.status, one.applied.get("status")} & {"differs", "crashes"} for one in merged):
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
