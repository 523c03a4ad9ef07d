"""What an extended model knows: its numbers, each extended layer's rotation, and the step that it is in."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from ..backends.interface import AttentionParams, Rotation, num_rotation_steps
from ..plan import ExtensionPlan
from ..positions import smallest_group_size
from ..rotary import cos_sin
from ..rotation_probe import ModelRotation

NAME = "self_extend"
"""What transformers calls this attention."""

ATTRIBUTE = "self_extend"
"""Where an extended attention module has its `ExtendedLayer`."""


@dataclass(frozen=True)
class Step:
    """Where the queries and keys of one call of the model are in their sequences.

    Attributes:
        query_pos: `[batch or 1, rows]`, int64: how many visible keys are before a query's own token. What stands for
            padding has some position too.
        key_pos: `[batch or 1, keys]`, int64: the same of keys, in the order of the cache's slots.
        hidden: `[batch, rows, keys]`, bool: what a query does not see; None: the keys after it, and it is one of the
            last keys' tokens.

    """

    query_pos: torch.Tensor
    key_pos: torch.Tensor
    hidden: torch.Tensor | None

    @staticmethod
    def of(mask: torch.Tensor | None, num_rows: int, num_keys: int, device: torch.device) -> "Step":
        """Positions told from what each query sees, whatever the padding and the cache.

        Args:
            mask: `[batch, 1, rows, keys]`, True where a query sees a key; None: see `hidden`.
            num_rows: Queries of a sequence.
            num_keys: Keys, those of the queries' tokens included.
            device: The queries'.

        Raises:
            ValueError: The mask is not that of causal attention, with some keys hidden from all.

        """
        if mask is None:
            key_pos = torch.arange(num_keys, device=device)[None]
            return Step(key_pos[:, num_keys - num_rows :], key_pos, None)
        if mask.dtype != torch.bool or mask.dim() != 4 or mask.shape[2:] != (num_rows, num_keys):
            raise ValueError(
                f"the attention mask is {mask.dtype} of shape {list(mask.shape)}; with Self-Extend it must be a 2D "
                "attention_mask of the tokens (1: a token, 0: padding), from which positions are told."
            )
        visible = mask[:, 0]
        query_pos = (visible.sum(2) - 1).clamp(min=0)
        key_pos = (visible[:, -1].cumsum(1) - 1).clamp(min=0)
        if not torch.compiler.is_compiling() and num_rows > 1 and not _is_causal(visible):
            raise ValueError(
                "the attention mask is not a causal one (packed sequences, tokens that see later ones, or a custom "
                "mask): Self-Extend cannot tell positions from it. Pass a 2D attention_mask of the tokens."
            )
        return Step(query_pos, key_pos, ~visible)


def _is_causal(visible: torch.Tensor) -> bool:
    """Whether queries `[batch, rows, keys]` see what the last one sees, as far as their own slots."""
    rows, slots = (torch.arange(size, device=visible.device) for size in visible.shape[1:])
    last_seen = (visible * (slots + 1)).amax(2) - 1
    # A query's slot is the last one it sees, or comes after it if the query stands for padding.
    first_slot = torch.where(last_seen >= 0, last_seen - rows, -len(rows)).amax(1)
    before = slots <= (first_slot[:, None] + rows)[:, :, None]
    return bool((visible == visible[:, -1:] & before).all())


@dataclass
class Extension:
    """The numbers of one extended model, and what its layers share.

    Attributes:
        plan: The numbers.
        scale_base: `AttentionParams.log_scale_len`.
        grouped_layers: The indices, in a cache, of the extended layers.
        implementation: The attention that the model had before.
        config: The model's, where the attention that it has now is written.
        hooks: What `remove` takes off.

    """

    plan: ExtensionPlan
    scale_base: int
    grouped_layers: frozenset[int]
    implementation: str
    config: Any
    hooks: list[Any] = field(default_factory=list)
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
            if length > self.plan.capacity:
                raise ValueError(self._too_long(length))
            last = self._last = mask, num_rows, num_keys, step
        return last[3]

    def forget_step(self) -> None:
        """Do not keep a mask alive between calls of the model."""
        self._last = None

    def _too_long(self, length: int) -> str:
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
        self._rows = torch.empty(0, 2 * len(rotation.frequencies))

    def reaching(self, num_positions: int, device: torch.device) -> Rotation:
        """The rotation, with rows for sequences of `num_positions` tokens, on `device`."""
        steps = num_rotation_steps(num_positions, self._plan.group_size, self._plan.neighbor_window)
        if len(self._rows) < steps or self._rows.device != device:
            # Twice as many, so that a text that grows token by token does not make a table each time.
            self._rows = cos_sin(self._rotation.frequencies, 0, 2 * steps).to(device)
        return Rotation(self._rows, self._rotation.interleaved)


@dataclass
class ExtendedLayer:
    """One extended attention module.

    Attributes:
        extension: The model's.
        table: Its rotation.
        cache_argument: What the module calls the cache that it is given.
        is_grouped: Whether the keys of the present call have been turned to their group positions.

    """

    extension: Extension
    table: RotationTable
    cache_argument: str
    is_grouped: bool = False

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
            log_scale_len=self.extension.scale_base,
            soft_cap=soft_cap or 0.0,
            rotation=self.table.reaching(num_keys, device) if plan.group_size > 1 else None,
            sinks=sinks,
        )


def extended_layer(module: nn.Module) -> ExtendedLayer | None:
    """What an attention module knows, if it is extended."""
    layer: ExtendedLayer | None = getattr(module, ATTRIBUTE, None)
    return layer
