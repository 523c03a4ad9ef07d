"""What `apply` and `remove` leave behind, and caches that outlive them."""

import copy
import io
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import DynamicCache, LlamaConfig, PreTrainedModel, StaticCache

import vllm_selfextend.transformers as SelfExtend
from tests.support.batches import greedy, padded
from tests.support.models import SHAPE, random_prompts

from .families import FAMILIES, gptj, random_model

TEXT = torch.tensor(random_prompts([150], seed=2))


@pytest.fixture
def model() -> PreTrainedModel:
    return random_model(FAMILIES["llama"])


@torch.no_grad()
def logits(model: PreTrainedModel, **inputs: Any) -> torch.Tensor:
    return model(**{"input_ids": TEXT, **inputs}).logits


@pytest.mark.parametrize(
    ("name", "implementation"), [("llama", "sdpa"), ("gemma2", "eager"), ("falcon", "sdpa"), ("gptj", "eager")]
)
def test_remove_restores_the_model_bit_for_bit(name: str, implementation: str) -> None:
    model = random_model(FAMILIES[name])
    model.set_attn_implementation(implementation)
    assert model.config._attn_implementation == implementation
    before, attributes = logits(model), {m: set(vars(m)) for m in model.modules()}
    SelfExtend.apply(model, 4, 16)
    assert not torch.equal(logits(model), before)
    SelfExtend.remove(model)
    assert torch.equal(logits(model), before)
    assert model.config._attn_implementation == implementation
    assert {m: set(vars(m)) for m in model.modules()} == attributes
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())


def test_remove_without_apply_does_nothing(model: PreTrainedModel) -> None:
    before = logits(model)
    SelfExtend.remove(model)
    assert torch.equal(logits(model), before)


def test_applying_twice_replaces(model: PreTrainedModel) -> None:
    SelfExtend.apply(model, 5, 18)
    once = logits(model)
    SelfExtend.apply(model, 4, 16)
    assert not torch.equal(logits(model), once)
    SelfExtend.apply(model, 5, 18)
    assert torch.equal(logits(model), once)


def test_a_refused_apply_leaves_the_model(model: PreTrainedModel) -> None:
    before = logits(model)
    with pytest.raises(ValueError, match="window_size is 65"):
        SelfExtend.apply(model, 4, 65)
    assert torch.equal(logits(model), before)
    SelfExtend.apply(model, 4, 16)
    extended = logits(model)
    with pytest.raises(ValueError, match="group_size is 0"):
        SelfExtend.apply(model, 0, 16)
    assert torch.equal(logits(model), extended)


def test_what_apply_takes_without_numbers(model: PreTrainedModel) -> None:
    plan = SelfExtend.apply(model)
    assert (plan.group_size, plan.neighbor_window, plan.trained_length, plan.exact_short) == ("auto", 16, 64, True)
    assert plan.capacity is None
    assert SelfExtend.apply(model, trained_length=40_000).neighbor_window == 1024
    assert SelfExtend.apply(model, trained_length=5).neighbor_window == 1
    assert SelfExtend.apply(model, "auto", 30).neighbor_window == 30
    plan = SelfExtend.apply(model, 4)
    assert (plan.group_size, plan.neighbor_window, plan.exact_short, plan.capacity) == (4, 16, False, 208)


def test_a_text_within_the_window_or_exact_is_the_unmodified_models(model: PreTrainedModel) -> None:
    before = logits(model)
    SelfExtend.apply(model, 4, 16)
    torch.testing.assert_close(logits(model)[:, :16], before[:, :16], atol=1e-4, rtol=0.0)
    SelfExtend.apply(model, 4, 16, exact_short=True)
    torch.testing.assert_close(logits(model)[:, :64], before[:, :64], atol=1e-4, rtol=0.0)
    assert (logits(model)[:, 80:] - before[:, 80:]).abs().max() > 0.1


def test_what_a_group_size_of_one_does_is_nothing(model: PreTrainedModel) -> None:
    inputs = {"input_ids": TEXT[:, :60]}
    before = logits(model, **inputs)
    SelfExtend.apply(model, 1, 16)
    torch.testing.assert_close(logits(model, **inputs), before, atol=1e-4, rtol=0.0)


