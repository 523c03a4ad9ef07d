"""Passkey prompts for the demo's model."""

import functools
import random
from typing import Any, NamedTuple

from transformers import AutoTokenizer

from vllm_selfextend.demo import MODEL_DIR
from vllm_selfextend.evaluation.passkey import COMPLETED, make_text

SENTENCE = 6
"""Tokens: a text is shorter than asked for by less."""


class Passkey(NamedTuple):
    """A text, and the five tokens that should follow."""

    text: str
    answer: str


def make_prompt(num_tokens: int, depth: float, rng: random.Random) -> Passkey:
    """A prompt of at most `num_tokens` tokens."""
    text, begins, key = make_text(num_tokens, 1, depth, COMPLETED, rng, encode)
    return Passkey(f"{text} {begins}", " ".join(key))


def encode(text: str, answer_begins: str) -> list[int]:
    """Both as one text to go on with."""
    tokens: list[int] = _tokenizer()(f"{text} {answer_begins}")["input_ids"]
    return tokens


@functools.cache
def _tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(MODEL_DIR)
