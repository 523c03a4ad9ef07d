"""The `vllm-selfextend` command: `plan`, `doctor`, `demo`, `evaluate` and `tune`."""

import contextlib
import dataclasses
import functools
import importlib.util
import json
import os
import re
import shlex
from argparse import ArgumentTypeError
from collections.abc import Callable, Collection, Iterator, Sequence
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text as Styled

from .backends.limits import MAX_POSITIONS
from .method.plan import CONFIG_KEY

if TYPE_CHECKING:
    from .doctor import Finding
    from .evaluation.prompts import Prompt, Row
    from .evaluation.run_folder import RunFolder
    from .vllm.report import PlanReport


class MethodName(str, Enum):
    """See `evaluation.methods`."""

    UNMODIFIED = "unmodified"
    YARN = "yarn"
    DYNAMIC = "dynamic"
    LINEAR = "linear"
    NTK = "ntk"
    SELF_EXTEND = "self-extend"


class TaskName(str, Enum):
    """What `evaluate` asks; see the modules of `evaluation`. `ruler` is all that follow it."""

    PASSKEY = "passkey"
    LOSS = "loss"
    ORDER = "order"
    RULER = "ruler"
    NIAH_SINGLE_1 = "niah_single_1"
    NIAH_MULTIKEY_2 = "niah_multikey_2"
    NIAH_MULTIKEY_3 = "niah_multikey_3"
    RULER_VT = "ruler_vt"
    RULER_CWE = "ruler_cwe"
    RULER_FWE = "ruler_fwe"


class TuneTaskName(str, Enum):
    """What `tune` asks."""

    LOSS = "loss"
    PASSKEY = "passkey"
    PROMPTS = "prompts"


DEFAULT_TASKS = [TaskName.PASSKEY, TaskName.LOSS]
RULER_NAMES = list(TaskName)[list(TaskName).index(TaskName.RULER) + 1 :]


def _tokens(text: str) -> int:
    """A number of tokens as `vllm serve` reads it: 32k is 32,000 and 32K is 32,768."""
    number = text.strip()
    if not number.isdecimal():
        _need_vllm()
        from vllm.utils.argparse_utils import human_readable_int

        try:
            number = str(human_readable_int(text))
        except (ValueError, ArgumentTypeError) as error:
            raise typer.BadParameter(f"{text!r} is not a number of tokens, such as 32768, 32k or 32K.") from error
    if int(number) < 1:
        raise typer.BadParameter(f"{text!r} is not in the range x>=1.")
    return int(number)


app = typer.Typer(help="Self-Extend for vLLM.", no_args_is_help=True, add_completion=False)
# No markup: paths, names and answers are printed, and may have brackets and colons.
console = Console(markup=False, emoji=False)
errors = Console(stderr=True, markup=False, emoji=False)

Model = Annotated[str, typer.Argument(help="A checkpoint's folder or its name on the Hugging Face hub.")]
GroupSize = Annotated[int | None, typer.Option(min=1, help="One past the trained length; without it, by position.")]
NeighborWindow = Annotated[
    int | None,
    typer.Option(min=1, help="How many tokens back stay exact; else a quarter of that length, 1,024 at most."),
]
TrainedLength = Annotated[
    int | None, typer.Option(parser=_tokens, metavar="TOKENS", help="Instead of the length vLLM derives.")
]
MaxModelLen = Annotated[
    int, typer.Option(parser=_tokens, metavar="TOKENS", help="How many tokens you want to serve, as for vLLM.")
]
ExactShort = Annotated[bool, typer.Option(help="Queries within the trained length as in the unmodified model.")]
LogScale = Annotated[bool, typer.Option(help="Scale queries past the trained length by their position's logarithm.")]
Text = Annotated[list[Path] | None, typer.Option(help="A long text for the loss; without one, Python's own source.")]
Chat = Annotated[bool | None, typer.Option(help="Ask through the chat template; without either, if there is one.")]
Depths = Annotated[int, typer.Option(min=1, help="At how many depths of a text keys are hidden.")]
Rounds = Annotated[int, typer.Option(min=1, help="Passkey prompts per length and depth.")]
Seed = Annotated[int, typer.Option(help="Of the passkeys.")]
EngineArgs = Annotated[str, typer.Option(help="Other arguments of vllm.LLM as JSON.", metavar="JSON")]
LossLength = Annotated[int | None, typer.Option(min=1, help="How many tokens of each text are read for the loss.")]


