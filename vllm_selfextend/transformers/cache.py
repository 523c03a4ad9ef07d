"""Keys go into any of transformers' caches turned to their group positions, and a cache knows that they were."""

import threading
from typing import Any

import torch
from torch import nn

from ..backends.interface import lag
from ..backends.reference import rotate
from .call import KEYWORD, Call
from .layer import NAME, ExtendedLayer, Extension, extended_layer

CACHE_ARGUMENTS = ("cache", "past_key_values", "layer_past")
"""What models and attention modules call the cache: transformers 5.24, before, and GPT-NeoX's attention."""


class GroupedKeys:
    """Mixed into the class of a cache once it holds grouped keys, so that nothing takes them for ordinary ones.

    Attributes:
        grouped_layers: The indices of the layers whose keys are grouped.
        group_size: `G`; what a key in the cache is depends on it alone.

    """

    grouped_layers: frozenset[int]
    group_size: int

    def update(self, key: torch.Tensor, value: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        """A layer without Self-Extend: sees no grouped keys.

        Raises:
            ValueError: It would.

        """
        if layer_idx in self.grouped_layers and self.get_seq_length(layer_idx) > 0:  # type: ignore[attr-defined]
            raise ValueError(
                f"this cache was filled under Self-Extend with group_size {self.group_size}, and the model is not "
                "extended now: its keys are at group positions. Begin with an empty cache."
            )
        return super().update(key, value, layer_idx, *args, **kwargs)  # type: ignore[misc]

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        """A pickle names the class that the cache was made of: this one is in no module."""
        # From protocol 2 on: what makes one, of which class, and its state.
        reduced: Any = super().__reduce_ex__(max(protocol, 2))
        return _new_grouped, (type(self).__bases__[1],), *reduced[2:]


COMPILED = "self_extend_group_size"
"""Where a cache that a compiled function fills has the group size, since its class cannot be changed there."""

_grouped_classes: dict[type, Any] = {}
"""By the class of the cache."""


def _grouped_class(plain: type) -> Any:
    if plain not in _grouped_classes:
        _grouped_classes.setdefault(plain, type(f"Grouped{plain.__name__}", (GroupedKeys, plain), {}))
    return _grouped_classes[plain]


def _new_grouped(plain: type) -> Any:
    """An empty one, for `GroupedKeys.__reduce_ex__`."""
    return object.__new__(_grouped_class(plain))


def _mark(cache: Any, extension: Extension, layer_idx: int) -> None:
    """Note in a cache that its keys are grouped, as this model's are.

    Raises:
        ValueError: It already has keys, and they are not.

    """
    group_size = extension.plan.group_size
    if isinstance(cache, GroupedKeys) and cache.group_size == group_size:
        return
    if cache.get_seq_length(layer_idx) > 0 and getattr(cache, COMPILED, None) != group_size:
        how = f"with group_size {cache.group_size}" if isinstance(cache, GroupedKeys) else "without Self-Extend"
        raise ValueError(
            f"this cache was filled {how}, and the model now has Self-Extend with group_size {group_size}: its keys "
            "are at other positions. Begin with an empty cache."
        )
    if not isinstance(cache, GroupedKeys):
        cache.__class__ = _grouped_class(type(cache))
    cache.grouped_layers, cache.group_size = extension.grouped_layers, group_size


class GroupingCache:
    """Stands in for the cache, or for none, within one call of an attention module.

    Attributes:
        layer: What the module knew when it was called.
        call: The call of the model.
        is_grouped: Whether the new keys have been turned to their group positions; shared ones have, in their layer.

    """

    def __init__(self, cache: Any, mask: torch.Tensor | None, layer: ExtendedLayer, call: Call) -> None:
        self._cache, self._mask = cache, mask
        self.layer, self.call, self.is_grouped = layer, call, layer.shares_keys

    def __getattr__(self, name: str) -> Any:
        return getattr(self._cache, name)

    def update(self, key: torch.Tensor, value: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        """Turn the new keys `[batch, num_kv_heads, tokens, head_size]`, then do what the cache does."""
        extension, num_rows = self.layer.extension, key.shape[2]
        group_size = extension.plan.group_size
        if self._mask is not None:
            num_keys = self._mask.shape[3]
        else:  # then the new keys are the last ones, and the cache knows how many it has
            num_keys = num_rows + (0 if self._cache is None else int(self._cache.get_seq_length(layer_idx)))
        if group_size > 1:
            if self._cache is not None and torch.compiler.is_compiling():
                setattr(self._cache, COMPILED, group_size)
            elif self._cache is not None:
                _mark(self._cache, extension, layer_idx)
            step = self.call.step(self._mask, num_rows, num_keys, key.device)
            rotation = self.layer.table.reaching(num_keys, key.device)
            wide = key.to(torch.promote_types(key.dtype, torch.float32))
            key = rotate(wide, -lag(step.query_pos, group_size)[:, None], rotation).to(key.dtype)
        self.is_grouped = True
        if self._cache is None:
            return key, value
        if isinstance(self._cache, GroupedKeys):
            return super(GroupedKeys, self._cache).update(key, value, layer_idx, *args, **kwargs)  # type: ignore[misc]
        return self._cache.update(key, value, layer_idx, *args, **kwargs)


def swap_cache(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], Any]:
    """A forward pre-hook of an extended attention module: put a `GroupingCache` in place of its cache.

    The attention gets it too, by `KEYWORD`.

    Raises:
        RuntimeError: The module is called in a way that hides its mask or its cache.

    """
    layer = extended_layer(module)
    if layer is None:
        return args, kwargs
    if "attention_mask" not in kwargs:
        raise RuntimeError(
            f"{type(module).__name__} is called without the keyword attention_mask; Self-Extend needs it."
        )
    implementation = layer.extension.config._attn_implementation
    if implementation != NAME and not torch.compiler.is_compiling():
        raise RuntimeError(
            f"the model's attention was set to {implementation!r} after SelfExtend.apply. Call "
            "SelfExtend.remove(model), or SelfExtend.apply again."
        )
    # There is none in a compiled function, or where a decoder layer does not pass it on: each layer is then on its own,
    # but for weights that it is asked for by name, as Falcon's and GPT-J's are, which go into the answer of this call.
    asked_for = kwargs.get("output_attentions") and layer.extension.calls.get(threading.get_ident())
    call = kwargs.get(KEYWORD) or asked_for or Call.of(layer.extension, kwargs)
    cache = GroupingCache(kwargs.get(layer.cache_argument), kwargs["attention_mask"], layer, call)
    return args, {**kwargs, layer.cache_argument: cache, KEYWORD: cache}
