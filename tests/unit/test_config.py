import json
import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_selfextend.backends.limits import MAX_POSITIONS
from vllm_selfextend.method.config import SelfExtendConfig, stray_settings
from vllm_selfextend.method.positions import largest_auto_window


def read(**settings: object) -> SelfExtendConfig:
    return SelfExtendConfig.from_additional_config({"self_extend": settings})


def test_defaults() -> None:
    assert SelfExtendConfig.from_additional_config({}) == SelfExtendConfig()
    assert SelfExtendConfig.from_additional_config({"other": 1}) == SelfExtendConfig()


def test_unknown_key_lists_the_known_ones() -> None:
    known = "group_size, neighbor_window, trained_length, exact_short, log_scale, kernel"
    with pytest.raises(ValueError, match=f"no setting 'groupsize'; the settings are {known}"):
        read(groupsize=8)


@pytest.mark.parametrize("key", ["selfextend", "self-extend", "SelfExtend", "self_extnd", "vllm_selfextend"])
@pytest.mark.parametrize("beside", [{}, {"self_extend": {}}])
def test_a_key_that_can_only_mean_us(key: str, beside: dict) -> None:
    given = {key: {"group_size": 8}, **beside}
    with pytest.raises(ValueError, match=f"has no '{key}': Self-Extend's settings are in 'self_extend', such as"):
        SelfExtendConfig.from_additional_config(given)


def test_settings_that_are_not_in_self_extend() -> None:
    with pytest.raises(ValueError, match=r"has 'group_size', which .* 'self_extend' only.*add \"self_extend\": \{\}"):
        SelfExtendConfig.from_additional_config({"group_size": 8})
    given = {"group_size": 128, "self_extend": {}, "other": {"kernel": "fast"}}
    assert SelfExtendConfig.from_additional_config(given) == SelfExtendConfig()
    assert stray_settings(given) == ["group_size", "kernel"]
    for theirs in ({}, {"selfish": 1, "extend": 2, "other": {"size": 1}}, object(), None):
        assert SelfExtendConfig.from_additional_config(theirs) == SelfExtendConfig()
        assert stray_settings(theirs) == []


@pytest.mark.parametrize("value", [0, -1, 2.5, float("nan"), "8", True, None, np.True_, MAX_POSITIONS + 1, 2**63])
@pytest.mark.parametrize("name", ["group_size", "neighbor_window"])
def test_counts_are_checked(name: str, value: object) -> None:
    said = f"self_extend.{name} is {value!r}; it must be an integer from 1 to {MAX_POSITIONS}, or 'auto'."
    with pytest.raises(ValueError, match=f"^{re.escape(said)}$"):
        read(**{name: value})


def test_counts_go_up_to_the_last_position_and_may_be_numpys() -> None:
    config = read(group_size=MAX_POSITIONS, neighbor_window=np.int32(64), trained_length=np.uint64(MAX_POSITIONS))
    assert json.dumps(vars(config.plan(256, MAX_POSITIONS))), "workers get the plan as JSON"


def test_lengths_past_the_last_position_are_refused() -> None:
    message = f"and Self-Extend's positions end at {MAX_POSITIONS}. Set"
    with pytest.raises(ValueError, match=f"max_model_len is {MAX_POSITIONS + 1}, {message} a smaller one"):
        read().plan(256, MAX_POSITIONS + 1)
    with pytest.raises(ValueError, match=f"the checkpoint's length is 10000000000, {message} self_extend.trained_l"):
        read().plan(10**10, 4096)


def test_a_length_without_a_logarithm_scales_nothing() -> None:
    with pytest.raises(ValueError, match="log_scale is on, and the trained length 1 has no logarithm"):
        read(log_scale=True, trained_length=1).plan(256, 256)


def test_other_values_are_checked() -> None:
    with pytest.raises(ValueError, match="trained_length is 'auto'; it must be an integer from 1 to 134217728, or N"):
        read(trained_length="auto")
    with pytest.raises(ValueError, match="exact_short is 1; it must be true or false"):
        read(exact_short=1)
    with pytest.raises(ValueError, match="kernel is 'cuda'; it must be one of auto, cpu, triton, reference"):
        read(kernel="cuda")
    with pytest.raises(ValueError, match=r"additional_config\['self_extend'\] is 8; it must be a mapping"):
        SelfExtendConfig.from_additional_config({"self_extend": 8})


