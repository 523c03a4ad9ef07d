"""The same request gives the same tokens however vLLM runs it."""

from collections.abc import Callable

import pytest
import torch
from vllm import LLM, SamplingParams

from tests.support.models import TRAINED_LENGTH, VOCAB_SIZE, random_prompts
from vllm_selfextend.method.plan import read_plan

NEW_TOKENS = 12
LENGTHS = (1, 15, 16, 17, 40, 63, 64, 65, 100, 127, 128, 129, 200, 513, 700, 1000)
SAMPLING = SamplingParams(temperature=0.0, max_tokens=NEW_TOKENS, ignore_eos=True, detokenize=False, logprobs=0)
SETTINGS = {
    "attention_backend": "CUSTOM",
    "max_model_len": 16 * TRAINED_LENGTH,
    "additional_config": {"self_extend": {"neighbor_window": 16}},
}
"""Group sizes up to 22, another every 6 positions up to 144."""

Answers = list[tuple[list[int], list[float]]]
"""Tokens, and the log-probability of each."""


def prompts() -> list[list[int]]:
    return random_prompts(LENGTHS, seed=1)


def answers(llm: LLM, texts: list[list[int]]) -> Answers:
    outputs = llm.generate([{"prompt_token_ids": text} for text in texts], SAMPLING, use_tqdm=False)
    found = [output.outputs[0] for output in outputs]
    return [
        (
            list(one.token_ids),
            [step[token].logprob for token, step in zip(one.token_ids, one.logprobs, strict=True)],
        )
        for one in found
    ]


def check(found: Answers, expected: Answers) -> None:
    """Hold answers against others: the same tokens, as likely."""
    for (tokens, logprobs), (wanted, wanted_logprobs) in zip(found, expected, strict=True):
        assert tokens == wanted
        assert logprobs == pytest.approx(wanted_logprobs, abs=1e-4)


def counter(llm: LLM, name: str) -> int:
    return sum(metric.value for metric in llm.get_metrics() if metric.name == name)


@pytest.fixture(scope="module")
def alone(checkpoint: Callable, start_engine: Callable) -> Answers:
    """Each request by itself, prefilled in one piece, nothing reused."""
    llm = start_engine(checkpoint("llama"), **SETTINGS, max_num_batched_tokens=1024, enable_prefix_caching=False)
    return [answers(llm, [text])[0] for text in prompts()]


@pytest.mark.parametrize("chunk", [64, 512, 16384])
def test_in_a_batch_with_chunks_and_on_a_prefix_hit(
    chunk: int, alone: Answers, checkpoint: Callable, start_engine: Callable
) -> None:
    llm = start_engine(checkpoint("llama"), **SETTINGS, max_num_batched_tokens=chunk, enable_chunked_prefill=True)
    check(answers(llm, prompts()), alone)
    hits = counter(llm, "vllm:prefix_cache_hits")
    check(answers(llm, prompts()), alone)
    assert counter(llm, "vllm:prefix_cache_hits") - hits > sum(LENGTHS) // 2


@pytest.mark.parametrize(("times", "chunk"), [(2, 512), (4, 64)])
def test_on_a_server_of_another_length(
    times: int, chunk: int, alone: Answers, checkpoint: Callable, start_engine: Callable
) -> None:
    """What a query sees follows from its position, not from how much the server could read."""
    settings = SETTINGS | {"max_model_len": times * TRAINED_LENGTH}
    llm = start_engine(checkpoint("llama"), **settings, max_num_batched_tokens=chunk)
    fitting = [n for n, length in enumerate(LENGTHS) if length + NEW_TOKENS <= times * TRAINED_LENGTH]
    assert LENGTHS[fitting[-1]] >= (times - 1) * TRAINED_LENGTH
    check(answers(llm, [prompts()[n] for n in fitting]), [alone[n] for n in fitting])


