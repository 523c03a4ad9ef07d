"""Which architectures are proved: `python -m benchmarks.model_matrix`, or with names to run just those.

Every architecture of `tests/engine/architectures.py` is written as a tiny random checkpoint and served with Self-Extend
through vLLM on a CPU. Its greedy tokens and all log-probabilities are held against the second oracle, transformers in
eager with scores from the paper (`tests/engine/oracle.py`), on both sides of the window and of the trained length. What
`vllm-selfextend plan` says of its KV cache is held against the engine's. An
architecture that is refused, or that fails, is put to stock vLLM too, with short texts: does that agree with
transformers? Then `SelfExtend.apply` extends the same checkpoint in transformers, and is held against the same oracle.
Every step runs in a process of its own; one that crashes or hangs stops nothing.
"""

import importlib.util
import json
import multiprocessing
import os
import tempfile
import textwrap
import time
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Annotated, Any

from tests.stand_ins import use_stand_ins

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
os.environ["HF_HUB_OFFLINE"] = "1"
if importlib.util.find_spec("torchvision") is None:  # before transformers looks
    use_stand_ins()

import rich.box
import torch
import transformers
import typer
import vllm
from rich.console import Console
from rich.table import Table
from vllm import LLM
from vllm.model_executor.models import registry

import vllm_selfextend
from tests.engine.architectures import ARCHITECTURES, BY_TITLE, Architecture
from tests.support import oracle
from tests.support.cache import cache_bytes
from tests.support.comparison import NEW_TOKENS, TOLERANCE, Generated, compare, generate, prompts
from tests.support.engine_defaults import ENGINE_DEFAULTS
from tests.support.models import TRAINED_LENGTH, random_prompts
from vllm_selfextend.method.positions import GroupSize
from vllm_selfextend.vllm.report import plan_report

from .model_matrix_apply import extend

RESULTS = Path("benchmarks/results/model_matrix.jsonl")
DOCS = Path("docs/models.md")
MARKER = "## Architecture by architecture"
"""From here on `--docs` writes the page; what stands before is written by hand."""
NEIGHBOR_WINDOW, MAX_MODEL_LEN = 18, 245
SECONDS = 120
"""How long a step may take."""

REFUSALS = (
    "Self-Extend cannot serve",
    "Self-Extend (attention backend CUSTOM) cannot run",
    "Self-Extend cannot be applied to",
)
OTHER_GROUP_SIZES = (2, 4)
"""Wrong ones, near what is automatic at the lengths that are read: up to 5.5."""
STATES_TOLERANCE = 1e-4
"""Of a normalised state's numbers, and of a class's probability."""

PRELOADED = [
    "tests.engine.conftest",
    "tests.engine.architectures",
    "vllm.v1.engine.llm_engine",
    "vllm.v1.worker.cpu_worker",
    "vllm.model_executor.models.llama",
    "vllm_selfextend.vllm.cpu_worker",
    "vllm_selfextend.vllm.attention",
    "transformers.models.auto.modeling_auto",
    "transformers.models.llama.modeling_llama",
]
"""Modules that the processes of all steps have from the start."""

console = Console()


@dataclass(frozen=True)
class Result:
    """What became of an architecture.

    Attributes:
        status: "proved", "close" (in bfloat16), "refused", "differs" or "not runnable".
        reason: Why it is not proved.
        stock: What stock vLLM does with short texts: "as transformers", or what is wrong.
        model: The class of vLLM's that ran.
        greatest: The greatest difference of a log-probability.
        applied: What became of it in transformers, by the same names.
        kv_bytes: Of the engine's KV cache per token, and per sequence of `MAX_MODEL_LEN` tokens.
        planned_kv_bytes: The same, as planned.

    """

    name: str
    variant: str
    known_as: str
    status: str
    reason: str = ""
    stock: str = ""
    model: str = ""
    greatest: float = 0.0
    seconds: float = 0.0
    notes: str = ""
    applied: dict[str, Any] = field(default_factory=dict)
    kv_bytes: list[int] = field(default_factory=list)
    planned_kv_bytes: list[int] = field(default_factory=list)


class StepError(Exception):
    """A step failed; what its process said last."""


