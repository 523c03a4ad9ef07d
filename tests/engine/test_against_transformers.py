"""Every supported architecture through vLLM, against the second oracle: token for token, every log-probability."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from .comparison import check, prompts
from .models import CONFIGS, TRAINED_LENGTH
from .oracle import SelfExtend

# Group sizes that divide the window and that do not; capacities (64 - W + W // G) * G.
NUMBERS = {"divides": (4, 16, 208), "odd": (5, 18, 245)}


@pytest.mark.parametrize("numbers", ["divides", "odd"])
@pytest.mark.parametrize("name", CONFIGS)
def test_tokens_equal_the_papers(
    name: str, numbers: str, checkpoint: Callable, start_engine: Callable, oracle: Callable
) -> None:
    # Both settings of exact_short and both kinds of numbers meet every architecture.
    group_size, neighbor_window, max_model_len = NUMBERS[numbers]
    exact_short = numbers == "odd"
    path = checkpoint(name)
    settings = {"group_size": group_size, "neighbor_window": neighbor_window, "exact_short": exact_short}
    llm = start_engine(
        path,
        attention_backend="CUSTOM",
        max_model_len=max_model_len,
        max_num_batched_tokens=256,
        additional_config={"self_extend": settings},
    )
    method = SelfExtend(group_size, neighbor_window, TRAINED_LENGTH if exact_short else 0)
    texts = prompts(group_size, neighbor_window, max_model_len, block_size=32)
    check(llm, oracle, path, texts, method)


@pytest.mark.parametrize("name", ["llama", "cohere", "phi", "gemma2"])
def test_through_vllms_transformers_backend(
    name: str, checkpoint: Callable, start_engine: Callable, oracle: Callable
) -> None:
    """Pairs as halves and interleaved, on all dimensions and on some."""
    path = checkpoint(name)
    llm = start_engine(
        path,
        model_impl="transformers",
        attention_backend="CUSTOM",
        max_model_len=245,
        additional_config={"self_extend": {"group_size": 5, "neighbor_window": 18}},
    )
    assert llm.apply_model(lambda model: type(model).__name__) == ["TransformersForCausalLM"]
    check(llm, oracle, path, prompts(5, 18, 245, block_size=32), SelfExtend(5, 18, TRAINED_LENGTH))


@pytest.mark.parametrize("name", ["llama", "glm4"])
def test_the_oracle_tells_methods_apart(name: str, checkpoint: Callable, oracle: Callable) -> None:
    """The comparison above could not pass with wrong positions."""
    text = prompts(4, 16, 208, 32)[-1]
    right, unmodified, other = (
        oracle(checkpoint(name), [text], SelfExtend(group, window))[0] for group, window in ((4, 16), (1, 16), (4, 17))
    )
    assert (right - unmodified).abs().max() > 0.1
    assert (right - other).abs().max() > 0.1


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
        additional_config={"self_extend": {"group_size": 8, "neighbor_window": 16}},
    )
    check(llm, oracle, path, prompts(8, 16, 200, block_size=32), SelfExtend(8, 16, exact_len=window))


def test_log_scale(checkpoint: Callable, start_engine: Callable, oracle: Callable) -> None:
    """In layers that see the whole context, before the soft cap; those with a sliding window keep their queries."""
    path = checkpoint("gemma2")
    llm = start_engine(
        path,
        attention_backend="CUSTOM",
        max_model_len=245,
        additional_config={"self_extend": {"group_size": 5, "neighbor_window": 18, "log_scale": True}},
    )
    method = SelfExtend(5, 18, exact_len=TRAINED_LENGTH, log_scale_len=TRAINED_LENGTH)
    check(llm, oracle, path, prompts(5, 18, 245, block_size=32), method)
