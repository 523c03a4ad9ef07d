"""The passkey task: find a number that was said once, somewhere in a long text (Mohtashami and Jaggi, 2023).

The text is one block of sentences over and over, as in Self-Extend's paper.
"""

import bisect
import itertools
import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .prompts import Encode, Prompt, Row

if TYPE_CHECKING:
    from vllm import RequestOutput

CITIES = ("Oslo", "Paris", "Cairo", "Lima", "Tokyo", "Delhi")
KEY_DIGITS = 5
MAX_KEYS = len(CITIES)


@dataclass(frozen=True)
class Wording:
    """How the task is put into words; `{city}` and `{key}` are filled in, `filler` is said over and over.

    The answer's beginning is given, so that what is seen is whether a model finds the key, not how it likes to answer.
    """

    question: str
    opening: str = ""
    before_question: str = " "
    statement: str = "The pass key: {city} {key}. Remember it."
    answer_begins: str = "The pass key: {city}"
    filler: tuple[str, ...] = (
        "The grass is green.",
        "The sky is blue.",
        "The sun is warm today.",
        "Here we go.",
        "There and back again.",
    )


COMPLETED = Wording("What was this number?")
"""For models that go on with a text. The demo's model knows every word of it."""

ASKED = Wording(
    "What is the pass key?",
    "There is important information hidden inside a lot of irrelevant text. Find it and memorize it. "
    "I will quiz you about it.\n\n",
    "\n\n",
)
"""For models that answer a message."""


@dataclass(frozen=True)
class PasskeyTask:
    """Keys at every depth of texts of every length.

    Attributes:
        lengths: Tokens of prompt and answer together; a prompt is as long as whole sentences allow. One that is given
            twice is asked once: an answer counted twice looks like two.
        depths: Where the key that is asked for stands, from 0 (the beginning) to 1 (just before the question).
        key_counts: How many keys the texts hold, one of which is asked for.
        rounds: Prompts per length, depth and number of keys.
        wording: `COMPLETED`, or `ASKED` inside a chat template.
        seed: Of every random choice.

    """

    lengths: tuple[int, ...]
    depths: tuple[float, ...]
    key_counts: tuple[int, ...] = (1,)
    rounds: int = 1
    wording: Wording = COMPLETED
    seed: int = 0

    name = "passkey"
    answer_tokens = 20
    scores_prompt = False

    def prompts(self, encode: Encode) -> Iterator[Prompt]:
        """Deepest keys first: up to its first key a text is like the one before, and in vLLM's prefix cache."""
        for length, num_keys in itertools.product(sorted({*self.lengths}), sorted({*self.key_counts})):
            for turn, depth in itertools.product(range(self.rounds), sorted({*self.depths}, reverse=True)):
                cell = {"length": length, "num_keys": num_keys, "depth": depth, "round": turn}
                name = "/".join(map(str, (self.name, *cell.values())))
                rng = random.Random(f"{self.seed}/{name}")
                text, begins, key = make_text(length - self.answer_tokens, num_keys, depth, self.wording, rng, encode)
                yield Prompt(name, cell, f"{text} {begins}", encode(text, begins), key)

    def score(self, prompt: Prompt, output: "RequestOutput") -> Row:
        """Found if the first number in the answer begins with the key: a small model may repeat the last digit."""
        answer = output.outputs[0].text
        return {"expected": prompt.expected, "answer": answer, "found": first_digits(answer) == prompt.expected}


def passkey_task(
    lengths: Sequence[int], depths: int, keys: int, rounds: int, seed: int, *, uses_chat: bool
) -> PasskeyTask:
    """The task at `depths` depths, those in the middle of as many equal parts of a text."""
    places = tuple((place + 0.5) / depths for place in range(depths))
    return PasskeyTask(tuple(lengths), places, (keys,), rounds, ASKED if uses_chat else COMPLETED, seed)


def doubling_lengths(first: int, last: int) -> list[int]:
    """From `last` halved down to `first` tokens or a little more, and not below 64; the shortest first."""
    lengths = [last]
    while lengths[-1] // 2 >= max(first, 64):
        lengths.append(lengths[-1] // 2)
    return lengths[::-1]


def make_text(
    num_tokens: int, num_keys: int, depth: float, wording: Wording, rng: random.Random, encode: Encode
) -> tuple[str, str, str]:
    """A text that hides `num_keys` keys and asks for one of them, the beginning of the answer, and that key.

    Args:
        num_tokens: The most that `encode` may make of text and beginning.
        num_keys: How many cities' keys the text holds, at least 1.
        depth: Where the key that is asked for stands, 0 to 1. The others stand at random places.
        wording: How it is put.
        rng: The source of every random choice.
        encode: What makes tokens of it.

    Raises:
        ValueError: An argument is out of its range, or keys and question do not fit into `num_tokens`.

    """
    if not 1 <= num_keys <= MAX_KEYS:
        raise ValueError(f"num_keys is {num_keys}; it must be from 1 to {MAX_KEYS}, the number of cities.")
    if not 0.0 <= depth <= 1.0:
        raise ValueError(f"depth is {depth}; it must be from 0 (beginning) to 1 (end).")
    cities = rng.sample(CITIES, num_keys)
    keys = ["".join(rng.choices("0123456789", k=KEY_DIGITS)) for _ in cities]
    places = [depth, *(rng.random() for _ in cities[1:])]
    begins = wording.answer_begins.format(city=cities[0])
    statements = [wording.statement.format(city=city, key=key) for city, key in zip(cities, keys, strict=True)]

    def text(num_sentences: int) -> str:
        sentences = list(itertools.islice(itertools.cycle(wording.filler), num_sentences))
        # The key asked for goes in last, so that depth 0 is the very beginning and depth 1 the very end.
        for place, statement in reversed(list(zip(places, statements, strict=True))):
            sentences.insert(round(place * len(sentences)), statement)
        return wording.opening + " ".join(sentences) + wording.before_question + wording.question

    def count(num_sentences: int) -> int:
        return len(encode(text(num_sentences), begins))

    if (least := count(0)) > num_tokens:
        raise ValueError(f"A passkey prompt of {num_tokens} tokens is too short: {num_keys} key(s) take {least}.")
    too_many = bisect.bisect_right(range(num_tokens), num_tokens, key=count)
    return text(too_many - 1), begins, keys[0]


def first_digits(answer: str) -> str:
    """The digits of the first number in a text, as many as a key has; spaces and commas may be between them."""
    found = re.search(r"\d(?:[ ,]*\d)*", answer)
    return re.sub(r"\D", "", found.group())[:KEY_DIGITS] if found else ""
