"""Two minutes of `benchmarks.soak`; an hour by hand says more, of memory above all."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.soak import KINDS

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_two_minutes(tmp_path: Path) -> None:
    # A worker that meets a number of tokens for the first time keeps what it makes for it: not yet the limit of 2 %.
    options = ["--minutes", "2", "--growth", "100", "--json", str(tmp_path / "result")]
    command = [sys.executable, "-m", "benchmarks.soak", *options]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads((tmp_path / "result").read_text())
    assert all(result[kind] > 0 for kind in KINDS)
    assert result["preemptions"] > 0
