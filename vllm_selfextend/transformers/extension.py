"""`apply` and `remove`: what is put into a model, what is refused before, and how it comes out again."""

import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

from transformers import PreTrainedModel

from ..backends.limits import MAX_POSITIONS
from ..method.plan import ExtensionPlan
from ..method.positions import GroupSize, as_count, auto_reach, capacity, default_window, largest_auto_window
from ..method.rope import rope_parameters, uses_alibi
from . import attention as _attention  # noqa: F401  # registers it
from .call import begin_call, end_call, is_called_elsewhere
from .flash_attention import find_flash_attention
from .inputs import check_inputs
from .layer import ATTRIBUTE, MODEL_ATTRIBUTE, NAME, ExtendedLayer, Extension, RotationTable
from .own_attention import close_attention, open_attention, set_attention
from .watch import find_rotations, some_embeddings

logger = logging.getLogger(__name__)

LENGTH_KEYS = ("max_position_embeddings", "n_positions", "max_seq_len", "max_sequence_length", "max_seq_length")
"""Where configs say how long the texts were that a model was trained on."""

_lock = threading.RLock()


@contextmanager
def _alone() -> Iterator[None]:
    """One change of a model at a time: what `apply` finds there for the while is not what it was before."""
    with _lock:
        yield


@_alone()
def apply(
    model: Any,
    group_size: GroupSize = "auto",
    window_size: int | Literal["auto"] = "auto",
    enable_flash_attention: bool = False,
    scale_base: int | Literal["auto"] = "auto",
    flash_attention_impl: str = "flash_attn",
    *,
    trained_length: int | None = None,
    exact_short: bool | None = None,
) -> ExtensionPlan:
    """Give a loaded transformers model Self-Extend; the positional parameters are those of the authors' `apply`.

    A model that already has it gets the new numbers in place of the old ones.

    Args:
        model: A decoder with RoPE, any class that attends through transformers' `AttentionInterface`; any dtype. Of a
            model that reads more than text its text model is extended, the rest is left alone.
        group_size: `G`, how many neighboring positions share one grouped position; 1 is ordinary attention. "auto"
            follows the query's position: 1 below `L`, past it the least that keeps its relative positions below two
            thirds of `L`.
        window_size: `W`, how many tokens back positions stay exact; "auto" is a quarter of the trained length, at most
            1,024.
        enable_flash_attention: Let the package flash-attn attend, in float16 or bfloat16 on a GPU; the answers are the
            same but for rounding.
        scale_base: Multiply queries by `max(1, ln(position + 1) / ln(scale_base))`; -1 does not. "auto" is the trained
            length where `group_size` is "auto", and -1, the authors' default, with a number.
        flash_attention_impl: Must be "flash_attn"; read with `enable_flash_attention` only.
        trained_length: `L`, tokens; None is the length that the model's config names.
        exact_short: Queries at positions below `L` get the unmodified model's attention. None: they do where
            `group_size` is "auto"; with a number they do not, which is the paper to the letter.

    Returns:
        The numbers; `capacity` is the longest sequence they reach, if there is one: a longer one is refused when it
        comes.

    Raises:
        ValueError: A value is not allowed, or the model cannot be extended; the message says why and what to do.
        RuntimeError: See `remove`.

    Source: `SelfExtend.apply` in https://github.com/datamllab/LongLM, and section 3 of arXiv 2401.01325.

    """
    if reason := _unsupported(model):
        raise ValueError(f"Self-Extend cannot be applied to this {type(model).__name__}: {reason}")
    flash_attention = find_flash_attention(flash_attention_impl) if enable_flash_attention else None
    # Every layer is asked again when it attends; embeddings have the type that a quantised model computes in.
    if flash_attention and (reason := flash_attention.unusable(some_embeddings(model))):
        raise ValueError(reason)
    text = _text_model(model)
    kernel = flash_attention_impl if flash_attention else "reference"
    plan = _plan(text.config, group_size, window_size, trained_length, exact_short, scale_base, kernel)
    remove(model)
    before = text.config._attn_implementation
    try:
        open_attention(text)
        rotations = find_rotations(text)
    except BaseException as error:
        close_attention(text)
        if not isinstance(error, ValueError):
            raise
        raise ValueError(f"Self-Extend cannot be applied to this {type(model).__name__}: {error}") from error
    finally:
        set_attention(text, before)
    extension = Extension(
        plan=plan,
        implementation=before,
        config=text.config,
        flash_attention=flash_attention,
    )
    tables: dict[tuple[int, bool], RotationTable] = {}  # layers that rotate alike share one
    for module, rotation in rotations.items():
        kind = id(rotation.frequencies), rotation.interleaved
        setattr(module, ATTRIBUTE, ExtendedLayer(extension, tables.setdefault(kind, RotationTable(rotation, plan))))
    base = text.base_model
    setattr(base, MODEL_ATTRIBUTE, extension)
    for checked in {base, model.base_model}:  # a text model beside others gets no tokens, which tell padding
        extension.hooks.append(checked.register_forward_pre_hook(check_inputs, with_kwargs=True))
    extension.hooks.append(base.register_forward_pre_hook(begin_call, with_kwargs=True))
    extension.hooks.append(base.register_forward_hook(end_call, always_call=True))
    set_attention(text, NAME)
    logger.info(
        "Self-Extend in %d of %s's layers: group size %s, window %d, trained length %d (queries within it %s), log "
        "scaling %s; reaches %s.",
        len(rotations),
        type(model).__name__,
        plan.group_size,
        plan.neighbor_window,
        plan.trained_length,
        "exact" if plan.exact_short else "grouped too",
        f"base {plan.log_scale_len}" if plan.log_scale else "off",
        "any length" if plan.capacity is None else f"{plan.capacity} tokens",
    )
    return plan


