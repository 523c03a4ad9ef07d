"""The histogram of group sizes: which requests are in it, and that it is there with the backend only."""

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from prometheus_client import REGISTRY

from vllm_selfextend.method.config import SelfExtendConfig
from vllm_selfextend.method.plan import write_plan
from vllm_selfextend.vllm import metrics
from vllm_selfextend.vllm.metrics import GroupSizeStatLogger, count_group_sizes


@pytest.fixture(autouse=True)
def _no_engine_before_or_after() -> Iterator[None]:
    metrics._forget_histogram()
    yield
    metrics._forget_histogram()


def engine_config(max_model_len: int, **settings: Any) -> SimpleNamespace:
    """vLLM's, of a model trained on 256 tokens."""
    config = SimpleNamespace(additional_config={}, model_config=SimpleNamespace(served_model_name="m"))
    write_plan(config, SelfExtendConfig(**settings).plan(256, max_model_len))
    return config


def observed(engine: int = 0) -> tuple[float | None, float | None]:
    labels = {"model_name": "m", "engine": str(engine)}
    name = "vllm_selfextend:request_group_size"
    return REGISTRY.get_sample_value(f"{name}_count", labels), REGISTRY.get_sample_value(f"{name}_sum", labels)


def finished(*lengths: tuple[int, int]) -> Any:
    requests = [SimpleNamespace(num_prompt_tokens=p, num_generation_tokens=g) for p, g in lengths]
    return SimpleNamespace(finished_requests=requests)


def test_requests_past_the_trained_length_are_counted_with_their_group_size() -> None:
    logger = GroupSizeStatLogger(engine_config(4096), [0, 1])
    logger.record(None, None)
    # The last token that is generated is no query: 256 of them are within.
    logger.record(None, finished((20, 5), (256, 1), (250, 7), (256, 0)))
    assert observed() == (0, 0)
    logger.record(None, finished((256, 2), (4096, 1)), engine_idx=0)
    assert observed() == (2, 1.875 + 40.0)
    assert observed(1) == (0, 0)
    logger.record(None, finished((1, 511)), engine_idx=1)
    assert observed(1) == (1, 4.5)


def test_numbers_of_a_users_own() -> None:
    """Within the trained length nothing is counted, whatever `exact_short` says."""
    logger = GroupSizeStatLogger(engine_config(1000, group_size=8, neighbor_window=64, exact_short=False), [0])
    logger.record(None, finished((200, 10), (300, 10)))
    assert observed() == (1, 8.0)


@pytest.mark.parametrize("given", [None, ["another"]])
def test_the_logger_is_added_where_positions_are_grouped(given: list | None) -> None:
    seen = []
    init = count_group_sizes(lambda *arguments, **more: seen.append((arguments, more)))
    GroupSizeStatLogger(engine_config(4096), [0])
    for config in (SimpleNamespace(additional_config={}), engine_config(256)):
        init("manager", config, [0], given, True, client_count=2)
        assert seen.pop() == (("manager", config, [0], given, True), {"client_count": 2})
        assert observed() == (None, None), "an earlier engine's is gone"
    config = engine_config(257)
    init("manager", vllm_config=config, engine_idxs=[0], custom_stat_loggers=given)
    assert seen.pop() == (("manager", config, [0], [*(given or ()), GroupSizeStatLogger]), {})
