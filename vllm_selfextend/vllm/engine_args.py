"""Lets `--max-model-len` go past the trained length, and settles every number before vLLM starts its workers.

vLLM refuses a `max_model_len` longer than the length it derives for the checkpoint (`vllm/config/model.py`,
`_get_and_verify_max_len`). While an engine with the backend CUSTOM is being configured, and only then, that length
becomes the trained length `L` instead of the limit. `LLM`, `vllm serve` and Ray all come through
`EngineArgs.create_engine_config`.
"""

import contextlib
import dataclasses
import functools
import math
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from vllm.config import AttentionConfig, VllmConfig
from vllm.engine.arg_utils import EngineArgs
from vllm.logger import init_logger
from vllm.platforms import current_platform
from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

from ..backends import choose_kernels
from ..method.config import SelfExtendConfig, misspelled_key, stray_settings
from ..method.plan import CONFIG_KEY, ExtensionPlan, write_plan
from .kv_connectors import check_connector
from .support import SELF_EXTEND_WORKERS, unsupported_reason

BACKEND = "vllm_selfextend.vllm.attention.SelfExtendBackend"
"""What is registered as CUSTOM."""

_replaced: str | None = None
"""What another plugin had registered before, if one had."""

# vLLM's logging is set up for loggers below "vllm".
logger = init_logger("vllm.self_extend")


@dataclass
class LengthCheck:
    """What vLLM's check found while it was widened: the lengths it derives for the checkpoint and its draft, tokens."""

    derived_length: int = 0
    draft_length: int = 0


_widened: ContextVar[LengthCheck | None] = ContextVar("self_extend_length_check", default=None)


@contextlib.contextmanager
def widened_length_check() -> Iterator[LengthCheck]:
    """While open, a `max_model_len` past the derived length is let through and the derived length noted."""
    check = LengthCheck()
    token = _widened.set(check)
    try:
        yield check
    finally:
        _widened.reset(token)


def chooses_custom(args: EngineArgs) -> bool:
    """Whether the user chose the backend CUSTOM, for all layers or for a kind of them."""
    config = args.attention_config
    chosen = [args.attention_backend, config.backend, *config.backend_per_kind.values()]
    return AttentionBackendEnum.CUSTOM in map(AttentionConfig.validate_backend_before, chosen)


def widen_max_len_check(original: Callable[..., int]) -> Callable[..., int]:
    """Wrap `_get_and_verify_max_len`: the same answers and refusals, except while CUSTOM is being configured."""

    @functools.wraps(original)
    def get_and_verify_max_len(*, max_model_len: int | None, **kwargs: Any) -> int:
        check = _widened.get()
        if check is None:
            return original(max_model_len=max_model_len, **kwargs)
        derived = original(max_model_len=None, **kwargs)
        # For longrope vLLM's default is the shorter, original length; the checkpoint reads up to the longer one.
        longest, _ = kwargs["model_arch_config"].derived_max_model_len_and_key
        if kwargs["disable_sliding_window"] and kwargs["sliding_window"]:
            longest = min(longest, kwargs["sliding_window"])
        if math.isfinite(longest):
            derived = max(derived, int(longest))
        if kwargs.get("spec_target_max_model_len") is not None:
            check.draft_length = derived
            return original(max_model_len=max_model_len, **kwargs)
        check.derived_length = derived
        if max_model_len is None or max_model_len <= derived:
            return original(max_model_len=max_model_len, **kwargs)
        return max_model_len

    return get_and_verify_max_len


def limit_to_draft_later(original: Callable[[VllmConfig], None]) -> Callable[[VllmConfig], None]:
    """Wrap `VllmConfig._limit_max_model_len_to_draft` (vLLM 0.33): not before the draft has the plan's length.

    It lowers the served length to the draft's, since the V2 runner cannot stop drafting where a draft model ends.
    """

    @functools.wraps(original)
    def limit(self: VllmConfig) -> None:
        if _widened.get() is None:
            original(self)

    return limit


def configure_self_extend(original: Callable[..., VllmConfig]) -> Callable[..., VllmConfig]:
    """Wrap `EngineArgs.create_engine_config`: with CUSTOM chosen, plan the extension or refuse what cannot work."""

    @functools.wraps(original)
    def create_engine_config(self: EngineArgs, *args: Any, **kwargs: Any) -> VllmConfig:
        if not chooses_custom(self):
            given = self.additional_config
            key = CONFIG_KEY if isinstance(given, dict) and CONFIG_KEY in given else misspelled_key(given)
            if key is not None:
                logger.warning(
                    "additional_config[%r] is set, but without --attention-backend CUSTOM it has no effect.", key
                )
            return original(self, *args, **kwargs)
        _check_custom_is_ours()
        config = SelfExtendConfig.from_additional_config(self.additional_config)
        for name in stray_settings(self.additional_config):
            logger.warning(
                "additional_config has %r outside of %r, where Self-Extend does not read it: well, if it is another "
                "plugin's.",
                name,
                CONFIG_KEY,
            )
        leaves_length_open = self.max_model_len in (None, -1)
        with widened_length_check() as check:
            vllm_config = original(self, *args, **kwargs)
        plan = config.plan(check.derived_length, vllm_config.model_config.max_model_len)
        if vllm_config.speculative_config is not None and vllm_config.speculative_config.uses_draft_model():
            plan = dataclasses.replace(plan, draft_length=check.draft_length)
        plan = apply_plan(vllm_config, plan)
        if leaves_length_open and not plan.groups:
            logger.warning(
                "Self-Extend has nothing to extend: without --max-model-len the model is served at its own length, %d "
                "tokens. Pass the length to serve, for instance --max-model-len %d.",
                plan.max_model_len,
                4 * plan.max_model_len,
            )
        if vllm_config.kv_transfer_config is not None:
            check_connector(vllm_config)
        return vllm_config

    return create_engine_config


