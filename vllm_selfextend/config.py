"""The user's numbers: `additional_config["self_extend"]`, checked, and worked out for one model and length."""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from .backends import KERNEL_CHOICES
from .plan import CONFIG_KEY, ExtensionPlan
from .positions import smallest_group_size

RULE_LOW, RULE_HIGH = 1 / 2, 2 / 3
"""The authors' empirical rule: good answers while `W + (N - W) / G` is below one half to two thirds of `L`."""

MAX_AUTO_WINDOW = 1024


@dataclass(frozen=True)
class SelfExtendConfig:
    """What the user asked for.

    Attributes:
        group_size: `G`, how many neighboring positions share one grouped position; 1 is ordinary attention.
        neighbor_window: `W`, how many tokens back positions stay exact.
        trained_length: `L`, tokens; None is the length vLLM derives for the checkpoint.
        exact_short: Queries at positions below `L` get the unmodified model's attention. False is the paper to the
            letter.
        log_scale: Multiply queries by `max(1, ln(position + 1) / ln(L))`.
        kernel: Which kernels compute it.

    """

    group_size: int | Literal["auto"] = "auto"
    neighbor_window: int | Literal["auto"] = "auto"
    trained_length: int | None = None
    exact_short: bool = True
    log_scale: bool = False
    kernel: str = "auto"

    def __post_init__(self) -> None:
        for name in ("group_size", "neighbor_window", "trained_length"):
            value = getattr(self, name)
            other = None if name == "trained_length" else "auto"
            is_count = isinstance(value, int) and not isinstance(value, bool) and value >= 1
            if not is_count and value != other:
                raise ValueError(
                    f"{CONFIG_KEY}.{name} is {value!r}; it must be an integer of at least 1, or {other!r}."
                )
        for name in ("exact_short", "log_scale"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{CONFIG_KEY}.{name} is {getattr(self, name)!r}; it must be true or false.")
        if self.kernel not in KERNEL_CHOICES:
            allowed = ", ".join(KERNEL_CHOICES)
            raise ValueError(f"{CONFIG_KEY}.kernel is {self.kernel!r}; it must be one of {allowed}.")

    @classmethod
    def from_additional_config(cls, additional_config: Any) -> "SelfExtendConfig":
        """Read and check `additional_config["self_extend"]`; all defaults if it is not there.

        Raises:
            ValueError: It is not a mapping, has an unknown key, or a value is not allowed.

        """
        settings = additional_config.get(CONFIG_KEY) if isinstance(additional_config, Mapping) else None
        if settings is None:
            return cls()
        if not isinstance(settings, Mapping):
            raise ValueError(
                f"additional_config[{CONFIG_KEY!r}] is {settings!r}; it must be a mapping such as "
                '{"group_size": 8, "neighbor_window": 1024}.'
            )
        known = [field.name for field in dataclasses.fields(cls)]
        for key in settings:
            if key not in known:
                raise ValueError(f"{CONFIG_KEY} has no setting {key!r}; the settings are {', '.join(known)}.")
        return cls(**settings)

    def plan(self, derived_length: int, max_model_len: int) -> ExtensionPlan:
        """Work out every number for a checkpoint of `derived_length` tokens that is to read `max_model_len`.

        Raises:
            ValueError: `max_model_len` is past what the numbers can reach, or the neighbor window past the trained
                length.

        """
        length = self.trained_length or derived_length
        chosen = []
        if isinstance(self.neighbor_window, int):
            window = self.neighbor_window
        else:
            window = min(max(length // 4, 1), MAX_AUTO_WINDOW)
            chosen.append(f"neighbor window {window}: a quarter of the trained length, at most {MAX_AUTO_WINDOW}")
        if window > length:
            raise ValueError(
                f"{CONFIG_KEY}.neighbor_window is {window}, more than the trained length {length}: positions inside "
                f"the window would leave the trained range. Set it to at most {length}."
            )
        if isinstance(self.group_size, int):
            group = self.group_size
        else:
            group, reason = _auto_group_size(length, window, max_model_len)
            chosen.append(f"group size {group}: {reason}")
        plan = ExtensionPlan(
            max_model_len=max_model_len,
            trained_length=length,
            group_size=group,
            neighbor_window=window,
            exact_short=self.exact_short,
            log_scale_len=length if self.log_scale else 0,
            kernel=self.kernel,
            reason="; ".join(chosen) or "group size and neighbor window set by the user",
        )
        if max_model_len > plan.capacity:
            raise ValueError(_too_long(plan))
        return plan


def _auto_group_size(length: int, window: int, max_model_len: int) -> tuple[int, str]:
    if max_model_len <= length:
        return 1, f"{max_model_len} tokens are within the trained length {length}, ordinary attention"
    target = RULE_HIGH * length
    if window < target:
        group = math.ceil((max_model_len - window) / (target - window))
        return group, "the smallest that keeps W + (N - W) / G within two thirds of the trained length"
    group = smallest_group_size(length, window, max_model_len) or 1
    return group, f"the smallest that reaches {max_model_len} tokens (the window alone is past the empirical rule)"


def _too_long(plan: ExtensionPlan) -> str:
    message = (
        f"max_model_len is {plan.max_model_len}, but with trained length {plan.trained_length}, group_size "
        f"{plan.group_size} and neighbor_window {plan.neighbor_window} Self-Extend reaches {plan.capacity} tokens. "
    )
    group = smallest_group_size(plan.trained_length, plan.neighbor_window, plan.max_model_len)
    if group is None:
        return message + f"No group size is enough with this window: set neighbor_window below {plan.trained_length}."
    return message + f"Set group_size to {group} or more, or max_model_len to at most {plan.capacity}."
