"""What the flash kernels ask of FlashAttention, and how each version of it is asked; answers are `test_triton.py`'s."""

import functools
import math
import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from vllm_selfextend import flash_attention
from vllm_selfextend.backends import load_kernels, triton
from vllm_selfextend.backends.flash import FlashAttention, FlashKernels, find_flash_attention

from . import flash_stand_in
from .cases import TOLERANCE, Case, Problem, expected, run

CPU = torch.device("cpu")
HOPPER = torch.device("cuda"), (9, 0)


class Recorded:
    """The stand-in, and what it was called with."""

    def __init__(self, **options: Any) -> None:
        self.calls: list[dict[str, Any]] = []
        self.options = options

    def __call__(self, **call: Any) -> tuple[torch.Tensor, torch.Tensor]:
        self.calls.append(call)
        return flash_stand_in.attend(**call, **self.options)

    def kernels(self, **fields: Any) -> FlashKernels:
        fields = {"dtypes": flash_stand_in.DTYPES, **fields}
        return FlashKernels(FlashAttention("the stand-in", self, majors=(), **fields))

    def lengths(self) -> tuple[list[int], list[int]]:
        """Queries and keys of each request of the only call."""
        (call,) = self.calls
        return call["cu_seqlens_q"].diff().tolist(), call["seqused_k"].tolist()


def answer(kernels: FlashKernels, case: Case, dtype: torch.dtype = torch.float32) -> None:
    problem = Problem.of(case, dtype)
    got = run(kernels, problem, dtype).double()
    torch.testing.assert_close(got, expected(problem), atol=TOLERANCE[dtype], rtol=0.0)


def test_only_queries_with_grouped_keys_are_asked_for() -> None:
    """Not a decode's, not those whose keys are all neighbors, whether near or within the exact length."""
    requests = ((20, 90), (1, 80), (30, 30), (17, 17), (25, 60), (4, 70))
    recorded = Recorded()
    answer(recorded.kernels(), Case(requests, neighbor_window=20))
    assert recorded.lengths() == ([20, 0, 10, 0, 25, 0], [70, 0, 10, 0, 40, 0])
    recorded = Recorded()
    # Of the first and the fifth request some queries lie below the exact length and some do not.
    answer(recorded.kernels(), Case(requests, neighbor_window=20, exact_len=50))
    assert recorded.lengths() == ([20, 0, 0, 0, 10, 0], [70, 0, 0, 0, 40, 0])


def test_more_requests_than_are_counted_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vllm_selfextend.backends.flash.grouped.COUNTED_REQUESTS", 2)
    recorded = Recorded()
    answer(recorded.kernels(), Case(((20, 40), (1, 9), (18, 50), (17, 30), (20, 25)), num_heads=2, num_kv_heads=1))
    assert recorded.lengths() == ([20, 0, 18, 14, 9], [24, 0, 34, 14, 9])


@pytest.mark.parametrize("numbers", ["float32", "fp8 cache", "decode", "sliding", "ordinary"])
def test_what_flash_attention_does_not_do_is_tritons(numbers: str) -> None:
    recorded = Recorded()
    kernels = recorded.kernels(dtypes=flash_stand_in.HALF_DTYPES)
    layers = {"sliding": {"sliding_window": 40}, "ordinary": {"group_size": 1}}
    requests = ((1, 90), (16, 40)) if numbers == "decode" else ((20, 50),)
    problem = Problem.of(Case(requests, **layers.get(numbers, {})), torch.bfloat16)
    dtype = torch.float32 if numbers == "float32" else torch.bfloat16
    cache_dtype = torch.uint8 if numbers == "fp8 cache" else dtype
    assert run(kernels, problem, dtype, cache_dtype).equal(run(triton, problem, dtype, cache_dtype))
    assert not recorded.calls
    run(kernels, Problem.of(Case(((20, 50),)), torch.bfloat16), torch.bfloat16)
    assert recorded.calls


