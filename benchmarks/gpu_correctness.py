"""The Triton kernels against the reference in float64, on the device they will serve on; `gpu.py` runs it.

Lengths, heads and head sizes are those of vLLM's own kernel tests. Every kind of batch meets every head size, variant,
dtype, cache and block size, though not each with each. Queries and keys are random numbers as if already rotated at
their positions, the same ones for both, rounded to the kernel's dtype. Cache slots that hold no token hold NaN.

Each answer is also asked for twice, and once more of a CUDA graph captured with another step's lengths and blocks, as
vLLM does: all must be the same to the last bit.
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import gpu_machine
import rich.box
import torch
from rich.table import Table

from backends import AttentionBatch, AttentionParams, Kernels, Rotation, reference
from vllm_selfextend.rotary import cos_sin

BATCHES = {
    "decode": ((1, 213), (1, 1), (1, 312), (1, 7), (1, 7812)),
    "speculation": ((4, 213), (2, 2), (8, 1312), (3, 7), (5, 7812)),
    "prefill": ((2345, 2345), (5, 5), (3, 16), (134, 5131)),
    "mixed": ((992, 2456), (1, 1234), (98, 1145), (1, 4162), (2345, 2345)),
}
"""`(query_len, seq_len)` of each request."""

SMALL_BATCHES = {
    "decode": ((1, 1), (1, 33), (1, 50)),
    "speculation": ((4, 50), (2, 2)),
    "prefill": ((17, 17), (20, 50)),
    "mixed": ((1, 33), (17, 40), (1, 2)),
}
"""For Triton's interpreter."""

VARIANTS: dict[str, dict[str, Any]] = {
    "G 8, W 1024, exact": {"group_size": 8, "neighbor_window": 1024, "exact_len": 2048},
    "G 5, W 180, soft cap, sinks": {"group_size": 5, "neighbor_window": 180, "soft_cap": 50.0, "has_sinks": True},
    "ordinary, sliding window": {"group_size": 1, "sliding_window": 256},
    "interleaved, partial rotary": {"group_size": 4, "neighbor_window": 512, "interleaved": True, "rotary_share": 0.5},
    "log scale": {"group_size": 8, "neighbor_window": 1024, "log_scale_len": 1024},
}
SMALL_VARIANTS: dict[str, dict[str, Any]] = {
    "G 8, W 32, exact": {"group_size": 8, "neighbor_window": 32, "exact_len": 40},
    "G 5, W 18, soft cap, sinks": {"group_size": 5, "neighbor_window": 18, "soft_cap": 2.0, "has_sinks": True},
    "ordinary, sliding window": {"group_size": 1, "sliding_window": 20},
    "interleaved, partial rotary": {"group_size": 4, "neighbor_window": 16, "interleaved": True, "rotary_share": 0.5},
    "log scale": {"group_size": 8, "neighbor_window": 16, "log_scale_len": 20},
}

HEADS = ((4, 4), (8, 2), (9, 3))
HEAD_SIZES = (64, 80, 96, 128, 256)
BLOCK_SIZES = (16, 128)
ROPE_BASE = 10000.0
MOST_SPECULATED = 8
"""New tokens a request, in a step that a graph is captured for request by request."""


class Numbers(NamedTuple):
    """What queries and cache are in, and how far an answer may be off: at most, and in norm over the answer's norm."""

    name: str
    dtype: torch.dtype
    cache_dtype: torch.dtype
    kv_scales: tuple[float, float]
    most: float
    norm: float


NUMBERS = (
    Numbers("bfloat16", torch.bfloat16, torch.bfloat16, (1.0, 1.0), 5e-2, 2e-2),
    Numbers("float16", torch.float16, torch.float16, (1.0, 1.0), 6e-3, 2e-3),
    Numbers("float32", torch.float32, torch.float32, (1.0, 1.0), 2e-5, 1e-4),
    # The reference has an fp8 cache too, and both round keys alike, but where one lies on the edge between two numbers.
    Numbers("fp8 cache", torch.bfloat16, torch.uint8, (0.5, 0.25), 6e-2, 2e-2),
)


