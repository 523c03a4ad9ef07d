import io
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from vllm_selfextend.evaluation.loss import LossTask
from vllm_selfextend.evaluation.prompts import Prompt
from vllm_selfextend.evaluation.search import Numbers, Search
from vllm_selfextend.evaluation.summary import group_sizes_of
from vllm_selfextend.evaluation.tables import distance_from_auto, numbers_table
from vllm_selfextend.evaluation.tuning import check_differs
from vllm_selfextend.evaluation.user_prompts import UserTask
from vllm_selfextend.method.config import SelfExtendConfig
from vllm_selfextend.method.positions import capacity, largest_auto_window


def search(length: int, reach: int) -> Search:
    plan = SelfExtendConfig().plan(length, reach)
    return Search(length, reach, (plan.group_size, plan.neighbor_window))


@given(st.integers(5, 9000), st.integers(2, 40), st.integers(0, 2**32))
def test_only_what_reaches_is_tried_and_once(length: int, times: int, seed: int) -> None:
    tried: list[Numbers] = []

    def costs_of(numbers: Numbers) -> list[float]:
        tried.append(numbers)
        return [float(hash((numbers, seed, i)) % 100) for i in range(3)]

    one = search(length, length * times)
    one.run(costs_of, 60.0)
    assert tried[0] == one.auto
    assert len(set(tried)) == len(tried) == len(one.costs)
    for group_size, window in tried:
        if group_size == "auto":
            assert 1 <= window <= largest_auto_window(length)
        else:
            assert group_size >= 2
            assert 1 <= window <= length
            assert capacity(length, group_size, window) >= length * times
    assert sum(one.costs[one.best]) == min(map(sum, one.costs.values()))


def test_the_search_goes_to_where_it_is_best() -> None:
    """A bowl whose bottom is in no coarse cell; automatic sizes are as good as the number `auto_is_like`."""

    def search_from(auto_is_like: int) -> Search:
        def costs_of(numbers: Numbers) -> list[float]:
            group_size = auto_is_like if numbers[0] == "auto" else numbers[0]
            return [abs(math.log(group_size / 9)) + abs(math.log(numbers[1] / 3000))] * 2

        one = search(8192, 32768)
        one.run(costs_of, 60.0)
        assert 2300 < one.best[1] < 3900
        assert one.auto_above_best().low > 0.0, "its window is another"
        return one

    assert search_from(auto_is_like=60).best[0] in (8, 9, 10)
    assert search_from(auto_is_like=9).best[0] in ("auto", 9)


def test_other_windows_of_the_default_are_tried_even_if_it_is_not_the_best() -> None:
    one = search(8192, 32768)
    one.run(lambda numbers: [2.0 if numbers[0] == "auto" else 1.0], 60.0)
    assert list(one.costs)[:3] == [("auto", 1024), ("auto", 512), ("auto", 2048)], "half of L is past what it allows"
    assert ("auto", 4096) not in one.costs


def test_where_no_group_size_is_automatic() -> None:
    """As `tune --no-exact-short` does."""
    one = Search(256, 1024, (6, 64))
    one.run(lambda numbers: [1.0 / numbers[1]], 60.0)
    assert one.auto in one.costs
    assert all(isinstance(group_size, int) for group_size, _ in one.costs)


def test_automatic_group_sizes_are_shown_first() -> None:
    assert group_sizes_of([(9, 64), (30, 64), ("auto", 64), (9, 32)]) == ["auto", 9, 30]


def test_equals_are_the_automatic_choice() -> None:
    one = search(256, 4096)
    one.run(lambda numbers: [0.0] * 8, 60.0)
    assert one.best == one.auto
    assert "is the default: G auto, W 64" in distance_from_auto(one)


def test_the_budget_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr("time.monotonic", lambda: now)

    def costs_of(numbers: Numbers) -> list[float]:
        nonlocal now
        now += 25.0
        return [1.0, 2.0]

    one = search(256, 4096)
    one.run(costs_of, 60.0)
    assert len(one.costs) == 2, "a third would end after 75 seconds"
    one = search(256, 4096)
    one.run(costs_of, 1.0)
    assert list(one.costs) == [one.auto], "the default is always tried"


def test_noise_is_not_called_a_difference() -> None:
    one = search(256, 4096)
    one.costs = {one.auto: [0.0] * 9 + [1.0], (30, 64): [0.0] * 10}
    said = distance_from_auto(one)
    assert "The best of 2 tried is G 30, W 64." in said
    assert "is 0.100 above it" in said
    assert "no difference that these prompts can show" in said
    one.costs = {one.auto: [2.0, 3.0, 4.0] * 5, (30, 64): [1.0, 2.0, 3.1] * 5}
    assert "no difference" not in distance_from_auto(one)
    console = Console(width=100, record=True, file=io.StringIO())
    console.print(numbers_table(one, True, group_sizes_of(one.costs)))
    shown = console.export_text()
    assert "2.033 *" in shown
    assert "3.000 a" in shown
    alone = one.auto_above_best()
    one.costs |= {(30 + n, 16): [9.0] * 15 for n in range(1, 20)}
    assert one.auto_above_best().low < alone.low, "the best of many has to be further away"


def prompts(*lengths: int) -> list[Prompt]:
    return [Prompt(f"prompts/{n}", {"length": n}, "text", [1] * n) for n in lengths]


def test_prompts_that_no_numbers_answer_differently_are_refused() -> None:
    """With 8 tokens of an answer, 7 of which are read: a query past the trained length of 256 is the 257th token."""
    task = UserTask({}, 1024, answer_tokens=8)
    with pytest.raises(ValueError, match="takes 256 tokens, within the trained length 256: no group size"):
        check_differs(task, prompts(64, 249), 256, exact_short=True)
    check_differs(task, prompts(64, 250), 256, exact_short=True)
    check_differs(task, prompts(64, 249), 256, exact_short=False)


def test_a_text_without_a_block_past_the_trained_length_is_refused() -> None:
    task = LossTask({}, 1024)
    with pytest.raises(ValueError, match="No 256 tokens of a text lie past the trained length 300"):
        check_differs(task, prompts(64, 512), 300, exact_short=False)
    check_differs(task, prompts(64, 513), 300, exact_short=True)
