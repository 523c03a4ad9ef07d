"""Models of all kinds through vLLM, against the second oracle: token for token, every log-probability."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from vllm import SamplingParams

from benchmarks.model_proof.architectures import BY_TITLE
from tests.support.comparison import check, prompts
from tests.support.models import TRAINED_LENGTH, random_prompts
from tests.support.oracle import SelfExtend

# Automatic group sizes, and numbers that divide the window and that do not; capacities (64 - W + W // G) * G.
AUTOMATIC, DIVIDES, ODD = ("auto", 18, 245), (4, 16, 208), (5, 18, 245)

CUT = {
    "LlamaForCausalLM": "halves as pairs, on all dimensions",
    "LlamaForCausalLM (multi-query)": "one head of keys",
    "LlamaForCausalLM (llama3 RoPE)": "a rotation of its own",
    "Qwen3ForCausalLM (yarn RoPE)": "a rotation of its own, norms before it",
    "Phi3ForCausalLM (longrope)": "a rotation of its own, the long factors",
    "CohereForCausalLM": "neighbors as pairs",
    "Glm4ForCausalLM": "neighbors as pairs, on half of the dimensions",
    "StableLmForCausalLM": "halves as pairs, on a quarter of the dimensions",
    "GPTJForCausalLM": "a config that says nothing but how many dimensions",
    "Gemma2ForCausalLM": "sliding windows beside full attention, a soft cap",
    "Gemma3ForCausalLM": "another rotation in layers with a window",
    "Gemma4ForCausalLM": "pairs with frequency 0, layers that read another one's cache",
    "GptOssForCausalLM": "sinks",
    "SmolLM3ForCausalLM": "layers without RoPE",
    "GraniteSWAForCausalLM": "layers without RoPE and with a window",
    "Qwen3MoeForCausalLM": "a choice of experts",
    "FalconH1ForCausalLM": "Mamba 2 beside attention in each layer",
    "Lfm2MoeForCausalLM": "short convolutions",
    "Qwen2VLForConditionalGeneration": "three position axes, texts alone",
}
"""Of the model proof's table, with what each has that those before it do not. `make models` runs all of them."""


@pytest.mark.parametrize("title", CUT)
def test_tokens_equal_the_papers(title: str, start_engine: Callable, oracle: Callable, tmp_path: Path) -> None:
    architecture = BY_TITLE[title]
    # Most as users serve them; every third one as the paper to the letter.
    index = list(CUT).index(title)
    exact_short = index % 3 != 2
    group_size, neighbor_window, max_model_len = AUTOMATIC if exact_short else (DIVIDES, ODD)[index % 2]
    path, for_oracle = architecture.save(tmp_path)
    settings = {"group_size": group_size, "neighbor_window": neighbor_window}
    settings |= {"exact_short": exact_short, "log_scale": exact_short}
    llm = start_engine(
        path,
        attention_backend="CUSTOM",
        max_model_len=max_model_len,
        max_num_batched_tokens=256,
        additional_config={"self_extend": settings},
        **architecture.engine,
    )
    method = SelfExtend(group_size, neighbor_window, TRAINED_LENGTH if exact_short else 0)
    texts = prompts(neighbor_window, max_model_len, block_size=32)
    check(llm, oracle, for_oracle, texts, method)


def test_longrope_within_its_original_length(
    checkpoint: Callable, start_engine: Callable, oracle: Callable, tmp_path: Path
) -> None:
    """There vLLM takes the short factors, which the oracle is given in place of the long ones."""
    path = checkpoint("longrope")
    shutil.copytree(path, tmp_path / "short")
    config = json.loads((tmp_path / "short" / "config.json").read_text())
    rope = config["rope_parameters"]
    rope["long_factor"] = rope["short_factor"]
    (tmp_path / "short" / "config.json").write_text(json.dumps(config))
    numbers = {"neighbor_window": 4, "trained_length": 16}
    llm = start_engine(path, attention_backend="CUSTOM", max_model_len=32, additional_config={"self_extend": numbers})
    texts = random_prompts((3, 15, 16, 17, 24), seed=6)
    check(llm, oracle, str(tmp_path / "short"), texts, SelfExtend("auto", 4, 16))


def test_prefix_hits_of_a_hybrid(start_engine: Callable, oracle: Callable, tmp_path: Path) -> None:
    """The state of its convolutions comes from the cache as well."""
    architecture = BY_TITLE["Lfm2MoeForCausalLM"]
    path, for_oracle = architecture.save(tmp_path)
    llm = start_engine(
        path,
        attention_backend="CUSTOM",
        max_model_len=245,
        additional_config={"self_extend": {"neighbor_window": 18}},
        **architecture.engine,
    )
    (text,) = random_prompts([220], seed=1)
    greedy = SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True, detokenize=False)
    for prompt in (text[:210], text[:210], text):
        (output,) = llm.generate({"prompt_token_ids": prompt}, greedy, use_tqdm=False)
        answer = list(output.outputs[0].token_ids)
        (logprobs,) = oracle(for_oracle, [prompt + answer], SelfExtend("auto", 18, TRAINED_LENGTH))
        assert logprobs[len(prompt) - 1 : -1].argmax(-1).tolist() == answer
    assert output.num_cached_tokens >= 192


