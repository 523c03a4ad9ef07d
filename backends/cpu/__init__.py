"""Self-Extend's CPU kernels in C++: float32, bfloat16, float16 and fp8 (e4m3) caches, computed in float32.

The vector code is chosen at run time (AVX-512, AVX2, or a portable one that is NEON on Arm). With AVX-512's BF16 the
products of bfloat16 queries and caches are bfloat16's, added up in float32. `kernel.h` describes the interior of a
cache block, the same for all of them. Importing this raises `ImportError` where the library was not built, or was built
for another torch.
"""

import importlib
import operator
import pkgutil
from collections.abc import Callable
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

import torch

from ..interface import NO_HOST, AttentionBatch, AttentionParams, Host, Kernels, LayerKernels


def _register_operators() -> None:
    """Load the library that was built for the installed torch; its name ends in that version.

    One that was built for another torch must not be loaded: where that does not fail, it reads memory wrongly.
    """
    prefix = "_kernels_torch"
    names = [module.name for module in pkgutil.iter_modules(__path__) if module.name.startswith(prefix)]
    built = [name.removeprefix(prefix).replace("_", ".") for name in names]
    installed = ".".join(torch.__version__.split(".")[:2])
    if installed not in built and (there := _installed_elsewhere()):
        here = Path(__path__[0]).parents[1]
        raise ImportError(
            f"vllm_selfextend was imported from {here}, where they are not built for torch {installed}, and not from "
            f"{there}, where it is installed: start Python in another folder, or take {here.parent} out of PYTHONPATH"
        )
    if built and installed not in built:
        raise ImportError(
            f"they were built for torch {', '.join(built)}, torch {installed} is installed; reinstall vllm-selfextend "
            "with pip install --no-build-isolation"
        )
    try:
        importlib.import_module(f".{prefix}{installed.replace('.', '_')}", __package__)
    except ImportError as error:
        raise ImportError(
            f"{error}. They are built when vllm-selfextend is installed with a C++ compiler and "
            "pip install --no-build-isolation, against the torch that is there"
        ) from error


def _installed_elsewhere() -> Path | None:
    """Where the package is installed, if it was imported from elsewhere: Python started in a clone takes that."""
    for one in distributions(name="vllm-selfextend"):
        package = Path(str(one.locate_file("vllm_selfextend")))
        folder = package / "backends" / "cpu"
        if folder.is_dir() and not folder.samefile(__path__[0]):
            return package
    return None


_register_operators()
_store_kv = torch.ops.vllm_selfextend_cpu.store_kv.default
_attention = torch.ops.vllm_selfextend_cpu.attention.default


def _layer_arguments(overload: Any) -> Callable[[AttentionParams], tuple[Any, ...]]:
    """What finds an operator's arguments that describe the layer, the ones after `instruction_set`.

    They are found by their names in its schema, so none can take another's place. (Keyword-only arguments would say so
    too, but torch spends 0.3 microseconds on each in every call.)
    """
    names = [argument.name for argument in overload._schema.arguments]
    return operator.attrgetter(*names[names.index("instruction_set") + 1 :])


_store_kv_layer, _attention_layer = _layer_arguments(_store_kv), _layer_arguments(_attention)

INSTRUCTION_SETS: list[str] = torch.ops.vllm_selfextend_cpu.instruction_sets()
"""What this machine can run, best first."""

_HEAD_SIZE_STEP, _MAX_HEAD_SIZE = torch.ops.vllm_selfextend_cpu.head_sizes()


class CPUKernels(Kernels):
    """The kernels with the vector code of one instruction set. See `interface.Kernels`."""

    CACHE_LAYOUT = "cpu-2"

    def __init__(self, instruction_set: str) -> None:
        self.VARIANT = instruction_set

    def unsupported_device(self, device: torch.device, capability: tuple[int, int] | None) -> str | None:
        """See `interface.Kernels.unsupported_device`."""
        return None if device.type == "cpu" else "they run on CPUs"

    def unsupported_head_size(self, head_size: int) -> str | None:
        """See `interface.Kernels.unsupported_head_size`."""
        if head_size % _HEAD_SIZE_STEP == 0 and head_size <= _MAX_HEAD_SIZE:
            return None
        return f"they take multiples of {_HEAD_SIZE_STEP} up to {_MAX_HEAD_SIZE}"

    def prepare(self, params: AttentionParams, host: Host = NO_HOST) -> "CPULayer":
        """See `interface.Kernels.prepare`."""
        return CPULayer(params, self.VARIANT)


KERNELS = CPUKernels(INSTRUCTION_SETS[0])


class CPULayer(LayerKernels):
    """See `interface.LayerKernels`."""

    def __init__(self, params: AttentionParams, instruction_set: str) -> None:
        sizes, rotation = params.group_sizes, params.rotation
        self._store = instruction_set, *_store_kv_layer(params)
        self._attend = (
            sizes and sizes.eighths,
            rotation and rotation.cos_sin,
            bool(rotation and rotation.interleaved),
            instruction_set,
            *_attention_layer(params),
        )

    def store(self, key: torch.Tensor, value: torch.Tensor, kv_cache: torch.Tensor, batch: AttentionBatch) -> None:
        """See `interface.LayerKernels.store`."""
        _store_kv(key, value, kv_cache, batch.slot_mapping, *self._store)

    def attend(
        self,
        query: torch.Tensor,
        kv_cache: torch.Tensor,
        batch: AttentionBatch,
        out: torch.Tensor,
        workspace: torch.Tensor | None = None,
    ) -> None:
        """See `interface.LayerKernels.attend`."""
        lengths = batch.query_start_loc, batch.seq_lens, batch.block_table
        _attention(query, kv_cache, *lengths, out, *self._attend)
