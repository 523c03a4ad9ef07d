"""`evaluate`: the same prompts for every method, an engine after another, every answer kept as it comes."""

import dataclasses
import functools
import hashlib
import json
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .engine import ask, prompt_encoder, running
from .loss import loss_task
from .machine import describe_machine
from .methods import (
    METHODS,
    Checkpoint,
    Method,
    allowed_methods,
    engine_arguments,
    read_checkpoint,
    self_extend_variants,
)
from .order import order_task
from .passkey import doubling_lengths, passkey_task
from .prompts import Prompt, Row, Task
from .records import Records, write_json
from .ruler import LEAST, RULER_TASKS, ruler_tasks
from .run_folder import RunFolder
from .screen import bars, reading_work
from .summary import summarize

DEFAULT_METHODS = ("unmodified", "yarn", "self-extend")


@dataclass(frozen=True)
class Comparison:
    """Which methods are put to which prompts.

    Attributes:
        checkpoint: What is served, and how many tokens its server is sized for.
        methods: No two with one name.
        prompts: Of every task.
        engine_args: Other arguments of vLLM's.
        asked: What tells this run from others, as its folder keeps it beside the machine.
        left_out: Why methods that would be compared by default are not.

    """

    checkpoint: Checkpoint
    methods: Sequence[Method]
    prompts: Sequence[tuple[Task, list[Prompt]]]
    engine_args: dict[str, Any]
    asked: dict[str, Any]
    left_out: Sequence[str] = ()

    def run(self, folder: RunFolder) -> tuple[list[Row], list[Path]]:
        """Put the prompts that the folder has no answer to, with bars, and write the results there.

        Returns:
            All answers in the order of methods and prompts, and the files that were written.

        Raises:
            ValueError: The checkpoint does not allow a method, or the folder holds the answers of another run.

        """
        for method in self.methods:  # refuse before the first engine starts what the last one would be refused for
            engine_arguments(method, self.checkpoint)
        records = folder.records = Records(folder.path, self.asked | {"machine": describe_machine()})
        missing = [(method, self._missing(method, records)) for method in self.methods]
        work = {
            method.label: sum(self._work(prompt) for _, prompts in by_task for prompt in prompts)
            for method, by_task in missing
        }
        with bars(folder.stderr, work) as advance:
            for method, by_task in missing:
                if by_task:
                    self._ask(method, by_task, records, advance)
        names = [prompt.name for _, prompts in self.prompts for prompt in prompts]
        rows = [records.rows[method.name, name] for method in self.methods for name in names]
        return rows, self._write(rows, records)

    def _missing(self, method: Method, records: Records) -> list[tuple[Task, list[Prompt]]]:
        """The prompts of every task that a method has not answered yet."""
        answered = {name for asked, name in records.rows if asked == method.name}
        by_task = [
            (task, [prompt for prompt in prompts if prompt.name not in answered]) for task, prompts in self.prompts
        ]
        return [(task, prompts) for task, prompts in by_task if prompts]

    def _work(self, prompt: Prompt) -> int:
        return reading_work(len(prompt.token_ids), self.checkpoint.hidden_size)

    def _ask(
        self,
        method: Method,
        by_task: Sequence[tuple[Task, list[Prompt]]],
        records: Records,
        advance: Callable[[str, int], None],
    ) -> None:
        def keep(task: Task, prompt: Prompt, score: Row) -> None:
            about = {"name": prompt.name, "task": task.name, "method": method.name, "num_tokens": len(prompt.token_ids)}
            records.add(about | prompt.cell | score)
            advance(method.label, self._work(prompt))

        with running(method, self.checkpoint, self.engine_args) as llm:
            for task, prompts in by_task:
                # Prompts that are scored themselves go alone: their numbers then do not depend on what is beside.
                for batch in [[prompt] for prompt in prompts] if task.scores_prompt else [prompts]:
                    ask(llm, task, batch, functools.partial(keep, task))

    def _write(self, rows: Sequence[Row], records: Records) -> list[Path]:
        """Write `results.json` and the pictures to the records' folder, and say which."""
        length = self.checkpoint.report.trained_length
        summary = summarize(rows, [method.name for method in self.methods], length)
        document = {"settings": records.settings, "summary": summary, "answers": rows}
        write_json(records.folder / "results.json", document)
        return [records.folder / "results.json", *_draw(rows, self.methods, length, records.folder)]


