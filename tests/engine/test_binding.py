"""What the layers of a loaded model are given."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from vllm import SamplingParams
from vllm.model_executor.layers.attention import Attention

from tests.support.models import random_prompts
from vllm_selfextend.method.positions import group_sizes
from vllm_selfextend.vllm import binding


def short_draft(checkpoint: Callable, folder: Path) -> str:
    """A model that was trained on 40 tokens."""
    shutil.copytree(checkpoint("llama-mqa"), folder / "draft")
    config = folder / "draft" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"max_position_embeddings": 40}))
    return str(folder / "draft")


def test_a_draft_that_groups_positions_where_its_target_does_not(
    checkpoint: Callable, start_engine: Callable, tmp_path: Path
) -> None:
    """The target's tables are lengthened, since its user says that it was trained on more than its config says."""
    (text,) = random_prompts([150], seed=3)
    greedy = SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True, detokenize=False)
    settings = {"attention_backend": "CUSTOM", "max_model_len": 256}
    settings |= {"additional_config": {"self_extend": {"trained_length": 256}}}
    found = []
    for speculation in (
        None,
        {"method": "draft_model", "model": short_draft(checkpoint, tmp_path), "num_speculative_tokens": 2},
    ):
        llm = start_engine(checkpoint("llama"), **settings, speculative_config=speculation)
        (output,) = llm.generate({"prompt_token_ids": text}, greedy, use_tqdm=False)
        found.append(list(output.outputs[0].token_ids))
    assert found[0] == found[1]
    runner = llm.llm_engine.model_executor.driver_worker.worker.model_runner
    for model, groups in ((runner.get_model(), False), (runner.get_draft_model(), True)):
        layers = [module for module in model.modules() if hasattr(module, "get_attn_backend")]
        assert layers
        assert all((layer.impl.group_sizes is not None) == groups for layer in layers)


def test_a_draft_that_groups_nothing_and_ends_early(checkpoint: Callable, start_engine: Callable) -> None:
    """Its layers have Self-Extend's kernels all the same."""
    speculation = {"method": "draft_model", "model": checkpoint("llama-mqa"), "num_speculative_tokens": 2}
    llm = start_engine(
        checkpoint("llama"),
        attention_backend="CUSTOM",
        max_model_len=64,
        speculative_config={**speculation, "max_model_len": 48},
        additional_config={"self_extend": {"trained_length": 32}},
    )
    (text,) = random_prompts([40], seed=3)
    sampling = SamplingParams(temperature=0.0, max_tokens=4, ignore_eos=True, detokenize=False)
    (output,) = llm.generate({"prompt_token_ids": text}, sampling, use_tqdm=False)
    assert len(output.outputs[0].token_ids) == 4


def test_rotations_are_on_the_runners_device_and_a_draft_is_unwrapped(
    checkpoint: Callable, start_engine: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights may be offloaded to the CPU, and CUDA graphs wrap a draft model; the runner knows better.

    Each of the two was trained on a length of its own.
    """
    speculation = {"method": "draft_model", "model": short_draft(checkpoint, tmp_path), "num_speculative_tokens": 2}
    numbers = {"self_extend": {"group_size": 6, "neighbor_window": 16}}
    llm = start_engine(
        checkpoint("llama"),
        attention_backend="CUSTOM",
        max_model_len=256,
        speculative_config=speculation,
        additional_config=numbers,
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
    for model, sizes in ((target, (64, 16, 6)), (draft, (40, 10, "auto"))):
        layers = [module for module in model.modules() if hasattr(module, "get_attn_backend")]
        assert layers
        assert all(layer.impl.rotation.cos_sin.is_meta for layer in layers)
        table = group_sizes(256, *sizes, exact_len=sizes[0])
        for layer in layers:
            assert layer.impl.plan.log_scale_len == sizes[0]
            assert layer.impl.plan.group_sizes(256).equal(table)


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
        params = layer.impl.params(layer)
        assert params.sinks.data_ptr() == layer.impl.sinks.data_ptr()
        assert (params.k_scale.data_ptr(), params.v_scale.data_ptr()) == tuple(
            scale.data_ptr() for scale in (layer._k_scale, layer._v_scale)
        )
