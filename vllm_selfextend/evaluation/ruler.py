"""Six tasks of RULER (Hsieh et al., arXiv 2404.06654): those whose prompts need no download.

lm-evaluation-harness makes the prompts and says what an answer is worth. For the other seven it would fetch essays to
hide needles in, and articles to ask about.
"""

import contextlib
import os
import random
import signal
import sys
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, TypeAlias

from .prompts import Encode, Prompt, Row
from .screen import ENDING

if TYPE_CHECKING:
    from vllm import RequestOutput

Samples: TypeAlias = list[dict[str, Any]]
"""The harness's: `input`, `gen_prefix` and `outputs` among others."""

LEAST = 2048
"""Tokens: in shorter texts some tasks have no room for what they hide, and the harness searches without end."""

EXAMPLE_TOKENS = 500
"""What the harness's example of variable tracking is cut to, in any length."""


@dataclass(frozen=True)
class RulerTask:
    """One of the tasks.

    Attributes:
        name: RULER's, in `RULER_TASKS`.
        lengths: Tokens of prompt and answer together. The harness fills them in steps, some of 25 lines.
        rounds: Prompts of each length.
        seed: Of every random choice.

    """

    name: str
    lengths: tuple[int, ...]
    rounds: int
    seed: int

    scores_prompt = False

    @property
    def answer_tokens(self) -> int:
        """RULER's."""
        return RULER_TASKS[self.name].answer_tokens

    def prompts(self, encode: Encode) -> Iterator[Prompt]:
        """As the harness makes them, each with its answer and a chat template within its length.

        Raises:
            ValueError: A length is less than `LEAST`, or the tokenizer makes so many tokens of a text that the
                harness could not make one.

        """
        for length in sorted({*self.lengths}):
            if length < LEAST:
                raise ValueError(
                    f"--length {length} is too short for {self.name}: RULER's prompts need {LEAST} tokens. Ask for a "
                    "longer one."
                )
            samples = self._samples(length, encode)
            for turn, (sample, token_ids) in enumerate(samples):
                cell = {"length": length, "round": turn}
                text = f"{sample['input']} {sample['gen_prefix']}"
                yield Prompt(f"{self.name}/{length}/{turn}", cell, text, token_ids, "\n".join(sample["outputs"]))

    def score(self, prompt: Prompt, output: "RequestOutput") -> Row:
        """The share of what was asked for that the answer contains, in whatever case."""
        from lm_eval.tasks.ruler.common_utils import postprocess_pred, string_match_all

        answer, expected = output.outputs[0].text, (prompt.expected or "").split("\n")
        return {
            "expected": expected,
            "answer": answer,
            "score": string_match_all(postprocess_pred([answer]), [expected]),
        }

    def _samples(self, length: int, encode: Encode) -> list[tuple[dict[str, Any], list[int]]]:
        """Samples and their tokens.

        The harness counts texts without a chat's frame, and some without the answer's beginning or the answer, so each
        is said to have `spare` tokens more until all fit. The length stays: the harness goes by it in other ways too.
        """
        frame = len(encode("", ""))
        spare = 0
        while True:
            count = Counter(encode, frame, spare)
            with _harness(f"{self.seed}/{self.name}/{length}"):
                samples = RULER_TASKS[self.name].make(count, length, self.rounds)
            whole = [sample for sample in samples if sample["outputs"]]  # without any, every answer would be right
            if len(whole) < self.rounds:
                raise ValueError(
                    f"lm-evaluation-harness made {len(whole)} of {self.rounds} prompts of {length} tokens for "
                    f"{self.name}: the others do not fit. Ask for a longer --length."
                )
            encoded = [(sample, encode(sample["input"], sample["gen_prefix"])) for sample in whole]
            over = max(len(token_ids) for _, token_ids in encoded) + self.answer_tokens - length
            if over <= 0:
                return encoded
            spare += over


@dataclass(frozen=True)
class Counter:
    """What the harness takes for a tokenizer: of its answer it reads `input_ids`, and of these how many there are.

    Attributes:
        encode: A text's tokens, a chat's frame included.
        frame: Tokens of that, which are not counted.
        spare: Tokens that each text is said to have more.

    """

    encode: Encode
    frame: int = 0
    spare: int = 0

    def __call__(self, text: str) -> SimpleNamespace:
        token_ids = self.encode(text, "")
        return SimpleNamespace(input_ids=range(len(token_ids) - self.frame + self.spare))


@dataclass(frozen=True)
class Kind:
    """How the harness makes a task's prompts, and RULER's room for the answer."""

    make: Callable[["Counter", int, int], Samples]
    answer_tokens: int


