"""The Triton kernels, in Triton's interpreter, against the paper's formula in float64; a case takes seconds."""

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from tests.support.cases import TOLERANCE, Case, Problem, Step, expected, run
from tests.support.flash_stand_in import FlashStandIn
from vllm_selfextend.backends import reference, triton
from vllm_selfextend.backends.interface import NO_HOST, AttentionBatch, AttentionParams, Host, Kernels
from vllm_selfextend.backends.triton import decode_launches
from vllm_selfextend.backends.triton.buffers import Room
from vllm_selfextend.backends.triton.launches import LayerKernel
from vllm_selfextend.backends.triton.layer import TritonLayer
from vllm_selfextend.backends.triton.tiles import Device, decode_tiles

from .test_kernels import HEADS, SLID, VARIANTS, cases, check_changes_in_place, three_tokens

# The lengths of `test_against_stock.py`, cut to what the interpreter can do.
BATCHES = {
    "decode": ((1, 21), (1, 1), (1, 31), (1, 7), (1, 78)),
    "prefill": ((23, 23), (5, 5), (3, 16), (20, 90)),
    "mixed": ((17, 45), (1, 70), (9, 19), (1, 42), (20, 20)),
    "speculation": ((2, 40), (4, 4), (12, 60), (1, 33)),
}
FEW_TOKENS_A_SIZE = VARIANTS["automatic, a size for few tokens"]
LENGTHS = [n + more for n in (16, 32, 48, 64, 128) for more in (-1, 0, 1)]


LIMITS = {"prefill": 4, "mixed": 4}
"""`decode_len` where some requests are to be prefills: the kernels' own is for longer ones."""


def check(case: Case, dtype: torch.dtype, decode_len: int | None = None) -> None:
    problem = Problem.of(case, dtype)
    got = run(triton.KERNELS, problem, dtype, decode_len=decode_len).double()
    torch.testing.assert_close(got, expected(problem), atol=TOLERANCE[dtype], rtol=0.0)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("batch", BATCHES)
def test_the_papers_formula(batch: str, variant: str) -> None:
    check(Case(BATCHES[batch], **VARIANTS[variant]), torch.float32, LIMITS.get(batch))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("heads", HEADS, ids=str)
def test_dtypes_and_heads(heads: tuple[int, int], dtype: torch.dtype) -> None:
    for name, batch in BATCHES.items():
        for layer in ({"exact_len": 16, "neighbor_window": 24}, FEW_TOKENS_A_SIZE):
            check(Case(batch, num_heads=heads[0], num_kv_heads=heads[1], **layer), dtype, LIMITS.get(name))


@pytest.mark.parametrize("heads", [(20, 1), (71, 1), (16, 4)], ids=str)
def test_more_heads_than_a_tile_has_rows_and_few(heads: tuple[int, int]) -> None:
    for batch in ("speculation", "mixed"):
        check(Case(BATCHES[batch], num_heads=heads[0], num_kv_heads=heads[1]), torch.float32, LIMITS.get(batch))


@pytest.mark.parametrize(("head_size", "block_size"), [*itertools.product([32, 80, 96, 128, 256], [16, 48, 128])])
def test_head_and_block_sizes(head_size: int, block_size: int) -> None:
    shape = {"num_heads": 2, "num_kv_heads": 1, "head_size": head_size, "rotary_dim": head_size}
    check(Case(((1, 65), (40, 90)), block_size=block_size, **shape), torch.float32)


@pytest.mark.parametrize("group_size", [1, 3, 8, "auto"])
def test_lengths_around_every_boundary(group_size: int | str) -> None:
    """Of cache blocks, tiles, blocks of queries, the neighbor window and the exact length: each, one less, one more."""
    window = 16 if group_size == "auto" else 32
    shape = {"num_heads": 2, "num_kv_heads": 1, "block_size": 48, "group_size": group_size, "neighbor_window": window}
    # As many queries as a decode's block has, as a decode has at most, and as a prefill's block has.
    query_lens = [n + more for n in (8, triton.KERNELS.decode_len(2), 32) for more in (-1, 0, 1)]
    for exact_len in (48,) if group_size == "auto" else (0, 48):
        check(Case(tuple((1, n) for n in LENGTHS), **shape, exact_len=exact_len), torch.float32)
        check(Case(tuple((min(n, 65), n) for n in LENGTHS), **shape, exact_len=exact_len), torch.float32)
        check(Case(tuple((n, n + 50) for n in query_lens), **shape, exact_len=exact_len), torch.float32)


