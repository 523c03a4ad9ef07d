"""After a model is loaded: check its rotary modules, lengthen their tables, and hand each layer its rotation."""

import contextlib
import dataclasses
import inspect
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import nn
from vllm.config import ModelConfig, VllmConfig, set_current_vllm_config
from vllm.distributed.parallel_state import get_pp_group
from vllm.forward_context import set_forward_context
from vllm.logger import init_logger
from vllm.model_executor.layers.attention import Attention, ChunkedLocalAttention
from vllm.model_executor.models import supports_multimodal

from ..backends.interface import GroupSizes, Rotation, num_rotation_steps
from ..method.config import SelfExtendConfig
from ..method.plan import ExtensionPlan, read_plan, write_plan
from ..method.positions import GroupSize
from ..method.rope import cos_sin
from ..method.rotation_probe import ModelRotation, UntoldError, probe_positions, rotation_of
from .attention import SelfExtendImpl
from .layer_probe import QueryAndKey, queries_and_keys
from .rotary_modules import (
    check_other_tables,
    is_vllm_rotary,
    lengthen_tables,
    transformers_frequencies,
    vllm_frequencies,
)

# vLLM's logging is set up for loggers below "vllm".
logger = init_logger("vllm.self_extend")


def bind_models(model_runner: Any, vllm_config: VllmConfig) -> None:
    """Bind the served model of a worker, and its draft model or head if it has one.

    Raises:
        ValueError: A layer's rotation cannot be told or is not what the config says.

    """
    # Running a model may make vLLM's custom ops, which ask for the current config.
    with set_current_vllm_config(vllm_config):
        # A stage of a pipeline may have nothing but layers with sliding windows, and so may a draft.
        is_whole = vllm_config.parallel_config.pipeline_parallel_size == 1
        must_extend = is_whole and read_plan(vllm_config).groups
        bind_model(
            model_runner.get_model(), vllm_config.model_config, model_runner, vllm_config, must_extend=must_extend
        )
        if (draft := model_runner.get_draft_model()) is not None:
            draft_config = vllm_config.speculative_config.draft_model_config
            bind_model(draft, draft_config, model_runner, vllm_config, must_extend=False, is_draft=True)


def change_numbers(model_runner: Any, vllm_config: VllmConfig, group_size: GroupSize, neighbor_window: int) -> None:
    """Give a loaded model, and its draft head if it has one, another group size and neighbor window.

    Past the first layer, keys in the cache follow from the numbers, so no request may be running and the caller has to
    empty the prefix cache (`LLM.reset_prefix_cache`). A captured graph would keep the old numbers, so the engine has to
    be eager.

    Raises:
        ValueError: The numbers do not reach the engine's `max_model_len`.
        RuntimeError: The engine is not eager, does not extend its model, or hands on its keys.

    """
    plan = read_plan(vllm_config)
    if not vllm_config.model_config.enforce_eager:
        raise RuntimeError("The numbers of a running engine can be changed only if it was started with enforce_eager.")
    if not plan.groups:
        raise RuntimeError(
            f"Self-Extend is off in this engine, which serves {plan.max_model_len} tokens and groups none of them, so "
            "it has no numbers to change."
        )
    if vllm_config.kv_transfer_config is not None:
        raise RuntimeError("The numbers of an engine whose keys leave it through a KV connector cannot be changed.")
    config = SelfExtendConfig(group_size, neighbor_window, plan.trained_length, plan.exact_short, plan.log_scale)
    changed = dataclasses.replace(
        config.plan(plan.trained_length, plan.max_model_len), kernel=plan.kernel, draft_length=plan.draft_length
    )
    write_plan(vllm_config, changed)
    bind_models(model_runner, vllm_config)


