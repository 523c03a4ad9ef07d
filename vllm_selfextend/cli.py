"""The `vllm-selfextend` command: `demo` and `plan`."""

import dataclasses
import functools
import importlib.util
import json
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from .config import RULE_HIGH, RULE_LOW
from .demo import MODEL_DIR
from .plan import CONFIG_KEY

if TYPE_CHECKING:
    from .demo.run import Result, Task

app = typer.Typer(help="Self-Extend for vLLM.", no_args_is_help=True, add_completion=False)
console = Console()
errors = Console(stderr=True)


def main() -> None:
    """The console script."""
    app()


@app.command()
def demo(
    output: Annotated[Path | None, typer.Option(help="Write results, a picture and vLLM's log to this folder.")] = None,
) -> None:
    """Find passkeys in texts up to 16 times longer than the small model that ships with the package was trained on."""
    _need_vllm()
    from .demo import run
    from .demo.screen import stderr_to

    tasks = run.make_tasks()
    results: list[Result] = []
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    folder = Path(tempfile.mkdtemp(prefix="selfextend-demo-")) if output is None else output
    folder.mkdir(parents=True, exist_ok=True)
    with stderr_to(folder / "vllm.log") as stderr, Progress(*columns, console=Console(file=stderr)) as progress:
        width = max(map(len, run.METHODS.values()))
        for method, label in run.METHODS.items():
            bar = progress.add_task(label.ljust(width), total=len(tasks))
            results += run.run_method(method, tasks, functools.partial(progress.advance, bar))
    trained_length = json.loads((MODEL_DIR / "config.json").read_text(encoding="utf-8"))["max_position_embeddings"]
    console.print(_demo_table(results, trained_length))
    _print_example(tasks, results)
    if output is not None:
        run.write_results(results, trained_length, output)
        console.print(f"\nWrote results.json, accuracy.png and vllm.log to {output}.")


@app.command()
def plan(
    model: Annotated[str, typer.Argument(help="A checkpoint's folder or its name on the Hugging Face hub.")],
    max_model_len: Annotated[int, typer.Option(min=1, help="How many tokens you want to serve.")],
    group_size: Annotated[int | None, typer.Option(min=1, help="Instead of the automatic choice.")] = None,
    neighbor_window: Annotated[int | None, typer.Option(min=1, help="Instead of the automatic choice.")] = None,
    trained_length: Annotated[int | None, typer.Option(min=1, help="Instead of the length vLLM derives.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Say what Self-Extend would do with a model at a length on this machine. Reads the config, not the weights."""
    _need_vllm()
    from .planning import plan_report

    chosen = {"group_size": group_size, "neighbor_window": neighbor_window, "trained_length": trained_length}
    settings = {name: value for name, value in chosen.items() if value is not None}
    try:
        report = plan_report(model, max_model_len, settings)
    except (ValueError, OSError) as error:
        errors.print(f"[bold red]error:[/] {error}", highlight=False)
        raise typer.Exit(1) from error
    if as_json:
        typer.echo(json.dumps(dataclasses.asdict(report), indent=2))
    else:
        console.print(_plan_table(dataclasses.asdict(report)))
        if report.supported:
            console.print(
                f"\nvllm serve {model} --attention-backend CUSTOM --max-model-len {max_model_len} \\", soft_wrap=True
            )
            numbers = {"group_size": report.group_size, "neighbor_window": report.neighbor_window} | settings
            console.print(f"    --additional-config '{json.dumps({CONFIG_KEY: numbers})}'", soft_wrap=True)
    if not report.supported:
        raise typer.Exit(1)


def _need_vllm() -> None:
    if importlib.util.find_spec("vllm") is None:
        errors.print(
            "[bold red]error:[/] this command needs vLLM. On a GPU machine: pip install 'vllm-selfextend\\[cuda]'. On "
            "a machine without one, with PyTorch's CPU build installed first: pip install 'vllm-selfextend\\[cpu]'.",
            highlight=False,
        )
        raise typer.Exit(1)


def _demo_table(results: "list[Result]", trained_length: int) -> Table:
    from .demo.run import KEY_COUNTS, LENGTHS, METHODS, accuracy

    table = Table(title=f"Passkeys found by a model trained on {trained_length} tokens")
    table.add_column("tokens in\nthe prompt", justify="right")
    for label in METHODS.values():
        table.add_column(f"{label}\n1 key / 4 keys", justify="right")
    for num_tokens in LENGTHS:
        cells = [
            " / ".join(f"{accuracy(results, method, num_tokens, keys):.0%}" for keys in KEY_COUNTS)
            for method in METHODS
        ]
        table.add_row(f"{num_tokens:,}", *cells)
    return table


def _print_example(tasks: "list[Task]", results: "list[Result]") -> None:
    """One prompt of the longest kind, its middle left out, and both answers."""
    from .demo.run import METHODS

    longest, most = max(task.num_tokens for task in tasks), max(task.num_keys for task in tasks)
    index = next(i for i, t in enumerate(tasks) if (t.num_tokens, t.num_keys) == (longest, most) and t.depth >= 0.5)
    task = tasks[index]
    words = task.prompt.text.split()
    asked = words[-5:]  # the pass key : CITY
    key_at = next(i for i in range(len(words)) if words[i : i + 5] == asked)
    begin, end = max(0, key_at - 8), key_at + 22
    console.print(f"\n[bold]One of the prompts[/], {task.num_tokens:,} tokens, cut for the screen:")
    shown = f"{' '.join(words[:12])} ... {' '.join(words[begin:end])} ... {' '.join(words[-22:])}"
    console.print(shown, highlight=False, soft_wrap=True)
    answers = {"The key": task.prompt.answer}
    answers |= {METHODS[result.method]: result.answer for result in results[index :: len(tasks)]}
    for label, answer in answers.items():
        console.print(f"[bold]{label:<11}[/]  {answer}", highlight=False)


def _plan_table(report: dict[str, Any]) -> Table:
    table = Table(title=f"Self-Extend for {report['model']}", show_header=False)
    table.add_column(justify="left")
    table.add_column(justify="left", overflow="fold")
    share = report["rule_share"]
    if share > RULE_HIGH:
        verdict = "above two thirds: expect worse answers; raise the group size or lower the window"
    elif share > RULE_LOW:
        verdict = "between one half and two thirds: the authors' limit"
    else:
        verdict = "below one half: good"
    rows = {
        "supported": "yes" if report["supported"] else f"no: {report['why_not']}",
        "max_model_len N": f"{report['max_model_len']:,} tokens",
        "trained length L": f"{report['trained_length']:,} tokens",
        "group size G": f"{report['group_size']}",
        "neighbor window W": f"{report['neighbor_window']:,} tokens",
        "chosen because": report["reason"],
        "capacity": f"{report['capacity']:,} tokens",
        "(W + (N - W)/G) / L": f"{share:.2f}, {verdict}" if report["group_size"] > 1 else "not needed",
        "KV cache": f"{report['kv_bytes_per_token']:,} bytes per token, "
        f"{report['kv_bytes_per_sequence'] / 2**30:,.2f} GiB per sequence of {report['max_model_len']:,} tokens",
    }
    for name, value in rows.items():
        table.add_row(name, value)
    return table
