"""The order task: which of two things came first, said a long way back, near each other or apart.

Grouped positions blur what lies close together and far away: where two facts share one, it does not tell their order,
only what was noticed when they were read does. No passkey asks for that.
"""

import bisect
import itertools
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .passkey import COMPLETED
from .prompts import Encode, Prompt, Row

if TYPE_CHECKING:
    from vllm import RequestOutput

CITIES = ("Oslo", "Paris", "Cairo", "Lima", "Tokyo", "Delhi", "Rome", "Madrid", "Berlin", "Athens", "Dublin", "Vienna")
STATEMENT = "The city of {city} is mentioned."
QUESTION = "Which city is mentioned first, {} or {}?"
ANSWER_BEGINS = "The city mentioned first is"
PAIRS = tuple(itertools.combinations(CITIES, 2))
GAPS = (0, 64, 512)
"""Tokens between the two statements, each of about seven; the city names are a statement further apart."""

WINDOWS = (0.5, 2, 4)
"""How far before the end of the prompt the second statement ends, in neighbor windows."""


@dataclass(frozen=True)
class OrderTask:
    """Two cities in texts of every length, at every distance and gap; each pair in both orders.

    The question names the two alike for both orders, so that the habit of preferring a city is right half the time, as
    a guess is. No pair is asked twice in a place.

    Attributes:
        lengths: Tokens of prompt and answer together; a prompt is as long as whole sentences allow.
        distances: Tokens from the end of the second statement to the end of the prompt, at most.
        gaps: Tokens between the statements, at most.
        rounds: Pairs of cities per length, distance and gap, at most `len(PAIRS)`.
        seed: Of every random choice.

    """

    lengths: tuple[int, ...]
    distances: tuple[int, ...]
    gaps: tuple[int, ...] = GAPS
    rounds: int = 1
    seed: int = 0

    name = "order"
    answer_tokens = 1
    scores_prompt = False

    def prompts(self, encode: Encode) -> Iterator[Prompt]:
        """The furthest statements first: up to them texts are alike, and in vLLM's prefix cache.

        Raises:
            ValueError: No distance fits into a length, there are fewer pairs than rounds, or the tokenizer begins two
                cities' names alike.

        """
        if self.rounds > len(PAIRS):
            raise ValueError(f"--rounds {self.rounds} is more than the order task's {len(PAIRS)} pairs of cities.")
        begins = _first_tokens(encode)
        pairs = random.Random(self.seed).sample(PAIRS, self.rounds)
        for length in sorted({*self.lengths}):
            fitting = 0
            for distance, gap in itertools.product(
                *(sorted({*each}, reverse=True) for each in (self.distances, self.gaps))
            ):
                fillers = _fillers(length - self.answer_tokens, distance, gap, encode)
                if fillers is None:
                    continue
                fitting += 1
                for turn, pair in enumerate(pairs):
                    for order in (pair, pair[::-1]):
                        first, second = order
                        cell = {"length": length, "distance": distance, "gap": gap, "round": turn, "first": first}
                        name = "/".join(map(str, (self.name, *cell.values())))
                        text = _text(fillers, order, pair)
                        choices = begins[first], begins[second]
                        shown = f"{text} {ANSWER_BEGINS}"
                        yield Prompt(name, cell, shown, encode(text, ANSWER_BEGINS), first, choices)
            if not fitting:
                raise ValueError(
                    f"--length {length} is too short for the order task, whose statements are {min(self.distances)} "
                    "tokens and more before the end. Ask for a longer one."
                )

    def score(self, prompt: Prompt, output: "RequestOutput") -> Row:
        """Right if the first city is likelier than the second, half right if they tie; `margin` is the nats."""
        (logprobs,) = output.outputs[0].logprobs or [{}]
        first, second = (logprobs[token].logprob for token in prompt.choices)
        return {
            "expected": prompt.expected,
            "margin": round(first - second, 4),
            "score": (1 + (first > second) - (first < second)) / 2,
        }


def order_task(lengths: Sequence[int], neighbor_window: int, rounds: int, seed: int) -> OrderTask:
    """The task at distances of half a neighbor window and of several."""
    distances = tuple(max(1, round(windows * neighbor_window)) for windows in WINDOWS)
    return OrderTask(tuple(lengths), distances, rounds=rounds, seed=seed)


def _fillers(num_tokens: int, distance: int, gap: int, encode: Encode) -> tuple[int, int, int] | None:
    """How many sentences of filler stand before, between and after the statements; None where these do not fit.

    Args:
        num_tokens: The most that `encode` may make of text and answer's beginning, whatever the cities.
        distance: The most tokens from the end of the second statement to the end of the prompt.
        gap: The most tokens between the statements.
        encode: What makes tokens of it.

    """
    longest = max(CITIES, key=lambda city: len(encode(STATEMENT.format(city=city), "")))
    pair = longest, longest

    def count(before: int, between: int, after: int) -> int:
        return len(encode(_text((before, between, after), pair, pair), ANSWER_BEGINS))

    least = count(0, 0, 0)
    if least + distance + gap > num_tokens:
        return None
    # What two prompts that differ in the second statement only have alike at their end lies behind it.
    one, other = (encode(_text((0, 0, 0), (longest, city), pair), ANSWER_BEGINS)[::-1] for city in CITIES[:2])
    end = next(place for place, pair in enumerate(zip(one, other, strict=False)) if pair[0] != pair[1])
    end -= len(encode(STATEMENT.partition("{city}")[2], "")) - len(encode("", ""))
    after = _most(lambda sentences: count(0, 0, sentences) - least, distance - end)
    between = _most(lambda sentences: count(0, sentences, 0) - least, gap)
    return _most(lambda sentences: count(sentences, between, after), num_tokens), between, after


def _text(fillers: tuple[int, int, int], order: tuple[str, str], pair: tuple[str, str]) -> str:
    """Both cities in an order, and the question that names the pair."""
    before, between, after = map(_filler, fillers)
    first, second = (STATEMENT.format(city=city) for city in order)
    return " ".join([*before, first, *between, second, *after]) + f"\n\n{QUESTION.format(*pair)}"


def _filler(count: int) -> Iterator[str]:
    return itertools.islice(itertools.cycle(COMPLETED.filler), count)


def _most(tokens: Callable[[int], int], limit: int) -> int:
    """The most sentences whose tokens are within a limit; 0 where one is already past it."""
    return max(0, bisect.bisect_right(range(limit + 1), limit, key=tokens) - 1)


def _first_tokens(encode: Encode) -> dict[str, int]:
    """The token that each city's name begins with behind the answer's beginning."""
    question = QUESTION.format(*PAIRS[0])
    shared = len(encode(question, ANSWER_BEGINS))
    tokens = {city: encode(question, f"{ANSWER_BEGINS} {city}")[shared] for city in CITIES}
    if len({*tokens.values()}) < len(CITIES):
        raise ValueError(
            "The order task is not for this tokenizer: names of its cities begin with the same token. Leave --task "
            "order out."
        )
    return tokens
