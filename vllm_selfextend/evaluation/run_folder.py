"""The folder of a run: what it writes, what its models say, and the answers that the same run goes on from."""

import contextlib
import shutil
import sys
import tempfile
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

from .records import Records, alone_in
from .screen import Stopped, stderr_to, stopped_by_signals

LOG = "vllm.log"


@dataclass
class RunFolder:
    """Where a run writes, and how it went.

    Attributes:
        path: The folder.
        stderr: The screen.
        records: The answers, once they are kept in the folder.
        log_problem: Why the traceback of a run that failed could not be written to the log; None if it was.
        is_of_use: Whether the folder has something to keep: the log of a run that failed, or answers to go on from.

    """

    path: Path
    stderr: TextIO
    records: Records | None = None
    log_problem: OSError | None = None
    is_of_use: bool = True

    @property
    def log(self) -> Path:
        """The file of what vLLM and the processes below it say."""
        return self.path / LOG

    @property
    def has_answers(self) -> bool:
        """Whether there is something to go on from."""
        return self.records is not None and bool(self.records.rows)

    @contextlib.contextmanager
    def logging(self) -> Iterator[None]:
        """While open, models run: stderr is the log, and signals raise `Stopped`.

        What comes out goes on, a traceback of errors for the user (`ValueError`, `OSError`) left in the log.
        """
        try:
            with stderr_to(self.log) as self.stderr, stopped_by_signals():
                yield
            self.is_of_use = False
        except Stopped:
            self.is_of_use = self.has_answers
            raise
        except (ValueError, OSError) as error:
            self.log_problem = _keep_traceback(error, self.log)
            self.is_of_use = self.log_problem is None or self.has_answers
            raise


@contextlib.contextmanager
def run_folder(output: Path | None) -> Iterator[RunFolder]:
    """A folder that no other run is in; without `output` a temporary one, removed at the end unless it is of use.

    Raises:
        ValueError: Another run has it, or there is no temporary one to be had.
        OSError: It cannot be made.

    """
    path = output or _temporary_folder()
    folder: RunFolder | None = None
    try:
        path.mkdir(parents=True, exist_ok=True)
        with alone_in(path):
            folder = RunFolder(path, sys.stderr)
            yield folder
    finally:
        if output is None and not (folder and folder.is_of_use):
            shutil.rmtree(path)


def _temporary_folder() -> Path:
    try:
        return Path(tempfile.mkdtemp(prefix="vllm-selfextend-"))
    except OSError as error:
        raise ValueError(f"Without --output a run needs a temporary folder, and there is none: {error}") from error


def _keep_traceback(error: Exception, log: Path) -> OSError | None:
    """Write an error's traceback to a log; what comes back is why that could not be done."""
    try:
        with log.open("a", encoding="utf-8", errors="backslashreplace") as file:
            traceback.print_exception(error, file=file)
    except OSError as problem:  # the disk is full, for instance, and that may be the error itself
        return problem
    return None
