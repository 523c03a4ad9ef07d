"""The demo: how many passkeys the small model finds, unmodified and with Self-Extend, over the length of the prompt."""

import dataclasses
import json
import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import MODEL_DIR
from .passkey import KEY_DIGITS, PasskeyPrompt, make_prompt

LENGTHS = (256, 512, 1024, 2048, 4096)
KEY_COUNTS = (1, 4)
DEPTHS = tuple(step / 20 for step in range(21))
ROUNDS = 2
"""Prompts per depth: with 21 depths, 42 per length and number of keys."""

METHODS = {"unmodified": "unmodified", "self_extend": "Self-Extend"}
"""By name: what people are shown."""


@dataclass(frozen=True)
class Task:
    """One prompt and where it belongs in the table."""

    num_tokens: int
    num_keys: int
    depth: float
    prompt: PasskeyPrompt


@dataclass(frozen=True)
class Result:
    """What a model answered to one prompt."""

    method: str
    num_tokens: int
    num_keys: int
    depth: float
    expected: str
    answer: str

    @property
    def found(self) -> bool:
        """Whether the answer is the key."""
        return self.answer == self.expected


def make_tasks(seed: int = 0) -> list[Task]:
    """The demo's prompts, the same for both methods."""
    rng = random.Random(seed)
    return [
        Task(num_tokens, num_keys, depth, make_prompt(num_tokens, num_keys, depth, rng))
        for num_tokens in LENGTHS
        for num_keys in KEY_COUNTS
        for depth in DEPTHS
        for _ in range(ROUNDS)
    ]


def engine_settings(method: str) -> dict[str, Any]:
    """What to give `vllm.LLM` for a method: the whole difference is in these lines."""
    longest = max(LENGTHS) + KEY_DIGITS
    shared = {
        "model": str(MODEL_DIR),
        "max_model_len": longest,
        "dtype": "float32",
        "enforce_eager": True,
        "max_num_batched_tokens": 2048,
        "kv_cache_memory_bytes": 256 << 20,
        "use_tqdm_on_load": False,
        "disable_log_stats": True,
    }
    if method == "self_extend":
        return shared | {"attention_backend": "CUSTOM"}
    # The plain model at positions it was never trained on: vLLM must be told that the config allows them.
    return shared | {"hf_overrides": {"max_position_embeddings": longest}}


def run_method(method: str, tasks: list[Task], on_answer: Callable[[], None]) -> list[Result]:
    """Answer every task through vLLM's `LLM`; `on_answer` is called once a task."""
    from vllm import LLM, SamplingParams

    llm = LLM(**engine_settings(method))
    sampling = SamplingParams(temperature=0.0, max_tokens=KEY_DIGITS)
    results = []
    try:
        for batch in _by_length(tasks):
            outputs = llm.generate([task.prompt.text for task in batch], sampling, use_tqdm=False)
            for task, output in zip(batch, outputs, strict=True):
                if (num_tokens := len(output.prompt_token_ids or ())) != task.num_tokens:
                    raise RuntimeError(f"A prompt made of {task.num_tokens} tokens came to vLLM as {num_tokens}.")
                answer = output.outputs[0].text.strip()
                results.append(Result(method, task.num_tokens, task.num_keys, task.depth, task.prompt.answer, answer))
                on_answer()
    finally:
        # End the engine's processes, so that the next one has the machine to itself.
        llm.llm_engine.engine_core.shutdown(timeout=30)
    return results


def accuracy(results: Iterable[Result], method: str, num_tokens: int, num_keys: int) -> float:
    """The share of keys found in one cell of the table, 0 to 1."""
    cell = [r for r in results if (r.method, r.num_tokens, r.num_keys) == (method, num_tokens, num_keys)]
    return sum(result.found for result in cell) / len(cell)


def write_results(results: list[Result], trained_length: int, output: Path) -> None:
    """Write `results.json` and `accuracy.png` to the folder `output`, making it if needed."""
    output.mkdir(parents=True, exist_ok=True)
    rows = [dataclasses.asdict(result) | {"found": result.found} for result in results]
    table = [
        {"num_tokens": n, "num_keys": k} | {method: accuracy(results, method, n, k) for method in METHODS}
        for n in LENGTHS
        for k in KEY_COUNTS
    ]
    document = {"trained_length": trained_length, "accuracy": table, "prompts": rows}
    (output / "results.json").write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    _plot(results, trained_length, output / "accuracy.png")


def _by_length(tasks: list[Task]) -> list[list[Task]]:
    return [[task for task in tasks if task.num_tokens == num_tokens] for num_tokens in LENGTHS]


def _plot(results: list[Result], trained_length: int, path: Path) -> None:
    from matplotlib.figure import Figure
    from matplotlib.ticker import PercentFormatter

    figure = Figure(figsize=(8.0, 4.5), layout="constrained")
    axes = figure.subplots()
    for method, color in (("self_extend", "tab:blue"), ("unmodified", "tab:red")):
        for num_keys, style in zip(KEY_COUNTS, ("o-", "s--"), strict=True):
            shares = [accuracy(results, method, num_tokens, num_keys) for num_tokens in LENGTHS]
            keys = "1 key" if num_keys == 1 else f"{num_keys} keys"
            axes.plot(LENGTHS, shares, style, color=color, label=f"{METHODS[method]}, {keys}")
    axes.axvline(trained_length, color="gray", linestyle=":", label=f"trained length, {trained_length} tokens")
    axes.set_xscale("log", base=2)
    axes.set_xticks(LENGTHS, [f"{num_tokens:,}" for num_tokens in LENGTHS])
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    axes.set(xlabel="tokens in the prompt", ylabel="passkeys found", ylim=(-0.03, 1.05))
    axes.grid(alpha=0.3)
    axes.legend(loc="lower left")
    figure.savefig(path, dpi=150)