@dataclass(frozen=True)
class Layer:
    """An attention layer, and the numbers it is computed in."""

    num_heads: int
    num_kv_heads: int
    head_size: int
    block_size: int
    numbers: Numbers
    variant: str
    settings: dict[str, Any] = field(repr=False)

    def __str__(self) -> str:
        shape = f"{self.num_heads}/{self.num_kv_heads} heads x {self.head_size}, blocks of {self.block_size}"
        return f"{self.numbers.name}, {shape}, {self.variant}"

    def params(self, num_steps: int, dtype: torch.dtype, device: torch.device) -> AttentionParams:
        """The layer's parameters, with tables of `dtype`."""
        settings = dict(self.settings)
        rotary_dim = int(self.head_size * settings.pop("rotary_share", 1.0))
        frequencies = ROPE_BASE ** (-torch.arange(0, rotary_dim, 2, dtype=torch.float32) / rotary_dim)
        table = cos_sin(frequencies, 0, num_steps, dtype).to(device)
        rotation = Rotation(table, settings.pop("interleaved", False))
        sinks = torch.linspace(-1.0, 1.0, self.num_heads, dtype=dtype, device=device)
        return AttentionParams(
            scale=self.head_size**-0.5,
            rotation=rotation,
            sinks=sinks if settings.pop("has_sinks", False) else None,
            k_scale=self.numbers.kv_scales[0],
            v_scale=self.numbers.kv_scales[1],
            **settings,
        )


