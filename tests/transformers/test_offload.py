"""Models whose weights are not where they compute, as accelerate has them: the answers of the model in memory."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from accelerate import cpu_offload
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

import vllm_selfextend.transformers as SelfExtend
from tests.support.batches import greedy
from tests.support.models import SHAPE, random_prompts
from vllm_selfextend.transformers import extension
from vllm_selfextend.transformers.flash_attention import FlashAttention

from .flash_attn_stand_in import varlen_func

PROMPTS = random_prompts([150, 12], seed=2)
CPU = torch.device("cpu")


@pytest.fixture
def in_memory(checkpoint: Callable[[str], str]) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(checkpoint("llama"), dtype=torch.float32)


@pytest.fixture(params=["embeddings on disk", "all offloaded, buffers too"])
def offloaded(request: pytest.FixtureRequest, checkpoint: Callable[[str], str], tmp_path: Path) -> PreTrainedModel:
    path = checkpoint("llama")
    if request.param != "embeddings on disk":
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
        return cpu_offload(model, CPU, offload_buffers=True)
    on_cpu = ["model.layers", "model.norm", "model.rotary_emb", "lm_head"]
    where = {"model.embed_tokens": "disk", **dict.fromkeys(on_cpu, "cpu")}
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, device_map=where, offload_folder=tmp_path)


@pytest.mark.parametrize("is_flash", [False, True])
def test_offloaded(
    in_memory: PreTrainedModel, offloaded: PreTrainedModel, is_flash: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    flash = FlashAttention(varlen_func, "cpu", (torch.float32,))
    monkeypatch.setattr(extension, "find_flash_attention", lambda implementation: flash)
    assert offloaded.get_input_embeddings().weight.is_meta
    before, _ = greedy(in_memory, PROMPTS, 4)
    for model in (in_memory, offloaded):
        SelfExtend.apply(model, 4, 16, is_flash)
    wanted, wanted_logprobs = greedy(in_memory, PROMPTS, 4)
    got, logprobs = greedy(offloaded, PROMPTS, 4)
    assert got == wanted
    assert torch.equal(logprobs, wanted_logprobs)
    SelfExtend.remove(offloaded)
    assert greedy(offloaded, PROMPTS, 4)[0] == before


def test_no_weights_at_all() -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(LlamaConfig(**SHAPE))
    with pytest.raises(ValueError, match="weights are on the device 'meta', which holds no numbers: load them first"):
        SelfExtend.apply(model, 4, 16)
