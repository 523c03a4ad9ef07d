"""Every kernel set against the paper's formula in float64; the reference kernels in float64 are held to rounding."""

import importlib
import itertools
import sys
from dataclasses import fields, replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.cases import TOLERANCE, Case, Problem, Step, expected, run
from vllm_selfextend.backends import cpu, reference
from vllm_selfextend.backends.interface import AttentionBatch, AttentionParams, GroupSizes, Kernels, Rotation
from vllm_selfextend.backends.limits import MAX_POSITIONS
from vllm_selfextend.method.positions import largest_auto_window

from .cpu_kernels import KERNELS

HEADS = [(4, 4), (8, 2), (9, 3), (4, 1)]
BATCHES = {
    "decode": ((1, 1), (1, 7), (1, 213), (1, 64), (1, 65)),
    "prefill": ((7, 7), (213, 213), (64, 128), (17, 140)),
    "mixed": ((1, 213), (33, 33), (1, 2), (2, 90), (50, 211), (1, 16)),
}
SLID = ((1, 90), (1, 41), (1, 40), (7, 100), (40, 170), (1, 400))
"""Lengths past a sliding window of 40, on and off the edges of blocks and tiles."""
VARIANTS = {
    "plain": {},
    "ordinary": {"group_size": 1},
    "window not divided": {"group_size": 5, "neighbor_window": 18},
    "window of one": {"neighbor_window": 1},
    "window past all": {"neighbor_window": 300},
    "group past window": {"group_size": 64, "neighbor_window": 16},
    "exact": {"exact_len": 64},
    "automatic": {"group_size": "auto", "exact_len": 64},
    "automatic, a size for few tokens": {"group_size": "auto", "exact_len": 24, "neighbor_window": 5},
    "log scale": {"log_scale_len": 64},
    "soft cap": {"soft_cap": 2.0},
    "sliding": {"group_size": 1, "sliding_window": 40},
    "sinks": {"has_sinks": True},
    "partial rotary": {"rotary_dim": 12},
    "interleaved": {"interleaved": True, "rotary_dim": 20},
    "everything a sliding layer has": {
        "group_size": 1,
        "sliding_window": 40,
        "log_scale_len": 64,
        "soft_cap": 2.0,
        "has_sinks": True,
        "block_size": 32,
    },
    "everything": {
        "group_size": "auto",
        "exact_len": 48,
        "log_scale_len": 64,
        "soft_cap": 2.0,
        "has_sinks": True,
        "interleaved": True,
        "rotary_dim": 20,
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
def test_the_papers_formula(batch: str, variant: str) -> None:
    problem = Problem.of(Case(BATCHES[batch], **VARIANTS[variant]), torch.float32)
    wanted = expected(problem)
    for name, kernels in KERNELS.items():
        dtype = torch.float64 if name == "reference" else torch.float32
        got = run(kernels, problem, dtype).double()
        torch.testing.assert_close(
            got, wanted, atol=TOLERANCE[dtype], rtol=0.0, msg=lambda text, n=name: f"{n}: {text}"
        )


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


@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5, 6, 7, 8, 9, 12, 13])
@pytest.mark.parametrize("kernels", KERNELS)
def test_few_queries_over_keys_that_turn(kernels: str, rows: int) -> None:
    # Up to a number of rows they are multiplied while they turn, in pairs of rows where those turn together.
    for rotary_dim, interleaved in itertools.product([64, 32, 20, 6], [False, True]):
        rotation = {"head_size": 64, "rotary_dim": rotary_dim, "interleaved": interleaved, "neighbor_window": 90}
        case = Case(BATCHES["decode"], num_heads=2 * rows, num_kv_heads=2, **rotation)
        check(kernels, case, torch.float32)
        check(kernels, case, torch.bfloat16)


def fixed_sizes() -> st.SearchStrategy[dict[str, Any]]:
    windows, exact_lens = st.integers(1, 100), st.sampled_from([0, 1, 17, 64, 200])
    return st.fixed_dictionaries(
        {"group_size": st.integers(1, 40), "neighbor_window": windows, "exact_len": exact_lens}
    )


@st.composite
def automatic_sizes(draw: st.DrawFn) -> dict[str, Any]:
    trained_length = draw(st.integers(5, 60))
    window = draw(st.integers(1, largest_auto_window(trained_length)))
    return {"group_size": "auto", "neighbor_window": window, "exact_len": trained_length}


ORDINARY = {"group_size": 1}
"""Of layers with a sliding window."""


