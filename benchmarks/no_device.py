"""GPUs that need not be there: what Triton is told of them, so that it compiles for them as at a launch."""

from types import SimpleNamespace
from typing import Any

from triton.backends.compiler import GPUTarget

from vllm_selfextend.backends.triton.tiles import Device

TARGETS = {
    "sm_80": Device(GPUTarget("cuda", 80, 32), 108),
    "sm_89": Device(GPUTarget("cuda", 89, 32), 58),
    "sm_90": Device(GPUTarget("cuda", 90, 32), 132),
    "sm_100": Device(GPUTarget("cuda", 100, 32), 148),
    "sm_120": Device(GPUTarget("cuda", 120, 32), 170),
    "gfx942": Device(GPUTarget("hip", "gfx942", 64), 304),
}
"""A100, L4, H100, B200, RTX 5090, MI300X."""


class NoDevice:
    """Stands in for a GPU's driver; a launch does nothing."""

    def __init__(self, target: GPUTarget) -> None:
        self.target = target
        self.utils = SimpleNamespace(
            get_device_properties=lambda device: {"max_shared_mem": 1 << 20},
            load_binary=lambda name, kernel, shared, device: (self, self, 0, 0, 1024),
            unload_module=lambda module: None,
        )

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def launcher_cls(self, src: Any, metadata: Any) -> Any:
        """What launches a kernel."""
        return lambda *arguments: None