@_alone()
def remove(model: Any) -> None:
    """Take Self-Extend out of a model: it is then as it was before `apply`. Without it, nothing happens.

    Raises:
        RuntimeError: The model is answering in another thread.

    """
    text = _text_model(model)
    extension: Extension | None = getattr(text.base_model, MODEL_ATTRIBUTE, None)
    if extension is None:
        return
    if is_called_elsewhere(extension):
        raise RuntimeError("the model is answering in another thread: wait for that before its Self-Extend is changed.")
    for hook in extension.hooks:
        hook.remove()
    for module in text.modules():
        if isinstance(getattr(module, ATTRIBUTE, None), ExtendedLayer):
            delattr(module, ATTRIBUTE)
    delattr(text.base_model, MODEL_ATTRIBUTE)
    if text.config._attn_implementation == NAME:  # or the user has set another one since
        set_attention(text, extension.implementation)
    close_attention(text)


def _text_model(model: Any) -> Any:
    """The model itself, or the text model in one that reads more than text."""
    return model if model.config.get_text_config() is model.config else model.get_decoder()


def _unsupported(model: Any) -> str | None:
    """Why a model cannot be extended, as far as its class and its config tell."""
    if not isinstance(model, PreTrainedModel):
        return "it is not a model of transformers. Pass that one (of a PEFT model: model.get_base_model())."
    if model.config.is_encoder_decoder:
        return "it is an encoder-decoder model; Self-Extend is for decoder-only models."
    config = model.config.get_text_config()
    if getattr(_text_model(model), "config", None) is not config:
        return "it reads more than text, and has no text model that could be told. Load that one alone."
    if uses_alibi(config):
        return "it uses ALiBi; Self-Extend needs rotary position embeddings (RoPE)."
    if getattr(config, "kv_lora_rank", None):
        return "it uses multi-head latent attention (MLA), whose keys have parts of their own for positions."
    ropes = list(rope_parameters(config))
    types = {rope.get("rope_type", "default") for rope in ropes}
    for module in model.modules():
        kind = getattr(module, "rope_type", None)
        types |= set(kind.values()) if isinstance(kind, dict) else {kind}
    if "dynamic" in types:
        return (
            "its RoPE is 'dynamic' (dynamic NTK): the frequencies move with the length, so how far a cached key is "
            "to be turned is not known."
        )
    if "longrope" in types and any(rope.get("short_factor") != rope.get("long_factor") for rope in ropes):
        return (
            "its RoPE is 'longrope': transformers chooses its factors anew for every batch, so how far a cached key is "
            "to be turned is not known. Load it with a config whose rope_parameters have the long_factor for the "
            "short_factor too: vLLM takes the long ones for every long text."
        )
    return None


