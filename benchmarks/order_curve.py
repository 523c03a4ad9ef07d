"""What grouped positions do to the order of distant facts: `python -m benchmarks.order_curve`.

A toy learns to say which of two cities was mentioned first, and nothing else. It is asked with one group size after
another in texts that it was trained for, where nothing but the grouping is in the way; then in longer and longer texts,
as Self-Extend would have it.
"""

import json
import random
from pathlib import Path
from typing import Annotated

import typer

from benchmarks.real_model import evaluate
from benchmarks.toy_training import TRAINED_LENGTH, Example, example_of, filler_sentences, train, words
from vllm_selfextend.evaluation.order import ANSWER_BEGINS, CITIES, PAIRS, QUESTION, STATEMENT
from vllm_selfextend.evaluation.records import write_json

MOST_CITIES = 4
MOST_QUESTIONS = 3
TEXTS = (STATEMENT.format(city=""), QUESTION.format("", ""), ANSWER_BEGINS, *CITIES)

GROUP_SIZES = (4, 16, 64)
WINDOW = 32
LONGEST = 4096


def make_example(length: int, rng: random.Random) -> Example:
    """A text of `length` tokens: some cities, all over it or near each other, and which of two was mentioned first."""
    cities = rng.sample(CITIES, rng.randint(2, MOST_CITIES))
    pairs = [pair for pair in PAIRS if {*pair} <= {*cities}]
    asked = rng.sample(pairs, min(len(pairs), MOST_QUESTIONS))
    questions = [words(f"{QUESTION.format(*pair)} {ANSWER_BEGINS}") for pair in asked]
    answers = [words(f"{min(pair, key=cities.index)}.") for pair in asked]
    statements = [words(STATEMENT.format(city=city)) for city in cities]
    text = filler_sentences(length - 2 - sum(map(len, [*questions, *answers, *statements])), rng)
    reach = rng.choice([0, 2, 8, len(text)])
    begin = rng.randint(0, max(0, len(text) - reach))
    places = sorted(rng.randint(begin, min(len(text), begin + reach)) for _ in statements)
    for place, statement in reversed([*zip(places, statements, strict=True)]):
        text.insert(place, statement)
    return example_of(text, questions, answers)


def main(
    folder: Annotated[Path, typer.Option(help="Where the model and the results go.")] = Path("evaluation-results"),
    rounds: Annotated[int, typer.Option(min=1, help="Pairs of cities per place.")] = 24,
    steps: Annotated[int, typer.Option(min=1, help="To train.")] = 2000,
    seed: int = 0,
) -> None:
    """Train the toy, and ask it."""
    model = folder / "order-model"
    if not model.exists():
        new = model.with_name(model.name + ".new")  # a name that is there means a checkpoint that is whole
        train(new, make_example, TEXTS, steps=steps, batch_size=24, learning_rate=2e-3, seed=seed)
        new.rename(model)
    shared = ["--task", "order", "--method", "self-extend", "--rounds", str(rounds)]
    shared += ["--engine-args", json.dumps({"dtype": "float32"})]
    reach = (TRAINED_LENGTH - WINDOW) * min(GROUP_SIZES) + WINDOW
    grouped = ["--max-model-len", str(reach), "--length", str(TRAINED_LENGTH), "--neighbor-window", str(WINDOW)]
    for group_size in GROUP_SIZES:
        settings = {"group_size": group_size, "neighbor_window": WINDOW, "exact_short": False}
        grouped += ["--self-extend", json.dumps(settings)]
    longer = ["--max-model-len", str(LONGEST)]
    results = {}
    for name, options in (("grouped", grouped), ("longer", longer)):
        output = folder / f"order-{name}"
        evaluate(model, output, [*options, *shared])
        kept = json.loads((output / "results.json").read_text(encoding="utf-8"))
        results[name] = {"settings": kept["settings"], "summary": kept["summary"]["order"]}
    write_json(folder / "order.json", results)
    print(f"Wrote order.json to {folder}; pictures and answers are in order-grouped and order-longer.")


if __name__ == "__main__":
    typer.run(main)
