"""What a run ran on."""

import os
import platform
from importlib.metadata import version

PACKAGES = ("vllm-selfextend", "vllm", "torch", "transformers")


def describe_machine() -> dict[str, str | int | None]:
    """The processor that computes, how many CPU cores there are, and the versions that matter."""
    import torch
    from vllm.platforms import current_platform

    # Found without initializing CUDA: vLLM may fork its workers.
    name = None if current_platform.is_cpu() else current_platform.get_device_name()
    versions = {name: _version(name) for name in PACKAGES}
    processor = name or torch.cpu.get_capabilities().get("cpu_name", platform.machine())
    return {"processor": processor, "cpu_cores": os.cpu_count(), "python": platform.python_version(), **versions}


def _version(package: str) -> str:
    if package == "vllm":
        import vllm

        return str(vllm.__version__)  # on a CPU the package has another name
    return version(package)
