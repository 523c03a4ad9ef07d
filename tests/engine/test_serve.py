"""`vllm serve` with the demo model, as a user would run it: a server process, the `openai` client, signals."""

import random
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import httpx
import openai
import psutil
import pytest

from tests.support.passkeys import SENTENCE, Passkey, make_prompt
from tests.support.servers import Server, serve
from vllm_selfextend.demo import MODEL_DIR

from .commands import run

MAX_MODEL_LEN = 4096
PROMPT_TOKENS = 3000


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    options = ["--attention-backend", "CUSTOM", "--max-model-len", MAX_MODEL_LEN]
    options += ["--kv-cache-memory-bytes", 512 << 20]
    with serve(MODEL_DIR, tmp_path_factory.mktemp("serve") / "log", *options) as running:
        yield running


def long_prompt(seed: int) -> Passkey:
    rng = random.Random(seed)
    return make_prompt(PROMPT_TOKENS, rng.random(), rng)


def test_a_long_prompt_is_answered(server: Server) -> None:
    prompt = long_prompt(0)
    completion = server.complete(prompt.text)
    assert 0 <= PROMPT_TOKENS - completion.usage.prompt_tokens < SENTENCE
    assert completion.choices[0].text.strip() == prompt.answer


def test_a_long_prompt_is_answered_as_a_stream(server: Server) -> None:
    counts = []
    for prompt in map(long_prompt, (1, 36, 37)):
        pieces = [chunk.choices[0].text for chunk in server.complete(prompt.text, stream=True)]
        assert "".join(pieces).strip() == prompt.answer
        counts.append(len(pieces))
    # What a busy machine falls behind with comes together.
    assert max(counts) >= 5


def test_a_long_chat_message_is_answered(server: Server) -> None:
    prompt = long_prompt(34)
    completion = server.chat(prompt.text)
    assert 0 <= PROMPT_TOKENS - completion.usage.prompt_tokens < SENTENCE
    assert completion.choices[0].message.content.strip() == prompt.answer


def test_a_long_chat_message_is_answered_as_a_stream(server: Server) -> None:
    counts = []
    for prompt in map(long_prompt, (35, 38, 39)):
        pieces = [chunk.choices[0].delta.content or "" for chunk in server.chat(prompt.text, stream=True)]
        assert "".join(pieces).strip() == prompt.answer
        counts.append(len(list(filter(None, pieces))))
    assert max(counts) >= 5


def test_the_example_client(server: Server) -> None:
    output = run("python examples/openai_client.py --base-url", f"{server.url}/v1")
    assert [line.rstrip().partition(": ") for line in output.splitlines()[1:]] == [
        (way, ": ", "4 1 7 2 9") for way in ("completion", "stream", "chat")
    ]


def test_concurrent_clients_get_their_own_keys(server: Server) -> None:
    prompts = [long_prompt(seed) for seed in range(2, 34)]
    assert len({prompt.answer for prompt in prompts}) == len(prompts)
    with ThreadPoolExecutor(len(prompts)) as pool:
        completions = list(pool.map(lambda prompt: server.complete(prompt.text), prompts))
    answers = [completion.choices[0].text.strip() for completion in completions]
    assert answers == [prompt.answer for prompt in prompts]


def test_a_prompt_past_max_model_len_is_refused_and_the_server_lives_on(server: Server) -> None:
    with pytest.raises(openai.BadRequestError, match=f"maximum context length is {MAX_MODEL_LEN} tokens") as refused:
        server.complete(make_prompt(MAX_MODEL_LEN + SENTENCE, 0.5, random.Random(0)).text)
    assert refused.value.status_code == 400
    prompt = long_prompt(0)
    assert server.complete(prompt.text).choices[0].text.strip() == prompt.answer


def test_the_metrics_count_requests_past_the_trained_length(server: Server) -> None:
    def counts() -> list[float]:
        """How many were past it, of these with a group size of at most 24, and how many of all ended."""
        lines = httpx.get(f"{server.url}/metrics").text.splitlines()
        wanted = "vllm_selfextend:request_group_size_count{", 'le="24.0"', "vllm:request_success_total{"
        return [
            sum(float(line.rpartition(" ")[2]) for line in lines if words in line and line.startswith("vllm"))
            for words in wanted
        ]

    before = counts()
    server.complete("The sky is blue.")
    prompt = make_prompt(2000, 0.5, random.Random(0))
    server.complete(prompt.text)
    server.complete(long_prompt(0).text)
    gained = [after - earlier for after, earlier in zip(counts(), before, strict=True)]
    # (i - 64) / 105 is 18.4 at 2,000 tokens and 28 at 3,000.
    assert gained == [2, 1, 3]


def test_the_log_says_what_was_chosen(server: Server) -> None:
    text = server.log.read_text()
    assert text.count("Self-Extend: trained length 256, neighbor window 64, group size by position, ") == 1


def test_sigterm_ends_it_cleanly(server: Server) -> None:
    family = [server.process.pid, *(child.pid for child in psutil.Process(server.process.pid).children(recursive=True))]
    server.process.send_signal(signal.SIGTERM)
    code = server.process.wait(timeout=60)
    _, alive = psutil.wait_procs([psutil.Process(pid) for pid in family if psutil.pid_exists(pid)], timeout=20)
    assert not alive
    assert code == 0, server.log.read_text()[-3000:]
    # Stock vLLM races here: AsyncLLM.shutdown closes the engine's client, whose end its output handler logs as an
    # EngineDeadError if it runs before it is cancelled (vllm/v1/engine/async_llm.py). Nothing else may fail.
    tracebacks = [line for line in server.log.read_text().splitlines() if "Traceback" in line]
    assert [line for line in tracebacks if "[async_llm.py:" not in line] == []
