"""`apply` and `remove`: what is put into a model, what is refused before, and how it comes out again."""

import inspect
import logging
from typing import Any

from transformers import PreTrainedModel

from ..backends.limits import MAX_POSITIONS
from ..plan import ExtensionPlan
from ..positions import as_count, capacity
from ..rotary import rope_parameters
from . import attention as _attention  # noqa: F401  # registers it
from .cache import CACHE_ARGUMENTS, swap_cache
from .flash_attention import find_flash_attention
from .inputs import check_inputs
from .layer import ATTRIBUTE, NAME, ExtendedLayer, Extension, RotationTable
from .watch import find_rotations

logger = logging.getLogger(__name__)

MODEL_ATTRIBUTE = "self_extend_extension"
"""Where an extended model has its `Extension`."""

LENGTH_KEYS = ("max_position_embeddings", "n_positions", "max_seq_len", "max_sequence_length", "max_seq_length")
"""Where configs say how long the texts were that a model was trained on."""


def apply(
    model: Any,
    group_size: int,
    window_size: int,
    enable_flash_attention: bool = False,
    scale_base: int = -1,
    flash_attention_impl: str = "flash_attn",
    *,
    trained_length: int | None = None,
    exact_short: bool = False,
) -> ExtensionPlan:
    """Give a loaded transformers model Self-Extend; the positional parameters are those of the authors' `apply`.

    A model that already has it gets the new numbers in place of the old ones.

    Args:
        model: A decoder with RoPE, any class that attends through transformers' `AttentionInterface`; any dtype.
        group_size: `G`, how many neighboring positions share one grouped position; 1 is ordinary attention.
        window_size: `W`, how many tokens back positions stay exact.
        enable_flash_attention: Let the package flash-attn attend, in float16 or bfloat16 on a GPU; the answers are the
            same but for rounding.
        scale_base: Multiply queries by `max(1, ln(position + 1) / ln(scale_base))`; -1 does not.
        flash_attention_impl: Must be "flash_attn"; read with `enable_flash_attention` only.
        trained_length: `L`, tokens; None is the length that the model's config names.
        exact_short: Queries at positions below `L` get the unmodified model's attention. False is the paper to the
            letter.

    Returns:
        The numbers; `capacity` is the longest sequence they reach, and a longer one is refused when it comes.

    Raises:
        ValueError: A value is not allowed, or the model cannot be extended; the message says why and what to do.

    Source: `SelfExtend.apply` in https://github.com/datamllab/LongLM, and section 3 of arXiv 2401.01325.

    """
    if reason := _unsupported(model):
        raise ValueError(f"Self-Extend cannot be applied to this {type(model).__name__}: {reason}")
    flash_attention = find_flash_attention(flash_attention_impl) if enable_flash_attention else None
    # Every layer is asked again when it attends; embeddings have the type that a quantised model computes in.
    if flash_attention and (reason := flash_attention.unusable(model.get_input_embeddings().weight)):
        raise ValueError(reason)
    scale_base = _scale_base(scale_base)
    plan = _plan(model.config, group_size, window_size, trained_length, exact_short, scale_base)
    remove(model)
    before = model.config._attn_implementation
    try:
        rotations = find_rotations(model)
        for module in rotations:
            _cache_argument(module)
    except ValueError as error:
        raise ValueError(f"Self-Extend cannot be applied to this {type(model).__name__}: {error}") from error
    finally:
        model.set_attn_implementation(before)
    extension = Extension(
        plan=plan,
        scale_base=scale_base,
        grouped_layers=frozenset(int(module.layer_idx) for module in rotations),
        implementation=before,
        config=model.config,
        flash_attention=flash_attention,
    )
    tables: dict[tuple[int, bool], RotationTable] = {}  # layers that rotate alike share one
    for module, rotation in rotations.items():
        kind = id(rotation.frequencies), rotation.interleaved
        table = tables.setdefault(kind, RotationTable(rotation, plan))
        setattr(module, ATTRIBUTE, ExtendedLayer(extension, table, _cache_argument(module)))
        extension.hooks.append(module.register_forward_pre_hook(swap_cache, with_kwargs=True))
    base = model.base_model
    setattr(base, MODEL_ATTRIBUTE, extension)
    extension.hooks.append(base.register_forward_pre_hook(check_inputs, with_kwargs=True))
    extension.hooks.append(base.register_forward_hook(lambda *_: extension.forget_step(), always_call=True))
    model.set_attn_implementation(NAME)
    logger.info(
        "Self-Extend in %d of %s's layers: group size %d, window %d, trained length %d (queries within it %s), log "
        "scaling %s; reaches %d tokens.",
        len(rotations),
        type(model).__name__,
        plan.group_size,
        plan.neighbor_window,
        plan.trained_length,
        "exact" if plan.exact_short else "grouped too",
        f"base {scale_base}" if scale_base > 0 else "off",
        plan.capacity,
    )
    return plan


