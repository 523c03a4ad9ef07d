"""Self-Extend's kernels. They know tensors only and can be used, tested and timed without vLLM."""

import torch

from . import reference
from .interface import AttentionBatch, AttentionParams, Kernels, Rotation

KERNELS: dict[str, Kernels] = {"reference": reference}
"""The kernel sets by the name a user gives."""


def load_kernels(name: str, device: torch.device) -> Kernels:
    """The kernel set called `name`, or for `"auto"` the fastest one for `device`.

    Raises:
        ValueError: There is no kernel set of that name.

    """
    if name == "auto":
        return reference
    if name not in KERNELS:
        raise ValueError(f"kernel is {name!r}; it must be one of {', '.join(['auto', *KERNELS])}.")
    return KERNELS[name]


__all__ = ["KERNELS", "AttentionBatch", "AttentionParams", "Kernels", "Rotation", "load_kernels"]
