"""`output_attentions=True`: the weights that the answer comes from."""

from typing import Any

import pytest
import torch
from transformers import DynamicCache, PreTrainedModel

import vllm_selfextend.transformers as SelfExtend
from tests.support.batches import padded
from tests.support.models import random_prompts
from vllm_selfextend.transformers import extension
from vllm_selfextend.transformers.flash_attention import FlashAttention

from .families import FAMILIES, random_model
from .flash_attn_stand_in import varlen_func

TEXT = torch.tensor(random_prompts([150], seed=2))


@torch.no_grad()
def attentions(model: PreTrainedModel, **inputs: Any) -> tuple[torch.Tensor, ...]:
    return model(**{"input_ids": TEXT, "output_attentions": True, **inputs}).attentions


@pytest.mark.parametrize("name", ["llama", "gemma2", "sinks", "smollm3", "gptj", "stablelm"])
def test_where_self_extend_changes_nothing_they_are_eagers(name: str) -> None:
    """Sliding windows, no RoPE, soft caps, sinks, code that attends by itself, layers without keywords; padded."""
    model = random_model(FAMILIES[name])
    model.set_attn_implementation("eager")
    inputs = padded(random_prompts([60, 33], seed=1))
    wanted = attentions(model, **inputs)
    SelfExtend.apply(model, 4, 16, trained_length=64, exact_short=True)
    is_token = inputs["attention_mask"].bool()
    for got, eagers in zip(attentions(model, **inputs), wanted, strict=True):
        rows = [weights.transpose(1, 2)[is_token] for weights in (got, eagers)]  # [tokens, heads, keys]
        torch.testing.assert_close(*rows, atol=1e-5, rtol=0.0)


@pytest.mark.parametrize("is_flash", [False, True])
def test_the_answer_is_their_sum_of_values(is_flash: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    flash = FlashAttention(varlen_func, "cpu", (torch.float32,))
    monkeypatch.setattr(extension, "find_flash_attention", lambda implementation: flash)
    model = random_model(FAMILIES["llama"])
    model.set_attn_implementation("eager")
    plain = attentions(model)
    SelfExtend.apply(model, 4, 16, is_flash)
    module, cache, answers = model.model.layers[-1].self_attn, DynamicCache(config=model.config), []
    hook = module.o_proj.register_forward_pre_hook(lambda _, args: answers.append(args[0]))
    weights = attentions(model, past_key_values=cache)[-1]
    hook.remove()
    values = cache.layers[-1].values.repeat_interleave(module.num_key_value_groups, 1)
    torch.testing.assert_close((weights @ values).transpose(1, 2).flatten(2), answers[0], atol=1e-4, rtol=0.0)
    torch.testing.assert_close(weights.sum(-1), torch.ones(weights.shape[:3]))
    assert (weights - plain[-1]).abs().max() > 0.1


def test_generate_and_the_config() -> None:
    model = random_model(FAMILIES["llama"])
    SelfExtend.apply(model, 4, 16)
    wanted = attentions(model)
    out = model.generate(
        TEXT, attention_mask=torch.ones_like(TEXT), max_new_tokens=2, do_sample=False,
        return_dict_in_generate=True, output_attentions=True,
    )  # fmt: skip
    assert torch.equal(torch.stack(out.attentions[0]), torch.stack(wanted))
    assert [weights.shape[2:] for weights in out.attentions[1]] == [(1, 151)] * len(wanted)
    SelfExtend.remove(model)
    config = model.config.__class__(**{**model.config.to_dict(), "output_attentions": True})
    model = random_model(config)
    SelfExtend.apply(model, 4, 16)
    assert torch.equal(torch.stack(attentions(model)), torch.stack(wanted))
    with torch.no_grad():
        assert torch.equal(torch.stack(model(input_ids=TEXT).attentions), torch.stack(wanted))
        assert not model(input_ids=TEXT, output_attentions=False).attentions


def test_compiled_layers_give_none() -> None:
    model = random_model(FAMILIES["llama"])
    SelfExtend.apply(model, 4, 16)
    wanted = model(input_ids=TEXT).logits
    torch._dynamo.reset()
    for layer in model.model.layers:
        layer.compile(backend="eager")
    torch.testing.assert_close(model(input_ids=TEXT).logits, wanted, atol=1e-4, rtol=1e-4)
    with pytest.raises(ValueError, match=r"the compiled layers of LlamaModel do not give any. Leave it out"):
        attentions(model)
