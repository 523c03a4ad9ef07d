"""What the layers of a loaded model are given."""

from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from vllm import SamplingParams
from vllm.model_executor.layers.attention import Attention

from vllm_selfextend import binding


def test_rotations_are_on_the_runners_device_and_a_draft_is_unwrapped(
    checkpoint: Callable, start_engine: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights may be offloaded to the CPU, and CUDA graphs wrap a draft model; the runner knows better."""
    llm = start_engine(
        checkpoint("llama"),
        attention_backend="CUSTOM",
        max_model_len=256,
        speculative_config={"method": "draft_model", "model": checkpoint("llama-mqa"), "num_speculative_tokens": 2},
    )
    runner = llm.llm_engine.model_executor.driver_worker.worker.model_runner
    target, draft = runner.get_model(), runner.get_draft_model()
    assert target is not draft
    elsewhere = SimpleNamespace(
        get_model=lambda: target,
        get_draft_model=lambda: draft,
        drafter=SimpleNamespace(model=SimpleNamespace(unwrap=lambda: draft)),
        device=torch.device("meta"),
    )
    # The model can be run where it is only.
    probe = binding._probe
    monkeypatch.setattr(binding, "_probe", lambda *args: probe(*args[:-2], runner, args[-1]))
    binding.bind_models(elsewhere, llm.llm_engine.vllm_config)
    for model in (target, draft):
        layers = [module for module in model.modules() if hasattr(module, "get_attn_backend")]
        assert layers
        assert all(layer.impl.rotation.cos_sin.is_meta for layer in layers)


def test_dummy_weights_in_float16(checkpoint: Callable, start_engine: Callable) -> None:
    """Queries and keys of a few of the smallest numbers: they tell little, and that is no reason to refuse."""
    llm = start_engine(
        checkpoint("llama"), attention_backend="CUSTOM", max_model_len=256, load_format="dummy", dtype="float16"
    )
    layers = llm.llm_engine.vllm_config.compilation_config.static_forward_context.values()
    assert [layer.impl.rotation.interleaved for layer in layers] == [False] * 3


def test_sinks_and_scales_are_read_where_they_are_stored(checkpoint: Callable, start_engine: Callable) -> None:
    """Not copied: a running engine's weights may be updated in place."""
    llm = start_engine(checkpoint("sinks"), attention_backend="CUSTOM", max_model_len=256, kv_cache_dtype="fp8")
    llm.generate({"prompt_token_ids": [1, 2, 3]}, SamplingParams(max_tokens=1, detokenize=False), use_tqdm=False)
    layers = llm.llm_engine.vllm_config.compilation_config.static_forward_context.values()
    layers = [layer for layer in layers if isinstance(layer, Attention)]
    assert layers
    for layer in layers:
        params = layer.impl.params
        assert params.sinks.data_ptr() == layer.impl.sinks.data_ptr()
        assert (params.k_scale.data_ptr(), params.v_scale.data_ptr()) == tuple(
            scale.data_ptr() for scale in (layer._k_scale, layer._v_scale)
        )
