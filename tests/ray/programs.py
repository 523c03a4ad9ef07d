"""Programs that the tests start."""

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
STAND_IN_GPUS = Path(__file__).with_name("stand_in_gpus")


def environment(*, stand_in_gpus: bool = False, **more: str) -> dict[str, str]:
    """For a program; with `stand_in_gpus`, vLLM's CPU platform counts as GPUs in it and in Ray's workers."""
    found = {**os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "1", "RAY_USAGE_STATS_ENABLED": "0", **more}
    # Several processes share the cores: threads must not wait for work by spinning.
    found |= {"OMP_WAIT_POLICY": "passive"}
    if stand_in_gpus:
        paths = [str(STAND_IN_GPUS), os.environ.get("PYTHONPATH", "")]
        found |= {"PYTHONPATH": os.pathsep.join(filter(None, paths))}
        # Each worker takes its share of the cores, and of the memory 1 GiB for its cache.
        found |= {"OMP_NUM_THREADS": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_CPU_KVCACHE_SPACE": "1"}
    return found


def python(*arguments: object) -> list[str]:
    return [sys.executable, *map(str, arguments)]


def run(command: Sequence[str], **settings: Any) -> str:
    """Run a program to its end and return what it printed."""
    done = subprocess.run(command, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, **settings)
    assert done.returncode == 0, done.stdout
    return done.stdout


def run_engine(where: str, prompts: Sequence[str]) -> dict[str, Any]:
    """What `engine.py` finds."""
    settings = environment(stand_in_gpus=where == "ray", VLLM_ALLOW_INSECURE_SERIALIZATION="1")
    output = run(python("-m", "tests.ray.engine", where), env=settings, input=json.dumps(prompts))
    found: dict[str, Any] = json.loads(output.rpartition("FOUND ")[2].partition("\n")[0])
    return found


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


def wait_until(condition: Callable[[], bool], process: subprocess.Popen[str], log: Path, seconds: float) -> None:
    """Wait for a condition that a running program brings about."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, log.read_text()
        if time.monotonic() > deadline:
            pytest.fail(f"not within {seconds} s:\n{log.read_text()}")
        time.sleep(0.1)
