"""Lengths, heads and head sizes of vLLM's own test of its CPU attention: our error beside that of vLLM's kernel.

The grid is vLLM's, crossed with Self-Extend's numbers.
Each kernel is held against float64: ours against the float64 oracle, vLLM's (ordinary attention, its own cache) against
the same oracle at group size 1.
"""

import os

import pytest
import torch

os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")

from vllm import _custom_ops as ops
from vllm.platforms import current_platform
from vllm.v1.attention.backends.cpu_attn import _get_attn_isa

from tests.support.cases import VLLM_BATCHES, VLLM_HEADS, VLLM_VARIANTS, Case, Problem, rotate, run
from vllm_selfextend.backends import cpu, reference

from .cpu_kernels import KERNELS

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# Not less than what one rounding of the output can do: a kernel may be lucky.
ROUNDING = {torch.float32: 2.0**-22, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}


def stock(problem: Problem, dtype: torch.dtype) -> torch.Tensor:
    """The kernel of vLLM on the problem's last queries, ordinary attention with the case's window, cap and sinks."""
    case, block_size = problem.case, problem.case.block_size
    num_blocks = [-(-seq_len // block_size) for _, seq_len in case.requests]
    block_table = torch.zeros(len(num_blocks), max(num_blocks), dtype=torch.int32)
    for row, blocks in zip(block_table, torch.randperm(sum(num_blocks)).int().split(num_blocks), strict=True):
        row[: len(blocks)] = blocks
    cache = torch.zeros(sum(num_blocks), case.num_kv_heads, 2 * block_size, case.head_size, dtype=dtype)
    key_cache, value_cache = cache.chunk(2, dim=2)
    isa = _get_attn_isa(dtype, block_size, case.head_size)
    slots = []
    for row, (_, seq_len) in zip(block_table, case.requests, strict=True):
        positions = torch.arange(seq_len)
        slots.append(row[positions // block_size].long() * block_size + positions % block_size)

    def turned(tensors: list[torch.Tensor]) -> list[torch.Tensor]:
        return [rotate(case, x, torch.arange(len(x))) for x in tensors]

    key, value = torch.cat(turned(problem.keys)).to(dtype), torch.cat(problem.values).to(dtype)
    ops.cpu_attn_reshape_and_cache(key, value, key_cache, value_cache, torch.cat(slots), isa)
    query_lens = torch.tensor([0] + [query_len for query_len, _ in case.requests])
    last = [x[-query_len:] for x, (query_len, _) in zip(turned(problem.queries), case.requests, strict=True)]
    query = torch.cat(last).to(dtype)
    out = torch.empty_like(query)
    query_start_loc = query_lens.cumsum(0).int()
    seq_lens = torch.tensor([seq_len for _, seq_len in case.requests]).int()
    metadata = ops.cpu_attn_get_scheduler_metadata(
        num_reqs=len(seq_lens),
        num_heads=case.num_heads,
        num_kv_heads=case.num_kv_heads,
        head_dim=case.head_size,
        seq_lens=seq_lens,
        dtype=dtype,
        query_start_loc=query_start_loc,
        causal=True,
        sliding_window_size=case.sliding_window or -1,
        isa=isa,
        enable_kv_split=True,
    )
    ops.cpu_attention_with_kv_cache(
        query=query,
        key_cache=key_cache,
        value_cache=value_cache,
        output=out,
        query_start_loc=query_start_loc,
        seq_lens=seq_lens,
        scale=case.head_size**-0.5,
        causal=True,
        alibi_slopes=None,
        sliding_window=case.sliding_window or -1,
        block_table=block_table,
        softcap=case.soft_cap,
        scheduler_metadata=metadata,
        s_aux=case.params().sinks,
    )
    return out


@pytest.fixture(scope="module", autouse=True)
def _vllm_kernels() -> None:
    current_platform.import_kernels()


@pytest.mark.parametrize("variant", VLLM_VARIANTS)
@pytest.mark.parametrize("heads", VLLM_HEADS, ids=str)
@pytest.mark.parametrize("batch", VLLM_BATCHES)
def test_error_is_no_more_than_twice_that_of_vllms_kernel(batch: str, heads: tuple[int, int], variant: str) -> None:
    head_size = 96 if heads == (9, 3) else 128
    shape = {"num_heads": heads[0], "num_kv_heads": heads[1], "head_size": head_size, "rotary_dim": head_size}
    case = Case(VLLM_BATCHES[batch], block_size=128, base=10000.0, **shape, **VLLM_VARIANTS[variant])
    ordinary = Case(**{**vars(case), "group_size": 1, "exact_len": 0})
    # What bfloat16 holds, float16 and float32 hold too.
    problem, ordinary_problem = Problem.of(case, torch.bfloat16), Problem.of(ordinary, torch.bfloat16)
    wanted = run(reference.KERNELS, problem, torch.float64)
    ordinary_wanted = run(reference.KERNELS, ordinary_problem, torch.float64) if case != ordinary else wanted
    for dtype in DTYPES:
        allowed = 2 * max(error(stock(ordinary_problem, dtype), ordinary_wanted), ROUNDING[dtype])
        for name in cpu.INSTRUCTION_SETS:
            assert error(run(KERNELS[name], problem, dtype), wanted) <= allowed, (name, dtype)


def error(got: torch.Tensor, wanted: torch.Tensor) -> float:
    """The largest, as a share of the largest value (about 4 in every case)."""
    return float((got.double() - wanted).abs().max() / wanted.abs().max())
