"""Train the small passkey model that ships with the package: `python -m benchmarks.train_demo_model`.

About 10 minutes on two cores. The result is an ordinary `transformers` checkpoint.
"""

import random
from pathlib import Path
from typing import Annotated

import typer

from benchmarks.toy_training import Example, example_of, filler_sentences, train, words
from vllm_selfextend.demo import MODEL_DIR
from vllm_selfextend.evaluation.passkey import CITIES, COMPLETED, KEY_DIGITS

MAX_KEYS = 4
TOKENS_A_KEY = 30  # the sentence that says it, the question and the answer
DIGITS = tuple("0123456789")
TEXTS = (*CITIES, *DIGITS, COMPLETED.statement.format(city="", key=""), COMPLETED.question)


def make_example(length: int, rng: random.Random) -> Example:
    """A text of `length` tokens.

    As many questions as keys, one after another: to be right the model has to tell the cities apart, which it learns
    several times faster than from one question a text. A city may be asked for twice, so that leaving out those that
    were asked already is no help.
    """
    fitting = min(MAX_KEYS, (length - 2) // TOKENS_A_KEY)
    num_keys = rng.choice([rng.randint(1, fitting), fitting, fitting])
    cities = rng.sample(CITIES, num_keys)
    keys = {city: "".join(rng.choices(DIGITS, k=KEY_DIGITS)) for city in cities}
    asked = rng.choices(cities, k=len(cities))
    questions = [words(f"{COMPLETED.question} {COMPLETED.answer_begins.format(city=city)}") for city in asked]
    answers = [words(f"{keys[city]}.") for city in asked]
    statements = [words(COMPLETED.statement.format(city=city, key=key)) for city, key in keys.items()]
    text = filler_sentences(length - 2 - sum(map(len, [*questions, *answers, *statements])), rng)
    for statement in statements:
        text.insert(rng.randint(0, len(text)), statement)
    return example_of(text, questions, answers)


def main(
    output: Annotated[Path, typer.Option(help="Where the checkpoint goes.")] = MODEL_DIR,
    steps: Annotated[int, typer.Option(min=1)] = 2000,
    batch_size: Annotated[int, typer.Option(min=1)] = 24,
    learning_rate: float = 2e-3,
    seed: int = 0,
) -> None:
    """Train the demo model and save it with its tokenizer."""
    train(output, make_example, TEXTS, steps=steps, batch_size=batch_size, learning_rate=learning_rate, seed=seed)


if __name__ == "__main__":
    typer.run(main)
