"""Draft heads past the trained length: the tokens are those without them, and most guesses are right.

Heads with ordinary positions there have at most 10 % of their guesses accepted, and zeros none.
"""

from collections.abc import Callable
from typing import Any

import pytest
from vllm import LLM

from tests.support.models import random_prompts

from .draft_heads import save_model_and_heads
from .test_same_tokens import SETTINGS, Answers, answers, check, counter

# Without its first token a shorter text is another.
SHORT, LONG = (30, 40, 48), (65, 128, 200, 700, 1000)
PER_KIND = {"attention_backend": None, "attention_config": {"backend_per_kind": {"full_attention": "CUSTOM"}}}


def texts(lengths: tuple[int, ...]) -> list[list[int]]:
    return random_prompts(lengths, seed=2)


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return save_model_and_heads(tmp_path_factory.mktemp("heads"))


@pytest.fixture(scope="module")
def alone(paths: dict[str, str], start_engine: Callable[..., LLM]) -> dict[tuple[int, ...], Answers]:
    llm = start_engine(paths["model"], **SETTINGS)
    return {lengths: answers(llm, texts(lengths)) for lengths in (SHORT, LONG)}


def accepted_share(llm: LLM, lengths: tuple[int, ...], expected: Answers) -> float:
    before = [counter(llm, f"vllm:spec_decode_num_{kind}_tokens") for kind in ("draft", "accepted")]
    check(answers(llm, texts(lengths)), expected)
    after = [counter(llm, f"vllm:spec_decode_num_{kind}_tokens") for kind in ("draft", "accepted")]
    drafted, accepted = (new - old for new, old in zip(after, before, strict=True))
    return accepted / drafted


@pytest.mark.parametrize(
    ("method", "drafts", "settings"),
    [("eagle", {}, {}), ("eagle3", {"attention_backend": "CUSTOM"}, {}), ("mtp", {}, PER_KIND)],
)
def test_heads_guess_as_well_past_the_trained_length(
    method: str,
    drafts: dict[str, Any],
    settings: dict[str, Any],
    paths: dict[str, str],
    alone: dict[tuple[int, ...], Answers],
    start_engine: Callable[..., LLM],
) -> None:
    head = {} if method == "mtp" else {"model": paths[method]}  # which the model's checkpoint has
    speculation = {"method": method, "num_speculative_tokens": 3, **head, **drafts}
    model = paths["mtp" if method == "mtp" else "model"]
    llm = start_engine(model, **{**SETTINGS, **settings}, max_num_batched_tokens=256, speculative_config=speculation)
    assert accepted_share(llm, SHORT, alone[SHORT]) > 0.4
    assert accepted_share(llm, LONG, alone[LONG]) > 0.4
