"""Which attention backend vLLM gives a draft, and how it is run for the probe: as vLLM's proposers run theirs."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from vllm.v1.attention.backends.registry import AttentionBackendEnum

from vllm_selfextend.method.config import SelfExtendConfig
from vllm_selfextend.vllm import binding
from vllm_selfextend.vllm.engine_args import _draft_backend, _extend_draft

HIDDEN_SIZE = 24
POSITIONS = torch.arange(5)
CONFIG = SimpleNamespace(model="a/head", dtype=torch.float32, uses_mrope=False)


@pytest.mark.parametrize(
    ("chosen", "for_full_attention", "second_runner", "gemma4", "expected"),
    [
        (None, None, False, False, None),
        ("FLASH_ATTN", None, False, False, "FLASH_ATTN"),
        ("FLASH_ATTN", "CUSTOM", False, False, "CUSTOM"),
        (None, "CUSTOM", False, False, "CUSTOM"),
        (None, None, True, False, "CUSTOM"),
        ("FLASH_ATTN", None, True, False, "FLASH_ATTN"),
        (None, None, False, True, "CUSTOM"),
    ],
)
def test_a_drafts_backend(
    chosen: str | None, for_full_attention: str | None, second_runner: bool, gemma4: bool, expected: str | None
) -> None:
    """The model's is CUSTOM. The first runner chooses a draft's anew, the second one and Gemma 4's draft inherit it."""
    kinds = {"full_attention": AttentionBackendEnum[for_full_attention]} if for_full_attention else {}
    vllm_config = SimpleNamespace(
        speculative_config=SimpleNamespace(
            attention_backend=chosen and AttentionBackendEnum[chosen], use_gemma4_mtp=lambda: gemma4
        ),
        attention_config=SimpleNamespace(backend=AttentionBackendEnum.CUSTOM, backend_per_kind=kinds),
        use_v2_model_runner=second_runner,
    )
    assert getattr(_draft_backend(vllm_config), "name", None) == expected


def test_an_mtp_head_with_other_axes_is_refused() -> None:
    """As of a Qwen3.5 without images: vLLM's rotary kernel for CPUs would write past its tensors."""
    speculation = SimpleNamespace(method="mtp", draft_model_config=SimpleNamespace(model="a/head", uses_mrope=True))
    vllm_config = SimpleNamespace(speculative_config=speculation, model_config=SimpleNamespace(uses_mrope=False))
    plan = SelfExtendConfig(group_size=8, neighbor_window=16).plan(64, 256)
    with pytest.raises(ValueError, match=r"the MTP head of a/head positions on several axes \(M-RoPE\), and the model"):
        _extend_draft(vllm_config, plan, torch.device("cpu"))


def calls(*, second_runner: bool = False, **how: bool) -> list[dict[str, Any]]:
    speculation = SimpleNamespace(
        num_speculative_tokens=3,
        use_eagle=lambda: how.get("use_eagle", False),
        use_step3p5_mtp=lambda: how.get("use_step3p5_mtp", False),
        use_multi_module_mtp=lambda: how.get("use_multi_module_mtp", False),
    )
    proposer = SimpleNamespace(hidden_size=HIDDEN_SIZE)
    runner = SimpleNamespace(**{"speculator" if second_runner else "drafter": proposer})
    vllm_config = SimpleNamespace(speculative_config=speculation)
    return binding._draft_arguments(None, POSITIONS, CONFIG, runner, vllm_config)


def test_a_draft_model_is_given_tokens_and_a_head_hidden_states_too() -> None:
    tokens = {"input_ids", "positions", "inputs_embeds"}
    assert [call.keys() for call in calls()] == [tokens]
    for second_runner in (False, True):
        (call,) = calls(use_eagle=True, second_runner=second_runner)
        assert call.keys() == tokens | {"hidden_states"}
        assert call["hidden_states"].shape == (len(POSITIONS), HIDDEN_SIZE)


def test_every_module_that_a_proposer_uses_is_run() -> None:
    steps = [0, 1, 2]
    assert [call["spec_step_idx"] for call in calls(use_eagle=True, use_step3p5_mtp=True)] == steps
    several = {"use_eagle": True, "use_multi_module_mtp": True}
    assert [call["spec_step_idx"] for call in calls(**several, second_runner=True)] == steps
    # The first runner uses the first module only, and some heads refuse to be asked for another.
    assert ["spec_step_idx" in call for call in calls(**several)] == [False]


class Head(nn.Module):
    """Takes what no proposer gives."""

    def forward(self, input_ids: torch.Tensor, positions: torch.Tensor, depth: int) -> None: ...


@pytest.mark.parametrize(("is_draft", "run"), [(True, "drafts"), (False, "models")])
def test_other_arguments_are_refused(is_draft: bool, run: str, monkeypatch: pytest.MonkeyPatch) -> None:
    call = {"input_ids": POSITIONS, "positions": POSITIONS}
    monkeypatch.setattr(binding, "_draft_arguments" if is_draft else "_model_arguments", lambda *_: [call])
    runner = SimpleNamespace(device=torch.device("cpu"))
    with pytest.raises(ValueError, match=rf"serve a/head: its Head cannot be run as vLLM runs {run} \(missing a.*dep"):
        binding._probe(Head(), {"a layer": None}, POSITIONS, CONFIG, is_draft, runner, None)


@pytest.mark.parametrize("is_draft", [True, False])
def test_a_drafts_module_that_is_not_run_needs_no_rotation(is_draft: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A layer of a model that is not run is one of which nothing is known."""
    plan = SelfExtendConfig(group_size=8, neighbor_window=16).plan(64, 256)
    bound: list[Any] = []
    layer = SimpleNamespace(impl=SimpleNamespace(bind=lambda *given: bound.append(given)))
    monkeypatch.setattr(binding, "read_plan", lambda _: plan)
    monkeypatch.setattr(binding, "_grouping_layers", lambda *_: {"layers.1": layer}.items())
    monkeypatch.setattr(binding, "_known_rotations", lambda *_: {})
    monkeypatch.setattr(binding, "_probe", lambda *_: {})
    config = SimpleNamespace(model="a/head", max_model_len=256)
    scheduler = SimpleNamespace(max_num_batched_tokens=64)
    vllm_config = SimpleNamespace(use_v2_model_runner=False, scheduler_config=scheduler)
    arguments = Head(), config, SimpleNamespace(device=torch.device("cpu")), vllm_config
    if is_draft:
        binding.bind_model(*arguments, must_extend=False, is_draft=True)
        assert bound == [(plan,)]
    else:
        with pytest.raises(ValueError, match=r"serve a/head: layers\.1: the model does not use this layer"):
            binding.bind_model(*arguments, must_extend=False)
