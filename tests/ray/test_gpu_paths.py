"""The examples without `--cpu`, and `vllm serve`, with tensor parallel 2: on two GPUs for which CPUs stand in.

The cluster is one that `ray start` started, and `RAY_ADDRESS` names it, as where there are nodes to share.
"""

import json
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import openai
import pytest

from tests.support.servers import serve
from vllm_selfextend.demo import MODEL_DIR

from .programs import ROOT, environment, free_port, python, run, wait_until
from .prompts import MAX_MODEL_LEN, PROMPTS

pytestmark = pytest.mark.slow

ROWS = PROMPTS[:8]


@pytest.fixture(scope="module")
def on_cluster() -> Iterator[dict[str, str]]:
    """The environment of a program that is to run on the cluster."""
    # Short, as Ray's sockets are in it; its own, as Ray notes there which cluster `ray.init()` is to join.
    folder = Path(tempfile.mkdtemp(prefix="ray"))
    address, log = f"127.0.0.1:{free_port()}", folder / "log"
    settings = environment(stand_in_gpus=True, RAY_ADDRESS=address, RAY_AUTH_MODE="disabled", RAY_TMPDIR=str(folder))
    command = [str(Path(sys.executable).with_name("ray")), "start", "--head", "--block"]
    command += ["--node-ip-address", "127.0.0.1", "--port", address.rpartition(":")[2]]
    command += ["--num-cpus", "8", "--num-gpus", "2", "--include-dashboard", "false"]
    with log.open("w") as out:
        process = subprocess.Popen(command, env=settings, text=True, stdout=out, stderr=subprocess.STDOUT)
    try:
        wait_until(lambda: "Ray runtime started" in log.read_text(), process, log, 120)
        yield settings
    finally:
        process.terminate()
        process.wait(120)
        shutil.rmtree(folder)


def test_batch(tmp_path: Path, on_cluster: dict[str, str]) -> None:
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    command = python("examples/ray_data_batch.py", tmp_path / "prompts.jsonl", tmp_path / "answers")
    output = run([*command, "--tensor-parallel", "2"], env=on_cluster)
    assert "RayWorkerProc" in output
    found = [json.loads(line) for path in (tmp_path / "answers").iterdir() for line in path.read_text().splitlines()]
    assert {row["id"]: row["answer"].strip()[:9] for row in found} == {row["id"]: row["key"] for row in ROWS}


def test_vllm_serve(tmp_path: Path, on_cluster: dict[str, str]) -> None:
    options = ["--attention-backend", "CUSTOM", "--max-model-len", MAX_MODEL_LEN, "--kv-cache-memory-bytes", "512M"]
    options += ["--distributed-executor-backend", "ray", "--tensor-parallel-size", 2]
    with serve(MODEL_DIR, tmp_path / "log", *options, **on_cluster) as server:
        for row in ROWS:
            assert server.complete(row["prompt"]).choices[0].text.strip() == row["key"]
        assert "RayWorkerProc" in server.log.read_text()


def test_serve(tmp_path: Path, on_cluster: dict[str, str]) -> None:
    # The last one: on a cluster that was there before, a service outlives its program and keeps the GPUs.
    port, log = free_port(), tmp_path / "log"
    command = python("examples/ray_serve.py", "--tensor-parallel", 2, "--port", port)
    with log.open("w") as out:
        process = subprocess.Popen(command, cwd=ROOT, env=on_cluster, text=True, stdout=out, stderr=subprocess.STDOUT)
    try:
        wait_until(lambda: "is ready at" in log.read_text(), process, log, 600)
        client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0, timeout=300)
        for row in ROWS:
            completion = client.completions.create(model="passkey", prompt=row["prompt"], max_tokens=5, temperature=0.0)
            assert completion.choices[0].text.strip() == row["key"]
        assert "RayWorkerProc" in log.read_text()
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(120)
