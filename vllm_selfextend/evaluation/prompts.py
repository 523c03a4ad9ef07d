"""What is asked and what comes back: the words that tasks, engines, records, tables and plots share."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

if TYPE_CHECKING:
    from vllm import RequestOutput

Row: TypeAlias = dict[str, Any]
"""What became of one prompt, as JSON keeps it: `name`, `task` and `method`, the prompt's cell, and the score."""

Encode: TypeAlias = Callable[[str, str], list[int]]
"""From a text, and what the answer begins with, to the tokens of the whole prompt, a chat template's included."""


@dataclass(frozen=True)
class Prompt:
    """One prompt.

    Attributes:
        name: Like no other's of the run.
        cell: Where it belongs in the task's tables, `length` in tokens (room for the answer included) among others.
        text: For people; without the chat template.
        token_ids: What vLLM is given.
        expected: The right answer, if there is one; of several parts, a line each.
        choices: Tokens whose log-probabilities at the beginning of the answer are wanted.

    """

    name: str
    cell: dict[str, Any]
    text: str
    token_ids: list[int]
    expected: str | None = None
    choices: tuple[int, ...] = ()


class Task(Protocol):
    """A kind of question."""

    @property
    def name(self) -> str:
        """As on the command line."""

    @property
    def answer_tokens(self) -> int:
        """How many tokens an answer may take."""

    @property
    def scores_prompt(self) -> bool:
        """Whether the log-probabilities of the prompt's own tokens are wanted."""

    def prompts(self, encode: Encode) -> Iterator[Prompt]:
        """The same prompts for every method, those that begin alike one after another.

        Raises:
            ValueError: A prompt cannot be made.

        """

    def score(self, prompt: Prompt, output: "RequestOutput") -> Row:
        """What the answer is worth: the part of a row that only the task knows."""
