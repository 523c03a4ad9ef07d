"""`enable_flash_attention=True`, with a stand-in for the package flash-attn: the answers without it, in float64."""

import re
import sys
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedModel, StaticCache

import vllm_selfextend.transformers as SelfExtend
from tests.support.batches import greedy, padded
from tests.support.models import random_prompts
from vllm_selfextend.backends import reference
from vllm_selfextend.backends.interface import AttentionParams, GroupSizes, Rotation, num_rotation_steps
from vllm_selfextend.method.rope import cos_sin
from vllm_selfextend.transformers import extension
from vllm_selfextend.transformers.flash_attention import FlashAttention
from vllm_selfextend.transformers.step import Step

from .families import FAMILIES, random_model
from .flash_attn_stand_in import varlen_func

NUMBERS = {"divides": (4, 16, False), "odd": (5, 18, True), "auto": ("auto", 16, True)}
PROMPTS = random_prompts([150, 61, 12], seed=7)


class StandIn:
    """Counts its calls."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.calls += 1
        return varlen_func(*args, **kwargs)


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> StandIn:
    """In place of the package, on a CPU and in any dtype."""
    found = StandIn()
    flash = FlashAttention(found, "cpu", (torch.float32, torch.float64, torch.bfloat16))
    monkeypatch.setattr(extension, "find_flash_attention", lambda implementation: flash)
    return found


@pytest.mark.parametrize("numbers", NUMBERS)
@pytest.mark.parametrize("name", ["gemma2", "sinks", "glm4", "llama-mqa", "gemma3n"])
def test_models_answer_as_without_it(name: str, numbers: str, stand_in: StandIn) -> None:
    """Soft caps, sinks, partial and interleaved rotations, keys of other layers; padded, with and without a cache."""
    group_size, window, exact_short = NUMBERS[numbers]
    model = random_model(FAMILIES[name])
    atol = 2e-4  # gpt-oss's experts have no float64
    if name != "sinks":
        model, atol = model.double(), 1e-8
    numbers_by_name = {"trained_length": 64, "exact_short": exact_short}
    SelfExtend.apply(model, group_size, window, **numbers_by_name)
    wanted, wanted_logprobs = greedy(model, PROMPTS, 6)
    assert stand_in.calls == 0
    SelfExtend.apply(model, group_size, window, True, **numbers_by_name)
    for how in ({}, {"prefill_chunk_size": 7}, {"cache_implementation": "static"}, {"use_cache": False}):
        got, logprobs = greedy(model, PROMPTS, 6, **how)
        assert got == wanted
        torch.testing.assert_close(logprobs, wanted_logprobs, atol=atol, rtol=0.0)
    # Without padding: no mask reaches a layer.
    torch.testing.assert_close(greedy(model, PROMPTS[:1], 6)[1], wanted_logprobs[:1], atol=atol, rtol=0.0)
    assert stand_in.calls > 0
    SelfExtend.remove(model)
    calls = stand_in.calls
    greedy(model, PROMPTS, 1)
    assert stand_in.calls == calls


def test_beams_and_padding_on_the_right(stand_in: StandIn) -> None:
    model = random_model(FAMILIES["llama"]).double()
    inputs = padded(PROMPTS, side="right")
    left = {**padded(PROMPTS), "do_sample": False, "num_beams": 3, "max_new_tokens": 5}
    found = []
    for flash in (False, True):
        SelfExtend.apply(model, 4, 16, flash, trained_length=64)
        with torch.no_grad():
            logits = model(**inputs).logits[inputs["attention_mask"].bool()]
        found.append((logits, model.generate(**left)))
    torch.testing.assert_close(found[1], found[0], atol=1e-8, rtol=0.0)


def test_log_scaling(stand_in: StandIn) -> None:
    model = random_model(FAMILIES["llama"]).double()
    logprobs = []
    for flash in (False, True):
        plan = SelfExtend.apply(model, 4, 16, flash, 40, trained_length=64)
        assert plan.kernel == ("flash_attn" if flash else "reference")
        logprobs.append(greedy(model, PROMPTS, 4)[1])
    torch.testing.assert_close(*logprobs, atol=1e-8, rtol=0.0)


def test_bfloat16_is_close(stand_in: StandIn) -> None:
    model = random_model(FAMILIES["llama"])
    SelfExtend.apply(model, 4, 16, trained_length=64)
    inputs = padded(PROMPTS)
    with torch.no_grad():
        wanted = model(**inputs).logits.log_softmax(-1)[:, -1]
        model.bfloat16()
        plain = model(**inputs).logits.float().log_softmax(-1)[:, -1]
        SelfExtend.apply(model, 4, 16, True, trained_length=64)
        got = model(**inputs).logits.float().log_softmax(-1)[:, -1]
    assert stand_in.calls > 0
    assert (got - wanted).abs().mean() < 1.5 * (plain - wanted).abs().mean() + 0.01


def test_compiled(stand_in: StandIn) -> None:
    """It is left out of the graphs; the answers are the same."""
    model = random_model(FAMILIES["llama"])
    SelfExtend.apply(model, 4, 16, True, trained_length=64)
    inputs = padded(PROMPTS[:2])
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    torch._dynamo.reset()
    with torch.no_grad():
        wanted = model(**inputs).logits
        for step in (model.forward, torch.compile(model.forward, backend="eager")):
            cache = StaticCache(config=model.config, max_cache_len=ids.shape[1])
            stand_in.calls = 0
            positions = (mask.cumsum(1) - 1).clamp(min=0)
            first = step(
                input_ids=ids[:, :-1],
                attention_mask=mask,
                position_ids=positions[:, :-1],
                past_key_values=cache,
            ).logits
            last = step(
                input_ids=ids[:, -1:], attention_mask=mask, position_ids=positions[:, -1:], past_key_values=cache
            ).logits
            got = torch.cat([first, last], 1)
            torch.testing.assert_close(got[mask.bool()], wanted[mask.bool()], atol=1e-4, rtol=1e-4)
            assert stand_in.calls > 0


@st.composite
def steps(draw: st.DrawFn) -> tuple[Step, AttentionParams]:
    """A chunk of a batch of padded texts, at any place of them."""
    window = draw(st.integers(1, 20))
    length = draw(st.integers(1, 60))
    rows = draw(st.integers(1, length))
    numbers = [8, 8, 9, 9, 16, 37, 200]
    eighths = draw(st.lists(st.sampled_from(numbers), min_size=1, max_size=5).map(sorted))
    runs = draw(st.lists(st.integers(1, 40), min_size=len(eighths), max_size=len(eighths)))
    runs[-1] += length
    sizes = GroupSizes.of(torch.tensor(eighths).repeat_interleave(torch.tensor(runs)))
    frequencies = 10000.0 ** -(torch.arange(4, dtype=torch.float64) / 4)
    steps = num_rotation_steps(len(sizes.eighths), sizes.largest, window)
    params = AttentionParams(
        0.4,
        sizes,
        window,
        log_scale_len=draw(st.sampled_from([0, 20])),
        soft_cap=draw(st.sampled_from([0.0, 2.0])),
        rotation=Rotation(cos_sin(frequencies, 0, steps, torch.float64)),
        sinks=draw(st.sampled_from([None, torch.tensor([1.0, -2.0, 0.5, 3.0], dtype=torch.float64)])),
    )
    if draw(st.booleans()):
        return Step.of(None, rows, length, torch.device("cpu")), params
    mask = torch.ones(3, length, dtype=torch.bool)
    for row in mask:
        side = draw(st.sampled_from(["left", "right", "none"]))
        padding = draw(st.integers(0, length))
        if side != "none":
            row[slice(padding) if side == "left" else slice(length - padding, None)] = False
    causal = torch.ones(length, length, dtype=torch.bool).tril()
    visible = (mask[:, None] & causal)[:, None, length - rows :]
    return Step.of(visible, rows, length, torch.device("cpu")), params


@settings(max_examples=200)
@given(step_and_params=steps(), batch=st.integers(1, 3), seed=st.integers(0, 99))
def test_any_step_is_the_references(step_and_params: tuple[Step, AttentionParams], batch: int, seed: int) -> None:
    step, params = step_and_params
    batch = batch if step.hidden is None else len(step.hidden)
    generator = torch.Generator().manual_seed(seed)
    rows, keys = step.query_pos.shape[1], step.key_pos.shape[1]
    query = torch.randn(batch, 4, rows, 8, generator=generator, dtype=torch.float64)
    key, value = (torch.randn(batch, 2, keys, 8, generator=generator, dtype=torch.float64) for _ in range(2))
    flash = FlashAttention(varlen_func, "cpu", (torch.float64,))
    got = flash.attend(query, key, value, step, params)
    wanted = reference.attend(query.transpose(1, 2), key, value, step.query_pos, step.key_pos, params, step.hidden)
    assert got.isfinite().all()
    if step.hidden is not None:
        own = keys - rows + torch.arange(rows)
        is_token = ~step.hidden[:, torch.arange(rows), own]
        got, wanted = got[is_token], wanted[is_token]
    torch.testing.assert_close(got, wanted, atol=1e-10, rtol=0.0)


@pytest.fixture
def model() -> PreTrainedModel:
    return random_model(FAMILIES["llama"])


@pytest.fixture
def package(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A package by the name of flash-attn."""
    module = ModuleType("flash_attn")
    module.flash_attn_varlen_func = varlen_func  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "flash_attn", module)
    return