def _needles(count: Counter, length: int, rounds: int, haystack: str, key: str, value: str) -> Samples:
    from lm_eval.tasks.ruler import niah_utils

    samples: Samples = niah_utils.generate_samples(
        niah_utils.get_haystack(haystack),
        TOKENIZER=count,
        max_seq_length=length,
        num_samples=rounds,
        template=niah_utils.TEMPLATE,
        type_haystack=haystack,
        type_needle_k=key,
        type_needle_v=value,
    )
    return samples


def _variables(count: Counter, length: int, rounds: int) -> Samples:
    from lm_eval.tasks.ruler import niah_utils, vt_utils

    bare = replace(count, spare=0)
    # Were there no room for five sentences and the assignments, the harness's search for an example would not end.
    noise = " ".join([niah_utils.get_haystack("repeat")] * 5)
    tokens = len(bare(vt_utils.TEMPLATE.format(context=noise, query=10000, num_v=5)).input_ids)
    if tokens > EXAMPLE_TOKENS - 150:
        raise ValueError(
            f"ruler_vt is not for this tokenizer: it makes {tokens} tokens of the shortest example, and RULER has "
            f"{EXAMPLE_TOKENS} for one with its answer. Name the other tasks one by one."
        )
    make = vt_utils.sys_vartrack_w_noise_random
    (example,) = make(bare, num_samples=1, max_seq_length=EXAMPLE_TOKENS, incremental=5)
    samples: Samples = make(count, num_samples=rounds, max_seq_length=length, icl_example=example)
    return samples


def _common_words(count: Counter, length: int, rounds: int) -> Samples:
    from lm_eval.tasks.ruler import cwe_utils

    samples: Samples = cwe_utils.sys_word_pair_random(rounds, length, tokenizer=count)
    # RULER's own prompt begins with an example, for which the harness leaves room and which it leaves out.
    return [{**sample, "input": f"{sample['input_example']}\n{sample['input']}"} for sample in samples]


def _frequent_words(count: Counter, length: int, rounds: int) -> Samples:
    from lm_eval.tasks.ruler import fwe_utils

    samples: Samples = fwe_utils.sys_kwext(count, length, num_samples=rounds)
    return samples


RULER_TASKS = {
    "niah_single_1": Kind(partial(_needles, haystack="repeat", key="words", value="numbers"), 128),
    "niah_multikey_2": Kind(partial(_needles, haystack="needle", key="words", value="numbers"), 128),
    "niah_multikey_3": Kind(partial(_needles, haystack="needle", key="uuids", value="uuids"), 128),
    "ruler_vt": Kind(_variables, 30),
    "ruler_cwe": Kind(_common_words, 120),
    "ruler_fwe": Kind(_frequent_words, 50),
}
"""By the harness's names, with its parameters: a needle in a repeated sentence, among other needles, and among others
that are all uuids; a chain of variables; the ten words said most often; the three most frequent of invented words."""


def ruler_tasks(names: Collection[str], lengths: Sequence[int], rounds: int, seed: int) -> list[RulerTask]:
    """Those of these names, in RULER's order."""
    return [RulerTask(name, tuple(lengths), rounds, seed) for name in RULER_TASKS if name in names]


@contextlib.contextmanager
def _harness(seed: str) -> Iterator[None]:
    """While open, the harness draws from a seed, prints to stderr, fetches nothing, and signals wait.

    It draws from random's, NumPy's and a module's own source, and its loops swallow whatever a signal raises.
    """
    with _signals_wait(), contextlib.redirect_stdout(sys.stderr):
        numpy_random, words_random = _import_harness()
        state, numpy_state, words_state = random.getstate(), numpy_random.get_state(), words_random.getstate()
        random.seed(seed)
        numpy_random.seed(random.getrandbits(32))
        words_random.seed(seed)
        try:
            yield
        finally:
            random.setstate(state)
            numpy_random.set_state(numpy_state)
            words_random.setstate(words_state)


@contextlib.contextmanager
def _signals_wait() -> Iterator[None]:
    """While open, signals that ask to end are only remembered; the first of them is raised again at the end.

    A mask would not do: it is one thread's, and NumPy has threads that would take them.
    """
    came: list[int] = []
    before = {signum: signal.signal(signum, lambda signum, frame: came.append(signum)) for signum in ENDING}
    try:
        yield
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)
        if came:
            signal.raise_signal(came[0])


def _import_harness() -> tuple[Any, random.Random]:
    """Import it without a look for data that only its other tasks need: that is the first process's of several.

    Returns:
        NumPy's source of random numbers, and the one of the module that shuffles words.

    """
    rank = os.environ.get("LOCAL_RANK")
    os.environ["LOCAL_RANK"] = "1"
    try:
        import numpy as np
        from lm_eval.tasks.ruler import cwe_utils, niah_utils  # noqa: F401
    finally:
        if rank is None:
            del os.environ["LOCAL_RANK"]
        else:
            os.environ["LOCAL_RANK"] = rank
    return np.random, cwe_utils.RNG
