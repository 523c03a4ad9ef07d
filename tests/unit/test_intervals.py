import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_selfextend.evaluation.intervals import difference, mean, share


def test_wilson() -> None:
    # Newcombe, "Two-sided confidence intervals for the single proportion" (1998), table I, method 3.
    for found, asked, low, high in ((81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611)):
        estimate = share(found, asked)
        assert estimate.value == found / asked
        assert (estimate.low, estimate.high) == (pytest.approx(low, abs=5e-5), pytest.approx(high, abs=5e-5))


def test_none_and_all_have_intervals_around_them() -> None:
    """As pictures draw them: rounding once put the upper limit of 48 of 48 below it."""
    for asked in range(1, 200):
        for found in (0, asked):
            estimate = share(found, asked)
            assert 0.0 <= estimate.low <= estimate.value <= estimate.high <= 1.0


def test_students_interval() -> None:
    estimate = mean([1.0, 2.0, 3.0, 4.0])
    # t(0.975, 3) = 3.1824, standard error sqrt(5/3)/2.
    assert estimate.value == 2.5
    assert estimate.high - 2.5 == pytest.approx(3.1824 * math.sqrt(5 / 3) / 2, rel=1e-4)
    assert mean([2.0]).high == math.inf
    assert mean([2.0]).as_json() == {"value": 2.0, "low": None, "high": None}
    assert mean([2.0, 2.0]).low == 2.0


def test_paired_losses() -> None:
    base = [1.0, 5.0, 2.0, 9.0]
    estimate = difference([x + d for x, d in zip(base, (0.1, 0.2, 0.1, 0.2), strict=True)], base)
    assert estimate.value == pytest.approx(0.15)
    assert 0.0 < estimate.low < 0.15 < estimate.high < 0.3


@given(st.lists(st.tuples(st.sampled_from((0.0, 1.0)), st.sampled_from((0.0, 1.0))), min_size=1, max_size=40))
def test_paired_shares(pairs: list[tuple[float, float]]) -> None:
    first, second = zip(*pairs, strict=True)
    estimate, turned = difference(first, second), difference(second, first)
    assert estimate.value == pytest.approx(sum(first) / len(pairs) - sum(second) / len(pairs))
    assert (turned.low, turned.high) == (pytest.approx(-estimate.high), pytest.approx(-estimate.low))
    if first == second:
        assert estimate.low < 0.0 < estimate.high, "few pairs that agree prove nothing"
