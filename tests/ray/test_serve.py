"""`examples/ray_serve.py` as it is, with two replicas, through the `openai` client."""

import itertools
import signal
import subprocess
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import openai
import psutil
import pytest

from .programs import ROOT, environment, free_port, python, wait_until
from .prompts import MAX_MODEL_LEN, PROMPTS, TOO_LONG

pytestmark = pytest.mark.slow

REPLICAS = 2
CLIENTS = 16
TEXTS = [row["prompt"] for row in PROMPTS[:CLIENTS]]
NEW_TOKENS = 64
ATTEMPTS = 3


@dataclass
class Service:
    """The running example and a client for it."""

    process: subprocess.Popen[str]
    client: openai.OpenAI
    log: Path

    def complete(self, prompt: str) -> str:
        completion = self.client.completions.create(model="passkey", prompt=prompt, **SETTINGS)
        assert completion.choices[0].finish_reason == "length"
        return completion.choices[0].text

    def stream(self, prompt: str) -> list[str]:
        pieces, ends = [], []
        for chunk in self.client.completions.create(model="passkey", prompt=prompt, stream=True, **SETTINGS):
            pieces.append(chunk.choices[0].text)
            ends.append(chunk.choices[0].finish_reason)
        if ends[-1:] != ["length"]:
            raise CutShortError
        return pieces

    def replicas(self) -> dict[int, psutil.Process]:
        """The processes that Ray calls replicas of the model, by their ids."""
        family = psutil.Process(self.process.pid).children(recursive=True)
        return {process.pid: process for process in family if "ServeReplica:default:LLMServer" in process.name()}

    def engines_started(self) -> int:
        return self.log.read_text().count("Started vLLM engine")

    def wait_until_ready(self, engines_started: int) -> None:
        wait_until(lambda: self.engines_started() == engines_started, self.process, self.log, 600)
        wait_until(lambda: "is ready at" in self.log.read_text(), self.process, self.log, 120)


class CutShortError(Exception):
    """A stream that ended without saying that it is complete."""


SETTINGS = {"max_tokens": NEW_TOKENS, "temperature": 0.0, "extra_body": {"ignore_eos": True}}


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    port, log = free_port(), tmp_path_factory.mktemp("serve") / "log"
    command = python("examples/ray_serve.py", "--cpu", "--replicas", REPLICAS, "--port", port)
    # Ray leaves out lines that repeat each other.
    settings = environment(RAY_DEDUP_LOGS="0")
    with log.open("w") as out:
        process = subprocess.Popen(command, cwd=ROOT, env=settings, text=True, stdout=out, stderr=subprocess.STDOUT)
    client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0, timeout=300)
    service = Service(process, client, log)
    try:
        service.wait_until_ready(REPLICAS)
        yield service
        process.send_signal(signal.SIGINT)
        process.wait(180)
    finally:
        process.kill()
        process.wait()


@pytest.fixture(scope="module")
def alone(service: Service) -> list[str]:
    """Each answer, asked for by itself."""
    answers = [service.complete(text) for text in TEXTS]
    assert [answer.strip()[:9] for answer in answers] == [row["key"] for row in PROMPTS[:CLIENTS]]
    return answers


def test_streams_give_the_same_text(service: Service, alone: list[str]) -> None:
    for text, answer in zip(TEXTS[:4], alone, strict=False):
        pieces = service.stream(text)
        assert "".join(pieces) == answer
        assert len(list(filter(None, pieces))) > 1


def test_sixteen_clients_get_what_each_gets_alone(service: Service, alone: list[str]) -> None:
    with ThreadPoolExecutor(CLIENTS) as pool:
        assert list(pool.map(service.complete, TEXTS)) == alone
        assert ["".join(pieces) for pieces in pool.map(service.stream, TEXTS)] == alone


def test_a_prompt_that_is_too_long_is_refused(service: Service, alone: list[str]) -> None:
    with pytest.raises(openai.BadRequestError, match=f"maximum context length is {MAX_MODEL_LEN} tokens") as refused:
        service.complete(TOO_LONG)
    assert refused.value.status_code == 400
    assert service.complete(TEXTS[0]) == alone[0]


@pytest.mark.timeout(3600)  # as long as what it waits for may take
def test_a_replica_killed_under_load_costs_no_wrong_answer(service: Service, alone: list[str]) -> None:
    load = Load(service, alone)
    with ThreadPoolExecutor(CLIENTS) as pool:
        clients = [pool.submit(load.run_client, number) for number in range(CLIENTS)]
        try:
            wait_until(load.each_client_has(2), service.process, service.log, 300)
            # The clients of a replica ask and are answered together. Killed between two such batches, it takes no
            # request with it, and that shows nothing: then the next replica goes as well.
            while not load.was_cut_off():
                assert load.replicas_killed < ATTEMPTS, "no killed replica was answering"
                load.kill_a_replica()
            wait_until(load.each_client_has(2), service.process, service.log, 300)
        finally:
            load.stop.set()
        for client in clients:
            client.result()  # raises what is neither an answer nor an error that says so

    assert len(service.replicas()) == REPLICAS
    print(dict(load.outcomes), "replicas killed:", load.replicas_killed)
    assert load.outcomes["wrong"] == 0
    with ThreadPoolExecutor(CLIENTS) as pool:
        assert list(pool.map(service.complete, TEXTS)) == alone


@dataclass
class Load:
    """Clients that ask until they are stopped, and what they got."""

    service: Service
    expected: list[str]
    stop: threading.Event = field(default_factory=threading.Event)
    outcomes: Counter[str] = field(default_factory=Counter)
    right: Counter[int] = field(default_factory=Counter)
    replicas_killed: int = 0

    def run_client(self, number: int) -> None:
        for stream in itertools.cycle([False, True]):
            if self.stop.is_set():
                return
            try:
                text = TEXTS[number]
                answer = "".join(self.service.stream(text)) if stream else self.service.complete(text)
            except (openai.APIError, CutShortError) as error:
                self.outcomes[type(error).__name__] += 1
            else:
                is_right = answer == self.expected[number]
                self.right[number] += is_right
                self.outcomes["right" if is_right else "wrong"] += 1

    def each_client_has(self, more: int) -> Callable[[], bool]:
        wanted = [self.right[number] + more for number in range(CLIENTS)]
        return lambda: all(self.right[number] >= count for number, count in enumerate(wanted))

    def was_cut_off(self) -> bool:
        return bool(self.outcomes.keys() - {"right", "wrong"})

    def kill_a_replica(self) -> None:
        """Kill one and wait until every client has got answers without it, and Ray has started another."""
        service = self.service
        killed = next(iter(service.replicas().values()))
        engines_started = service.engines_started()
        killed.kill()
        self.replicas_killed += 1
        wait_until(self.each_client_has(2), service.process, service.log, 300)
        service.wait_until_ready(engines_started + 1)
        assert killed.pid not in service.replicas()
