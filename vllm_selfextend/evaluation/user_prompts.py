"""The user's own task: prompts and their answers from a file."""

import json
import unicodedata
from collections.abc import Iterator, Mapping
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
        lines: By their numbers in the file, each with `prompt` and `answer`, which is right if the model's answer
            contains it.
        max_length: The most tokens of a prompt and its answer.
        answer_tokens: How many tokens an answer may take.

    """

    lines: Mapping[int, dict[str, str]]
    max_length: int
    answer_tokens: int = 64

    name = "prompts"
    scores_prompt = False

    def prompts(self, encode: Encode) -> Iterator[Prompt]:
        for number, line in self.lines.items():
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
        """Right if the answer contains what was expected, in whatever case and however its letters are composed."""
        answer, expected = output.outputs[0].text, prompt.expected or ""
        return {"expected": expected, "answer": answer, "found": _alike(expected.strip()) in _alike(answer)}


def read_prompts(path: Path) -> dict[int, dict[str, str]]:
    r"""Read a file of lines such as `{"prompt": "...", "answer": "..."}`.

    Only `\n` ends a line: JSON allows all other line breaks of Unicode inside its strings. A line that is another one
    again is left out, since an answer counted twice looks like two.

    Returns:
        The lines by their numbers in the file, from 1.

    Raises:
        ValueError: It cannot be read, has no line, or a line is something else.

    """
    try:
        content = path.read_bytes().decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"The prompts {path} cannot be read: {error}") from error
    lines: dict[int, dict[str, str]] = {}
    seen = set()
    for number, text in enumerate(content.split("\n"), 1):
        if not text.strip():
            continue
        try:
            line = json.loads(text)
        except ValueError as error:
            raise ValueError(f"Line {number} of {path} is not JSON: {error}") from error
        values = {key: line.get(key) for key in ("prompt", "answer")} if isinstance(line, dict) else {}
        texts = {key: value for key, value in values.items() if isinstance(value, str) and value.strip()}
        if len(texts) < 2:
            raise ValueError(
                f'Line {number} of {path} must be an object such as {{"prompt": "...", "answer": "..."}}, with texts '
                "that have more than spaces."
            )
        _check_characters(texts, f"Line {number} of {path}")
        if (one := tuple(texts.values())) not in seen:
            seen.add(one)
            lines[number] = texts
    if not lines:
        raise ValueError(f"{path} has no prompts: each line is to be an object with prompt and answer.")
    return lines


def _check_characters(texts: dict[str, str], where: str) -> None:
    for key, value in texts.items():
        try:
            value.encode()
        except UnicodeEncodeError as error:
            half = f"\\u{ord(value[error.start]):04x}"
            raise ValueError(
                f"{where} has {half} in its {key}, one half of a surrogate pair, which is no character: write both "
                "halves, or the character itself."
            ) from error


def _alike(text: str) -> str:
    """A text so that two which read the same, but for their case, are the same."""
    return unicodedata.normalize("NFC", unicodedata.normalize("NFD", text).casefold())
