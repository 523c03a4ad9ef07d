"""How each layer of a model rotates, found by watching it.

One token goes through the model at several positions, each time alone: it then has its value for an answer, whatever
the scores, so every layer's input is the same every time, to the bit, and its queries and keys differ by their rotation
only. (In a batch, the rows of a matrix product are rounded differently.)
"""

from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface

from ..rotation_probe import ModelRotation, matching_rotation

NAME = "self_extend_watch"

POSITIONS = torch.tensor([0, 1, 2, 3, 7, 31, 200])


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
    seen.append(Seen(module, query.detach(), key.detach(), bool(attention_mask.all())))
    return value.repeat_interleave(query.shape[1] // value.shape[1], 1).transpose(1, 2).contiguous(), None


def _watched_mask(batch_size: int, local_size: int | None = None, device: Any = "cpu", **kwargs: Any) -> torch.Tensor:
    """True marks the layers that see the whole context. (What they pass as `sliding_window` tells nothing.)"""
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
    model.set_attn_implementation(NAME)
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
    finally:
        _seen.reset(before)
    return [
        replace(same[0], query=torch.cat([s.query for s in same]), key=torch.cat([s.key for s in same]))
        for same in zip(*by_position, strict=True)
    ]


def find_rotations(model: Any) -> dict[Any, ModelRotation]:
    """The rotation of every attention module that sees the whole context.

    Raises:
        ValueError: There is none, one has no RoPE, or how it rotates cannot be told.

    """
    seen = watch(model)
    if not seen:
        raise ValueError(
            f"none of {type(model).__name__}'s layers attends through transformers' AttentionInterface, where "
            "Self-Extend takes its place."
        )
    candidates = [b.detach().float().cpu() for name, b in model.named_buffers() if name.endswith("inv_freq")]
    found: dict[Any, ModelRotation] = {}
    without: list[nn.Module] = []
    for layer in [layer for layer in seen if layer.sees_all]:
        name = type(layer.module).__name__
        if layer.query.shape[-1] != layer.key.shape[-1]:
            raise ValueError(f"the queries and keys of {name} have different sizes, so how it rotates is not known.")
        both = torch.cat([layer.query, layer.key], 1)[:, :, 0].transpose(0, 1)  # [heads, positions, head_size]
        if _is_still(both):
            without.append(layer.module)
            continue
        rotation = matching_rotation(both[:, :1], both, POSITIONS, candidates)
        if rotation is None:
            raise ValueError(
                f"how {name} rotates its queries and keys is not known: it is by none of the model's inv_freq, in "
                "neither pairing of dimensions, and a key turned back wrongly would give wrong answers."
            )
        found[layer.module] = rotation
    if without:
        which = "its layers" if not found else f"{len(without)} of its layers that see the whole context"
        raise ValueError(f"{which} have no rotary position embeddings (RoPE), which Self-Extend re-maps.")
    if not found:
        raise ValueError(
            "every layer attends to a sliding window, so there is no long attention to extend. Load the model with "
            "sliding_window=None in its config, and pass the window as trained_length."
        )
    return found


def _is_still(x: torch.Tensor) -> bool:
    """Whether `[heads, positions, head_size]` is the same at all positions, and not by being nothing."""
    allowed = 8 * torch.finfo(x.dtype).eps * x.abs().amax(-1, keepdim=True)
    return bool(((x - x[:, :1]).abs() <= allowed).all()) and bool(x.any())
