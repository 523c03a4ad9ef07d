"""What `generate` can do besides: the same answers as one text at a time, token by token, as stock transformers has."""

from typing import Any

import pytest
import torch
from transformers import DynamicCache, PreTrainedModel, StaticCache

import vllm_selfextend.transformers as SelfExtend
from tests.support.batches import greedy, padded
from tests.support.models import random_prompts

from .families import FAMILIES, random_model

NUMBERS: dict[str, tuple[int, ...]] = {"G 4": (4, 16), "auto": ()}
PROMPTS = random_prompts([150, 61, 12], seed=7)
NEW_TOKENS = 8


@pytest.fixture(scope="module", params=NUMBERS)
def numbers(request: pytest.FixtureRequest) -> tuple[int, ...]:
    return NUMBERS[request.param]


@pytest.fixture(scope="module", params=["llama", "gemma2"])
def model(request: pytest.FixtureRequest, numbers: tuple[int, ...]) -> PreTrainedModel:
    model = random_model(FAMILIES[request.param])
    SelfExtend.apply(model, *numbers)
    return model


@pytest.fixture(scope="module")
def answers(model: PreTrainedModel) -> list[list[int]]:
    return greedy(model, PROMPTS, NEW_TOKENS)[0]


@torch.no_grad()
def recomputed(model: PreTrainedModel, prompt: list[int], tokens: int) -> list[int]:
    """Without a cache, without padding."""
    text = list(prompt)
    for _ in range(tokens):
        ids = torch.tensor([text])
        text.append(
            int(model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits[0, -1].argmax())
        )
    return text[len(prompt) :]


def test_without_a_cache(model: PreTrainedModel, answers: list[list[int]]) -> None:
    assert [recomputed(model, prompt, NEW_TOKENS) for prompt in PROMPTS] == answers


@pytest.mark.parametrize(
    "settings",
    [
        {"cache_implementation": "static"},
        {"prefill_chunk_size": 7},
        {"prefill_chunk_size": 64, "cache_implementation": "static"},
        {"use_cache": False},
    ],
    ids=str,
)
def test_settings(model: PreTrainedModel, answers: list[list[int]], settings: dict[str, Any]) -> None:
    assert greedy(model, PROMPTS, NEW_TOKENS, **settings)[0] == answers


@pytest.mark.parametrize("how", ["prompt lookup", "assistant"])
def test_speculation(model: PreTrainedModel, how: str) -> None:
    """Drafts that are refused are cut out of the cache; the assistant is a stock model."""
    assistant = random_model(FAMILIES["llama"], seed=3)
    settings = {"prompt_lookup_num_tokens": 3} if how == "prompt lookup" else {"assistant_model": assistant}
    for prompt in (PROMPTS[0][:70] * 2, PROMPTS[1]):
        inputs = padded([prompt])
        plain = model.generate(**inputs, do_sample=False, max_new_tokens=20)
        torch.testing.assert_close(model.generate(**inputs, do_sample=False, max_new_tokens=20, **settings), plain)


def test_beams(model: PreTrainedModel) -> None:
    """Every beam's score is the sum of its tokens' log-probabilities when the text is read at once."""
    inputs = padded(PROMPTS)
    out = model.generate(
        **inputs, do_sample=False, num_beams=3, num_return_sequences=3, max_new_tokens=5, length_penalty=0.0,
        return_dict_in_generate=True, output_scores=True,
    )  # fmt: skip
    start = inputs["input_ids"].shape[1]
    for row, (sequence, score) in enumerate(zip(out.sequences, out.sequences_scores, strict=True)):
        prompt, answer = PROMPTS[row // 3], sequence[start:]
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([prompt + answer.tolist()]), use_cache=False).logits[0]
        logprobs = logits.log_softmax(-1)[len(prompt) - 1 : -1]
        total = logprobs.gather(1, answer[:, None]).sum()
        torch.testing.assert_close(score, total, atol=1e-3, rtol=0.0)


@pytest.mark.parametrize("kind", [DynamicCache, StaticCache])
def test_a_conversation_that_goes_on(model: PreTrainedModel, kind: type) -> None:
    first, second = random_prompts([80, 45], seed=8)
    settings = {"max_cache_len": 208} if kind is StaticCache else {}
    cache = kind(config=model.config, **settings)
    text = torch.tensor([first])
    for more in (second, []):
        text = model.generate(
            input_ids=text,
            attention_mask=torch.ones_like(text),
            past_key_values=cache,
            do_sample=False,
            max_new_tokens=6,
        )
        answer = text[0, -6:].tolist()
        assert recomputed(model, text[0, :-6].tolist(), 6) == answer
        text = torch.cat([text, torch.tensor([more], dtype=text.dtype)], 1)


