"""Random attention problems, the paper's answer to them in float64 from its formula, and the kernels to be tested."""

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from vllm_selfextend.backends import AttentionBatch, AttentionParams, Kernels, Rotation, cpu, reference

from vllm_selfextend.rotary import cos_sin


class CPUKernels:
    """The CPU kernels with the vector code of one instruction set."""

    def __init__(self, instruction_set: str) -> None:
        self.instruction_set = instruction_set

    def _call(self, call: Any, *arguments: Any) -> None:
        chosen, cpu.instruction_set = cpu.instruction_set, self.instruction_set
        try:
            call(*arguments)
        finally:
            cpu.instruction_set = chosen

    def supports_head_size(self, head_size: int) -> bool:
        return cpu.supports_head_size(head_size)

    def workspace_size(self, *layer: Any) -> int:
        return cpu.workspace_size(*layer)

    def store_kv(self, *arguments: Any) -> None:
        self._call(cpu.store_kv, *arguments)

    def attention(self, *arguments: Any) -> None:
        self._call(cpu.attention, *arguments)


KERNELS: dict[str, Kernels] = {"reference": reference, **{name: CPUKernels(name) for name in cpu.INSTRUCTION_SETS}}
"""Everything that this machine can run."""


@dataclass(frozen=True)
class Case:
    """An attention problem; `requests` holds `(query_len, seq_len)` of each request."""

    requests: tuple[tuple[int, int], ...]
    num_heads: int = 4
    num_kv_heads: int = 2
    head_size: int = 32
    block_size: int = 16
    group_size: int = 4
    neighbor_window: int = 16
    exact_len: int = 0
    log_scale_len: int = 0
    soft_cap: float = 0.0
    sliding_window: int = 0
    has_sinks: bool = False
    interleaved: bool = False
    rotary_dim: int = 32
    kv_scales: tuple[float, float] = (1.0, 1.0)
    seed: int = 0
    base: float = field(default=1000.0, repr=False)

    def frequencies(self) -> torch.Tensor:
        """`[rotary_dim / 2]`."""
        return self.base ** (-torch.arange(0, self.rotary_dim, 2, dtype=torch.float32) / self.rotary_dim)

    @property
    def num_steps(self) -> int:
        """Rows of the re-rotation table: positions, the window's steps, and those within 16 keys."""
        return max(*[seq_len for _, seq_len in self.requests], self.neighbor_window, 16) + 1

    def params(self, dtype: torch.dtype = torch.float32) -> AttentionParams:
        """The layer, with a re-rotation table of `dtype`."""
        sinks = torch.randn(self.num_heads, generator=_generator(self, 1), dtype=torch.float64)
        return AttentionParams(
            scale=self.head_size**-0.5,
            group_size=self.group_size,
            neighbor_window=self.neighbor_window,
            exact_len=self.exact_len,
            log_scale_len=self.log_scale_len,
            soft_cap=self.soft_cap,
            sliding_window=self.sliding_window,
            rotation=Rotation(cos_sin(self.frequencies(), 0, self.num_steps, dtype), self.interleaved),
            sinks=sinks.to(dtype) if self.has_sinks else None,
            k_scale=self.kv_scales[0],
            v_scale=self.kv_scales[1],
        )


def _generator(case: Case, salt: int) -> torch.Generator:
    return torch.Generator().manual_seed(2 * case.seed + salt)


@dataclass(frozen=True)
class Problem:
    """Unrotated queries, keys and values of every request of a case, over its whole length, in float64."""

    case: Case
    queries: list[torch.Tensor]
    keys: list[torch.Tensor]
    values: list[torch.Tensor]

    @staticmethod
    def of(case: Case, dtype: torch.dtype = torch.float64) -> "Problem":
        """Draw the case's tensors; the values and rotated queries and keys are such that `dtype` holds them exactly."""
        generator = _generator(case, 0)

        def draw(heads: int) -> list[torch.Tensor]:
            shapes = [(length, heads, case.head_size) for _, length in case.requests]
            return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]

        queries, keys, values = draw(case.num_heads), draw(case.num_kv_heads), draw(case.num_kv_heads)

        def representable(x: torch.Tensor) -> torch.Tensor:
            positions = torch.arange(x.shape[0])
            return rotate(case, rotate(case, x, positions).to(dtype).double(), -positions)

        return Problem(
            case,
            [representable(x) for x in queries],
            [representable(x) for x in keys],
            [x.to(dtype).double() for x in values],
        )


def rotate(case: Case, x: torch.Tensor, steps: torch.Tensor) -> torch.Tensor:
    """Rotate `x` `[tokens, heads, head_size]` by `steps` `[tokens]`, as complex numbers."""
    angles = steps.double()[:, None, None] * case.frequencies().double()
    turn = torch.polar(torch.ones_like(angles), angles)
    rotary = x[..., : case.rotary_dim]
    if case.interleaved:
        pairs = torch.complex(rotary[..., 0::2], rotary[..., 1::2]) * turn
        turned = torch.stack([pairs.real, pairs.imag], -1).flatten(-2)
    else:
        half = case.rotary_dim // 2
        pairs = torch.complex(rotary[..., :half], rotary[..., half:]) * turn
        turned = torch.cat([pairs.real, pairs.imag], -1)
    return torch.cat([turned, x[..., case.rotary_dim :]], -1)


