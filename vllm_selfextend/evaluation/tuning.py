"""`tune`: the group size and neighbor window that a model reads best with, found by trying them in one engine."""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING

from ..method.positions import GroupSize, capacity, largest_auto_window, smallest_group_size
from .engine import ask
from .intervals import LEVEL, Estimate, difference
from .loss import BLOCK, mean_losses
from .prompts import Prompt, Row, Task
from .records import write_json

if TYPE_CHECKING:
    from vllm import LLM

Numbers = tuple[GroupSize, int]
"""Group size and neighbor window."""


WINDOW_SHARES = (1 / 16, 1 / 4, 1 / 2)
"""Of the trained length: the windows of the coarse grid."""
GROUP_FACTORS = (1.0, 1.5, 2.5)
"""Times the smallest group size that reaches: those of the coarse grid."""
WINDOW_STEP, GROUP_STEP = math.sqrt(2), 1.2
"""How far the neighbors of a cell are in the fine search."""


@dataclass
class Search:
    """A search over both numbers, coarse to fine. What cannot reach `max_model_len` is never tried.

    Attributes:
        trained_length: `L`, tokens.
        max_model_len: `N`, tokens.
        auto: The numbers that are taken without a choice; tried first.
        costs: Of every cell tried: a value per prompt (0 found, 1 not found) or per block of text (mean loss per token
            past the trained length). Lower is better.

    """

    trained_length: int
    max_model_len: int
    auto: Numbers
    costs: dict[Numbers, list[float]] = field(default_factory=dict)

    def run(self, costs_of: Callable[[Numbers], list[float]], seconds: float) -> None:
        """Try cells until the best one's neighbors are tried, or until another cell would take longer than is left."""
        begin = time.monotonic()
        longest = 0.0
        while (numbers := self._next()) is not None:
            started = time.monotonic()
            if self.costs and started - begin + longest > seconds:
                return
            self.costs[numbers] = costs_of(numbers)
            longest = max(longest, time.monotonic() - started)

    @property
    def best(self) -> Numbers:
        """The cell with the lowest mean; the default among equals."""

        def order(numbers: Numbers) -> tuple[float, bool, str]:
            return fmean(self.costs[numbers]), numbers != self.auto, str(numbers)

        return min(self.costs, key=order)

    def auto_above_best(self) -> Estimate:
        """How much more the default costs than the best cell, pair by pair.

        The best of many is in part the luckiest, so the interval is one that all cells keep to (Bonferroni).
        """
        others = max(1, len(self.costs) - 1)
        return difference(self.costs[self.auto], self.costs[self.best], level=1 - (1 - LEVEL) / others)

    def _next(self) -> Numbers | None:
        candidates = [self.auto, *self._coarse(), *(self._around(self.best) if self.costs else ())]
        return next((numbers for numbers in candidates if numbers not in self.costs and self._reaches(*numbers)), None)

    def _coarse(self) -> Iterator[Numbers]:
        windows = sorted({*(max(1, round(self.trained_length * share)) for share in WINDOW_SHARES), self.auto[1]})
        for factor, window in product(GROUP_FACTORS, windows):
            least = smallest_group_size(self.trained_length, window, self.max_model_len)
            if least is not None:
                yield round(least * factor), window

    def _around(self, numbers: Numbers) -> Iterator[Numbers]:
        group_size, window = numbers
        groups: list[GroupSize] = [group_size]
        if group_size != "auto":
            groups.append(min(group_size - 1, round(group_size / GROUP_STEP)))
            groups.append(max(group_size + 1, round(group_size * GROUP_STEP)))
        yield from product(groups, (round(window * s) for s in (1 / WINDOW_STEP, 1, WINDOW_STEP)))

    def _reaches(self, group_size: GroupSize, window: int) -> bool:
        if group_size == "auto":
            return 1 <= window <= largest_auto_window(self.trained_length)
        # Not every group size above one that reaches does: W // G falls in steps.
        is_allowed = group_size >= 2 and 1 <= window <= self.trained_length
        return is_allowed and capacity(self.trained_length, group_size, window) >= self.max_model_len


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
