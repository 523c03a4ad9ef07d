"""`evaluate`: the same prompts for every method, an engine after another, every answer kept as it comes."""

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .engine import ask, running
from .methods import Checkpoint, engine_settings
from .prompts import Prompt, Row, Task
from .records import Records, write_json
from .summary import summarize


@dataclass(frozen=True)
class Comparison:
    """Which methods are put to which prompts.

    Attributes:
        checkpoint: What is served, and how many tokens its server is sized for.
        methods: Names in `methods.METHODS`.
        prompts: Of every task.
        settings: Self-Extend's, as in `additional_config["self_extend"]`.
        engine_args: Other arguments of vLLM's.

    """

    checkpoint: Checkpoint
    methods: Sequence[str]
    prompts: Sequence[tuple[Task, list[Prompt]]]
    settings: dict[str, Any]
    engine_args: dict[str, Any]

    def check(self) -> None:
        """Refuse before the first engine starts what the last one would be refused for.

        Raises:
            ValueError: The checkpoint does not allow a method.

        """
        for method in self.methods:
            engine_settings(method, self.checkpoint, self.settings)

    def run(self, records: Records, on_answer: Callable[[str, Prompt], None]) -> None:
        """Put the prompts that `records` has no answer to; `on_answer` gets the method and the prompt."""
        for method in self.methods:
            missing = self.missing(method, records)
            if not missing:
                continue

            def keep(task: Task, prompt: Prompt, score: Row, method: str = method) -> None:
                about = {"name": prompt.name, "task": task.name, "method": method, "num_tokens": len(prompt.token_ids)}
                records.add(about | prompt.cell | score)
                on_answer(method, prompt)

            with running(method, self.checkpoint, self.settings, self.engine_args) as llm:
                for task, prompts in missing:
                    # Prompts that are scored themselves go alone: their numbers then do not depend on what is beside.
                    for batch in [[prompt] for prompt in prompts] if task.scores_prompt else [prompts]:
                        ask(llm, task, batch, functools.partial(keep, task))

    def missing(self, method: str, records: Records) -> list[tuple[Task, list[Prompt]]]:
        """The prompts of every task that a method has not answered yet."""
        answered = {name for asked, name in records.rows if asked == method}
        by_task = [
            (task, [prompt for prompt in prompts if prompt.name not in answered]) for task, prompts in self.prompts
        ]
        return [(task, prompts) for task, prompts in by_task if prompts]

    def rows(self, records: Records) -> list[Row]:
        """All answers, in the order of methods and prompts."""
        names = [prompt.name for _, prompts in self.prompts for prompt in prompts]
        return [records.rows[method, name] for method in self.methods for name in names]

    def write(self, records: Records) -> list[Path]:
        """Write `results.json` and the pictures to the records' folder, and say which."""
        rows, length = self.rows(records), self.checkpoint.report.trained_length
        document = {"settings": records.settings, "summary": summarize(rows, self.methods, length), "answers": rows}
        write_json(records.folder / "results.json", document)
        return [records.folder / "results.json", *_draw(rows, self.methods, length, records.folder)]


def _draw(rows: Sequence[Row], methods: Sequence[str], trained_length: int, folder: Path) -> Iterator[Path]:
    from .plots import plot_losses, plot_passkeys

    for task, name, plot in (("passkey", "passkeys.png", plot_passkeys), ("loss", "loss.png", plot_losses)):
        if any(row["task"] == task for row in rows):
            plot(rows, methods, trained_length, folder / name)
            yield folder / name
