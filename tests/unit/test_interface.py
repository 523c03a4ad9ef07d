"""A re-rotation table's rows and the positions that they reach: each follows from the other."""

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from vllm_selfextend.backends.interface import (
    AttentionBatch,
    AttentionParams,
    Rotation,
    num_rotation_steps,
)
from vllm_selfextend.backends.limits import MAX_POSITIONS

GROUPS = st.integers(2, 5000)
WINDOWS = st.integers(1, 100_000)


def layer(rows: int, group_size: int, neighbor_window: int) -> AttentionParams:
    return AttentionParams(1.0, group_size, neighbor_window, rotation=Rotation(torch.empty(rows, 2)))


@given(st.integers(0, 1_000_000), GROUPS, WINDOWS)
def test_a_table_for_so_many_positions_reaches_them(num_positions: int, group_size: int, neighbor_window: int) -> None:
    rows = num_rotation_steps(num_positions, group_size, neighbor_window)
    assert layer(rows, group_size, neighbor_window).num_positions >= num_positions


@given(st.integers(0, 1_000_000), GROUPS, WINDOWS)
@example(0, 2, 1)
@example(1, 2, 1)
@example(13, 4, 1)  # 16 keys after another need 13 rows
@example(12, 4, 1)
def test_a_table_reaches_no_more_than_its_rows(rows: int, group_size: int, neighbor_window: int) -> None:
    num_positions = layer(rows, group_size, neighbor_window).num_positions
    if rows < num_rotation_steps(0, group_size, neighbor_window):
        assert num_positions == 0
    else:
        assert num_rotation_steps(num_positions, group_size, neighbor_window) <= rows
        assert rows < num_rotation_steps(num_positions + 1, group_size, neighbor_window)


def test_positions_are_int32_however_long_the_table() -> None:
    table = torch.empty(1, 2).expand(2**32, 2)
    assert AttentionParams(1.0, 4, rotation=Rotation(table)).num_positions == MAX_POSITIONS
    assert AttentionParams(1.0).num_positions == MAX_POSITIONS


@pytest.mark.parametrize(
    ("numbers", "message"),
    [
        *(
            ({name: value}, f"params.{name} is {value}; it must be from {least} to {MAX_POSITIONS}")
            for name, least in {
                "group_size": 1,
                "neighbor_window": 1,
                "exact_len": 0,
                "log_scale_len": 0,
                "sliding_window": 0,
            }.items()
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


def test_grouping_without_a_rotation_reaches_nothing() -> None:
    with pytest.raises(ValueError, match=r"group_size is 4.*params\.rotation, which is None"):
        _ = AttentionParams(1.0, 4).num_positions
