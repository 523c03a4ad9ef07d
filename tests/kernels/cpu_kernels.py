"""The CPU kernels once for each instruction set, and with the reference everything that a CPU can run."""

from typing import Any

import torch

from vllm_selfextend.backends import cpu, reference
from vllm_selfextend.backends.interface import Kernels


class CPUKernels:
    """The CPU kernels with the vector code of one instruction set."""

    IS_CAPTURABLE = cpu.IS_CAPTURABLE
    CACHE_LAYOUT = cpu.CACHE_LAYOUT

    def __init__(self, instruction_set: str) -> None:
        self.instruction_set = self.VARIANT = instruction_set

    def _call(self, call: Any, *arguments: Any) -> None:
        chosen, cpu.instruction_set = cpu.instruction_set, self.instruction_set
        try:
            call(*arguments)
        finally:
            cpu.instruction_set = chosen

    def unsupported_device(self, device: torch.device, capability: tuple[int, int] | None) -> str | None:
        return cpu.unsupported_device(device, capability)

    def unsupported_head_size(self, head_size: int) -> str | None:
        return cpu.unsupported_head_size(head_size)

    def workspace_size(self, *layer: Any) -> int:
        return cpu.workspace_size(*layer)

    def store_kv(self, *arguments: Any) -> None:
        self._call(cpu.store_kv, *arguments)

    def attention(self, *arguments: Any) -> None:
        self._call(cpu.attention, *arguments)


KERNELS: dict[str, Kernels] = {"reference": reference, **{name: CPUKernels(name) for name in cpu.INSTRUCTION_SETS}}
"""Everything that this machine can run."""