@pytest.mark.parametrize("nan_lse", [math.inf, -math.inf])
def test_nan_reaches_the_output(nan_lse: float) -> None:
    """FlashAttention 2 gives such a row the log-sum-exp `inf`, FlashAttention 3 `-inf`."""
    problem = Problem.of(Case(((20, 40), (20, 40))), torch.float32)
    problem.keys[0][3] = float("nan")
    out = run(Recorded(nan_lse=nan_lse).kernels(), problem, torch.float32)
    # The first query is at position 20 and sees key 3 as a grouped one, as all do.
    assert out[:20].isnan().all()
    assert not out[20:].isnan().any()


def test_blocks_of_another_size_are_an_error() -> None:
    problem = Problem.of(Case(((20, 40),), block_size=128), torch.float32)
    message = "the stand-in takes cache blocks of a multiple of 256 tokens, and these have 128"
    with pytest.raises(ValueError, match=message):
        run(Recorded().kernels(block_multiple=256), problem, torch.float32)


def test_what_it_runs_on() -> None:
    kernels = FlashKernels(FlashAttention("Flash", flash_stand_in.attend, majors=(9,)))
    assert kernels.unsupported_device(*HOPPER) is None
    assert "compute capabilities 9.x, and this GPU's is 8.0" in str(kernels.unsupported_device(HOPPER[0], (8, 0)))
    assert "(Ampere) or more" in str(kernels.unsupported_device(HOPPER[0], (7, 5)))
    assert kernels.unsupported_device(CPU, None) == "Flash runs on NVIDIA's GPUs"
    assert [size for size in (24, 36, 256, 264) if not kernels.unsupported_head_size(size)] == [24, 256]
    assert kernels.unsupported_head_size(36) == "Flash takes multiples of 8"


FLASH_2 = """q k v cu_seqlens_q cu_seqlens_k max_seqlen_q max_seqlen_k dropout_p softmax_scale causal window_size
    softcap alibi_slopes deterministic return_attn_probs block_table"""
FLASH_3 = """q k_cache v_cache k v qv rotary_cos rotary_sin cache_seqlens cache_batch_idx cache_leftpad page_table
    cu_seqlens_q cu_seqlens_k_new max_seqlen_q rotary_seqlens q_descale k_descale v_descale softmax_scale causal
    window_size attention_chunk softcap rotary_interleaved scheduler_metadata num_splits pack_gqa sm_margin
    return_softmax_lse"""
OF_VLLM = """q k v max_seqlen_q cu_seqlens_q max_seqlen_k cu_seqlens_k seqused_k q_v dropout_p softmax_scale causal
    window_size softcap alibi_slopes deterministic return_attn_probs block_table return_softmax_lse out
    scheduler_metadata q_descale k_descale v_descale num_splits fa_version s_aux"""
"""The parameters of the functions below: of FlashAttention 2.8, of `hopper` in 2026, of vLLM 0.32 and 0.33."""


