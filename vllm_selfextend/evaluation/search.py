"""Which group size and neighbor window to try next, and how the best tried compares with the default."""

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import product
from statistics import fmean

from ..method.positions import GroupSize, capacity, largest_auto_window, smallest_group_size
from .intervals import LEVEL, Estimate, difference

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
        if self.auto[0] == "auto":
            yield from (("auto", window) for window in windows)
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
