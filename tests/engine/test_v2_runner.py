"""vLLM's V2 model runner, a GPU's default, with the Triton kernels: the tokens of the first runner and the C++ kernels.

In Triton's interpreter (see `v2_runner.py`), so prompts are few and short. Speculation with n-grams cannot be had
there: vLLM's own `_ngram_finalize_kernel` has a mask that the interpreter refuses ("mask has unsupported dtype").
"""

import json
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from vllm import LLM

from tests.support.models import random_prompts

from . import v2_runner
from .changed_models import save_random_adapter
from .draft_heads import save_model_and_heads

NEW_TOKENS = 6
LENGTHS = (5, 40, 65, 130)  # within the trained length of 64, just past it, and far past it
SETTINGS = {"attention_backend": "CUSTOM", "max_model_len": 160}


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

        def run(settings: dict[str, Any], texts: list[list[int]], **others: Any) -> dict[str, Any]:
            process.stdin.write(json.dumps(make_case(settings, texts, **others)) + "\n")
            process.stdin.flush()
            line = process.stdout.readline()
            assert line, "the process ended; its stderr says why"
            found: dict[str, Any] = json.loads(line)
            assert set(found["runners"]) == {"vllm.v1.worker.cpu.model_runner.CPUModelRunner"}
            assert not any(found["cold_layers"]), "kernels were left for a request to compile"
            return found

        yield run
        process.stdin.close()


@pytest.fixture(scope="module")
def on_v1(start_engine: Callable[..., LLM]) -> Callable[..., dict[str, Any]]:
    """A function that runs it on the first runner, with the C++ kernels; the same case only once."""
    known: dict[str, dict[str, Any]] = {}

    def run(settings: dict[str, Any], texts: list[list[int]], **others: Any) -> dict[str, Any]:
        case = make_case({**settings, "enable_prefix_caching": False}, texts, **others)
        if (key := json.dumps(case)) not in known:
            known[key] = v2_runner.run(case, start_engine)
            assert set(known[key]["runners"]) == {"vllm.v1.worker.cpu_model_runner.CPUModelRunner"}
        return known[key]

    return run


def make_case(
    settings: dict[str, Any],
    texts: list[list[int]],
    adapters: list[str | None] | None = None,
    rounds: Sequence[dict[str, Any] | None] = (None,),
) -> v2_runner.Case:
    return {
        "settings": settings,
        "prompts": texts,
        "adapters": adapters or [None] * len(texts),
        "new_tokens": NEW_TOKENS,
        "rounds": list(rounds),
    }


def serve(model: str, kernel: str, **settings: Any) -> dict[str, Any]:
    numbers = {"neighbor_window": 16, "kernel": kernel}
    return {**SETTINGS, "model": model, "additional_config": {"self_extend": numbers}, **settings}


def test_in_a_batch_in_chunks_and_on_a_prefix_hit(checkpoint: Callable, on_v1: Callable, on_v2: Callable) -> None:
    model = checkpoint("llama")
    expected = on_v1(serve(model, "cpu"), prompts())["answers"]
    found = on_v2(serve(model, "triton", max_num_batched_tokens=64), prompts(), rounds=(None, None))
    assert found["answers"] == expected * 2
    assert found["counters"]["vllm:prefix_cache_hits"] > sum(LENGTHS) // 2
    # Within the trained length, neighbors, and grouped keys of which each row sees one more, or all.
    everything = [[False, False, 0], [False, True, 0], [True, True, 0], [True, True, 16]]
    assert found["flash_calls"] == everything
    # What vLLM measures before it sizes its cache is what steps have.
    assert found["profiled_workspace"] == found["workspace"] > 0


def test_sliding_layers_beside_full_ones(checkpoint: Callable, on_v1: Callable, on_v2: Callable) -> None:
    model = checkpoint("gemma3")
    expected = on_v1(serve(model, "cpu"), prompts())["answers"]
    assert on_v2(serve(model, "triton"), prompts())["answers"] == expected


def test_an_fp8_cache(checkpoint: Callable, on_v1: Callable, on_v2: Callable) -> None:
    fp8 = {"kv_cache_dtype": "fp8"}
    model = checkpoint("llama")
    expected = on_v1(serve(model, "cpu", **fp8), prompts())["answers"]
    found = on_v2(serve(model, "triton", **fp8), prompts())
    assert found["answers"] == expected
    assert [is_paged for is_paged, _, _ in found["flash_calls"]] == [False, False]


