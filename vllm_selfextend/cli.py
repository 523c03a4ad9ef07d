"""The `vllm-selfextend` command: `plan`, `demo`, `evaluate` and `tune`."""

import contextlib
import dataclasses
import functools
import hashlib
import importlib.util
import json
import os
import re
import shlex
import shutil
import sys
import tempfile
import traceback
from argparse import ArgumentTypeError
from collections.abc import Callable, Collection, Iterator, Sequence
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn, TextIO

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text as Styled

from .backends.limits import MAX_POSITIONS
from .method.plan import CONFIG_KEY
from .method.positions import smallest_group_size

if TYPE_CHECKING:
    from .evaluation.comparison import Comparison
    from .evaluation.loss import LossTask
    from .evaluation.passkey import PasskeyTask
    from .evaluation.prompts import Prompt, Row, Task
    from .evaluation.records import Records
    from .vllm.report import PlanReport


@dataclasses.dataclass
class Session:
    """Where a run writes, the screen, and the answers once they are kept in the folder."""

    folder: Path
    stderr: TextIO
    records: "Records | None" = None

    @property
    def goes_on(self) -> list[str]:
        """That the run goes on from what was answered, if anything was."""
        if self.records is None or not self.records.rows:
            return []
        again = shlex.quote(str(self.folder))
        return [f"What was answered is in {self.folder}; the same command with --output {again} goes on."]


class MethodName(str, Enum):
    """See `evaluation.methods`."""

    UNMODIFIED = "unmodified"
    YARN = "yarn"
    DYNAMIC = "dynamic"
    LINEAR = "linear"
    NTK = "ntk"
    SELF_EXTEND = "self-extend"


class TaskName(str, Enum):
    """What `evaluate` asks; see the modules of `evaluation` with these names."""

    PASSKEY = "passkey"
    LOSS = "loss"


class TuneTaskName(str, Enum):
    """What `tune` asks."""

    LOSS = "loss"
    PASSKEY = "passkey"
    PROMPTS = "prompts"


DEFAULT_TASKS = list(TaskName)
DEFAULT_METHODS = ("unmodified", "yarn", "self-extend")


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

