"""Self-Extend's kernels. They know tensors only and can be used, tested and timed without vLLM.

This is the registry of kernel sets: importing it loads none of them, nor torch. `interface.py` says what a set offers.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import torch

    from .interface import Kernels


def _cpu() -> "Kernels":
    from .cpu import KERNELS

    return KERNELS


def _triton() -> "Kernels":
    from .triton import KERNELS

    return KERNELS


def _reference() -> "Kernels":
    from .reference import KERNELS

    return KERNELS


class KernelSet(NamedTuple):
    """What loads a kernel set, and the type of device that `"auto"` means it on, if any."""

    load: Callable[[], "Kernels"]
    device_type: str | None


KERNEL_SETS: dict[str, KernelSet] = {
    "cpu": KernelSet(_cpu, "cpu"),
    "triton": KernelSet(_triton, "cuda"),  # PyTorch calls AMD's GPUs cuda too
    "reference": KernelSet(_reference, None),
}
"""By name; of sets for the same device the faster one comes first."""

KERNEL_CHOICES = ("auto", *KERNEL_SETS)
"""What a user can ask for."""


class Choice(NamedTuple):
    """The kernel set that a name means on a device; `missing` says why each faster one cannot be loaded."""

    name: str
    kernels: "Kernels"
    missing: dict[str, str]


def load_kernels(name: str) -> "Kernels":
    """The kernel set of that name.

    Raises:
        ValueError: There is none.
        RuntimeError: It was not built when this package was installed, or cannot be loaded.

    """
    if name not in KERNEL_SETS:
        raise ValueError(f"kernel is {name!r}; it must be one of {', '.join(KERNEL_CHOICES)}.")
    try:
        return KERNEL_SETS[name].load()
    except ImportError as error:
        raise RuntimeError(
            f"kernel is {name!r}, but those kernels cannot be loaded: {error}; or set kernel to 'reference'."
        ) from error


def choose_kernels(name: str, device: "torch.device", capability: tuple[int, int] | None = None) -> Choice:
    """The kernel set that `name` means on `device`: the one of that name, or for `"auto"` the fastest that loads.

    Args:
        name: One of `KERNEL_CHOICES`.
        device: Where the tensors will be.
        capability: The compute capability of an NVIDIA GPU, if it is one and known. (Asking torch for it would
            initialize CUDA, which a process that is going to fork must not.)

    Raises:
        ValueError: There is no kernel set of that name, or it cannot run on `device`.
        RuntimeError: It cannot be loaded.

    """
    chosen, missing = _fastest(device.type) if name == "auto" else (name, {})
    kernels = load_kernels(chosen)
    if problem := kernels.unsupported_device(device, capability):
        instead = "Set kernel" if name == "auto" else "Leave kernel 'auto', or set it"
        raise ValueError(
            f"the {chosen} kernels cannot run on the device {device}: {problem}. {instead} to 'reference', which runs "
            "anywhere, slowly."
        )
    return Choice(chosen, kernels, missing)


def _fastest(device_type: str) -> tuple[str, dict[str, str]]:
    """The first kernel set for such a device that can be loaded, and why those before it cannot."""
    missing: dict[str, str] = {}
    for name, kernel_set in KERNEL_SETS.items():
        if kernel_set.device_type == device_type:
            try:
                kernel_set.load()
            except ImportError as error:
                missing[name] = str(error)
            else:
                return name, missing
    return "reference", missing
