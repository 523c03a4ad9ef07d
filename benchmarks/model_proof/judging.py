"""What a host made of a checkpoint, held against the second oracle."""

from typing import Any

import torch

from tests.support import oracle
from tests.support.comparison import Generated, compare
from tests.support.models import TRAINED_LENGTH
from vllm_selfextend.method.positions import GroupSize

from .architectures import BY_TITLE
from .texts import NEIGHBOR_WINDOW

OTHER_GROUP_SIZES = (2, 4)
"""Wrong ones, near what is automatic at the lengths that are read: up to 5.5."""
STATES_TOLERANCE = 1e-4
"""Of a normalised state's numbers, and of a class's probability."""


def hold(title: str, checkpoint: str, found: list[Any], extended: bool) -> float:
    """Hold what a host gave against the oracle; the greatest difference."""
    torch.set_num_threads(1)  # tiny products, which threads make slower
    architecture = BY_TITLE[title]
    method = oracle.SelfExtend("auto" if extended else 1, NEIGHBOR_WINDOW, TRAINED_LENGTH)
    if architecture.task == "generate":
        generated: list[Generated] = found
        wanted = oracle.next_token_logprobs(checkpoint, [one.tokens for one in generated], method)
        return compare(generated, [torch.from_numpy(one) for one in wanted])
    texts = [text for text, _ in found]
    if architecture.task == "embed":
        states = [torch.from_numpy(one[-1]) for one in oracle.hidden_states(checkpoint, texts, method)]
        expected = [one / one.norm() for one in states]
    else:
        expected = [torch.from_numpy(one).softmax(-1) for one in oracle.class_logits(checkpoint, texts, method)]
    differences = [
        float((torch.tensor(got) - want).abs().max()) for (_, got), want in zip(found, expected, strict=True)
    ]
    if max(differences) > STATES_TOLERANCE:
        raise AssertionError(f"off by {max(differences):.4f}")
    return max(differences)


def hold_roughly(title: str, checkpoint: str, found: list[Generated]) -> str:
    """Hold what vLLM gave in bfloat16 against the oracle, where tokens may differ by rounding; what was found.

    The mean difference of log-probabilities past the trained length has to be near what the oracle's own is if the
    model computes in bfloat16, and clearly less than with one group size for all positions past it.

    Raises:
        AssertionError: It is not.

    """
    torch.set_num_threads(1)  # tiny products, which threads make slower
    texts = [one.tokens for one in found]

    def past_trained(group: GroupSize, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        method = oracle.SelfExtend(group, NEIGHBOR_WINDOW, TRAINED_LENGTH)
        expected = oracle.next_token_logprobs(checkpoint, texts, method, dtype)
        chosen = [
            torch.from_numpy(logprobs)[range(len(text) - 1), text[1:]]
            for text, logprobs in zip(texts, expected, strict=True)
        ]
        return torch.cat([logprobs[TRAINED_LENGTH:] for logprobs in chosen])

    got = torch.cat([torch.tensor(one.logprobs)[TRAINED_LENGTH:] for one in found])
    exact = past_trained("auto")
    right, *others = (
        float((got - wanted).abs().mean()) for wanted in (exact, *(past_trained(group) for group in OTHER_GROUP_SIZES))
    )
    of_rounding = float((past_trained("auto", torch.bfloat16) - exact).abs().mean())
    said = (
        "in bfloat16, the only dtype of vLLM's code for it on a CPU: log-probabilities past the trained length differ "
        f"by {right:.3f} on average, transformers' own in bfloat16 by {of_rounding:.3f}; with group size "
        f"{OTHER_GROUP_SIZES[0]} or {OTHER_GROUP_SIZES[1]} everywhere by {others[0]:.3f} and {others[1]:.3f}"
    )
    if right >= min(1.5 * of_rounding, 0.75 * min(others)):
        raise AssertionError(said)
    return said
