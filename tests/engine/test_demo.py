"""The demo on a few of its prompts; `make demo` runs all of them."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import TextIO

import pytest

from vllm_selfextend.demo import run
from vllm_selfextend.evaluation.methods import METHODS
from vllm_selfextend.evaluation.screen import stderr_to

# A quarter of the longest prompts with four keys: 11 of 42.
SCRIPT = """
import dataclasses, sys
from vllm_selfextend import cli
from vllm_selfextend.demo import run

task = run.TASK
run.TASK = dataclasses.replace(task, lengths=task.lengths[-1:], depths=task.depths[::2], key_counts=(4,), rounds=1)
cli.app(["demo", "--output", sys.argv[1]])
"""


def test_self_extend_finds_what_the_unmodified_model_does_not(tmp_path: Path) -> None:
    # As in a user's shell: the tests' own settings silence vLLM.
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("VLLM_", "OMP_"))}
    done = subprocess.run([sys.executable, "-c", SCRIPT, tmp_path], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    answers = json.loads((tmp_path / "results.json").read_text())["answers"]
    found = {method: [row["found"] for row in answers if row["method"] == method] for method in run.METHOD_NAMES}
    assert len(found["self-extend"]) == len(found["unmodified"]) == 11
    assert sum(found["self-extend"]) >= 9
    assert sum(found["unmodified"]) <= 3
    # The screen is the bars', the table's and the example's; everything else is in the log.
    labels = {METHODS[method].label for method in run.METHOD_NAMES}
    assert {line.split()[0] for line in done.stderr.splitlines()} == {*labels, "all"}
    assert "Passkeys found by a model trained on 256 tokens" in " ".join(done.stdout.split())
    assert "Self-Extend: trained length 256" in (tmp_path / "vllm.log").read_text()
    assert (tmp_path / "passkeys.png").read_bytes().startswith(b"\x89PNG")


def test_what_fails_is_shown(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    log = tmp_path / "log"

    def fail(stderr: TextIO) -> None:
        stderr.write("a bar\n")
        subprocess.run([sys.executable, "-c", "import sys; print('the reason', file=sys.stderr)"], check=True)
        raise RuntimeError("no engine")

    with pytest.raises(RuntimeError, match="no engine"), stderr_to(log) as stderr:
        fail(stderr)
    assert capfd.readouterr().err == f"a bar\nThe end of {log}:\nthe reason\n"
    print("on the screen again", file=sys.stderr)
    assert capfd.readouterr().err == "on the screen again\n"


def test_the_doctor_finds_nothing_wrong() -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("VLLM_", "OMP_"))}
    command = [sys.executable, "-m", "vllm_selfextend", "doctor"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.rstrip().endswith("Nothing is wrong.")
    assert "right at 1,024 tokens by a model trained on 256, on the cpu kernels (" in done.stdout
    assert done.stderr == ""
