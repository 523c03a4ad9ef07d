"""What belongs to one call of an extended model: its thread is in it, so no call in another thread sees it."""

import threading
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from .layer import MODEL_ATTRIBUTE, NAME, Extension
from .step import Step


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

    def step(self, mask: torch.Tensor | None, num_rows: int, num_keys: int, device: torch.device) -> Step:
        """`Step.of`, worked out once for all layers that get the same mask.

        Raises:
            ValueError: See `Step.of`; or the sequence is longer than the numbers reach.

        """
        last = self._last
        if (
            last is None
            or last[0] is not mask
            or last[1:3] != (num_rows, num_keys)
            or last[3].query_pos.device != device
        ):
            step = Step.of(mask, num_rows, num_keys, device)
            length = num_keys if mask is None else int(step.query_pos.max()) + 1
            self.extension.check_length(length)
            last = self._last = mask, num_rows, num_keys, step
        return last[3]


_under_way: dict[int, list[Call]] = {}
"""The calls that a thread is in, by the thread, innermost last."""


def current_call() -> Call | None:
    """The call that this thread is in; none in a compiled function, or where a layer is called by itself."""
    if torch.compiler.is_compiling():
        return None
    calls = _under_way.get(threading.get_ident())
    return calls[-1] if calls else None


def is_called_elsewhere(extension: Extension) -> bool:
    """Whether another thread is in a call of the model."""
    others = [calls for thread, calls in list(_under_way.items()) if thread != threading.get_ident()]
    return any(call.extension is extension for calls in others for call in list(calls))


def begin_call(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """A forward pre-hook of the base model.

    Raises:
        RuntimeError: The model attends with something else by now.

    """
    if torch.compiler.is_compiling():
        return
    extension: Extension = getattr(model, MODEL_ATTRIBUTE)
    if (implementation := extension.config._attn_implementation) != NAME:
        raise RuntimeError(
            f"the model's attention was set to {implementation!r} after SelfExtend.apply. Call "
            "SelfExtend.remove(model), or SelfExtend.apply again."
        )
    call = Call(extension, bool(kwargs.get("output_attentions", extension.config.output_attentions)))
    _under_way.setdefault(threading.get_ident(), []).append(call)


def end_call(model: nn.Module, args: tuple[Any, ...], output: Any) -> None:
    """A forward hook of the base model, which runs where the call has raised, too, before `begin_call` even.

    Raises:
        ValueError: Weights of the attention were asked for, and no layer was told.

    """
    if torch.compiler.is_compiling():
        return
    call = current_call()
    if call is None or call.extension is not getattr(model, MODEL_ATTRIBUTE):
        return
    calls = _under_way[threading.get_ident()]
    calls.pop()
    if not calls:
        del _under_way[threading.get_ident()]
    if output is not None and call.output_attentions and not call.has_attentions:
        raise ValueError(
            f"output_attentions is asked for, and the compiled layers of {type(model).__name__} do not give any. Leave "
            "it out."
        )
