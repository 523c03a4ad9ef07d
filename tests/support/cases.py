"""Random attention problems, the paper's answer to them in float64 from its formula, and steps that kernels answer."""

import itertools
import math
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from vllm_selfextend.backends.interface import (
    NO_HOST,
    AttentionBatch,
    AttentionParams,
    GroupSizes,
    Host,
    Kernels,
    Rotation,
    num_rotation_steps,
)
from vllm_selfextend.method.positions import GroupSize, group_sizes, largest_auto_window
from vllm_selfextend.method.rope import cos_sin

TOLERANCE = {torch.float64: 1e-9, torch.float32: 2e-5, torch.float16: 6e-3, torch.bfloat16: 5e-2}
"""What rounding inputs, the cache and the output to the dtype can do to values of size 1."""

FP8_NAN = 0x7F

VLLM_HEADS = ((4, 4), (8, 2), (9, 3))
VLLM_BATCHES = {
    "decode": ((1, 213), (1, 1), (1, 312), (1, 7), (1, 7812)),
    "prefill": ((2345, 2345), (5, 5), (3, 16), (134, 5131)),
    "mixed": ((992, 2456), (1, 1234), (98, 1145), (1, 4162), (2345, 2345)),
}
"""Heads and lengths of `tests/kernels/attention/test_cpu_attn.py` in vLLM's repository."""
VLLM_VARIANTS: dict[str, dict[str, Any]] = {
    "G 8, W 1024": {"group_size": 8, "neighbor_window": 1024, "exact_len": 2048},
    "G 5, W 180, soft cap, sinks": {"group_size": 5, "neighbor_window": 180, "soft_cap": 50.0, "has_sinks": True},
    "automatic, L 1024": {"group_size": "auto", "exact_len": 1024, "neighbor_window": 256},
    "ordinary, sliding window": {"group_size": 1, "sliding_window": 256},
}
"""Layers for such lengths."""


