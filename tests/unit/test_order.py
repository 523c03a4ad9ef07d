"""The order task: where its statements stand, and what an answer is worth."""

import itertools
from types import SimpleNamespace

import pytest

from vllm_selfextend.evaluation.order import ANSWER_BEGINS, CITIES, PAIRS, QUESTION, OrderTask, order_task

LENGTH = 600
TASK = OrderTask((LENGTH,), distances=(60, 200), gaps=(0, 40), rounds=3)
WORDS: dict[str, int] = {}


def encode(text: str, answer_begins: str) -> list[int]:
    """A token a word, in a chat's frame of ten."""
    return [WORDS.setdefault(word, len(WORDS)) for word in ["frame"] * 10 + f"{text} {answer_begins}".split()]


def test_statements_stand_where_they_are_asked_to() -> None:
    prompts = list(TASK.prompts(encode))
    assert len(prompts) == 2 * 2 * 3 * 2
    assert len({prompt.name for prompt in prompts}) == len(prompts)
    tail = len(f"{QUESTION.format('Oslo', 'Rome')} {ANSWER_BEGINS}".split())
    for prompt in prompts:
        words = prompt.text.split()
        first, second = (place for place, word in enumerate(words[:-tail]) if word in CITIES)
        assert words[first] == prompt.expected == prompt.cell["first"]
        # Whole sentences: at most as far as asked for, and no sentence nearer.
        distance = len(words) - second - len(["is", "mentioned."]) - 1
        assert prompt.cell["distance"] - 6 < distance <= prompt.cell["distance"]
        between = second - first - 6
        assert prompt.cell["gap"] - 6 < between <= prompt.cell["gap"]
        assert LENGTH - 6 < len(prompt.token_ids) + TASK.answer_tokens <= LENGTH
        assert distance > tail
        assert [WORDS[words[place]] for place in (first, second)] == list(prompt.choices)


def test_each_pair_is_asked_in_both_orders() -> None:
    prompts = list(TASK.prompts(encode))
    for one, other in zip(prompts[::2], prompts[1::2], strict=True):
        assert one.choices == other.choices[::-1]
        assert one.text.rpartition("\n")[2] == other.text.rpartition("\n")[2], "one question"
        assert {**one.cell, "first": None} == {**other.cell, "first": None}


def test_no_pair_is_asked_twice_in_a_place() -> None:
    for seed in range(5):
        task = OrderTask((LENGTH,), distances=(60,), gaps=(0,), rounds=len(PAIRS), seed=seed)
        asked = [prompt.choices for prompt in task.prompts(encode)]
        assert len({*asked}) == len(asked) == 2 * len(PAIRS)


def test_texts_are_alike_up_to_the_statements() -> None:
    """So that vLLM's prefix cache has all but the end."""
    prompts = list(TASK.prompts(encode))
    for one, other in itertools.pairwise(prompts):
        shared = next(
            at for at, pair in enumerate(zip(one.token_ids, other.token_ids, strict=False)) if len({*pair}) > 1
        )
        assert shared >= LENGTH - one.cell["distance"] - one.cell["gap"] - 20


def test_the_likelier_city_is_the_answer() -> None:
    prompt = next(TASK.prompts(encode))
    first, second = prompt.choices
    for logprobs, row in (
        ((-1.0, -2.5), {"margin": 1.5, "score": 1.0}),
        ((-2.5, -2.5), {"margin": 0.0, "score": 0.5}),
        ((-3.0, -2.5), {"margin": -0.5, "score": 0.0}),
    ):
        both = {token: SimpleNamespace(logprob=value) for token, value in zip((first, second), logprobs, strict=True)}
        output = SimpleNamespace(outputs=[SimpleNamespace(logprobs=[both | {99: SimpleNamespace(logprob=0.0)}])])
        assert TASK.score(prompt, output) == {"expected": prompt.expected} | row


def test_places_follow_from_the_window() -> None:
    task = order_task([LENGTH], neighbor_window=100, rounds=1, seed=0)
    assert task.distances == (50, 200, 400)
    cells = {(prompt.cell["distance"], prompt.cell["gap"]) for prompt in task.prompts(encode)}
    assert cells == {(50, 0), (50, 64), (50, 512), (200, 0), (200, 64), (400, 0), (400, 64)}, "those that fit"


def test_what_it_cannot_ask() -> None:
    with pytest.raises(ValueError, match="--rounds 67 is more than the order task's 66 pairs"):
        list(OrderTask((LENGTH,), (60,), rounds=67).prompts(encode))
    with pytest.raises(ValueError, match="--length 80 is too short for the order task, whose statements are 60 tokens"):
        list(OrderTask((80,), (60,)).prompts(encode))
    with pytest.raises(ValueError, match="The order task is not for this tokenizer"):
        list(TASK.prompts(lambda text, begins: [0] * len(encode(text, begins))))
