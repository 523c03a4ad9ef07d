"""What a run has found so far, in a folder, so that a run that was broken off goes on where it was."""

import contextlib
import fcntl
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .prompts import Row

DIFFERENCES_SHOWN = 3


class Records:
    """The answers of a run, kept as they come.

    `settings.json` is what the run was asked for, `answers.jsonl` has a line per answer. What is kept is never written
    again: lines are only added, and one that was broken off is cut.

    Raises:
        ValueError: The folder holds the answers of another run, or files of these names that are no run's.

    """

    def __init__(self, folder: Path, settings: dict[str, Any]) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.settings: dict[str, Any] = json.loads(json.dumps(settings))
        self._answers = folder / "answers.jsonl"
        content = self._answers.read_bytes() if self._answers.exists() else b""
        whole = content[: content.rfind(b"\n") + 1]
        self.rows: dict[tuple[str, str], Row] = dict(self._read(whole))
        self._settle(bool(content))
        if len(whole) < len(content):  # a run ended in the middle of writing a line
            os.truncate(self._answers, len(whole))

    def add(self, row: Row) -> None:
        """Keep an answer; it is on the disk when this returns.

        Raises:
            OSError: It cannot be written; answers from before are not touched.

        """
        with _naming(self._answers), self._answers.open("ab") as file:
            file.write(json.dumps(row).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
        self.rows[row["method"], row["name"]] = row

    def _read(self, whole: bytes) -> Iterator[tuple[tuple[str, str], Row]]:
        for number, line in enumerate(whole.split(b"\n")[:-1], 1):
            try:
                row = json.loads(line)
                yield (row["method"], row["name"]), row
            except (ValueError, LookupError, TypeError) as error:
                raise ValueError(
                    f"Line {number} of {self._answers} is no answer of a run: take that line out, or another folder."
                ) from error

    def _settle(self, has_answers_file: bool) -> None:
        """See that the folder's settings are ours; without an answer to them they do not count."""
        path = self.folder / "settings.json"
        if not path.exists():
            if has_answers_file:
                raise ValueError(
                    f"{self._answers} is there without {path.name}, which says of what: take another folder."
                )
            write_json(path, self.settings)
            return
        try:
            kept = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{path} cannot be read ({error}): take another folder.") from error
        if kept == self.settings:
            return
        if not isinstance(kept, dict) or not kept.keys() & self.settings.keys():
            raise ValueError(f"{path} is there, and is no run's: take another folder.")
        if self.rows:
            found = list(_differences(kept, self.settings))
            more = f"; and {len(found) - DIFFERENCES_SHOWN} more" if len(found) > DIFFERENCES_SHOWN else ""
            raise ValueError(
                f"{self.folder} holds the answers of another run: there {'; '.join(found[:DIFFERENCES_SHOWN])}{more}. "
                "Take another folder, or ask for the same."
            )
        write_json(path, self.settings)


@contextlib.contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """While open, the folder is this process's, and another process is refused.

    The lock (`lockf`) is the process's own: it ends with it, however it ends, and an engine that was forked has none.

    Raises:
        ValueError: Another process has the folder, or it is on a file system without locks.

    """
    with (folder / "run.lock").open("w") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError) as error:
            raise ValueError(f"Another run is at work in {folder}: wait for it, or take another folder.") from error
        except OSError as error:
            raise ValueError(
                f"{folder} cannot be locked ({error}), so two runs in it would not notice each other: take a folder on "
                "another file system."
            ) from error
        yield


def write_json(path: Path, document: Any) -> None:
    """Write a document, whole or not at all.

    Raises:
        OSError: It cannot be written; the one from before is not touched.

    """
    new = path.with_name(path.name + ".new")
    try:
        with _naming(new), new.open("w", encoding="utf-8") as file:
            file.write(json.dumps(document, indent=1, allow_nan=False) + "\n")
            file.flush()
            os.fsync(file.fileno())
        new.replace(path)
    finally:
        new.unlink(missing_ok=True)


@contextlib.contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Errors name the file: those of writing, such as a full disk's, do not by themselves."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(path)
        raise


def _differences(kept: Any, now: Any, name: str = "") -> Iterator[str]:
    """Where two documents differ, each with both values; in objects, only the members that do."""
    if isinstance(kept, dict) and isinstance(now, dict):
        for key in {**kept, **now}:
            yield from _differences(kept.get(key), now.get(key), f"{name}.{key}" if name else key)
    elif kept != now:
        yield f"{name} was {kept!r}, and now it is {now!r}"
