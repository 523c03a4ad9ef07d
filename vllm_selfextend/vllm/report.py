"""What `vllm-selfextend plan` reports: the numbers for a model and a length, and what start-up says without weights."""

import contextlib
import dataclasses
import multiprocessing
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from typing import Any

import torch
from pydantic import ValidationError
from vllm.config import ModelConfig
from vllm.engine.arg_utils import EngineArgs
from vllm.platforms import current_platform

from ..method.config import SelfExtendConfig
from ..method.plan import CONFIG_KEY, ExtensionPlan
from ..method.positions import GroupSize
from .binding import check_model
from .cache_size import CacheSize, cache_size, make_model
from .engine_args import widened_length_check
from .plugin import incompatibility, kept_out
from .support import unsupported_reason
from .worker import check_layers

OWN_ARGUMENTS = ("model", "max_model_len", "attention_backend", "additional_config")
"""Arguments of vLLM's that the other options decide."""


@dataclass(frozen=True)
class PlanReport:
    """The numbers of a plan, whether the model can be served with them, and what its KV cache takes.

    Attributes:
        supported: Whether start-up would go as far as to load the weights.
        why_not: What it would say.
        group_size: As asked for: a number, or "auto", which follows the position.
        group_sizes: The group size of the last token of texts of so many tokens: `L` and its doublings as far as they
            are served, and `max_model_len`.
        capacity: The longest sequence that the numbers reach, tokens; None: there is none.
        kv_bytes_per_token: For all layers that keep keys, in the cache's dtype. None where the model is not supported,
            or where vLLM finds no device to serve it on.
        kv_bytes_per_sequence: What vLLM reserves for one of `max_model_len` tokens, in whole blocks: of layers with a
            sliding window what they and a step's tokens see, of Mamba and the like their state. A draft model's is not
            in it. None as above.

    """

    model: str
    supported: bool
    why_not: str | None
    max_model_len: int
    trained_length: int
    group_size: GroupSize
    group_sizes: dict[int, float]
    neighbor_window: int
    capacity: int | None
    kv_bytes_per_token: int | None
    kv_bytes_per_sequence: int | None


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
        ValueError: The settings cannot reach `max_model_len`, the config cannot be read, or an argument is not vLLM's
            or decided by the others.
        OSError: There is no such model.

    """
    return plan_report_and_config(model, max_model_len, settings, engine_args or {})[0]


def plan_report_and_config(
    model: str, max_model_len: int, settings: dict[str, Any], engine_args: dict[str, Any]
) -> tuple[PlanReport, ModelConfig]:
    """As `plan_report`, with vLLM's config of the model, so that nobody has to read it again."""
    if problem := kept_out() or incompatibility():
        raise ValueError(problem)
    config = SelfExtendConfig.from_additional_config({CONFIG_KEY: settings})
    if taken := [name for name in OWN_ARGUMENTS if name in engine_args]:
        raise ValueError(f"The engine's arguments cannot set {taken[0]!r}: the other options decide it.")
    model_config, derived_length = _read_config(model, max_model_len, engine_args)
    plan = config.plan(derived_length, max_model_len)
    why_not, size = None, None
    # A laptop without a GPU, on which vLLM for GPUs is installed, has no device of vLLM's.
    if not current_platform.device_type:
        why_not = unsupported_reason(plan, model_config, None)
    else:
        arguments = {**engine_args, "model": model, "max_model_len": max_model_len}
        # vLLM leaves nothing behind in this process. A fork has imported everything, and cannot go on with CUDA.
        method = "spawn" if torch.cuda.is_initialized() else "fork"
        with ProcessPoolExecutor(1, multiprocessing.get_context(method)) as pool:
            try:
                size = pool.submit(_start_up, arguments, settings, plan).result()
            except BrokenProcessPool:
                why_not = "vLLM's code for it ends the process that makes the model, without a word."
            except ValueError as error:
                why_not = str(error).removeprefix(f"Self-Extend cannot serve {model}: ")
    report = PlanReport(
        model=model,
        supported=why_not is None,
        why_not=why_not,
        max_model_len=max_model_len,
        trained_length=plan.trained_length,
        group_size=plan.group_size,
        group_sizes={length: plan.group_size_at(length) for length in _lengths(plan)},
        neighbor_window=plan.neighbor_window,
        capacity=plan.capacity,
        kv_bytes_per_token=None if size is None else size.per_token,
        kv_bytes_per_sequence=None if size is None else size.per_sequence,
    )
    return report, model_config


def _lengths(plan: ExtensionPlan) -> list[int]:
    """Lengths for which a plan says the group size: `L` and its doublings below the served length, and that."""
    lengths = [plan.trained_length]
    while 2 * lengths[-1] < plan.max_model_len:
        lengths.append(2 * lengths[-1])
    return [length for length in lengths if length < plan.max_model_len] + [plan.max_model_len]


def _start_up(arguments: dict[str, Any], settings: dict[str, Any], plan: ExtensionPlan) -> CacheSize:
    """Start an engine as far as that goes without weights; what its cache takes.

    Raises:
        ValueError: Start-up would refuse it.

    """
    torch.set_num_threads(1)  # a fork has none of OpenMP's threads
    arguments = {**arguments, "attention_backend": "CUSTOM", "additional_config": {CONFIG_KEY: settings}}
    try:
        with _as_a_sentence():
            vllm_config = EngineArgs(**arguments).create_engine_config()
        model = make_model(vllm_config)
        check_layers(vllm_config)
        if plan.groups:
            check_model(model, arguments["model"], plan)
        return cache_size(vllm_config)
    except (AssertionError, ImportError, NotImplementedError, RuntimeError) as error:
        raise ValueError(str(error)) from error


def _read_config(model: str, max_model_len: int, engine_args: dict[str, Any]) -> tuple[ModelConfig, int]:
    """VLLM's config of a model that is to read `max_model_len` tokens, and the length that vLLM derives for it.

    Raises:
        ValueError: The config cannot be read, or an argument is not vLLM's.
        OSError: There is no such model.

    """
    known = {field.name for field in dataclasses.fields(EngineArgs)}
    if unknown := sorted(engine_args.keys() - known):
        raise ValueError(f"vLLM has no argument {unknown[0]!r}; see the fields of vllm.engine.arg_utils.EngineArgs.")
    arguments = {**engine_args, "model": model, "max_model_len": max_model_len}
    with widened_length_check() as check, _as_a_sentence():
        try:
            model_config = EngineArgs(**arguments).create_model_config()
        except (ValueError, OSError):
            raise
        except Exception as error:  # transformers and vLLM calculate with what a config has, whatever that is
            said = " ".join(str(error.args[0] if error.args else "").split())
            raise ValueError(f"The config of {model} cannot be read: {type(error).__name__}: {said}") from error
    return model_config, check.derived_length


@contextlib.contextmanager
def _as_a_sentence() -> Iterator[None]:
    """What vLLM says where pydantic checks its configs, without what pydantic says about it."""
    try:
        yield
    except ValidationError as error:
        said = " ".join(one["msg"].removeprefix("Value error, ") for one in error.errors())
        raise ValueError(" ".join(said.split())) from error