@dataclass(frozen=True)
class Case:
    """An attention problem; `requests` holds `(query_len, seq_len)` of each request.

    With `group_size` "auto" group sizes follow the position, and `exact_len` is the trained length; 1 is no grouping.
    """

    requests: tuple[tuple[int, int], ...]
    num_heads: int = 4
    num_kv_heads: int = 2
    head_size: int = 32
    block_size: int = 16
    group_size: GroupSize = 4
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

    def group_sizes(self) -> torch.Tensor:
        """In eighths, of every position of the longest request."""
        longest = max(seq_len for _, seq_len in self.requests)
        assert self.group_size != "auto" or self.neighbor_window <= largest_auto_window(self.exact_len)
        return group_sizes(longest, self.exact_len, self.neighbor_window, self.group_size, self.exact_len)

    def params(self, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> AttentionParams:
        """The layer, with a table of cosines and sines of `dtype`."""
        sizes = None if self.group_size == 1 else GroupSizes.of(self.group_sizes(), device)
        rotation = None
        if sizes is not None:
            steps = num_rotation_steps(len(sizes.eighths), sizes.largest, self.neighbor_window)
            rotation = Rotation(cos_sin(self.frequencies(), 0, steps, dtype).to(device), self.interleaved)
        sinks = torch.randn(self.num_heads, generator=_generator(self, 1), dtype=torch.float64)
        return AttentionParams(
            scale=self.head_size**-0.5,
            group_sizes=sizes,
            neighbor_window=self.neighbor_window,
            log_scale_len=self.log_scale_len,
            soft_cap=self.soft_cap,
            sliding_window=self.sliding_window,
            rotation=rotation,
            sinks=sinks.to(device, dtype) if self.has_sinks else None,
            k_scale=torch.tensor(self.kv_scales[0], device=device),
            v_scale=torch.tensor(self.kv_scales[1], device=device),
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

    @property
    def device(self) -> torch.device:
        """Where its tensors are."""
        return self.queries[0].device

    @staticmethod
    def of(case: Case, dtype: torch.dtype = torch.float64, device: torch.device | str = "cpu") -> "Problem":
        """Draw the case's tensors; the values and rotated queries and keys are such that `dtype` holds them exactly."""
        generator = _generator(case, 0)

        def draw(heads: int) -> list[torch.Tensor]:
            shapes = [(length, heads, case.head_size) for _, length in case.requests]
            return [torch.randn(shape, generator=generator, dtype=torch.float64).to(device) for shape in shapes]

        queries, keys, values = draw(case.num_heads), draw(case.num_kv_heads), draw(case.num_kv_heads)

        def representable(x: torch.Tensor) -> torch.Tensor:
            positions = torch.arange(x.shape[0], device=x.device)
            return rotate(case, rotate(case, x, positions).to(dtype).double(), -positions)

        return Problem(
            case,
            [representable(x) for x in queries],
            [representable(x) for x in keys],
            [x.to(dtype).double() for x in values],
        )

    def spoil_unseen(self) -> None:
        """Make keys and values NaN that are too far back for every query: vLLM may have given their blocks away."""
        for (query_len, seq_len), key, value in zip(self.case.requests, self.keys, self.values, strict=True):
            unseen = max(0, seq_len - query_len - self.case.sliding_window + 1)
            key[:unseen] = value[:unseen] = float("nan")


def rotate(case: Case, x: torch.Tensor, steps: torch.Tensor) -> torch.Tensor:
    """Rotate `x` `[tokens, heads, head_size]` by `steps` `[tokens]`, as complex numbers."""
    angles = steps.double()[:, None, None] * case.frequencies().to(steps.device, torch.float64)
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
    """The paper's answer, `[num_tokens, num_heads, head_size]` in float64: no cache, no batch, nothing turned twice."""
    case, answers = problem.case, []
    sizes, window = case.group_sizes().to(problem.device).long(), case.neighbor_window
    sinks = case.params(torch.float64, problem.device).sinks
    repeats = case.num_heads // case.num_kv_heads
    for (query_len, seq_len), query, key, value in zip(
        case.requests, problem.queries, problem.keys, problem.values, strict=True
    ):
        key, value = key.repeat_interleave(repeats, 1), value.repeat_interleave(repeats, 1)
        j = torch.arange(seq_len, device=problem.device)
        # A few queries at a time: every query is rotated anew for every key.
        for i in torch.arange(seq_len - query_len, seq_len, device=problem.device)[:, None].split(16):
            p = sizes[i]
            near = (i - j < window) | (i < case.exact_len)
            relative = torch.where(near, i - j, 8 * i // p + window - 8 * window // p - 8 * j // p)
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


class Step:
    """A case's new tokens, and a paged cache, its blocks in random order, in which the old ones are stored.

    With `padding`, a step has so many requests of no tokens and tokens of no request more, and an answer so many rows.
    """

    def __init__(
        self,
        kernels: Kernels,
        problem: Problem,
        dtype: torch.dtype,
        cache_dtype: torch.dtype | None = None,
        *,
        workspace: torch.Tensor | None = None,
        padding: int = 0,
        max_query_len: int | None = None,
        decode_len: int | None = None,
        host: Host = NO_HOST,
    ) -> None:
        case, device = problem.case, problem.device
        self.problem, self.dtype, self.padding, self.workspace = problem, dtype, padding, workspace
        self.decode_len = decode_len or kernels.decode_len(case.num_heads // case.num_kv_heads)
        generator = _generator(case, 2)
        blocks_of = [-(-seq_len // case.block_size) for _, seq_len in case.requests]
        num_blocks = sum(blocks_of) + 2
        order = torch.randperm(num_blocks, generator=generator).int()
        block_table = torch.zeros(len(case.requests), max(blocks_of), dtype=torch.int32)
        for row, chosen in zip(block_table, order.split([*blocks_of, 2]), strict=False):
            row[: len(chosen)] = chosen
        self.block_table = block_table.to(device)
        # What no token was stored to must not matter.
        cache_dtype = cache_dtype or dtype
        nothing = FP8_NAN if cache_dtype == torch.uint8 else float("nan")
        shape = num_blocks, case.num_kv_heads, case.block_size, 2 * case.head_size
        self.kv_cache = torch.full(shape, nothing, device=device).to(cache_dtype)
        self.params = case.params(torch.float64 if dtype == torch.float64 else torch.float32, device)
        self.layer = kernels.prepare(self.params, host)

        old = [(0, seq_len - query_len) for query_len, seq_len in case.requests]
        new = [(seq_len - query_len, seq_len) for query_len, seq_len in case.requests]
        key, value = self._tokens(problem.keys, old, turned=True), self._tokens(problem.values, old, turned=False)
        self.layer.store(key, value, self.kv_cache, self._batch(old))
        self.key, self.value = (
            self._tokens(problem.keys, new, turned=True),
            self._tokens(problem.values, new, turned=False),
        )
        self.query = self._tokens(problem.queries, new, turned=True)
        self.batch = self._batch(new)
        self.asked = self.batch if max_query_len is None else replace(self.batch, max_query_len=max_query_len)

    def store(self) -> None:
        """Store the new tokens."""
        self.layer.store(self.key, self.value, self.kv_cache, self.batch)

    def attend(self) -> torch.Tensor:
        """The kernels' answer."""
        out = torch.full_like(self.query, float("nan"))
        self.layer.attend(self.query, self.kv_cache, self.asked, out, self.workspace)
        return out

    def _batch(self, spans: list[tuple[int, int]]) -> AttentionBatch:
        """The step in which the tokens `begin .. end - 1` of each request are new."""
        block_size, device, padding = self.problem.case.block_size, self.problem.device, self.padding
        positions = [torch.arange(begin, end, device=device) for begin, end in spans]
        slots = [
            row[p // block_size].long() * block_size + p % block_size
            for row, p in zip(self.block_table, positions, strict=True)
        ]
        lens = [end - begin for begin, end in spans] + [0] * padding
        query_start_loc = torch.tensor([0, *itertools.accumulate(lens)], dtype=torch.int32)
        seq_lens = torch.tensor([end for _, end in spans] + [0] * padding, dtype=torch.int32)
        # Of decodes the host need not know more than an upper bound.
        bounds = [end + 3 * (n <= self.decode_len) for n, end in zip(lens, seq_lens.tolist(), strict=True)]
        return AttentionBatch(
            query_start_loc=query_start_loc.to(device),
            seq_lens=seq_lens.to(device),
            block_table=torch.nn.functional.pad(self.block_table, (0, 0, 0, padding)),
            slot_mapping=torch.cat([*slots, torch.full([padding], -1, device=device)]),
            max_query_len=max(lens),
            max_seq_len=max(end for _, end in spans),
            decode_len=self.decode_len,
            query_start_loc_cpu=query_start_loc,
            seq_lens_cpu=torch.tensor(bounds, dtype=torch.int32),
        )

    def _tokens(self, tensors: list[torch.Tensor], spans: list[tuple[int, int]], *, turned: bool) -> torch.Tensor:
        parts = [x[begin:end] for x, (begin, end) in zip(tensors, spans, strict=True)]
        if turned:
            pairs = zip(parts, spans, strict=True)
            parts = [rotate(self.problem.case, x, torch.arange(b, e, device=x.device)) for x, (b, e) in pairs]
        return torch.nn.functional.pad(torch.cat(parts), (0, 0, 0, 0, 0, self.padding)).to(self.dtype)


def run(
    kernels: Kernels,
    problem: Problem,
    dtype: torch.dtype,
    cache_dtype: torch.dtype | None = None,
    **options: Any,
) -> torch.Tensor:
    """The kernels' answer to a step; `options` are those of `Step`."""
    step = Step(kernels, problem, dtype, cache_dtype, **options)
    step.store()
    return step.attend()