@st.composite
def cases(draw: st.DrawFn) -> Case:
    length = st.integers(1, 90)
    requests = draw(st.lists(st.tuples(length, length), min_size=1, max_size=5))
    num_kv_heads = draw(st.integers(1, 3))
    sizes = draw(fixed_sizes() | automatic_sizes() | st.just(ORDINARY))
    return Case(
        requests=tuple((min(pair), max(pair)) for pair in requests),
        num_heads=num_kv_heads * draw(st.integers(1, 7)),
        num_kv_heads=num_kv_heads,
        head_size=draw(st.sampled_from([32, 48, 80])),
        block_size=draw(st.sampled_from([16, 32, 64])),
        **sizes,
        log_scale_len=draw(st.sampled_from([0, 20])),
        soft_cap=draw(st.sampled_from([0.0, 1.5])),
        sliding_window=draw(st.sampled_from([1, 30])) if sizes is ORDINARY else 0,
        has_sinks=draw(st.booleans()),
        interleaved=draw(st.booleans()),
        rotary_dim=draw(st.sampled_from([2, 16, 32])),
        seed=draw(st.integers(0, 1000)),
    )


@settings(max_examples=200, derandomize=True)
@given(cases())
def test_random_cases_of_the_reference(case: Case) -> None:
    check("reference", case, torch.float32, torch.float64)


@settings(max_examples=2000, derandomize=True)
@given(cases(), st.sampled_from([torch.float32, torch.float16, torch.bfloat16]))
def test_random_cases(case: Case, dtype: torch.dtype) -> None:
    # The reference, proved above, is the faster oracle.
    problem = Problem.of(case, dtype)
    wanted = run(reference.KERNELS, problem, torch.float64)
    for name in cpu.INSTRUCTION_SETS:
        got = run(KERNELS[name], problem, dtype).double()
        torch.testing.assert_close(got, wanted, atol=TOLERANCE[dtype], rtol=0.0)


