"""Self-Extend's kernels in Triton, for GPUs; under `TRITON_INTERPRET=1` they run on CPU tensors, slowly.

Block interior: `[block_size, 2 * head_size]`, a token's key and then its value. float32, bfloat16, float16 and fp8
(e4m3) caches; products in the queries' dtype, sums in float32. Decodes are launched by shapes alone
(`decode_launches.py`), so that a captured graph can be replayed with others; prefills are taken apart on the host.
Importing this raises `ImportError` where Triton is not installed.
"""

import torch

try:
    import triton
except ImportError as error:
    raise ImportError(f"{error}. pip install triton") from error

from ..interface import NO_HOST, AttentionParams, Host, Kernels
from ..paged_cache import KEY_THEN_VALUE
from .buffers import Room
from .decode_launches import decode_len
from .layer import TritonLayer, workspace_size
from .tiles import find_device

IS_INTERPRETED: bool = triton.knobs.runtime.interpret
"""Whether `TRITON_INTERPRET` was set when the kernels were defined."""

LOWEST_CAPABILITY = (8, 0)
"""Of an NVIDIA GPU (Ampere): the kernels multiply bfloat16 and copy to shared memory on the side."""

MAX_HEAD_SIZE = 256


class TritonKernels(Kernels):
    """See `interface.Kernels`."""

    IS_CAPTURABLE = True
    CACHE_LAYOUT = KEY_THEN_VALUE
    VARIANT = f"Triton {triton.__version__}"

    def unsupported_device(self, device: torch.device, capability: tuple[int, int] | None) -> str | None:
        """See `interface.Kernels.unsupported_device`."""
        if device.type == "cpu" and not IS_INTERPRETED:
            return "on a CPU they run under TRITON_INTERPRET=1 only"
        if capability is not None and capability < LOWEST_CAPABILITY:
            needed, found = (".".join(map(str, version)) for version in (LOWEST_CAPABILITY, capability))
            return f"they need a compute capability of {needed} (Ampere) or more, and this GPU's is {found}"
        return None

    def unsupported_head_size(self, head_size: int) -> str | None:
        """See `interface.Kernels.unsupported_head_size`."""
        return None if head_size <= MAX_HEAD_SIZE else f"they take sizes up to {MAX_HEAD_SIZE}"

    def decode_len(self, heads: int) -> int:
        """See `interface.Kernels.decode_len`."""
        return decode_len(heads)

    def workspace_size(
        self, num_heads: int, num_kv_heads: int, head_size: int, dtype: torch.dtype, device: torch.device, host: Host
    ) -> int:
        """See `interface.Kernels.workspace_size`."""
        return workspace_size(num_heads, num_kv_heads, head_size, dtype, find_device(device), Room.of(host))

    def prepare(self, params: AttentionParams, host: Host = NO_HOST) -> TritonLayer:
        """See `interface.Kernels.prepare`."""
        return TritonLayer(params, host)


KERNELS = TritonKernels()
