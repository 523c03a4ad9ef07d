"""A re-rotation table's rows and the positions that they reach: each follows from the other."""

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from vllm_selfextend.backends.interface import (
    MAX_POSITIONS,
    AttentionParams,
    Rotation,
    num_rotation_steps,
)

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


def test_grouping_without_a_rotation_reaches_nothing() -> None:
    with pytest.raises(ValueError, match=r"group_size is 4.*params\.rotation, which is None"):
        _ = AttentionParams(1.0, 4).num_positions
