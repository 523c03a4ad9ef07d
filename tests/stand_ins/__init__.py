"""Packages for what vLLM imports and is not there."""

import os
import sys
from pathlib import Path


def use_stand_ins() -> None:
    """Let this process, and those it starts, import them."""
    folder = str(Path(__file__).parent)
    sys.path.append(folder)
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [os.environ.get("PYTHONPATH"), folder]))
