from hypothesis import given
from hypothesis import strategies as st

from vllm_selfextend.positions import capacity, relative_position, smallest_group_size

LENGTHS = st.integers(2, 60)


def reach(trained_length: int, group_size: int, neighbor_window: int) -> int:
    """The capacity by counting: how long a sequence can grow until some relative position is `trained_length`."""
    length = 0
    while length < 4000 and all(
        relative_position(length, key, group_size, neighbor_window) < trained_length for key in range(length + 1)
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
def test_positions_are_the_papers(query: int, back: int, group_size: int, neighbor_window: int) -> None:
    key = max(0, query - back)
    position = relative_position(query, key, group_size, neighbor_window)
    if query - key < neighbor_window or group_size == 1:
        assert position == query - key
    else:
        shifted_query = query // group_size + neighbor_window - neighbor_window // group_size
        assert position == shifted_query - key // group_size
    assert 0 <= position <= query - key + 1


def test_the_papers_example_of_capacity() -> None:
    assert capacity(4096, 8, 1024) == (4096 - 1024) * 8 + 1024
