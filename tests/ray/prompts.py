"""What the tests ask: rows as in `examples/prompts.jsonl`, each with the key that hides in its text."""

import random
from typing import Any

from tests.support.passkeys import make_prompt

MAX_MODEL_LEN = 4096
"""The examples' default."""


def _row(number: int) -> dict[str, Any]:
    rng = random.Random(number)
    prompt = make_prompt(rng.randrange(200, 3500), rng.random(), rng)
    return {"id": number, "prompt": prompt.text, "key": prompt.answer}


PROMPTS = [_row(number) for number in range(48)]
TOO_LONG = make_prompt(MAX_MODEL_LEN + 100, 0.5, random.Random(0)).text
