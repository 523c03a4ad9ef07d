"""Classes of transformers' whose code attends by itself, or rotates from a table that ends: here they do not.

A module gets a `forward` of its own: the first ones' calls the function that the config names, as transformers'
`AttentionInterface` does, and hands it what else it was called with. No class is changed, and a call keeps nothing on
the module.
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
        if (forward := _other_forward(module)) is None:
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
    if any(_other_forward(module) for module in model.modules()):
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


class _Instead:
    """A module for the time of one call, with other attributes in place of some of its own."""

    def __init__(self, module: Any, **attributes: Any) -> None:
        self._module = module
        vars(self).update(attributes)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


def _long_table(module: Any, position_ids: torch.Tensor) -> torch.Tensor:
    """A module's table, `[positions, rotary_dim]`, or where that ends too early one that reaches every position."""
    table: torch.Tensor = module.embed_positions
    needed = int(position_ids.max()) + 1
    if len(table) < needed:
        # Twice as many, so that a text that grows token by token does not make a table each time.
        size = 1 << needed.bit_length()
        create = sys.modules[type(module).__module__].create_sinusoidal_positions
        table = _table(create, size, table.shape[1], position_ids.device)
    return table.to(position_ids.device)


@functools.lru_cache(maxsize=4)
def _table(
    create: Callable[[int, int], torch.Tensor], num_positions: int, rotary_dim: int, device: torch.device
) -> torch.Tensor:
    return create(num_positions, rotary_dim).to(device)


def _rotary(module: Any, x: torch.Tensor, position_ids: torch.Tensor) -> Any:
    longer = _Instead(module, embed_positions=_long_table(module, position_ids))
    return type(module).forward(longer, x, position_ids)


def _gptj(module: Any, *args: Any, **kwargs: Any) -> Any:
    def embed_positions(position_ids: torch.Tensor) -> torch.Tensor:
        """`[batch, positions, rotary_dim]`."""
        return _long_table(module, position_ids).expand(len(position_ids), -1, -1)

    def attend(
        query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        scaling = 1.0 / float(module.scale_attn)
        attended, weights = _attend(module, query, key, value, attention_mask, scaling=scaling)
        return attended.transpose(1, 2), weights

    opened = _Instead(module, _get_embed_positions=embed_positions, _attn=attend)
    return type(module).forward(opened, *args, **kwargs)


FORWARDS: dict[str, Callable[..., Any]] = {
    "FalconAttention": _falcon,
    "GPTJAttention": _gptj,
    "GPTJRotaryEmbedding": _rotary,
    "CodeGenRotaryEmbedding": _rotary,
}
"""By the class's name."""


def _other_forward(module: nn.Module) -> Callable[..., Any] | None:
    """What is to take the place of a module's `forward`, if anything."""
    forward = FORWARDS.get(type(module).__name__)
    # Since transformers 5.24 GPT-J attends as others do, and its table is a module's of its own.
    return None if forward is _gptj and not hasattr(module, "_attn") else forward
