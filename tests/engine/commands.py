"""Commands as the pages show them, run as a user would: from the repository's root, each a process of its own."""

import os
import shlex
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def run(command: str, *more: object) -> str:
    """Run a command to its end, with arguments added, and return what it printed."""
    done = try_to_run(command, *more)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def try_to_run(command: str, *more: object) -> subprocess.CompletedProcess[str]:
    """The same for a command that may fail."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    environment = {**os.environ, "PATH": path, "VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
    arguments = [*shlex.split(command), *map(str, more)]
    return subprocess.run(arguments, cwd=ROOT, env=environment, capture_output=True, text=True)
