"""Stands in for torchvision, of which PyPI has no build for CPUs, where vLLM and transformers import it for images.

Whatever is asked of it is there and does nothing. It serves models that take images but are given texts alone, whose
code has to be imported.
"""

import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any
from unittest.mock import MagicMock


def anything(name: str) -> Any:
    if name.startswith("__"):
        raise AttributeError(name)
    return MagicMock(name=name)


class Submodules(MetaPathFinder, Loader):
    """Finds every submodule."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        return ModuleSpec(name, self, is_package=True) if name.startswith("torchvision.") else None

    def exec_module(self, module: ModuleType) -> None:
        module.__getattr__ = anything  # type: ignore[method-assign]


__version__ = "0.28.0"
__getattr__ = anything
sys.meta_path.append(Submodules())
