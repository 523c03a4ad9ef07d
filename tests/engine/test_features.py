"""What vLLM can do with one engine, past the trained length too, each held against a run without it or the oracle.

Elsewhere: draft models and n-grams are in `test_same_tokens`, what needs a server in `test_serve` and
`test_serve_features`, `vllm run-batch` in `test_run_batch`.
"""

import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from vllm import LLM, SamplingParams
from vllm.lora.request import LoRARequest
from vllm.sampling_params import BeamSearchParams, StructuredOutputsParams

from tests.support.cases import TOLERANCE
from tests.support.models import DIGITS, TRAINED_LENGTH, VOCAB_SIZE, random_prompts, save_tokenizer
from tests.support.oracle import SelfExtend, hidden_states
from tests.support.passkeys import make_prompt
from vllm_selfextend.backends import reference
from vllm_selfextend.demo import MODEL_DIR

from .changed_models import save_in_int8, save_merged, save_random_adapter

NEW_TOKENS = 8
LENGTHS = (5, 63, 65, 200, 700)  # within the trained length of 64, around it, and up to 11 times as long
GREEDY = SamplingParams(temperature=0.0, max_tokens=NEW_TOKENS, ignore_eos=True, detokenize=False, logprobs=0)
SETTINGS: dict[str, Any] = {
    "attention_backend": "CUSTOM",
    "max_model_len": 1024,
    "additional_config": {"self_extend": {"neighbor_window": 16}},
}
METHOD = SelfExtend("auto", 16, exact_len=TRAINED_LENGTH)
CHUNKS = {"max_num_batched_tokens": 96, "enable_chunked_prefill": True}
CLOSE = {"atol": 1e-3, "rtol": 0.0}


def prompts() -> list[list[int]]:
    return random_prompts(LENGTHS, seed=21)


def as_prompts(texts: list[list[int]]) -> list[dict[str, list[int]]]:
    return [{"prompt_token_ids": text} for text in texts]


def answers(llm: LLM, texts: list[list[int]], sampling: SamplingParams = GREEDY, **others: Any) -> list[list[int]]:
    outputs = llm.generate(as_prompts(texts), sampling, use_tqdm=False, **others)
    return [list(output.outputs[0].token_ids) for output in outputs]


def oracles_choices(
    oracle: Callable, model: str, texts: list[list[int]], found: list[list[int]], allowed: range = range(VOCAB_SIZE)
) -> list[list[int]]:
    """What the oracle chooses among the allowed tokens after each text and each token found, but the last."""
    logprobs = oracle(model, [text + answer[:-1] for text, answer in zip(texts, found, strict=True)], METHOD)
    steps = [scores[len(text) - 1 :, list(allowed)] for text, scores in zip(texts, logprobs, strict=True)]
    return [[allowed[index] for index in one.argmax(-1)] for one in steps]


def with_tokenizer(model: str, folder: Path) -> str:
    """A copy of a random model with `save_tokenizer`'s."""
    shutil.copytree(model, folder / "with-tokenizer")
    save_tokenizer(folder / "with-tokenizer")
    return str(folder / "with-tokenizer")