def in_process(log: Path, step: Callable[..., Any], *args: Any) -> Any:
    """What `step` returns in a process of its own."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(sender, log, step, args))
    process.start()
    sender.close()
    try:
        if not receiver.poll(SECONDS):
            raise StepError(f"no end after {SECONDS} seconds")
        result, error = receiver.recv()
    except EOFError:
        process.join()
        raise StepError(f"the process died ({process.exitcode})") from None
    finally:
        process.kill()
        process.join()
    if error:
        raise StepError(error)
    return result


def _child(sender: Connection, log: Path, step: Callable[..., Any], args: tuple[Any, ...]) -> None:
    with log.open("a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    # vLLM looks at a model's class in a process that takes ten seconds to start; this one is new as well.
    registry._run_in_subprocess = lambda function: function()
    try:
        start = time.monotonic()
        sender.send((step(*args), ""))
        print(f"{step.__name__} {args[0]}: {time.monotonic() - start:.1f} s", flush=True)
    except BaseException as error:
        traceback.print_exc()
        sender.send((None, _innermost(error)))
    os._exit(0)


def _innermost(error: BaseException) -> str:
    """The error that says what is wrong, of those that it came with."""
    found = error
    while (cause := found.__cause__ or found.__context__) is not None and not _is_refusal(str(found)):
        found = cause
    lines = [line.strip() for line in str(found).splitlines() if line.strip()]
    pydantic = [line for line in lines if _is_refusal(line) or line.startswith("Value error, ")]
    frames = traceback.extract_tb(found.__traceback__)
    code = frames[-1].line if frames else None
    return f"{type(found).__name__}: {(pydantic or lines or [code or ''])[0].split(' [type=')[0]}"


def _is_refusal(message: str) -> bool:
    return any(refusal in message for refusal in REFUSALS)


def save(title: str, folder: Path) -> tuple[str, str]:
    return BY_TITLE[title].save(folder)


@dataclass(frozen=True)
class Served:
    """The class of vLLM's model, and what it generated, or the texts with their states or classes; see `Result`."""

    model: str
    found: list[Any]
    kv_bytes: list[int] = field(default_factory=list)
    planned_kv_bytes: list[int] = field(default_factory=list)
    why_not: str | None = None


def serve(title: str, checkpoint: str, extended: bool) -> Served:
    """Serve an architecture through vLLM."""
    architecture = BY_TITLE[title]
    settings: dict[str, Any] = {**ENGINE_DEFAULTS, "dtype": architecture.dtype, "max_num_batched_tokens": 256}
    settings |= architecture.engine
    if architecture.task != "generate":
        settings |= {"runner": "pooling", "skip_tokenizer_init": False}
    if extended:
        numbers = {"neighbor_window": NEIGHBOR_WINDOW}
        report = plan_report(checkpoint, MAX_MODEL_LEN, numbers, settings)
        settings |= {
            "attention_backend": "CUSTOM",
            "max_model_len": MAX_MODEL_LEN,
            "additional_config": {"self_extend": numbers},
        }
        texts = prompts(NEIGHBOR_WINDOW, MAX_MODEL_LEN, block_size=32)
    else:
        settings["max_model_len"] = TRAINED_LENGTH
        texts = random_prompts((1, 5, 17, 18, 19, 33, TRAINED_LENGTH - NEW_TOKENS), seed=0)
    llm = LLM(checkpoint, **settings)
    model = llm.apply_model(lambda one: type(one).__name__)[0]
    cache: dict[str, Any] = {}
    if extended:
        planned = [size for size in (report.kv_bytes_per_token, report.kv_bytes_per_sequence) if size is not None]
        cache = {"kv_bytes": list(cache_bytes(llm)), "planned_kv_bytes": planned, "why_not": report.why_not}
    if architecture.task == "generate":
        return Served(model, list(generate(llm, texts)), **cache)
    requests = [{"prompt_token_ids": text} for text in texts]
    if architecture.task == "embed":
        states = [output.outputs.embedding for output in llm.embed(requests, use_tqdm=False)]
    else:
        states = [output.outputs.probs for output in llm.classify(requests, use_tqdm=False)]
    return Served(model, list(zip(texts, states, strict=True)), **cache)


