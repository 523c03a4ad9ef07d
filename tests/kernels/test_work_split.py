"""How the CPU kernels split a step among threads, for more of them than a machine of ours has: a model of the time."""

import heapq
import itertools
from collections.abc import Iterable

import pytest
import torch

from vllm_selfextend.backends import cpu

HEADS = [(32, 8, 128), (8, 8, 128), (32, 4, 64)]
"""Query heads, KV heads, head size."""

STEPS = {
    "decode": lambda batch: [(1, 8192)] * batch,
    "decode of all lengths": lambda batch: [(1, 8192 + 997 * i) for i in range(batch)],
    "prefill": lambda batch: [(512, 8704)] * batch,
    "prefill beside decodes": lambda batch: [(512, 8704), *[(1, 9000)] * (batch - 1)],
}
"""`(query_len, seq_len)` of each request."""

THREADS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)
BATCHES = (1, 2, 3, 4, 8, 16, 32, 64)


def item_time(rows: int, keys: int) -> float:
    """Cycles, roughly as measured with AVX-512: what an item takes, a key that is read, and a row that sees it."""
    return 1500 + keys * (40 + 16 * rows)


def merge_time(rows: int, parts: int, head_size: int) -> float:
    """The same: what a merge takes, and 16 dimensions of a row of a part."""
    return 200 + 4 * rows * parts * head_size / 16


def thread_times(times: Iterable[float], threads: int) -> list[float]:
    """The time of each thread, when each takes the next piece of work as soon as it is done with one."""
    busy = [0.0] * threads
    for time in times:
        heapq.heapreplace(busy, busy[0] + time)
    return busy


def longest_over_mean(step: list[tuple[int, int]], threads: int, heads: tuple[int, int, int]) -> float:
    starts = torch.tensor([0, *itertools.accumulate(query_len for query_len, _ in step)], dtype=torch.int32)
    lens = torch.tensor([seq_len for _, seq_len in step], dtype=torch.int32)
    split = torch.ops.vllm_selfextend_cpu.work_split.default
    items, merges = split(starts, lens, *heads, 0, cpu.KERNELS.VARIANT, threads)
    attending = thread_times((item_time(*item) for item in items.tolist()), threads)
    merging = thread_times((merge_time(*merge, heads[2]) for merge in merges.tolist()), threads)
    # Merges begin when all items are done.
    return (max(attending) + max(merging)) / ((sum(attending) + sum(merging)) / threads)


@pytest.mark.parametrize("threads", THREADS)
@pytest.mark.parametrize("name", STEPS)
def test_no_thread_works_15_percent_more_than_the_mean(name: str, threads: int) -> None:
    found = {
        (batch, heads): longest_over_mean(STEPS[name](batch), threads, heads) for batch in BATCHES for heads in HEADS
    }
    assert max(found.values()) < 1.15, max(found, key=found.__getitem__)


def test_every_row_and_key_is_in_one_item() -> None:
    step = [(1, 9000), (70, 70), (512, 8704)]
    starts, lens = torch.tensor([0, 1, 71, 583], dtype=torch.int32), torch.tensor([9000, 70, 8704], dtype=torch.int32)
    split = torch.ops.vllm_selfextend_cpu.work_split.default
    whole, none = split(starts, lens, 32, 8, 128, 0, cpu.KERNELS.VARIANT, 1)
    parts, merges = split(starts, lens, 32, 8, 128, 0, cpu.KERNELS.VARIANT, 64)
    assert len(none) == 0
    assert len(merges) > 0
    assert len(parts) > len(whole)
    assert (parts[:, 0] * parts[:, 1]).sum() == (whole[:, 0] * whole[:, 1]).sum()
    seen = 8 * 4 * sum(query_len * seq_len for query_len, seq_len in step)
    assert (whole[:, 0] * whole[:, 1]).sum() <= seen


def test_what_does_not_fit_is_an_error() -> None:
    split = torch.ops.vllm_selfextend_cpu.work_split.default
    with pytest.raises(ValueError, match="must be int32, and the first longer by one"):
        split(torch.zeros(2, dtype=torch.int32), torch.zeros(2, dtype=torch.int32), 8, 8, 64, 0, cpu.KERNELS.VARIANT, 2)
