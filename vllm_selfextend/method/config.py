"""The user's numbers: `additional_config["self_extend"]`, checked, and worked out for one model and length."""

import dataclasses
import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from ..backends import KERNEL_CHOICES
from ..backends.limits import MAX_POSITIONS
from .plan import CONFIG_KEY, ExtensionPlan
from .positions import GroupSize, as_count, auto_reach, default_window, largest_auto_window, smallest_group_size


@dataclass(frozen=True)
class SelfExtendConfig:
    """What the user asked for.

    Attributes:
        group_size: `G`, how many neighboring positions share one grouped position; 1 is ordinary attention. "auto"
            follows the query's position: 1 below `L`, past it the least that keeps its relative positions below two
            thirds of `L`.
        neighbor_window: `W`, how many tokens back positions stay exact.
        trained_length: `L`, tokens; None is the length vLLM derives for the checkpoint.
        exact_short: Queries at positions below `L` get the unmodified model's attention. False needs a group size.
        log_scale: Multiply queries by `max(1, ln(position + 1) / ln(L))`. With both off it is the paper to the letter.
        kernel: Which kernels compute it.

    """

    group_size: GroupSize = "auto"
    neighbor_window: int | Literal["auto"] = "auto"
    trained_length: int | None = None
    exact_short: bool = True
    log_scale: bool = True
    kernel: str = "auto"

    def __post_init__(self) -> None:
        for name in ("group_size", "neighbor_window", "trained_length"):
            value = getattr(self, name)
            other = None if name == "trained_length" else "auto"
            if (count := as_count(value)) is not None:
                object.__setattr__(self, name, count)
            elif value != other:
                raise ValueError(
                    f"{CONFIG_KEY}.{name} is {value!r}; it must be an integer from 1 to {MAX_POSITIONS}, or {other!r}."
                )
        for name in ("exact_short", "log_scale"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{CONFIG_KEY}.{name} is {getattr(self, name)!r}; it must be true or false.")
        if self.group_size == "auto" and not self.exact_short:
            raise ValueError(
                f"{CONFIG_KEY}.exact_short is false, and {CONFIG_KEY}.group_size is 'auto', which begins past the "
                "trained length. Set group_size to a number, or leave exact_short out."
            )
        if self.kernel not in KERNEL_CHOICES:
            allowed = ", ".join(KERNEL_CHOICES)
            raise ValueError(f"{CONFIG_KEY}.kernel is {self.kernel!r}; it must be one of {allowed}.")

    @classmethod
    def from_additional_config(cls, additional_config: Any) -> "SelfExtendConfig":
        """Read and check `additional_config["self_extend"]`; all defaults if it is not there.

        Raises:
            ValueError: It is not a mapping, has an unknown key, or a value is not allowed; or it is there by another
                name, or its settings are without it.

        """
        if misspelled := misspelled_key(additional_config):
            raise ValueError(
                f"additional_config has no {misspelled!r}: Self-Extend's settings are in {CONFIG_KEY!r}, such as "
                f'{{"{CONFIG_KEY}": {{"group_size": 8}}}}.'
            )
        settings = additional_config.get(CONFIG_KEY) if isinstance(additional_config, Mapping) else None
        if settings is None:
            if strays := [name for name in stray_settings(additional_config) if name in additional_config]:
                raise ValueError(
                    f"additional_config has {strays[0]!r}, which Self-Extend reads in {CONFIG_KEY!r} only: "
                    f'{{"{CONFIG_KEY}": {{"{strays[0]}": ...}}}}. If it is another plugin\'s, add "{CONFIG_KEY}": {{}}.'
                )
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
            ValueError: `max_model_len` is past what the numbers can reach, the neighbor window past the trained
                length, or a length is not one that positions can have.

        """
        length = self.trained_length or derived_length
        if length < 1:
            raise ValueError(
                f"The model's config says that it was trained for {length} tokens. Set {CONFIG_KEY}.trained_length to "
                "the true number."
            )
        if length > MAX_POSITIONS:
            raise ValueError(
                f"the checkpoint's length is {length}, and Self-Extend's positions end at {MAX_POSITIONS}. Set "
                f"{CONFIG_KEY}.trained_length."
            )
        if max_model_len > MAX_POSITIONS:
            raise ValueError(
                f"max_model_len is {max_model_len}, and Self-Extend's positions end at {MAX_POSITIONS}. Set a smaller "
                "one."
            )
        if self.log_scale and length == 1:
            raise ValueError(
                f"{CONFIG_KEY}.log_scale is on, and the trained length 1 has no logarithm to scale by. Set it to false."
            )
        window = self.neighbor_window if isinstance(self.neighbor_window, int) else default_window(length)
        if window > length:
            raise ValueError(
                f"{CONFIG_KEY}.neighbor_window is {window}, more than the trained length {length}: positions inside "
                f"the window would leave the trained range. Set it to at most {length}."
            )
        if self.group_size == "auto" and max_model_len > length and window > (most := largest_auto_window(length)):
            raise ValueError(
                f"{CONFIG_KEY}.neighbor_window is {window}, and an automatic group_size uses {auto_reach(length)} "
                "positions, of which the keys before the window need a quarter. Set "
                f"{f'neighbor_window to at most {most}, or ' if most else ''}group_size to a number."
            )
        plan = ExtensionPlan(
            max_model_len=max_model_len,
            derived_length=derived_length,
            trained_length=length,
            group_size=self.group_size,
            neighbor_window=window,
            exact_short=self.exact_short,
            log_scale_len=length if self.log_scale else 0,
            kernel=self.kernel,
        )
        if plan.capacity is not None and max_model_len > plan.capacity:
            raise ValueError(_too_long(plan, plan.capacity))
        return plan


def misspelled_key(additional_config: Any) -> str | None:
    """A key of vLLM's `additional_config` that can only be meant for `self_extend`; None if there is none."""
    wanted = _letters(CONFIG_KEY)
    for key in additional_config if isinstance(additional_config, Mapping) else ():
        letters = _letters(key)
        if key != CONFIG_KEY and (wanted in letters or difflib.get_close_matches(letters, [wanted], cutoff=0.8)):
            return str(key)
    return None


def stray_settings(additional_config: Any) -> list[str]:
    """Names of Self-Extend's settings in vLLM's `additional_config` that are not in `self_extend`.

    They are beside it or under another key, where they may be another plugin's.
    """
    if not isinstance(additional_config, Mapping):
        return []
    names = {field.name for field in dataclasses.fields(SelfExtendConfig)}
    others = [value for key, value in additional_config.items() if key != CONFIG_KEY and isinstance(value, Mapping)]
    return [name for mapping in (additional_config, *others) for name in mapping if name in names]


def _letters(key: Any) -> str:
    return "".join(filter(str.isalnum, str(key))).lower()


def _too_long(plan: ExtensionPlan, reach: int) -> str:
    message = (
        f"max_model_len is {plan.max_model_len}, but with trained length {plan.trained_length}, group_size "
        f"{plan.group_size} and neighbor_window {plan.neighbor_window} Self-Extend reaches {reach} tokens. "
    )
    group = smallest_group_size(plan.trained_length, plan.neighbor_window, plan.max_model_len)
    if group is None:
        return message + f"No group size is enough with this window: set neighbor_window below {plan.trained_length}."
    return message + f"Set group_size to {group} or more or leave it out, or max_model_len to at most {reach}."
