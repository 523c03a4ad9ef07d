"""vLLM's V2 model runner, a GPU's default, with the Triton kernels: the tokens of the first runner and the C++ kernels.

In Triton's interpreter (see `v2_runner.py`), so prompts are few and short. Speculation with n-grams cannot be had
there: vLLM's own `_ngram_finalize_kernel` has a mask that the interpreter refuses ("mask has unsupported dtype").
"""

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from vllm import LLM, SamplingParams

from .models import random_prompts

NEW_TOKENS = 6
LENGTHS = (5, 40, 65, 130)  # within the trained length of 64, just past it, and far past it
SETTINGS = {"attention_backend": "CUSTOM", "max_model_len": 160}
NUMBERS = {"group_size": 6, "neighbor_window": 16}


def prompts() -> list[list[int]]:
    return random_prompts(LENGTHS, seed=11)


@pytest.fixture(scope="module")
def on_v2() -> Iterator[Callable[..., dict[str, Any]]]:
    """A function that runs a case on the V2 runner, all in one process."""
    with subprocess.Popen(
        [sys.executable, "-m", "tests.engine.v2_runner"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[2],
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None

        def run(settings: dict[str, Any], texts: list[list[int]], rounds: int = 1) -> dict[str, Any]:
            case = {"settings": settings, "prompts": texts, "new_tokens": NEW_TOKENS, "rounds": rounds}
            process.stdin.write(json.dumps(case) + "\n")
            process.stdin.flush()
            line = process.stdout.readline()
            assert line, "the process ended; its stderr says why"
            found: dict[str, Any] = json.loads(line)
            assert found["runner"] == "vllm.v1.worker.cpu.model_runner.CPUModelRunner"
            return found

        yield run
        process.stdin.close()


@pytest.fixture(scope="module")
def on_v1(start_engine: Callable[..., LLM]) -> Callable[..., list[list[int]]]:
    """A function that runs it on the first runner, with the C++ kernels."""

    def run(settings: dict[str, Any], texts: list[list[int]]) -> list[list[int]]:
        llm = start_engine(**settings, enable_prefix_caching=False)
        sampling = SamplingParams(temperature=0.0, max_tokens=NEW_TOKENS, ignore_eos=True, detokenize=False)
        outputs = llm.generate([{"prompt_token_ids": text} for text in texts], sampling, use_tqdm=False)
        return [list(output.outputs[0].token_ids) for output in outputs]

    return run


def serve(model: str, kernel: str, **settings: Any) -> dict[str, Any]:
    numbers = {**NUMBERS, "kernel": kernel}
    return {**SETTINGS, "model": model, "additional_config": {"self_extend": numbers}, **settings}


def test_in_a_batch_in_chunks_and_on_a_prefix_hit(checkpoint: Callable, on_v1: Callable, on_v2: Callable) -> None:
    model = checkpoint("llama")
    expected = on_v1(serve(model, "cpu"), prompts())
    found = on_v2(serve(model, "triton", max_num_batched_tokens=64), prompts(), rounds=2)
    assert found["answers"] == [expected, expected]
    assert found["counters"]["vllm:prefix_cache_hits"] > sum(LENGTHS) // 2


def test_sliding_layers_beside_full_ones(checkpoint: Callable, on_v1: Callable, on_v2: Callable) -> None:
    model = checkpoint("gemma3")
    expected = on_v1(serve(model, "cpu"), prompts())
    assert on_v2(serve(model, "triton"), prompts())["answers"] == [expected]


def test_an_fp8_cache(checkpoint: Callable, on_v1: Callable, on_v2: Callable) -> None:
    fp8 = {"kv_cache_dtype": "fp8"}
    model = checkpoint("llama")
    expected = on_v1(serve(model, "cpu", **fp8), prompts())
    assert on_v2(serve(model, "triton", **fp8), prompts())["answers"] == [expected]


def test_a_draft_model(checkpoint: Callable, on_v1: Callable, on_v2: Callable) -> None:
    model = checkpoint("llama")
    drafts = {"method": "draft_model", "model": model, "num_speculative_tokens": 3}
    expected = on_v1(serve(model, "cpu"), prompts())
    found = on_v2(serve(model, "triton", speculative_config=drafts), prompts())
    assert found["answers"] == [expected]
    counters = found["counters"]
    drafted, accepted = (counters[f"vllm:spec_decode_num_{kind}_tokens"] for kind in ("draft", "accepted"))
    # A model that drafts for itself is right at every length, if it is extended as a draft too.
    assert accepted > 0.9 * drafted > 0


def test_after_preemption(checkpoint: Callable, on_v1: Callable, on_v2: Callable) -> None:
    # Room for 4 prompts of 4 blocks, 17 blocks in all: as the answers grow into a fifth block, some must give way.
    a_token = 3 * 2 * 2 * 32 * 4  # 3 layers, keys and values, 2 heads of 32 float32
    memory = {"kv_cache_memory_bytes": 18 * 16 * a_token, "block_size": 16, "enable_prefix_caching": False}
    texts = random_prompts([62] * 4, seed=3)
    model = checkpoint("llama")
    expected = on_v1(serve(model, "cpu"), texts)
    found = on_v2(serve(model, "triton", **memory), texts)
    assert found["counters"]["vllm:num_preemptions"] > 0
    assert found["answers"] == [expected]
