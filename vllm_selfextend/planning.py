"""What `vllm-selfextend plan` reports: the numbers for a model and a length, from its config alone."""

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
from pydantic import ValidationError
from vllm.config import ModelConfig
from vllm.engine.arg_utils import EngineArgs
from vllm.platforms import current_platform

from .config import SelfExtendConfig
from .engine_args import widened_length_check
from .plan import CONFIG_KEY
from .plugin import incompatibility, kept_out
from .support import unsupported_reason


@dataclass(frozen=True)
class PlanReport:
    """The numbers of a plan, whether the model can be served with them, and what its KV cache takes.

    Attributes:
        rule_share: `(W + (N - W) / G) / L`; the authors find good answers below about one half to two thirds.
        kv_bytes_per_token: For all layers, in the dtype that vLLM would serve the model in.
        kv_bytes_per_sequence: For `max_model_len` tokens; layers with a sliding window keep the window only.

    """

    model: str
    supported: bool
    why_not: str | None
    max_model_len: int
    trained_length: int
    group_size: int
    neighbor_window: int
    capacity: int
    rule_share: float
    reason: str
    kv_bytes_per_token: int
    kv_bytes_per_sequence: int


def plan_report(
    model: str, max_model_len: int, settings: dict[str, Any], engine_args: dict[str, Any] | None = None
) -> PlanReport:
    """Plan for `model` without loading weights.

    Args:
        model: A checkpoint's folder or its name on the Hugging Face hub.
        max_model_len: `N`, tokens.
        settings: As in `additional_config["self_extend"]`.
        engine_args: Other arguments of vLLM's, `dtype` for instance.

    Raises:
        ValueError: The settings cannot reach `max_model_len`, or the config cannot be read.
        OSError: There is no such model.

    """
    if problem := kept_out() or incompatibility():
        raise ValueError(problem)
    config = SelfExtendConfig.from_additional_config({CONFIG_KEY: settings})
    model_config, derived_length = read_config(model, max_model_len, engine_args or {})
    plan = config.plan(derived_length, max_model_len)
    # A laptop without a GPU, on which vLLM for GPUs is installed, has no device of vLLM's.
    device = torch.device(current_platform.device_type) if current_platform.device_type else None
    why_not = unsupported_reason(plan, model_config, device)
    full, sliding = _layer_bytes(model_config)
    window = min(model_config.get_sliding_window() or max_model_len, max_model_len)
    return PlanReport(
        model=model,
        supported=why_not is None,
        why_not=why_not,
        max_model_len=max_model_len,
        trained_length=plan.trained_length,
        group_size=plan.group_size,
        neighbor_window=plan.neighbor_window,
        capacity=plan.capacity,
        rule_share=plan.rule_share,
        reason=plan.reason,
        kv_bytes_per_token=full + sliding,
        kv_bytes_per_sequence=full * max_model_len + sliding * window,
    )


def read_config(model: str, max_model_len: int, engine_args: dict[str, Any]) -> tuple[ModelConfig, int]:
    """VLLM's config of a model that is to read `max_model_len` tokens, and the length that vLLM derives for it.

    Raises:
        ValueError: The config cannot be read, or an argument is not vLLM's.
        OSError: There is no such model.

    """
    known = {field.name for field in dataclasses.fields(EngineArgs)}
    if unknown := sorted(engine_args.keys() - known):
        raise ValueError(f"vLLM has no argument {unknown[0]!r}; see the fields of vllm.engine.arg_utils.EngineArgs.")
    with widened_length_check() as check:
        arguments = {**engine_args, "model": model, "max_model_len": max_model_len}
        try:
            model_config = EngineArgs(**arguments).create_model_config()
        except ValidationError as error:  # what vLLM says, without what pydantic says about it
            said = " ".join(one["msg"].removeprefix("Value error, ") for one in error.errors())
            raise ValueError(" ".join(said.split())) from error
    return model_config, check.derived_length


def _layer_bytes(model_config: ModelConfig) -> tuple[int, int]:
    """Bytes per token that the full-attention layers and the sliding layers keep."""
    num_layers = model_config.get_total_num_hidden_layers()
    kinds = getattr(model_config.hf_text_config, "layer_types", None) or []
    if kinds:
        num_sliding = sum(kind != "full_attention" for kind in kinds)
    else:
        num_sliding = num_layers if model_config.get_sliding_window() else 0
    item = torch.empty((), dtype=model_config.dtype).element_size()
    a_layer = 2 * model_config.get_total_num_kv_heads() * model_config.get_head_size() * item
    return (num_layers - num_sliding) * a_layer, num_sliding * a_layer
