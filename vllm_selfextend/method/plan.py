"""The plan: every number of one served model, and how it travels from the process that made it to the workers."""

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from ..backends.limits import EIGHTHS
from .positions import GroupSize, capacity, default_window, group_sizes

if TYPE_CHECKING:
    import torch

CONFIG_KEY = "self_extend"
"""Where in vLLM's `additional_config` the user's settings are, and then the plan."""


@dataclass(frozen=True)
class ExtensionPlan:
    """Every number of one served model; see `SelfExtendConfig` for those the user can set.

    Attributes:
        max_model_len: `N`, the longest sequence to be served, tokens.
        derived_length: The length that vLLM derives for the checkpoint, tokens; its rotary tables may end there.
        trained_length: `L`, tokens.
        group_size: `G`; "auto" follows the query's position.
        neighbor_window: `W`, tokens.
        exact_short: Whether queries within the trained length get the unmodified model's attention; always with "auto".
        log_scale_len: Queries past it are scaled up by the logarithm of their position, tokens; 0 is off.
        kernel: The kernel set; in a plan that was written no longer `"auto"`.
        draft_length: `L` of the draft model, tokens; 0 where there is none. (A head reads what its target made of the
            text, and has its target's numbers.)

    """

    max_model_len: int
    derived_length: int
    trained_length: int
    group_size: GroupSize
    neighbor_window: int
    exact_short: bool
    log_scale_len: int
    kernel: str
    draft_length: int = 0

    def of_draft_model(self) -> "ExtensionPlan":
        """The plan of a draft model, which was trained on another length than its target.

        Its group size is automatic whatever the target's is: a number that reaches for one may not for the other.
        """
        return dataclasses.replace(
            self,
            derived_length=self.draft_length,
            trained_length=self.draft_length,
            group_size="auto",
            neighbor_window=default_window(self.draft_length),
            exact_short=True,
            log_scale_len=self.draft_length if self.log_scale and self.draft_length > 1 else 0,
        )

    @property
    def groups(self) -> bool:
        """Whether any query that is served groups positions."""
        return self.group_size != 1 and self.max_model_len > self.exact_len

    @property
    def changes_model(self) -> bool:
        """Whether the model cannot be served as vLLM loads it: positions are grouped, or its tables are too short."""
        return self.groups or self.max_model_len > self.derived_length

    @property
    def capacity(self) -> int | None:
        """The longest sequence these numbers can serve, tokens; None: there is no longest one."""
        if self.group_size == "auto":
            return None
        return capacity(self.trained_length, self.group_size, self.neighbor_window)

    def group_sizes(self, num_positions: int, first: int = 0) -> "torch.Tensor":
        """The group size of the query at each position, in eighths: `[num_positions]`, int32. See `positions`."""
        numbers = self.trained_length, self.neighbor_window, self.group_size, self.exact_len
        return group_sizes(num_positions, *numbers, first)

    def group_size_at(self, length: int) -> float:
        """The group size of the last token of a text of `length` tokens."""
        return int(self.group_sizes(1, length - 1)) / EIGHTHS

    @property
    def exact_len(self) -> int:
        """Queries at positions below this one get the unmodified model's attention."""
        return self.trained_length if self.exact_short else 0

    @property
    def log_scale(self) -> bool:
        """Whether queries are scaled up by the logarithm of their position."""
        return self.log_scale_len > 0


class HoldsPlan(Protocol):
    """vLLM's `VllmConfig`, as far as a plan goes by it."""

    additional_config: Any


def write_plan(vllm_config: HoldsPlan, plan: ExtensionPlan) -> None:
    """Put the plan where every process of an engine finds it: in place of the user's settings.

    Raises:
        ValueError: `additional_config` is not a dict.

    """
    if not isinstance(vllm_config.additional_config, dict):
        raise ValueError(
            f"additional_config is a {type(vllm_config.additional_config).__name__}; with Self-Extend it must be a "
            "dict, since that is where its numbers travel to vLLM's workers."
        )
    vllm_config.additional_config = {**vllm_config.additional_config, CONFIG_KEY: dataclasses.asdict(plan)}


def has_plan(vllm_config: HoldsPlan) -> bool:
    """Whether `write_plan` wrote one: whether the engine is Self-Extend's."""
    written = vllm_config.additional_config.get(CONFIG_KEY) if isinstance(vllm_config.additional_config, dict) else None
    return isinstance(written, dict) and written.keys() == {field.name for field in dataclasses.fields(ExtensionPlan)}


def read_plan(vllm_config: HoldsPlan) -> ExtensionPlan:
    """The plan that `write_plan` wrote, in any process.

    Raises:
        RuntimeError: None was written.

    """
    if not has_plan(vllm_config):
        raise RuntimeError(
            "The attention backend CUSTOM is in use, but its plan is not in additional_config: configure the engine "
            "with EngineArgs.create_engine_config (as LLM and vllm serve do) and with this plugin installed."
        )
    return ExtensionPlan(**vllm_config.additional_config[CONFIG_KEY])
