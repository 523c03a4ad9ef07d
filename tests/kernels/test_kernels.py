"""Every kernel set against the paper's formula in float64; the reference kernels in float64 are held to rounding."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from vllm_selfextend.backends import KERNELS, AttentionParams, load_kernels, reference

from .cases import Case, Problem, expected, run

# What rounding inputs, the cache and the output to the dtype can do to values of size 1.
TOLERANCE = {torch.float64: 1e-9, torch.float32: 2e-5, torch.float16: 6e-3, torch.bfloat16: 5e-2}

HEADS = [(4, 4), (8, 2), (9, 3), (4, 1)]
BATCHES = {
    "decode": ((1, 1), (1, 7), (1, 213), (1, 64), (1, 65)),
    "prefill": ((7, 7), (213, 213), (64, 128), (17, 140)),
    "mixed": ((1, 213), (33, 33), (1, 2), (2, 90), (50, 211), (1, 16)),
}
VARIANTS = {
    "plain": {},
    "ordinary": {"group_size": 1},
    "window not divided": {"group_size": 5, "neighbor_window": 18},
    "window of one": {"neighbor_window": 1},
    "window past all": {"neighbor_window": 300},
    "group past window": {"group_size": 64, "neighbor_window": 16},
    "exact": {"exact_len": 64},
    "log scale": {"log_scale_len": 64},
    "soft cap": {"soft_cap": 2.0},
    "sliding": {"group_size": 1, "sliding_window": 40},
    "sinks": {"has_sinks": True},
    "partial rotary": {"rotary_dim": 12},
    "interleaved": {"interleaved": True, "rotary_dim": 20},
    "everything": {
        "exact_len": 64,
        "log_scale_len": 64,
        "soft_cap": 2.0,
        "has_sinks": True,
        "interleaved": True,
        "rotary_dim": 20,
        "sliding_window": 100,
        "block_size": 32,
    },
}


def check(kernels: str, case: Case, *dtypes: torch.dtype) -> None:
    problem = Problem.of(case, dtypes[0])
    wanted = expected(problem)
    for dtype in dtypes:
        got = run(KERNELS[kernels], problem, dtype).double()
        torch.testing.assert_close(got, wanted, atol=TOLERANCE[dtype], rtol=0.0)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("batch", BATCHES)
def test_reference_is_the_papers_formula(batch: str, variant: str) -> None:
    check("reference", Case(BATCHES[batch], **VARIANTS[variant]), torch.float64)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("heads", HEADS, ids=str)
@pytest.mark.parametrize("kernels", KERNELS)
def test_dtypes_and_heads(kernels: str, heads: tuple[int, int], dtype: torch.dtype) -> None:
    num_heads, num_kv_heads = heads
    for batch in BATCHES.values():
        check(kernels, Case(batch, num_heads=num_heads, num_kv_heads=num_kv_heads, exact_len=64), dtype)


@pytest.mark.parametrize(("head_size", "block_size"), [*itertools.product([32, 64, 80, 128, 256], [16, 48, 128])])
@pytest.mark.parametrize("kernels", KERNELS)
def test_head_and_block_sizes(kernels: str, head_size: int, block_size: int) -> None:
    case = Case(BATCHES["mixed"], head_size=head_size, rotary_dim=head_size, block_size=block_size)
    check(kernels, case, torch.float32)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    length = st.integers(1, 90)
    requests = draw(st.lists(st.tuples(length, length), min_size=1, max_size=5))
    num_kv_heads = draw(st.integers(1, 3))
    return Case(
        requests=tuple((min(pair), max(pair)) for pair in requests),
        num_heads=num_kv_heads * draw(st.integers(1, 4)),
        num_kv_heads=num_kv_heads,
        block_size=draw(st.sampled_from([16, 32, 64])),
        group_size=draw(st.integers(1, 40)),
        neighbor_window=draw(st.integers(1, 100)),
        exact_len=draw(st.sampled_from([0, 1, 17, 64, 200])),
        log_scale_len=draw(st.sampled_from([0, 20])),
        soft_cap=draw(st.sampled_from([0.0, 1.5])),
        sliding_window=draw(st.sampled_from([0, 1, 30])),
        has_sinks=draw(st.booleans()),
        interleaved=draw(st.booleans()),
        rotary_dim=draw(st.sampled_from([2, 16, 32])),
        seed=draw(st.integers(0, 1000)),
    )


@settings(max_examples=200, deadline=None, derandomize=True)
@given(cases())
def test_random_cases(case: Case) -> None:
    check("reference", case, torch.float32, torch.float64)


def test_memory_bound_does_not_change_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference, "MAX_ELEMENTS", 2000)
    for batch in BATCHES.values():
        check("reference", Case(batch, exact_len=64), torch.float64)


def test_negative_slots_are_not_stored() -> None:
    case = Case(((3, 3),))
    key = torch.ones(3, case.num_kv_heads, case.head_size)
    kv_cache = torch.zeros(2, case.num_kv_heads, case.block_size, 2 * case.head_size)
    batch = _three_tokens(slot_mapping=torch.tensor([16, -1, 17]))
    reference.store_kv(key, key, kv_cache, batch, case.params())
    assert kv_cache[0].abs().sum() == 0
    assert kv_cache[1, :, :2].abs().sum() > 0
    assert kv_cache[1, :, 2:].abs().sum() == 0


def test_grouping_without_a_rotation_is_an_error() -> None:
    key = torch.ones(3, 2, 32)
    with pytest.raises(ValueError, match=r"group_size is 4.*params\.rotation, which is None"):
        reference.store_kv(
            key,
            key,
            torch.zeros(2, 2, 16, 64),
            _three_tokens(slot_mapping=torch.arange(3)),
            AttentionParams(1.0, group_size=4),
        )


def test_unknown_kernels_are_an_error() -> None:
    with pytest.raises(ValueError, match="kernel is 'cuda'; it must be one of auto, reference"):
        load_kernels("cuda", torch.device("cpu"))


def _three_tokens(slot_mapping: torch.Tensor):
    from vllm_selfextend.backends import AttentionBatch

    return AttentionBatch(
        query_start_loc=torch.tensor([0, 3]),
        seq_lens=torch.tensor([3]),
        block_table=torch.tensor([[1]]),
        slot_mapping=slot_mapping,
        positions=torch.arange(3),
    )
