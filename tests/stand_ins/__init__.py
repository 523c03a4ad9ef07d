"""Packages for what vLLM imports and is not there."""

import os
import sys
from pathlib import Path

from . import torchvision


def use_stand_ins() -> None:
    """Let this process, and those it starts, import them."""
    sys.modules["torchvision"] = torchvision
    folder = str(Path(__file__).parent)
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [os.environ.get("PYTHONPATH"), folder]))