def bind_model(
    model: nn.Module,
    model_config: ModelConfig,
    model_runner: Any,
    vllm_config: VllmConfig,
    *,
    must_extend: bool,
    is_draft: bool = False,
) -> None:
    """Check and lengthen every rotary table of `model`, and tell each full-attention layer how it is rotated.

    With `must_extend`, a model of which no layer groups positions is refused. With `is_draft` it is run as vLLM's
    proposers run theirs, which may have modules that vLLM does not use.
    """
    name, plan = model_config.model, read_plan(vllm_config)
    if is_draft and plan.draft_length:
        plan = plan.of_draft_model()
    layers = dict(_grouping_layers(model, plan))
    for path, layer in _our_layers(model):
        if path not in layers:
            layer.impl.bind(plan)
    ends_early = model_config.max_model_len < plan.max_model_len and not vllm_config.use_v2_model_runner
    if is_draft and not layers and ends_early:
        return  # vLLM asks it for nothing past the length that it was made for
    if layers or must_extend:
        check_model(model, name, plan)
    known = _known_rotations(model, model_config, plan.max_model_len)
    if not layers:
        return
    candidates = {one.frequencies.numpy().tobytes(): one.frequencies for several in known.values() for one in several}
    positions = probe_positions(plan.max_model_len)
    probed = _probe(model, layers, positions, model_config, is_draft, model_runner, vllm_config)
    # Not the weights' device: those may be offloaded.
    device = model_runner.device
    # Steps that vLLM runs for their shapes alone, before it captures them, may be longer than any that is served.
    num_positions = max(plan.max_model_len, vllm_config.scheduler_config.max_num_batched_tokens)
    sizes = GroupSizes.of(plan.group_sizes(num_positions), device)
    num_steps = num_rotation_steps(num_positions, sizes.largest, plan.neighbor_window)
    tables: dict[bytes, torch.Tensor] = {}
    untold = []
    for path, layer in layers.items():
        if is_draft and path not in probed:
            layer.impl.bind(plan)
            continue
        with _naming(name, path):
            if path not in probed:
                raise ValueError("the model does not use this layer, so how it is rotated cannot be told.")
            try:
                rotation = rotation_of(*probed[path], positions, list(candidates.values()))
            except UntoldError:
                if (rotation := _rotation_nearby(model, path, known)) is None:
                    raise
                untold.append(path)
        if rotation is None or isinstance(layer, ChunkedLocalAttention):
            layer.impl.bind(plan)
            continue
        key = rotation.frequencies.numpy().tobytes()
        if key not in tables:
            tables[key] = cos_sin(rotation.frequencies, 0, num_steps).to(device)
        layer.impl.bind(plan, (sizes, Rotation(tables[key], rotation.interleaved)))
    if untold:
        logger.warning(
            "How %d of %s's %d layers rotate their queries and keys cannot be told from these, which are not finite or "
            "vanish (dummy weights?). They are taken to rotate as the rotary modules beside them.",
            len(untold),
            name,
            len(layers),
        )
    if not tables and must_extend:
        raise ValueError(f"Self-Extend cannot serve {name}: {_nothing_to_extend(layers)}")


def check_model(model: nn.Module, name: str, plan: ExtensionPlan) -> None:
    """Refuse a model of which a layer would be left out, or none could be extended. Needs no weights.

    Raises:
        ValueError: It is one.

    """
    layers = dict(_grouping_layers(model, plan))
    if reason := _left_out(model) or (None if layers else _nothing_to_extend(layers)):
        raise ValueError(f"Self-Extend cannot serve {name}: {reason}")


def _left_out(model: nn.Module) -> str | None:
    """Why a layer that sees the whole context would not be extended; None if there is no such layer."""
    for path, module in model.named_modules():
        if not isinstance(module, Attention) or isinstance(module.impl, SelfExtendImpl):
            continue
        if module.sliding_window is None:
            return (
                f"{path} sees the whole context and has another attention backend, {module.backend.name}, which the "
                "model's code chose, or backend_per_kind. Leave backend_per_kind out; if it is the model's code, the "
                "model cannot be extended."
            )
    return None


def _nothing_to_extend(layers: dict[str, Attention]) -> str:
    if not layers:
        return (
            "none of its attention layers sees the whole context, so there is nothing to extend. If they use a sliding "
            "window, add --disable-sliding-window."
        )
    return (
        "its layers with RoPE see a part of the context only (a window or a chunk), and those that see all of it have "
        "no RoPE. No position leaves the trained range, so there is nothing to extend: without Self-Extend vLLM "
        "computes the same, and takes a longer --max-model-len with VLLM_ALLOW_LONG_MAX_MODEL_LEN=1."
    )


def _rotation_nearby(
    model: nn.Module, path: str, known: Mapping[nn.Module, list[ModelRotation]]
) -> ModelRotation | None:
    """The rotation of the rotary modules that are nearest to a layer; None if there are none, or they differ."""
    while path:
        path = path.rpartition(".")[0]
        nearby = [one for module in model.get_submodule(path).modules() for one in known.get(module, ())]
        if nearby:
            first, *others = nearby
            return first if all(_are_equal(first, other) for other in others) else None
    return None


def _are_equal(one: ModelRotation, other: ModelRotation) -> bool:
    return one.interleaved == other.interleaved and torch.equal(one.frequencies, other.frequencies)


