"""The `vllm-selfextend` command, or `python -m vllm_selfextend`: `cli`, or a sentence where that cannot be imported."""

import importlib.util
import io
import sys


def main() -> None:
    """The console script."""
    missing = [name for name in ("typer", "rich") if importlib.util.find_spec(name) is None]
    if missing:
        sys.exit(f"error: this command needs {' and '.join(missing)}: pip install 'vllm-selfextend[cli]'.")
    from .cli import app

    # What a terminal has no letters for is spelled out, as Python does on stderr, and ends no run with an error.
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    app()


if __name__ == "__main__":
    main()
