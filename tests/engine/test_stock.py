"""Where Self-Extend must change nothing: short prompts with it on, and everything with it off."""

import json
import os
import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
from vllm import LLM, SamplingParams

from tests.support.comparison import check
from tests.support.models import TRAINED_LENGTH, VOCAB_SIZE, random_prompts
from tests.support.oracle import SelfExtend
from vllm_selfextend.method.plan import read_plan

NEW_TOKENS = 8
LENGTHS = (1, 2, 15, 16, 17, 31, 32, 33, 47, 48, 55, 56)
SAMPLING = SamplingParams(temperature=0.0, max_tokens=NEW_TOKENS, ignore_eos=True, detokenize=False)


def prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(2)
    return [torch.randint(3, VOCAB_SIZE, (length,), generator=generator).tolist() for length in LENGTHS]


def answers(llm: LLM) -> list[list[int]]:
    outputs = llm.generate([{"prompt_token_ids": text} for text in prompts()], SAMPLING, use_tqdm=False)
    return [list(output.outputs[0].token_ids) for output in outputs]


def backends(llm: LLM) -> set[str]:
    """The names of the attention backends of a model's layers."""

    def names(model: torch.nn.Module) -> set[str]:
        return {m.get_attn_backend().get_name() for m in model.modules() if hasattr(m, "get_attn_backend")}

    return set.union(*llm.apply_model(names))


@pytest.mark.parametrize("name", ["llama", "gemma2", "gemma3", "glm4", "longrope"])
def test_short_prompts_get_the_stock_answers(name: str, checkpoint: Callable, start_engine: Callable) -> None:
    # longrope switches to its long factors with the length served, in stock vLLM too: the same length for both.
    length = TRAINED_LENGTH
    stock = answers(start_engine(checkpoint(name), max_model_len=length))
    llm = start_engine(checkpoint(name), attention_backend="CUSTOM", max_model_len=384)
    assert backends(llm) == {"CUSTOM"}
    assert answers(llm) == stock


def test_without_the_flag_it_is_stock_vllm(checkpoint: Callable, start_engine: Callable) -> None:
    llm = start_engine(checkpoint("llama"))
    assert backends(llm) == {"CPU_ATTN"}
    assert llm.llm_engine.vllm_config.additional_config == {}
    with_plugin = answers(llm)
    script = (
        "import json; from tests.engine import conftest, test_stock\n"
        f"llm = conftest.LLM({checkpoint('llama')!r}, **conftest.ENGINE_DEFAULTS)\n"
        "print('ANSWERS', json.dumps(test_stock.answers(llm)))"
    )
    environment = {**os.environ, "VLLM_PLUGINS": "none"}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True)
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("ANSWERS ")]
    assert with_plugin == json.loads(line.removeprefix("ANSWERS "))


def test_without_the_flag_a_long_max_model_len_is_refused(checkpoint: Callable) -> None:
    with pytest.raises(ValueError, match=r"max_model_len \(4096\) is greater than the derived max_model_len"):
        LLM(checkpoint("llama"), max_model_len=4096, skip_tokenizer_init=True)


@pytest.mark.parametrize("name", ["gemma3", "llama"])
def test_custom_past_the_checkpoints_length_without_grouping(
    name: str, checkpoint: Callable, start_engine: Callable, oracle: Callable
) -> None:
    """A model that was trained on more than its config says: its tables are lengthened, those of its windows too.

    A draft ends where its own checkpoint does.
    """
    path, settings = checkpoint(name), {"trained_length": 4 * TRAINED_LENGTH}
    draft = {"method": "draft_model", "model": checkpoint("llama-mqa"), "num_speculative_tokens": 2}
    llm = start_engine(
        path,
        attention_backend="CUSTOM",
        max_model_len=4 * TRAINED_LENGTH,
        additional_config={"self_extend": settings | ({} if name == "gemma3" else {"group_size": 1})},
        speculative_config=None if name == "gemma3" else draft,
    )
    assert not read_plan(llm.llm_engine.vllm_config).groups
    texts = random_prompts((40, TRAINED_LENGTH, 240), seed=3)
    check(llm, oracle, path, texts, SelfExtend(group_size=1, neighbor_window=1))


def test_custom_within_the_trained_length_is_ordinary_attention(checkpoint: Callable, start_engine: Callable) -> None:
    stock = answers(start_engine(checkpoint("llama")))
    llm = start_engine(checkpoint("llama"), attention_backend="CUSTOM")
    assert not read_plan(llm.llm_engine.vllm_config).groups
    assert answers(llm) == stock