def taking(parameters: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """`function`, with no other parameters."""

    def call(**arguments: Any) -> Any:
        assert arguments.keys() <= set(parameters.split())
        return function(**arguments)

    return call


def flash_attn_varlen_func(
    cu_seqlens_k: torch.Tensor, causal: bool, return_attn_probs: bool, **call: Any
) -> tuple[torch.Tensor, torch.Tensor, None]:
    """As in FlashAttention 2's `flash_attn/flash_attn_interface.py`."""
    assert causal
    assert return_attn_probs
    assert cu_seqlens_k[0] == 0
    assert cu_seqlens_k.dtype == torch.int32
    return *flash_stand_in.attend(**call, seqused_k=cu_seqlens_k.diff()), None


def flash_attn_with_kvcache(
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    cache_seqlens: torch.Tensor,
    page_table: torch.Tensor,
    causal: bool,
    num_splits: int,
    return_softmax_lse: bool,
    **call: Any,
) -> tuple[torch.Tensor, torch.Tensor, None, None]:
    """As in FlashAttention 3's `hopper/flash_attn_interface.py`."""
    assert causal
    assert num_splits == 1
    assert return_softmax_lse
    paged = {"k": k_cache, "v": v_cache, "seqused_k": cache_seqlens, "block_table": page_table}
    return *flash_stand_in.attend(**call, **paged, max_seqlen_k=page_table.shape[1] * k_cache.shape[1]), None, None


def vllm_flash_attn_varlen_func(
    versions: list[int], fa_version: int, causal: bool, num_splits: int, return_softmax_lse: bool, **call: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """As in vLLM's `vllm_flash_attn/flash_attn_interface.py`."""
    assert causal
    assert num_splits == 1
    assert return_softmax_lse
    versions.append(fa_version)
    return flash_stand_in.attend(**call)


def install(monkeypatch: pytest.MonkeyPatch, **modules: Callable[..., Any] | None) -> None:
    """Have the packages hold a function of their name, or be missing."""
    for name in ("flash_attn", "flash_attn_interface"):
        function = modules.get(name)
        module = function and SimpleNamespace(flash_attn_varlen_func=function, flash_attn_with_kvcache=function)
        monkeypatch.setitem(sys.modules, name, module)  # None is missing


def anywhere(kernels: FlashKernels) -> FlashKernels:
    """The kernels on a CPU and in float32."""
    found = kernels.flash_attention
    return FlashKernels(FlashAttention(found.name, found.attend, found.block_multiple, (), flash_stand_in.DTYPES))


CASE = Case(((20, 90), (1, 30), (30, 30)), block_size=256, soft_cap=2.0, num_heads=2, num_kv_heads=1)


def test_the_package_of_flash_attention_2(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, flash_attn=taking(FLASH_2, flash_attn_varlen_func))
    kernels = FlashKernels(find_flash_attention())
    answer(anywhere(kernels), CASE)
    assert kernels.flash_attention.block_multiple == 256
    assert [kernels.unsupported_device(HOPPER[0], (major, 0)) for major in (8, 9, 10, 12)] == [None] * 4


def test_the_package_of_flash_attention_3_comes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    install(
        monkeypatch, flash_attn=flash_attn_varlen_func, flash_attn_interface=taking(FLASH_3, flash_attn_with_kvcache)
    )
    kernels = FlashKernels(find_flash_attention())
    answer(anywhere(kernels), CASE)
    assert kernels.flash_attention.block_multiple == 16
    assert kernels.unsupported_device(*HOPPER) is None
    assert kernels.unsupported_device(HOPPER[0], (8, 0)) is not None


def test_without_a_package(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch)
    with pytest.raises(ImportError, match=r"flash_attn.*pip install flash-attn"):
        find_flash_attention()


def test_the_one_of_vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    versions: list[int] = []
    function = taking(OF_VLLM, functools.partial(vllm_flash_attn_varlen_func, versions))
    utils = SimpleNamespace(
        flash_attn_varlen_func=function, get_flash_attn_version=lambda head_size: 4 if head_size <= 128 else 2
    )
    monkeypatch.setitem(sys.modules, "vllm.v1.attention.backends.fa_utils", utils)
    monkeypatch.setattr("vllm.platforms.current_platform.is_cuda", lambda: True)
    kernels = anywhere(flash_attention.load())
    answer(kernels, CASE)
    large = Case(((20, 40),), head_size=256, num_heads=1, num_kv_heads=1)
    answer(kernels, large)
    assert versions == [4, 2]
    utils.get_flash_attn_version = lambda head_size: None
    with pytest.raises(ImportError, match="does not run here"):
        flash_attention.load()


def test_vllms_plugin_loads_vllms(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm_selfextend import backends, plugin

    monkeypatch.setitem(backends.KERNEL_SETS, "flash", backends.KERNEL_SETS["flash"])
    plugin.register()
    with pytest.raises(RuntimeError, match=r"'flash'.*vLLM brings FlashAttention along for NVIDIA's GPUs only"):
        load_kernels("flash")