def hold(title: str, checkpoint: str, found: list[Any], extended: bool) -> float:
    """Hold what a host gave against the oracle; the greatest difference."""
    torch.set_num_threads(1)  # tiny products, which threads make slower
    architecture = BY_TITLE[title]
    method = oracle.SelfExtend("auto" if extended else 1, NEIGHBOR_WINDOW, TRAINED_LENGTH)
    if architecture.task == "generate":
        generated: list[Generated] = found
        wanted = oracle.next_token_logprobs(checkpoint, [one.tokens for one in generated], method)
        return compare(generated, [torch.from_numpy(one) for one in wanted])
    texts = [text for text, _ in found]
    if architecture.task == "embed":
        states = [torch.from_numpy(one[-1]) for one in oracle.hidden_states(checkpoint, texts, method)]
        expected = [one / one.norm() for one in states]
    else:
        expected = [torch.from_numpy(one).softmax(-1) for one in oracle.class_logits(checkpoint, texts, method)]
    differences = [
        float((torch.tensor(got) - want).abs().max()) for (_, got), want in zip(found, expected, strict=True)
    ]
    if max(differences) > STATES_TOLERANCE:
        raise AssertionError(f"off by {max(differences):.4f}")
    return max(differences)


def hold_roughly(title: str, checkpoint: str, found: list[Generated]) -> str:
    """Hold what vLLM gave in bfloat16 against the oracle, where tokens may differ by rounding; what was found.

    The mean difference of log-probabilities past the trained length has to be near what the oracle's own is if the
    model computes in bfloat16, and clearly less than with one group size for all positions past it.

    Raises:
        AssertionError: It is not.

    """
    torch.set_num_threads(1)  # tiny products, which threads make slower
    texts = [one.tokens for one in found]

    def past_trained(group: GroupSize, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        method = oracle.SelfExtend(group, NEIGHBOR_WINDOW, TRAINED_LENGTH)
        expected = oracle.next_token_logprobs(checkpoint, texts, method, dtype)
        chosen = [
            torch.from_numpy(logprobs)[range(len(text) - 1), text[1:]]
            for text, logprobs in zip(texts, expected, strict=True)
        ]
        return torch.cat([logprobs[TRAINED_LENGTH:] for logprobs in chosen])

    got = torch.cat([torch.tensor(one.logprobs)[TRAINED_LENGTH:] for one in found])
    exact = past_trained("auto")
    right, *others = (
        float((got - wanted).abs().mean()) for wanted in (exact, *(past_trained(group) for group in OTHER_GROUP_SIZES))
    )
    of_rounding = float((past_trained("auto", torch.bfloat16) - exact).abs().mean())
    said = (
        "in bfloat16, the only dtype of vLLM's code for it on a CPU: log-probabilities past the trained length differ "
        f"by {right:.3f} on average, transformers' own in bfloat16 by {of_rounding:.3f}; with group size "
        f"{OTHER_GROUP_SIZES[0]} or {OTHER_GROUP_SIZES[1]} everywhere by {others[0]:.3f} and {others[1]:.3f}"
    )
    if right >= min(1.5 * of_rounding, 0.75 * min(others)):
        raise AssertionError(said)
    return said


def run(architecture: Architecture, log: Path) -> Result:
    """Run one architecture."""
    start = time.monotonic()

    def result(status: str, reason: str = "", **more: Any) -> Result:
        seconds = round(time.monotonic() - start, 1)
        names = architecture.name, architecture.variant, architecture.known_as
        return Result(*names, status, reason, seconds=seconds, notes=architecture.notes, **more)

    with tempfile.TemporaryDirectory() as folder:
        try:
            checkpoint, for_oracle = in_process(log, save, architecture.title, Path(folder))
        except StepError as error:
            return result("not runnable", f"no checkpoint: {error}")
        try:
            served: Served = in_process(log, serve, architecture.title, checkpoint, True)
        except StepError as error:
            reason = str(error)
            stock = _stock(architecture.title, checkpoint, for_oracle, log)
            if _is_refusal(reason):
                reason = reason[reason.index("Self-Extend") :].replace(checkpoint, "it")
                return result("refused", reason, stock=stock)
            return result("not runnable", reason.replace(folder, "FOLDER"), stock=stock)
        sizes = {"kv_bytes": served.kv_bytes, "planned_kv_bytes": served.planned_kv_bytes}
        known: dict[str, Any] = {"model": served.model, **sizes}
        try:
            if served.kv_bytes != served.planned_kv_bytes:
                raise StepError(
                    f"the KV cache takes {served.kv_bytes} bytes per token and per sequence, and plan says "
                    f"{served.why_not or served.planned_kv_bytes}"
                )
            if architecture.dtype != "float32":
                said = in_process(log, hold_roughly, architecture.title, for_oracle, served.found)
                return result("close", said, **known)
            greatest = in_process(log, hold, architecture.title, for_oracle, served.found, True)
        except StepError as error:
            return result("differs", str(error), stock=_stock(architecture.title, checkpoint, for_oracle, log), **known)
        return result("proved", greatest=greatest, **known)


def _stock(title: str, checkpoint: str, for_oracle: str, log: Path) -> str:
    """What stock vLLM does with short texts."""
    try:
        found = in_process(log, serve, title, checkpoint, False).found
    except StepError as error:
        return f"fails: {error}".replace(str(Path(checkpoint).parent), "FOLDER")
    try:
        in_process(log, hold, title, for_oracle, found, False)
    except StepError as error:
        return f"differs from transformers: {error}"
    return "as transformers"


def run_apply(architecture: Architecture, log: Path) -> dict[str, Any]:
    """Run one architecture in transformers; what fails, and is not refused, is put to transformers as it is too."""
    start, title = time.monotonic(), architecture.title
    texts = prompts(NEIGHBOR_WINDOW, MAX_MODEL_LEN, block_size=32)
    numbers: tuple[GroupSize, int] = "auto", NEIGHBOR_WINDOW

    def result(status: str, **more: Any) -> dict[str, Any]:
        return {"status": status, **more, "seconds": round(time.monotonic() - start, 1)}

    with tempfile.TemporaryDirectory() as folder:
        try:
            _, checkpoint = in_process(log, save, title, Path(folder))
        except StepError as error:
            return result("not runnable", reason=f"no checkpoint: {error}")
        try:
            found = in_process(log, extend, title, checkpoint, texts, numbers)
        except StepError as error:
            reason = str(error).replace(folder, "FOLDER")
            if _is_refusal(reason):
                return result("refused", reason=reason[reason.index("Self-Extend") :])
            try:
                in_process(log, extend, title, checkpoint, texts, None)
            except StepError as of_transformers:
                return result("not runnable", reason=str(of_transformers).replace(folder, "FOLDER"))
            return result("crashes", reason=reason)
        try:
            greatest = in_process(log, hold, title, checkpoint, found, True)
        except StepError as error:
            return result("differs", reason=str(error))
        return result("proved", greatest=greatest)


def write_json(path: Path, results: list[Result]) -> list[Result]:
    """Put the results in the place of those that the file has for the same rows; all of them, sorted."""
    before = [Result(**json.loads(line)) for line in path.read_text().splitlines()] if path.exists() else []
    rows = {(one.name, one.variant): one for one in (*before, *results)}
    known = {(one.name, one.variant) for one in ARCHITECTURES}
    merged = [rows[key] for key in sorted(rows, key=lambda key: (key[0].lower(), key[1])) if key in known]
    path.write_text("".join(json.dumps(asdict(one)) + "\n" for one in merged), encoding="utf-8")
    return merged


def outcome(result: Result) -> str:
    """A row's last column."""

    def short(text: str) -> str:
        return textwrap.shorten(text, 240, placeholder=" ...")

    if result.status == "proved":
        through = " through vLLM's Transformers backend" if result.model.startswith("Transformers") else ""
        return f"**proved**{through}"
    if result.status == "close":
        return f"**close** {result.reason}"
    stock, reason = short(result.stock), result.reason.removeprefix("Self-Extend cannot serve it: ")
    if result.status == "refused":
        return f"refused: {reason}" + (f" (stock vLLM {stock})" if stock not in ("", "as transformers") else "")
    if result.status == "differs":
        return f"**differs**: {short(reason)}; stock vLLM on short texts: {stock}"
    if stock.startswith("fails: "):
        return f"not runnable here, stock vLLM fails too: `{stock.removeprefix('fails: ')}`"
    return f"not runnable here: `{short(reason)}`; stock vLLM on short texts: {stock}"


def outcome_in_transformers(result: Result) -> str:
    """A row's column of `SelfExtend.apply`."""
    status, reason = result.applied.get("status", "not run"), result.applied.get("reason", "")
    if status == "refused":
        return f"refused: {reason.partition(': ')[2]}"
    if status == "not runnable":
        return f"not runnable, transformers alone fails too: `{textwrap.shorten(reason, 240, placeholder=' ...')}`"
    return f"**{status}**" + (f": {reason}" if reason else "")


def without_row() -> tuple[list[str], list[str]]:
    """The registry's names that have no row: those that transformers has no class for, and the others."""
    kinds = (
        registry._TEXT_GENERATION_MODELS,
        registry._TRANSFORMERS_SUPPORTED_MODELS,
        registry._MULTIMODAL_MODELS,
        registry._LATE_INTERACTION_MODELS,
        registry._REWARD_MODELS,
    )
    names = {name for kind in kinds for name in kind} - {one.name for one in ARCHITECTURES}
    unknown = {name for name in names if not hasattr(transformers, name)}
    return sorted(unknown, key=str.lower), sorted(names - unknown, key=str.lower)


def docs(results: list[Result]) -> str:
    """The page from `MARKER` on."""
    counts = Counter(result.status for result in results)
    applied = Counter(result.applied.get("status", "not run") for result in results)
    in_transformers = ", ".join(f"{count} {status}" for status, count in applied.most_common())
    proved = {result.name for result in results if result.status == "proved"}
    unknown, others = without_row()
    vllm_version, hf_version = vllm.__version__.split("+")[0], transformers.__version__
    kinds = ("proved", "close", "refused", "differs", "not runnable")
    rows, close, refused, different, not_run = (counts[kind] for kind in kinds)
    text = f"""{MARKER}

What becomes of each decoder architecture of vLLM {vllm_version}, found out by running it: a tiny random checkpoint is
served with Self-Extend through vLLM on a CPU, in float32, and its greedy tokens and all log-probabilities, of prompts
and answers, are held against a second implementation that shares no code with this project (transformers
{hf_version} in eager, scores straight from the paper). The texts end on both sides of the window and of the trained
length. **Proved** means: every token the same, every log-probability within {TOLERANCE:g}.

Models of images, video or sound are served with text alone, with a stand-in for torchvision. What is refused or fails
was put to stock vLLM too, with short texts; where a row says nothing of it, it agrees with transformers there. A row
says so if vLLM runs the architecture through its Transformers backend. Of those that are not runnable, stock vLLM fails
to load the model; Self-Extend has nothing to object to in their configs.

```
make models  # python -m benchmarks.model_matrix --docs
```

Version {vllm_selfextend.__version__} of this project: **{len(proved)} architectures proved**, in {rows} rows;
{close} rows close, {refused} refused at start-up, {not_run} not runnable on this CPU, {different} different. Every
number is in [model_matrix.jsonl](../benchmarks/results/model_matrix.jsonl).

The last column is the same checkpoint in transformers, without vLLM, under [`SelfExtend.apply`](transformers.md), held
against the same implementation, with the same limit; of the rows {in_transformers}.
Prompts are read in one call, without a cache; answers come from `generate`, all prompts at once, padded on the left.

| architecture | families | vLLM | `SelfExtend.apply` |
|---|---|---|---|
"""
    lines = [text.rstrip("\n")]
    for result in results:
        title = f"{result.name}, {result.variant}" if result.variant else result.name
        notes = f" {result.notes}" if result.notes else ""
        outcomes = outcome(result) + notes, outcome_in_transformers(result)
        cells = (cell.replace("|", "\\|") for cell in (title, result.known_as, *outcomes))
        lines.append(f"| {' | '.join(cells)} |")
    lines += [
        "",
        f"transformers {hf_version} has no implementation to compare these {len(unknown)} of vLLM's registry with:",
        f"{', '.join(unknown)}.",
        "",
        f"Of these {len(others)}, models of speech among them, no tiny version has been made; nothing is known:",
        f"{', '.join(others)}.",
    ]
    return "\n".join(lines) + "\n"


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
            result = run(architecture, log or Path(os.devnull))
        if host != "vllm":
            applied = run_apply(architecture, log or Path(os.devnull))
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
        by_hand, _, _ = DOCS.read_text(encoding="utf-8").partition(MARKER)
        DOCS.write_text(by_hand + docs(merged), encoding="utf-8")
    if any({one.status, one.applied.get("status")} & {"differs", "crashes"} for one in merged):
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
