"""The demo on a few of its prompts; `make demo` runs all of them."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import TextIO

import pytest

from vllm_selfextend.demo import run
from vllm_selfextend.demo.screen import stderr_to

# Every seventh of the longest prompts: 12 of 84, of which the whole demo finds 81.
SCRIPT = """
import sys
from vllm_selfextend import cli
from vllm_selfextend.demo import run

longest = max(run.LENGTHS)
tasks = [task for task in run.make_tasks() if task.num_tokens == longest][::7]
run.LENGTHS, run.make_tasks = (longest,), lambda: tasks
cli.app(["demo", "--output", sys.argv[1]])
"""


def test_self_extend_finds_what_the_unmodified_model_does_not(tmp_path: Path) -> None:
    # As in a user's shell: the tests' own settings silence vLLM.
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("VLLM_", "OMP_"))}
    done = subprocess.run([sys.executable, "-c", SCRIPT, tmp_path], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    prompts = json.loads((tmp_path / "results.json").read_text())["prompts"]
    found = {method: [row["found"] for row in prompts if row["method"] == method] for method in run.METHODS}
    assert len(found["self_extend"]) == len(found["unmodified"]) == 12
    assert sum(found["self_extend"]) >= 11
    assert sum(found["unmodified"]) <= 1
    # The screen is the bars', the table's and the example's; everything else is in the log.
    assert {line.split()[0] for line in done.stderr.splitlines()} == set(run.METHODS.values())
    assert done.stdout.splitlines()[0].strip() == "Passkeys found by a model trained on 256 tokens"
    assert "Self-Extend: trained length 256" in (tmp_path / "vllm.log").read_text()


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


def test_results_are_written(tmp_path: Path) -> None:
    results = []
    for task in run.make_tasks():
        for method, answer in (("self_extend", task.prompt.answer), ("unmodified", "none")):
            cell = method, task.num_tokens, task.num_keys, task.depth
            results.append(run.Result(*cell, expected=task.prompt.answer, answer=answer))
    run.write_results(results, 256, tmp_path / "new" / "folder")
    written = json.loads((tmp_path / "new" / "folder" / "results.json").read_text())
    assert written["trained_length"] == 256
    assert len(written["prompts"]) == len(results)
    assert {(row["self_extend"], row["unmodified"]) for row in written["accuracy"]} == {(1.0, 0.0)}
    assert (tmp_path / "new" / "folder" / "accuracy.png").read_bytes().startswith(b"\x89PNG")
