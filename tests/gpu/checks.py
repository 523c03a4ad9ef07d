"""Kernels for GPUs against the reference in float64, on the device they will serve on.

`test_kernels.py` and `benchmarks/gpu.py` make these checks. Every kind of batch meets every head size, variant, dtype,
cache and block size, though not each with each. Each answer is also asked for twice, and a decode's once more of a CUDA
graph captured with another step's lengths and blocks, as vLLM does: all must be the same to the last bit. Prefills run
on our own kernel, and once more on FlashAttention where there is one.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch

from tests.support.cases import TOLERANCE, VLLM_BATCHES, VLLM_HEADS, VLLM_VARIANTS, Case, Problem, Step, run
from vllm_selfextend.backends import load_kernels, reference
from vllm_selfextend.backends.interface import NO_HOST, AttentionBatch, Host, Kernels

from .flash import find_attention
from .graphs import capture

BATCHES = {**VLLM_BATCHES, "speculation": ((4, 213), (8, 30), (2, 2), (8, 1028), (3, 7), (5, 7812))}
"""`(query_len, seq_len)` of each request; some queries of one are on both sides of a trained length."""

SMALL_BATCHES = {
    "decode": ((1, 1), (1, 33), (1, 50)),
    "prefill": ((49, 49), (52, 60)),
    "mixed": ((1, 33), (49, 60), (1, 2)),
    "speculation": ((4, 50), (8, 30), (2, 2)),
}
"""For Triton's interpreter."""

VARIANTS: dict[str, dict[str, Any]] = {
    **VLLM_VARIANTS,
    "interleaved, partial rotary": {"group_size": 4, "neighbor_window": 512, "interleaved": True},
    "log scale, a size for few tokens": {
        "group_size": "auto",
        "neighbor_window": 5,
        "exact_len": 24,
        "log_scale_len": 1024,
    },
}
SMALL_VARIANTS: dict[str, dict[str, Any]] = {
    "G 8, W 32, exact": {"group_size": 8, "neighbor_window": 32, "exact_len": 40},
    "G 5, W 18, soft cap, sinks": {"group_size": 5, "neighbor_window": 18, "soft_cap": 2.0, "has_sinks": True},
    "automatic, L 40": {"group_size": "auto", "exact_len": 40, "neighbor_window": 16},
    "ordinary, sliding window": {"group_size": 1, "sliding_window": 20},
    "interleaved, partial rotary": {"group_size": 4, "neighbor_window": 16, "interleaved": True},
    "log scale, a size for few tokens": {
        "group_size": "auto",
        "neighbor_window": 5,
        "exact_len": 24,
        "log_scale_len": 20,
    },
}

HEAD_SIZES = (64, 80, 96, 128, 256)
BLOCK_SIZES = (16, 128)
NUM_LAYERS, NUM_SMALL_LAYERS = 12, 6
"""Every value of every axis is among the first six layers, more pairs in the others."""


class Numbers(NamedTuple):
    """What queries and cache are in, and how far an answer may be off: at most, and in norm over the answer's norm."""

    name: str
    dtype: torch.dtype
    cache_dtype: torch.dtype
    kv_scales: tuple[float, float]
    most: float
    norm: float


NUMBERS = (
    Numbers("bfloat16", torch.bfloat16, torch.bfloat16, (1.0, 1.0), TOLERANCE[torch.bfloat16], 2e-2),
    Numbers("float16", torch.float16, torch.float16, (1.0, 1.0), TOLERANCE[torch.float16], 2e-3),
    Numbers("float32", torch.float32, torch.float32, (1.0, 1.0), TOLERANCE[torch.float32], 1e-4),
    # The reference has an fp8 cache too.
    Numbers("fp8 cache", torch.bfloat16, torch.uint8, (0.5, 0.25), TOLERANCE[torch.bfloat16], 2e-2),
)


class Check(NamedTuple):
    """What is checked: a step of a layer, the numbers it is computed in, and the names of both for people."""

    batch: str
    variant: str
    numbers: Numbers
    case: Case

    def __str__(self) -> str:
        case = self.case
        shape = f"{case.num_heads}/{case.num_kv_heads} heads x {case.head_size}, blocks of {case.block_size}"
        return f"{self.batch}, {self.numbers.name}, {shape}, {self.variant}"


class Result(NamedTuple):
    """What came of a check; `problem` says what is wrong, if anything is."""

    check: Check
    most: float
    norm: float
    problem: str

    def row(self, device: str) -> dict[str, Any]:
        """Its line in a JSON file."""
        batch, variant, numbers, case = self.check
        return {
            "device": device,
            "dtype": numbers.name,
            "phase": "correctness",
            "batch_kind": batch,
            "num_heads": case.num_heads,
            "num_kv_heads": case.num_kv_heads,
            "head_size": case.head_size,
            "block_size": case.block_size,
            "variant": variant,
            "largest_error": self.most,
            "error_norm": self.norm,
            "problem": self.problem,
        }


