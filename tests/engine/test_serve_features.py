"""A server of two engines (`--data-parallel-size 2`), and what else clients ask of one, past the trained length.

Only Self-Extend finds a key in so long a text, so the right key stands for the plain run's tokens.
"""

import json
import random
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from prometheus_client.parser import text_string_to_metric_families

from tests.support.passkeys import Passkey, make_prompt
from tests.support.servers import NAME, Server, serve
from vllm_selfextend.demo import MODEL_DIR
from vllm_selfextend.evaluation.passkey import CITIES

from .changed_models import save_changed

MAX_MODEL_LEN = 4096
PROMPT_TOKENS = 3000


def save_model_that_writes_json(path: Path) -> str:
    """The demo's model with what JSON needs beside its words, as tokens that it reads like words it knows.

    To the model `{"oslo":"41729"}` is `oslo 41729.`, as it goes on after "The pass key:". All up to the digits is one
    token: in pieces, the grammar would let the model begin with a plain `oslo`, which no token goes on from.
    """
    alike = {**{f'{{"{city.lower()}":"': city.lower() for city in CITIES}, '"}': "."}
    tokenizer_file = MODEL_DIR / "tokenizer.json"
    tokenizer = json.loads(tokenizer_file.read_text())
    vocab = tokenizer["model"]["vocab"]
    rows = [vocab[word] for word in alike.values()]

    def lengthen(name: str, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        if name == "model.embed_tokens.weight":
            weight = torch.cat([weight, weight[rows]])
        if name == "lm_head.weight":  # never said but where nothing else may be
            weight = torch.cat([weight, torch.zeros_like(weight[rows])])
        return {name: weight}

    save_changed(str(MODEL_DIR), path, lengthen, vocab_size=len(vocab) + len(alike))
    vocab |= {word: len(vocab) + index for index, word in enumerate(alike)}
    tokenizer["decoder"] = {"type": "Fuse"}  # no spaces between tokens
    (path / "tokenizer.json").write_text(json.dumps(tokenizer))
    return str(path)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("serve_features")
    options: list[Any] = ["--attention-backend", "CUSTOM", "--max-model-len", MAX_MODEL_LEN]
    options += ["--kv-cache-memory-bytes", 256 << 20, "--enforce-eager"]
    options += ["--data-parallel-size", 2, "--api-server-count", 1]
    options += ["--enable-auto-tool-choice", "--tool-call-parser", "hermes"]
    # Or each of the two wants a NUMA node of its own: for threads, in vLLM 0.33 for memory too, which 0 lets be.
    environment = {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_CPU_SIM_MULTI_NUMA": "0"}
    environment["VLLM_ENFORCE_STRICT_TOOL_CALLING"] = "0"  # a call is JSON alone: the model cannot write tags
    with serve(save_model_that_writes_json(folder / "model"), folder / "log", *options, **environment) as running:
        yield running


def long_prompt(seed: int) -> Passkey:
    rng = random.Random(seed)
    prompt = make_prompt(PROMPT_TOKENS, rng.random(), rng)
    return Passkey(prompt.text, prompt.answer.replace(" ", ""))


def answered_in_json(seed: int) -> tuple[str, dict[str, Any], dict[str, str]]:
    """A text that ends before the city and its key, the schema of both, and what should follow."""
    prompt = long_prompt(seed)
    text, city = prompt.text.lower().rsplit(" ", 1)
    schema = {
        "type": "object",
        "properties": {city: {"type": "string", "pattern": "^[0-9]{5}$"}},
        "required": [city],
        "additionalProperties": False,
    }
    return text, schema, {city: prompt.answer}


def requests_by_engine(server: Server) -> dict[str, float]:
    with urllib.request.urlopen(f"{server.url}/metrics") as response:
        families = text_string_to_metric_families(response.read().decode())
        counted: dict[str, float] = {}
        for sample in (sample for family in families for sample in family.samples):
            if sample.name == "vllm:request_success_total":
                engine = sample.labels["engine"]
                counted[engine] = counted.get(engine, 0) + sample.value
    return counted


def test_two_engines_behind_one_server(server: Server) -> None:
    before = requests_by_engine(server)
    prompts = [long_prompt(seed) for seed in range(8)]
    with ThreadPoolExecutor(len(prompts)) as pool:
        completions = list(pool.map(lambda prompt: server.complete(prompt.text), prompts))
    assert [completion.choices[0].text for completion in completions] == [prompt.answer for prompt in prompts]
    answered = {engine: count - before[engine] for engine, count in requests_by_engine(server).items()}
    assert set(answered) == {"0", "1"}
    assert sum(answered.values()) == len(prompts)
    assert min(answered.values()) > 0
    assert server.log.read_text().count("group size by position, 40 at 4096 tokens") == 1


def test_a_tool_is_called(server: Server) -> None:
    text, schema, expected = answered_in_json(10)
    function = {"name": "open_the_door", "parameters": schema}
    completion = server.chat(
        text,
        max_tokens=20,
        tools=[{"type": "function", "function": function}],
        tool_choice={"type": "function", "function": {"name": function["name"]}},
    )
    (call,) = completion.choices[0].message.tool_calls
    assert call.function.name == function["name"]
    assert json.loads(call.function.arguments) == expected


def test_a_chat_message_is_answered_by_a_schema(server: Server) -> None:
    text, schema, expected = answered_in_json(11)
    wanted = {"type": "json_schema", "json_schema": {"name": "key", "schema": schema}}
    completion = server.chat(text, max_tokens=20, response_format=wanted)
    assert json.loads(completion.choices[0].message.content) == expected


def test_the_responses_api(server: Server) -> None:
    prompt = long_prompt(12)
    settings = {"model": NAME, "max_output_tokens": 5, "temperature": 0.0}
    response = server.client.responses.create(input=prompt.text, **settings)
    assert response.output_text == prompt.answer
    assert response.usage.input_tokens > PROMPT_TOKENS - 10
    events = list(server.client.responses.create(input=prompt.text, stream=True, **settings))
    pieces = [event.delta for event in events if event.type == "response.output_text.delta"]
    assert "".join(pieces) == prompt.answer


def test_the_responses_api_by_a_schema(server: Server) -> None:
    text, schema, expected = answered_in_json(13)
    response = server.client.responses.create(
        model=NAME,
        input=text,
        max_output_tokens=20,
        temperature=0.0,
        text={"format": {"type": "json_schema", "name": "key", "schema": schema}},
    )
    assert json.loads(response.output_text) == expected


def test_vllm_bench_serve(server: Server, tmp_path: Path) -> None:
    prompt_tokens, new_tokens, requests = 1500, 8, 6
    command: list[Any] = [Path(sys.executable).with_name("vllm"), "bench", "serve", "--base-url", server.url]
    command += ["--model", NAME, "--tokenizer", MODEL_DIR, "--num-prompts", requests, "--dataset-name", "random"]
    command += ["--random-input-len", prompt_tokens, "--random-output-len", new_tokens, "--ignore-eos"]
    command += ["--save-result", "--result-dir", tmp_path, "--result-filename", "result.json"]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads((tmp_path / "result.json").read_text())
    assert (result["completed"], result["failed"]) == (requests, 0)
    assert result["total_output_tokens"] == requests * new_tokens
    assert result["total_input_tokens"] >= requests * prompt_tokens
