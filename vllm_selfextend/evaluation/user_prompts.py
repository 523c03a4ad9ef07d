"""The user's own task: prompts and their answers from a file."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from .prompts import Encode, Prompt, Row

if TYPE_CHECKING:
    from vllm import RequestOutput


@dataclass(frozen=True)
class UserTask:
    """Prompts of a JSON Lines file.

    Attributes:
        lines: Each with `prompt` and `answer`, which is right if the model's answer contains it.
        max_length: The most tokens of a prompt and its answer.
        answer_tokens: How many tokens an answer may take.

    """

    lines: list[dict[str, str]]
    max_length: int
    answer_tokens: int = 64

    name = "prompts"
    scores_prompt = False

    def prompts(self, encode: Encode) -> Iterator[Prompt]:
        for number, line in enumerate(self.lines, 1):
            token_ids = encode(line["prompt"], "")
            length = len(token_ids) + self.answer_tokens
            if length > self.max_length:
                raise ValueError(
                    f"The prompt of line {number} and {self.answer_tokens} tokens for its answer are {length} tokens, "
                    f"more than --max-model-len {self.max_length}."
                )
            cell = {"length": length, "line": number}
            yield Prompt(f"{self.name}/{number}", cell, line["prompt"], token_ids, line["answer"])

    def score(self, prompt: Prompt, output: "RequestOutput") -> Row:
        """Right if the answer contains what was expected, in whatever case."""
        answer, expected = output.outputs[0].text, prompt.expected or ""
        return {"expected": expected, "answer": answer, "found": expected.casefold() in answer.casefold()}


def read_prompts(path: Path) -> list[dict[str, str]]:
    """Read a file of lines such as `{"prompt": "...", "answer": "..."}`.

    Raises:
        ValueError: It cannot be read, has no line, or a line is something else.

    """
    try:
        content = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"The prompts {path} cannot be read: {error}") from error
    lines = []
    for number, text in enumerate(content.splitlines(), 1):
        if not text.strip():
            continue
        try:
            line = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"Line {number} of {path} is not JSON: {error}") from error
        values = [line.get(key) for key in ("prompt", "answer")] if isinstance(line, dict) else [None]
        if not all(isinstance(value, str) and value for value in values):
            raise ValueError(f'Line {number} of {path} must be an object such as {{"prompt": "...", "answer": "..."}}.')
        lines.append({"prompt": line["prompt"], "answer": line["answer"]})
    if not lines:
        raise ValueError(f"{path} has no prompts: each line is to be an object with prompt and answer.")
    return lines
