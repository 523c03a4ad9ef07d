"""RULER's tasks on the real model: `python -m benchmarks.real_model_ruler`, or `make ruler`.

A small model fails most of the tasks within its trained length already. It is shown which: all six are put to it there,
unmodified, and the two that it can do to every method at every length.
"""

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from benchmarks.real_model import LENGTHS, dtype, evaluate, fetch
from vllm_selfextend.evaluation.methods import METHODS
from vllm_selfextend.evaluation.plots import plot_ruler
from vllm_selfextend.evaluation.records import write_json
from vllm_selfextend.evaluation.ruler import RULER_TASKS
from vllm_selfextend.evaluation.summary import summarize
from vllm_selfextend.evaluation.tables import ruler_table

TASKS = ("niah_single_1", "ruler_fwe")
"""What SmolLM2-135M-Instruct can do at 4,096 tokens, the second not often."""

NAMES = ("unmodified", "yarn", "self-extend")

RUNS = {
    "others": (("unmodified",), LENGTHS[:1], tuple(name for name in RULER_TASKS if name not in TASKS)),
    # Past its trained length it finds next to nothing: once is enough to see that.
    "unmodified": (("unmodified",), LENGTHS[:3], TASKS),
    "extended": (("yarn", "self-extend"), LENGTHS, TASKS),
}
"""Methods, lengths and tasks, by the folder that keeps their answers."""


def main(
    folder: Annotated[Path, typer.Option(help="Where the checkpoint and the results go.")] = Path("evaluation-results"),
    rounds: Annotated[int, typer.Option(min=1, help="Prompts per task and length.")] = 14,
) -> None:
    """Fetch SmolLM2-135M-Instruct, put RULER's tasks to it by every method, and draw what all were asked."""
    model = folder / "SmolLM2-135M-Instruct"
    if not model.exists():
        fetch(model)
    rows, settings = [], {}
    for name, (methods, lengths, tasks) in RUNS.items():
        options = ["--max-model-len", str(LENGTHS[-1]), "--rounds", str(rounds)]
        options += ["--engine-args", json.dumps({"dtype": dtype()})]
        for option, values in (("--method", methods), ("--length", map(str, lengths)), ("--task", tasks)):
            options += [word for value in values for word in (option, value)]
        output = folder / f"ruler-{name}"
        evaluate(model, output, options)
        results = json.loads((output / "results.json").read_text(encoding="utf-8"))
        rows += results["answers"]
        settings[name] = results["settings"]
    trained_length = settings["extended"]["plan"]["trained_length"]
    document = {"settings": settings, "summary": summarize(rows, NAMES, trained_length), "answers": rows}
    write_json(folder / "ruler.json", document)
    chosen = [METHODS[name] for name in NAMES]
    plot_ruler([row for row in rows if row["task"] in TASKS], chosen, trained_length, folder / "ruler.png")
    Console().print(ruler_table(rows, chosen, trained_length))
    print(f"Wrote ruler.json and ruler.png to {folder}.")


if __name__ == "__main__":
    typer.run(main)
