"""`tune`: the group size and neighbor window that a model reads best with, found by trying them in one engine."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from ..method.config import SelfExtendConfig
from ..method.plan import CONFIG_KEY
from ..method.positions import smallest_group_size
from .engine import ask, prompt_encoder, running
from .loss import BLOCK, loss_task, mean_losses
from .methods import METHODS, Checkpoint, read_checkpoint
from .passkey import passkey_task
from .prompts import Prompt, Row, Task
from .records import write_json
from .run_folder import RunFolder
from .screen import Stopped, trying
from .search import Numbers, Search
from .user_prompts import UserTask, read_prompts

if TYPE_CHECKING:
    from vllm import LLM


@dataclass(frozen=True)
class Tuning:
    """What the numbers are tried on.

    Attributes:
        checkpoint: What is served, and how many tokens its server is sized for.
        task: What is gone by.
        prompts: Of the task.
        settings: Self-Extend's at the start, as in `additional_config["self_extend"]`.
        engine_args: Other arguments of vLLM's.
        search: Over the numbers; has what was tried once it has run.

    """

    checkpoint: Checkpoint
    task: Task
    prompts: Sequence[Prompt]
    settings: dict[str, Any]
    engine_args: dict[str, Any]
    search: Search

    @property
    def best_settings(self) -> dict[str, Any]:
        """Self-Extend's settings with the best numbers."""
        group_size, window = self.search.best
        return {**self.settings, "group_size": group_size, "neighbor_window": window}

    def run(self, folder: RunFolder, seconds: float) -> list[Path]:
        """Try numbers for so long, the engine's start not counted, and write what they cost to the folder.

        Whoever stops it gets what was tried by then.

        Returns:
            The files that were written.

        Raises:
            ValueError: Self-Extend cannot serve the checkpoint.
            Stopped: A signal came before anything was tried.

        """
        search = self.search
        method = dataclasses.replace(METHODS["self-extend"], settings=self.settings)
        with (
            running(method, self.checkpoint, self.engine_args) as llm,
            trying(folder.stderr, seconds) as show,
        ):

            def costs_of(numbers: Numbers) -> list[float]:
                show(f"{len(search.costs)} tried, now G {numbers[0]}, W {numbers[1]}")
                return try_numbers(llm, numbers, self.task, self.prompts, search.trained_length)

            try:
                search.run(costs_of, seconds)
            except Stopped:
                if not search.costs:
                    raise
        return write_search(search, self.task.scores_prompt, folder.path)


def tuning_from_options(
    model: str,
    max_model_len: int,
    settings: dict[str, Any],
    engine_args: dict[str, Any],
    *,
    task: str,
    prompts: Path | None,
    depths: int,
    rounds: int,
    seed: int,
    texts: Sequence[Path],
    chat: bool | None,
    exact_short: bool,
) -> Tuning:
    """What `tune` does, from its options (see there); `settings` are all of Self-Extend's but `exact_short`.

    Raises:
        ValueError: The options do not go together, or with the checkpoint; a file cannot be read; or no numbers would
            change an answer (see `check_differs`).
        OSError: There is no such model.

    """
    engine_args = {**engine_args, "enforce_eager": True}
    checkpoint = read_checkpoint(model, max_model_len, settings, engine_args)
    report = checkpoint.report
    auto: Numbers = report.group_size, report.neighbor_window
    if not exact_short:  # where no group size is automatic, the least that reaches is tried first
        least = smallest_group_size(report.trained_length, report.neighbor_window, max_model_len)
        settings = {**settings, "exact_short": False, "group_size": least}
        config = SelfExtendConfig.from_additional_config({CONFIG_KEY: settings})
        plan = config.plan(report.trained_length, max_model_len)
        auto = plan.group_size, plan.neighbor_window
    encode_chat, encode, uses_chat = prompt_encoder(model, engine_args, chat=chat)
    asked: Task
    if prompts is not None or task == "prompts":
        if prompts is None:
            raise ValueError("--task prompts needs a file of them: --prompts FILE.jsonl.")
        asked = UserTask(read_prompts(prompts), max_model_len)
    elif task == "loss":
        asked = loss_task(texts, None, max_model_len)
    else:
        asked = passkey_task((max_model_len,), depths, 1, rounds, seed, uses_chat=uses_chat)
    put = list(asked.prompts(encode if asked.scores_prompt else encode_chat))
    check_differs(asked, put, report.trained_length, exact_short)
    search = Search(report.trained_length, max_model_len, auto)
    return Tuning(checkpoint, asked, put, settings, engine_args, search)


