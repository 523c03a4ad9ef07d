"""The plan's way to the workers: through `additional_config`, which vLLM pickles."""

import pickle
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_selfextend import SelfExtendConfig
from vllm_selfextend.method.plan import read_plan, write_plan


@given(st.integers(16, 10_000), st.integers(1, 100_000), st.booleans(), st.booleans())
def test_a_plan_survives_the_way_to_the_workers(length: int, max_model_len: int, exact: bool, log_scale: bool) -> None:
    group_size = "auto" if exact else 100_000
    plan = SelfExtendConfig(group_size, exact_short=exact, log_scale=log_scale).plan(length, max_model_len)
    vllm_config = SimpleNamespace(additional_config={"self_extend": {"exact_short": exact}, "other": 1})
    write_plan(vllm_config, plan)
    again = read_plan(pickle.loads(pickle.dumps(vllm_config)))
    assert again == plan
    assert again.exact_len == (plan.trained_length if exact else 0)
    assert (again.log_scale, again.log_scale_len) == (log_scale, plan.trained_length if log_scale else 0)
    assert vllm_config.additional_config["other"] == 1


def test_what_carries_no_plan_is_an_error() -> None:
    for additional_config in ({}, {"self_extend": {"group_size": 8}}, object()):
        with pytest.raises(RuntimeError, match="CUSTOM is in use, but its plan is not in additional_config"):
            read_plan(SimpleNamespace(additional_config=additional_config))


def test_a_plan_needs_a_dict() -> None:
    plan = SelfExtendConfig().plan(256, 4096)
    with pytest.raises(ValueError, match="additional_config is a Config; with Self-Extend it must be a dict"):
        write_plan(SimpleNamespace(additional_config=type("Config", (), {})()), plan)