def expected(problem: Problem) -> torch.Tensor:
    """The paper's answer, `[num_tokens, num_heads, head_size]` in float64: no cache, no batch, no re-rotation."""
    case, answers = problem.case, []
    sinks = case.params(torch.float64).sinks
    repeats = case.num_heads // case.num_kv_heads
    for (query_len, seq_len), query, key, value in zip(
        case.requests, problem.queries, problem.keys, problem.values, strict=True
    ):
        key, value = key.repeat_interleave(repeats, 1), value.repeat_interleave(repeats, 1)
        j = torch.arange(seq_len)
        # A few queries at a time: every query is rotated anew for every key.
        for i in torch.arange(seq_len - query_len, seq_len)[:, None].split(16):
            grouped = i // case.group_size + case.neighbor_window - case.neighbor_window // case.group_size
            near = (i - j < case.neighbor_window) | (i < case.exact_len)
            relative = torch.where(near, i - j, grouped - j // case.group_size)
            pairs = query[i].expand(-1, seq_len, -1, -1).flatten(0, 1)
            turned = rotate(case, pairs, relative.flatten()).unflatten(0, relative.shape)
            scores = (turned * key).sum(-1) * case.head_size**-0.5
            if case.log_scale_len:
                scores = scores * ((i + 1).double().log() / math.log(case.log_scale_len)).clamp(min=1.0)[..., None]
            if case.soft_cap:
                scores = case.soft_cap * torch.tanh(scores / case.soft_cap)
            seen = (j <= i) & (i - j < (case.sliding_window or seq_len))
            weights = scores.exp() * seen[..., None]
            total = weights.sum(1) + (sinks.exp() if sinks is not None else 0.0)
            answers.append((weights[..., None] * value).sum(1) / total[..., None])
    return torch.cat(answers)


def run(
    kernels: Kernels,
    problem: Problem,
    dtype: torch.dtype,
    cache_dtype: torch.dtype | None = None,
    *,
    workspace: torch.Tensor | None = None,
    padding: int = 0,
    max_query_len: int | None = None,
) -> torch.Tensor:
    """The kernels' answer through a paged cache, its blocks in random order, old tokens stored first.

    With `padding`, a step has so many requests of no tokens and tokens of no request more, and the answer so many rows.
    """
    case = problem.case
    generator = _generator(case, 2)
    blocks_of = [-(-seq_len // case.block_size) for _, seq_len in case.requests]
    num_blocks = sum(blocks_of) + 2
    order = torch.randperm(num_blocks, generator=generator).int()
    block_table = torch.zeros(len(case.requests), max(blocks_of), dtype=torch.int32)
    for row, chosen in zip(block_table, order.split([*blocks_of, 2]), strict=False):
        row[: len(chosen)] = chosen
    # What no token was stored to must not matter.
    shape = num_blocks, case.num_kv_heads, case.block_size, 2 * case.head_size
    kv_cache = torch.full(shape, float("nan")).to(cache_dtype or dtype)
    params = case.params(torch.float64 if dtype == torch.float64 else torch.float32)

    def batch(spans: list[tuple[int, int]], max_query_len: int | None = None) -> AttentionBatch:
        positions = [torch.arange(begin, end) for begin, end in spans]
        slots = [
            row[p // case.block_size].long() * case.block_size + p % case.block_size
            for row, p in zip(block_table, positions, strict=True)
        ]
        lens = torch.tensor([0] + [end - begin for begin, end in spans] + [0] * padding)
        return AttentionBatch(
            query_start_loc=lens.cumsum(0).int(),
            seq_lens=torch.tensor([end for _, end in spans] + [0] * padding).int(),
            block_table=torch.nn.functional.pad(block_table, (0, 0, 0, padding)),
            slot_mapping=torch.cat([*slots, torch.full([padding], -1)]),
            max_query_len=int(lens.max()) if max_query_len is None else max_query_len,
            workspace=workspace,
        )

    def tokens(tensors: list[torch.Tensor], spans: list[tuple[int, int]], *, turned: bool) -> torch.Tensor:
        parts = [x[begin:end] for x, (begin, end) in zip(tensors, spans, strict=True)]
        if turned:
            pairs = zip(parts, spans, strict=True)
            parts = [rotate(case, x, torch.arange(begin, end)) for x, (begin, end) in pairs]
        return torch.nn.functional.pad(torch.cat(parts), (0, 0, 0, 0, 0, padding)).to(dtype)

    old = [(0, seq_len - query_len) for query_len, seq_len in case.requests]
    new = [(seq_len - query_len, seq_len) for query_len, seq_len in case.requests]
    for spans in (old, new):
        key, value = tokens(problem.keys, spans, turned=True), tokens(problem.values, spans, turned=False)
        kernels.store_kv(key, value, kv_cache, batch(spans), params)
    query = tokens(problem.queries, new, turned=True)
    out = torch.full_like(query, float("nan"))
    kernels.attention(query, kv_cache, batch(new, max_query_len), params, out)
    return out