def one_layer() -> PreTrainedModel:
    """What its keys are does not depend on how it attends."""
    return random_model(LlamaConfig(**{**SHAPE, "num_hidden_layers": 1}))


@pytest.mark.parametrize("is_static", [False, True])
def test_a_cache_outlives_apply_and_remove(is_static: bool) -> None:
    model = one_layer()
    cache: Any = DynamicCache(config=model.config)
    if is_static:
        cache = StaticCache(config=model.config, max_cache_len=150)
    changes: list[Callable[[PreTrainedModel], Any]] = [
        SelfExtend.apply,
        lambda model: SelfExtend.apply(model, 5, 16),
        SelfExtend.remove,
        lambda model: SelfExtend.apply(model, 4, 18),
    ]
    logits(model, input_ids=TEXT[:, :110], past_key_values=cache)
    for begin, change in zip(range(110, 150, 10), changes, strict=True):
        change(model)
        got = logits(model, input_ids=TEXT[:, begin : begin + 10], past_key_values=cache)
        wanted = logits(model, input_ids=TEXT[:, : begin + 10], use_cache=False)[:, begin:]
        torch.testing.assert_close(got, wanted, atol=1e-4, rtol=0.0)


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_a_cache_of_a_text_within_the_trained_length_is_the_unmodified_models(name: str) -> None:
    """With automatic group sizes, in all layers, in both directions."""
    model = random_model(FAMILIES[name])
    model.set_attn_implementation("eager")  # transformers' sdpa leaves out Gemma 2's soft caps
    plain, extended = DynamicCache(config=model.config), DynamicCache(config=model.config)
    logits(model, input_ids=TEXT[:, :64], past_key_values=plain)
    before = logits(model)
    SelfExtend.apply(model)
    got = logits(model, input_ids=TEXT[:, 64:], past_key_values=plain)
    torch.testing.assert_close(got, logits(model)[:, 64:], atol=2e-4, rtol=0.0)
    logits(model, input_ids=TEXT[:, :64], past_key_values=extended)
    SelfExtend.remove(model)
    got = logits(model, input_ids=TEXT[:, 64:], past_key_values=extended)
    torch.testing.assert_close(got, before[:, 64:], atol=2e-4, rtol=0.0)


@pytest.mark.parametrize("name", ["llama", "smollm3"])
def test_a_copied_cache_goes_on(name: str) -> None:
    """As one does to answer several questions on one text; in layers that are not extended too."""
    model = random_model(FAMILIES[name])
    SelfExtend.apply(model, 4, 16)
    cache, wanted = DynamicCache(config=model.config), logits(model)
    logits(model, input_ids=TEXT[:, :100], past_key_values=cache)
    for _ in range(2):
        got = logits(model, input_ids=TEXT[:, 100:], past_key_values=copy.deepcopy(cache))
        torch.testing.assert_close(got, wanted[:, 100:], atol=1e-4, rtol=0.0)


def saved_and_loaded(thing: Any) -> Any:
    file = io.BytesIO()
    torch.save(thing, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda thing: pickle.loads(pickle.dumps(thing)),
    "torch.save": saved_and_loaded,
}


@pytest.mark.parametrize(("name", "how"), [("gptj", "deepcopy"), ("gptj", "pickle"), ("llama", "torch.save")])
def test_copies(name: str, how: str) -> None:
    """A copy of an extended model and of its cache goes on as they do, and is a model of its own."""
    model = random_model(FAMILIES[name])
    copied: Callable[[Any], Any] = COPIES[how]
    before = logits(model)
    SelfExtend.apply(model, 4, 16)
    cache, wanted = DynamicCache(config=model.config), logits(model)
    logits(model, input_ids=TEXT[:, :100], past_key_values=cache)
    other = copied(model)
    got = logits(other, input_ids=TEXT[:, 100:], past_key_values=copied(cache))
    torch.testing.assert_close(got, wanted[:, 100:], atol=1e-4, rtol=0.0)
    assert torch.equal(logits(other), wanted)
    SelfExtend.remove(other)
    assert torch.equal(logits(other), before)
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in other.modules())
    assert torch.equal(logits(model), wanted)


