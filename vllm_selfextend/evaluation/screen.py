"""The screen while models run: it has the progress, and a file has what vLLM and the processes below it say."""

import contextlib
import os
import signal
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TextIO

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

TAIL_LINES = 40


@contextlib.contextmanager
def stderr_to(log: Path) -> Iterator[TextIO]:
    """While open, the stderr of this process and of those it starts is the file `log`; yields the real one.

    vLLM's own log goes there too, unless vLLM was imported before. After an exception the end of the file is shown,
    but not after one whose message is for the user (`ValueError`, `OSError`).
    """
    os.environ.setdefault("VLLM_LOGGING_STREAM", "ext://sys.stderr")
    real = os.fdopen(os.dup(2), "w")
    try:
        with log.open("a") as file:
            os.dup2(file.fileno(), 2)
        yield real
    except (ValueError, OSError):
        raise
    except Exception:
        lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
        real.write("\n".join([f"The end of {log}:", *lines[-TAIL_LINES:], ""]))
        raise
    finally:
        real.flush()
        os.dup2(real.fileno(), 2)
        real.close()


class CtrlC(BaseException):
    """Ctrl-C came. No KeyboardInterrupt: while an engine starts, vLLM swallows that (`zmq_socket_ctx`) and waits on."""


@contextlib.contextmanager
def stopped_by_ctrl_c() -> Iterator[None]:
    """While open, Ctrl-C raises `CtrlC` and, if that is not caught, ends in KeyboardInterrupt, whatever else it brings.

    A terminal sends it to vLLM's processes too, and that they have ended may be what is noticed.
    """
    came = False

    def interrupt(signum: int, frame: object) -> None:
        nonlocal came
        came = True
        raise CtrlC

    before = signal.getsignal(signal.SIGINT)
    if before is not signal.default_int_handler:  # somebody else sees to it, as nohup does
        yield
        return
    signal.signal(signal.SIGINT, interrupt)
    try:
        yield
    except (Exception, CtrlC) as error:
        if came:
            raise KeyboardInterrupt from error
        raise
    finally:
        signal.signal(signal.SIGINT, before)


@contextlib.contextmanager
def bars(stderr: TextIO, work: Mapping[str, int]) -> Iterator[Callable[[str, int], None]]:
    """A bar per label, as long as its work, and one for all with the time that is left.

    Yields a function that a label and a piece of its work are given when the piece is done.
    """
    columns = (BarColumn(), TaskProgressColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    width = max(map(len, (*work, "all")))
    text = TextColumn("{task.description}")
    with Progress(text, *columns, console=Console(file=stderr), speed_estimate_period=900) as progress:
        each = {label: progress.add_task(label.ljust(width), total=total, start=False) for label, total in work.items()}
        whole = progress.add_task("all".ljust(width), total=sum(work.values()))

        def advance(label: str, piece: int) -> None:
            progress.start_task(each[label])
            progress.advance(each[label], piece)
            progress.advance(whole, piece)

        yield advance


@contextlib.contextmanager
def trying(stderr: TextIO, seconds: float) -> Iterator[Callable[[str], None]]:
    """What is being done, and how much of the time for it is over; yields a function that is told what."""
    columns = TextColumn("{task.description}"), TimeElapsedColumn(), TextColumn(f"of {seconds / 60:g} minutes")
    with Progress(*columns, console=Console(file=stderr)) as progress:
        line = progress.add_task("")
        yield lambda what: progress.update(line, description=what)


def reading_work(num_tokens: int, hidden_size: int) -> int:
    """How much work a prompt is, in tokens of a short one: attention's share grows with the length.

    A token's layers multiply it by about `12 * hidden_size**2` weights, and its attention reads half the prompt.
    """
    return round(num_tokens * (1 + num_tokens / (12 * hidden_size)))