def _plan(
    config: Any,
    group_size: GroupSize,
    window_size: int | Literal["auto"],
    trained_length: int | None,
    exact_short: bool | None,
    scale_base: Any,
    kernel: str,
) -> ExtensionPlan:
    if exact_short is None:
        exact_short = group_size == "auto"
    elif not isinstance(exact_short, bool):
        raise ValueError(f"exact_short is {exact_short!r}; it must be True, False or None.")
    if group_size == "auto" and not exact_short:
        raise ValueError(
            'exact_short is False, and group_size is "auto", which begins past the trained length. Pass a number for '
            "group_size, or leave exact_short out."
        )
    if group_size != "auto":
        group_size = _count("group_size", group_size, ', or "auto"')
    if trained_length is not None:
        trained_length = _count("trained_length", trained_length)
    length = trained_length or _count("the length that the model's config names", checkpoint_length(config))
    window = default_window(length) if window_size == "auto" else _count("window_size", window_size, ', or "auto"')
    if window > length:
        raise ValueError(
            f"window_size is {window}, more than the trained length {length}: positions inside the window would leave "
            f"the trained range. Set it to at most {length}."
        )
    if group_size == "auto" and window > (most := largest_auto_window(length)):
        raise ValueError(
            f"window_size is {window}, and an automatic group_size uses {auto_reach(length)} positions, of which the "
            "keys before the window need a quarter. Pass "
            f"{f'a window_size of at most {most}, or ' if most else ''}a number for group_size."
        )
    if isinstance(scale_base, str) and scale_base == "auto":
        scale_base = length if group_size == "auto" else -1
    log_scale_len = 0 if scale_base == -1 else _log_scale_len(scale_base)
    return ExtensionPlan(
        max_model_len=MAX_POSITIONS if group_size == "auto" else capacity(length, group_size, window),
        derived_length=length,
        trained_length=length,
        group_size=group_size,
        neighbor_window=window,
        exact_short=exact_short,
        log_scale_len=log_scale_len,
        kernel=kernel,
    )


def _count(name: str, value: Any, others: str = "") -> int:
    if (count := as_count(value)) is None:
        raise ValueError(f"{name} is {value!r}; it must be an integer from 1 to {MAX_POSITIONS}{others}.")
    return count


def _log_scale_len(scale_base: Any) -> int:
    """`AttentionParams.log_scale_len`, where queries are scaled."""
    if (count := as_count(scale_base, least=2)) is None:
        raise ValueError(
            f"scale_base is {scale_base!r}; it must be an integer from 2 to {MAX_POSITIONS}, -1 for no "
            'scaling, or "auto".'
        )
    return count


def checkpoint_length(config: Any) -> int:
    """The trained length that a config names, as vLLM derives it (`vllm/config/model.py`): linear RoPE multiplies it.

    Raises:
        ValueError: It names none, or one that cannot be.

    """
    lengths = [length for key in LENGTH_KEYS if (length := getattr(config, key, None))]
    if wrong := [length for length in lengths if as_count(length) is None]:
        raise ValueError(f"the model's config has the length {wrong[0]!r}, which is none: pass trained_length.")
    if not lengths:
        raise ValueError("the model's config does not say for how many tokens it was trained: pass trained_length.")
    factors = [rope.get("factor") or 1.0 for rope in rope_parameters(config) if rope.get("rope_type") == "linear"]
    # Gemma 3 names its length already multiplied.
    factor = 1.0 if "gemma3" in config.model_type else max(factors, default=1.0)
    return int(min(lengths) * factor)
