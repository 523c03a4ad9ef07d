"""A server under load for as long as you like: `python -m benchmarks.soak --minutes 60`.

The demo's model is served with a cache too small for its clients, so that requests are preempted, prefix hits evicted.
Hundreds of clients ask, again and again: for answers, whole or streamed, to prompts of all lengths, most of them past
the trained length; some break off in the middle of a stream, some send what the server has to refuse. Every answer is
held against the same request's when it was alone. Only prompts are used whose answers do not hang on rounding: at every
token the best one is `CLEAR` or more ahead of the next, in log-probability.

The exit code is 1 if an answer was wrong, a request was lost (neither answered nor refused), a bad one was not refused,
or a process has grown by more than `--growth` percent since the clients had been at it for a tenth of the time.
"""

import asyncio
import json
import random
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import openai
import psutil
import rich.box
import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from benchmarks import machine
from tests.support.servers import NAME, serve
from vllm_selfextend.demo import MODEL_DIR
from vllm_selfextend.evaluation.passkey import COMPLETED, make_text

MAX_MODEL_LEN = 4096
LENGTHS = (60, 4000)
NUM_PROMPTS = 60
NEW_TOKENS = 24
CLEAR = 0.05
CACHE_BYTES = 40 << 20
KINDS = {"answer": 50, "stream": 25, "broken off": 15, "bad": 10}
"""What a client asks for next, and how often."""

BAD_REQUESTS: tuple[dict[str, Any], ...] = (
    {"prompt": [3] * (MAX_MODEL_LEN + 1)},  # too long
    {"prompt": [3] * MAX_MODEL_LEN, "max_tokens": 1},  # no room for an answer
    {"prompt": [10**6]},  # no such token
    {"prompt": "x", "max_tokens": -1},
    {"prompt": "x", "temperature": -1.0},
)

console = Console()
errors = Console(stderr=True)


@dataclass(frozen=True)
class Request:
    """A prompt's tokens, and what it was answered when it was alone."""

    prompt: list[int]
    answer: str


class Clients:
    """What the clients ask, and what became of it.

    Attributes:
        counts: Requests by kind, and what went wrong, by what it was.

    """

    def __init__(self, client: openai.AsyncOpenAI, seed: int) -> None:
        self.client, self.rng = client, random.Random(seed)
        self.counts: Counter[str] = Counter()
        self.problems: list[str] = []
        self.requests: list[Request] = []

    async def ask_alone(self) -> None:
        """Prompts with clear answers, each asked with nothing beside it."""
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(MODEL_DIR)

        def encode(text: str, answer_begins: str) -> list[int]:
            return list(tokenizer(f"{text} {answer_begins}")["input_ids"])

        while len(self.requests) < NUM_PROMPTS:
            length = round(LENGTHS[0] * (LENGTHS[1] / LENGTHS[0]) ** self.rng.random())
            text, begins, _ = make_text(length, 1, self.rng.random(), COMPLETED, self.rng, encode)
            prompt = encode(text, begins)
            choice = (await self._complete(prompt, logprobs=2)).choices[0]
            best = [sorted(top.values(), reverse=True) for top in choice.logprobs.top_logprobs]
            if min(first - second for first, second in best) >= CLEAR:
                self.requests.append(Request(prompt, choice.text))
            self.counts["asked alone"] += 1

    async def keep_asking(self, until: float) -> None:
        """One client."""
        while time.monotonic() < until:
            (kind,) = self.rng.choices(list(KINDS), list(KINDS.values()))
            self.counts[kind] += 1
            try:
                await self._ask(kind, self.rng.choice(self.requests))
            except openai.OpenAIError as error:
                self._fail("lost", f"{kind}: {type(error).__name__}: {error}")

    async def _ask(self, kind: str, request: Request) -> None:
        if kind == "bad":
            bad = self.rng.choice(BAD_REQUESTS)
            try:
                await self.client.completions.create(model=NAME, **bad)
            except openai.BadRequestError:
                return
            self._fail("not refused", f"{str(bad)[:60]}")
            return
        if kind == "answer":
            text = (await self._complete(request.prompt)).choices[0].text
        else:
            text, chunks = "", self.rng.randrange(1, NEW_TOKENS)
            async with await self._complete(request.prompt, stream=True) as stream:
                async for chunk in stream:
                    text += chunk.choices[0].text
                    chunks -= 1
                    if kind == "broken off" and chunks == 0:
                        break
        is_right = request.answer.startswith(text) if kind == "broken off" else text == request.answer
        if not is_right:
            self._fail("wrong", f"{len(request.prompt)} tokens: {text!r} instead of {request.answer!r}")

    async def _complete(self, prompt: list[int], **settings: Any) -> Any:
        return await self.client.completions.create(
            model=NAME,
            prompt=prompt,
            temperature=0.0,
            max_tokens=NEW_TOKENS,
            extra_body={"ignore_eos": True},
            **settings,
        )

    def _fail(self, kind: str, what: str) -> None:
        self.counts[kind] += 1
        self.problems.append(f"{kind}: {what}")


