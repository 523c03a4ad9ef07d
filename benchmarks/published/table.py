"""A published table, and how it is measured: lm-evaluation-harness puts its tasks to vLLM, a line after another."""

import dataclasses
import importlib.util
import json
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table as ScreenTable

from vllm_selfextend.evaluation.methods import METHODS, Method, engine_arguments, read_checkpoint

from .dry_run import ENGINE_ARGS, SHORTER, save_model, stand_ins

if TYPE_CHECKING:
    from lm_eval.api.task import Task

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
        config: What decides of a checkpoint's config how positions are read, for the dry run.
        max_model_len: Tokens of the longest prompt and its answer.
        columns: Of the numbers. Those of one length are asked together.
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
        json_path: Annotated[Path | None, typer.Option("--json", help="Append each number here as it comes.")] = None,
        dry_run: Annotated[bool, typer.Option(help="Try it on a random model of the same kind.")] = False,
    ) -> None:
        if missing := missing_modules(table):
            needed = "pip install '.[cuda,ruler]' 'lm_eval[longbench]'"
            sys.exit(f"error: this table needs {', '.join(missing)}: {needed}.")
        arguments = json.loads(engine_args)
        found: dict[tuple[str, str], float] = {}
        with tempfile.TemporaryDirectory() as folder:
            dry, asked, weights = None, table, model
            if dry_run:
                dry, asked, limit, arguments = Path(folder), shorter(table), 1, ENGINE_ARGS | arguments
                weights = save_model(asked.config, dry)
            data = Data(weights, dry)
            for line in asked.lines:
                if line.method is None:
                    continue
                for name, value in measure(asked, line, line.method, data, limit, arguments):
                    found[line.name, name] = value
                    if json_path is not None:
                        about = {"table": table.title, "model": weights, "limit": limit, "line": line.name}
                        numbers = {"column": name, "published": line.published.get(name), "measured": value}
                        with json_path.open("a") as file:
                            print(json.dumps(about | numbers), file=file)
        show(table, found)
        if dry_run:
            print("A dry run: the model is random, RULER's prompts are short, and no number says anything.")

    main.__doc__ = f"{table.title}: {table.source}"
    typer.run(main)


def missing_modules(table: Published) -> list[str]:
    """What is not installed of what its tasks import, which the harness says only when an engine has started."""
    tasks = [task for column in table.columns for task in column.tasks]
    of_longbench = ["jieba", "fuzzywuzzy", "rouge"] if any(task.startswith("longbench_") for task in tasks) else []
    of_ruler = ["nltk", "wonderwords"] if any(column.length for column in table.columns) else []
    return [name for name in ["lm_eval", *of_ruler, *of_longbench] if importlib.util.find_spec(name) is None]


