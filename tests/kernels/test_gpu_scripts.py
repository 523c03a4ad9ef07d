"""The scripts for GPUs, as far as they go without one."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def run_script(name: str, *options: str, interpret: bool, code: int = 0) -> str:
    environment = {**os.environ, "TRITON_INTERPRET": "1" if interpret else "0", "COLUMNS": "200"}
    command = [sys.executable, "-W", "ignore", "-m", f"benchmarks.{name}", *options]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == code, done.stdout + done.stderr
    return done.stderr if code else done.stdout


@pytest.mark.slow
def test_kernels_compile_for_gpus_without_spills_in_loops(tmp_path: Path) -> None:
    targets = {"sm_80": "HMMA", "sm_90": "HGMMA", "sm_100": "UTCHMMA", "gfx942": "v_mfma"}
    options = [f"--target={name}" for name in targets]
    options += ["--head-size=64", "--head-size=128", "--head-size=256", "--cache=bfloat16", "--cache=fp8"]
    run_script("triton_compile", *options, "--json", str(tmp_path / "rows"), interpret=False)
    rows = [json.loads(line) for line in (tmp_path / "rows").read_text().splitlines()]
    decodes, prefills = ([row for row in rows if row["kernel"] == name] for name in ("decode", "varlen"))
    layers = len(targets) * 3 * 2  # head sizes and caches
    assert len(decodes) == 2 * layers  # split and not
    # Within the trained length, neighbors, and grouped keys of which each row sees one more or as many.
    assert len(prefills) == 4 * layers
    for row in rows:
        assert not any(loop["spills"] for loop in row["loops"]), row
        assert not row["problems"], row
    for row in decodes:  # of grouped keys, of mixed tiles, of neighbors and of the last ones
        assert len(row["loops"]) == 4, row
    for row in prefills:  # what every row sees and the last ones; the window's edge before them
        assert len(row["loops"]) == (3 if row["detail"] == ", window" else 2), row
        assert row["loops"][0]["instruction"] == targets[row["target"]], row


def test_a_target_that_is_not_known_is_an_error() -> None:
    printed = run_script("triton_compile", "--target", "sm_75", interpret=False, code=2)
    assert "'sm_75' is not one of sm_80" in printed


@pytest.mark.slow
def test_the_gpu_benchmarks_check_of_the_kernels() -> None:
    printed = run_script("gpu", "--correctness-only", interpret=True)
    assert printed.count("right") >= 16
    assert "wrong" not in printed.lower()


@pytest.mark.slow
def test_nothing_is_compiled_after_start_up() -> None:
    """Whatever the step, if `warm_up` was called, for layers of both kinds."""
    assert "after it: 0." in run_script("launch_cost", "--repeats", "1", interpret=False)