def test_several_answers_to_one_text(model: PreTrainedModel) -> None:
    torch.manual_seed(0)
    inputs = padded(PROMPTS[:2])
    out = model.generate(**inputs, do_sample=True, num_return_sequences=2, max_new_tokens=3)
    assert out.shape == (4, inputs["input_ids"].shape[1] + 3)


@torch.no_grad()
def test_a_cache_that_is_cropped(numbers: tuple[int, ...]) -> None:
    model = random_model(FAMILIES["llama"])
    SelfExtend.apply(model, *numbers)
    first, second, third = (torch.tensor([text]) for text in random_prompts([100, 30, 40], seed=10))
    cache = DynamicCache(config=model.config)
    model(input_ids=torch.cat([first, second], 1), past_key_values=cache)
    cache.crop(-len(second[0]))
    got = model(input_ids=third, past_key_values=cache).logits
    wanted = model(input_ids=torch.cat([first, third], 1), use_cache=False).logits[:, 100:]
    torch.testing.assert_close(got, wanted, atol=2e-4, rtol=0.0)


@pytest.mark.parametrize("dynamic", [None, True])
@torch.no_grad()
def test_a_graph_that_reads_prompts(numbers: tuple[int, ...], dynamic: bool | None) -> None:
    """Compiled before anything is read: what is turned by is made on the way, without a graph break."""
    model = random_model(FAMILIES["llama"])
    SelfExtend.apply(model, *numbers)
    torch._dynamo.reset()
    step = torch.compile(model.forward, fullgraph=True, dynamic=dynamic, backend="eager")
    got = []
    for text in (torch.tensor([prompt]) for prompt in PROMPTS[:2]):
        size = text.shape[1] + 10
        mask = (torch.arange(size) < text.shape[1]).long()[None]
        cache = StaticCache(config=model.config, max_cache_len=size)
        positions = torch.arange(text.shape[1])[None]
        got.append(step(input_ids=text, attention_mask=mask, position_ids=positions, past_key_values=cache).logits)
    for logits, prompt in zip(got, PROMPTS, strict=False):
        wanted = model(input_ids=torch.tensor([prompt]), use_cache=False).logits
        torch.testing.assert_close(logits, wanted, atol=1e-4, rtol=1e-4)


def test_one_graph_for_all_decode_steps(numbers: tuple[int, ...]) -> None:
    """`torch.compile` with a static cache: no graph break, nothing compiled again for a later token."""
    model = random_model(FAMILIES["llama"])
    SelfExtend.apply(model, *numbers)
    prompts = random_prompts([100, 40], seed=9)
    wanted, _ = greedy(model, prompts, 6)
    inputs = padded(prompts)
    cache = StaticCache(config=model.config, max_cache_len=128)
    compilations = []

    def count(graph: torch.fx.GraphModule, example_inputs: Any) -> Any:
        compilations.append(graph)
        return graph.forward

    torch._dynamo.reset()
    step = torch.compile(model.forward, fullgraph=True, dynamic=False, backend=count)
    mask, ids = inputs["attention_mask"], inputs["input_ids"]
    got = []
    with torch.no_grad():
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        logits = model(input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache).logits
        seen = torch.zeros(2, 128, dtype=torch.long)
        seen[:, : ids.shape[1]] = mask
        for token in range(6):
            got.append(logits[:, -1].argmax(-1))
            seen[:, ids.shape[1] + token] = 1
            positions = positions[:, -1:] + 1
            logits = step(
                input_ids=got[-1][:, None], attention_mask=seen, position_ids=positions, past_key_values=cache
            ).logits
    assert torch.stack(got, 1).tolist() == wanted
    assert len(compilations) == 1


def test_a_static_cache_that_is_given_twice_starts_anew(model: PreTrainedModel, answers: list[list[int]]) -> None:
    cache = StaticCache(config=model.config, max_cache_len=208)
    for _ in range(2):
        cache.reset()
        text = torch.tensor([PROMPTS[0]])
        out = model.generate(
            input_ids=text,
            attention_mask=torch.ones_like(text),
            past_key_values=cache,
            do_sample=False,
            max_new_tokens=8,
        )
        assert out[0, -8:].tolist() == answers[0]
