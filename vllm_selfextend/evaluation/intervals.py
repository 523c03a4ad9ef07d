"""How sure the numbers are: 95 % intervals, unless another level is asked for."""

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass

from scipy import stats

LEVEL = 0.95


@dataclass(frozen=True)
class Estimate:
    """A number and its interval."""

    value: float
    low: float
    high: float

    def as_json(self) -> dict[str, float | None]:
        """As JSON keeps it, which has no infinite numbers: None where nothing is known."""
        return {name: number if math.isfinite(number) else None for name, number in dataclasses.asdict(self).items()}


def share(found: float, asked: int) -> Estimate:
    """A share of `asked`, with Wilson's interval.

    Where answers are right in part, `found` is their sum: no values from 0 to 1 vary more than zeros and ones of the
    same mean, so the interval is not too narrow.
    """
    value, squared = found / asked, float(stats.norm.ppf((1 + LEVEL) / 2)) ** 2 / asked
    middle = value + squared / 2
    reach = math.sqrt(squared * (value * (1 - value) + squared / 4))
    low, high = (middle - reach) / (1 + squared), (middle + reach) / (1 + squared)
    # Of none and all, rounding puts a limit on the wrong side.
    return Estimate(value, min(value, max(0.0, low)), max(value, min(1.0, high)))


def average(estimates: Sequence[Estimate]) -> Estimate:
    """The mean of independent estimates; its limits are recovered from theirs.

    Zou and Donner, "Construction of confidence limits about effect measures: a general approach", 2008.
    """
    value = math.fsum(one.value for one in estimates) / len(estimates)
    below = math.hypot(*(one.value - one.low for one in estimates)) / len(estimates)
    above = math.hypot(*(one.high - one.value for one in estimates)) / len(estimates)
    return Estimate(value, value - below, value + above)


def mean(values: Sequence[float], level: float = LEVEL) -> Estimate:
    """A mean, with Student's interval; one value alone says nothing of its error."""
    middle = math.fsum(values) / len(values)
    if len(values) < 2:
        return Estimate(middle, -math.inf, math.inf)
    error = float(stats.sem(values))
    if error == 0.0:
        return Estimate(middle, middle, middle)
    low, high = stats.t.interval(level, len(values) - 1, loc=middle, scale=error)
    return Estimate(middle, float(low), float(high))


def difference(first: Sequence[float], second: Sequence[float], level: float = LEVEL) -> Estimate:
    """The mean of `first - second`, pair by pair.

    Where every value is 0 or 1, the interval is that of Agresti and Min for paired shares ("Simple improved confidence
    intervals for comparing matched proportions", 2005): without it, few pairs that all agree would look certain.
    """
    pairs = list(zip(first, second, strict=True))
    if not {*first, *second} <= {0.0, 1.0}:
        return mean([a - b for a, b in pairs], level)
    count = len(pairs)
    up, down = (sum(pair == wanted for pair in pairs) + 0.5 for wanted in ((1.0, 0.0), (0.0, 1.0)))
    middle = (up - down) / (count + 2)
    error = math.sqrt((up + down) - (up - down) ** 2 / (count + 2)) / (count + 2)
    reach = float(stats.norm.ppf((1 + level) / 2)) * error
    return Estimate((up - down) / count, max(-1.0, middle - reach), min(1.0, middle + reach))