def test_another_attention_set_meanwhile_is_refused(model: PreTrainedModel) -> None:
    SelfExtend.apply(model, 4, 16)
    model.set_attn_implementation("sdpa")
    with pytest.raises(RuntimeError, match=r"attention was set to 'sdpa' after SelfExtend.apply"):
        logits(model)
    SelfExtend.remove(model)
    logits(model)


def test_in_bfloat16_the_answers_are_close(model: PreTrainedModel) -> None:
    SelfExtend.apply(model, 4, 16)
    wanted = logits(model).log_softmax(-1)
    half = random_model(FAMILIES["llama"]).to(torch.bfloat16)
    SelfExtend.apply(half, 4, 16)
    got = logits(half).float().log_softmax(-1)
    assert (got.argmax(-1) == wanted.argmax(-1)).float().mean() > 0.9


def test_positions_past_the_end_of_a_table() -> None:
    """GPT-J's has as many rows as the model was trained for."""
    short, long = random_model(gptj(64)), random_model(gptj(256))
    for model in (short, long):
        SelfExtend.apply(model, 4, 16, trained_length=64)
    assert torch.equal(logits(short), logits(long))


def test_a_padded_batch_in_a_forward_call(model: PreTrainedModel) -> None:
    """Padding on either side, positions left to the model: each text as if it were alone."""
    SelfExtend.apply(model, 4, 16)
    prompts = random_prompts([150, 70, 9], seed=3)
    for side in ("left", "right"):
        inputs = padded(prompts, side)
        got = logits(model, **inputs)
        for row, prompt in enumerate(prompts):
            alone = logits(model, input_ids=torch.tensor([prompt]))[0]
            torch.testing.assert_close(got[row][inputs["attention_mask"][row].bool()], alone, atol=2e-4, rtol=0.0)


def test_another_process_without_vllm(model: PreTrainedModel, tmp_path: Path) -> None:
    """It gets an extended model as a pickle, and extends one; vLLM is not imported, nor are we before."""
    SelfExtend.apply(model, 4, 16)
    (tmp_path / "model.pickle").write_bytes(pickle.dumps(model))
    script = """
import pathlib, pickle, sys
sys.modules["vllm"] = None  # an import would raise
from tests.support.batches import greedy
model = pickle.loads(pathlib.Path(sys.argv[1]).read_bytes())
prompts = [list(range(5, 120))]
answer = greedy(model, prompts, 4)[0]
import vllm_selfextend.transformers as SelfExtend
SelfExtend.remove(model)
assert greedy(model, prompts, 4)[0] != answer
SelfExtend.apply(model, 4, 16)
assert greedy(model, prompts, 4)[0] == answer
print(answer, sorted(name for name in sys.modules if name.split(".")[0] == "vllm"))
"""
    command = [sys.executable, "-c", script, str(tmp_path / "model.pickle")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    answer, _ = greedy(model, [list(range(5, 120))], 4)
    assert done.stdout.strip() == f"{answer} ['vllm']"


def test_a_model_answers_the_same_after_a_second_application(model: PreTrainedModel) -> None:
    prompts = random_prompts([90, 30], seed=4)
    before, _ = greedy(model, prompts, 4)
    SelfExtend.apply(model, 4, 16)
    extended, _ = greedy(model, prompts, 4)
    SelfExtend.remove(model)
    assert greedy(model, prompts, 4)[0] == before
    SelfExtend.apply(model, 4, 16)
    assert greedy(model, prompts, 4)[0] == extended != before


@pytest.mark.parametrize(("name", "length"), [("llama", 64), ("gemma3", 64), ("linear", 128)])
def test_the_trained_length_is_the_configs(name: str, length: int) -> None:
    """Linear RoPE multiplies it, and Gemma 3 names it multiplied."""
    linear = LlamaConfig(**SHAPE, rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0})
    assert SelfExtend.apply(random_model(FAMILIES.get(name, linear)), 4, 16).trained_length == length
