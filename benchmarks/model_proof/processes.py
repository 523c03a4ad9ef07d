"""A step in a process of its own: one that crashes or hangs stops nothing."""

import multiprocessing
import os
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from vllm.model_executor.models import registry

SECONDS = 120
"""How long a step may take."""

REFUSALS = (
    "Self-Extend cannot serve",
    "Self-Extend (attention backend CUSTOM) cannot run",
    "Self-Extend cannot be applied to",
)

PRELOADED = [
    "benchmarks.model_proof.serving",
    "benchmarks.model_proof.applying",
    "benchmarks.model_proof.judging",
    "vllm.v1.engine.llm_engine",
    "vllm.v1.worker.cpu_worker",
    "vllm.model_executor.models.llama",
    "vllm_selfextend.vllm.cpu_worker",
    "vllm_selfextend.vllm.attention",
    "transformers.models.auto.modeling_auto",
    "transformers.models.llama.modeling_llama",
]
"""Modules that the processes of all steps have from the start."""


class StepError(Exception):
    """A step failed; what its process said last."""


def in_process(log: Path, step: Callable[..., Any], *args: Any) -> Any:
    """What `step` returns in a process of its own."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(sender, log, step, args))
    process.start()
    sender.close()
    try:
        if not receiver.poll(SECONDS):
            raise StepError(f"no end after {SECONDS} seconds")
        result, error = receiver.recv()
    except EOFError:
        process.join()
        raise StepError(f"the process died ({process.exitcode})") from None
    finally:
        process.kill()
        process.join()
    if error:
        raise StepError(error)
    return result


def _child(sender: Connection, log: Path, step: Callable[..., Any], args: tuple[Any, ...]) -> None:
    with log.open("a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    # vLLM looks at a model's class in a process that takes ten seconds to start; this one is new as well.
    registry._run_in_subprocess = lambda function: function()
    try:
        start = time.monotonic()
        sender.send((step(*args), ""))
        print(f"{step.__name__} {args[0]}: {time.monotonic() - start:.1f} s", flush=True)
    except BaseException as error:
        traceback.print_exc()
        sender.send((None, _innermost(error)))
    os._exit(0)


def _innermost(error: BaseException) -> str:
    """The error that says what is wrong, of those that it came with."""
    found = error
    while (cause := found.__cause__ or found.__context__) is not None and not is_refusal(str(found)):
        found = cause
    lines = [line.strip() for line in str(found).splitlines() if line.strip()]
    pydantic = [line for line in lines if is_refusal(line) or line.startswith("Value error, ")]
    frames = traceback.extract_tb(found.__traceback__)
    code = frames[-1].line if frames else None
    return f"{type(found).__name__}: {(pydantic or lines or [code or ''])[0].split(' [type=')[0]}"


def is_refusal(message: str) -> bool:
    return any(refusal in message for refusal in REFUSALS)
