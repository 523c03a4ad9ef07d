"""What an extended model knows: its numbers, and each extended layer's rotation."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from ..backends.interface import AttentionParams, Rotation, num_rotation_steps
from ..plan import ExtensionPlan
from ..positions import smallest_group_size
from ..rotary import cos_sin
from ..rotation_probe import ModelRotation
from .flash_attention import FlashAttention

NAME = "self_extend"
"""What transformers calls this attention."""

ATTRIBUTE = "self_extend"
"""Where an extended attention module has its `ExtendedLayer`."""

MODEL_ATTRIBUTE = "self_extend_extension"
"""Where an extended model has its `Extension`."""


@dataclass
class Extension:
    """The numbers of one extended model, and what its layers and all of its calls share.

    Attributes:
        plan: The numbers.
        grouped_layers: The indices, in a cache, of the extended layers.
        implementation: The attention that the model had before.
        config: The model's, where the attention that it has now is written.
        flash_attention: What attends in the extended layers; None: PyTorch.
        hooks: What `remove` takes off.
        calls: The `Call` that is under way in a thread, by the thread.

    """

    plan: ExtensionPlan
    grouped_layers: frozenset[int]
    implementation: str
    config: Any
    flash_attention: FlashAttention | None = None
    hooks: list[Any] = field(default_factory=list)
    calls: dict[int, Any] = field(default_factory=dict)

    def __getstate__(self) -> dict[str, Any]:
        """A copy has no call under way."""
        return {**vars(self), "calls": {}}

    def too_long(self, length: int) -> str:
        """That a sequence of `length` tokens is longer than the numbers reach, and what to do."""
        plan = self.plan
        message = (
            f"the sequence has {length} tokens, but with trained length {plan.trained_length}, group_size "
            f"{plan.group_size} and window_size {plan.neighbor_window} Self-Extend reaches {plan.capacity}. "
        )
        group = smallest_group_size(plan.trained_length, plan.neighbor_window, length)
        if group is None:
            return message + f"Apply it with a window_size below {plan.trained_length}."
        return message + f"Apply it with a group_size of {group} or more."


class RotationTable:
    """The cosines and sines of one rotation, for as many positions as have been asked for."""

    def __init__(self, rotation: ModelRotation, plan: ExtensionPlan) -> None:
        self._rotation, self._plan = rotation, plan
        self._rows: dict[torch.device, torch.Tensor] = {}

    def __getstate__(self) -> dict[str, Any]:
        """A copy may be for another device, and makes its own rows."""
        return {**vars(self), "_rows": {}}

    def reaching(self, num_positions: int, device: torch.device) -> Rotation:
        """The rotation, with rows for sequences of `num_positions` tokens, on `device`."""
        steps = num_rotation_steps(num_positions, self._plan.group_size, self._plan.neighbor_window)
        rows = self._rows.get(device)
        if rows is None or len(rows) < steps:
            # Twice as many, so that a text that grows token by token does not make a table each time. Another thread
            # may put fewer in their place meanwhile; these are long enough.
            rows = self._rows[device] = cos_sin(self._rotation.frequencies, 0, 2 * steps).to(device)
        return Rotation(rows, self._rotation.interleaved)


@dataclass
class ExtendedLayer:
    """One extended attention module.

    Attributes:
        extension: The model's.
        table: Its rotation.
        cache_argument: What the module calls the cache that it is given.
        shares_keys: Whether it attends to keys that an extended layer before it has made, and has none in the cache.

    """

    extension: Extension
    table: RotationTable
    cache_argument: str
    shares_keys: bool = False

    def params(
        self,
        num_keys: int,
        device: torch.device,
        scale: float = 1.0,
        soft_cap: float | None = None,
        sinks: torch.Tensor | None = None,
    ) -> AttentionParams:
        """What a kernel needs to know, for `num_keys` keys."""
        plan = self.extension.plan
        return AttentionParams(
            scale=scale,
            group_size=plan.group_size,
            neighbor_window=plan.neighbor_window,
            exact_len=plan.exact_len,
            log_scale_len=plan.log_scale_len,
            soft_cap=soft_cap or 0.0,
            rotation=self.table.reaching(num_keys, device) if plan.group_size > 1 else None,
            sinks=sinks,
        )


def extended_layer(module: nn.Module) -> ExtendedLayer | None:
    """What an attention module knows, if it is extended."""
    layer: ExtendedLayer | None = getattr(module, ATTRIBUTE, None)
    return layer