def test_past_the_capacity_names_the_smallest_group_size() -> None:
    message = (
        "max_model_len is 4096, but with trained length 256, group_size 8 and neighbor_window 64 Self-Extend reaches "
        "1600 tokens. Set group_size to 22 or more or leave it out, or max_model_len to at most 1600."
    )
    with pytest.raises(ValueError, match=message):
        read(group_size=8, neighbor_window=64).plan(256, 4096)
    assert read(group_size=22, neighbor_window=64).plan(256, 4096).capacity >= 4096


def test_a_window_of_the_trained_length_cannot_be_extended() -> None:
    with pytest.raises(ValueError, match="No group size is enough with this window: set neighbor_window below 256"):
        read(group_size=8, neighbor_window=256).plan(256, 4096)
    with pytest.raises(
        ValueError, match=r"neighbor_window is 300, more than the trained length 256.*Set it to at most 256"
    ):
        read(neighbor_window=300).plan(256, 4096)


def test_within_the_trained_length_nothing_is_grouped() -> None:
    for config in (read(), read(group_size=4, exact_short=True), read(group_size=1, exact_short=False)):
        assert not config.plan(4096, 4096).groups
    assert read().plan(4096, 4097).groups
    assert read(group_size=4, exact_short=False).plan(4096, 4096).groups, "what the user sets, holds"


def test_the_defaults_follow_the_position() -> None:
    plan = read().plan(8192, 32768)
    assert (plan.group_size, plan.neighbor_window, plan.capacity) == ("auto", 1024, None)
    # (i - W) / S with S = 2 L / 3 - W - 1, rounded up to 1/8 up to 2, to 1/4 up to 4, to 1/2 up to 8.
    sizes = {8192: 1.0, 8193: 1.625, 12288: 2.75, 16384: 3.5, 32768: 7.5}
    assert {length: plan.group_size_at(length) for length in sizes} == sizes
    assert read().plan(256, 4096).neighbor_window == 64, "a quarter of the trained length"


@given(st.integers(5, 200_000), st.integers(1, 64), st.integers(1, 64))
def test_the_served_length_changes_no_group_size(trained_length: int, times: int, more: int) -> None:
    short, long = (read().plan(trained_length, trained_length * one + 1) for one in (times, times + more))
    assert short.neighbor_window == long.neighbor_window
    first = max(0, short.max_model_len - 100)
    assert (short.group_sizes(100, first) == long.group_sizes(100, first)).all()


@given(st.integers(5, 200_000))
def test_the_default_window_is_one_that_may_be(trained_length: int) -> None:
    window = read().plan(trained_length, trained_length + 1).neighbor_window
    assert 1 <= window <= min(1024, largest_auto_window(trained_length))


@given(st.integers(5, 100_000), st.data())
def test_windows_that_leave_too_little_to_far_keys(trained_length: int, data: st.DataObject) -> None:
    most = largest_auto_window(trained_length)
    window = data.draw(st.integers(most + 1, trained_length))
    config = read(neighbor_window=window)
    message = (
        f"neighbor_window is {window}, and an automatic group_size uses .* Set neighbor_window to at most {most}, "
    )
    with pytest.raises(ValueError, match=message):
        config.plan(trained_length, trained_length + 1)
    plan = config.plan(trained_length, trained_length)
    assert plan.group_size_at(trained_length) == 1, "where nothing past it is served, any window will do"
    assert read(neighbor_window=most).plan(trained_length, trained_length + 1).groups


def test_automatic_group_sizes_begin_past_the_trained_length() -> None:
    with pytest.raises(
        ValueError, match=r"exact_short is false, and self_extend\.group_size is 'auto'.*Set group_size"
    ):
        read(exact_short=False)
    assert read(exact_short=False, group_size=8).plan(256, 512).exact_len == 0


@pytest.mark.parametrize("length", [0, -1])
def test_a_checkpoint_that_names_no_length_that_could_be(length: int) -> None:
    with pytest.raises(ValueError, match=f"trained for {length} tokens. Set self_extend.trained_length to the true"):
        read().plan(length, 4096)
    assert read(trained_length=256).plan(length, 4096).trained_length == 256


def test_the_users_trained_length_wins() -> None:
    plan = read(trained_length=8192).plan(131072, 32768)
    assert plan.trained_length == 8192
    assert plan.groups
