"""What the kernels are handed of vLLM's on GPUs, called as vLLM's own signatures say; nothing of it runs here."""

import importlib.util
import inspect
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
import vllm
from vllm import _custom_ops
from vllm.v1.attention.backends import fa_utils

from vllm_selfextend.backends.flash_attention import FlashVarlen
from vllm_selfextend.backends.interface import VarlenLengths
from vllm_selfextend.vllm import gpu_operators
from vllm_selfextend.vllm.attention import SelfExtendBackend


class Recorder:
    """Takes the place of a function, whose signature its arguments have to fit."""

    def __init__(self, original: Callable[..., Any], answer: Any = None) -> None:
        self.signature, self.answer = inspect.signature(original), answer
        self.calls: list[dict[str, Any]] = []

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.calls.append(self.signature.bind(*args, **kwargs).arguments)
        return self.answer


@pytest.fixture
def on_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("is_cuda", "is_cuda_alike"):
        monkeypatch.setattr(type(gpu_operators.current_platform), name, lambda platform: True)


def vllms_flash_attention() -> Callable[..., Any]:
    """The function itself; its package cannot be imported without a GPU's libraries."""
    path = Path(vllm.__file__).parent / "vllm_flash_attn" / "flash_attn_interface.py"
    spec = importlib.util.spec_from_file_location("flash_attn_interface", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    function: Callable[..., Any] = module.flash_attn_varlen_func
    return function


@pytest.mark.parametrize("window", [0, 7])
@pytest.mark.parametrize("is_paged", [False, True])
def test_flash_attention_is_called_as_vllm_calls_it(is_paged: bool, window: int) -> None:
    out, lse = torch.empty(3, 4, 16), torch.empty(4, 3)
    function = Recorder(vllms_flash_attention(), (out, lse))
    starts = torch.tensor([0, 3], dtype=torch.int32)
    lengths = VarlenLengths(starts, starts[1:], starts, 3, 5)
    table = torch.zeros(1, 1, dtype=torch.int32) if is_paged else None
    attention = FlashVarlen(function, 3, 0.25, 30.0)
    assert attention(out, out, out, out, lse, lengths, table, is_causal=True, window=window) is lse
    (call,) = function.calls
    for name in ("q", "k", "v", "out"):
        assert call[name] is out
    # vLLM's FlashAttentionImpl says it in the same way.
    assert call["window_size"] == ([window - 1, 0] if window else [-1, -1])
    assert (call["softmax_scale"], call["softcap"], call["fa_version"], call["num_splits"]) == (0.25, 30.0, 3, 1)
    assert (call["max_seqlen_q"], call["max_seqlen_k"], call["causal"]) == (3, 5, True)
    assert call["return_softmax_lse"]
    assert call["cu_seqlens_q"] is starts
    if is_paged:
        assert call["block_table"] is table
        assert call["seqused_k"] is lengths.seq_lens
        assert "cu_seqlens_k" not in call
    else:
        assert call["cu_seqlens_k"] is lengths.key_start_loc
        assert "block_table" not in call


@pytest.mark.usefixtures("on_cuda")
def test_which_flash_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    choose = Recorder(fa_utils.get_flash_attn_version, 4)
    monkeypatch.setattr(fa_utils, "get_flash_attn_version", choose)
    package = ModuleType("vllm.vllm_flash_attn")
    package.flash_attn_varlen_func = max  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, package.__name__, package)
    found = gpu_operators.find_attention(96, 0.5, 20.0)
    assert found is not None
    assert found.version == 4
    assert choose.calls == [{"head_size": 96, "requires_softcap": True}]
    # It takes multiples of 8; vLLM does not ask for a version then.
    assert gpu_operators.find_attention(100, 0.5, 0.0) is None
    choose.answer = None
    assert gpu_operators.find_attention(96, 0.5, 0.0) is None


def test_elsewhere_there_is_neither() -> None:
    assert gpu_operators.find_attention(96, 0.5, 0.0) is None
    assert gpu_operators.find_store(SimpleNamespace(), "auto") is None


@pytest.mark.usefixtures("on_cuda")
def test_what_stores_has_the_layers_scales_of_the_moment(monkeypatch: pytest.MonkeyPatch) -> None:
    function = Recorder(_custom_ops.reshape_and_cache_flash)
    monkeypatch.setattr(_custom_ops, "reshape_and_cache_flash", function)
    layer = SimpleNamespace(_k_scale=torch.tensor(1.0), _v_scale=torch.tensor(2.0))
    store = gpu_operators.find_store(layer, "fp8")
    assert store is not None
    layer._k_scale = torch.tensor(3.0)
    tensors = [torch.empty(0) for _ in range(5)]
    store(*tensors)
    (call,) = function.calls
    wanted = [*tensors, "fp8", layer._k_scale, layer._v_scale]
    assert all(found is one or found == one for found, one in zip(call.values(), wanted, strict=True))


@pytest.mark.usefixtures("on_cuda")
@pytest.mark.parametrize("cache_dtype", [torch.float32, torch.bfloat16, torch.float16, torch.uint8], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_what_stores_is_given_the_caches_dtype(
    dtype: torch.dtype, cache_dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """VLLM's operator converts to fp8 only, and otherwise takes the cache's bytes for the keys' dtype."""
    function = Recorder(_custom_ops.reshape_and_cache_flash)
    monkeypatch.setattr(_custom_ops, "reshape_and_cache_flash", function)
    store = gpu_operators.find_store(SimpleNamespace(_k_scale=None, _v_scale=None), "auto")
    assert store is not None
    key, cache = torch.empty(2, 1, 8, dtype=dtype), torch.empty(1, 16, 1, 8, dtype=cache_dtype)
    store(key, key, cache, cache, torch.tensor([0, 1]))
    (call,) = function.calls
    wanted = dtype if cache_dtype == torch.uint8 else cache_dtype
    assert (call["key"].dtype, call["value"].dtype) == (wanted, wanted)


@pytest.mark.parametrize("is_fnuz", [False, True])
def test_a_gpu_whose_fp8_is_another_has_no_fp8_cache(is_fnuz: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(type(gpu_operators.current_platform), "is_fp8_fnuz", lambda platform: is_fnuz)
    assert SelfExtendBackend.supports_kv_cache_dtype("fp8") != is_fnuz
    assert SelfExtendBackend.supports_kv_cache_dtype("auto")
