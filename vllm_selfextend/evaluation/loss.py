"""The loss task: how well each token of a long text is foretold by those before it."""

import importlib.util
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from .prompts import Encode, Prompt, Row

if TYPE_CHECKING:
    from vllm import RequestOutput

LEAST = 3
"""Tokens: nothing foretells the first, and the last place is the answer's."""

BLOCK = 256
"""Tokens whose losses are added up to one number in the record."""

STANDARD_LIBRARY = ("_pydecimal", "turtle")
"""Modules of Python's own that are long: texts which every machine has."""


@dataclass(frozen=True)
class LossTask:
    """Every text, cut to one length.

    Attributes:
        texts: By name.
        length: Tokens that are read of each text.

    """

    texts: dict[str, str]
    length: int

    name = "loss"
    answer_tokens = 1
    scores_prompt = True

    def prompts(self, encode: Encode) -> Iterator[Prompt]:
        if self.length < LEAST:
            raise ValueError(f"A loss takes at least {LEAST} tokens of a text, and {self.length} are to be read.")
        for source, text in self.texts.items():
            # More than enough for any tokenizer, and no book is tokenized for its first page.
            token_ids = encode(text[: 20 * self.length], "")[: self.length - self.answer_tokens]
            if len(token_ids) < self.length - self.answer_tokens:
                raise ValueError(
                    f"{source} has {len(token_ids)} tokens, and {self.length - self.answer_tokens} are to be read. "
                    "Give a longer text, or a shorter length for the loss."
                )
            yield Prompt(f"{self.name}/{source}", {"length": self.length, "text": source}, text, token_ids)

    def score(self, prompt: Prompt, output: "RequestOutput") -> Row:
        """The sum of `-ln p` over each block of `BLOCK` positions; nothing foretells the token at position 0."""
        scored = output.prompt_logprobs or []
        losses = [0.0, *(-scored[i][prompt.token_ids[i]].logprob for i in range(1, len(prompt.token_ids)))]
        blocks = [losses[begin : begin + BLOCK] for begin in range(0, len(losses), BLOCK)]
        return {"block_losses": [round(sum(block), 3) for block in blocks]}


def loss_task(paths: Sequence[Path], length: int | None, max_model_len: int) -> LossTask:
    """The task on texts of files, or on Python's own without one; all `max_model_len` tokens unless `length` says less.

    Raises:
        ValueError: `length` is more, or a text cannot be read.

    """
    if length is not None and length > max_model_len:
        raise ValueError(f"--loss-length {length} is more than --max-model-len {max_model_len}.")
    return LossTask(read_texts(paths) if paths else standard_library_texts(), length or max_model_len)


def mean_losses(block_losses: Sequence[float], num_tokens: int) -> Iterator[tuple[int, int, float]]:
    """Each block's first position, the one behind its last, and its mean loss per token.

    Args:
        block_losses: As `LossTask.score` gives them.
        num_tokens: Of the prompt: its last block may be a part of one.

    """
    for begin, total in zip(range(0, num_tokens, BLOCK), block_losses, strict=True):
        end = min(begin + BLOCK, num_tokens)
        yield begin, end, total / (end - max(begin, 1))


def standard_library_texts() -> dict[str, str]:
    """The source of the modules in `STANDARD_LIBRARY`.

    Raises:
        ValueError: This Python has one of them without its source.

    """
    texts = {}
    for name in STANDARD_LIBRARY:
        spec = importlib.util.find_spec(name)
        if spec is None or spec.origin is None or not Path(spec.origin).is_file():
            raise ValueError(f"This Python comes without the source of its module {name}: give a text with --text.")
        texts[f"{name}.py"] = Path(spec.origin).read_text(encoding="utf-8")
    return texts


def read_texts(paths: Sequence[Path]) -> dict[str, str]:
    """The texts of files, by their names.

    Raises:
        ValueError: A file cannot be read as UTF-8 text, or two have the same name.

    """
    texts: dict[str, str] = {}
    for path in paths:
        if path.name in texts:
            raise ValueError(f"Two texts are called {path.name}: rename one, since the results go by the name.")
        try:
            texts[path.name] = path.read_text(encoding="utf-8-sig")
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"The text {path} cannot be read: {error}") from error
    return texts
