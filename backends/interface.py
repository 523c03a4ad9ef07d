"""What a set of kernels is given and what it offers. Tensors only: nothing here knows vLLM.

Self-Extend (Jin et al., ICML 2024, arXiv 2401.01325) gives a query at position `i` and a key at position `j`

    the relative position  i - j                      if i - j < W   (neighbor attention)
                           g(i) + W - g(W) - g(j)     otherwise      (grouped attention)

with the neighbor window `W` and `g(x) = x // G`, `G` the group size; one softmax runs over both. Here `G` is the
query's: it follows from `i`, by a table, in eighths. With `p = 8 G`, `g(x) = 8 x // p`; a whole `G` gives `x // G`.

Queries and keys reach a kernel rotated at their true positions, `q = R(i) q0`, `k = R(j) k0`, and so keys lie in the
cache: as the model made them, whatever `G`. Rotations add, so with the lag `d(x) = x - g(x)` of the query's `G`

    neighbor score          q . k
    grouped score           (R(d(W) - d(i)) q) . (R(-d(j)) k)

and a query whose `p` is 8 meets ordinary keys only. A kernel may assume that `p` never falls along a request, and so
never among the rows that it takes of one; how many sizes those have, `GroupSizes.most_in` says. Each request of a batch
has its own. With one key more the lag grows by 0 or 1, for any `p` of 8 or more.
"""

import bisect
import math
from abc import ABC, abstractmethod
from collections.abc import Hashable, Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

import torch

from .limits import EIGHTHS, MAX_POSITIONS

Positions = TypeVar("Positions", int, torch.Tensor)


def group_position(positions: Positions, eighths: Positions) -> Positions:
    """`g(x)`: the grouped position of `x` for a group size of so many eighths."""
    return EIGHTHS * positions // eighths


def lag(positions: Positions, eighths: Positions) -> Positions:
    """`d(x)`: how far a token's grouped position lags behind its position."""
    return positions - group_position(positions, eighths)


def num_rotation_steps(num_positions: int, largest: int, neighbor_window: int) -> int:
    """How many rows of `Rotation.cos_sin` turning by group sizes of `largest` eighths or less needs.

    Positions are below `num_positions`. Queries and keys are turned by `d(x)` at most, queries by `d(W)` too; the CPU
    kernels turn 16 keys after another by up to `d(16)`, Triton's tiles lie below `num_positions`.
    """
    return lag(max(num_positions, neighbor_window, 16), largest) + 1


