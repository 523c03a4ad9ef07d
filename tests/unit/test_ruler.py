"""RULER's tasks: the harness's own prompts, which fit, and are the same wherever and whenever they are made."""

import random
import signal
from types import SimpleNamespace

import numpy as np
import pytest
from lm_eval.tasks.ruler import common_utils, niah_utils, vt_utils

from vllm_selfextend.evaluation import ruler
from vllm_selfextend.evaluation.ruler import RULER_TASKS, RulerTask, ruler_tasks

LENGTH = 2048


def encode(text: str, answer_begins: str) -> list[str]:
    """Words for tokens, in a chat's frame of 40 that the harness does not know of."""
    return ["frame"] * 40 + f"{text} {answer_begins}".split()


def prompts_of(name: str, length: int = LENGTH, rounds: int = 2, seed: int = 0) -> list:
    return list(RulerTask(name, (length,), rounds, seed).prompts(encode))


@pytest.mark.parametrize("name", RULER_TASKS)
def test_prompts_fill_their_length_and_hold_the_answer(name: str) -> None:
    task = RulerTask(name, (4096, LENGTH, LENGTH), rounds=3, seed=1)
    prompts = list(task.prompts(encode))
    assert [prompt.cell for prompt in prompts] == [{"length": n, "round": r} for n in (LENGTH, 4096) for r in range(3)]
    for prompt in prompts:
        length = prompt.cell["length"]
        assert length / 2 < len(prompt.token_ids) + task.answer_tokens <= length
        assert prompt.expected is not None
        for part in prompt.expected.split("\n"):
            assert part
            assert part in prompt.text
    assert len({prompt.expected for prompt in prompts}) == len(prompts)


@pytest.mark.parametrize("name", RULER_TASKS)
def test_the_same_prompts_again_whatever_was_drawn_before(name: str) -> None:
    first = prompts_of(name)
    random.random(), np.random.random()  # as other code does
    state, numpy_state = random.getstate(), np.random.get_state()[1].tolist()
    assert prompts_of(name) == first
    assert (random.getstate(), np.random.get_state()[1].tolist()) == (state, numpy_state), "nobody else notices"
    assert prompts_of(name, seed=1) != first


@pytest.mark.parametrize("name", ["niah_single_1", "niah_multikey_2", "niah_multikey_3"])
def test_a_needles_prompts_are_the_harnesss_own(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its task makes 500; ours are the first of them when both draw from one seed and count alike."""

    def tokenizer(text: str) -> SimpleNamespace:
        return SimpleNamespace(input_ids=text.split())

    monkeypatch.setattr(niah_utils, "get_tokenizer", lambda name: tokenizer)
    random.seed(5)
    theirs = getattr(niah_utils, name)(max_seq_lengths=[LENGTH])["test"]
    random.seed(5)
    ours = RULER_TASKS[name].make(tokenizer, LENGTH, 3)
    assert len(theirs) == 500
    assert [dict(one) for one in theirs.select(range(3))] == ours


def test_a_score_is_the_harnesss() -> None:
    task = RulerTask("ruler_vt", (LENGTH,), rounds=1, seed=0)
    (prompt,) = task.prompts(encode)
    names = (prompt.expected or "").split("\n")
    assert len(names) == 5
    answer = f" {names[0].lower()}, {names[3]} and NOBODY"
    row = task.score(prompt, SimpleNamespace(outputs=[SimpleNamespace(text=answer)]))
    assert row == {"expected": names, "answer": answer, "score": 0.4}
    theirs = common_utils.process_results({"max_length": LENGTH, "outputs": names}, [answer])
    assert theirs[str(LENGTH)] == 0.4


def test_what_the_harness_would_search_for_without_end() -> None:
    with pytest.raises(ValueError, match="--length 2047 is too short for ruler_vt: RULER's need 2048 tokens"):
        prompts_of("ruler_vt", 2047)
    task = RulerTask("ruler_vt", (LENGTH,), rounds=1, seed=0)
    with pytest.raises(ValueError, match=r"ruler_vt is not for this tokenizer: it makes \d+ tokens"):
        list(task.prompts(lambda text, begins: list(text)))  # a token a character


def test_prompts_that_the_harness_leaves_out(monkeypatch: pytest.MonkeyPatch) -> None:
    kind = ruler.Kind(lambda tokenizer, length, count: [], 30)
    monkeypatch.setitem(RULER_TASKS, "ruler_vt", kind)
    with pytest.raises(ValueError, match="made 0 of 2 prompts of 2048 tokens for ruler_vt"):
        prompts_of("ruler_vt")


def test_a_signal_waits_for_the_harness(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its loops have a bare `except`, which would swallow what the signal raises."""
    came: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda signum, frame: came.append(signum))
    counts: list[int] = []
    generate = vt_utils.generate_input_output

    def interrupted(*args: int, **more: int) -> tuple:
        if not counts:
            signal.raise_signal(signal.SIGTERM)
        counts.append(len(came))
        return generate(*args, **more)

    monkeypatch.setattr(vt_utils, "generate_input_output", interrupted)
    try:
        prompts_of("ruler_vt", rounds=1)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert came == [signal.SIGTERM]
    assert not any(counts)


def test_their_names() -> None:
    assert [task.name for task in ruler_tasks(["ruler_vt", "loss", "niah_single_1"], [4096], 1, 0)] == [
        "niah_single_1",
        "ruler_vt",
    ]
    from vllm_selfextend.cli import RULER_NAMES

    assert [name.value for name in RULER_NAMES] == list(RULER_TASKS)
