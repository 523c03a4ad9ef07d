"""A server as a user would start it, `vllm serve` in a process of its own, and a client for it."""

import contextlib
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import openai
import psutil

NAME = "passkey"


@dataclass
class Server:
    """A running server and a client for it."""

    process: subprocess.Popen[bytes]
    client: openai.OpenAI
    url: str
    log: Path

    def complete(self, prompt: str, **settings: Any) -> Any:
        return self.client.completions.create(
            model=NAME, prompt=prompt, **{"max_tokens": 5, "temperature": 0.0, **settings}
        )

    def chat(self, message: str, **settings: Any) -> Any:
        return self.client.chat.completions.create(
            model=NAME,
            messages=[{"role": "user", "content": message}],
            **{"max_tokens": 5, "temperature": 0.0, **settings},
        )


@contextlib.contextmanager
def serve(model: str | Path, log: Path, *options: object, **environment: str) -> Iterator[Server]:
    """Serve a model, in float32, with the options added; what the server prints goes to the file `log`."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    command = [Path(sys.executable).with_name("vllm"), "serve", model, "--served-model-name", NAME]
    command += ["--dtype", "float32", "--host", "127.0.0.1", "--port", port, *options]
    environment = {**os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "1", "VLLM_LOGGING_LEVEL": "INFO", **environment}
    with log.open("w") as out:
        process = subprocess.Popen(list(map(str, command)), stdout=out, stderr=subprocess.STDOUT, env=environment)
    url = f"http://127.0.0.1:{port}"
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=300)
    try:
        _wait(process, client, log)
        yield Server(process, client, url, log)
    finally:
        _end(process)


def _end(process: subprocess.Popen[bytes]) -> None:
    """End it and what it started: killed, a server leaves engines of its data parallelism behind."""
    if process.poll() is None:
        family = psutil.Process(process.pid).children(recursive=True)
        process.kill()
        for child in filter(psutil.Process.is_running, family):
            child.kill()
    process.wait()


def _wait(process: subprocess.Popen[bytes], client: openai.OpenAI, log: Path) -> None:
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline:
        assert process.poll() is None, log.read_text()
        try:
            client.models.list()
            return
        except openai.APIConnectionError:
            time.sleep(1)
    raise TimeoutError(f"the server did not answer within 300 s:\n{log.read_text()}")
