"""One architecture from its checkpoint to the verdict, through vLLM and in transformers."""

import tempfile
import time
from pathlib import Path
from typing import Any

from .applying import extend
from .architectures import BY_TITLE
from .checkpoint import Architecture
from .judging import hold, hold_roughly
from .processes import StepError, in_process, is_refusal
from .results import Result
from .serving import Served, serve


def save(title: str, folder: Path) -> tuple[str, str]:
    return BY_TITLE[title].save(folder)


def run_vllm(architecture: Architecture, log: Path) -> Result:
    """Run one architecture through vLLM; what is refused or fails is put to stock vLLM too."""
    start = time.monotonic()

    def result(status: str, reason: str = "", **more: Any) -> Result:
        seconds = round(time.monotonic() - start, 1)
        names = architecture.name, architecture.variant, architecture.known_as
        return Result(*names, status, reason, seconds=seconds, notes=architecture.notes, **more)

    with tempfile.TemporaryDirectory() as folder:
        try:
            checkpoint, for_oracle = in_process(log, save, architecture.title, Path(folder))
        except StepError as error:
            return result("not runnable", f"no checkpoint: {error}")
        try:
            served: Served = in_process(log, serve, architecture.title, checkpoint, True)
        except StepError as error:
            reason = str(error)
            stock = _stock(architecture.title, checkpoint, for_oracle, log)
            if is_refusal(reason):
                reason = reason[reason.index("Self-Extend") :].replace(checkpoint, "it")
                return result("refused", reason, stock=stock)
            return result("not runnable", reason.replace(folder, "FOLDER"), stock=stock)
        sizes = {"kv_bytes": served.kv_bytes, "planned_kv_bytes": served.planned_kv_bytes}
        known: dict[str, Any] = {"model": served.model, **sizes}
        try:
            if served.kv_bytes != served.planned_kv_bytes:
                raise StepError(
                    f"the KV cache takes {served.kv_bytes} bytes per token and per sequence, and plan says "
                    f"{served.why_not or served.planned_kv_bytes}"
                )
            if architecture.dtype != "float32":
                said = in_process(log, hold_roughly, architecture.title, for_oracle, served.found)
                return result("close", said, **known)
            greatest = in_process(log, hold, architecture.title, for_oracle, served.found, True)
        except StepError as error:
            return result("differs", str(error), stock=_stock(architecture.title, checkpoint, for_oracle, log), **known)
        return result("proved", greatest=greatest, **known)


def _stock(title: str, checkpoint: str, for_oracle: str, log: Path) -> str:
    """What stock vLLM does with short texts."""
    try:
        found = in_process(log, serve, title, checkpoint, False).found
    except StepError as error:
        return f"fails: {error}".replace(str(Path(checkpoint).parent), "FOLDER")
    try:
        in_process(log, hold, title, for_oracle, found, False)
    except StepError as error:
        return f"differs from transformers: {error}"
    return "as transformers"


def run_transformers(architecture: Architecture, log: Path) -> dict[str, Any]:
    """Run one architecture in transformers; what fails, and is not refused, is put to transformers as it is too."""
    start, title = time.monotonic(), architecture.title

    def result(status: str, **more: Any) -> dict[str, Any]:
        return {"status": status, **more, "seconds": round(time.monotonic() - start, 1)}

    with tempfile.TemporaryDirectory() as folder:
        try:
            _, checkpoint = in_process(log, save, title, Path(folder))
        except StepError as error:
            return result("not runnable", reason=f"no checkpoint: {error}")
        try:
            found = in_process(log, extend, title, checkpoint, True)
        except StepError as error:
            reason = str(error).replace(folder, "FOLDER")
            if is_refusal(reason):
                return result("refused", reason=reason[reason.index("Self-Extend") :])
            try:
                in_process(log, extend, title, checkpoint, False)
            except StepError as of_transformers:
                return result("not runnable", reason=str(of_transformers).replace(folder, "FOLDER"))
            return result("crashes", reason=reason)
        try:
            greatest = in_process(log, hold, title, checkpoint, found, True)
        except StepError as error:
            return result("differs", reason=str(error))
        return result("proved", greatest=greatest)
