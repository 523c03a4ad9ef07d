"""Prints the tables of docs/limits.md from the code that refuses: `python docs/feature_matrix.py`."""

import math
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any, get_args

import torch
from vllm.config import ModelConfig
from vllm.config.cache import CacheDType
from vllm.config.speculative import SpeculativeMethod
from vllm.v1.attention.backend import AttentionType, MultipleOf

from vllm_selfextend.backends import KERNEL_SETS, load_kernels
from vllm_selfextend.backends.interface import Kernels
from vllm_selfextend.demo import MODEL_DIR
from vllm_selfextend.method.plan import ExtensionPlan
from vllm_selfextend.vllm.attention import SelfExtendBackend
from vllm_selfextend.vllm.support import SELF_EXTEND_WORKERS, unsupported_reason

CAPABILITIES = ((7, 0), (7, 5), (8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0))
"""Of NVIDIA GPUs, Volta to Blackwell."""

SIZES = range(1, 1025)
PLAIN = {
    "head_size": 128,
    "dtype": torch.bfloat16,
    "kv_cache_dtype": "auto",
    "block_size": 16,
    "use_mla": False,
    "has_sink": False,
    "use_sparse": False,
    "use_mm_prefix": False,
    "use_per_head_quant_scales": False,
    "device_capability": None,
    "attn_type": AttentionType.DECODER,
}
"""What vLLM asks an attention backend of a layer that has nothing special."""

FEATURES: dict[str, dict[str, Any]] = {
    "attention sinks": {"has_sink": True},
    "layers with a sliding window": {"has_sliding_window": True},
    "KV connectors": {"use_kv_connector": True},
    "latent attention (MLA)": {"use_mla": True},
    "sparse attention": {"use_sparse": True},
    "attention in both directions": {"use_non_causal": True},
    "images that see themselves in both directions": {"use_mm_prefix": True},
    "scales of an 8-bit cache per head": {"use_per_head_quant_scales": True},
    "prefill context parallelism": {"use_pcp": True},
    "sliding windows by request (R-SWA)": {"use_rswa": True},
    "batch invariance (`VLLM_BATCH_INVARIANT`)": {"use_batch_invariant": True},
}
"""By what people call them: what vLLM asks then."""


def refused(**asked: Any) -> bool:
    """Whether the backend refuses a layer."""
    return bool(SelfExtendBackend.validate_configuration(**(PLAIN | asked)))


def tables() -> str:
    """Both: what differs between kernel sets, and what does not."""
    sets = {name: load_kernels(name) for name in KERNEL_SETS}
    rows: dict[str, Callable[[str, Kernels], str]] = {
        '`"auto"` takes them on': lambda name, _: _device_name(KERNEL_SETS[name].device_type),
        "NVIDIA's compute capability": lambda _, kernels: _capability(kernels),
        "head sizes": lambda _, kernels: _sizes(size for size in SIZES if not kernels.unsupported_head_size(size)),
        "decodes in CUDA graphs": lambda _, kernels: "yes" if kernels.IS_CAPTURABLE else "no",
    }
    lines = [f"| | {' | '.join(f'`{name}`' for name in sets)} |", "|---|" + "---|" * len(sets)]
    for title, cell in rows.items():
        lines.append(f"| {title} | {' | '.join(cell(*one) for one in sets.items())} |")
    lines += ["", "| | with any kernels |", "|---|---|"]
    return "\n".join([*lines, *(f"| {title} | {value} |" for title, value in _shared())])


def _shared() -> Iterator[tuple[str, str]]:
    dtypes = [dtype for dtype in (torch.float32, torch.bfloat16, torch.float16) if not refused(dtype=dtype)]
    yield "dtypes", ", ".join(f"`{str(dtype).removeprefix('torch.')}`" for dtype in dtypes)
    caches = [name for name in get_args(CacheDType) if not refused(kv_cache_dtype=name)]
    yield "`--kv-cache-dtype`", ", ".join(f"`{name}`" for name in caches)
    (blocks,) = SelfExtendBackend.get_supported_kernel_block_sizes()
    yield "`--block-size`", f"multiples of {blocks.base}" if isinstance(blocks, MultipleOf) else str(blocks)
    yield "attention types", ", ".join(f"`{one.value}`" for one in AttentionType if not refused(attn_type=one))
    for title, asked in FEATURES.items():
        yield title, "no" if refused(**asked) else "yes"
    yield "decode context parallelism", "no" if _unsupported(decode_context_parallel_size=2) else "yes"
    without = [one for one in sorted({*_literals(SpeculativeMethod)}) if _unsupported(method=one)]
    yield "methods of speculation that are refused", ", ".join(f"`{one}`" for one in without)


def _unsupported(decode_context_parallel_size: int = 1, method: str | None = None) -> bool:
    """Whether the demo's model is refused when it is run that way."""
    plan = ExtensionPlan(4096, 256, 256, "auto", 64, True, 256, "auto")
    parallel = SimpleNamespace(
        decode_context_parallel_size=decode_context_parallel_size,
        prefill_context_parallel_size=1,
        worker_cls=next(iter(SELF_EXTEND_WORKERS)),
    )
    speculative = SimpleNamespace(method=method)
    reason = unsupported_reason(
        plan, ModelConfig(str(MODEL_DIR)), None, parallel_config=parallel, speculative_config=speculative
    )
    return reason is not None


def _literals(kind: Any) -> Iterator[str]:
    """The strings of nested `Literal`s."""
    for one in get_args(kind):
        if isinstance(one, str):
            yield one
        else:
            yield from _literals(one)


def _device_name(device_type: str | None) -> str:
    return {"cpu": "CPUs", "cuda": "NVIDIA's and AMD's GPUs", None: "any other device"}[device_type]


def _capability(kernels: Kernels) -> str:
    device = torch.device("cuda")
    allowed = [one for one in CAPABILITIES if kernels.unsupported_device(device, one) is None]
    if not allowed:
        return "-"
    return "any" if allowed[0] == CAPABILITIES[0] else f"{'.'.join(map(str, allowed[0]))} or more"


def _sizes(sizes: Iterator[int]) -> str:
    """Sizes that are taken, in words."""
    taken = [*sizes]
    step = math.gcd(*taken)
    if taken != [*range(step, taken[-1] + 1, step)]:
        raise ValueError(f"head sizes {taken} are no multiples of one number: say them another way.")
    each = "any" if step == 1 else f"multiples of {step}"
    return each if taken[-1] + step > SIZES[-1] else f"{each} up to {taken[-1]}"


if __name__ == "__main__":
    print(tables())
