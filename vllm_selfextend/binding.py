"""After a model is loaded: check its rotary modules, lengthen their tables, and hand each layer its rotation."""

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from vllm.config import ModelConfig, VllmConfig, set_current_vllm_config
from vllm.model_executor.layers.attention import Attention

from .attention import SelfExtendImpl
from .backends.interface import Rotation, num_rotation_steps
from .config import SelfExtendConfig
from .plan import ExtensionPlan, read_plan, write_plan
from .rotary import cos_sin
from .rotary_modules import is_vllm_rotary, lengthen_tables, transformers_rotation, vllm_rotation
from .rotation_probe import ModelRotation


def bind_models(model_runner: Any, vllm_config: VllmConfig) -> None:
    """Bind the served model of a worker, and its draft model if it has one.

    Raises:
        ValueError: A layer's rotation cannot be told or is not what the config says.

    """
    plan = read_plan(vllm_config)
    # Probing a model's rotary code may make vLLM's custom ops, which ask for the current config.
    with set_current_vllm_config(vllm_config):
        # A stage of a pipeline may have nothing but layers with sliding windows, and so may a draft.
        is_whole = vllm_config.parallel_config.pipeline_parallel_size == 1
        # Not the weights' device: those may be offloaded.
        device = model_runner.device
        bind_model(model_runner.get_model(), vllm_config.model_config, plan, device, must_extend=is_whole)
        if (draft := model_runner.get_draft_model()) is not None:
            draft_config = vllm_config.speculative_config.draft_model_config
            bind_model(draft, draft_config, plan, device, must_extend=False)


def change_numbers(model_runner: Any, vllm_config: VllmConfig, group_size: int, neighbor_window: int) -> None:
    """Give a loaded model, and its draft if it has one, another group size and neighbor window.

    Keys in the cache are stored by the group size, so no request may be running and the caller has to empty the prefix
    cache (`LLM.reset_prefix_cache`). A captured graph would keep the old numbers, so the engine has to be eager.

    Raises:
        ValueError: The numbers do not reach the engine's `max_model_len`.
        RuntimeError: The engine is not eager, does not extend its model, or hands on its keys.

    """
    plan = read_plan(vllm_config)
    if not vllm_config.model_config.enforce_eager:
        raise RuntimeError("The numbers of a running engine can be changed only if it was started with enforce_eager.")
    if plan.group_size == 1:
        raise RuntimeError(f"Self-Extend is off in this engine ({plan.reason}), so it has no numbers to change.")
    if vllm_config.kv_transfer_config is not None:
        raise RuntimeError("The numbers of an engine whose keys leave it through a KV connector cannot be changed.")
    config = SelfExtendConfig(group_size, neighbor_window, plan.trained_length, plan.exact_short, plan.log_scale)
    changed = dataclasses.replace(config.plan(plan.trained_length, plan.max_model_len), kernel=plan.kernel)
    write_plan(vllm_config, changed)
    bind_models(model_runner, vllm_config)


def bind_model(
    model: nn.Module, model_config: ModelConfig, plan: ExtensionPlan, device: torch.device, *, must_extend: bool
) -> None:
    """Check and lengthen every rotary table of `model`, and give each full-attention layer its rotation on `device`.

    With `must_extend`, a model without such a layer is refused.
    """
    name, config = model_config.model, model_config.hf_text_config
    known: dict[int, ModelRotation] = {}
    for path, module in model.named_modules():
        if is_vllm_rotary(module) and id(module) not in known:
            with _naming(name, path):
                known[id(module)] = vllm_rotation(module, config)
            lengthen_tables(module, known[id(module)].frequencies, plan.max_model_len)
    num_steps = num_rotation_steps(plan.max_model_len, plan.group_size, plan.neighbor_window)
    tables: dict[bytes, torch.Tensor] = {}
    bound = 0
    for path, block, layer in _attention_layers(model):
        with _naming(name, path):
            beside = {id(child) for child in block.children() if is_vllm_rotary(child)}
            if not _uses_rope(block) or len(beside) > 1:
                raise ValueError("this layer uses no rotary embedding, or one that cannot be told.")
            if beside:
                rotation = known[beside.pop()]
            else:
                rotation = transformers_rotation(model, block, config, plan.max_model_len)
        key = rotation.frequencies.numpy().tobytes()
        if key not in tables:
            tables[key] = cos_sin(rotation.frequencies, 0, num_steps).to(device)
        layer.impl.bind(plan, Rotation(tables[key], rotation.interleaved))
        bound += 1
    if bound == 0 and must_extend:
        raise ValueError(
            f"Self-Extend cannot serve {name}: none of its attention layers sees the whole context, so there is "
            "nothing to extend. If they use a sliding window, add --disable-sliding-window."
        )


@contextlib.contextmanager
def _naming(model_name: str, path: str) -> Iterator[None]:
    """Put the model's and the module's name in front of an error."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"Self-Extend cannot serve {model_name}: {path}: {error}") from error


def _attention_layers(model: nn.Module) -> Iterator[tuple[str, nn.Module, Attention]]:
    """Each layer that groups positions: its path, its parent and itself."""
    for path, block in model.named_modules():
        for name, child in block.named_children():
            if isinstance(child, Attention) and isinstance(child.impl, SelfExtendImpl) and child.impl.extends:
                yield f"{path}.{name}", block, child


def _uses_rope(attention_block: nn.Module) -> bool:
    """False for a block that vLLM's model code marks as one without RoPE, though it may hold a rotary module."""
    flags = [getattr(attention_block, name, True) for name in ("use_rope", "_use_rope", "force_rope")]
    return all(flag is not False for flag in flags) and not getattr(attention_block, "nope", False)
