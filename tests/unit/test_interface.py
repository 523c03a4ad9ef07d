"""What reaches no kernel: numbers out of range, tables that are too short or fall."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vllm_selfextend.backends.interface import (
    AttentionBatch,
    AttentionParams,
    GroupSizes,
    Rotation,
    lag,
    num_rotation_steps,
)
from vllm_selfextend.backends.limits import MAX_POSITIONS


def sizes(num_positions: int, eighths: int) -> GroupSizes:
    return GroupSizes.of(torch.full((num_positions,), eighths))


@given(st.integers(1, 5000), st.integers(8, 5000), st.integers(1, 100_000))
def test_a_layer_has_the_rows_that_its_positions_need(num_positions: int, eighths: int, neighbor_window: int) -> None:
    rows = num_rotation_steps(num_positions, eighths, neighbor_window)
    positions = torch.tensor([num_positions - 1, neighbor_window, 16])
    assert int(lag(positions, eighths).max()) < rows
    given = sizes(num_positions, eighths)
    AttentionParams(1.0, given, neighbor_window, rotation=Rotation(torch.empty(rows, 2)))
    with pytest.raises(ValueError, match=rf"cos_sin has {rows - 1} rows; the {num_positions} positions .* need {rows}"):
        AttentionParams(1.0, given, neighbor_window, rotation=Rotation(torch.empty(rows - 1, 2)))


def test_grouping_without_a_rotation_reaches_no_kernel() -> None:
    with pytest.raises(ValueError, match=r"turning needs params\.rotation, which is None"):
        AttentionParams(1.0, sizes(3, 32))


def test_a_sliding_window_beside_group_sizes_reaches_no_kernel() -> None:
    rotation = Rotation(torch.empty(17, 2))
    with pytest.raises(ValueError, match=r"params\.sliding_window is 5; layers with a sliding window keep ordinary"):
        AttentionParams(1.0, sizes(3, 32), rotation=rotation, sliding_window=5)


@pytest.mark.parametrize("eighths", [[], [7, 8], [8, 10, 9]])
def test_a_table_that_falls_or_holds_less_than_one_is_refused(eighths: list[int]) -> None:
    with pytest.raises(ValueError, match="must hold 8 or more eighths for each position, and not fall"):
        GroupSizes.of(torch.tensor(eighths))


@pytest.mark.parametrize(
    ("numbers", "message"),
    [
        *(
            ({name: value}, f"params.{name} is {value}; it must be from {least} to {MAX_POSITIONS}")
            for name, least in {
                "neighbor_window": 1,
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


@pytest.mark.parametrize("name", ["max_query_len", "max_seq_len", "decode_len"])
def test_a_length_out_of_its_range_reaches_no_kernel(name: str) -> None:
    none = torch.empty(0)
    for value in (-1, MAX_POSITIONS + 1):
        with pytest.raises(ValueError, match=f"batch.{name} is {value}; it must be from 0 to {MAX_POSITIONS}"):
            AttentionBatch(none, none, none, none, **{"max_query_len": 1, "max_seq_len": 1, name: value})