@pytest.mark.parametrize("name", cpu.INSTRUCTION_SETS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("cache_dtype", [torch.float8_e4m3fn, torch.uint8, torch.bfloat16], ids=str)
def test_a_cache_of_another_dtype(name: str, dtype: torch.dtype, cache_dtype: torch.dtype) -> None:
    case = Case(BATCHES["mixed"], exact_len=64, kv_scales=(0.5, 0.25) if cache_dtype != torch.bfloat16 else (1.0, 1.0))
    problem = Problem.of(case, dtype)
    # Both round keys and values in the same way.
    wanted = run(reference.KERNELS, problem, dtype, cache_dtype).double()
    got = run(KERNELS[name], problem, dtype, cache_dtype).double()
    torch.testing.assert_close(got, wanted, atol=TOLERANCE[dtype], rtol=0.0)
    # And fp8 is as close to the truth as three bits of mantissa can be.
    assert (got - expected(problem)).abs().mean() < 0.05


@pytest.mark.parametrize("name", cpu.INSTRUCTION_SETS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float8_e4m3fn], ids=str)
def test_every_number_is_stored_as_torch_rounds_it_and_read_back(name: str, dtype: torch.dtype) -> None:
    bits = torch.arange(1 << (8 * dtype.itemsize), dtype=torch.int32)
    numbers = bits.to(torch.uint8).view(dtype) if dtype.itemsize == 1 else bits.to(torch.int16).view(dtype)
    numbers = numbers.float()[numbers.float().isfinite()]
    # Each number, what lies halfway to the next, and a little beside it.
    numbers = numbers.sort().values.unique()
    halfway = (numbers[1:] + numbers[:-1]) / 2
    numbers = torch.cat([numbers, halfway, halfway.nextafter(numbers[1:]), halfway.nextafter(numbers[:-1])])
    numbers = torch.nn.functional.pad(numbers, (0, -len(numbers) % 512)).view(-1, 1, 512)
    num_tokens = len(numbers)
    num_blocks = -(-num_tokens // 16)
    kv_cache = torch.zeros(num_blocks, 1, 16, 1024, dtype=dtype)
    order = torch.arange(num_tokens)
    batch = AttentionBatch(
        query_start_loc=torch.arange(num_tokens + 1).int(),
        seq_lens=torch.ones(num_tokens).int(),
        block_table=torch.arange(num_tokens).int()[:, None] // 16,
        slot_mapping=order,
        max_query_len=1,
        max_seq_len=1,
    )
    KERNELS[name].prepare(AttentionParams(1.0)).store(numbers, numbers, kv_cache, batch)
    # A block's interior: keys in panels of 16 keys, then values in panels of 16 dimensions.
    keys, values = kv_cache.view(torch.uint8).view(num_blocks, -1).view(dtype).float().chunk(2, dim=1)
    wanted = numbers.clamp(-448.0, 448.0) if dtype == torch.float8_e4m3fn else numbers
    wanted = wanted.to(dtype).float().view(num_tokens, 512)
    assert keys.view(num_blocks, 512, 16).transpose(1, 2).reshape(-1, 512)[:num_tokens].equal(wanted)
    assert values.view(num_blocks, 32, 16, 16).transpose(1, 2).reshape(-1, 512)[:num_tokens].equal(wanted)
    # A query that sees one key is answered with its value.
    first = order % 16 == 0
    query = torch.zeros(int(first.sum()), 1, 512)
    out = torch.empty_like(query)
    alone = AttentionBatch(
        query_start_loc=torch.arange(len(query) + 1).int(),
        seq_lens=torch.ones(len(query)).int(),
        block_table=torch.arange(len(query)).int()[:, None],
        slot_mapping=order[: len(query)],
        max_query_len=1,
        max_seq_len=1,
    )
    KERNELS[name].prepare(AttentionParams(1.0)).attend(query, kv_cache, alone, out)
    assert out.view(-1, 512).equal(wanted[first])


@pytest.mark.parametrize("name", cpu.INSTRUCTION_SETS)
@pytest.mark.parametrize("threads", [1, 2, 7])
def test_a_repeated_run_repeats_every_bit(name: str, threads: int) -> None:
    # Long enough to be split over the context, with more threads than cores too.
    problem = Problem.of(Case(((1, 2900), (1, 40), (3, 1500)), head_size=32, exact_len=64), torch.float32)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        first, *others = [run(KERNELS[name], problem, torch.float32) for _ in range(4)]
    finally:
        torch.set_num_threads(before)
    assert all(first.equal(other) for other in others)
    torch.testing.assert_close(first.double(), run(reference.KERNELS, problem, torch.float64), atol=2e-5, rtol=0.0)


def test_a_group_size_of_many_phases() -> None:
    """More than the panels' stairs that a thread keeps (`kernel.cpp`): some are made again."""
    case = Case(((1, 1500), (40, 1500)), group_size=37, neighbor_window=16)
    for name in cpu.INSTRUCTION_SETS:
        check(name, case, torch.float32)


@pytest.mark.parametrize("name", KERNELS)
def test_padding_requests(name: str) -> None:
    """A request of no tokens, new in the cache or not: vLLM pads a batch with them."""
    problem = Problem.of(Case(((0, 0), (1, 70), (0, 0), (5, 90), (0, 33))), torch.float32)
    torch.testing.assert_close(
        run(KERNELS[name], problem, torch.float32).double(), expected(problem), atol=2e-5, rtol=0.0
    )


def test_nan_reaches_the_output() -> None:
    problem = Problem.of(Case(((1, 40), (1, 40))), torch.float32)
    problem.keys[0][3] = float("nan")
    for name in cpu.INSTRUCTION_SETS:
        out = run(KERNELS[name], problem, torch.float32)
        assert out[0].isnan().all()
        assert not out[1].isnan().any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_what_slid_out_of_the_window_may_be_anything(dtype: torch.dtype) -> None:
    problem = Problem.of(Case(SLID, group_size=1, sliding_window=40, has_sinks=True), dtype)
    wanted = expected(problem)
    problem.spoil_unseen()
    for name, kernels in KERNELS.items():
        got = run(kernels, problem, dtype).double()
        torch.testing.assert_close(
            got, wanted, atol=TOLERANCE[dtype], rtol=0.0, msg=lambda text, n=name: f"{n}: {text}"
        )


def test_memory_bound_does_not_change_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference, "MAX_ELEMENTS", 2000)
    for batch in BATCHES.values():
        check("reference", Case(batch, exact_len=64), torch.float64)


@pytest.mark.parametrize("kernels", KERNELS)
def test_negative_slots_are_not_stored(kernels: str) -> None:
    case = Case(((3, 3),))
    key = torch.ones(3, case.num_kv_heads, case.head_size)
    kv_cache = torch.zeros(2, case.num_kv_heads, case.block_size, 2 * case.head_size)
    batch = three_tokens(slot_mapping=torch.tensor([16, -1, 17]))
    KERNELS[kernels].prepare(case.params()).store(key, key, kv_cache, batch)
    assert kv_cache[0].abs().sum() == 0
    assert kv_cache[1].count_nonzero() == 2 * 2 * key[0].numel(), "two tokens' keys and values"