def remove(model: Any) -> None:
    """Take Self-Extend out of a model: it is then as it was before `apply`. Without it, nothing happens.

    A cache that was filled meanwhile holds keys at group positions, and the model refuses it from now on.
    """
    extension: Extension | None = getattr(model.base_model, MODEL_ATTRIBUTE, None)
    if extension is None:
        return
    for hook in extension.hooks:
        hook.remove()
    for module in model.modules():
        if isinstance(getattr(module, ATTRIBUTE, None), ExtendedLayer):
            delattr(module, ATTRIBUTE)
    delattr(model.base_model, MODEL_ATTRIBUTE)
    if model.config._attn_implementation == NAME:  # or the user has set another one since
        model.set_attn_implementation(extension.implementation)


def _unsupported(model: Any) -> str | None:
    """Why a model cannot be extended, as far as its class and its config tell."""
    if not isinstance(model, PreTrainedModel):
        return "it is not a model of transformers. Pass that one (of a PEFT model: model.get_base_model())."
    config = model.config
    if config.is_encoder_decoder:
        return "it is an encoder-decoder model; Self-Extend is for decoder-only models."
    if config.get_text_config() is not config:
        return "it reads more than text. Load the text model alone (its ForCausalLM class)."
    if getattr(config, "kv_lora_rank", None):
        return "it uses multi-head latent attention (MLA), whose keys have parts of their own for positions."
    ropes = list(rope_parameters(config))
    if any("mrope_section" in rope or rope.get("rope_type") == "mrope" for rope in ropes):
        return "its RoPE has several position axes (M-RoPE), and Self-Extend groups one."
    types = {rope.get("rope_type", "default") for rope in ropes}
    for module in model.modules():
        kind = getattr(module, "rope_type", None)
        types |= set(kind.values()) if isinstance(kind, dict) else {kind}
    for moving, why in {
        "dynamic": " (dynamic NTK): the frequencies move with the length",
        "longrope": ": transformers chooses its factors anew for every batch",
    }.items():
        if moving in types:
            return f"its RoPE is {moving!r}{why}, so a cached key cannot be turned back."
    return None


def _cache_argument(module: Any) -> str:
    names = [name for name in inspect.signature(module.forward).parameters if name in CACHE_ARGUMENTS]
    if not names:
        known = ", ".join(CACHE_ARGUMENTS)
        raise ValueError(f"{type(module).__name__} takes its cache by none of the names known: {known}.")
    return names[0]


def _plan(
    config: Any, group_size: int, window_size: int, trained_length: int | None, exact_short: bool, scale_base: int
) -> ExtensionPlan:
    group_size, window_size = _count("group_size", group_size), _count("window_size", window_size)
    if trained_length is not None:
        trained_length = _count("trained_length", trained_length)
    if not isinstance(exact_short, bool):
        raise ValueError(f"exact_short is {exact_short!r}; it must be True or False.")
    length = trained_length or _count("the length that the model's config names", checkpoint_length(config))
    if window_size > length:
        raise ValueError(
            f"window_size is {window_size}, more than the trained length {length}: positions inside the window would "
            f"leave the trained range. Set it to at most {length}."
        )
    return ExtensionPlan(
        max_model_len=capacity(length, group_size, window_size),
        derived_length=length,
        trained_length=length,
        group_size=group_size,
        neighbor_window=window_size,
        exact_short=exact_short,
        log_scale=scale_base == length,
        kernel="reference",
        reason="group size and window set by the user",
    )


def _count(name: str, value: Any) -> int:
    if (count := as_count(value)) is None:
        raise ValueError(f"{name} is {value!r}; it must be an integer from 1 to {MAX_POSITIONS}.")
    return count


def _scale_base(value: Any) -> int:
    """`AttentionParams.log_scale_len`."""
    if value == -1:
        return 0
    if (count := as_count(value, least=2)) is None:
        raise ValueError(
            f"scale_base is {value!r}; it must be an integer from 2 to {MAX_POSITIONS}, or -1 for no scaling."
        )
    return count


def checkpoint_length(config: Any) -> int:
    """The trained length that a config names, as vLLM derives it (`vllm/config/model.py`): linear RoPE multiplies it.

    Raises:
        ValueError: It names none.

    """
    lengths = [length for key in LENGTH_KEYS if (length := getattr(config, key, None))]
    if not lengths:
        raise ValueError("the model's config does not say for how many tokens it was trained: pass trained_length.")
    factors = [rope.get("factor") or 1.0 for rope in rope_parameters(config) if rope.get("rope_type") == "linear"]
    # Gemma 3 names its length already multiplied.
    factor = 1.0 if "gemma3" in config.model_type else max(factors, default=1.0)
    return int(min(lengths) * factor)