def test_images_where_texts_alone_are_served(start_engine: Callable, tmp_path: Path) -> None:
    """The last row above: vLLM refuses them, however they come."""
    architecture = BY_TITLE["Qwen2VLForConditionalGeneration"]
    path, _ = architecture.save(tmp_path)
    llm = start_engine(path, attention_backend="CUSTOM", max_model_len=245, **architecture.engine)
    image = Image.new("RGB", (28, 28))
    with pytest.raises(ValueError, match="Multi-modal processor not available for text-only models"):
        llm.generate({"prompt_token_ids": [5, 6, 7], "multi_modal_data": {"image": image}}, use_tqdm=False)


REFUSED = {
    "HunYuanDenseV1ForCausalLM": r"model\.layers\.0\.self_attn\.attn: its queries and keys are not what",
    "Cohere2ForCausalLM": r"its layers with RoPE see a part of the context only .* VLLM_ALLOW_LONG_MAX_MODEL_LEN=1",
}


@pytest.mark.parametrize("title", REFUSED)
def test_what_only_the_loaded_model_tells(title: str, start_engine: Callable, tmp_path: Path) -> None:
    """Refusals that need no weights are in `test_refusals.py`."""
    path, _ = BY_TITLE[title].save(tmp_path)
    with pytest.raises(ValueError, match=f"Self-Extend cannot serve .*{REFUSED[title]}"):
        start_engine(path, attention_backend="CUSTOM", max_model_len=245, **BY_TITLE[title].engine)


@pytest.mark.parametrize("name", ["llama", "cohere", "phi", "gemma2", "gemma3"])
def test_through_vllms_transformers_backend(
    name: str, checkpoint: Callable, start_engine: Callable, oracle: Callable
) -> None:
    """Pairs as halves and interleaved, on all dimensions and on some; a rotation for each kind of layer."""
    path = checkpoint(name)
    llm = start_engine(
        path,
        model_impl="transformers",
        attention_backend="CUSTOM",
        max_model_len=245,
        additional_config={"self_extend": {"neighbor_window": 18}},
    )
    assert llm.apply_model(lambda model: type(model).__name__) == ["TransformersForCausalLM"]
    check(llm, oracle, path, prompts(18, 245, block_size=32), SelfExtend("auto", 18, TRAINED_LENGTH))


@pytest.mark.parametrize("name", ["llama", "glm4"])
def test_the_oracle_tells_methods_apart(name: str, checkpoint: Callable, oracle: Callable) -> None:
    """The comparison above could not pass with wrong positions."""
    text = prompts(16, 208, 32)[-1]

    def logprobs(*numbers: Any) -> torch.Tensor:
        return oracle(checkpoint(name), [text], SelfExtend(*numbers))[0]

    paper, automatic = logprobs(4, 16), logprobs("auto", 16, TRAINED_LENGTH)
    for right, wrong in (
        (paper, logprobs(1, 16)),
        (paper, logprobs(4, 17)),
        (automatic, logprobs(1, 16)),
        (automatic, logprobs("auto", 17, TRAINED_LENGTH)),
        (automatic, logprobs(4, 16, TRAINED_LENGTH)),
        (automatic, logprobs("auto", 16, TRAINED_LENGTH, 0)),
    ):
        assert (right - wrong).abs().max() > 0.1


def test_disable_sliding_window(checkpoint: Callable, start_engine: Callable, oracle: Callable, tmp_path: Path) -> None:
    """Mistral v0.1: every layer slides; without its windows the model is Mistral trained on the window's length."""
    path = checkpoint("mistral")
    shutil.copytree(path, tmp_path / "sliding")
    config_file = tmp_path / "sliding" / "config.json"
    window = 40
    config_file.write_text(json.dumps(json.loads(config_file.read_text()) | {"sliding_window": window}))
    llm = start_engine(
        tmp_path / "sliding",
        attention_backend="CUSTOM",
        max_model_len=200,
        disable_sliding_window=True,
        additional_config={"self_extend": {"neighbor_window": 16}},
    )
    check(llm, oracle, path, prompts(16, 200, block_size=32), SelfExtend("auto", 16, exact_len=window))


def test_without_log_scale(checkpoint: Callable, start_engine: Callable, oracle: Callable) -> None:
    """With it, layers that see the whole context scale before the soft cap: the families above have it."""
    path = checkpoint("gemma2")
    llm = start_engine(
        path,
        attention_backend="CUSTOM",
        max_model_len=245,
        additional_config={"self_extend": {"neighbor_window": 18, "log_scale": False}},
    )
    method = SelfExtend("auto", 18, exact_len=TRAINED_LENGTH, log_scale_len=0)
    check(llm, oracle, path, prompts(18, 245, block_size=32), method)
