"""A published table, and how it is measured: lm-evaluation-harness puts its tasks to vLLM, a line after another."""

import dataclasses
import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table as ScreenTable

from vllm_selfextend.evaluation.methods import METHODS, Method, engine_arguments, read_checkpoint

from .dry_run import ENGINE_ARGS, save_model, stand_ins

RULER = (
    *(f"niah_single_{number}" for number in (1, 2, 3)),
    *(f"niah_multikey_{number}" for number in (1, 2, 3)),
    "niah_multiquery",
    "niah_multivalue",
    "ruler_vt",
    "ruler_cwe",
    "ruler_fwe",
    "ruler_qa_hotpot",
    "ruler_qa_squad",
)
"""All 13 tasks, by the harness's names."""


@dataclass(frozen=True)
class Column:
    """What a number is of.

    Attributes:
        name: As published.
        tasks: Of the harness; the number is their mean, in percent.
        length: Tokens of RULER's prompts; None of other tasks.

    """

    name: str
    tasks: Sequence[str]
    length: int | None = None


@dataclass(frozen=True)
class Line:
    """A method's numbers.

    Attributes:
        name: For people.
        method: What is measured; None of a method that is not here, whose numbers stand beside.
        published: By the names of columns. A line of which some were is measured in these only, any other in all.
        max_model_len: Tokens that texts are cut to, where they are not the table's.

    """

    name: str
    method: Method | None
    published: Mapping[str, float] = field(default_factory=dict)
    max_model_len: int | None = None


@dataclass(frozen=True)
class Published:
    """A table.

    Attributes:
        title: What it is of.
        source: Where it was published.
        model: The checkpoint's name on the Hugging Face hub.
        config: What decides of a checkpoint's config how positions are read, for the dry run; `architectures` too.
        max_model_len: Tokens of the longest prompt and its answer.
        columns: Of the numbers.
        lines: Of the methods.
        trained_length: Where it is not what the config says, tokens.
        hf_overrides: Changes of the config that the authors made.
        has_mean: Whether it is the mean over all columns that was published, as column "mean".

    """

    title: str
    source: str
    model: str
    config: Mapping[str, Any]
    max_model_len: int
    columns: Sequence[Column]
    lines: Sequence[Line]
    trained_length: int | None = None
    hf_overrides: Mapping[str, Any] = field(default_factory=dict)
    has_mean: bool = False


def ruler_columns(*lengths: int) -> list[Column]:
    """RULER's mean at each length."""
    return [Column(f"{length:,}", RULER, length) for length in lengths]


def self_extend(**settings: Any) -> Method:
    """Self-Extend with settings as in `additional_config["self_extend"]`."""
    return dataclasses.replace(METHODS["self-extend"], settings=settings)


def to_the_letter(group_size: int, neighbor_window: int) -> Method:
    """Self-Extend as its paper has it."""
    numbers = {"group_size": group_size, "neighbor_window": neighbor_window}
    return self_extend(**numbers, exact_short=False, log_scale=False)


def run(table: Published) -> None:
    """Measure a table and print it, as a script does."""

    def main(
        model: Annotated[str, typer.Option(help="The weights: a folder, or a name on the hub.")] = table.model,
        limit: Annotated[int | None, typer.Option(min=1, help="Prompts of each task; without it, all.")] = None,
        engine_args: Annotated[str, typer.Option(help="Other arguments of vllm.LLM as JSON.", metavar="JSON")] = "{}",
        json_path: Annotated[Path | None, typer.Option("--json", help="Append each number here.")] = None,
        dry_run: Annotated[bool, typer.Option(help="Try it on a random model of the same kind.")] = False,
    ) -> None:
        arguments = json.loads(engine_args)
        with tempfile.TemporaryDirectory() as folder:
            dry = Path(folder) if dry_run else None
            weights = model
            if dry is not None:
                weights, limit, arguments = save_model(table.config, dry), 1, ENGINE_ARGS | arguments
            found = {
                line.name: measure(table, line, line.method, weights, limit, arguments, dry)
                for line in table.lines
                if line.method is not None
            }
        show(table, found)
        if dry_run:
            print("A dry run: the model is random, and no number says anything.")
            return
        if json_path is not None:
            with json_path.open("a") as file:
                for line in table.lines:
                    for name, value in found.get(line.name, {}).items():
                        about = {"table": table.title, "model": model, "limit": limit, "line": line.name}
                        numbers = {"column": name, "published": line.published.get(name), "measured": value}
                        print(json.dumps(about | numbers), file=file)

    main.__doc__ = f"{table.title}: {table.source}"
    typer.run(main)


def measure(
    table: Published,
    line: Line,
    method: Method,
    model: str,
    limit: int | None,
    engine_args: Mapping[str, Any],
    dry: Path | None,
) -> dict[str, float]:
    """A line's numbers by column, in percent, from an engine of its own.

    Args:
        table: Which the line is of.
        line: Which of its lines.
        method: The line's.
        model: The weights.
        limit: Prompts of each task; None is all.
        engine_args: Other arguments of `vllm.LLM`.
        dry: In a dry run a folder for made-up data; None measures.

    """
    from lm_eval import simple_evaluate
    from lm_eval.api.registry import get_model

    overrides = dict(table.hf_overrides)
    arguments: dict[str, Any] = {}
    if method is not METHODS["unmodified"]:  # which is the checkpoint as it is
        trained = {"trained_length": table.trained_length} if table.trained_length else {}
        if method.settings is not None:
            method = dataclasses.replace(method, settings={**trained, **method.settings})
        checkpoint = read_checkpoint(model, table.max_model_len, trained, {**engine_args, "hf_overrides": overrides})
        arguments = engine_arguments(method, checkpoint)
    lm = get_model("vllm")(
        pretrained=model,
        max_model_len=line.max_model_len or table.max_model_len,
        # A text that is longer than the model reads loses its middle (LongBench, section 4.1).
        truncation_side="middle",
        **{**arguments, "hf_overrides": {**overrides, **arguments.get("hf_overrides", {})}},
        **engine_args,
    )
    columns = [one for one in table.columns if one.name in line.published or table.has_mean or not line.published]
    found = {}
    for length in dict.fromkeys(column.length for column in columns):  # the harness has one for all it is asked at once
        together = [column for column in columns if column.length == length]
        names = [task for column in together for task in column.tasks]
        names, tasks = (names, list(names)) if dry is None else stand_ins(names, dry)
        lengths = {} if length is None else {"max_seq_lengths": [length]}
        about = {"pretrained": model, **lengths}
        results = simple_evaluate(lm, tasks=tasks, limit=limit, metadata=about, bootstrap_iters=0)["results"]
        metric = "score,none" if length is None else f"{length},none"
        for column in together:
            found[column.name] = 100 * fmean(results[task][metric] for task in column.tasks if task in names)
    lm.model.llm_engine.engine_core.shutdown(timeout=30)
    if table.has_mean:
        found["mean"] = fmean(found.values())
    return found


def show(table: Published, found: Mapping[str, Mapping[str, float]]) -> None:
    """Print what was published beside what was measured."""
    screen = ScreenTable(title=f"{table.title}: published / measured", caption=table.source)
    screen.add_column("")
    for line in table.lines:
        screen.add_column(line.name, justify="right")
    for name in [column.name for column in table.columns] + ["mean"] * table.has_mean:
        numbers = ((line.published.get(name), found.get(line.name, {}).get(name)) for line in table.lines)
        screen.add_row(name, *(f"{_number(published)} / {_number(measured)}" for published, measured in numbers))
    Console().print(screen)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"
