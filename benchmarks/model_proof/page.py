"""What docs/models.md says, architecture by architecture."""

import textwrap
from collections import Counter
from pathlib import Path

import transformers
import vllm
from vllm.model_executor.models import registry

import vllm_selfextend
from tests.support.comparison import TOLERANCE

from .architectures import ARCHITECTURES
from .results import Result

DOCS = Path("docs/models.md")
MARKER = "## Architecture by architecture"
"""From here on `--docs` writes the page; what stands before is written by hand."""


def write_page(results: list[Result]) -> None:
    """Rewrite the page from `MARKER` on."""
    by_hand, _, _ = DOCS.read_text(encoding="utf-8").partition(MARKER)
    DOCS.write_text(by_hand + page(results), encoding="utf-8")


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


def page(results: list[Result]) -> str:
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
make models  # python -m benchmarks.model_proof --docs
```

Version {vllm_selfextend.__version__} of this project: **{len(proved)} architectures proved**, in {rows} rows;
{close} rows close, {refused} refused at start-up, {not_run} not runnable on this CPU, {different} different. Every
number is in [model_proof.jsonl](../benchmarks/results/model_proof.jsonl).

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
