"""What vLLM's /metrics says of Self-Extend: requests that went past the trained length, by their last group size."""

import contextlib
import functools
from collections.abc import Callable, Sequence
from typing import Any

from prometheus_client import REGISTRY, Histogram
from vllm.config import VllmConfig
from vllm.v1.metrics.loggers import AggregateStatLoggerBase
from vllm.v1.metrics.stats import IterationStats, MultiModalCacheStats, SchedulerStats

from ..method.plan import has_plan, read_plan

NAME = "vllm_selfextend:request_group_size"
"""Not `vllm:`, or vLLM takes it for one of its own and removes it (`unregister_vllm_metrics`)."""

BUCKETS = (1.25, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0, 16.0, 24.0, 32.0, 48.0, 64.0)

_histograms: list[Histogram] = []
"""That of this process's engine, if it has one."""


class GroupSizeStatLogger(AggregateStatLoggerBase):
    """Observes the group size of the last query of each request that ends past the trained length.

    vLLM calls `record` once a step in the process that has its /metrics, with the requests that ended in it.
    """

    def __init__(self, vllm_config: VllmConfig, engine_indexes: list[int]) -> None:
        self.plan = read_plan(vllm_config)
        what = "Group size of the last query of requests that went past the trained length."
        histogram = Histogram(NAME, what, labelnames=["model_name", "engine"], buckets=BUCKETS)
        _histograms.append(histogram)
        model_name = vllm_config.model_config.served_model_name
        self.histograms = {index: histogram.labels(model_name, str(index)) for index in engine_indexes}

    def record(
        self,
        scheduler_stats: SchedulerStats | None,
        iteration_stats: IterationStats | None,
        mm_cache_stats: MultiModalCacheStats | None = None,
        engine_idx: int = 0,
    ) -> None:
        """See `StatLoggerBase.record`."""
        if iteration_stats is None:
            return
        for request in iteration_stats.finished_requests:
            # The last token that is generated is no query.
            num_queries = request.num_prompt_tokens + max(0, request.num_generation_tokens - 1)
            if num_queries > self.plan.trained_length:
                self.histograms[engine_idx].observe(self.plan.group_size_at(num_queries))

    def log_engine_initialized(self) -> None:
        """Nothing to say: the numbers are in the log already."""


def count_group_sizes(original: Callable[..., None]) -> Callable[..., None]:
    """Wrap `StatLoggerManager.__init__`: one logger more where positions are grouped.

    vLLM has an entry point for loggers of plugins; but whatever is named there turns statistics on for every engine,
    also where `--disable-log-stats` turned them off, and `CUSTOM` was not chosen.
    """

    @functools.wraps(original)
    def init(
        self: Any,
        vllm_config: VllmConfig,
        engine_idxs: list[int] | None = None,
        custom_stat_loggers: Sequence[Any] | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> None:
        _forget_histogram()
        if has_plan(vllm_config) and read_plan(vllm_config).groups:
            custom_stat_loggers = [*(custom_stat_loggers or ()), GroupSizeStatLogger]
        original(self, vllm_config, engine_idxs, custom_stat_loggers, *args, **kwargs)

    return init


def _forget_histogram() -> None:
    """An earlier engine's, as vLLM does with its own numbers."""
    while _histograms:
        with contextlib.suppress(KeyError):  # somebody cleared the registry
            REGISTRY.unregister(_histograms.pop())
