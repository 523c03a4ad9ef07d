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
    """One call of an extended model, or of one of its layers."""

    extension: Extension
    _last: tuple[torch.Tensor | None, int, int, Step] | None = None

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
    extension.threads.add(threading.get_ident())
    return args, {**kwargs, KEYWORD: Call(extension)} if takes_keywords(model) else kwargs


def end_call(model: nn.Module, *_: Any) -> None:
    """A forward hook of the base model, which runs where the call has raised, too."""
    if not torch.compiler.is_compiling():
        getattr(model, MODEL_ATTRIBUTE).threads.discard(threading.get_ident())


def takes_keywords(module: nn.Module) -> bool:
    """Whether a module's `forward` takes keywords that it does not name."""
    return any(p.kind is p.VAR_KEYWORD for p in inspect.signature(module.forward).parameters.values())
