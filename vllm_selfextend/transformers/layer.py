"""What an extended model knows: its numbers, and each extended layer's rotation."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from ..backends.interface import AttentionParams, GroupSizes, Rotation, num_rotation_steps
from ..method.plan import ExtensionPlan
from ..method.positions import smallest_group_size
from ..method.rope import cos_sin
from ..method.rotation_probe import ModelRotation
from .flash_attention import FlashAttention

NAME = "self_extend"
"""What transformers calls this attention."""

ATTRIBUTE = "self_extend"
"""Where an extended attention module has its `ExtendedLayer`."""

MODEL_ATTRIBUTE = "self_extend_extension"
"""Where an extended model has its `Extension`."""


@dataclass
class Extension:
    """The numbers of one extended model, and what all of its calls share.

    Attributes:
        plan: The numbers.
        implementation: The attention that the model had before.
        config: The model's, where the attention that it has now is written.
        flash_attention: What attends in the extended layers; None: PyTorch.
        hooks: What `remove` takes off.

    """

    plan: ExtensionPlan
    implementation: str
    config: Any
    flash_attention: FlashAttention | None = None
    hooks: list[Any] = field(default_factory=list)

    def check_length(self, length: int) -> None:
        """Refuse a sequence of `length` tokens if the numbers do not reach so far.

        Raises:
            ValueError: They do not.

        """
        plan, reach = self.plan, self.plan.capacity
        if reach is None or length <= reach:
            return
        message = (
            f"the sequence has {length} tokens, but with trained length {plan.trained_length}, group_size "
            f"{plan.group_size} and window_size {plan.neighbor_window} Self-Extend reaches {reach}. "
        )
        group = smallest_group_size(plan.trained_length, plan.neighbor_window, length)
        if group is None:
            raise ValueError(message + f"Apply it with a window_size below {plan.trained_length}.")
        raise ValueError(message + f"Apply it without a group_size, or with one of {group} or more.")


class RotationTable:
    """Group sizes and the rows to turn by, for as many positions as have been asked for."""

    def __init__(self, rotation: ModelRotation, plan: ExtensionPlan) -> None:
        self._rotation, self._plan = rotation, plan
        self._made: dict[tuple[torch.device, int], tuple[GroupSizes, Rotation]] = {}

    def __getstate__(self) -> dict[str, Any]:
        """A copy may be for another device, and makes its own."""
        return {**vars(self), "_made": {}}

    def reaching(self, num_positions: int, device: torch.device) -> tuple[GroupSizes, Rotation]:
        """The group size of `num_positions` positions at least, and the rotation with the rows that they need."""
        size = 64
        while size < num_positions:  # comparisons are what torch.compile can follow for a length that it leaves open
            size *= 2
        self._make(size, device)
        return self._made[device, size]

    @torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]  # so that it is run, not compiled
    def _make(self, size: int, device: torch.device) -> None:
        if (device, size) in self._made:
            return
        sizes = GroupSizes.of(self._plan.group_sizes(size), device)
        steps = num_rotation_steps(size, sizes.largest, self._plan.neighbor_window)
        rows = cos_sin(self._rotation.frequencies, 0, steps).to(device)
        self._made[device, size] = sizes, Rotation(rows, self._rotation.interleaved)


@dataclass
class ExtendedLayer:
    """One extended attention module.

    Attributes:
        extension: The model's.
        table: Its rotation.

    """

    extension: Extension
    table: RotationTable

    def params(
        self, num_keys: int, device: torch.device, scale: float, soft_cap: float | None, sinks: torch.Tensor | None
    ) -> AttentionParams:
        """What a kernel needs to know, for `num_keys` keys."""
        plan = self.extension.plan
        group_sizes, rotation = self.table.reaching(num_keys, device)
        return AttentionParams(
            scale=scale,
            group_sizes=group_sizes,
            neighbor_window=plan.neighbor_window,
            log_scale_len=plan.log_scale_len,
            soft_cap=soft_cap or 0.0,
            rotation=rotation,
            sinks=sinks,
        )


def extended_layer(module: nn.Module) -> ExtendedLayer | None:
    """What an attention module knows, if it is extended."""
    layer: ExtendedLayer | None = getattr(module, ATTRIBUTE, None)
    return layer
