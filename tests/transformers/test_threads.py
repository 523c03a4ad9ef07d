"""What belongs to one call stays with it: threads, calls in turns, and changes of the model in the middle of one."""

import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
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

TEXTS = [torch.tensor([text]) for text in random_prompts([150, 20, 90, 64, 7, 201], seed=6)]


@pytest.fixture
def model() -> PreTrainedModel:
    return random_model(FAMILIES["llama"])


@pytest.fixture
def other_thread() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(1) as pool:
        yield pool


@torch.no_grad()
def logits(model: PreTrainedModel, ids: torch.Tensor, **inputs: Any) -> torch.Tensor:
    return model(input_ids=ids, **inputs).logits


class Interrupted(DynamicCache):
    """Something happens when the first layer has handed over its keys, once."""

    def __init__(self, model: PreTrainedModel, interruption: Callable[[], Any]) -> None:
        super().__init__(config=model.config)
        self.interruption: Callable[[], Any] | None = interruption

    def update(self, *args: Any, **kwargs: Any) -> Any:
        out = super().update(*args, **kwargs)
        if self.interruption is not None:
            interruption, self.interruption = self.interruption, None
            interruption()
        return out


def test_a_call_in_the_middle_of_another(model: PreTrainedModel, other_thread: ThreadPoolExecutor) -> None:
    """One waits between its keys and its attention until the other is in the same layer, before its keys."""
    SelfExtend.apply(model, 4, 16)
    wanted = [logits(model, text) for text in TEXTS[:2]]
    is_inside, is_done, main = threading.Event(), threading.Event(), threading.current_thread()

    def wait(*_: Any) -> None:
        if threading.current_thread() is not main:
            is_inside.set()
            assert is_done.wait(30)

    second = []

    def interruption() -> None:
        second.append(other_thread.submit(logits, model, TEXTS[1]))
        assert is_inside.wait(30)

    hook = model.model.layers[0].self_attn.k_proj.register_forward_hook(wait)
    try:
        first = logits(model, TEXTS[0], past_key_values=Interrupted(model, interruption))
    finally:
        is_done.set()
        hook.remove()
    assert torch.equal(first, wanted[0])
    assert torch.equal(second[0].result(), wanted[1])


@pytest.mark.parametrize("is_flash", [False, True])
def test_many_threads(model: PreTrainedModel, is_flash: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Texts of other lengths, some padded, whose tables grow while others read them."""
    flash = FlashAttention(varlen_func, "cpu", (torch.float32,))
    monkeypatch.setattr(extension, "find_flash_attention", lambda implementation: flash)
    SelfExtend.apply(model, 4, 16, is_flash)
    batch = padded([TEXTS[2][0].tolist(), TEXTS[4][0].tolist()])
    calls = [{"ids": text} for text in TEXTS] + [{"ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}]
    wanted = [logits(model, **call) for call in calls]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        SelfExtend.apply(model, 4, 16, is_flash)  # with empty tables
        with ThreadPoolExecutor(8) as pool:
            got = list(pool.map(lambda call: logits(model, **call), calls * 6))
    finally:
        sys.setswitchinterval(interval)
    torch.testing.assert_close(got, wanted * 6, atol=1e-4, rtol=0.0)


def test_two_generations_in_turns(model: PreTrainedModel) -> None:
    SelfExtend.apply(model, 4, 16)
    caches = [DynamicCache(config=model.config) for _ in range(2)]
    got: list[list[torch.Tensor]] = [[], []]
    for tokens in (slice(0, 50), *(slice(n, n + 1) for n in range(50, 60))):
        for number, cache in enumerate(caches):
            got[number].append(logits(model, TEXTS[2 * number][:, tokens], past_key_values=cache))
    for number, parts in enumerate(got):
        wanted = logits(model, TEXTS[2 * number][:, :60])
        torch.testing.assert_close(torch.cat(parts, 1), wanted, atol=1e-4, rtol=0.0)


def test_a_model_is_not_changed_while_it_answers(model: PreTrainedModel, other_thread: ThreadPoolExecutor) -> None:
    before = logits(model, TEXTS[0])
    SelfExtend.apply(model, 4, 16)
    wanted = logits(model, TEXTS[0])

    def interruption() -> None:
        for change in (SelfExtend.remove, lambda model: SelfExtend.apply(model, 5, 18)):
            with pytest.raises(RuntimeError, match="the model is answering in another thread"):
                other_thread.submit(change, model).result()

    got = logits(model, TEXTS[0], past_key_values=Interrupted(model, interruption))
    assert torch.equal(got, wanted)
    with pytest.raises(ValueError, match="has 209 tokens"):
        logits(model, torch.ones(1, 209, dtype=torch.long))
    other_thread.submit(SelfExtend.remove, model).result()  # a call that has raised has ended
    assert torch.equal(logits(model, TEXTS[0]), before)


def test_a_call_within_another(model: PreTrainedModel) -> None:
    """In one thread: of the same model, and of one that reads longer texts; the outer one has weights to give."""
    other = random_model(FAMILIES["llama"], seed=1)
    SelfExtend.apply(model, 4, 16)
    SelfExtend.apply(other)
    wanted, long = logits(model, TEXTS[0]), torch.tensor(random_prompts([300], seed=7))
    for one, text in ((model, TEXTS[2]), (other, long)):
        alone, inner = logits(one, text), []
        cache = Interrupted(model, lambda one=one, text=text, inner=inner: inner.append(logits(one, text)))
        with torch.no_grad():
            out = model(input_ids=TEXTS[0], past_key_values=cache, output_attentions=True)
        assert torch.equal(out.logits, wanted)
        assert len(out.attentions) == model.config.num_hidden_layers
        assert torch.equal(inner[0], alone)


def test_after_a_call_that_raised(model: PreTrainedModel) -> None:
    """In the middle of a layer: whatever it left is no business of the next."""
    SelfExtend.apply(model, 4, 16)
    wanted = logits(model, TEXTS[0])

    def interruption() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        logits(model, TEXTS[1], past_key_values=Interrupted(model, interruption))
    assert torch.equal(logits(model, TEXTS[0]), wanted)
    SelfExtend.remove(model)


def test_a_call_while_apply_looks_at_the_model(model: PreTrainedModel, other_thread: ThreadPoolExecutor) -> None:
    """It gets an error, not the values that `apply` puts in place of attention; `apply` does not see it."""
    calls, main = [], threading.current_thread()

    def call(*_: Any) -> None:
        if not calls and threading.current_thread() is main:
            calls.append(other_thread.submit(logits, model, TEXTS[0]))
            assert calls[0].exception() is not None

    hook = model.model.layers[0].register_forward_hook(call)
    SelfExtend.apply(model, 4, 16)
    hook.remove()
    with pytest.raises(RuntimeError, match=r"is called while SelfExtend.apply looks at how it rotates"):
        calls[0].result()
    other = random_model(FAMILIES["llama"])
    SelfExtend.apply(other, 4, 16)
    assert torch.equal(logits(model, TEXTS[0]), logits(other, TEXTS[0]))


def test_two_threads_apply_at_once(model: PreTrainedModel) -> None:
    """As a server does whose requests find the model not extended yet."""
    before = logits(model, TEXTS[0])
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda _: SelfExtend.apply(model, 4, 16), range(4)))
    SelfExtend.remove(model)
    assert torch.equal(logits(model, TEXTS[0]), before)