def shorter(table: Published) -> Published:
    """RULER's prompts and the model's reach divided alike, so that a dry run takes a CPU minutes.

    Group sizes stay what they are. A table of other tasks stays as it is: their answers have lengths of their own.
    """
    if any(column.length is None for column in table.columns):
        return table

    def divided(length: int | None) -> int | None:
        return length and length // SHORTER

    def with_window(method: Method | None) -> Method | None:
        if method is None or not method.settings or "neighbor_window" not in method.settings:
            return method
        shorter_window = {"neighbor_window": method.settings["neighbor_window"] // SHORTER}
        return dataclasses.replace(method, settings={**method.settings, **shorter_window})

    lines = [
        dataclasses.replace(line, method=with_window(line.method), max_model_len=divided(line.max_model_len))
        for line in table.lines
    ]
    return dataclasses.replace(
        table,
        config={**table.config, "max_position_embeddings": table.config["max_position_embeddings"] // SHORTER},
        max_model_len=table.max_model_len // SHORTER,
        columns=[dataclasses.replace(column, length=divided(column.length)) for column in table.columns],
        lines=lines,
        trained_length=divided(table.trained_length),
    )


@dataclass
class Data:
    """The harness's tasks, made once for all lines: the same prompts for each, and long ones take long to make.

    Attributes:
        model: The weights, whose tokenizer counts RULER's prompts.
        dry: In a dry run a folder for made-up data; None has the harness's.

    """

    model: str
    dry: Path | None
    _made: dict[tuple[int | None, tuple[str, ...]], dict[str, "Task"]] = field(default_factory=dict)

    def tasks(self, names: Sequence[str], length: int | None) -> dict[str, "Task"]:
        """Tasks by their names, of RULER's at a length; in a dry run those that can be had."""
        key = length, tuple(names)
        if key not in self._made:
            from lm_eval.tasks import TaskManager

            lengths = {} if length is None else {"max_seq_lengths": [length]}
            manager = TaskManager(metadata={"pretrained": self.model, **lengths})
            self._made[key] = manager.load(list(names) if self.dry is None else stand_ins(names, self.dry))["tasks"]
        return self._made[key]


def measure(
    table: Published, line: Line, method: Method, data: Data, limit: int | None, engine_args: Mapping[str, Any]
) -> Iterator[tuple[str, float]]:
    """A line's numbers with the names of their columns, in percent, from an engine of its own.

    Args:
        table: Which the line is of.
        line: Which of its lines.
        method: The line's.
        data: What is asked, and of which weights.
        limit: Prompts of each task; None is all.
        engine_args: Other arguments of `vllm.LLM`.

    """
    from lm_eval.api.registry import get_model

    overrides = dict(table.hf_overrides)
    arguments: dict[str, Any] = {}
    if method is not METHODS["unmodified"]:  # which is the checkpoint as it is
        trained = {"trained_length": table.trained_length} if table.trained_length else {}
        if method.settings is not None:
            method = dataclasses.replace(method, settings={**trained, **method.settings})
        known = {**engine_args, "hf_overrides": overrides}
        checkpoint = read_checkpoint(data.model, table.max_model_len, trained, known)
        arguments = engine_arguments(method, checkpoint)
    lm = get_model("vllm")(
        pretrained=data.model,
        max_model_len=line.max_model_len or table.max_model_len,
        # A text that is longer than the model reads loses its middle (LongBench, section 4.1). Where the harness counts
        # RULER's, it leaves out the answer's beginning, and of one task the answer: some tens of tokens at the longest.
        truncation_side="middle",
        **{**arguments, "hf_overrides": {**overrides, **arguments.get("hf_overrides", {})}},
        **engine_args,
    )
    columns = [one for one in table.columns if one.name in line.published or table.has_mean or not line.published]
    values = []
    try:
        for length in dict.fromkeys(column.length for column in columns):  # one for all tasks that are asked together
            together = [column for column in columns if column.length == length]
            tasks = data.tasks([task for column in together for task in column.tasks], length)
            scores = ask(lm, tasks, length, limit)
            for column in together:
                values.append(100 * fmean(scores[task] for task in column.tasks if task in tasks))
                yield column.name, values[-1]
    finally:
        lm.model.llm_engine.engine_core.shutdown(timeout=30)
    if table.has_mean:
        yield "mean", fmean(values)


def ask(lm: Any, tasks: Mapping[str, "Task"], length: int | None, limit: int | None) -> dict[str, float]:
    """The harness's scores by task, from 0 to 1.

    Of questions with several right answers RULER takes any of them, where the harness takes their share.
    """
    from lm_eval import simple_evaluate

    metric = "score,none" if length is None else f"{length},none"
    any_of = [name for name in tasks if name.startswith("ruler_qa")]
    scores: dict[str, float] = {}
    for names, log_samples in ((tasks.keys() - any_of, False), (any_of, True)):  # a log has all prompts
        if not names:
            continue
        asked = [tasks[name] for name in names]
        results = simple_evaluate(lm, tasks=asked, limit=limit, bootstrap_iters=0, log_samples=log_samples)
        scores |= {name: results["results"][name][metric] for name in names}
        for name, samples in results.get("samples", {}).items():
            scores[name] = fmean(
                answers_one(sample["doc"]["outputs"], sample["filtered_resps"][0]) for sample in samples
            )
    return scores


def answers_one(right: Sequence[str], answer: str) -> bool:
    """Whether an answer contains one of several right ones, in whatever case."""
    return any(one.lower() in answer.lower() for one in right)


def show(table: Published, found: Mapping[tuple[str, str], float]) -> None:
    """Print what was published beside what was measured."""
    screen = ScreenTable(title=f"{table.title}: published / measured", caption=table.source)
    screen.add_column("")
    for line in table.lines:
        screen.add_column(line.name, justify="right")
    for name in [column.name for column in table.columns] + ["mean"] * table.has_mean:
        numbers = ((line.published.get(name), found.get((line.name, name))) for line in table.lines)
        screen.add_row(name, *(f"{_number(published)} / {_number(measured)}" for published, measured in numbers))
    Console().print(screen)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"
