"""What a kernel set is given is checked where it is made: tables of group sizes, of rotations, and numbers."""

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from vllm_selfextend.backends.interface import (
    AttentionBatch,
    AttentionParams,
    GroupSizes,
    Rotation,
    group_position,
    lag,
    num_rotation_steps,
)
from vllm_selfextend.backends.limits import MAX_POSITIONS

TABLES = st.lists(st.integers(8, 60), min_size=1, max_size=40).map(sorted)


def sizes_of(eighths: list[int]) -> GroupSizes:
    return GroupSizes.of(torch.tensor(eighths))


@given(TABLES, st.integers(1, 60))
def test_what_a_table_says(eighths: list[int], num_rows: int) -> None:
    sizes = sizes_of(eighths)
    assert (sizes.eighths.dtype, sizes.eighths.tolist()) == (torch.int32, eighths)
    assert sizes.largest == max(eighths)
    runs = [eighths[begin : begin + num_rows] for begin in range(len(eighths))]
    assert max(len(set(run)) for run in runs) <= sizes.most_in(num_rows)


def test_how_many_sizes_rows_can_have() -> None:
    """`shortest_run` is 3: that of the ninths. Neither the first run nor the last counts, which go on elsewhere."""
    sizes = sizes_of([8, 9, 9, 9, 10, 10, 10, 10, 11])
    assert sizes.shortest_run == 3
    assert [sizes.most_in(rows) for rows in (0, 1, 2, 4, 5, 8)] == [1, 1, 2, 2, 3, 4]
    assert sizes_of([40] * 9).most_in(9) <= 2


@pytest.mark.parametrize("eighths", [[], [7, 8], [0], [8, 10, 9], [8, 8, -1]])
def test_tables_that_are_none(eighths: list[int]) -> None:
    with pytest.raises(ValueError, match="must hold 8 or more eighths for each position, and not fall"):
        sizes_of(eighths)


@given(st.integers(0, MAX_POSITIONS), st.integers(1, 2**20))
def test_a_whole_group_size_is_the_papers_floor(position: int, group_size: int) -> None:
    assert group_position(position, 8 * group_size) == position // group_size
    assert lag(position, 8 * group_size) == position - position // group_size


def layer(rows: int, eighths: list[int], neighbor_window: int) -> AttentionParams:
    rotation = Rotation(torch.empty(rows, 2))
    return AttentionParams(1.0, sizes_of(eighths), neighbor_window, rotation=rotation)


@given(TABLES, st.integers(1, 100))
@example([8, 9], 1)  # the CPU kernels turn 16 keys after another
@example([8], 1)
def test_a_rotation_has_a_row_for_every_turn_and_no_fewer(eighths: list[int], neighbor_window: int) -> None:
    rows = num_rotation_steps(len(eighths), eighths[-1], neighbor_window)
    turned = [lag(position, size) for size in eighths for position in (len(eighths) - 1, neighbor_window, 16)]
    assert rows > max(turned)
    assert layer(rows, eighths, neighbor_window)
    message = f"cos_sin has {rows - 1} rows; the {len(eighths)} positions of params.group_sizes need {rows}"
    with pytest.raises(ValueError, match=message):
        layer(rows - 1, eighths, neighbor_window)


def test_grouping_without_a_rotation() -> None:
    with pytest.raises(ValueError, match=r"params\.group_sizes is given, and turning needs params\.rotation, which is"):
        AttentionParams(1.0, sizes_of([8, 9]))
    assert AttentionParams(1.0).group_sizes is None, "ordinary attention needs none"


def test_the_last_position_is_int32() -> None:
    """Kernels take eight times a position, and the last group size is one too."""
    assert 8 * MAX_POSITIONS + 2 <= torch.iinfo(torch.int32).max
    assert sizes_of([8, 8 * MAX_POSITIONS]).eighths.tolist() == [8, 8 * MAX_POSITIONS]


@pytest.mark.parametrize(
    ("numbers", "message"),
    [
        *(
            ({name: value}, f"params.{name} is {value}; it must be from {least} to {MAX_POSITIONS}")
            for name, least in {"neighbor_window": 1, "log_scale_len": 0, "sliding_window": 0}.items()
            for value in (least - 1, MAX_POSITIONS + 1, 2**63)
        ),
        ({"log_scale_len": 1}, "params.log_scale_len is 1, whose logarithm is 0"),
        ({"scale": float("nan")}, "params.scale is nan; it must be finite"),
        ({"scale": float("inf")}, "params.scale is inf; it must be finite"),
        ({"soft_cap": -1.0}, "params.soft_cap is -1.0; it must be 0"),
        ({"soft_cap": float("nan")}, "params.soft_cap is nan; it must be 0"),
    ],
)
def test_a_number_out_of_its_range_reaches_no_kernel(numbers: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AttentionParams(**{"scale": 1.0, **numbers})


@pytest.mark.parametrize("name", ["max_query_len", "max_seq_len"])
def test_a_length_out_of_its_range_reaches_no_kernel(name: str) -> None:
    none = torch.empty(0)
    for value in (-1, MAX_POSITIONS + 1):
        with pytest.raises(ValueError, match=f"batch.{name} is {value}; it must be from 0 to {MAX_POSITIONS}"):
            AttentionBatch(none, none, none, none, **{"max_query_len": 1, "max_seq_len": 1, name: value})
