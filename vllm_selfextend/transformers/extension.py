"""`apply` and `remove`: what is put into a model, what is refused before, and how it comes out again."""

import inspect
import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from transformers import PreTrainedModel

from ..plan import ExtensionPlan
from ..positions import capacity
from ..rotary import rope_parameters, uses_alibi
from . import attention as _attention  # noqa: F401  # registers it
from .cache import CACHE_ARGUMENTS, swap_cache
from .call import begin_call, end_call, takes_keywords
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
        model: A decoder with RoPE, any class that attends through transformers' `AttentionInterface`; any dtype. Of a
            model that reads more than text its text model is extended, the rest is left alone.
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
        for module in rotations:
            _cache_argument(module)
    except BaseException as error:
        close_attention(text)
        if not isinstance(error, ValueError):
            raise
        raise ValueError(f"Self-Extend cannot be applied to this {type(model).__name__}: {error}") from error
    finally:
        set_attention(text, before)
    extension = Extension(
        plan=plan,
        grouped_layers=frozenset(int(module.layer_idx) for module in rotations),
        implementation=before,
        config=text.config,
        flash_attention=flash_attention,
    )
    tables: dict[tuple[int, bool], RotationTable] = {}  # layers that rotate alike share one
    for module, found in rotations.items():
        kind = id(found.rotation.frequencies), found.rotation.interleaved
        table = tables.setdefault(kind, RotationTable(found.rotation, plan))
        setattr(module, ATTRIBUTE, ExtendedLayer(extension, table, _cache_argument(module), found.shares_keys))
        extension.hooks.append(module.register_forward_pre_hook(swap_cache, with_kwargs=True))
    base = text.base_model
    setattr(base, MODEL_ATTRIBUTE, extension)
    for checked in {base, model.base_model}:  # a text model beside others gets no tokens, which tell padding
        extension.hooks.append(checked.register_forward_pre_hook(check_inputs, with_kwargs=True))
    extension.hooks.append(base.register_forward_pre_hook(begin_call, with_kwargs=True))
    extension.hooks.append(base.register_forward_hook(end_call, always_call=True))
    set_attention(text, NAME)
    logger.info(
        "Self-Extend in %d of %s's layers: group size %d, window %d, trained length %d (queries within it %s), log "
        "scaling %s; reaches %d tokens.",
        len(rotations),
        type(model).__name__,
        plan.group_size,
        plan.neighbor_window,
        plan.trained_length,
        "exact" if plan.exact_short else "grouped too",
        f"base {plan.log_scale_len}" if plan.log_scale else "off",
        plan.capacity,
    )
    return plan


@_alone()
def remove(model: Any) -> None:
    """Take Self-Extend out of a model: it is then as it was before `apply`. Without it, nothing happens.

    A cache that was filled meanwhile holds keys at group positions, and the model refuses it from now on.

    Raises:
        RuntimeError: The model is answering in another thread.

    """
    text = _text_model(model)
    extension: Extension | None = getattr(text.base_model, MODEL_ATTRIBUTE, None)
    if extension is None:
        return
    if extension.calls.keys() - {threading.get_ident()}:
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
            "its RoPE is 'dynamic' (dynamic NTK): the frequencies move with the length, so a cached key cannot be "
            "turned back."
        )
    if "longrope" in types and any(rope.get("short_factor") != rope.get("long_factor") for rope in ropes):
        return (
            "its RoPE is 'longrope': transformers chooses its factors anew for every batch, so a cached key cannot be "
            "turned back. Load it with a config whose rope_parameters have the long_factor for the short_factor too: "
            "vLLM takes the long ones for every long text."
        )
    return None


def _cache_argument(module: Any) -> str:
    if not takes_keywords(module):
        raise ValueError(f"{type(module).__name__} takes no keywords (**kwargs) to hand on to its attention.")
    names = [name for name in inspect.signature(module.forward).parameters if name in CACHE_ARGUMENTS]
    if not names:
        known = ", ".join(CACHE_ARGUMENTS)
        raise ValueError(f"{type(module).__name__} takes its cache by none of the names known: {known}.")
    return names[0]


def _plan(
    config: Any,
    group_size: int,
    window_size: int,
    trained_length: int | None,
    exact_short: bool,
    scale_base: int,
    kernel: str,
) -> ExtensionPlan:
    for name, value in {"group_size": group_size, "window_size": window_size, "trained_length": trained_length}.items():
        if not _is_integer(value, at_least=1) and not (name == "trained_length" and value is None):
            raise ValueError(f"{name} is {value!r}; it must be an integer of at least 1.")
    if not _is_integer(scale_base, at_least=2) and scale_base != -1:
        raise ValueError(f"scale_base is {scale_base!r}; it must be an integer of at least 2, or -1 for no scaling.")
    if not isinstance(exact_short, bool):
        raise ValueError(f"exact_short is {exact_short!r}; it must be True or False.")
    length = trained_length or checkpoint_length(config)
    if window_size > length:
        raise ValueError(
            f"window_size is {window_size}, more than the trained length {length}: positions inside the window would "
            f"leave the trained range. Set it to at most {length}."
        )
    return ExtensionPlan(
        max_model_len=capacity(length, group_size, window_size),
        trained_length=length,
        group_size=group_size,
        neighbor_window=window_size,
        exact_short=exact_short,
        log_scale_len=max(scale_base, 0),
        kernel=kernel,
        reason="group size and window set by the user",
    )


def _is_integer(value: Any, at_least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= at_least


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