def _known_rotations(model: Any, model_config: ModelConfig, length: int) -> dict[nn.Module, list[ModelRotation]]:
    """What each rotary module rotates by, checked; the tables of vLLM's are lengthened, if need be.

    A vision tower has rotations of its own, of which the text config says nothing.
    """
    config = model_config.hf_text_config
    found: dict[nn.Module, list[ModelRotation]] = {}
    text_model = model.get_language_model() if supports_multimodal(model) else model
    for path, module in text_model.named_modules():
        with _naming(model_config.model, path):
            if is_vllm_rotary(module):
                frequencies = vllm_frequencies(module, config)
                lengthen_tables(module, frequencies, length)
                several = [ModelRotation(frequencies, not getattr(module, "is_neox_style", True))]
            else:
                check_other_tables(module, length)
                # Which dimensions make a pair, transformers' modules do not say: most often halves.
                several = [ModelRotation(one, False) for one in transformers_frequencies(module, config)]
        if several:
            found[module] = several
    return found


def _probe(
    model: Any,
    layers: dict[str, Attention],
    positions: torch.Tensor,
    model_config: ModelConfig,
    is_draft: bool,
    model_runner: Any,
    vllm_config: VllmConfig,
) -> dict[str, QueryAndKey]:
    """What `queries_and_keys` finds for a token at each of the positions."""
    num_tokens = len(positions)
    arguments = _draft_arguments if is_draft else _model_arguments
    calls = arguments(model, positions.to(model_runner.device), model_config, model_runner, vllm_config)
    for call in calls:
        try:
            inspect.signature(model.forward).bind(**call)
        except TypeError as error:
            raise ValueError(
                f"Self-Extend cannot serve {model_config.model}: its {type(model).__name__} cannot be run as vLLM runs "
                f"{'drafts' if is_draft else 'models'} ({error}), so how its layers are rotated cannot be told."
            ) from error

    def run() -> None:
        with (
            model_runner.maybe_select_dummy_loras(vllm_config.lora_config, np.array([num_tokens], dtype=np.int32)),
            set_forward_context(None, vllm_config, num_tokens=num_tokens, skip_compiled=True),
        ):
            for call in calls:
                model(**call)

    return queries_and_keys(model, layers, model_config.get_hidden_size(), run)


def _model_arguments(
    model: Any, positions: torch.Tensor, model_config: ModelConfig, model_runner: Any, vllm_config: VllmConfig
) -> list[dict[str, Any]]:
    """The call that runs a model, or this process's stage of it, on a token at each of the positions."""
    intermediate = None
    if not get_pp_group().is_first_rank:
        intermediate = model.make_empty_intermediate_tensors(len(positions), model_config.dtype, positions.device)
    return [{**_tokens(positions, model_config), "intermediate_tensors": intermediate}]


def _draft_arguments(
    model: Any, positions: torch.Tensor, model_config: ModelConfig, model_runner: Any, vllm_config: VllmConfig
) -> list[dict[str, Any]]:
    """The calls that run all that vLLM uses of a draft model or head, as its proposers make them.

    The first runner's are in `vllm/v1/spec_decode/`, the second one's in `vllm/v1/worker/gpu/spec_decode/`.
    """
    speculative_config = vllm_config.speculative_config
    call = {**_tokens(positions, model_config), "inputs_embeds": None}
    if not speculative_config.use_eagle():
        return [call]
    is_second_runner = hasattr(model_runner, "speculator")
    proposer = model_runner.speculator if is_second_runner else model_runner.drafter
    shape = len(positions), proposer.hidden_size
    call["hidden_states"] = torch.ones(shape, dtype=model_config.dtype, device=positions.device)
    # An MTP head may have a module for each token that it drafts. These proposers choose one; the others never do.
    if speculative_config.use_step3p5_mtp() or (is_second_runner and speculative_config.use_multi_module_mtp()):
        return [{**call, "spec_step_idx": step} for step in range(speculative_config.num_speculative_tokens)]
    return [call]


def _tokens(positions: torch.Tensor, model_config: ModelConfig) -> dict[str, Any]:
    return {
        "input_ids": torch.zeros(len(positions), dtype=torch.int32, device=positions.device),
        "positions": positions.expand(3, -1) if model_config.uses_mrope else positions,
    }


@contextlib.contextmanager
def _naming(model_name: str, path: str) -> Iterator[None]:
    """Put the model's and the module's name in front of an error."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"Self-Extend cannot serve {model_name}: {path}: {error}") from error


def _our_layers(model: nn.Module) -> Iterator[tuple[str, Attention]]:
    """Each layer that attends with Self-Extend's kernels, by its path."""
    for path, module in model.named_modules():
        if isinstance(module, Attention) and isinstance(module.impl, SelfExtendImpl):
            yield path, module


def _grouping_layers(model: nn.Module, plan: ExtensionPlan) -> Iterator[tuple[str, Attention]]:
    """Those that may group positions."""
    return ((path, layer) for path, layer in _our_layers(model) if layer.impl.may_group(plan))