@dataclass(frozen=True)
class Rotation:
    """The rotary embedding of a layer, as far as turning needs it.

    Attributes:
        cos_sin: `[num_rotation_steps(...), rotary_dim]`, float32 (float64 for an oracle): row `t` holds the cosines,
            then the sines, of `t * inv_freq`.
        interleaved: True if dimensions `2n` and `2n + 1` form a pair (GPT-J), False if `n` and `n + rotary_dim / 2` do
            (GPT-NeoX).

    """

    cos_sin: torch.Tensor
    interleaved: bool = False

    def turn(self, x: torch.Tensor, steps: torch.Tensor) -> torch.Tensor:
        """`x` `[..., head_size]`, turned by `steps`, of either sign, broadcast over the leading dimensions."""
        cos, sin = self.cos_sin[steps.abs()].to(x.dtype).chunk(2, dim=-1)
        sin = sin * steps.sign()[..., None]
        rotary_dim = self.cos_sin.shape[-1]
        if self.interleaved:
            first, second = x[..., 0:rotary_dim:2], x[..., 1:rotary_dim:2]
        else:
            first, second = x[..., : rotary_dim // 2], x[..., rotary_dim // 2 : rotary_dim]
        pairs = first * cos - second * sin, second * cos + first * sin
        turned = torch.stack(pairs, dim=-1).flatten(-2) if self.interleaved else torch.cat(pairs, dim=-1)
        return torch.cat([turned, x[..., rotary_dim:]], dim=-1)


@dataclass(frozen=True)
class GroupSizes:
    """The group size of the query at each position.

    Attributes:
        eighths: `[num_positions]`, int32, contiguous, on the queries' device: `8 G`, at least 8, never falling.
        begins: The first position of each size, rising; on the host.
        values: Those sizes.
        least_rows: At `n - 1`: the least number of positions in a row that have `n` group sizes above 1.

    """

    eighths: torch.Tensor
    begins: tuple[int, ...]
    values: tuple[int, ...]
    least_rows: tuple[int, ...]

    @property
    def largest(self) -> int:
        """The last, largest size."""
        return self.values[-1]

    @staticmethod
    def of(eighths: torch.Tensor, device: torch.device | str = "cpu") -> "GroupSizes":
        """What a table `[num_positions]` on the host says, for kernels on `device`.

        Raises:
            ValueError: It is empty, holds less than 8, or falls.

        """
        if len(eighths) == 0 or int(eighths[0]) < EIGHTHS or bool((eighths.diff() < 0).any()):
            raise ValueError(
                f"a table of group sizes must hold {EIGHTHS} or more eighths for each position, and not fall."
            )
        changes = [0, *(eighths.diff().nonzero()[:, 0] + 1).tolist()]
        values = eighths[changes].tolist()
        grouped = [begin for begin, value in zip(changes, values, strict=True) if value > EIGHTHS]
        # From the last position of the first of `n` sizes to the first position of the last one.
        least_rows = [
            min((end - begin + 2 for begin, end in zip(grouped[1:], grouped[n - 1 :])), default=1)  # noqa: B905
            if n > 1
            else 1
            for n in range(1, len(grouped) + 1)
        ]
        return GroupSizes(eighths.to(device, torch.int32), tuple(changes), tuple(values), tuple(least_rows))

    def runs(self, begin: int, end: int) -> Iterator[tuple[int, int, int]]:
        """The positions `begin .. end - 1` by their group size: where a run begins, where it ends, and its eighths."""
        index = bisect.bisect_right(self.begins, begin) - 1
        while begin < end:
            last = index + 1 == len(self.begins)
            stop = end if last else min(end, self.begins[index + 1])
            yield begin, stop, self.values[index]
            begin, index = stop, index + 1

    def most_in(self, num_rows: int) -> int:
        """How many group sizes above 1 so many queries of a request, one after another, can have."""
        most = 0
        for rows in self.least_rows:
            if rows > num_rows:
                break
            most += 1
        return most


@dataclass(frozen=True)
class AttentionParams:
    """What one attention layer computes.

    Attributes:
        scale: Multiplies every score.
        group_sizes: `G` by position; None is ordinary attention.
        neighbor_window: `W`, in tokens, at least 1.
        log_scale_len: If not 0, queries are multiplied by `max(1, ln(i + 1) / ln(log_scale_len))`.
        soft_cap: If not 0, scores become `soft_cap * tanh(score / soft_cap)`.
        sliding_window: If not 0, a query sees the keys with `i - j < sliding_window` only; then nothing is grouped.
        rotation: Needed where there are group sizes.
        sinks: `[num_heads]` or None: a logit per head that takes part in the softmax and adds nothing to the output.
        k_scale: One float32, or None for 1: an 8-bit cache holds keys divided by it.
        v_scale: The same of values.

    Sinks and scales are read in every call, so that weights may change in place.

    Raises:
        ValueError: A number is out of its range, or the rotation is missing or has too few rows for the group sizes.

    """

    scale: float
    group_sizes: GroupSizes | None = None
    neighbor_window: int = 1
    log_scale_len: int = 0
    soft_cap: float = 0.0
    sliding_window: int = 0
    rotation: Rotation | None = None
    sinks: torch.Tensor | None = None
    k_scale: torch.Tensor | None = None
    v_scale: torch.Tensor | None = None

    def __post_init__(self) -> None:
        # Comparisons that torch.compile can follow; of nan they are false.
        for name, least in _LEAST.items():
            if not least <= (value := getattr(self, name)) <= MAX_POSITIONS:
                raise ValueError(f"params.{name} is {value}; it must be from {least} to {MAX_POSITIONS}.")
        if self.log_scale_len == 1:
            raise ValueError("params.log_scale_len is 1, whose logarithm is 0; it must be 0 (off), or 2 or more.")
        if not abs(self.scale) < math.inf:
            raise ValueError(f"params.scale is {self.scale}; it must be finite.")
        if not 0.0 <= self.soft_cap < math.inf:
            raise ValueError(f"params.soft_cap is {self.soft_cap}; it must be 0 (off), or positive and finite.")

        if self.group_sizes is None:
            return
        if self.sliding_window:
            raise ValueError(
                f"params.group_sizes is given, and params.sliding_window is {self.sliding_window}; layers with a "
                "sliding window keep ordinary positions."
            )
        if self.rotation is None:
            raise ValueError("params.group_sizes is given, and turning needs params.rotation, which is None.")
        rows, num_positions = self.rotation.cos_sin.shape[0], self.group_sizes.eighths.shape[0]
        needed = num_rotation_steps(num_positions, self.group_sizes.largest, self.neighbor_window)
        if rows < needed:
            raise ValueError(
                f"params.rotation.cos_sin has {rows} rows; the {num_positions} positions of params.group_sizes need "
                f"{needed}."
            )


_LEAST = {"neighbor_window": 1, "log_scale_len": 0, "sliding_window": 0}
"""Counts of positions in `AttentionParams`, and the least that each may be."""


@dataclass(frozen=True)
class AttentionBatch:
    """The requests of one step: their new tokens lie one after another, their keys and values in cache blocks.

    Attributes:
        query_start_loc: `[num_reqs + 1]`, int32: request `r` has the tokens `query_start_loc[r]` to
            `query_start_loc[r + 1]`; its queries are its last positions.
        seq_lens: `[num_reqs]`, int32: tokens of the request in the cache, the new ones included.
        block_table: `[num_reqs, max_blocks]`, int32: the cache block of each `block_size` positions.
        slot_mapping: `[num_tokens]`, int64: `block * block_size + offset` of each new token; negative: not stored.
        max_query_len: At least the largest number of new tokens that a request has; what a GPU launches depends on it.
        max_seq_len: At least the largest of `seq_lens`; how fast a GPU is depends on it.
        decode_len: Requests with more new tokens are prefills, the others decodes; see `Kernels.decode_len`.
        query_start_loc_cpu: `query_start_loc` on the host, exact where prefills begin and end.
        seq_lens_cpu: `seq_lens` on the host, exact of prefills. A step without them waits for the device if it has
            prefills.
        prepared: What kernels worked out about the step, for all layers that are alike.

    Raises:
        ValueError: One of the lengths is out of its range.

    """

    query_start_loc: torch.Tensor
    seq_lens: torch.Tensor
    block_table: torch.Tensor
    slot_mapping: torch.Tensor
    max_query_len: int
    max_seq_len: int
    decode_len: int = 1
    query_start_loc_cpu: torch.Tensor | None = None
    seq_lens_cpu: torch.Tensor | None = None
    prepared: dict[Hashable, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("max_query_len", "max_seq_len", "decode_len"):
            if not 0 <= (value := getattr(self, name)) <= MAX_POSITIONS:
                raise ValueError(f"batch.{name} is {value}; it must be from 0 to {MAX_POSITIONS}.")


class Store(Protocol):
    """A host's operator that puts keys and values into a cache, as `LayerKernels.store` is to."""

    def __call__(
        self,
        key: torch.Tensor,
        value: torch.Tensor,
        key_cache: torch.Tensor,
        value_cache: torch.Tensor,
        slot_mapping: torch.Tensor,
    ) -> None:
        """Store; the scales of an fp8 cache are the layer's.

        Args:
            key: `[num_tokens, num_kv_heads, head_size]`.
            value: Like `key`.
            key_cache: `[num_blocks, block_size, num_kv_heads, head_size]`; of any dtype, an fp8 one is uint8.
            value_cache: Like `key_cache`.
            slot_mapping: As in `AttentionBatch`.

        """


class VarlenAttention(Protocol):
    """Attention as FlashAttention's `flash_attn_varlen_func` does it, a partial softmax's answer: `o`, log-sum-exp.

    Where it is causal, a sequence's last query sees all its keys and each before it one less; every query sees a key.
    Scale and soft cap are the layer's; its sinks are not known here.
    """

    def __call__(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        out: torch.Tensor,
        lse: torch.Tensor,
        lengths: "VarlenLengths",
        block_table: torch.Tensor | None,
        *,
        is_causal: bool,
        window: int,
    ) -> torch.Tensor:
        """Attend.

        Args:
            query: `[num_tokens, num_heads, head_size]`, all tokens of the sequences, one after another.
            key: In blocks `[num_blocks, block_size, num_kv_heads, head_size]`, or `[num_keys, num_kv_heads, head_size]`
                of one sequence.
            value: Like `key`.
            out: Like `query`, written.
            lse: `[num_heads, num_tokens]`, float32: room for the log-sum-exp.
            lengths: Of the sequences.
            block_table: `[num_seqs, max_blocks]`, or None: the keys are not in blocks.
            is_causal: Whether a query sees no key after its own, or all.
            window: If not 0, it sees the keys with `i - j < window` only.

        Returns:
            The natural logarithm of the sum of the scores' exponentials, like `lse` and perhaps in it.

        """


@dataclass(frozen=True)
class VarlenLengths:
    """The sequences of a `VarlenAttention`.

    Attributes:
        query_start_loc: `[num_seqs + 1]`, int32, from 0: where each one's queries begin.
        seq_lens: `[num_seqs]`, int32: how many keys each has.
        key_start_loc: `[num_seqs + 1]`, int32, from 0: where each one's keys begin, if they are not in blocks.
        max_query_len: The largest number of queries.
        max_seq_len: The largest number of keys.

    """

    query_start_loc: torch.Tensor
    seq_lens: torch.Tensor
    key_start_loc: torch.Tensor
    max_query_len: int
    max_seq_len: int


@dataclass(frozen=True)
class Host:
    """What whoever calls a layer's kernels knows, and has that is better than ours.

    Attributes:
        max_num_tokens: The most new tokens of a step.
        max_seq_len: The longest request.
        store: Puts keys and values into the cache; None: with torch's indexing.
        attention: FlashAttention, for keys of the queries' dtype, if it can do the layer; None: a kernel of ours.

    """

    max_num_tokens: int = MAX_POSITIONS
    max_seq_len: int = MAX_POSITIONS
    store: Store | None = None
    attention: VarlenAttention | None = None


NO_HOST = Host()
"""One of which nothing is known."""


class LayerKernels(ABC):
    """A kernel set's kernels for one layer. What follows from the layer alone is worked out once, and kept in here."""

    def warm_up(  # noqa: B027  # most sets compile nothing
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, kv_cache: torch.Tensor, out: torch.Tensor
    ) -> None:
        """Compile what any call needs, so that no call has to; without that the first one does.

        Args:
            query: Like those of the calls, in all but the number of tokens, which is 2 at least.
            key: Like `query`.
            value: Like `query`.
            kv_cache: The layer's.
            out: Like `query`; not written.

        """

    @abstractmethod
    def store(self, key: torch.Tensor, value: torch.Tensor, kv_cache: torch.Tensor, batch: AttentionBatch) -> None:
        """Put the keys and the values of the new tokens into the cache.

        Args:
            key: `[num_tokens, num_kv_heads, head_size]`, as the model rotated it.
            value: `[num_tokens, num_kv_heads, head_size]`.
            kv_cache: Written.
            batch: The step's requests.

        """

    @abstractmethod
    def attend(
        self,
        query: torch.Tensor,
        kv_cache: torch.Tensor,
        batch: AttentionBatch,
        out: torch.Tensor,
        workspace: torch.Tensor | None = None,
    ) -> None:
        """Causal attention of the new tokens over everything their requests have in the cache.

        Args:
            query: `[num_tokens, num_heads, head_size]`, rotated at true positions; `num_heads` is a multiple of
                `num_kv_heads`.
            kv_cache: Read; the new tokens have been stored.
            batch: The step's requests.
            out: `[num_tokens, num_heads, head_size]`, written.
            workspace: `[Kernels.workspace_size(...)]`, uint8, or None: room for what a call works out on its way,
                allocated in the call where it is not given.

        """


class Kernels(ABC):
    """A kernel set: what it makes of a layer, and what it says of itself.

    The cache has the queries' dtype, or is float8_e4m3fn (as such, or as the uint8 that vLLM makes of it). It is
    `[num_blocks, num_kv_heads, block_size, 2 * head_size]`; a kernel set owns what lies inside a block.

    Attributes:
        IS_CAPTURABLE: Whether a CUDA graph of decodes can be replayed with any other decodes: then the calls follow
            from shapes, and do not look at the batch from the host; nor does `store`, if the host has one.
        CACHE_LAYOUT: A name for what lies inside a block, in files too: sets and releases that have the same can read
            each other's blocks.
        VARIANT: What of the set serves on this machine, for people: an instruction set, a compiler's version.

    """

    IS_CAPTURABLE: bool = False
    CACHE_LAYOUT: str
    VARIANT: str

    def unsupported_device(self, device: torch.device, capability: tuple[int, int] | None) -> str | None:
        """Why the calls cannot run on `device`; None if they can.

        Args:
            device: Where the tensors will be.
            capability: Its compute capability, if it is an NVIDIA GPU and that is known.

        """
        return None

    def unsupported_head_size(self, head_size: int) -> str | None:
        """Why the calls do not take heads of this size; None if they do."""
        return None

    def decode_len(self, heads: int) -> int:
        """Up to how many new tokens a request is better done as a decode, `heads` query heads sharing a KV head."""
        return 1

    def workspace_size(
        self, num_heads: int, num_kv_heads: int, head_size: int, dtype: torch.dtype, device: torch.device, host: Host
    ) -> int:
        """How many bytes of workspace any call of such a layer needs; `dtype` is the queries'."""
        return 0

    @abstractmethod
    def prepare(self, params: AttentionParams, host: Host = NO_HOST) -> LayerKernels:
        """The kernels of a layer."""
