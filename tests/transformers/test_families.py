"""Every family, in a padded batch through `generate`, against the second oracle: token for token."""

from collections.abc import Callable

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

import vllm_selfextend.transformers as SelfExtend
from tests.support import oracle
from tests.support.batches import greedy
from tests.support.models import TRAINED_LENGTH, random_prompts
from vllm_selfextend.method.positions import GroupSize

from .families import FAMILIES

NEW_TOKENS = 6
LENGTHS = (11, 60, 170)
"""On both sides of the window and of the trained length; the second crosses it while it is answered."""

# A group size that divides the window, one that does not, and one for each query; both settings of exact_short.
NUMBERS: dict[str, tuple[GroupSize, int, bool]] = {
    "divides": (4, 16, False),
    "odd": (5, 18, True),
    "auto": ("auto", 18, True),
}


@pytest.mark.parametrize("numbers", NUMBERS)
@pytest.mark.parametrize("name", FAMILIES)
def test_tokens_equal_the_papers(name: str, numbers: str, checkpoint: Callable[[str], str]) -> None:
    group_size, window, exact_short = NUMBERS[numbers]
    path = checkpoint(name)
    model = oracle.model_class(AutoConfig.from_pretrained(path)).from_pretrained(path, dtype=torch.float32)
    plan = SelfExtend.apply(model, group_size, window, trained_length=TRAINED_LENGTH, exact_short=exact_short)
    assert group_size != "auto" or len(plan.group_sizes(LENGTHS[-1]).unique()) > 8
    prompts = random_prompts(LENGTHS, seed=1)
    answers, logprobs = greedy(model, prompts, NEW_TOKENS)
    log_scale_len = TRAINED_LENGTH if group_size == "auto" else 0
    method = oracle.SelfExtend(group_size, window, TRAINED_LENGTH if exact_short else 0, log_scale_len)
    expected = oracle.next_token_logprobs(path, [p + a for p, a in zip(prompts, answers, strict=True)], method)
    for prompt, answer, got, wanted in zip(prompts, answers, logprobs, expected, strict=True):
        begin = len(prompt) - 1
        assert wanted[begin:-1].argmax(-1).tolist() == answer, f"prompt of {len(prompt)} tokens"
        torch.testing.assert_close(got, torch.from_numpy(wanted[begin:-1]), atol=2e-4, rtol=0.0)


def test_log_scaling_is_the_authors(checkpoint: Callable[[str], str]) -> None:
    path = checkpoint("llama")
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    plan = SelfExtend.apply(model, 4, 16, False, 40)
    assert (plan.log_scale, plan.log_scale_len) == (True, 40)
    prompts = random_prompts(LENGTHS, seed=1)
    answers, logprobs = greedy(model, prompts, NEW_TOKENS)
    texts = [p + a for p, a in zip(prompts, answers, strict=True)]
    expected = oracle.next_token_logprobs(path, texts, oracle.SelfExtend(4, 16, log_scale_len=40))
    for prompt, got, wanted in zip(prompts, logprobs, expected, strict=True):
        torch.testing.assert_close(got, torch.from_numpy(wanted[len(prompt) - 1 : -1]), atol=2e-4, rtol=0.0)
    assert SelfExtend.apply(model, 4, 16).log_scale is False