@pytest.mark.parametrize("kernels", KERNELS.values(), ids=list(KERNELS))
def test_sinks_and_scales_may_change_in_place(kernels: Kernels) -> None:
    check_changes_in_place(kernels)


def check_changes_in_place(kernels: Kernels) -> None:
    """As when new weights are loaded into a running engine; sinks may have the model's dtype."""
    case = Case(((20, 20), (1, 1)), has_sinks=True, kv_scales=(0.5, 0.25))
    problem = Problem.of(case, torch.bfloat16)

    def answer(step: Step) -> torch.Tensor:
        step.store()
        return step.attend()

    step, fresh = (Step(kernels, problem, torch.bfloat16, torch.uint8) for _ in range(2))
    names = ("sinks", "k_scale", "v_scale")
    step.params = replace(step.params, sinks=step.params.sinks.bfloat16())
    step.layer = kernels.prepare(step.params)
    before = answer(step)
    for name in names:
        getattr(step.params, name).mul_(2.0)
    after = answer(step)
    fresh.params = replace(step.params, **{name: getattr(step.params, name).float() + 0.0 for name in names})
    fresh.layer = kernels.prepare(fresh.params)
    assert after.equal(answer(fresh))
    assert not after.equal(before)


def three_tokens(**changes: Any) -> AttentionBatch:
    fields = {
        "query_start_loc": torch.tensor([0, 3]).int(),
        "seq_lens": torch.tensor([3]).int(),
        "block_table": torch.tensor([[1]]).int(),
        "slot_mapping": torch.arange(3),
        "max_query_len": 3,
        "max_seq_len": 3,
    }
    return AttentionBatch(**{**fields, **changes})


SIZES = GroupSizes.of(torch.full((17,), 32))


def grouping(cos_sin: torch.Tensor | None, eighths: torch.Tensor = SIZES.eighths) -> SimpleNamespace:
    """What an operator is asked for a layer that groups positions, without the checks of `AttentionParams`."""
    good = AttentionParams(1.0, SIZES, rotation=Rotation(torch.zeros(14, 32)))
    rotation = None if cos_sin is None else Rotation(cos_sin)
    sizes = replace(SIZES, eighths=eighths)
    return SimpleNamespace(
        **{field.name: getattr(good, field.name) for field in fields(good)}
        | {"rotation": rotation, "group_sizes": sizes}
    )


WRONG_ATTENTION = {
    "block_table names block 2 for request 0; the cache has 2": {"block_table": torch.tensor([[2]]).int()},
    "request 0 has the queries 0 to 4 of 3": {"query_start_loc": torch.tensor([0, 4]).int()},
    "and 17 tokens in 1 blocks of 16": {"seq_lens": torch.tensor([17]).int()},
    "seq_lens must be Int of size 1 or more": {"seq_lens": torch.tensor([3])},
    "kv_cache must be": {"kv_cache": torch.zeros(2, 2, 16, 48)},
    "block_size is 24; it must be a multiple of 16": {"kv_cache": torch.zeros(2, 2, 24, 64)},
    "kv_cache has dtype Double; it must be": {"kv_cache": torch.zeros(2, 2, 16, 64).double()},
    "query has dtype Double; it must be": {"query": torch.zeros(3, 4, 32).double()},
    "num_heads is 3; it must be a multiple of num_kv_heads, 2": {"query": torch.zeros(3, 3, 32)},
    "head_size is 24; it must be a multiple of 16 up to 512": {
        "query": torch.zeros(3, 4, 24),
        "kv_cache": torch.zeros(2, 2, 16, 48),
    },
    "turning needs params.rotation, which is None": {"params": grouping(None)},
    "cos_sin has 9 rows; request 0 of 3 tokens and a group size of 32 eighths needs 13": {
        "params": grouping(torch.zeros(9, 32))
    },
    "cos_sin has 13 rows; request 0 of 17 tokens and a group size of 32 eighths needs 14": {
        "seq_lens": torch.tensor([17]).int(),
        "block_table": torch.tensor([[1, 0]]).int(),
        "params": grouping(torch.zeros(13, 32)),
    },
    "params.group_sizes has 17 positions; request 0 has 18": {
        "seq_lens": torch.tensor([18]).int(),
        "block_table": torch.tensor([[1, 0]]).int(),
        "params": grouping(torch.zeros(100, 32)),
    },
    "eighths holds 7 at position 0; it must be 8 or more": {
        "params": grouping(torch.zeros(100, 32), torch.full((17,), 7).int())
    },
    "eighths holds 9 at position 2; it must be 8 or more, and not fall": {
        "params": grouping(torch.zeros(100, 32), torch.tensor([8, 10, 9]).int())
    },
    "group_sizes.eighths must be Int of size 0 or more": {
        "params": grouping(torch.zeros(100, 32), torch.full((17,), 32))
    },
    "cos_sin must be contiguous float32 .steps, an even number up to 32.; it is .100, 34.": {
        "params": grouping(torch.zeros(100, 34))
    },
    "it is .100, 32. of Double": {"params": grouping(torch.zeros(100, 32).double())},
    "sinks must be 4 floating-point values": {"params": AttentionParams(1.0, sinks=torch.zeros(3))},
    "k_scale must be one float32": {"params": AttentionParams(1.0, k_scale=torch.ones(2))},
    "v_scale is 0; it must be positive and finite": {"params": AttentionParams(1.0, v_scale=torch.zeros(1))},
    "block_size is 0; it must be a multiple of 16": {"kv_cache": torch.zeros(2, 2, 0, 64)},
    "num_kv_heads is 0; it must be from 1": {"kv_cache": torch.zeros(2, 0, 16, 64)},
}


