"""RULER's tasks: the harness's own prompts, which fit, and are the same wherever and whenever they are made."""

import importlib
import os
import random
import signal
import threading
from types import SimpleNamespace

import numpy as np
import pytest

from vllm_selfextend.evaluation import ruler
from vllm_selfextend.evaluation.ruler import RULER_TASKS, RulerTask, ruler_tasks
from vllm_selfextend.evaluation.screen import Stopped, stopped_by_signals

ruler._import_harness()  # before others do, which would look for data
common_utils, cwe_utils, fwe_utils, niah_utils, vt_utils = (
    importlib.import_module(f"lm_eval.tasks.ruler.{name}_utils") for name in ("common", "cwe", "fwe", "niah", "vt")
)

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


OWN_TASKS = {
    "niah_single_1": niah_utils.niah_single_1,
    "niah_multikey_2": niah_utils.niah_multikey_2,
    "niah_multikey_3": niah_utils.niah_multikey_3,
    "ruler_vt": vt_utils.get_vt_dataset,
    "ruler_cwe": cwe_utils.get_cw_dataset,
    "ruler_fwe": fwe_utils.fwe_download,
}


@pytest.mark.parametrize("length", [LENGTH, 4096])
@pytest.mark.parametrize("name", RULER_TASKS)
def test_prompts_are_the_harnesss_own(name: str, length: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its tasks make 500; ours are the first of them where both draw from one seed and count alike."""
    for module in (niah_utils, vt_utils, cwe_utils, fwe_utils):
        monkeypatch.setattr(module, "get_tokenizer", lambda name: ruler.Counter(lambda text, begins: text.split()))
    with ruler._harness("5"):
        theirs = OWN_TASKS[name](max_seq_lengths=[length])["test"]
    task = RulerTask(name, (length,), rounds=3, seed=0)
    monkeypatch.setattr(ruler, "_harness", lambda seed, harness=ruler._harness: harness("5"))
    monkeypatch.setitem(RULER_TASKS, name, ruler.Kind(RULER_TASKS[name].make, answer_tokens=-100))  # all fit at first
    ours = list(task.prompts(lambda text, begins: f"{text} {begins}".split()))
    assert len(theirs) == 500
    for one, sample in zip(ours, theirs.select(range(3)), strict=True):
        example = f"{sample['input_example']}\n" if name == "ruler_cwe" else ""
        assert one.text == f"{example}{sample['input']} {sample['gen_prefix']}"
        assert one.expected == "\n".join(sample["outputs"])


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
    with pytest.raises(ValueError, match="--length 2047 is too short for ruler_vt: RULER's prompts need 2048 tokens"):
        prompts_of("ruler_vt", 2047)
    task = RulerTask("ruler_vt", (LENGTH,), rounds=1, seed=0)
    with pytest.raises(ValueError, match=r"ruler_vt is not for this tokenizer: it makes \d+ tokens"):
        list(task.prompts(lambda text, begins: list(text)))  # a token a character


def test_prompts_that_the_harness_leaves_out(monkeypatch: pytest.MonkeyPatch) -> None:
    kind = ruler.Kind(lambda count, length, rounds: [], 30)
    monkeypatch.setitem(RULER_TASKS, "ruler_vt", kind)
    with pytest.raises(ValueError, match="made 0 of 2 prompts of 2048 tokens for ruler_vt"):
        prompts_of("ruler_vt")


def test_prompts_without_an_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    sample = {"input": "No word.", "gen_prefix": "They are", "outputs": []}
    monkeypatch.setitem(RULER_TASKS, "ruler_cwe", ruler.Kind(lambda count, length, rounds: [sample] * rounds, 30))
    with pytest.raises(ValueError, match="made 0 of 2 prompts of 2048 tokens for ruler_cwe"):
        prompts_of("ruler_cwe")


def test_a_signal_waits_for_the_harness(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its loops have a bare `except`, which would swallow what the signal raises; any thread may take the signal."""
    done: list[int] = []
    generate = vt_utils.generate_input_output

    def interrupted(*args: int, **more: int) -> tuple:
        if not done:
            os.kill(os.getpid(), signal.SIGTERM)
        result = generate(*args, **more)
        done.append(1)
        return result

    monkeypatch.setattr(vt_utils, "generate_input_output", interrupted)
    stop = threading.Event()
    other = threading.Thread(target=stop.wait)
    other.start()
    try:
        with pytest.raises(Stopped), stopped_by_signals():
            prompts_of("ruler_vt", rounds=1)
    finally:
        stop.set()
        other.join()
    assert len(done) > 5, "after all of the harness's work"


def test_their_names() -> None:
    assert [task.name for task in ruler_tasks(["ruler_vt", "loss", "niah_single_1"], [4096], 1, 0)] == [
        "niah_single_1",
        "ruler_vt",
    ]
    from vllm_selfextend.cli import RULER_NAMES

    assert [name.value for name in RULER_NAMES] == list(RULER_TASKS)