def layers(variants: dict[str, dict[str, Any]], count: int) -> list[Layer]:
    """The first `count` of ten layers; every value of every axis is among the first five, more pairs in the others."""
    found = []
    for index in range(count):
        variant = list(variants)[(index + 3 * (index // 5)) % 5]
        num_heads, num_kv_heads = HEADS[index % 3]
        block_size = BLOCK_SIZES[(index + index // 5) % 2]
        numbers = NUMBERS[index % 4]
        head_size = HEAD_SIZES[index % 5]
        found.append(Layer(num_heads, num_kv_heads, head_size, block_size, numbers, variant, variants[variant]))
    return found


class Problem:
    """A layer's step: random queries, keys and values of its requests, and where a cache holds them."""

    def __init__(self, layer: Layer, requests: tuple[tuple[int, int], ...], device: torch.device) -> None:
        self.layer, self.device = layer, device
        self.old = [(0, seq_len - query_len) for query_len, seq_len in requests]
        self.new = [(seq_len - query_len, seq_len) for query_len, seq_len in requests]
        self.longest = max(seq_len for _, seq_len in requests)
        blocks = [-(-seq_len // layer.block_size) for _, seq_len in requests]
        self.num_blocks = sum(blocks) + 2
        self.block_table = torch.zeros(len(requests), max(blocks), dtype=torch.int32, device=device)
        order = torch.randperm(self.num_blocks, dtype=torch.int32, device=device)
        for row, chosen in zip(self.block_table, order[: sum(blocks)].split(blocks), strict=True):
            row[: len(chosen)] = chosen
        self.query = self.draw(self.new, layer.num_heads)
        self.old_key, self.old_value = (self.draw(self.old, layer.num_kv_heads) for _ in range(2))
        self.key, self.value = (self.draw(self.new, layer.num_kv_heads) for _ in range(2))

    def draw(self, spans: list[tuple[int, int]], num_heads: int) -> torch.Tensor:
        shape = sum(end - begin for begin, end in spans), num_heads, self.layer.head_size
        return torch.randn(shape, device=self.device).to(self.layer.numbers.dtype)

    def params(self, dtype: torch.dtype = torch.float32) -> AttentionParams:
        num_steps = max(self.longest, self.layer.settings.get("neighbor_window", 1)) + 1
        return self.layer.params(num_steps, dtype, self.device)

    def batch(self, spans: list[tuple[int, int]], workspace: torch.Tensor | None = None) -> AttentionBatch:
        """The step in which the tokens `begin .. end - 1` of each request are new."""
        block_size, slots = self.layer.block_size, []
        for row, (begin, end) in zip(self.block_table, spans, strict=True):
            positions = torch.arange(begin, end, device=self.device)
            slots.append(row[positions // block_size].long() * block_size + positions % block_size)
        query_lens = [end - begin for begin, end in spans]
        query_start_loc = [0, *itertools.accumulate(query_lens)]
        return AttentionBatch(
            query_start_loc=torch.tensor(query_start_loc, dtype=torch.int32, device=self.device),
            seq_lens=torch.tensor([end for _, end in spans], dtype=torch.int32, device=self.device),
            block_table=self.block_table,
            slot_mapping=torch.cat(slots),
            max_query_len=max(query_lens),
            workspace=workspace,
        )

    def filled_cache(self, kernels: Kernels, dtype: torch.dtype) -> torch.Tensor:
        """A cache with the tokens before the step's, in queries' `dtype` or, if the layer's is, in fp8."""
        layer = self.layer
        shape = self.num_blocks, layer.num_kv_heads, layer.block_size, 2 * layer.head_size
        if layer.numbers.cache_dtype == torch.uint8:
            cache = torch.full(shape, 0x7F, dtype=torch.uint8, device=self.device)  # NaN
        else:
            cache = torch.full(shape, float("nan"), dtype=dtype, device=self.device)
        if len(self.old_key):
            key, value = self.old_key.to(dtype), self.old_value.to(dtype)
            kernels.store_kv(key, value, cache, self.batch(self.old), self.params(_table_dtype(dtype)))
        return cache

    def run(self, kernels: Kernels, dtype: torch.dtype, calls: int = 1) -> list[torch.Tensor]:
        """The answers to the same call, made so often."""
        cache, params, batch = self.filled_cache(kernels, dtype), self.params(_table_dtype(dtype)), self.batch(self.new)
        kernels.store_kv(self.key.to(dtype), self.value.to(dtype), cache, batch, params)
        query = self.query.to(dtype)
        outs = [torch.empty_like(query) for _ in range(calls)]
        for out in outs:
            kernels.attention(query, cache, batch, params, out)
        return outs

    def run_captured(self, kernels: Kernels) -> torch.Tensor:
        """The answer of a CUDA graph that was captured with nothing in the cache and is replayed with this step."""
        layer, real = self.layer, self.batch(self.new)
        size = kernels.workspace_size(layer.num_heads, layer.num_kv_heads, layer.head_size, self.device)
        workspace = torch.empty(size, dtype=torch.float32, device=self.device)
        cache, params = self.filled_cache(kernels, layer.numbers.dtype), self.params()
        num_tokens, num_reqs = len(self.query), len(real.seq_lens)
        is_mixed = real.max_query_len > MOST_SPECULATED
        query_start_loc = real.query_start_loc.clone()
        if is_mixed:  # one token a request, and all others the last one's
            query_start_loc[:num_reqs] = torch.arange(num_reqs, device=self.device)
        held = AttentionBatch(
            query_start_loc=query_start_loc,
            seq_lens=query_start_loc.diff(),
            block_table=torch.zeros_like(real.block_table),
            slot_mapping=torch.full_like(real.slot_mapping, -1),
            max_query_len=num_tokens if is_mixed else real.max_query_len,
            workspace=workspace,
        )
        query, key, value = (torch.zeros_like(x) for x in (self.query, self.key, self.value))
        out = torch.empty_like(query)

        def step() -> None:
            kernels.store_kv(key, value, cache, held, params)
            kernels.attention(query, cache, held, params, out)

        replay = gpu_machine.capture([step])
        for name in ("query_start_loc", "seq_lens", "block_table", "slot_mapping"):
            getattr(held, name).copy_(getattr(real, name))
        for tensor, data in ((query, self.query), (key, self.key), (value, self.value)):
            tensor.copy_(data)
        replay()
        return out


def _table_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


class Result(NamedTuple):
    """What came of a case; `problem` says what is wrong, if anything is."""

    layer: Layer
    batch: str
    most: float
    norm: float
    problem: str

    def row(self, device: str) -> dict[str, Any]:
        """Its line in the JSON file."""
        layer = self.layer
        return {
            "device": device,
            "dtype": layer.numbers.name,
            "phase": "correctness",
            "batch_kind": self.batch,
            "num_heads": layer.num_heads,
            "num_kv_heads": layer.num_kv_heads,
            "head_size": layer.head_size,
            "block_size": layer.block_size,
            "variant": layer.variant,
            "largest_error": self.most,
            "error_norm": self.norm,
            "problem": self.problem,
        }


def num_cases(count: int) -> int:
    """How many results `check(..., count)` has."""
    return count * len(BATCHES)


def check(kernels: Kernels, device: torch.device, count: int) -> Iterator[Result]:
    """Check `count` layers with every kind of batch. A CPU, where Triton interprets, gets short ones."""
    is_small = device.type == "cpu"
    batches = SMALL_BATCHES if is_small else BATCHES
    for layer in layers(SMALL_VARIANTS if is_small else VARIANTS, count):
        for batch, requests in batches.items():
            yield check_one(kernels, layer, batch, Problem(layer, requests, device))


def check_one(kernels: Kernels, layer: Layer, batch: str, problem: Problem) -> Result:
    """Hold the kernels' answers against the reference's, and against each other."""
    numbers, nothing = layer.numbers, float("nan")
    try:
        first, second = problem.run(kernels, numbers.dtype, calls=2)
        captured = problem.run_captured(kernels)
    except Exception as error:  # a kernel that cannot be compiled or launched is a finding, and the other cases go on
        return Result(layer, batch, nothing, nothing, f"{type(error).__name__}: {error}")
    (wanted,) = problem.run(reference, torch.float64)
    difference = first.double() - wanted
    most, norm = float(difference.abs().max()), float(difference.norm() / wanted.norm())
    found = []
    # Not `most > ...`, which lets NaN through.
    if not most <= numbers.most:
        found.append(f"off by {most:.1e}, allowed {numbers.most:.0e}")
    if not norm <= numbers.norm:
        found.append(f"off by {norm:.1e} of its norm, allowed {numbers.norm:.0e}")
    if not first.equal(second):
        found.append("a second call gives something else")
    if not first.equal(captured):
        found.append("a captured graph gives something else")
    return Result(layer, batch, most, norm, "; ".join(found))


def result_table(results: list[Result]) -> Table:
    """The worst errors of each dtype and kind of batch, for people."""
    table = Table(
        title="Against the reference in float64", box=rich.box.SIMPLE_HEAD, collapse_padding=True, pad_edge=False
    )
    for name in ("dtype", "batch"):
        table.add_column(name)
    for name in ("cases", "largest\nerror", "allowed", "error's\nnorm", "allowed", ""):
        table.add_column(name, justify="right")
    for numbers, batch in itertools.product(NUMBERS, BATCHES):
        alike = [result for result in results if (result.layer.numbers, result.batch) == (numbers, batch)]
        if alike:
            # Not Python's max(), which may lose NaN.
            most, norm = torch.tensor([(result.most, result.norm) for result in alike]).amax(0).tolist()
            verdict = "wrong" if any(result.problem for result in alike) else "right"
            errors = f"{most:.1e}", f"{numbers.most:.0e}", f"{norm:.1e}", f"{numbers.norm:.0e}"
            table.add_row(numbers.name, batch, str(len(alike)), *errors, verdict)
    return table
