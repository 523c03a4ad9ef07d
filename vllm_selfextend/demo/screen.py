"""Keeps the screen free: what vLLM, and the libraries and processes below it, have to say goes to a file."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

TAIL_LINES = 40


@contextlib.contextmanager
def stderr_to(log: Path) -> Iterator[TextIO]:
    """While open, the stderr of this process and of those it starts is the file `log`; yields the real one.

    vLLM's own log goes there too, unless vLLM was imported before. After an exception the end of the file is shown.
    """
    os.environ.setdefault("VLLM_LOGGING_STREAM", "ext://sys.stderr")
    real = os.fdopen(os.dup(2), "w")
    try:
        with log.open("w") as file:
            os.dup2(file.fileno(), 2)
        yield real
    except Exception:
        lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
        real.write("\n".join([f"The end of {log}:", *lines[-TAIL_LINES:], ""]))
        raise
    finally:
        real.flush()
        os.dup2(real.fileno(), 2)
        real.close()
