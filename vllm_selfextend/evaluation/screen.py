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
    real = os.fdopen(os.dup(2), "w", errors="backslashreplace")
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


class Stopped(BaseException):
    """A signal came that asks to end: Ctrl-C, or what `kill`, a batch system or a closed terminal sends.

    No KeyboardInterrupt: while an engine starts, vLLM swallows that (`zmq_socket_ctx`) and waits on.
    """

    def __init__(self, signum: int) -> None:
        super().__init__(signal.Signals(signum).name)
        self.signum = signum


ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@contextlib.contextmanager
def stopped_by_signals() -> Iterator[None]:
    """While open, the signals in `ENDING` raise `Stopped`, which is what comes out, whatever else they bring.

    So everything that is open is closed, the engine's processes above all. A terminal sends Ctrl-C to these too, and
    that they have ended may be what is noticed.
    """
    came: int | None = None

    def stop(signum: int, frame: object) -> None:
        nonlocal came
        came = signum
        raise Stopped(signum)

    # Others are somebody else's to see to: nohup's SIGHUP for instance, which is ignored.
    by_default = signal.SIG_DFL, signal.default_int_handler
    before = {signum: handler for signum in ENDING if (handler := signal.getsignal(signum)) in by_default}
    for signum in before:
        signal.signal(signum, stop)
    try:
        yield
    except (Exception, Stopped) as error:
        if came is not None:
            raise Stopped(came) from error
        raise
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


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