@pytest.mark.parametrize("is_interleaved", [False, True])
def test_queries_of_several_group_sizes(is_interleaved: bool) -> None:
    """In a block of a decode or a prefill, of requests side by side; steps of the sizes, `L` among them, at any row."""
    shape = {"num_heads": 2, "num_kv_heads": 1, "rotary_dim": 24, "interleaved": is_interleaved}
    case = Case(((1, 200),), **shape, **FEW_TOKENS_A_SIZE)
    assert len(case.group_sizes()[20:36].unique()) == 6
    for query_len in (2, 3, 5, 8, 16, 17, 33, 70):
        lengths = {max(n, query_len) for n in (24, 25, 31, 39, 40, 77, 200)}
        check(replace(case, requests=tuple((query_len, n) for n in sorted(lengths))), torch.float32)


@pytest.mark.parametrize("cache_dtype", [torch.float8_e4m3fn, torch.uint8], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_an_fp8_cache(dtype: torch.dtype, cache_dtype: torch.dtype) -> None:
    check_fp8(Case(BATCHES["mixed"], exact_len=40, kv_scales=(0.5, 0.25)), dtype, cache_dtype, LIMITS["mixed"])


@pytest.mark.parametrize("variant", VARIANTS)
def test_an_fp8_cache_with_everything_else(variant: str) -> None:
    for batch in ("decode", "speculation", "mixed"):
        case = Case(BATCHES[batch], kv_scales=(0.5, 0.25), **VARIANTS[variant])
        check_fp8(case, torch.bfloat16, torch.uint8, LIMITS.get(batch))


def check_fp8(case: Case, dtype: torch.dtype, cache_dtype: torch.dtype, decode_len: int | None) -> None:
    problem = Problem.of(case, dtype)
    # Both round keys and values in the same way.
    wanted = run(reference.KERNELS, problem, dtype, cache_dtype).double()
    got = run(triton.KERNELS, problem, dtype, cache_dtype, decode_len=decode_len).double()
    torch.testing.assert_close(got, wanted, atol=TOLERANCE[dtype], rtol=0.0)
    # And fp8 is as close to the truth as three bits of mantissa can be.
    assert (got - expected(problem)).abs().mean() < 0.05


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_fp8_numbers_are_rounded_once(dtype: torch.dtype) -> None:
    """By a scale that is no power of two."""
    case = Case(((20, 20),), kv_scales=(0.3, 0.7))
    key, value = torch.randn(2, 20, case.num_kv_heads, case.head_size, generator=torch.manual_seed(0)).to(dtype)
    batch = AttentionBatch(
        query_start_loc=torch.tensor([0, 20], dtype=torch.int32),
        seq_lens=torch.tensor([20], dtype=torch.int32),
        block_table=torch.tensor([[0, 1]], dtype=torch.int32),
        slot_mapping=torch.arange(20),
        max_query_len=20,
        max_seq_len=20,
    )
    kv_cache = torch.zeros(2, case.num_kv_heads, case.block_size, 2 * case.head_size, dtype=torch.uint8)
    triton.KERNELS.prepare(case.params()).store(key, value, kv_cache, batch)
    stored = kv_cache.transpose(1, 2).flatten(0, 1)[:20].view(torch.float8_e4m3fn)
    rounded = [(x.float() / scale).to(torch.float8_e4m3fn) for x, scale in ((key, 0.3), (value, 0.7))]
    assert stored.float().equal(torch.cat(rounded, dim=-1).float())


def test_every_fp8_number_is_read() -> None:
    numbers = torch.arange(256).to(torch.uint8)
    kv_cache = torch.zeros(256, 1, 16, 32, dtype=torch.uint8)
    kv_cache[:, 0, 0, 16:] = numbers[:, None]
    batch = AttentionBatch(
        query_start_loc=torch.arange(257).int(),
        seq_lens=torch.ones(256).int(),
        block_table=torch.arange(256).int()[:, None],
        slot_mapping=torch.arange(256) * 16,
        max_query_len=1,
        max_seq_len=1,
    )
    # A query that sees one key is answered with its value.
    out = torch.empty(256, 1, 16)
    triton.KERNELS.prepare(AttentionParams(1.0)).attend(torch.zeros_like(out), kv_cache, batch, out)
    wanted = numbers.view(torch.float8_e4m3fn).float()
    torch.testing.assert_close(out, wanted[:, None, None].expand_as(out), atol=0.0, rtol=0.0, equal_nan=True)


def test_sinks_and_scales_may_change_in_place() -> None:
    check_changes_in_place(triton.KERNELS)


@pytest.mark.parametrize("soft_cap", [1.0, 50.0])
def test_a_soft_cap_keeps_small_scores_digits(soft_cap: float) -> None:
    case = Case(((1, 40), (20, 40)), soft_cap=soft_cap)
    problem = Problem.of(case, torch.float32)
    for query in problem.queries:
        query *= 1e-3
    error = run(triton.KERNELS, problem, torch.float32).double() - run(reference.KERNELS, problem, torch.float64)
    assert error.abs().max() < 1e-6


@pytest.mark.parametrize("programs", [1, 4, 1000])
def test_any_number_of_programs_shares_a_context(programs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode_launches, "PROGRAMS_PER_MULTIPROCESSOR", programs)
    shape = {"num_heads": 2, "num_kv_heads": 1, "has_sinks": True}
    check(Case(((1, 130), (1, 3), (5, 70)), **shape), torch.float32)


@pytest.mark.parametrize("longest_split", [32, 64, 96])
def test_a_long_context_among_many_is_shared(longest_split: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where requests alone make programs enough: a program takes `LONGEST_SPLIT` keys at most."""
    monkeypatch.setattr(decode_launches, "PROGRAMS_PER_MULTIPROCESSOR", 2)
    monkeypatch.setattr(decode_launches, "LONGEST_SPLIT", longest_split)
    case = Case(((1, 5), (1, 290), (1, 1), (1, 64), (1, 97), (3, 33)), num_heads=2, num_kv_heads=1)
    for layer in ({"exact_len": 48}, {"has_sinks": True}, {"group_size": 1, "sliding_window": 70}):
        check(replace(case, **layer), torch.float32)


def test_how_many_programs_share_a_context() -> None:
    """On a GPU of 132 multiprocessors, with 8 KV heads: enough to fill it, and as many as a long context needs."""
    query, kv_cache = (torch.empty(shape, device="meta") for shape in ((2, 32, 128), (4, 8, 16, 256)))
    hopper = Device(None, 132)
    layer, sliding = (
        decode_launches.DecodeKernels(query, kv_cache, query, params, hopper)
        for params in (AttentionParams(1.0), AttentionParams(1.0, sliding_window=4096))
    )
    splits = {
        (num_reqs, longest): layer.num_splits(num_reqs, longest, 1)
        for num_reqs in (1, 16, 66, 300, 2000)
        for longest in (4096, 131072)
    }
    assert splits == {
        (1, 4096): (64, 64),
        (1, 131072): (64, 64),
        (16, 4096): (4, 4),
        (16, 131072): (8, 4),
        (66, 4096): (1, 1),
        (66, 131072): (8, 1),
        (300, 4096): (1, 1),
        (300, 131072): (1, 1),
        (2000, 4096): (1, 1),
        (2000, 131072): (1, 1),
    }
    assert sliding.num_splits(66, 131072, 1) == (1, 1)
    # What they find has room.
    size = decode_launches.workspace_numbers(32, 8, 128, hopper)
    programs = [num_reqs * 8 * num_splits for (num_reqs, _), (num_splits, _) in splits.items() if num_splits > 1]
    assert max(programs) * layer.rows * (128 + 1) <= size


def test_a_context_is_turned_once_where_that_moves_fewer_bytes() -> None:
    """A decode reads it for each block of queries, a prefill reads it, writes it turned and reads that."""
    for heads in range(1, 72):
        block = decode_tiles(heads, 128, 2, False, Device(None, 132)).rows // heads
        most = triton.KERNELS.decode_len(heads)
        assert -(-most // block) <= 3 < -(-(most + 1) // block)


@pytest.mark.parametrize("requests", [((4, 90),), ((90, 90), (30, 200))])
def test_a_workspace_is_enough_or_an_error(requests: tuple[tuple[int, int], ...]) -> None:
    """Of decodes so few that programs share their context, and of prefills."""
    case = Case(requests, exact_len=48, has_sinks=True, log_scale_len=48)
    problem = Problem.of(case, torch.float32)
    heads = case.num_heads, case.num_kv_heads, case.head_size
    size = triton.KERNELS.workspace_size(*heads, torch.float32, torch.device("cpu"), NO_HOST)
    wanted = run(triton.KERNELS, problem, torch.float32)
    workspace = torch.full([size // 4], float("nan")).view(torch.uint8)
    assert run(triton.KERNELS, problem, torch.float32, workspace=workspace).equal(wanted)
    with pytest.raises(ValueError, match=f"workspace holds 100 bytes; this layer needs {size}"):
        run(triton.KERNELS, problem, torch.float32, workspace=torch.zeros(100, dtype=torch.uint8))


class Cramped(Kernels):
    """The kernels with buffers for few rows and keys, with FlashAttention or without."""

    CACHE_LAYOUT, VARIANT = triton.KERNELS.CACHE_LAYOUT, triton.KERNELS.VARIANT

    def __init__(self, num_rows: int, num_keys: int, *, has_flash: bool = False) -> None:
        self.room, self.has_flash = Room(num_rows, num_keys), has_flash

    def prepare(self, params: AttentionParams, host: Host = NO_HOST) -> TritonLayer:
        self.flash = FlashStandIn(params.scale, params.soft_cap)
        return TritonLayer(params, Host(attention=self.flash if self.has_flash else None), room=self.room)


@pytest.mark.parametrize("has_flash", [False, True])
@pytest.mark.parametrize("room", [(1000, 40), (33, 1000), (17, 19), (64, 64)], ids=str)
@pytest.mark.parametrize("layer", ["automatic", "automatic, a size for few tokens", "everything", "plain", "sinks"])
def test_slabs_that_are_shorter_than_contexts(layer: str, room: tuple[int, int], has_flash: bool) -> None:
    case = Case(((40, 150), (1, 70), (30, 30), (60, 200)), num_heads=2, num_kv_heads=1, **VARIANTS[layer])
    problem = Problem.of(case, torch.float32)
    kernels = Cramped(*room, has_flash=has_flash)
    got = run(kernels, problem, torch.float32, decode_len=4).double()
    torch.testing.assert_close(got, expected(problem), atol=TOLERANCE[torch.float32], rtol=0.0)
    if has_flash:
        assert {(True, True, case.neighbor_window), (False, True, 0)} <= set(kernels.flash.calls)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("heads", HEADS, ids=str)
def test_prefills_on_flash_attention(heads: tuple[int, int], dtype: torch.dtype) -> None:
    for layer in ({"exact_len": 48, "log_scale_len": 48, "neighbor_window": 24}, FEW_TOKENS_A_SIZE):
        case = Case(((40, 150), (1, 70), (70, 70)), num_heads=heads[0], num_kv_heads=heads[1], **layer)
        problem = Problem.of(case, dtype)
        got = run(Cramped(64, 100, has_flash=True), problem, dtype).double()
        torch.testing.assert_close(got, expected(problem), atol=TOLERANCE[dtype], rtol=0.0)


@pytest.mark.parametrize("cache_dtype", [torch.float16, torch.uint8], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_grouped_keys_of_another_dtype_on_flash_attention(dtype: torch.dtype, cache_dtype: torch.dtype) -> None:
    scales = {"kv_scales": (0.5, 0.25)} if cache_dtype == torch.uint8 else {}
    case = Case(((40, 150), (1, 70), (70, 70)), **scales, **FEW_TOKENS_A_SIZE)
    problem, kernels = Problem.of(case, dtype), Cramped(64, 100, has_flash=True)
    wanted = run(reference.KERNELS, problem, dtype, cache_dtype).double()
    got = run(kernels, problem, dtype, cache_dtype).double()
    torch.testing.assert_close(got, wanted, atol=TOLERANCE[dtype], rtol=0.0)
    # Which takes no keys of another type than the queries'.
    assert kernels.flash.calls
    assert not any(is_paged for is_paged, _, _ in kernels.flash.calls)


def test_warmed_up_layers_compile_nothing_more() -> None:
    """And warming up leaves the cache as it was."""
    for variant in ("everything", "sliding", "sinks"):
        problem = Problem.of(Case(BATCHES["mixed"], **VARIANTS[variant]), torch.float32)
        step = Step(triton.KERNELS, problem, torch.float32, decode_len=LIMITS["mixed"])
        before = step.kv_cache.clone()
        out = torch.empty_like(step.query)
        step.layer.warm_up(step.query, step.key, step.value, step.kv_cache, out)
        torch.testing.assert_close(step.kv_cache, before, equal_nan=True)
        made = dict(step.layer.made)
        (kernels,) = made.values()
        attention = set(kernels.prefill.over_cache._made)
        assert attention
        step.store()
        step.attend()
        assert step.layer.made == made
        assert set(kernels.prefill.over_cache._made) == attention


class Operators(TorchDispatchMode):
    """The operators that are called within it."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.add(func.overloadpacket.__name__)
        return func(*args, **kwargs or {})


@pytest.mark.parametrize("variant", ["everything", "sliding", "sinks"])
@pytest.mark.parametrize("batch", ["decode", "mixed"])
def test_a_step_allocates_nothing_and_waits_for_nothing(
    batch: str, variant: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """But for what its first layer plans for all of them; kernels, which are interpreted here, are left out."""
    case = Case(BATCHES[batch], **VARIANTS[variant])
    heads = case.num_heads, case.num_kv_heads, case.head_size
    size = triton.KERNELS.workspace_size(*heads, torch.float32, torch.device("cpu"), NO_HOST)
    workspace = torch.empty(size, dtype=torch.uint8)
    options = {"workspace": workspace, "decode_len": LIMITS.get(batch)}
    step = Step(triton.KERNELS, Problem.of(case, torch.float32), torch.float32, **options)
    step.store()
    step.attend()
    assert bool(step.layer.made and step.batch.prepared) == (batch == "mixed")
    launched: list[LayerKernel] = []
    monkeypatch.setattr(LayerKernel, "__call__", lambda kernel, grid, step: launched.append(kernel))
    out = torch.empty_like(step.query)
    with Operators() as operators:
        step.layer.attend(step.query, step.kv_cache, step.batch, out, workspace)
    assert launched
    views = {"view", "alias", "slice", "as_strided", "split", "transpose", "select", "detach"}
    assert operators.names <= views, operators.names - views


@pytest.mark.parametrize("decode_len", [1, 5, 16, 100])
def test_any_limit_between_decodes_and_prefills(decode_len: int) -> None:
    case = Case(((17, 45), (1, 70), (5, 19), (6, 42), (20, 20)), num_heads=2, num_kv_heads=1, **FEW_TOKENS_A_SIZE)
    problem = Problem.of(case, torch.float32)
    got = run(triton.KERNELS, problem, torch.float32, decode_len=decode_len).double()
    torch.testing.assert_close(got, expected(problem), atol=TOLERANCE[torch.float32], rtol=0.0)


def test_a_captured_step_replayed() -> None:
    """What vLLM's CUDA graphs do: padding requests of no tokens, padding tokens of no request, and upper bounds."""
    problem = Problem.of(Case(BATCHES["decode"]), torch.float32)
    num_tokens = len(BATCHES["decode"])
    wanted = run(triton.KERNELS, problem, torch.float32)
    got = run(triton.KERNELS, problem, torch.float32, padding=3, max_query_len=2)
    assert got[num_tokens:].isnan().all(), "padding was written"
    torch.testing.assert_close(got[:num_tokens], wanted, atol=2e-6, rtol=0.0)


def test_padding_behind_prefills() -> None:
    problem = Problem.of(Case(BATCHES["mixed"]), torch.float32)
    num_tokens = sum(query_len for query_len, _ in BATCHES["mixed"])
    wanted = run(triton.KERNELS, problem, torch.float32, decode_len=4)
    got = run(triton.KERNELS, problem, torch.float32, decode_len=4, padding=3, max_query_len=50)
    assert got[num_tokens:].isnan().all(), "padding was written"
    assert got[:num_tokens].equal(wanted)


def test_a_step_without_tokens_stores_nothing() -> None:
    """A microbatch without requests: an operator that launches nothing says that it cannot."""
    called: list[tuple[torch.Tensor, ...]] = []
    case = Case(((1, 1),))
    layer = triton.KERNELS.prepare(case.params(), Host(store=lambda *tensors: called.append(tensors)))
    kv_cache = torch.zeros(2, case.num_kv_heads, case.block_size, 2 * case.head_size)
    for num_tokens in (0, 3):
        key = torch.ones(num_tokens, case.num_kv_heads, case.head_size)
        layer.store(key, key, kv_cache, replace(three_tokens(), slot_mapping=torch.arange(num_tokens)))
    assert [len(slots) for *_, slots in called] == [3]


def test_a_decode_alone_where_the_longest_request_might_be_a_prefill() -> None:
    """`max_query_len` is at least the largest."""
    problem = Problem.of(Case(((1, 70),)), torch.float32)
    got = run(triton.KERNELS, problem, torch.float32, decode_len=4, max_query_len=50)
    assert got.equal(run(triton.KERNELS, problem, torch.float32))


def test_a_step_of_padding_only() -> None:
    """What vLLM hands to a microbatch without requests: padding tokens, and requests of no tokens."""
    batch = AttentionBatch(
        query_start_loc=torch.zeros(3, dtype=torch.int32),
        seq_lens=torch.zeros(2, dtype=torch.int32),
        block_table=torch.zeros(2, 1, dtype=torch.int32),
        slot_mapping=torch.full([3], -1),
        max_query_len=0,
        max_seq_len=1,
    )
    case = Case(((1, 1),))
    key, query = torch.ones(3, case.num_kv_heads, case.head_size), torch.ones(3, case.num_heads, case.head_size)
    kv_cache = torch.zeros(2, case.num_kv_heads, case.block_size, 2 * case.head_size)
    out = torch.full_like(query, float("nan"))
    triton.KERNELS.prepare(case.params()).store(key, key, kv_cache, batch)
    triton.KERNELS.prepare(case.params()).attend(query, kv_cache, batch, out)
    assert kv_cache.count_nonzero() == 0
    assert out.isnan().all()


def test_any_strides() -> None:
    case = Case(BATCHES["mixed"], interleaved=True, rotary_dim=20)
    problem = Problem.of(case, torch.float32)

    class Strided:
        """The kernels on tensors whose dimensions lie anyhow, and a cache with room between its blocks."""

        cache: torch.Tensor | None = None

        def prepare(self, params: AttentionParams, host: Host) -> "Strided":
            self.layer = triton.KERNELS.prepare(params)
            return self

        def decode_len(self, heads: int) -> int:
            return 4

        def store(self, key: torch.Tensor, value: torch.Tensor, kv_cache: torch.Tensor, batch: AttentionBatch) -> None:
            if self.cache is None:
                blocks, *shape = kv_cache.shape
                self.cache = kv_cache.new_full([2 * blocks, *shape], float("nan"))[::2]
            fused = torch.cat([key, value], dim=2)
            key, value = fused.split(key.shape[2], dim=2)
            self.layer.store(key.mT.contiguous().mT, value, self.cache, batch)

        def attend(
            self, query: torch.Tensor, kv_cache: torch.Tensor, batch: AttentionBatch, out: torch.Tensor, workspace: None
        ) -> None:
            there = torch.stack([out, out], dim=-1)[..., 1]
            query = query.transpose(0, 1).contiguous().transpose(0, 1)
            self.layer.attend(query, self.cache, batch, there)
            out.copy_(there)

    torch.testing.assert_close(run(Strided(), problem, torch.float32).double(), expected(problem), atol=2e-5, rtol=0.0)


@pytest.mark.parametrize("has_sinks", [False, True])
def test_what_slid_out_of_the_window_may_be_anything(has_sinks: bool) -> None:
    problem = Problem.of(Case(SLID, group_size=1, sliding_window=40, has_sinks=has_sinks), torch.float32)
    wanted = expected(problem)
    problem.spoil_unseen()
    torch.testing.assert_close(run(triton.KERNELS, problem, torch.float32).double(), wanted, atol=2e-5, rtol=0.0)


def test_nan_reaches_the_output() -> None:
    problem = Problem.of(Case(((1, 70), (1, 40), (20, 40))), torch.float32)
    problem.keys[0][3] = float("nan")
    problem.keys[2][3] = float("nan")
    out = run(triton.KERNELS, problem, torch.float32)
    assert out[0].isnan().all()
    assert not out[1].isnan().any()
    assert out[2:].isnan().all()


@pytest.mark.slow
@settings(max_examples=60, derandomize=True)
@given(cases(), st.sampled_from([torch.float32, torch.float16, torch.bfloat16]))
def test_random_cases(case: Case, dtype: torch.dtype) -> None:
    problem = Problem.of(case, dtype)
    # The reference, proved in `test_kernels.py`, is the faster oracle.
    wanted = run(reference.KERNELS, problem, torch.float64)
    got = run(triton.KERNELS, problem, dtype).double()
    torch.testing.assert_close(got, wanted, atol=TOLERANCE[dtype], rtol=0.0)


def test_negative_slots_are_not_stored() -> None:
    case = Case(((3, 3),))
    key = torch.ones(3, case.num_kv_heads, case.head_size)
    kv_cache = torch.zeros(2, case.num_kv_heads, case.block_size, 2 * case.head_size)
    triton.KERNELS.prepare(case.params()).store(
        key, key, kv_cache, three_tokens(slot_mapping=torch.tensor([16, -1, 17]))
    )
    assert kv_cache[0].count_nonzero() == 0
    assert kv_cache[1, :, 2:].count_nonzero() == 0
    assert kv_cache[1, :, :2].count_nonzero() > 0
