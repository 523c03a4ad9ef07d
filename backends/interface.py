"""What a set of kernels is given and what it offers. Tensors only: nothing here knows vLLM.

Self-Extend (Jin et al., ICML 2024, arXiv 2401.01325) gives a query at position `i` and a key at position `j`

    the relative position  i - j                               if i - j < W   (neighbor attention)
                           i // G + W - W // G - j // G        otherwise      (grouped attention)

with the group size `G` and the neighbor window `W`; one softmax runs over both. Queries and keys reach a kernel already
rotated at their true positions: `q = R(i) q0`, `k = R(j) k0`. Rotations add, so with `d(p) = p - p // G`

    the cache holds         k' = R(-d(j)) k                    (the key at its group position, whoever reads it)
    grouped score           (R(W - W // G - d(i)) q) . k'
    neighbor score          q . (R(d(j)) k')
"""

import functools
from dataclasses import dataclass
from typing import Protocol

import torch


@dataclass(frozen=True)
class Rotation:
    """The rotary embedding of a layer, as far as re-rotating needs it.

    Attributes:
        cos_sin: `[num_steps, rotary_dim]`, float32 (float64 for an oracle): row `t` holds the cosines, then the sines,
            of `t * inv_freq`. `num_steps` is larger than every `d(p)` and than `W - W // G`.
        interleaved: True if dimensions `2n` and `2n + 1` form a pair (GPT-J), False if `n` and `n + rotary_dim / 2` do
            (GPT-NeoX).

    """

    cos_sin: torch.Tensor
    interleaved: bool = False


@dataclass(frozen=True)
class AttentionParams:
    """What one attention layer computes.

    Attributes:
        scale: Multiplies every score.
        group_size: `G`, at least 1; 1 is ordinary attention.
        neighbor_window: `W`, in tokens, at least 1.
        exact_len: Queries at positions below it treat every key as a neighbor: the unmodified model. 0 is off.
        log_scale_len: If not 0, queries are multiplied by `max(1, ln(i + 1) / ln(log_scale_len))`.
        soft_cap: If not 0, scores become `soft_cap * tanh(score / soft_cap)`.
        sliding_window: If not 0, a query sees the keys with `i - j < sliding_window` only.
        rotation: Needed where `group_size` is above 1.
        sinks: `[num_heads]` or None: a logit a head that takes part in the softmax and adds nothing to the output.
        k_scale: An 8-bit cache holds keys divided by it.
        v_scale: An 8-bit cache holds values divided by it.

    """

    scale: float
    group_size: int = 1
    neighbor_window: int = 1
    exact_len: int = 0
    log_scale_len: int = 0
    soft_cap: float = 0.0
    sliding_window: int = 0
    rotation: Rotation | None = None
    sinks: torch.Tensor | None = None
    k_scale: float = 1.0
    v_scale: float = 1.0

    def required_rotation(self) -> Rotation:
        """The rotation, for a layer that groups positions.

        Raises:
            ValueError: It is None.

        """
        if self.rotation is None:
            raise ValueError(f"group_size is {self.group_size}, and re-rotating needs params.rotation, which is None.")
        return self.rotation


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
        workspace: `[Kernels.workspace_size]`, float32, or None: room for what a call works out on its way, allocated in
            the call where it is not given.

    """

    query_start_loc: torch.Tensor
    seq_lens: torch.Tensor
    block_table: torch.Tensor
    slot_mapping: torch.Tensor
    max_query_len: int
    workspace: torch.Tensor | None = None

    @functools.cached_property
    def positions(self) -> torch.Tensor:
        """`[num_tokens]`, int64: the position of each new token in its request. On a GPU this waits for the device."""
        query_lens = self.query_start_loc.diff().long()
        # A token's position is its index in the step, moved by what its request has before the step's first token.
        moved = self.seq_lens - query_lens - self.query_start_loc[:-1]
        moved = torch.repeat_interleave(moved, query_lens)
        return torch.arange(len(moved), device=moved.device) + moved


class Kernels(Protocol):
    """The two calls every kernel set offers, what they take, and what they need; a module can be one.

    The cache has the queries' dtype, or is float8_e4m3fn (as such, or as the uint8 that vLLM makes of it). It is
    `[num_blocks, num_kv_heads, block_size, 2 * head_size]`; a kernel set owns what lies inside a block, so what one set
    stored only the same set can read.
    """

    def supports_head_size(self, head_size: int) -> bool:
        """Whether the calls take heads of this size."""
        ...

    def workspace_size(self, num_heads: int, num_kv_heads: int, head_size: int, device: torch.device) -> int:
        """How many float32 numbers of `AttentionBatch.workspace` any call of such a layer needs."""
        ...

    def store_kv(
        self,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        batch: AttentionBatch,
        params: AttentionParams,
    ) -> None:
        """Put the keys, rotated to their group positions, and the values of the new tokens into the cache.

        Args:
            key: `[num_tokens, num_kv_heads, head_size]`, rotated at true positions.
            value: `[num_tokens, num_kv_heads, head_size]`.
            kv_cache: Written.
            batch: The step's requests.
            params: The layer.

        """
        ...

    def attention(
        self,
        query: torch.Tensor,
        kv_cache: torch.Tensor,
        batch: AttentionBatch,
        params: AttentionParams,
        out: torch.Tensor,
    ) -> None:
        """Causal attention of the new tokens over everything their requests have in the cache.

        Args:
            query: `[num_tokens, num_heads, head_size]`, rotated at true positions; `num_heads` is a multiple of
                `num_kv_heads`.
            kv_cache: Read; the new tokens have been stored.
            batch: The step's requests.
            params: The layer.
            out: `[num_tokens, num_heads, head_size]`, written.

        """
        ...