def check_differs(task: Task, prompts: Sequence[Prompt], trained_length: int, exact_short: bool) -> None:
    """Refuse prompts that any two cells answer alike, before time is spent on them.

    Args:
        task: What is gone by.
        prompts: Of the task.
        trained_length: `L`, tokens.
        exact_short: Whether queries within it get the unmodified model's attention.

    Raises:
        ValueError: The loss is to be gone by, and no block of a text lies past the trained length; or prompts with
            their answers are, and all lie within it.

    """
    longest = max(len(prompt.token_ids) for prompt in prompts)
    if task.scores_prompt:
        if not any(begin >= trained_length for begin in range(0, longest, BLOCK)):
            raise ValueError(
                f"No {BLOCK} tokens of a text lie past the trained length {trained_length}: ask for a longer "
                "--max-model-len, or go by --task passkey."
            )
        return
    # The last token of an answer is not read.
    if exact_short and (read := longest + task.answer_tokens - 1) <= trained_length:
        raise ValueError(
            f"The longest prompt with its answer takes {read} tokens, within the trained length {trained_length}: no "
            "group size and no window changes an answer there. Give longer prompts, or ask for --no-exact-short."
        )


def try_numbers(
    llm: "LLM", numbers: Numbers, task: Task, prompts: Sequence[Prompt], trained_length: int
) -> list[float]:
    """Change a running engine's numbers, put all prompts to it, and say what they cost (see `Search.costs`)."""
    llm.collective_rpc("change_numbers", args=numbers)
    if not llm.reset_prefix_cache():
        raise RuntimeError("vLLM did not empty its prefix cache, whose keys follow from the numbers before.")
    costs: dict[str, list[float]] = {}

    def keep(prompt: Prompt, score: Row) -> None:
        if "found" in score:
            costs[prompt.name] = [0.0 if score["found"] else 1.0]
        else:
            blocks = mean_losses(score["block_losses"], len(prompt.token_ids))
            costs[prompt.name] = [loss for begin, _, loss in blocks if begin >= trained_length]

    ask(llm, task, prompts, keep)
    return [cost for prompt in prompts for cost in costs[prompt.name]]


def write_search(search: Search, is_loss: bool, folder: Path) -> list[Path]:
    """Write `tuning.json` and the heat map, and say which."""
    from .plots import plot_numbers

    means = {numbers: fmean(costs) for numbers, costs in search.costs.items()}
    cells = [
        {"group_size": group_size, "neighbor_window": window, "mean": means[group_size, window], "costs": costs}
        for (group_size, window), costs in search.costs.items()
    ]
    document = {
        "measure": measure(is_loss),
        "trained_length": search.trained_length,
        "max_model_len": search.max_model_len,
        "auto": search.auto,
        "best": search.best,
        "auto_above_best": search.auto_above_best().as_json(),
        "cells": cells,
    }
    write_json(folder / "tuning.json", document)
    plot_numbers(means, search.auto, search.best, measure(is_loss), folder / "tuning.png", is_share=not is_loss)
    return [folder / "tuning.json", folder / "tuning.png"]


def measure(is_loss: bool) -> str:
    """What a cell's mean is."""
    return "loss per token past the trained length (nats)" if is_loss else "share of wrong answers"