@pytest.mark.parametrize("message", WRONG_ATTENTION)
def test_wrong_arguments_of_attention_are_errors(message: str) -> None:
    wrong = dict(WRONG_ATTENTION[message])
    query = wrong.pop("query", torch.zeros(3, 4, 32))
    kv_cache = wrong.pop("kv_cache", torch.zeros(2, 2, 16, 64))
    params = wrong.pop("params", grouping(torch.zeros(100, 32)))
    with pytest.raises(ValueError, match=message):
        cpu.KERNELS.prepare(params).attend(query, kv_cache, three_tokens(**wrong), torch.zeros_like(query))


RANGES = {
    "neighbor_window": (1, MAX_POSITIONS),
    "log_scale_len": (0, MAX_POSITIONS),
    "sliding_window": (0, MAX_POSITIONS),
}


@pytest.mark.parametrize("name", RANGES)
def test_numbers_out_of_their_range_are_errors(name: str) -> None:
    """Of the operators too, which anyone can call: cast to an int they would be others, negative ones among them."""
    query, kv_cache = torch.zeros(3, 4, 32), torch.zeros(2, 2, 16, 64)
    for value in (RANGES[name][0] - 1, RANGES[name][1] + 1, 2**32 + 4):
        wrong = grouping(torch.zeros(100, 32))
        setattr(wrong, name, value)
        with pytest.raises(ValueError, match=f"{name} is {value}; it must be"):
            cpu.KERNELS.prepare(wrong).attend(query, kv_cache, three_tokens(), torch.empty_like(query))


SLIDES = {"sliding_window": MAX_POSITIONS, "group_size": 1}


@pytest.mark.parametrize("kernels", KERNELS)
def test_the_largest_numbers(kernels: str) -> None:
    for largest in ({"group_size": MAX_POSITIONS}, {"neighbor_window": MAX_POSITIONS, "group_size": 1}, SLIDES):
        check(kernels, Case(((40, 90), (1, 50)), **largest), torch.float32)


def test_wrong_arguments_of_store_are_errors() -> None:
    key, kv_cache, params = torch.zeros(3, 2, 32), torch.zeros(2, 2, 16, 64), AttentionParams(1.0)
    slots = torch.tensor([0, 1, 32])
    with pytest.raises(ValueError, match="slot_mapping names slot 32; the cache has 32"):
        cpu.KERNELS.prepare(params).store(key, key, kv_cache, three_tokens(slot_mapping=slots))
    with pytest.raises(ValueError, match="instruction_set is 'mmx'; this machine runs"):
        cpu.CPUKernels("mmx").prepare(params).store(key, key, kv_cache, three_tokens())


INSTALLED_TORCH = ".".join(torch.__version__.split(".")[:2])
LIBRARY = f"{cpu.__name__}._kernels_torch{INSTALLED_TORCH.replace('.', '_')}"


def test_a_missing_library_is_an_error_that_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, LIBRARY, None)
    with pytest.raises(
        ImportError, match=r"None in sys\.modules\. They are built when .* against the torch that is there$"
    ):
        importlib.reload(cpu)


def test_a_library_that_was_built_for_another_torch_is_not_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, LIBRARY)
    monkeypatch.setattr(torch, "__version__", "99.1.0+cpu")
    message = (
        rf"^they were built for torch .*{INSTALLED_TORCH}, torch 99\.1 is installed; reinstall vllm-selfextend with"
    )
    with pytest.raises(ImportError, match=message):
        importlib.reload(cpu)
    assert LIBRARY not in sys.modules