def let_custom_through(original: Any) -> Any:
    """Wrap `CpuPlatform.get_attn_backend_cls`, which answers CPU_ATTN whatever was chosen."""

    @functools.wraps(original.__func__)
    def get_attn_backend_cls(
        cls: Any, selected_backend: Any, attn_selector_config: Any, *args: Any, **kwargs: Any
    ) -> str:
        if selected_backend != AttentionBackendEnum.CUSTOM:
            return str(original.__get__(None, cls)(selected_backend, attn_selector_config, *args, **kwargs))
        reasons = selected_backend.get_class().validate_configuration(
            device_capability=None, **attn_selector_config._asdict()
        )
        if reasons:
            raise ValueError(f"Self-Extend (attention backend CUSTOM) cannot run this model: {'; '.join(reasons)}.")
        return str(selected_backend.get_path())

    return classmethod(get_attn_backend_cls)


def take_custom() -> None:
    """Register the backend, in every process, and note whose CUSTOM was."""
    global _replaced
    custom = AttentionBackendEnum.CUSTOM
    registered = custom.get_path() if custom.is_overridden() else None
    if registered != BACKEND:
        _replaced = registered
        register_backend(custom, BACKEND)


def _check_custom_is_ours() -> None:
    """CUSTOM is one name for all of vLLM's plugins, and the last to register it has it.

    Raises:
        ValueError: Another plugin registered it after this one.

    """
    registered = AttentionBackendEnum.CUSTOM.get_path()
    if registered != BACKEND:
        raise ValueError(
            f"The attention backend CUSTOM is {registered}, not Self-Extend: another vLLM plugin registered it later. "
            "Let vLLM load one of the two: VLLM_PLUGINS=selfextend for Self-Extend, or the other's name."
        )
    if _replaced is not None:
        logger.warning(
            "The attention backend CUSTOM is Self-Extend; another vLLM plugin had registered %s for it. To use that, "
            "name its plugin in VLLM_PLUGINS, and not selfextend.",
            _replaced,
        )


def apply_plan(vllm_config: VllmConfig, plan: ExtensionPlan) -> ExtensionPlan:
    """Write the plan where every process finds it, and have the workers bind it to the model.

    Returns:
        The plan as written, which names the kernel set.

    Raises:
        ValueError: The model, or the way it is to be run, cannot work with Self-Extend.

    """
    device = torch.device(vllm_config.device_config.device)
    reason = unsupported_reason(
        plan,
        vllm_config.model_config,
        device,
        parallel_config=vllm_config.parallel_config,
        speculative_config=vllm_config.speculative_config,
    )
    if reason is not None:
        raise ValueError(f"Self-Extend cannot serve {vllm_config.model_config.model}: {reason}")
    if plan.changes_model and vllm_config.speculative_config is not None:
        _extend_draft(vllm_config, plan, device)
    if not plan.groups:
        logger.info(
            "Self-Extend is off: %d tokens are served, and none of them has grouped positions.", plan.max_model_len
        )
        if plan.changes_model:
            logger.info(
                "The model's rotary tables are lengthened from %d to %d tokens.",
                plan.derived_length,
                plan.max_model_len,
            )
    else:
        logger.info(
            "Self-Extend: trained length %d, neighbor window %d, group size %s. Prompts within the trained length are "
            "answered %s.",
            plan.trained_length,
            plan.neighbor_window,
            f"by position, {plan.group_size_at(plan.max_model_len):g} at {plan.max_model_len} tokens"
            if plan.capacity is None
            else f"{plan.group_size}, which reaches {plan.capacity} tokens; {plan.max_model_len} are served",
            "as by the unmodified model" if plan.exact_short else "with grouped positions too",
        )
    worker_cls = vllm_config.parallel_config.worker_cls
    vllm_config.parallel_config.worker_cls = SELF_EXTEND_WORKERS.get(worker_cls, worker_cls)
    _limit_to_draft(vllm_config, plan)
    chosen = choose_kernels(plan.kernel, device)
    for name, why in chosen.missing.items():
        logger.warning("The %s kernels cannot be loaded (%s), so the slower %s kernels serve.", name, why, chosen.name)
    gpu = "" if device.type == "cpu" else f", {current_platform.get_device_name()}"  # initializes no CUDA
    logger.info("Self-Extend's attention runs on the %s kernels (%s%s).", chosen.name, chosen.kernels.VARIANT, gpu)
    plan = dataclasses.replace(plan, kernel=chosen.name)
    write_plan(vllm_config, plan)
    return plan