def _print_version(asked: bool) -> None:
    if asked:
        from . import __version__

        typer.echo(f"vllm-selfextend {__version__}")
        raise typer.Exit


@app.callback()
def command(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and end.")
    ] = False,
) -> None:
    """Self-Extend for vLLM."""


@app.command()
def plan(
    model: Model,
    max_model_len: MaxModelLen,
    group_size: GroupSize = None,
    neighbor_window: NeighborWindow = None,
    trained_length: TrainedLength = None,
    engine_args: EngineArgs = "{}",
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Say what Self-Extend would do with a model at a length on this machine. Reads the config, not the weights."""
    _need_vllm()
    # Stdout has the plan alone. vLLM sets its log up as it is imported.
    os.environ.setdefault("VLLM_LOGGING_STREAM", "ext://sys.stderr")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    from .vllm.report import OWN_ARGUMENTS, plan_report

    settings = _settings(group_size, neighbor_window, trained_length)
    try:
        arguments = _engine_args(engine_args, OWN_ARGUMENTS)
        report = plan_report(model, max_model_len, settings, arguments)
    except (ValueError, OSError) as error:
        _fail(error, *_hints(str(error), OWN_ARGUMENTS))
    if as_json:
        typer.echo(json.dumps(dataclasses.asdict(report), indent=2))
    else:
        console.print(_plan_table(dataclasses.asdict(report)))
        if report.supported:
            console.print(f"\n{_serve_command(report, settings, arguments)}", soft_wrap=True)
        else:
            for hint in _hints(str(report.why_not), OWN_ARGUMENTS):
                errors.print(hint, highlight=False, soft_wrap=True)
    if not report.supported:
        raise typer.Exit(1)


@app.command()
def doctor(as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False) -> None:
    """Say what is installed and which kernels would run here, and see whether the small model answers right."""
    # Its log says which kernels ran.
    os.environ |= {
        "VLLM_LOGGING_STREAM": "ext://sys.stderr",
        "VLLM_LOGGING_LEVEL": "INFO",
        "VLLM_CONFIGURE_LOGGING": "1",
    }
    from .doctor import examine
    from .evaluation.screen import Stopped

    found: list[Finding] = []

    def tell(finding: "Finding") -> None:
        found.append(finding)
        if not as_json:
            _print_finding(finding)

    try:
        examine(tell)
    except Stopped as stop:
        errors.print("Stopped.")
        raise typer.Exit(128 + stop.signum) from stop
    except (ValueError, OSError) as error:  # there is no folder for the log
        _fail(error)
    problems = sum(finding.problem is not None for finding in found)
    if as_json:
        typer.echo(json.dumps({"problems": problems, "findings": [dataclasses.asdict(one) for one in found]}, indent=2))
    else:
        console.print(
            f"\n{problems} {'problem' if problems == 1 else 'problems'}." if problems else "\nNothing is wrong."
        )
    if problems:
        raise typer.Exit(1)


@app.command()
def demo(
    output: Annotated[Path | None, typer.Option(help="Write results, a picture and vLLM's log to this folder.")] = None,
) -> None:
    """Find passkeys in texts up to 16 times longer than the small model that ships with the package was trained on."""
    with _evaluating(output) as folder:
        from .demo import run
        from .evaluation.tables import passkey_table

        comparison = run.comparison()
        rows, written = comparison.run(folder)
    title = f"Passkeys found by a model trained on {comparison.checkpoint.report.trained_length} tokens"
    _print_tables(functools.partial(passkey_table, rows, title=title), comparison.methods)
    _print_example(run.example(comparison.prompts[0][1]), rows)
    _print_written(output, written)


@app.command()
def evaluate(
    model: Model,
    max_model_len: Annotated[
        int, typer.Option(parser=_tokens, metavar="TOKENS", help="The longest texts to be read, tokens.")
    ],
    method: Annotated[
        list[MethodName] | None,
        typer.Option(help="What to compare, several; without one: unmodified, yarn, self-extend."),
    ] = None,
    self_extend: Annotated[
        list[str] | None,
        typer.Option(help="Another Self-Extend beside, with these settings; several.", metavar="JSON"),
    ] = None,
    task: Annotated[
        list[TaskName], typer.Option(help="What to ask; several. ruler is all that follow it.")
    ] = DEFAULT_TASKS,
    served_length: Annotated[
        int | None,
        typer.Option(
            parser=_tokens,
            metavar="TOKENS",
            help="How many tokens the server is sized for, if more than --max-model-len.",
        ),
    ] = None,
    length: Annotated[
        list[int] | None, typer.Option(min=64, help="A text's tokens; without one, doubling up to the longest.")
    ] = None,
    depths: Depths = 5,
    keys: Annotated[int, typer.Option(min=1, max=6, help="How many keys a text hides, one of which is asked for.")] = 1,
    rounds: Annotated[
        int, typer.Option(min=1, help="Prompts per length: keys per depth, RULER's per task, two orders per place.")
    ] = 1,
    loss_length: LossLength = None,
    text: Text = None,
    chat: Chat = None,
    group_size: GroupSize = None,
    neighbor_window: NeighborWindow = None,
    trained_length: TrainedLength = None,
    exact_short: ExactShort = True,
    log_scale: LogScale = True,
    seed: Annotated[int, typer.Option(help="Of the prompts.")] = 0,
    engine_args: EngineArgs = "{}",
    output: Annotated[
        Path | None, typer.Option(help="Keep every answer, results.json and pictures here; a broken-off run goes on.")
    ] = None,
) -> None:
    """Compare Self-Extend with the unmodified model and with what vLLM has: keys, loss over position, RULER, order."""
    settings = _settings(group_size, neighbor_window, trained_length, exact_short, log_scale)
    names = [one for each in task for one in (RULER_NAMES if each is TaskName.RULER else [each])]
    if set(names) & set(RULER_NAMES):
        _need_modules("ruler", "lm_eval", "nltk", "wonderwords")
    with _evaluating(output) as folder:
        from .evaluation.comparison import comparison_from_options
        from .evaluation.engine import OWN_ARGUMENTS
        from .evaluation.tables import loss_table, order_table, passkey_table, ruler_table

        comparison = comparison_from_options(
            model,
            max_model_len,
            settings,
            _engine_args(engine_args, OWN_ARGUMENTS),
            served_length=served_length,
            methods=[one.value for one in method or ()],
            variants=[_json_object("--self-extend", one, '{"group_size": 8}') for one in self_extend or ()],
            tasks=[one.value for one in names],
            lengths=length or (),
            depths=depths,
            keys=keys,
            rounds=rounds,
            seed=seed,
            loss_length=loss_length,
            texts=text or (),
            chat=chat,
        )
        rows, written = comparison.run(folder)
    report = comparison.checkpoint.report
    title = f"Passkeys found, on a server of {report.max_model_len:,} tokens"
    tables: dict[tuple[str, ...], Callable[..., Table]] = {
        ("passkey",): functools.partial(passkey_table, title=title),
        ("loss",): functools.partial(loss_table, trained_length=report.trained_length),
        ("order",): order_table,
        tuple(RULER_NAMES): functools.partial(ruler_table, trained_length=report.trained_length),
    }
    for tasks, table_of in tables.items():
        if mine := [row for row in rows if row["task"] in tasks]:
            _print_tables(functools.partial(table_of, mine), comparison.methods)
    console.print("In brackets and behind +-: the 95 % interval.", highlight=False)
    for reason in comparison.left_out:
        console.print(f"Not compared: {reason}", highlight=False, soft_wrap=True)
    _print_written(output, written)


@app.command()
def tune(
    model: Model,
    max_model_len: MaxModelLen,
    task: Annotated[TuneTaskName, typer.Option(help="What to go by; prompts are your own.")] = TuneTaskName.LOSS,
    prompts: Annotated[
        Path | None, typer.Option(help='Your own task: lines such as {"prompt": "...", "answer": "..."}.')
    ] = None,
    budget: Annotated[float, typer.Option(min=0.1, help="Minutes, the engine's start not counted.")] = 30.0,
    depths: Depths = 5,
    rounds: Rounds = 2,
    text: Text = None,
    chat: Chat = None,
    trained_length: TrainedLength = None,
    exact_short: ExactShort = True,
    log_scale: LogScale = True,
    seed: Seed = 0,
    engine_args: EngineArgs = "{}",
    output: Annotated[Path | None, typer.Option(help="Write tuning.json and a heat map to this folder.")] = None,
) -> None:
    """Find the group size and neighbor window that a model reads best with at a length."""
    settings = _settings(None, None, trained_length, log_scale=log_scale)
    with _evaluating(output) as folder:
        from .evaluation.engine import OWN_ARGUMENTS
        from .evaluation.summary import group_sizes_of
        from .evaluation.tables import distance_from_auto, numbers_table
        from .evaluation.tuning import tuning_from_options

        tuning = tuning_from_options(
            model,
            max_model_len,
            settings,
            _engine_args(engine_args, OWN_ARGUMENTS),
            task=task.value,
            prompts=prompts,
            depths=depths,
            rounds=rounds,
            seed=seed,
            texts=text or (),
            chat=chat,
            exact_short=exact_short,
        )
        written = tuning.run(folder, 60 * budget)
    search = tuning.search
    table_of = functools.partial(numbers_table, search, tuning.task.scores_prompt)
    _print_tables(table_of, group_sizes_of(search.costs))
    console.print(distance_from_auto(search), soft_wrap=True, highlight=False)
    numbers = json.dumps({CONFIG_KEY: tuning.best_settings})
    console.print(f"\n--additional-config '{numbers}'", soft_wrap=True, highlight=False)
    _print_written(output, written)


def _need_vllm() -> None:
    if importlib.util.find_spec("vllm") is None:
        from .doctor import INSTALL_VLLM

        _fail(f"this command needs vLLM. {INSTALL_VLLM}")


@contextlib.contextmanager
def _evaluating(output: Path | None) -> "Iterator[RunFolder]":
    """A run's folder, stderr its log; what a user can mend, or stops, is one sentence."""
    _need_vllm()
    _need_modules("eval", "matplotlib", "scipy")
    from .evaluation.run_folder import run_folder
    from .evaluation.screen import Stopped

    try:
        with run_folder(output) as folder:
            try:
                with folder.logging():
                    yield folder
            except Stopped as stop:
                errors.print("Stopped.", *_goes_on(folder), highlight=False, soft_wrap=True)
                raise typer.Exit(128 + stop.signum) from stop
            except (ValueError, OSError) as error:
                from .evaluation.engine import OWN_ARGUMENTS  # and with it vLLM, whose log was to go into the file

                problem = folder.log_problem
                kept = "is in" if problem is None else f"could not be written ({problem}) to"
                traceback = f"Its traceback {kept} {folder.log}."
                _fail(error, *_hints(str(error), OWN_ARGUMENTS), traceback, *_goes_on(folder))
            except Exception:  # whose traceback follows; the end of the log stands above it
                for sentence in _goes_on(folder):
                    errors.print(sentence, highlight=False, soft_wrap=True)
                raise
    except (ValueError, OSError) as error:  # there is no log to write to
        _fail(error)


def _goes_on(folder: "RunFolder") -> list[str]:
    """That the run goes on from what was answered, if anything was."""
    if not folder.has_answers:
        return []
    again = shlex.quote(str(folder.path))
    return [f"What was answered is in {folder.path}; the same command with --output {again} goes on."]


def _need_modules(extra: str, *names: str) -> None:
    missing = [name for name in names if importlib.util.find_spec(name) is None]
    if missing:
        _fail(f"this command needs {' and '.join(missing)}: pip install 'vllm-selfextend[{extra}]'.")


def _fail(error: Exception | str, *more: str) -> NoReturn:
    """End with an error as one sentence, and more of them below it."""
    errors.print(Styled("error:", "bold red"), str(error), highlight=False, soft_wrap=True)
    for sentence in more:
        errors.print(sentence, highlight=False, soft_wrap=True)
    raise typer.Exit(1) from (error if isinstance(error, Exception) else None)


def _hints(advice: str, taken: Collection[str]) -> list[str]:
    """How each option of `vllm serve` that an advice names is given to this command, where it can be."""
    from vllm.engine.arg_utils import EngineArgs

    found = []
    for option, value in re.findall(r"--([a-z]+(?:-[a-z]+)+)(?: '(\{.*\})')?", advice):
        name = option.replace("-", "_")
        if name in EngineArgs.__dataclass_fields__ and name not in taken:
            found.append(f"Here --{option} is --engine-args '{{\"{name}\": {value or 'true'}}}'")
    return found


def _serve_command(report: "PlanReport", settings: dict[str, Any], engine_args: dict[str, Any]) -> str:
    """The plan as a command for the shell."""
    command = ["vllm", "serve", report.model, "--attention-backend", "CUSTOM", "--max-model-len", report.max_model_len]
    for name, value in engine_args.items():
        option = name.replace("_", "-")
        if isinstance(value, bool):
            command.append(f"--{option}" if value else f"--no-{option}")
        elif value is not None:
            command += [f"--{option}", *(value if isinstance(value, list) else [value])]
    words = [json.dumps(word) if isinstance(word, dict) else str(word) for word in command]
    if not settings:
        return shlex.join(words)
    return f"{shlex.join(words)} \\\n    --additional-config {shlex.quote(json.dumps({CONFIG_KEY: settings}))}"


def _settings(
    group_size: int | None,
    neighbor_window: int | None,
    trained_length: int | None,
    exact_short: bool = True,
    log_scale: bool = True,
) -> dict[str, Any]:
    """What differs from the defaults, as in `additional_config["self_extend"]`."""
    chosen = {"group_size": group_size, "neighbor_window": neighbor_window, "trained_length": trained_length}
    switches = {"exact_short": exact_short, "log_scale": log_scale}
    off = {name: value for name, value in switches.items() if not value}
    return {name: value for name, value in chosen.items() if value is not None} | off


def _engine_args(text: str, taken: Collection[str]) -> dict[str, Any]:
    arguments = _json_object("--engine-args", text, '{"dtype": "float32"}')
    if ours := [name for name in taken if name in arguments]:
        raise ValueError(f"--engine-args cannot set {ours[0]!r}: the command or its other options decide it.")
    return arguments


def _json_object(option: str, text: str, example: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{option} {text!r} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{option} {text!r} must be an object such as {example}.")
    return value


def _print_tables(table_of: Callable[[Sequence[Any]], Table], columns: Sequence[Any]) -> None:
    from .evaluation.tables import fitting

    for table in fitting(table_of, columns, console):
        console.print(table)


def _print_example(prompt: "Prompt", rows: "list[Row]") -> None:
    """One prompt, its middle left out, and every method's answer."""
    from .evaluation.methods import METHODS

    begin = prompt.text.index(str(prompt.expected))
    cut = prompt.text[:60], prompt.text[begin - 80 : begin + 60], prompt.text[-90:]
    length = prompt.cell["length"]
    console.print(Styled.assemble(("\nOne of the prompts", "bold"), f", {length:,} tokens, cut for the screen:"))
    console.print(" ... ".join(cut), highlight=False, soft_wrap=True)
    answers = {"The key": prompt.expected}
    answers |= {METHODS[row["method"]].label: row["answer"].strip() for row in rows if row["name"] == prompt.name}
    for label, answer in answers.items():
        console.print(Styled.assemble((f"{label:<11}", "bold"), f"  {answer}"), highlight=False)


def _print_written(output: Path | None, written: "list[Path]") -> None:
    if output is not None:
        from .evaluation.run_folder import LOG

        names = ", ".join(path.name for path in written)
        console.print(f"\nWrote {names} and {LOG} to {output}.", highlight=False, soft_wrap=True)


def _print_finding(finding: "Finding") -> None:
    mark = Styled("ok", "green") if finding.problem is None else Styled("problem", "bold red")
    line = Styled.assemble(mark, " " * (9 - len(mark)), (f"{finding.subject:<18}", "bold"), finding.found)
    console.print(line, highlight=False, soft_wrap=True)
    if finding.problem is not None:
        console.print(f"{'':9}{finding.problem}", highlight=False, soft_wrap=True)


def _plan_table(report: dict[str, Any]) -> Table:
    table = Table(title=f"Self-Extend for {report['model']}", show_header=False)
    table.add_column(justify="left")
    table.add_column(justify="left", overflow="fold")
    sizes = ", ".join(f"{size:g} at {length:,}" for length, size in report["group_sizes"].items())
    follows = " by position" if report["group_size"] == "auto" else ""
    rows = {
        "supported": "yes" if report["supported"] else f"no: {report['why_not']}",
        "max_model_len N": f"{report['max_model_len']:,} tokens",
        "trained length L": f"{report['trained_length']:,} tokens",
        "group size G": f"{report['group_size']}{follows}: {sizes} tokens",
        "neighbor window W": f"{report['neighbor_window']:,} tokens",
        "longest sequence": f"{report['capacity']:,} tokens" if report["capacity"] else f"any, up to {MAX_POSITIONS:,}",
    }
    if report["kv_bytes_per_token"] is not None:
        rows["KV cache"] = (
            f"{report['kv_bytes_per_token']:,} bytes per token, "
            f"{report['kv_bytes_per_sequence'] / 2**30:,.2f} GiB per sequence of {report['max_model_len']:,} tokens"
        )
    for name, value in rows.items():
        table.add_row(name, value)
    return table