def comparison_from_options(
    model: str,
    max_model_len: int,
    settings: dict[str, Any],
    engine_args: dict[str, Any],
    *,
    served_length: int | None,
    methods: Sequence[str],
    variants: Sequence[dict[str, Any]],
    tasks: Collection[str],
    lengths: Sequence[int],
    depths: int,
    keys: int,
    rounds: int,
    seed: int,
    loss_length: int | None,
    texts: Sequence[Path],
    chat: bool | None,
) -> Comparison:
    """What `evaluate` does, from its options (see there).

    Without `methods` it is those of `DEFAULT_METHODS` that the checkpoint allows, without `lengths` the longest texts
    and their halves down to half the trained length, of RULER those that it has prompts for.

    Raises:
        ValueError: The options do not go together, or with the checkpoint; or a file cannot be read.
        OSError: There is no such model.

    """
    served = max(max_model_len, served_length or 0)
    checkpoint = read_checkpoint(model, served, settings, engine_args)
    encode_chat, encode, uses_chat = prompt_encoder(model, engine_args, chat=chat)
    doubling = doubling_lengths(checkpoint.report.trained_length // 2, max_model_len)
    ruler_lengths = lengths or [length for length in doubling if length >= LEAST] or doubling
    lengths = lengths or doubling
    if (longest := max(lengths)) > max_model_len:
        raise ValueError(f"--length {longest} is more than --max-model-len {max_model_len}.")
    chosen: list[Task] = []
    if "passkey" in tasks:
        chosen.append(passkey_task(lengths, depths, keys, rounds, seed, uses_chat=uses_chat))
    if "loss" in tasks:
        chosen.append(loss_task(texts, loss_length, max_model_len))
    if "order" in tasks:
        chosen.append(order_task(lengths, checkpoint.report.neighbor_window, rounds, seed))
    chosen += ruler_tasks(tasks, ruler_lengths, rounds, seed)
    prompts = [(task, list(task.prompts(encode if task.scores_prompt else encode_chat))) for task in chosen]
    known = METHODS | {"self-extend": dataclasses.replace(METHODS["self-extend"], settings=settings)}
    chosen_methods = [known[name] for name in dict.fromkeys(methods)]
    left_out: list[str] = []
    if not methods:
        chosen_methods, left_out = allowed_methods([known[name] for name in DEFAULT_METHODS], checkpoint)
    chosen_methods += self_extend_variants(variants, settings)
    asked = {
        "model": model,
        "methods": [method.name for method in chosen_methods],
        "served_length": served,
        "self_extend": settings,
        "plan": dataclasses.asdict(checkpoint.report),
        "engine_args": engine_args,
        "chat": uses_chat,
        "prompts": {task.name: _digest(put) for task, put in prompts},
    }
    return Comparison(checkpoint, chosen_methods, prompts, engine_args, asked, left_out)


def _digest(prompts: Sequence[Prompt]) -> dict[str, Any]:
    """How many prompts, and what tells them from others."""
    tokens = json.dumps([[prompt.name, prompt.token_ids] for prompt in prompts])
    return {"count": len(prompts), "sha256": hashlib.sha256(tokens.encode()).hexdigest()}


def _draw(rows: Sequence[Row], methods: Sequence[Method], trained_length: int, folder: Path) -> Iterator[Path]:
    from .plots import plot_losses, plot_order, plot_passkeys, plot_ruler

    pictures = (
        (("passkey",), "passkeys.png", plot_passkeys),
        (("loss",), "loss.png", plot_losses),
        (("order",), "order.png", plot_order),
        (tuple(RULER_TASKS), "ruler.png", plot_ruler),
    )
    for tasks, name, plot in pictures:
        if any(row["task"] in tasks for row in rows):
            plot(rows, methods, trained_length, folder / name)
            yield folder / name