def _extend_draft(vllm_config: VllmConfig, plan: ExtensionPlan, device: torch.device) -> None:
    """Extend a draft model or head like the model that it drafts for, if it can be and no other backend was chosen.

    vLLM might choose its backend anew, and its first runner does not ask it past the length of its own checkpoint.

    Raises:
        ValueError: A draft that cannot be extended would have CUSTOM all the same, or vLLM cannot run it.

    """
    speculative_config = vllm_config.speculative_config
    draft = speculative_config.draft_model_config
    if draft is None:  # suffix decoding
        return
    if speculative_config.method == "mtp" and draft.uses_mrope and not vllm_config.model_config.uses_mrope:
        # vLLM 0.32 takes M-RoPE out of a text-only Qwen3.5's config, which the head is built from, and not out of the
        # head's. The rotary kernel then writes past its tensors, with any attention backend.
        raise ValueError(
            f"vLLM would give the MTP head of {draft.model} positions on several axes (M-RoPE), and the model has one. "
            "Use the model's checkpoint with images, which vLLM serves with --language-model-only, or no MTP head."
        )
    reason = None
    if speculative_config.uses_draft_model() or speculative_config.use_eagle():
        backend = _draft_backend(vllm_config)
        if backend not in (None, AttentionBackendEnum.CUSTOM):
            reason = (
                f"the speculative config asks for the attention backend {backend.name}. Leave attention_backend out."
            )
        else:
            of_draft = plan.of_draft_model() if plan.draft_length else plan
            reason = unsupported_reason(of_draft, draft, device, must_extend=False)
        if reason is None:
            speculative_config.attention_backend = AttentionBackendEnum.CUSTOM
            if of_draft is not plan:
                logger.info("The draft model is extended from its own trained length, %d.", of_draft.trained_length)
        elif backend is AttentionBackendEnum.CUSTOM:
            raise ValueError(
                f"Self-Extend cannot serve the draft model {draft.model}: {reason} Or choose another attention_backend "
                "in the speculative config, or another draft."
            )
        else:
            logger.warning("The draft model %s is not extended: %s", draft.model, reason)
    # Others, as vLLM 0.32's Medusa heads, have no attention and so no length.
    if reason is None and speculative_config.max_model_len is None:
        draft.max_model_len = plan.max_model_len
    if draft.max_model_len < plan.max_model_len and not vllm_config.use_v2_model_runner:
        logger.warning(
            "Drafts end at %d tokens, %s. For a batch that holds a longer text vLLM drafts nothing and verifies zeros "
            "instead, for all its requests: answers are right, but slower than without speculation.",
            draft.max_model_len,
            "the draft's own length" if reason else "the speculative config's max_model_len",
        )


def _draft_backend(vllm_config: VllmConfig) -> AttentionBackendEnum | None:
    """What vLLM gives a draft's layers with full attention; None if it is to choose by itself.

    `apply_draft_overrides` in `vllm/config/speculative.py` for the V2 runner, for the first one
    `_create_draft_vllm_config` in `vllm/v1/spec_decode/llm_base_proposer.py` and, for Gemma 4, in `gemma4.py` there. A
    backend for a kind of layers goes before any other (`vllm/v1/attention/selector.py`).
    """
    speculative_config, attention_config = vllm_config.speculative_config, vllm_config.attention_config
    backend = speculative_config.attention_backend
    if speculative_config.use_gemma4_mtp() or (backend is None and vllm_config.use_v2_model_runner):
        backend = attention_config.backend
    chosen: AttentionBackendEnum | None = attention_config.backend_per_kind.get("full_attention", backend)
    return chosen


def _limit_to_draft(vllm_config: VllmConfig, plan: ExtensionPlan) -> None:
    """Make up for `limit_to_draft_later`.

    Raises:
        ValueError: A draft that is not extended would turn Self-Extend off.

    """
    limit = getattr(vllm_config, "_limit_max_model_len_to_draft", None)
    if limit is None:
        return
    wanted = vllm_config.model_config.max_model_len
    limit()
    if plan.groups and (reached := vllm_config.model_config.max_model_len) < wanted:
        draft = vllm_config.speculative_config.draft_model_config.model
        raise ValueError(
            f"The drafts of {draft} end at {reached} tokens, and vLLM's V2 model runner cannot serve {wanted} with "
            "them. Use a draft that can be extended and no max_model_len for it, none, or VLLM_USE_V2_MODEL_RUNNER=0."
        )