def test_tensor_parallel(checkpoint: Callable, start_engine: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    model = checkpoint("llama")
    expected = answers(start_engine(model, **SETTINGS), prompts())
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")  # or each of the two wants a NUMA node of its own
    llm = start_engine(model, **SETTINGS, tensor_parallel_size=2)
    # Two processes, each with one of the two KV heads.
    assert llm.collective_rpc(heads_and_kernels) == [(1, "SelfExtendImpl", "cpu")] * 2
    assert answers(llm, prompts()) == expected


def heads_and_kernels(worker: Any) -> tuple[int, str, str]:
    layer = next(iter(worker.vllm_config.compilation_config.static_forward_context.values()))
    return layer.num_kv_heads, type(layer.impl).__name__, layer.impl.plan.kernel


def test_two_lora_adapters_in_a_batch(
    checkpoint: Callable, start_engine: Callable, oracle: Callable, tmp_path: Path
) -> None:
    model = checkpoint("llama")
    adapters = [save_random_adapter("llama", tmp_path, seed) for seed in (1, 2)]
    requests = [None, *(LoRARequest(f"adapter {number}", number, path) for number, path in enumerate(adapters, 1))]
    # A slot more than there are adapters: vLLM's LoRA for CPUs takes index -1, "none", for the last one.
    llm = start_engine(model, **SETTINGS, **CHUNKS, enable_lora=True, max_loras=3)
    texts = prompts()
    batch = [(text, request) for text in texts for request in requests]
    found = answers(llm, [text for text, _ in batch], lora_request=[request for _, request in batch])
    merged = [model, *(save_merged(model, path, tmp_path) for path in adapters)]
    for number, path in enumerate(merged):
        of_one = found[number :: len(merged)]
        assert of_one == oracles_choices(oracle, path, texts, of_one), path
    assert all(len(set(map(tuple, found[turn : turn + 3]))) == 3 for turn in range(0, len(found), 3))


def test_weights_and_activations_in_int8(start_engine: Callable, tmp_path: Path) -> None:
    """W8A8. How far from float32 that is depends on the processor: four times as far with AVX2 alone as with AVX-512.

    So each answer of the kernels is held against the reference's, and what they say within the trained length against
    stock vLLM, by what int8 costs that on this machine.
    """
    in_int8, rounded = save_in_int8(str(MODEL_DIR), tmp_path)
    rng = random.Random(5)
    keys = [make_prompt(length, rng.random(), rng) for length in (200, 1000, 2000)]
    sampling = SamplingParams(temperature=0.0, max_tokens=5, prompt_logprobs=0)

    def scores(llm: LLM, some: list[Any]) -> list[torch.Tensor]:
        outputs = llm.generate([key.text for key in some], sampling, use_tqdm=False)
        assert [output.outputs[0].text.strip() for output in outputs] == [key.answer for key in some]
        return [torch.tensor(logprobs_of_prompt(output)) for output in outputs]

    settings = {"kv_cache_memory_bytes": 256 << 20, "skip_tokenizer_init": False}
    stock, stock_rounded = (
        scores(start_engine(path, max_model_len=256, **settings), keys[:1])[0] for path in (in_int8, rounded)
    )
    llm = start_engine(in_int8, attention_backend="CUSTOM", max_model_len=2048, **settings)
    layers = llm.llm_engine.vllm_config.compilation_config.static_forward_context.values()
    checked = [CheckedKernels(layer) for layer in layers]
    short, *_ = scores(llm, keys)
    assert checked
    assert all(one.longest > 1900 for one in checked)
    cost = (stock - stock_rounded).abs().mean()
    assert cost > 1e-4, "int8 is in use"
    assert (short - stock).abs().mean() < cost / 2


class CheckedKernels:
    """Takes the place of a layer's kernels: each answer of theirs is held against the reference's, past `L` too.

    It is to the same queries, keys and values, so that no rounding but the kernels' own comes between the two.
    """

    def __init__(self, layer: Any) -> None:
        self.kernels, self.cache, self.longest = layer.impl.layer_kernels, torch.empty(0), 0
        self.reference = reference.KERNELS.prepare(layer.impl.params(layer))
        layer.impl.layer_kernels = self

    def store(self, key: Any, value: Any, kv_cache: torch.Tensor, batch: Any) -> None:
        if self.cache.shape != kv_cache.shape:
            self.cache = torch.zeros_like(kv_cache)
        self.kernels.store(key, value, kv_cache, batch)
        self.reference.store(key, value, self.cache, batch)

    def attend(self, query: torch.Tensor, kv_cache: torch.Tensor, batch: Any, out: torch.Tensor, *room: Any) -> None:
        self.kernels.attend(query, kv_cache, batch, out, *room)
        wanted = torch.empty_like(out)
        self.reference.attend(query, self.cache, batch, wanted)
        allowed = TOLERANCE[out.dtype] * float(wanted.abs().max())
        torch.testing.assert_close(out, wanted, atol=allowed, rtol=0.0)
        self.longest = max(self.longest, int(batch.seq_lens.max()))


def logprobs_of_prompt(output: Any) -> list[float]:
    steps = zip(output.prompt_logprobs[1:], output.prompt_token_ids[1:], strict=True)
    return [step[token].logprob for step, token in steps]


def test_beam_search(checkpoint: Callable, start_engine: Callable, oracle: Callable, tmp_path: Path) -> None:
    model, width, steps = with_tokenizer(checkpoint("llama"), tmp_path), 3, 5
    llm = start_engine(model, **SETTINGS, **CHUNKS, skip_tokenizer_init=False)
    texts = prompts()[2:4]
    params = BeamSearchParams(beam_width=width, max_tokens=steps, ignore_eos=True)
    for text, output in zip(texts, llm.beam_search(as_prompts(texts), params), strict=True):
        beams = [(0.0, text)]
        for _ in range(steps):
            logprobs = oracle(model, [tokens for _, tokens in beams], METHOD)
            candidates = [
                (score + logprob, [*tokens, token])
                for (score, tokens), scores in zip(beams, logprobs, strict=True)
                for token, logprob in enumerate(scores[-1].tolist())
            ]
            beams = sorted(candidates, reverse=True)[:width]
        assert [beam.tokens for beam in output.sequences] == [tokens for _, tokens in beams]
        found = torch.tensor([beam.cum_logprob for beam in output.sequences])
        torch.testing.assert_close(found, torch.tensor([score for score, _ in beams]), **CLOSE)


def test_structured_output(checkpoint: Callable, start_engine: Callable, oracle: Callable, tmp_path: Path) -> None:
    model = with_tokenizer(checkpoint("llama"), tmp_path)
    llm = start_engine(model, **SETTINGS, **CHUNKS, skip_tokenizer_init=False)
    texts = prompts()
    pattern = StructuredOutputsParams(regex=f"[0-9]{{{NEW_TOKENS}}}")
    digits = SamplingParams(temperature=0.0, max_tokens=NEW_TOKENS, structured_outputs=pattern)
    # In one batch with requests that may say anything.
    found = answers(llm, texts * 2, [digits] * len(texts) + [GREEDY] * len(texts))
    constrained, free = found[: len(texts)], found[len(texts) :]
    assert constrained == oracles_choices(oracle, model, texts, constrained, DIGITS)
    assert free == oracles_choices(oracle, model, texts, free)


def test_logprobs_of_a_long_prompt(checkpoint: Callable, start_engine: Callable, oracle: Callable) -> None:
    """The five likeliest tokens and the prompt's own, after every token of a text, prefilled in chunks."""
    model = checkpoint("llama")
    (text,) = random_prompts([1016], seed=22)
    llm = start_engine(model, **SETTINGS, **CHUNKS)
    sampling = SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=5, detokenize=False)
    (output,) = llm.generate(as_prompts([text]), sampling, use_tqdm=False)
    (expected,) = oracle(model, [text], METHOD)
    assert output.prompt_logprobs[0] is None
    for token, found, wanted in zip(text[1:], output.prompt_logprobs[1:], expected, strict=False):
        best = sorted((one.logprob for one in found.values()), reverse=True)[:5]
        torch.testing.assert_close(torch.tensor(best), wanted.topk(5).values, **CLOSE)
        assert token in found
        named = torch.tensor([one.logprob for one in found.values()])
        torch.testing.assert_close(named, wanted[list(found)], **CLOSE)
    assert len(output.prompt_logprobs) == len(text)


