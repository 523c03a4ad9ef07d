from collections.abc import Callable

import torch
from hypothesis import given
from hypothesis import strategies as st

from vllm_selfextend.backends.interface import GroupSizes, lag
from vllm_selfextend.method.positions import (
    auto_reach,
    capacity,
    group_sizes,
    largest_auto_window,
    relative_position,
    smallest_group_size,
)

LENGTHS = st.integers(2, 60)


def length_that_fits(trained_length: int, relative: Callable[[int, int], int]) -> int:
    """By counting: how long a sequence can grow until some relative position is `trained_length`."""
    length = 0
    while length < 4000 and all(relative(length, key) < trained_length for key in range(length + 1)):
        length += 1
    return length


@given(LENGTHS, st.integers(1, 12), st.data())
def test_capacity_is_what_counting_finds(trained_length: int, group_size: int, data: st.DataObject) -> None:
    neighbor_window = data.draw(st.integers(1, trained_length))
    counted = length_that_fits(trained_length, lambda i, j: relative_position(i, j, 8 * group_size, neighbor_window))
    assert capacity(trained_length, group_size, neighbor_window) == counted


@given(LENGTHS, st.integers(1, 1000), st.data())
def test_smallest_group_size_is_what_trying_finds(trained_length: int, length: int, data: st.DataObject) -> None:
    neighbor_window = data.draw(st.integers(1, trained_length))
    fitting = (g for g in range(1, 1100) if capacity(trained_length, g, neighbor_window) >= length)
    assert smallest_group_size(trained_length, neighbor_window, length) == next(fitting, None)


@given(st.integers(0, 500), st.integers(0, 500), st.integers(1, 20), st.integers(1, 100))
def test_positions_are_the_papers(query: int, back: int, group_size: int, neighbor_window: int) -> None:
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


def automatic(position: int, trained_length: int, neighbor_window: int) -> int:
    """The rule in words: the least number of four significant bits, 9 or more, that keeps the query within."""
    if position < trained_length:
        return 8
    reach = 2 * trained_length // 3 - neighbor_window - 1
    sizes = (mantissa << shift for shift in range(40) for mantissa in range(8, 16))
    return next(size for size in sizes if size >= 9 and size * reach >= 8 * (position - neighbor_window))


@given(st.integers(5, 200), st.data())
def test_automatic_group_sizes(trained_length: int, data: st.DataObject) -> None:
    window = data.draw(st.integers(1, largest_auto_window(trained_length)))
    num_positions = 12 * trained_length
    table = group_sizes(num_positions, trained_length, window, "auto", trained_length)
    eighths = table.tolist()
    assert eighths == [automatic(i, trained_length, window) for i in range(num_positions)]
    assert (table.diff() >= 0).all()
    assert group_sizes(7, trained_length, window, "auto", trained_length, first=num_positions - 7).equal(table[-7:])
    # No relative position of any key reaches T: the first key's is the largest of the grouped ones.
    keys = torch.arange(num_positions)
    for query in data.draw(st.lists(st.integers(trained_length, num_positions - 1), min_size=5, max_size=5)):
        p = eighths[query]
        grouped = 8 * query // p + window - 8 * window // p - 8 * keys[: query - window + 1] // p
        assert int(grouped.max()) < auto_reach(trained_length)
        assert int(grouped.min()) >= 0
        steps = lag(keys, p).diff()
        assert ((steps == 0) | (steps == 1)).all()
    sizes = GroupSizes.of(table)
    num_rows = data.draw(st.integers(1, 2 * trained_length))
    most = max(len(set(eighths[i : i + num_rows]) - {8}) for i in range(num_positions - num_rows + 1))
    assert most == sizes.most_in(num_rows)
    assert most <= 8 * (num_rows - 1) // (auto_reach(trained_length) - window - 1) + 3


@given(st.integers(1, 500), st.integers(1, 40), st.integers(0, 300))
def test_a_number_is_one_group_size_past_the_exact_length(num_positions: int, group_size: int, exact_len: int) -> None:
    table = group_sizes(num_positions, 256, 64, group_size, exact_len)
    assert table.tolist() == [8 if i < exact_len else 8 * group_size for i in range(num_positions)]


def test_a_window_leaves_a_quarter() -> None:
    for length in range(3, 5000):
        most = largest_auto_window(length)
        reach = auto_reach(length)
        assert 4 * (reach - most - 1) >= reach
        assert 4 * (reach - (most + 1) - 1) < reach