LOG = "vllm.log"

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
def demo(
    output: Annotated[Path | None, typer.Option(help="Write results, a picture and vLLM's log to this folder.")] = None,
) -> None:
    """Find passkeys in texts up to 16 times longer than the small model that ships with the package was trained on."""
    with _evaluating(output) as session:
        from .demo import run
        from .evaluation.tables import passkey_table

        comparison = run.comparison()
        length = comparison.checkpoint.report.trained_length
        rows, written = _compare(comparison, {"demo": dataclasses.asdict(run.TASK)}, session)
    title = f"Passkeys found by a model trained on {length} tokens"
    _print_tables(functools.partial(passkey_table, rows, title=title), run.METHODS)
    _print_example(comparison.prompts[0][1], rows)
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
    task: Annotated[list[TaskName], typer.Option(help="What to ask; several.")] = DEFAULT_TASKS,
    served_length: Annotated[
        int | None,
        typer.Option(
            parser=_tokens,
            metavar="TOKENS",
            help="How many tokens the server is sized for, if more than --max-model-len.",
        ),
    ] = None,
    length: Annotated[
        list[int] | None, typer.Option(min=64, help="A passkey text's tokens; without one, doubling up to the longest.")
    ] = None,
    depths: Depths = 5,
    keys: Annotated[int, typer.Option(min=1, max=6, help="How many keys a text hides, one of which is asked for.")] = 1,
    rounds: Rounds = 1,
    loss_length: LossLength = None,
    text: Text = None,
    chat: Chat = None,
    group_size: GroupSize = None,
    neighbor_window: NeighborWindow = None,
    trained_length: TrainedLength = None,
    exact_short: ExactShort = True,
    log_scale: LogScale = True,
    seed: Seed = 0,
    engine_args: EngineArgs = "{}",
    output: Annotated[
        Path | None, typer.Option(help="Keep every answer, results.json and pictures here; a broken-off run goes on.")
    ] = None,
) -> None:
    """Compare Self-Extend with the unmodified model and with what vLLM has: keys found, and loss over position."""
    settings = _settings(group_size, neighbor_window, trained_length, exact_short, log_scale)
    with _evaluating(output) as session:
        from .evaluation.comparison import Comparison
        from .evaluation.engine import OWN_ARGUMENTS, prompt_encoder
        from .evaluation.methods import allowed_methods, read_checkpoint
        from .evaluation.tables import loss_table, passkey_table

        arguments = _engine_args(engine_args, OWN_ARGUMENTS)
        served = max(max_model_len, served_length or 0)
        checkpoint = read_checkpoint(model, served, settings, arguments)
        encode_chat, encode, uses_chat = prompt_encoder(model, arguments, chat=chat)
        lengths = tuple(length or _doubling(checkpoint.report.trained_length // 2, max_model_len))
        if (longest := max(lengths)) > max_model_len:
            raise ValueError(f"--length {longest} is more than --max-model-len {max_model_len}.")
        tasks: list[Task] = []
        if TaskName.PASSKEY in task:
            tasks.append(_passkey_task(lengths, depths, keys, rounds, seed, uses_chat))
        if TaskName.LOSS in task:
            tasks.append(_loss_task(text, loss_length, max_model_len))
        prompts = [(one, list(one.prompts(encode_chat if one.name == "passkey" else encode))) for one in tasks]
        methods = list(dict.fromkeys(one.value for one in method or ()))
        left_out: list[str] = []
        if not methods:
            methods, left_out = allowed_methods(DEFAULT_METHODS, checkpoint, settings)
        comparison = Comparison(checkpoint, methods, prompts, settings, arguments)
        asked = {
            "model": model,
            "methods": methods,
            "served_length": served,
            "self_extend": settings,
            "plan": dataclasses.asdict(checkpoint.report),
            "engine_args": arguments,
            "chat": uses_chat,
            "prompts": {one.name: _digest(prompts) for one, prompts in prompts},
        }
        rows, written = _compare(comparison, asked, session)
    for one in tasks:
        mine = [row for row in rows if row["task"] == one.name]
        if one.name == "passkey":
            title = f"Passkeys found, on a server of {served:,} tokens"
            table_of = functools.partial(passkey_table, mine, title=title)
        else:
            table_of = functools.partial(loss_table, mine, trained_length=checkpoint.report.trained_length)
        _print_tables(table_of, methods)
    console.print("In brackets and behind +-: the 95 % interval.", highlight=False)
    for reason in left_out:
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
    with _evaluating(output) as session:
        from .evaluation.engine import OWN_ARGUMENTS, prompt_encoder, running
        from .evaluation.methods import read_checkpoint
        from .evaluation.screen import Stopped, trying
        from .evaluation.summary import group_sizes_of
        from .evaluation.tables import distance_from_auto, numbers_table
        from .evaluation.tuning import Numbers, Search, check_differs, try_numbers, write_search
        from .evaluation.user_prompts import UserTask, read_prompts

        arguments = {**_engine_args(engine_args, OWN_ARGUMENTS), "enforce_eager": True}
        checkpoint = read_checkpoint(model, max_model_len, settings, arguments)
        report = checkpoint.report
        if not exact_short:  # where no group size is automatic, the least that reaches is tried first
            least = smallest_group_size(report.trained_length, report.neighbor_window, max_model_len)
            settings |= {"exact_short": False, "group_size": least}
            report = read_checkpoint(model, max_model_len, settings, arguments).report
        encode_chat, encode, uses_chat = prompt_encoder(model, arguments, chat=chat)
        asked: Task
        if prompts is not None or task == TuneTaskName.PROMPTS:
            if prompts is None:
                raise ValueError("--task prompts needs a file of them: --prompts FILE.jsonl.")
            asked = UserTask(read_prompts(prompts), max_model_len)
        elif task == TuneTaskName.LOSS:
            asked = _loss_task(text, None, max_model_len)
        else:
            asked = _passkey_task((max_model_len,), depths, 1, rounds, seed, uses_chat)
        put = list(asked.prompts(encode if asked.scores_prompt else encode_chat))
        check_differs(asked, put, report.trained_length, exact_short)
        search = Search(report.trained_length, max_model_len, (report.group_size, report.neighbor_window))
        with (
            running("self-extend", checkpoint, settings, arguments) as llm,
            trying(session.stderr, 60 * budget) as show,
        ):

            def costs_of(numbers: Numbers) -> list[float]:
                show(f"{len(search.costs)} tried, now G {numbers[0]}, W {numbers[1]}")
                return try_numbers(llm, numbers, asked, put, report.trained_length)

            try:
                search.run(costs_of, 60 * budget)
            except Stopped:
                if not search.costs:
                    raise
        written = write_search(search, asked.scores_prompt, session.folder)
    _print_tables(functools.partial(numbers_table, search, asked.scores_prompt), group_sizes_of(search.costs))
    group_size, window = search.best
    console.print(distance_from_auto(search), soft_wrap=True, highlight=False)
    numbers = {CONFIG_KEY: {**settings, "group_size": group_size, "neighbor_window": window}}
    console.print(f"\n--additional-config '{json.dumps(numbers)}'", soft_wrap=True, highlight=False)
    _print_written(output, written)


def _need_vllm() -> None:
    if importlib.util.find_spec("vllm") is None:
        _fail(
            "this command needs vLLM. On a GPU machine: pip install 'vllm-selfextend[cuda]'. On a machine without one, "
            "with PyTorch's CPU build installed first: pip install 'vllm-selfextend[cpu]'."
        )


@contextlib.contextmanager
def _evaluating(output: Path | None) -> Iterator[Session]:
    """A run's folder and screen; what a user can mend, or stops, is one sentence.

    Without `output` the folder is a temporary one, and is removed at the end unless it is of use: it has the log of a
    run that failed, or answers to go on from.
    """
    _need_vllm()
    _need_eval_extra()
    from .evaluation.records import alone_in
    from .evaluation.screen import Stopped, stderr_to, stopped_by_signals

    folder, of_use = output, True
    try:
        if folder is None:
            folder = _temporary_folder()
        folder.mkdir(parents=True, exist_ok=True)
        with alone_in(folder):
            session, log = Session(folder, sys.stderr), folder / LOG
            try:
                with stderr_to(log) as session.stderr, stopped_by_signals():
                    yield session
                of_use = False
            except Stopped as stop:
                of_use = bool(session.goes_on)
                errors.print("Stopped.", *session.goes_on, highlight=False, soft_wrap=True)
                raise typer.Exit(128 + stop.signum) from stop
            except (ValueError, OSError) as error:
                from .evaluation.engine import OWN_ARGUMENTS  # and with it vLLM, whose log was to go into the file

                problem = _keep_traceback(error, log)
                of_use = problem is None or bool(session.goes_on)
                kept = "is in" if problem is None else f"could not be written ({problem}) to"
                _fail(error, *_hints(str(error), OWN_ARGUMENTS), f"Its traceback {kept} {log}.", *session.goes_on)
            except Exception:  # whose traceback follows; the end of the log stands above it
                for sentence in session.goes_on:
                    errors.print(sentence, highlight=False, soft_wrap=True)
                raise
    except (ValueError, OSError) as error:  # there is no log to write to
        of_use = False
        _fail(error)
    finally:
        if output is None and folder is not None and not of_use:
            shutil.rmtree(folder)


def _temporary_folder() -> Path:
    try:
        return Path(tempfile.mkdtemp(prefix="vllm-selfextend-"))
    except OSError as error:
        raise ValueError(f"Without --output a run needs a temporary folder, and there is none: {error}") from error


def _need_eval_extra() -> None:
    missing = [name for name in ("matplotlib", "scipy") if importlib.util.find_spec(name) is None]
    if missing:
        _fail(f"this command needs {' and '.join(missing)}: pip install 'vllm-selfextend[eval]'.")


def _fail(error: Exception | str, *more: str) -> NoReturn:
    """End with an error as one sentence, and more of them below it."""
    errors.print(Styled("error:", "bold red"), str(error), highlight=False, soft_wrap=True)
    for sentence in more:
        errors.print(sentence, highlight=False, soft_wrap=True)
    raise typer.Exit(1) from (error if isinstance(error, Exception) else None)


def _keep_traceback(error: Exception, log: Path) -> OSError | None:
    """Write an error's traceback to a log; what comes back is why that could not be done."""
    try:
        with log.open("a", encoding="utf-8", errors="backslashreplace") as file:
            traceback.print_exception(error, file=file)
    except OSError as problem:  # the disk is full, for instance, and that may be the error itself
        return problem
    return None


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
    try:
        arguments = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"--engine-args {text!r} is not JSON: {error}") from error
    if not isinstance(arguments, dict):
        raise ValueError(f'--engine-args {text!r} must be an object such as {{"dtype": "float32"}}.')
    if ours := [name for name in taken if name in arguments]:
        raise ValueError(f"--engine-args cannot set {ours[0]!r}: the command or its other options decide it.")
    return arguments


def _doubling(first: int, last: int) -> list[int]:
    lengths = [last]
    while lengths[-1] // 2 >= max(first, 64):
        lengths.append(lengths[-1] // 2)
    return lengths[::-1]


def _passkey_task(
    lengths: tuple[int, ...], depths: int, keys: int, rounds: int, seed: int, uses_chat: bool
) -> "PasskeyTask":
    from .evaluation.passkey import ASKED, COMPLETED, PasskeyTask

    # Depths in the middle of as many equal parts.
    places = tuple((place + 0.5) / depths for place in range(depths))
    return PasskeyTask(lengths, places, (keys,), rounds, ASKED if uses_chat else COMPLETED, seed)


def _loss_task(texts: list[Path] | None, length: int | None, max_model_len: int) -> "LossTask":
    from .evaluation.loss import LossTask, read_texts, standard_library_texts

    if length is not None and length > max_model_len:
        raise ValueError(f"--loss-length {length} is more than --max-model-len {max_model_len}.")
    return LossTask(read_texts(texts) if texts else standard_library_texts(), length or max_model_len)


def _compare(comparison: "Comparison", asked: dict[str, Any], session: Session) -> "tuple[list[Row], list[Path]]":
    """Run what is not yet in the session's folder, with bars, and write the results there."""
    from .evaluation.machine import describe_machine
    from .evaluation.methods import METHODS
    from .evaluation.records import Records
    from .evaluation.screen import bars, reading_work

    comparison.check()
    records = session.records = Records(session.folder, asked | {"machine": describe_machine()})
    hidden_size = comparison.checkpoint.hidden_size
    work = {
        METHODS[method].label: sum(
            reading_work(len(prompt.token_ids), hidden_size)
            for _, prompts in comparison.missing(method, records)
            for prompt in prompts
        )
        for method in comparison.methods
    }
    with bars(session.stderr, work) as advance:
        comparison.run(
            records,
            lambda method, prompt: advance(METHODS[method].label, reading_work(len(prompt.token_ids), hidden_size)),
        )
    return comparison.rows(records), comparison.write(records)


def _digest(prompts: "list[Prompt]") -> dict[str, Any]:
    """How many prompts, and what tells them from others."""
    tokens = json.dumps([[prompt.name, prompt.token_ids] for prompt in prompts])
    return {"count": len(prompts), "sha256": hashlib.sha256(tokens.encode()).hexdigest()}


def _print_tables(table_of: Callable[[Sequence[Any]], Table], columns: Sequence[Any]) -> None:
    from .evaluation.tables import fitting

    for table in fitting(table_of, columns, console):
        console.print(table)


def _print_example(prompts: "list[Prompt]", rows: "list[Row]") -> None:
    """One prompt of the longest kind, its middle left out, and every method's answer."""
    from .evaluation.methods import METHODS

    longest, most = max(p.cell["length"] for p in prompts), max(p.cell["num_keys"] for p in prompts)
    wanted = {"length": longest, "num_keys": most, "depth": 0.5, "round": 0}
    prompt = next(prompt for prompt in prompts if prompt.cell == wanted)
    begin = prompt.text.index(str(prompt.expected))
    cut = prompt.text[:60], prompt.text[begin - 80 : begin + 60], prompt.text[-90:]
    console.print(Styled.assemble(("\nOne of the prompts", "bold"), f", {longest:,} tokens, cut for the screen:"))
    console.print(" ... ".join(cut), highlight=False, soft_wrap=True)
    answers = {"The key": prompt.expected}
    answers |= {METHODS[row["method"]].label: row["answer"].strip() for row in rows if row["name"] == prompt.name}
    for label, answer in answers.items():
        console.print(Styled.assemble((f"{label:<11}", "bold"), f"  {answer}"), highlight=False)


def _print_written(output: Path | None, written: "list[Path]") -> None:
    if output is not None:
        names = ", ".join(path.name for path in written)
        console.print(f"\nWrote {names} and {LOG} to {output}.", highlight=False, soft_wrap=True)


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
