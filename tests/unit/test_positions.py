from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_selfextend.backends.interface import GroupSizes, lag
from vllm_selfextend.positions import (
    capacity,
    group_sizes,
    largest_auto_window,
    relative_position,
    smallest_group_size,
)

LENGTHS = st.integers(2, 60)


@st.composite
def automatic(draw: st.DrawFn, longest: int = 400) -> tuple[int, int]:
    """A trained length and a window with which group sizes may be automatic."""
    trained_length = draw(st.integers(3, longest))
    return trained_length, draw(st.integers(1, largest_auto_window(trained_length)))


def automatic_size(position: int, trained_length: int, neighbor_window: int) -> Fraction:
    """The rule for one position, of which `group_sizes` makes a table: of sizes with four bits, the first to reach."""
    if position < trained_length:
        return Fraction(1)
    needed = Fraction(position - neighbor_window, trained_length - neighbor_window - 1)
    doubling = 1
    while 2 * doubling < needed:
        doubling *= 2
    sizes = (Fraction(eighth, 8) * doubling for eighth in range(9, 17))
    return next(size for size in sizes if size >= needed)


def table(num_positions: int, trained_length: int, neighbor_window: int, first: int = 0) -> list[int]:
    """The automatic group sizes, in eighths."""
    return group_sizes(num_positions, trained_length, neighbor_window, "auto", trained_length, first).tolist()


@given(automatic(), st.integers(0, 2**27 - 50))
def test_the_table_is_the_rule(numbers: tuple[int, int], first: int) -> None:
    for begin in (0, numbers[0] - 20, first):
        begin = max(0, begin)
        expected = [8 * automatic_size(i, *numbers) for i in range(begin, begin + 50)]
        assert table(50, *numbers, begin) == expected


@given(automatic(), st.integers(2, 30))
def test_no_position_leaves_the_trained_range(numbers: tuple[int, int], times: int) -> None:
    """Of any key, of any query: counted, not reasoned."""
    (trained_length, window), sizes = numbers, table(times * numbers[0], *numbers)
    for query in range(0, len(sizes), max(1, len(sizes) // 50)):
        positions = [relative_position(query, key, sizes[query], window) for key in range(query + 1)]
        assert 0 <= min(positions) <= max(positions) < trained_length


@given(st.integers(3, 200_000), st.data())
def test_no_position_leaves_the_trained_range_far_out(trained_length: int, data: st.DataObject) -> None:
    window = data.draw(st.integers(1, largest_auto_window(trained_length)))
    query = data.draw(st.integers(trained_length, 2**27 - 1))
    (eighths,) = table(1, trained_length, window, query)
    # The first key is the farthest, as grouped positions never fall.
    assert relative_position(query, 0, eighths, window) < trained_length


@given(automatic())
def test_the_table_never_falls_and_says_how_many_sizes_rows_have(numbers: tuple[int, int]) -> None:
    eighths = group_sizes(12 * numbers[0], *numbers, "auto", numbers[0])
    sizes = GroupSizes.of(eighths)
    assert (eighths.diff() >= 0).all()
    assert sizes.largest == eighths.max()
    for rows in {1, 2, 3, 5, 16, numbers[0], 4 * numbers[0]}:
        most = max(len(part.unique()) for part in eighths.unfold(0, min(rows, len(eighths)), 1))
        assert most <= sizes.most_in(rows)
    # `p S >= 8 (i - W)`: another size every S / 8 positions at most.
    assert sizes.shortest_run >= (numbers[0] - numbers[1] - 1) // 8


@given(st.integers(8, 200), st.integers(0, 10_000))
def test_lags_grow_by_0_or_1(eighths: int, position: int) -> None:
    assert lag(position + 1, eighths) - lag(position, eighths) in (0, 1)


@pytest.mark.parametrize("trained_length", [3, 4, 5, 64, 8191, 8192])
def test_the_largest_window_leaves_a_quarter_to_far_keys(trained_length: int) -> None:
    window = largest_auto_window(trained_length)
    assert 4 * (trained_length - window - 1) >= trained_length > 4 * (trained_length - window - 2)


def test_a_number_is_for_every_position_that_is_not_exact() -> None:
    assert group_sizes(100, 64, 16, 5, exact_len=64).tolist() == [8] * 64 + [40] * 36
    assert group_sizes(100, 64, 16, 5, exact_len=0).tolist() == [40] * 100
    assert group_sizes(10, 64, 16, 5, exact_len=64, first=60).tolist() == [8] * 4 + [40] * 6


def test_a_window_that_leaves_nothing_to_far_keys_within_the_trained_length() -> None:
    """Where no text goes past it, any window is allowed."""
    for window in (62, 63, 64):
        assert table(64, 64, window) == [8] * 64


def reach(trained_length: int, group_size: int, neighbor_window: int) -> int:
    """The capacity by counting: how long a sequence can grow until some relative position is `trained_length`."""
    length = 0
    while length < 4000 and all(
        relative_position(length, key, 8 * group_size, neighbor_window) < trained_length for key in range(length + 1)
    ):
        length += 1
    return length


@given(LENGTHS, st.integers(1, 12), st.data())
def test_capacity_is_what_counting_finds(trained_length: int, group_size: int, data: st.DataObject) -> None:
    neighbor_window = data.draw(st.integers(1, trained_length))
    assert capacity(trained_length, group_size, neighbor_window) == reach(trained_length, group_size, neighbor_window)


@given(LENGTHS, st.integers(1, 1000), st.data())
def test_smallest_group_size_is_what_trying_finds(trained_length: int, length: int, data: st.DataObject) -> None:
    neighbor_window = data.draw(st.integers(1, trained_length))
    fitting = (g for g in range(1, 1100) if capacity(trained_length, g, neighbor_window) >= length)
    assert smallest_group_size(trained_length, neighbor_window, length) == next(fitting, None)


@given(st.integers(0, 500), st.integers(0, 500), st.integers(1, 20), st.integers(1, 100))
def test_positions_of_whole_group_sizes_are_the_papers(
    query: int, back: int, group_size: int, neighbor_window: int
) -> None:
    key = max(0, query - back)
    position = relative_position(query, key, 8 * group_size, neighbor_window)
    if query - key < neighbor_window or group_size == 1:
        assert position == query - key
    else:
        shifted_query = query // group_size + neighbor_window - neighbor_window // group_size
        assert position == shifted_query - key // group_size
    assert 0 <= position <= query - key + 1


def test_the_papers_example_of_capacity() -> None:
    assert capacity(4096, 8, 1024) == (4096 - 1024) * 8 + 1024