def memory(server: psutil.Process) -> dict[str, int]:
    """Bytes that each of the server's processes has for itself alone, by its name."""
    processes = {f"{one.name()} {one.pid}": one for one in (server, *server.children(recursive=True))}
    return {name: one.memory_full_info().uss for name, one in processes.items()}


async def counter(client: openai.AsyncOpenAI, name: str) -> int:
    """One of vLLM's counters."""
    text = (await client._client.get(str(client.base_url).replace("/v1/", "/metrics"))).text
    return round(sum(float(line.rsplit(" ", 1)[1]) for line in text.splitlines() if line.startswith(f"vllm:{name}")))


async def soak(
    server: psutil.Process, client: openai.AsyncOpenAI, seconds: float, num_clients: int, seed: int
) -> dict[str, Any]:
    """Let the clients ask; what became of it."""
    clients = Clients(client, seed)
    await clients.ask_alone()
    start = time.monotonic()
    tasks = [asyncio.create_task(clients.keep_asking(start + seconds)) for _ in range(num_clients)]
    columns = TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn()
    before: dict[str, int] = {}
    with Progress(*columns, console=errors) as progress:
        bar = progress.add_task("asking", total=seconds)
        while (elapsed := time.monotonic() - start) < seconds:
            if not before and elapsed >= seconds / 10:
                before = memory(server)
            requests = sum(clients.counts[kind] for kind in KINDS)
            progress.update(
                bar, completed=elapsed, description=f"{requests:,} requests, {len(clients.problems)} problems"
            )
            await asyncio.sleep(0.5)
        progress.update(bar, description="waiting for the last answers")
        await asyncio.gather(*tasks)
    after = memory(server)
    return {
        "minutes": seconds / 60,
        "clients": num_clients,
        "processor": machine.device(torch.get_num_threads()),
        **{kind: clients.counts[kind] for kind in ("asked alone", *KINDS, "wrong", "lost", "not refused")},
        "preemptions": await counter(client, "num_preemptions_total"),
        "prefix_cache_hits": await counter(client, "prefix_cache_hits_total"),
        "megabytes": {name: [round(before[name] / 1e6, 1), round(after[name] / 1e6, 1)] for name in before},
        "problems": clients.problems,
    }


def result_table(result: dict[str, Any]) -> Table:
    """For people."""
    table = Table(title=f"{result['minutes']:g} minutes, {result['clients']} clients", box=rich.box.SIMPLE_HEAD)
    table.add_column("")
    table.add_column("", justify="right")
    for name, value in result.items():
        if isinstance(value, int) and name != "clients":
            table.add_row(name.replace("_", " "), f"{value:,}")
    for name, (first, last) in result["megabytes"].items():
        table.add_row(f"MB of {name}, after a tenth and at the end", f"{first:,} {last:,} ({last / first - 1:+.1%})")
    return table


def main(
    minutes: Annotated[float, typer.Option(min=0.1, help="How long the clients ask.")] = 2.0,
    clients: Annotated[int, typer.Option(min=1, help="How many ask at a time.")] = 200,
    growth: Annotated[float, typer.Option(min=0.0, help="Percent that a process may grow by.")] = 2.0,
    seed: Annotated[int, typer.Option(help="Of what is asked.")] = 0,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the result to this file.")] = None,
    log: Annotated[Path | None, typer.Option(help="Where the server's log goes; else it is dropped.")] = None,
) -> None:
    """Keep a server under load and hold every answer against the same request's when it was alone."""
    options = ["--attention-backend", "CUSTOM", "--max-model-len", MAX_MODEL_LEN, "--max-num-seqs", 64]
    options += ["--kv-cache-memory-bytes", CACHE_BYTES]
    # A server that closes an idle connection in the moment that a client takes it up again has lost nothing.
    environment = {"VLLM_HTTP_TIMEOUT_KEEP_ALIVE": "3600"}
    # oneDNN keeps code for every batch size it has met, 1,024 matrix products at most unless told otherwise: the linear
    # layers' memory would grow for a quarter of an hour, with stock vLLM too, and hide what really grows.
    environment["ONEDNN_PRIMITIVE_CACHE_CAPACITY"] = "32"
    with (
        tempfile.TemporaryDirectory() as folder,
        serve(MODEL_DIR, log or Path(folder) / "log", *options, **environment) as server,
    ):
        client = openai.AsyncOpenAI(base_url=server.client.base_url, api_key="none", max_retries=0, timeout=600)
        result = asyncio.run(soak(psutil.Process(server.process.pid), client, 60 * minutes, clients, seed))
    if json_file is not None:
        json_file.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    console.print(result_table(result))
    for problem in result["problems"][:20]:
        console.print(problem, style="red", markup=False)
    grown = [name for name, (first, last) in result["megabytes"].items() if last > first * (1 + growth / 100)]
    for name in grown:
        console.print(f"{name} has grown by more than {growth:g} %.", style="red")
    if result["problems"] or grown:
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
