"""Self-Extend for vLLM: a plugin, its command line, and the few names below for programs.

Which names, settings and commands are stable: docs/compatibility.md.

Importing this loads neither torch nor vLLM; a name is loaded when it is first used.
"""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .method.config import SelfExtendConfig
    from .method.plan import ExtensionPlan
    from .vllm.report import PlanReport, plan_report

    __version__: str

_MODULES = {
    "ExtensionPlan": ".method.plan",
    "PlanReport": ".vllm.report",
    "SelfExtendConfig": ".method.config",
    "plan_report": ".vllm.report",
}
"""Where each name is defined."""

__all__ = ["ExtensionPlan", "PlanReport", "SelfExtendConfig", "__version__", "plan_report"]


if not TYPE_CHECKING:  # a type checker would take every name for one that exists

    def __getattr__(name: str) -> object:
        if name in _MODULES:
            return getattr(importlib.import_module(_MODULES[name], __name__), name)
        if name == "__version__":
            from importlib.metadata import version

            return version("vllm-selfextend")
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