def test_on_prefixes_that_end_in_other_group_sizes(
    alone: Answers, checkpoint: Callable, start_engine: Callable
) -> None:
    """A key is the same for a query of any group size."""
    llm = start_engine(checkpoint("llama"), **SETTINGS)
    text, cuts = prompts()[-1], (32, 96, 224, 480, 704)
    for cut in cuts:
        answers(llm, [text[:cut]])
    hits = counter(llm, "vllm:prefix_cache_hits")
    check(answers(llm, [text]), alone[-1:])
    assert counter(llm, "vllm:prefix_cache_hits") - hits == cuts[-1]
    plan = read_plan(llm.llm_engine.vllm_config)
    assert len({plan.group_size_at(length) for length in (*cuts, len(text))}) == 6


def test_after_preemption(checkpoint: Callable, start_engine: Callable) -> None:
    # Room for 16 prompts of 4 blocks, 65 blocks in all: as the answers grow into a fifth block, some must give way.
    a_token = 3 * 2 * 2 * 32 * 4  # 3 layers, keys and values, 2 heads of 32 float32
    memory = {"kv_cache_memory_bytes": 66 * 16 * a_token, "block_size": 16, "enable_prefix_caching": False}
    generator = torch.Generator().manual_seed(3)
    texts = torch.randint(3, VOCAB_SIZE, (16, 60), generator=generator).tolist()
    numbers = {"neighbor_window": 16, "trained_length": 40}
    llm = start_engine(
        checkpoint("llama"),
        attention_backend="CUSTOM",
        max_model_len=128,
        additional_config={"self_extend": numbers},
        **memory,
    )
    one_by_one = [answers(llm, [text])[0] for text in texts]
    assert counter(llm, "vllm:num_preemptions") == 0
    check(answers(llm, texts), one_by_one)
    assert counter(llm, "vllm:num_preemptions") > 0


@pytest.mark.parametrize("block_size", [128, 256])
def test_with_other_block_sizes(block_size: int, alone: Answers, checkpoint: Callable, start_engine: Callable) -> None:
    llm = start_engine(checkpoint("llama"), **SETTINGS, block_size=block_size)
    check(answers(llm, prompts()), alone)


def test_compiled(alone: Answers, checkpoint: Callable, start_engine: Callable) -> None:
    llm = start_engine(checkpoint("llama"), **SETTINGS, enforce_eager=False)
    check(answers(llm, prompts()), alone)


def test_with_ngram_speculation(
    alone: Answers, checkpoint: Callable, start_engine: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    # In processes of its own: it loads numba, after which vLLM cannot start a second engine in the same process.
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
    speculation = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 2, "prompt_lookup_min": 1}
    llm = start_engine(checkpoint("llama"), **SETTINGS, speculative_config=speculation)
    check(answers(llm, prompts()), alone)
    assert counter(llm, "vllm:spec_decode_num_draft_tokens") > 0


@pytest.mark.parametrize("draft", ["llama", "llama-mqa"])
def test_with_a_draft_model(draft: str, alone: Answers, checkpoint: Callable, start_engine: Callable) -> None:
    speculation = {"method": "draft_model", "model": checkpoint(draft), "num_speculative_tokens": 3}
    llm = start_engine(checkpoint("llama"), **SETTINGS, speculative_config=speculation)
    check(answers(llm, prompts()), alone)
    drafted = counter(llm, "vllm:spec_decode_num_draft_tokens")
    accepted = counter(llm, "vllm:spec_decode_num_accepted_tokens")
    assert drafted > 0
    if draft == "llama":
        # A model that drafts for itself is right at every length, if it is extended as a draft too.
        assert accepted > 0.9 * drafted


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_low_precision_is_close_to_float32(dtype: str, checkpoint: Callable, start_engine: Callable) -> None:
    """Rounding may change a random model's tokens; the log-probabilities of a text stay close."""
    scores = []
    sampling = SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=0, detokenize=False)
    text = prompts()[12]
    for kind in ("float32", dtype):
        llm = start_engine(checkpoint("llama"), **SETTINGS, dtype=kind)
        (output,) = llm.generate({"prompt_token_ids": text}, sampling, use_tqdm=False)
        scores.append(
            torch.tensor(
                [step[token].logprob for step, token in zip(output.prompt_logprobs[1:], text[1:], strict=True)]
            )
        )
    assert (scores[0] - scores[1]).abs().mean() < (0.15 if dtype == "bfloat16" else 0.02)
