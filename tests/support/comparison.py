"""What vLLM generates, held against the second oracle: token for token, every log-probability."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from vllm import LLM, SamplingParams

from .models import TRAINED_LENGTH, random_prompts
from .oracle import SelfExtend

NEW_TOKENS = 8
GREEDY = SamplingParams(
    temperature=0.0, max_tokens=NEW_TOKENS, ignore_eos=True, detokenize=False, prompt_logprobs=0, logprobs=0
)
TOLERANCE = 1e-3


@dataclass(frozen=True)
class Generated:
    """A prompt, its answer, and the log-probabilities of all tokens but the first."""

    prompt: list[int]
    answer: list[int]
    logprobs: list[float]

    @property
    def tokens(self) -> list[int]:
        return self.prompt + self.answer


def prompts(neighbor_window: int, max_model_len: int, block_size: int) -> list[list[int]]:
    """Lengths around the window, the block size and multiples of the trained length, and the longest.

    With the trained length of 64 an automatic group size is another every 5 tokens or so.
    """
    turns = (1, neighbor_window, block_size, *(times * TRAINED_LENGTH for times in (1, 2, 3)))
    longest = max_model_len - NEW_TOKENS
    lengths = {turn + step for turn in turns for step in (-1, 0, 1)} | {longest}
    return random_prompts([length for length in sorted(lengths) if 0 < length <= longest], seed=0)


def generate(llm: LLM, texts: list[list[int]]) -> list[Generated]:
    """Greedily."""
    outputs = llm.generate([{"prompt_token_ids": text} for text in texts], GREEDY, use_tqdm=False)
    found = []
    for text, output in zip(texts, outputs, strict=True):
        answer = list(output.outputs[0].token_ids)
        # vLLM gives no log-probability to a prompt's first token.
        steps = [*output.prompt_logprobs[1:], *output.outputs[0].logprobs]
        logprobs = [step[token].logprob for step, token in zip(steps, (text + answer)[1:], strict=True)]
        found.append(Generated(text, answer, logprobs))
    return found


def compare(found: list[Generated], expected: list[torch.Tensor]) -> float:
    """Hold what was generated against the oracle's log-probabilities of all tokens; the greatest difference.

    Raises:
        AssertionError: They differ.

    """
    greatest = 0.0
    for one, logprobs in zip(found, expected, strict=True):
        what = f"prompt of {len(one.prompt)} tokens"
        wanted = logprobs[:-1].gather(1, torch.tensor(one.tokens[1:])[:, None])[:, 0]
        difference = (torch.tensor(one.logprobs) - wanted).abs()
        where = int((difference <= TOLERANCE).long().argmin())  # the first
        assert difference.max() <= TOLERANCE, f"{what}: off by {difference[where]:.4f} at token {where + 1}"
        assert logprobs[len(one.prompt) - 1 : -1].argmax(-1).tolist() == one.answer, what
        greatest = max(greatest, float(difference.max()))
    return greatest


def check(
    llm: LLM, oracle: Callable[..., list[torch.Tensor]], checkpoint: str, texts: list[list[int]], method: SelfExtend
) -> None:
    """Generate greedily and compare with the oracle at every position of prompts and answers."""
    found = generate(llm, texts)
    compare(found, oracle(checkpoint, [one.tokens for one in found], method))