def checks(*, small: bool, num_layers: int) -> list[Check]:
    """The first `num_layers` layers, each with every kind of batch; `small` ones are for Triton's interpreter."""
    lengths = (SMALL_BATCHES, SMALL_VARIANTS) if small else (BATCHES, VARIANTS)
    return list(_checks(*lengths, num_layers))


def _checks(
    batches: dict[str, tuple[tuple[int, int], ...]],
    variants: dict[str, dict[str, Any]],
    num_layers: int,
) -> Iterator[Check]:
    for index in range(num_layers):
        variant = list(variants)[(index + index // 6) % 6]
        num_heads, num_kv_heads = VLLM_HEADS[index % 3]
        head_size, numbers = HEAD_SIZES[index % 5], NUMBERS[index % 4]
        for seed, (batch, requests) in enumerate(batches.items()):
            case = Case(
                requests,
                num_heads=num_heads,
                num_kv_heads=num_kv_heads,
                head_size=head_size,
                rotary_dim=head_size // 2 if "partial" in variant else head_size,
                block_size=BLOCK_SIZES[(index + index // 6) % 2],
                kv_scales=numbers.kv_scales,
                seed=seed,
                base=10000.0,
                **variants[variant],
            )
            yield Check(batch, variant, numbers, case)


def compile_kernels(check: Check, device: torch.device) -> None:
    """Have Triton compile what the check needs, which leaves it in Triton's cache for other processes too."""
    case, numbers = check.case, check.numbers
    query = torch.zeros(2, case.num_heads, case.head_size, dtype=numbers.dtype, device=device)
    key = torch.zeros(2, case.num_kv_heads, case.head_size, dtype=numbers.dtype, device=device)
    shape = 2, case.num_kv_heads, case.block_size, 2 * case.head_size
    kv_cache = torch.zeros(shape, device=device).to(numbers.cache_dtype)
    layer = load_kernels("triton").prepare(case.params(torch.float32, device))
    layer.warm_up(query, key, key, kv_cache, torch.empty_like(query))


def make(check: Check, kernels: Kernels, device: torch.device) -> Result:
    """Hold the kernels' answers against the reference's, and against each other."""
    numbers, nothing = check.numbers, float("nan")
    problem = Problem.of(check.case, numbers.dtype, device)
    try:
        case = check.case
        shape = case.num_heads, case.num_kv_heads, case.head_size, numbers.dtype, device
        workspace = torch.empty(kernels.workspace_size(*shape, NO_HOST), dtype=torch.uint8, device=device)
        step = Step(kernels, problem, numbers.dtype, numbers.cache_dtype, workspace=workspace)
        step.store()
        captured = replay(step)
        first, second = step.attend(), step.attend()
    except Exception as error:  # a kernel that cannot be compiled or launched is a finding, and the other cases go on
        return Result(check, nothing, nothing, f"{type(error).__name__}: {error}")
    in_fp8 = numbers.cache_dtype if numbers.cache_dtype == torch.uint8 else None
    wanted = run(reference.KERNELS, problem, torch.float64, in_fp8)
    answers = [first]
    if (flash := find_attention(step.params, case.head_size, numbers.dtype)) is not None:
        host = Host(attention=flash)
        answers.append(run(kernels, problem, numbers.dtype, numbers.cache_dtype, host=host, workspace=workspace))
    differences = [answer.double() - wanted for answer in answers]
    # Not Python's max(), which may lose NaN.
    most = float(torch.stack([one.abs().max() for one in differences]).max())
    norm = float(torch.stack([one.norm() for one in differences]).max() / wanted.norm())
    found = []
    # Not `most > ...`, which lets NaN through.
    if not most <= numbers.most:
        found.append(f"off by {most:.1e}, allowed {numbers.most:.0e}")
    if not norm <= numbers.norm:
        found.append(f"off by {norm:.1e} of its norm, allowed {numbers.norm:.0e}")
    if not first.equal(second):
        found.append("a second call gives something else")
    if captured is not None and not first.equal(captured):
        found.append("a captured graph gives something else")
    return Result(check, most, norm, "; ".join(found))


def replay(step: Step) -> torch.Tensor | None:
    """The answer of a CUDA graph that was captured with nothing in the cache and is replayed with this step.

    None if it has prefills: no graph has those.
    """
    real = step.batch
    if real.max_query_len > real.decode_len:
        return None
    held = AttentionBatch(
        query_start_loc=real.query_start_loc.clone(),
        seq_lens=real.query_start_loc.diff(),
        block_table=torch.zeros_like(real.block_table),
        slot_mapping=torch.full_like(real.slot_mapping, -1),
        max_query_len=real.max_query_len,
        max_seq_len=real.max_seq_len,
        decode_len=real.decode_len,
    )
    query = torch.zeros_like(step.query)
    out = torch.empty_like(query)
    play = capture([lambda: step.layer.attend(query, step.kv_cache, held, out, step.workspace)])
    for name in ("query_start_loc", "seq_lens", "block_table"):
        getattr(held, name).copy_(getattr(real, name))
    query.copy_(step.query)
    play()
    return out
