"""The CPU kernels once for each instruction set, and with the reference everything that a CPU can run."""

from vllm_selfextend.backends import cpu, reference
from vllm_selfextend.backends.interface import Kernels

KERNELS: dict[str, Kernels] = {
    "reference": reference.KERNELS,
    **{name: cpu.CPUKernels(name) for name in cpu.INSTRUCTION_SETS},
}
"""Everything that this machine can run."""