def refused(model: PreTrainedModel, message: str, *arguments: Any) -> None:
    before = model.config._attn_implementation
    with pytest.raises(ValueError, match=re.escape(message)):
        SelfExtend.apply(model, 4, 16, True, *arguments)
    assert model.config._attn_implementation == before
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_refuses_without_the_package(model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "flash_attn", None)
    refused(model, "the package flash-attn cannot be imported")
    refused(model, "pip install 'flash-attn>=2.6', or leave it False")


def test_refuses_another_implementation(model: PreTrainedModel, package: None) -> None:
    refused(model, "flash_attention_impl is 'triton'; it must be 'flash_attn'", -1, "triton")


def test_refuses_a_cpu_and_float32(model: PreTrainedModel, package: None) -> None:
    message = "FlashAttention is for float16 or bfloat16 on a GPU, and this model is in torch.{} on {}: load it with"
    refused(model, message.format("float32", "cpu"))
    refused(model.bfloat16(), message.format("bfloat16", "cpu"))


def test_a_model_that_is_changed_afterwards(model: PreTrainedModel, stand_in: StandIn) -> None:
    SelfExtend.apply(model, 4, 16, True)
    with pytest.raises(ValueError, match=r"float16 or bfloat16 on a GPU, and this model is in torch.float16 on cpu"):
        model.half()(input_ids=torch.tensor(PROMPTS[:1]))


def test_heads_that_are_too_large() -> None:
    flash = FlashAttention(varlen_func, "cpu", (torch.float64,))
    x = torch.zeros(1, 1, 3, 264, dtype=torch.float64)
    with pytest.raises(ValueError, match="the head size is 264, and FlashAttention takes up to 256"):
        flash.attend(x, x, x, Step.of(None, 3, 3, x.device), AttentionParams(1.0))


def test_layers_without_group_sizes() -> None:
    flash = FlashAttention(varlen_func, "cpu", (torch.float64,))
    x = torch.zeros(1, 1, 3, 8, dtype=torch.float64)
    with pytest.raises(ValueError, match="group_sizes is None: ordinary attention needs no parts"):
        flash.attend(x, x, x, Step.of(None, 3, 3, x.device), AttentionParams(1.0))