def test_embeddings(checkpoint: Callable, start_engine: Callable, oracle: Callable, tmp_path: Path) -> None:
    model = with_tokenizer(checkpoint("llama"), tmp_path)
    texts = prompts()
    llm = start_engine(model, **SETTINGS, **CHUNKS, runner="pooling", convert="embed", skip_tokenizer_init=False)
    found = torch.tensor([output.outputs.embedding for output in llm.embed(as_prompts(texts), use_tqdm=False)])
    states = oracle(model, texts, METHOD, what=hidden_states)
    expected = torch.stack([torch.nn.functional.normalize(state[-1], dim=0) for state in states])
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0.0)


def test_sleep_is_not_for_cpus(checkpoint: Callable, start_engine: Callable) -> None:
    """Stock vLLM refuses it, whatever the backend; asked all the same, an engine sleeps in name only."""
    model = checkpoint("llama")
    for backend in (None, "CUSTOM"):
        with pytest.raises(ValueError, match="Sleep mode is not supported on current platform"):
            start_engine(model, attention_backend=backend, max_model_len=TRAINED_LENGTH, enable_sleep_mode=True)
    llm = start_engine(model, **SETTINGS)
    expected = answers(llm, prompts())
    llm.sleep(level=1)
    llm.wake_up()
    assert answers(llm, prompts()) == expected
