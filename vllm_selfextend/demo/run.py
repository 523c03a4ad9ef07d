"""The demo: how many passkeys the small model finds, unmodified and with Self-Extend, over the length of the text."""

import dataclasses
from collections.abc import Iterable
from typing import TYPE_CHECKING

from ..evaluation.passkey import PasskeyTask
from . import MODEL_DIR

if TYPE_CHECKING:
    from ..evaluation.comparison import Comparison
    from ..evaluation.prompts import Prompt

METHOD_NAMES = ("unmodified", "self-extend")
"""Of the methods."""

TASK = PasskeyTask(
    lengths=(256, 512, 1024, 2048, 4096),
    depths=tuple(step / 20 for step in range(21)),
    key_counts=(1, 4),
    rounds=2,
)
"""With 21 depths, 42 prompts per length and number of keys."""

ENGINE_ARGS = {"dtype": "float32"}


def comparison() -> "Comparison":
    """The demo's model, methods and prompts; everything else is as for any model."""
    from ..evaluation.comparison import Comparison
    from ..evaluation.engine import prompt_encoder
    from ..evaluation.methods import METHODS, read_checkpoint

    model = str(MODEL_DIR)
    checkpoint = read_checkpoint(model, max(TASK.lengths), {}, ENGINE_ARGS)
    # Its chat template only joins messages.
    encode, _, _ = prompt_encoder(model, ENGINE_ARGS, chat=False)
    asked = {"demo": dataclasses.asdict(TASK)}
    prompts = list(TASK.prompts(encode))
    return Comparison(checkpoint, [METHODS[name] for name in METHOD_NAMES], [(TASK, prompts)], ENGINE_ARGS, asked)


def example(prompts: "Iterable[Prompt]") -> "Prompt":
    """One of the demo's prompts of the longest kind, with most keys, that asks for the one in the middle."""
    wanted = {"length": max(TASK.lengths), "num_keys": max(TASK.key_counts), "depth": 0.5, "round": 0}
    return next(prompt for prompt in prompts if prompt.cell == wanted)
