"""How each layer of a model rotates, found by watching it.

One token goes through the model at several positions, each time alone: it then has its value for an answer, whatever
the scores, so every layer's input is the same every time, to the bit, and its queries and keys differ by their rotation
only. (In a batch, the rows of a matrix product are rounded differently.)
"""

from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import causal_mask_function

from ..method.rope import Frequencies, inverse_frequencies, rope_parameters
from ..method.rotation_probe import ModelRotation, rotation_of
from .own_attention import set_attention

NAME = "self_extend_watch"

POSITIONS = torch.tensor([0, 1, 2, 3, 7, 31, 200])

NO_ROPE = "its layers have no rotary position embeddings (RoPE), which Self-Extend re-maps."


@dataclass(frozen=True)
class Seen:
    """What an attention module did with the token; queries and keys `[positions, heads, 1, head_size]`."""

    module: nn.Module
    query: torch.Tensor
    key: torch.Tensor
    sees_all: bool


_seen: ContextVar[list[Seen] | None] = ContextVar("seen", default=None)
"""What `watch` has seen, in the thread that it runs in."""


def _watch(
    module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask: Any, **kwargs: Any
) -> tuple[torch.Tensor, None]:
    seen = _seen.get()
    if seen is None:
        raise RuntimeError("the model is called while SelfExtend.apply looks at how it rotates: wait for its return.")
    seen.append(Seen(module, query.detach().cpu(), key.detach().cpu(), bool(attention_mask.all())))
    return value.repeat_interleave(query.shape[1] // value.shape[1], 1).transpose(1, 2).contiguous(), None


def _watched_mask(
    batch_size: int,
    mask_function: Callable[..., torch.Tensor] = causal_mask_function,
    local_size: int | None = None,
    device: Any = "cpu",
    **kwargs: Any,
) -> torch.Tensor:
    """True marks the layers that see the whole context. (What they pass as `sliding_window` tells nothing.)

    Raises:
        ValueError: A token sees the one after it.

    """
    first, second = torch.tensor(0), torch.tensor(1)
    if bool(mask_function(first, first, first, second)):
        raise ValueError("its attention is not causal: tokens see those after them, and Self-Extend's do not.")
    return torch.full((batch_size, 1, 1, 1), local_size is None, device=device)


AttentionInterface.register(NAME, _watch)
AttentionMaskInterface.register(NAME, _watched_mask)


@torch.no_grad()
def some_embeddings(model: Any) -> torch.Tensor:
    """What a model makes of its first tokens, `[tokens, hidden_size]`, where it computes, in the dtype that it does.

    Raises:
        ValueError: It has no weights.

    """
    embeddings = model.get_input_embeddings()
    weight = embeddings.weight
    # Of an offloaded weight only the shape is here, on "meta": the module fetches it, and moves its input as well.
    tokens = torch.arange(min(256, len(weight)), device="cpu" if weight.is_meta else weight.device)
    embedded: torch.Tensor = embeddings(tokens)
    if embedded.is_meta:
        raise ValueError("the model's weights are on the device 'meta', which holds no numbers: load them first.")
    return embedded


@torch.no_grad()
def watch(model: Any) -> list[Seen]:
    """What each attention module does, in the order of the layers; the model's attention is set to `NAME` after it."""
    embedded = some_embeddings(model)
    # A padding token may be embedded as zeros, which no rotation turns.
    token = int(embedded.float().norm(dim=1).argmax())
    set_attention(model, NAME)
    by_position: list[list[Seen]] = []
    before = _seen.set(None)
    try:
        for position in POSITIONS.to(embedded.device):
            by_position.append([])
            _seen.set(by_position[-1])
            inputs = torch.full((1, 1), token, device=embedded.device)
            model(
                input_ids=inputs,
                attention_mask=torch.ones_like(inputs),
                position_ids=position[None, None],
                use_cache=False,
            )
            if not by_position[-1]:  # then a position further on may be past the end of some table
                return []
    finally:
        _seen.reset(before)
    return [
        replace(same[0], query=torch.cat([s.query for s in same]), key=torch.cat([s.key for s in same]))
        for same in zip(*by_position, strict=True)
    ]


def find_rotations(model: Any) -> dict[Any, ModelRotation]:
    """How every attention module rotates that has RoPE and sees the whole context.

    Raises:
        ValueError: There is none, or how one rotates cannot be told.

    """
    rotary_dim: int = getattr(model.config, "rotary_dim", None) or 0
    if not _tables(model) and not rotary_dim:
        raise ValueError(NO_ROPE)
    seen = watch(model)
    if not seen:
        raise ValueError(
            f"none of {type(model).__name__}'s layers attends through transformers' AttentionInterface, where "
            "Self-Extend takes its place."
        )
    candidates = [table.detach().float().cpu() for table in _tables(model)]  # offloaded ones are there from now on
    if not candidates:  # GPT-J has cosines and sines alone
        candidates = [inverse_frequencies(rope, rotary_dim) for rope in rope_parameters(model.config)]
    rotations = {layer.module: _rotation(layer, candidates) for layer in seen if layer.sees_all}
    found = {module: rotation for module, rotation in rotations.items() if rotation is not None}
    if found:
        return found
    if all(layer.sees_all for layer in seen):
        raise ValueError(NO_ROPE)
    if any(layer.sees_all for layer in seen):
        raise ValueError(
            "its layers with RoPE see a part of the context only (a window or a chunk), and those that see all of it "
            "have no RoPE. No position leaves the trained range, so there is nothing to extend: without Self-Extend "
            "the model computes the same."
        )
    raise ValueError(
        "every layer attends to a sliding window, so there is no long attention to extend. Load the model with "
        "sliding_window=None in its config, and pass the window as trained_length."
    )


def _tables(model: Any) -> list[torch.Tensor]:
    """The frequencies that a model's rotary modules have."""
    return [buffer for name, buffer in model.named_buffers() if name.endswith("inv_freq")]


def _rotation(layer: Seen, candidates: list[Frequencies]) -> ModelRotation | None:
    """How a layer rotates; None: it does not.

    Raises:
        ValueError: That cannot be told.

    """
    name = type(layer.module).__name__
    if layer.query.shape[-1] != layer.key.shape[-1]:
        raise ValueError(f"the queries and keys of {name} have different sizes, so how it rotates is not known.")
    try:
        return rotation_of(layer.query[:, :, 0], layer.key[:, :, 0], POSITIONS, candidates)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error
