"""The kernel sets through vLLM: which one runs, that they agree, and the fp8 cache."""

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from vllm import LLM, SamplingParams
from vllm.v1.attention.backend import AttentionCGSupport

from tests.support.models import random_prompts
from tests.support.passkeys import make_prompt
from vllm_selfextend.demo import MODEL_DIR
from vllm_selfextend.vllm.attention import SelfExtendMetadataBuilder

SAMPLING = SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True, detokenize=False)


def kernel_modules(llm: LLM) -> set[str]:
    """The modules that compute a model's attention."""

    def names(model: torch.nn.Module) -> set[str]:
        return {type(m.impl.kernels).__module__ for m in model.modules() if hasattr(m, "get_attn_backend")}

    return set.union(*llm.apply_model(names))


def answers(llm: LLM) -> list[list[int]]:
    texts = random_prompts((3, 17, 48, 49, 130, 290), seed=4)
    outputs = llm.generate([{"prompt_token_ids": text} for text in texts], SAMPLING, use_tqdm=False)
    return [list(output.outputs[0].token_ids) for output in outputs]


def test_the_native_kernels_are_the_default_and_agree(checkpoint: Callable, start_engine: Callable) -> None:
    def start(**settings: Any) -> LLM:
        config = {"self_extend": {"neighbor_window": 16, **settings}}
        return start_engine(
            checkpoint("gemma2"), attention_backend="CUSTOM", max_model_len=320, additional_config=config
        )

    llm = start()
    assert kernel_modules(llm) == {"vllm_selfextend.backends.cpu"}
    native = answers(llm)
    llm = start(kernel="reference")
    assert kernel_modules(llm) == {"vllm_selfextend.backends.reference"}
    assert answers(llm) == native


@pytest.mark.parametrize("kernel", ["cpu", "reference"])
def test_an_fp8_cache_still_finds_the_keys(kernel: str, start_engine: Callable) -> None:
    rng = random.Random(5)
    prompts = [make_prompt(1500, depth / 11, rng) for depth in range(12)]
    settings = {"attention_backend": "CUSTOM", "max_model_len": 1536, "skip_tokenizer_init": False}
    settings |= {"additional_config": {"self_extend": {"kernel": kernel}}}
    sampling = SamplingParams(temperature=0.0, max_tokens=5)

    def run(kv_cache_dtype: str) -> tuple[int, int]:
        llm = start_engine(MODEL_DIR, **settings, kv_cache_dtype=kv_cache_dtype)
        outputs = llm.generate([prompt.text for prompt in prompts], sampling, use_tqdm=False)
        found = [
            output.outputs[0].text.strip() == prompt.answer for output, prompt in zip(outputs, prompts, strict=True)
        ]
        return sum(found), llm.llm_engine.vllm_config.cache_config.num_gpu_blocks

    found, num_blocks = run("auto")
    found_fp8, num_blocks_fp8 = run("fp8")
    # The same memory holds four times as many tokens as in float32. Three bits of mantissa may cost a digit.
    assert num_blocks_fp8 == pytest.approx(4 * num_blocks, rel=0.01)
    assert found == len(prompts)
    assert found_fp8 >= len(prompts) - 3


@pytest.mark.slow
def test_kernels_for_gpus_agree_in_chunks_batches_and_on_a_prefix_hit(start_engine: Callable) -> None:
    # The small model's trained length is 256: within it, past it, and far past it, in chunks of 128.
    rng = random.Random(6)
    prompts = [make_prompt(length, 0.5, rng) for length in (40, 300, 500)]
    texts = [*(prompt.text for prompt in prompts), prompts[1].text]
    sampling = SamplingParams(temperature=0.0, max_tokens=5)

    def run(kernel: str) -> list[str]:
        llm = start_engine(
            MODEL_DIR,
            attention_backend="CUSTOM",
            max_model_len=520,
            max_num_batched_tokens=128,
            skip_tokenizer_init=False,
            additional_config={"self_extend": {"kernel": kernel}},
        )
        assert kernel_modules(llm) == {f"vllm_selfextend.backends.{kernel}"}
        support = SelfExtendMetadataBuilder.get_cudagraph_support(llm.llm_engine.vllm_config, None)
        assert support == (AttentionCGSupport.NEVER if kernel == "cpu" else AttentionCGSupport.UNIFORM_BATCH)
        longest = SelfExtendMetadataBuilder.get_varlen_cudagraph_max_query_len(llm.llm_engine.vllm_config, None)
        assert longest == (None if kernel == "cpu" else 1)
        first = llm.generate(texts[:3], sampling, use_tqdm=False)
        again = llm.generate(texts[3:], sampling, use_tqdm=False)
        assert again[0].num_cached_tokens > 0
        return [output.outputs[0].text.strip() for output in first + again]

    native = run("cpu")
    assert native == [*(prompt.answer for prompt in prompts), prompts[1].answer]
    assert run("triton") == native
