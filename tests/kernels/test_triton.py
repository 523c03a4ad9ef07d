"""The Triton kernels, in Triton's interpreter, against the paper's formula in float64; a case takes seconds."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from vllm_selfextend.backends import AttentionParams, reference, triton

from .cases import Case, Problem, expected, run
from .test_kernels import HEADS, TOLERANCE, VARIANTS, cases, three_tokens

BATCHES = {
    "decode": ((1, 1), (1, 31), (1, 32), (1, 33), (1, 65)),
    "prefill": ((33, 33), (20, 90)),
    "mixed": ((1, 70), (17, 17), (1, 2), (15, 64), (1, 16)),
}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("batch", BATCHES)
def test_the_papers_formula(batch: str, variant: str) -> None:
    problem = Problem.of(Case(BATCHES[batch], **VARIANTS[variant]), torch.float32)
    got = run(triton, problem, torch.float32).double()
    torch.testing.assert_close(got, expected(problem), atol=TOLERANCE[torch.float32], rtol=0.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("heads", HEADS, ids=str)
def test_dtypes_and_heads(heads: tuple[int, int], dtype: torch.dtype) -> None:
    for batch in ("decode", "mixed"):
        problem = Problem.of(Case(BATCHES[batch], num_heads=heads[0], num_kv_heads=heads[1], exact_len=64), dtype)
        got = run(triton, problem, dtype).double()
        torch.testing.assert_close(got, expected(problem), atol=TOLERANCE[dtype], rtol=0.0)


@pytest.mark.parametrize(("head_size", "block_size"), [*itertools.product([32, 80, 128, 256], [16, 48, 128])])
def test_head_and_block_sizes(head_size: int, block_size: int) -> None:
    shape = {"num_heads": 2, "num_kv_heads": 1, "head_size": head_size, "rotary_dim": head_size}
    problem = Problem.of(Case(((1, 65), (40, 90)), block_size=block_size, **shape), torch.float32)
    got = run(triton, problem, torch.float32).double()
    torch.testing.assert_close(got, expected(problem), atol=TOLERANCE[torch.float32], rtol=0.0)


@pytest.mark.parametrize("cache_dtype", [torch.float8_e4m3fn, torch.uint8], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_an_fp8_cache(dtype: torch.dtype, cache_dtype: torch.dtype) -> None:
    case = Case(BATCHES["mixed"], exact_len=40, kv_scales=(0.5, 0.25))
    problem = Problem.of(case, dtype)
    # Both round keys and values in the same way, but where a rotated key lies on the edge between two fp8 numbers.
    wanted = run(reference, problem, dtype, cache_dtype).double()
    got = run(triton, problem, dtype, cache_dtype).double()
    assert ((got - wanted).abs() > TOLERANCE[dtype]).double().mean() < 0.01
    torch.testing.assert_close(got, wanted, atol=0.06, rtol=0.0)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(cases())
def test_random_cases(case: Case) -> None:
    problem = Problem.of(case, torch.float32)
    wanted = run(reference, problem, torch.float64)
    got = run(triton, problem, torch.float32).double()
    torch.testing.assert_close(got, wanted, atol=TOLERANCE[torch.float32], rtol=0.0)


def test_negative_slots_are_not_stored() -> None:
    case = Case(((3, 3),))
    key = torch.ones(3, case.num_kv_heads, case.head_size)
    kv_cache = torch.zeros(2, case.num_kv_heads, case.block_size, 2 * case.head_size)
    triton.store_kv(key, key, kv_cache, three_tokens(slot_mapping=torch.tensor([16, -1, 17])), case.params())
    assert kv_cache[0].count_nonzero() == 0
    assert kv_cache[1, :, 2:].count_nonzero() == 0
    assert kv_cache[1, :, :2].count_nonzero() > 0


def test_grouping_without_a_rotation_is_an_error() -> None:
    key = torch.ones(3, 2, 32)
    with pytest.raises(ValueError, match=r"group_size is 4.*params\.rotation, which is None"):
        triton.store_kv(key, key, torch.zeros(2, 2, 16, 64), three_tokens(), AttentionParams(1.0, group_size=4))
