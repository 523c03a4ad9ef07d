"""Classes of transformers' whose code attends by itself: here they attend through its `AttentionInterface`.

A module gets a `forward` of its own, which calls the function that the config names and hands it what else it was
called with. No class is changed, and a call keeps nothing on the module.
"""

import functools
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS


def open_attention(model: nn.Module) -> None:
    """Give the modules of such classes their other `forward`.

    Raises:
        ValueError: Something else has put its `forward` there.

    """
    for module in model.modules():
        if (forward := FORWARDS.get(type(module).__name__)) is None:
            continue
        if "forward" in vars(module):
            raise ValueError(
                f"the forward of its {type(module).__name__} has been replaced (a hook on the module itself?), and "
                "Self-Extend puts its own there. Call SelfExtend.apply before what has replaced it."
            )
        module.forward = functools.partial(forward, module)


def close_attention(model: nn.Module) -> None:
    """Give back what `open_attention` took."""
    for module in model.modules():
        if getattr(vars(module).get("forward"), "func", None) in FORWARDS.values():
            del module.forward


def set_attention(model: Any, name: str) -> None:
    """Set what a model attends with, also where transformers knows its code to attend by itself."""
    if any(type(module).__name__ in FORWARDS for module in model.modules()):
        model.config._attn_implementation = name
    else:
        model.set_attn_implementation(name)


def _attend(
    module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None, **kwargs: Any
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """`[batch, heads, tokens, head_size]` to `[batch, tokens, heads, head_size]`, and the weights if asked for."""
    function = ALL_ATTENTION_FUNCTIONS[module.config._attn_implementation]
    attended: tuple[torch.Tensor, torch.Tensor | None] = function(module, query, key, value, mask, **kwargs)
    return attended


def _falcon(
    module: Any,
    hidden_states: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    layer_past: Any = None,
    position_embeddings: Any = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    heads = module._split_heads(module.query_key_value(hidden_states))
    query, key, value = (one.transpose(1, 2) for one in heads)
    query, key = sys.modules[type(module).__module__].apply_rotary_pos_emb(query, key, *position_embeddings)
    if layer_past is not None:
        key, value = layer_past.update(key, value, module.layer_idx)
    attended, weights = _attend(module, query, key, value, attention_mask, **kwargs)
    return module.dense(attended.flatten(2)), weights


class _GPTJ:
    """A module for the time of one call: its table reaches every position, and it attends as others do."""

    def __init__(self, module: Any) -> None:
        self._module = module

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)

    def _get_embed_positions(self, position_ids: torch.Tensor) -> torch.Tensor:
        """`[batch, positions, rotary_dim]`; the model's own ends at the length that it was trained on."""
        module, needed = self._module, int(position_ids.max()) + 1
        table: torch.Tensor = module.embed_positions
        if len(table) < needed:
            # Twice as many, so that a text that grows token by token does not make a table each time.
            size = 1 << needed.bit_length()
            create = sys.modules[type(module).__module__].create_sinusoidal_positions
            table = _table(create, size, table.shape[1], position_ids.device)
        return table.to(position_ids.device).expand(len(position_ids), -1, -1)

    def _attn(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        scaling = 1.0 / float(self._module.scale_attn)
        attended, weights = _attend(self._module, query, key, value, attention_mask, scaling=scaling)
        return attended.transpose(1, 2), weights


@functools.lru_cache(maxsize=4)
def _table(
    create: Callable[[int, int], torch.Tensor], num_positions: int, rotary_dim: int, device: torch.device
) -> torch.Tensor:
    return create(num_positions, rotary_dim).to(device)


def _gptj(module: Any, *args: Any, **kwargs: Any) -> Any:
    return type(module).forward(_GPTJ(module), *args, **kwargs)


FORWARDS: dict[str, Callable[..., Any]] = {"FalconAttention": _falcon, "GPTJAttention": _gptj}
"""By the class's name."""
