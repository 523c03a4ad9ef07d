"""What a run has found so far, in a folder, so that a run that was broken off goes on where it was."""

import json
import os
from pathlib import Path
from typing import Any

from .prompts import Row


class Records:
    """The answers of a run, kept as they come.

    `settings.json` is what the run was asked for, `answers.jsonl` has a line per answer.

    Raises:
        ValueError: The folder holds the answers of another run.

    """

    def __init__(self, folder: Path, settings: dict[str, Any]) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.settings: dict[str, Any] = json.loads(json.dumps(settings))
        kept = folder / "settings.json"
        if kept.exists():
            self._check(json.loads(kept.read_text(encoding="utf-8")))
        else:
            write_json(kept, self.settings)
        self._answers = folder / "answers.jsonl"
        self.rows: dict[tuple[str, str], Row] = {}
        if self._answers.exists():
            self._read()

    def add(self, row: Row) -> None:
        """Keep an answer; it is on the disk when this returns."""
        self.rows[row["method"], row["name"]] = row
        with self._answers.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def _check(self, kept: dict[str, Any]) -> None:
        for key in {**kept, **self.settings}:
            if kept.get(key) != self.settings.get(key):
                raise ValueError(
                    f"{self.folder} holds the answers of another run: there {key} was {kept.get(key)!r}, and now it is "
                    f"{self.settings.get(key)!r}. Take another folder, or ask for the same."
                )

    def _read(self) -> None:
        text = self._answers.read_text(encoding="utf-8")
        whole, _, broken = text.rpartition("\n")
        if broken:  # the run ended in the middle of writing it
            self._answers.write_text(whole + "\n" if whole else "", encoding="utf-8")
        for line in whole.splitlines():
            row = json.loads(line)
            self.rows[row["method"], row["name"]] = row


def write_json(path: Path, document: Any) -> None:
    """Write a document, whole or not at all."""
    new = path.with_name(path.name + ".new")
    new.write_text(json.dumps(document, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    new.replace(path)