def test_a_draft_model(checkpoint: Callable, on_v1: Callable, on_v2: Callable) -> None:
    model = checkpoint("llama")
    drafts = {"method": "draft_model", "model": model, "num_speculative_tokens": 3}
    expected = on_v1(serve(model, "cpu"), prompts())["answers"]
    found = on_v2(serve(model, "triton", speculative_config=drafts), prompts())
    assert found["answers"] == expected
    counters = found["counters"]
    drafted, accepted = (counters[f"vllm:spec_decode_num_{kind}_tokens"] for kind in ("draft", "accepted"))
    # A model that drafts for itself is right at every length, if it is extended as a draft too.
    assert accepted > 0.9 * drafted > 0


def test_an_eagle_head(on_v1: Callable, on_v2: Callable, tmp_path: Path) -> None:
    paths, texts = save_model_and_heads(tmp_path), prompts()[1:]
    drafts = {"method": "eagle", "model": paths["eagle"], "num_speculative_tokens": 3}
    expected = on_v1(serve(paths["model"], "cpu"), texts)["answers"]
    found = on_v2(serve(paths["model"], "triton", speculative_config=drafts), texts)
    assert found["answers"] == expected
    counters = found["counters"]
    drafted, accepted = (counters[f"vllm:spec_decode_num_{kind}_tokens"] for kind in ("draft", "accepted"))
    assert accepted > 0.4 * drafted > 0  # see test_draft_heads


def test_after_preemption(checkpoint: Callable, on_v1: Callable, on_v2: Callable) -> None:
    # Room for 4 prompts of 4 blocks, 17 blocks in all: as the answers grow into a fifth block, some must give way.
    a_token = 3 * 2 * 2 * 32 * 4  # 3 layers, keys and values, 2 heads of 32 float32
    memory = {"kv_cache_memory_bytes": 18 * 16 * a_token, "block_size": 16, "enable_prefix_caching": False}
    texts = random_prompts([62] * 4, seed=3)
    model = checkpoint("llama")
    expected = on_v1(serve(model, "cpu"), texts)["answers"]
    found = on_v2(serve(model, "triton", **memory), texts)
    assert found["counters"]["vllm:num_preemptions"] > 0
    assert found["answers"] == expected


def test_lora(checkpoint: Callable, on_v1: Callable, on_v2: Callable, tmp_path: Path) -> None:
    model = checkpoint("llama")
    text = prompts()[2]
    adapters = [save_random_adapter("llama", tmp_path), None]
    # With a single one, vLLM's LoRA for CPUs takes it for requests without an adapter too: their index is -1.
    lora = {"enable_lora": True, "max_loras": 2}
    expected = on_v1(serve(model, "cpu", **lora), [text] * 2, adapters=adapters)["answers"]
    assert on_v2(serve(model, "triton", **lora), [text] * 2, adapters=adapters)["answers"] == expected
    adapted, plain = expected[0]
    assert plain == on_v1(serve(model, "cpu"), prompts())["answers"][0][2]
    assert adapted != plain


def test_tensor_parallel(checkpoint: Callable, on_v1: Callable, on_v2: Callable) -> None:
    model = checkpoint("llama")
    expected = on_v1(serve(model, "cpu"), prompts())["answers"]
    # Two processes, each with one of the two KV heads.
    found = on_v2(serve(model, "triton", tensor_parallel_size=2), prompts()[:3:2])
    assert len(found["runners"]) == 2
    assert found["answers"] == [expected[0][:3:2]]


def test_graphs_replayed_for_other_batches(checkpoint: Callable, on_v1: Callable, on_v2: Callable) -> None:
    model = checkpoint("gemma3")
    rounds = [{"mode": "FULL", "microbatches": microbatches} for microbatches in (False, True)]
    limits = {"max_num_batched_tokens": 48, "max_num_seqs": 8}
    expected = on_v1(serve(model, "cpu"), prompts())
    found = on_v2(serve(model, "triton", **limits), prompts(), rounds=rounds)
    assert found["answers"] == expected["answers"] * len(rounds)
    for logprobs in found["logprobs"]:
        assert logprobs == pytest.approx(expected["logprobs"][0], abs=1e-4)
    # The last token of a prefill is an answer's first; 5 decodes of 4 requests follow, padded to 6, and a dummy batch.
    decodes, in_microbatches = found["replayed"]
    assert [one["mode"] for one in found["replayed"]] == ["FULL_DECODE_ONLY"] * 2
    assert decodes["steps"] == {"NONE 48": 5, "NONE 13": 1, "FULL 6": 6}  # chunks of the prompts, and the last one
    assert in_microbatches["steps"] == {"NONE 20": 4, "FULL 6": 3}
    assert in_microbatches["empty_microbatches"] == 3
    assert all(one["null_block_is_untouched"] for one in found["replayed"])
