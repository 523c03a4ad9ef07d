"""Self-Extend's kernels. They know tensors only and can be used, tested and timed without vLLM."""

import torch

from . import reference
from .interface import AttentionBatch, AttentionParams, Kernels, Rotation

KERNEL_NAMES = ("cpu", "triton", "reference")
"""What a user can ask for, besides `"auto"`."""

KERNELS: dict[str, Kernels] = {"reference": reference}
"""The kernel sets that this installation has, by name."""

MISSING: dict[str, str] = {}
"""Those it lacks, and why."""

try:
    from . import cpu

    KERNELS["cpu"] = cpu
except ImportError as error:
    MISSING["cpu"] = str(error)
try:
    from . import triton

    KERNELS["triton"] = triton
except ImportError as error:
    MISSING["triton"] = str(error)

FASTEST = {"cpu": "cpu", "cuda": "triton"}
"""By device type; PyTorch calls AMD's GPUs cuda too."""

HOW_TO_GET = {  # a sentence without its stop
    "cpu": "They are built when vllm-selfextend is installed with a C++ compiler and pip install "
    "--no-build-isolation, against the torch that is there",
    "triton": "pip install triton",
}


def choose_kernels(name: str, device: torch.device) -> str:
    """The name of the kernel set that `name` means on `device`: itself, or for `"auto"` the fastest there is.

    Raises:
        ValueError: There is no kernel set of that name, or it does not run on `device`.
        RuntimeError: It was not built when this package was installed, or cannot be loaded.

    """
    if name == "auto":
        best = FASTEST.get(device.type, "reference")
        return best if best in KERNELS else "reference"
    if name not in KERNEL_NAMES:
        raise ValueError(f"kernel is {name!r}; it must be one of {', '.join(['auto', *KERNEL_NAMES])}.")
    if name == "cpu" and device.type != "cpu":
        raise ValueError(f"kernel is 'cpu', which cannot run on the device {device}; leave it 'auto'.")
    if name in MISSING:
        raise RuntimeError(
            f"kernel is {name!r}, but those kernels cannot be loaded: {MISSING[name]}. {HOW_TO_GET[name]}; or set "
            "kernel to 'reference'."
        )
    if name == "triton" and device.type == "cpu" and not triton.IS_INTERPRETED:
        raise ValueError("kernel is 'triton', which runs on a CPU under TRITON_INTERPRET=1 only; leave it 'auto'.")
    return name


def load_kernels(name: str, device: torch.device) -> Kernels:
    """The kernel set that `name` means on `device`; raises like `choose_kernels`."""
    return KERNELS[choose_kernels(name, device)]


__all__ = [
    "FASTEST",
    "HOW_TO_GET",
    "KERNELS",
    "KERNEL_NAMES",
    "MISSING",
    "AttentionBatch",
    "AttentionParams",
    "Kernels",
    "Rotation",
    "choose_kernels",
    "load_kernels",
]
