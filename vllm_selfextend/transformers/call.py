"""What belongs to one call of an extended model: its arguments carry it, so no other call, in any thread, sees it."""

import inspect
import threading
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from .layer import MODEL_ATTRIBUTE, Extension
from .step import Step

KEYWORD = "self_extend"
"""The keyword by which a model hands a `Call` to its layers, and a layer its `GroupingCache` to its attention."""


@dataclass
class Call:
    """One call of an extended model, or of one of its layers.

    Attributes:
        extension: The model's.
        output_attentions: Whether the weights of the attention are asked for.
        has_attentions: Whether a layer has given them.

    """

    extension: Extension
    output_attentions: bool = False
    has_attentions: bool = False
    _last: tuple[torch.Tensor | None, int, int, Step] | None = None

    @staticmethod
    def of(extension: Extension, kwargs: dict[str, Any]) -> "Call":
        """The call of a module that is given these keywords."""
        return Call(extension, bool(kwargs.get("output_attentions", extension.config.output_attentions)))

    def step(self, mask: torch.Tensor | None, num_rows: int, num_keys: int, device: torch.device) -> Step:
        """`Step.of`, worked out once for all layers that get the same mask.

        Raises:
            ValueError: See `Step.of`; or the sequence is longer than the numbers reach.

        """
        if torch.compiler.is_compiling():
            return Step.of(mask, num_rows, num_keys, device)
        last = self._last
        if (
            last is None
            or last[0] is not mask
            or last[1:3] != (num_rows, num_keys)
            or last[3].query_pos.device != device
        ):
            step = Step.of(mask, num_rows, num_keys, device)
            length = num_keys if mask is None else int(step.query_pos.max()) + 1
            if length > self.extension.plan.capacity:
                raise ValueError(self.extension.too_long(length))
            last = self._last = mask, num_rows, num_keys, step
        return last[3]


def begin_call(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], Any]:
    """A forward pre-hook of the base model: hand its layers a `Call`, by a keyword, which models pass on."""
    if torch.compiler.is_compiling():
        return args, kwargs
    extension: Extension = getattr(model, MODEL_ATTRIBUTE)
    call = extension.calls[threading.get_ident()] = Call.of(extension, kwargs)
    return args, {**kwargs, KEYWORD: call} if takes_keywords(model) else kwargs


def end_call(model: nn.Module, args: tuple[Any, ...], output: Any) -> None:
    """A forward hook of the base model, which runs where the call has raised, too.

    Raises:
        ValueError: Weights of the attention were asked for, and no layer was told.

    """
    if torch.compiler.is_compiling():
        return
    call: Call | None = getattr(model, MODEL_ATTRIBUTE).calls.pop(threading.get_ident(), None)
    if output is not None and call is not None and call.output_attentions and not call.has_attentions:
        raise ValueError(
            f"{type(model).__name__} does not tell its layers that output_attentions is asked for, and there would be "
            "none in its answer. Leave it out."
        )


def takes_keywords(module: nn.Module) -> bool:
    """Whether a module's `forward` takes keywords that it does not name."""
    return any(p.kind is p.VAR_KEYWORD for p in inspect.signature(module.forward).parameters.values())
