"""The served model and `SelfExtend.apply` in transformers: the same tokens."""

import json
import subprocess
import sys
from collections.abc import Callable

import pytest
from vllm import SamplingParams

from tests.support.models import TRAINED_LENGTH, random_prompts
from vllm_selfextend.method.positions import GroupSize

NEW_TOKENS = 6
LENGTHS = (11, 60, 170)

# In a process of its own: vLLM changes transformers' classes in the one where it runs them.
SCRIPT = """
import json, sys
import torch
from transformers import AutoModelForCausalLM
import vllm_selfextend.transformers as SelfExtend
from tests.support.batches import greedy
path, prompts, numbers = json.loads(sys.stdin.read())
model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
model.generation_config.eos_token_id = None
SelfExtend.apply(model, *numbers[:2], trained_length=numbers[2], exact_short=numbers[3])
print(json.dumps(greedy(model, prompts, numbers[4])[0]))
"""


@pytest.mark.parametrize(
    ("name", "group_size", "exact_short"),
    [
        ("llama", "auto", True),
        ("qwen3", 4, True),
        ("gemma2", "auto", True),
        ("phi", "auto", True),
        ("cohere", 4, False),
    ],
)
def test_tokens_are_the_same(
    name: str, group_size: GroupSize, exact_short: bool, checkpoint: Callable, start_engine: Callable
) -> None:
    path, prompts = checkpoint(name), random_prompts(LENGTHS, seed=6)
    given = json.dumps([path, prompts, [group_size, 16, TRAINED_LENGTH, exact_short, NEW_TOKENS]])
    done = subprocess.run([sys.executable, "-c", SCRIPT], input=given, capture_output=True, text=True, check=True)
    settings = {
        "group_size": group_size,
        "neighbor_window": 16,
        "trained_length": TRAINED_LENGTH,
        "exact_short": exact_short,
        "log_scale": group_size == "auto",
    }
    llm = start_engine(path, attention_backend="CUSTOM", max_model_len=208, additional_config={"self_extend": settings})
    sampling = SamplingParams(temperature=0.0, max_tokens=NEW_TOKENS, ignore_eos=True, detokenize=False)
    outputs = llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], sampling, use_tqdm=False)
    assert json.loads(done.stdout) == [list(output.outputs[0].token_ids) for output in outputs]
