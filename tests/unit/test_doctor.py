"""`vllm-selfextend doctor`: what it says of things that are missing, broken or wrong."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from typer.testing import CliRunner

import vllm_selfextend
from vllm_selfextend import cli, doctor
from vllm_selfextend.doctor import Device, Finding
from vllm_selfextend.evaluation import engine, methods

CPU = Device("cpu", "CPU")


def of(subject: str, findings: list[Finding]) -> Finding:
    (found,) = [finding for finding in findings if finding.subject == subject]
    return found


def die() -> None:
    os.kill(os.getpid(), signal.SIGSEGV)


def test_what_kills_a_process_kills_another_one() -> None:
    nothing, why = doctor._in_a_process(die)
    assert nothing is None
    assert why is not None
    assert why.startswith("the process that tried it died")
    assert doctor._in_a_process(int, "x") == (
        None,
        "ValueError: invalid literal for int() with base 10: 'x'",
    )
    assert doctor._in_a_process(int, "7") == (7, None)


def test_the_kernels_of_each_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first that loads is chosen; those of another device are no loss."""
    monkeypatch.setattr(doctor, "_in_a_process", lambda ask, *arguments: loads[arguments[0]])
    gone = (None, "not built")
    loads: dict[str, tuple] = {"cpu": ("avx2", None), "triton": gone, "reference": ("PyTorch", None)}
    found = list(doctor._kernel_findings(CPU))
    assert [(one.found, one.problem is None) for one in found] == [
        ("avx2, chosen", True),
        ("not here: not built", True),
        ("PyTorch", True),
    ]
    found = list(doctor._kernel_findings(Device("cuda", "GPU", (9, 0))))
    assert of("triton kernels", found).problem == "They are this device's: without them serving is slow, or refused."
    assert of("cpu kernels", found) == Finding("cpu kernels", "avx2")
    assert of("reference kernels", found).found == "PyTorch, chosen"
    loads["cpu"] = gone
    found = list(doctor._kernel_findings(CPU))
    assert of("cpu kernels", found).problem is not None
    assert of("reference kernels", found).found == "PyTorch, chosen"


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
    assert "not here: " in kernels.found
    assert "invalid ELF header" in kernels.found or "file too short" in kernels.found
    assert kernels.problem == "They are this device's: without them serving is slow, or refused."
    assert of("reference kernels", found).found == "PyTorch, chosen"
    assert of("vLLM", found) == Finding("vLLM", "fits")
    assert "VLLM_PLUGINS is 'another', which keeps Self-Extend out" in (of("plugin", found).problem or "")
    assert [one.subject for one in found if one.subject == "answer"] == []


def test_without_vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_in_a_process", lambda ask, *arguments: (ask(*arguments), None))
    monkeypatch.setattr(doctor, "_device", lambda: CPU)
    monkeypatch.setattr(doctor, "_kernel_findings", lambda device: [])
    monkeypatch.setattr(doctor.importlib.util, "find_spec", lambda name: None)
    result = CliRunner().invoke(cli.app, ["doctor"])
    assert result.exit_code == 1
    shown = " ".join(result.stdout.split())
    assert "problem vLLM not installed Without vLLM nothing is served. On a GPU machine: pip install" in shown
    assert shown.endswith("1 problem.")


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


def test_an_engine_that_does_not_start(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its log stays, and is named."""

    def broken(*arguments: object) -> None:
        raise RuntimeError("Engine core initialization failed.")

    monkeypatch.setattr(doctor, "_answer", broken)
    found = list(doctor._vllm_findings())
    problem = of("answer", found).problem or ""
    assert problem.startswith("RuntimeError: Engine core initialization failed. vLLM's log is ")
    log = Path(problem.rpartition(" is ")[2].removesuffix("."))
    assert log.is_file()
    shutil.rmtree(log.parent)
