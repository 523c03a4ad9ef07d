"""`enable_flash_attention=True`: the package flash-attn attends, in as many calls as a step's softmax has parts.

Each part is what FlashAttention does: the last of some tokens' queries over all of their keys, causal. Of a sequence of
`n` tokens, the queries of group size 1 see the keys below the first of the others; the others see the last `W` keys,
through a window, and those at `W` and later, which have one group size up to position `m`, the first `m - W` keys,
turned by it. The outputs are put together by their log-sum-exp.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import pad

from ..backends.interface import AttentionParams, lag
from ..backends.limits import EIGHTHS
from ..backends.reference import log_scaled
from .step import Step

MAX_HEAD_SIZE = 256
"""FlashAttention 2's (`csrc/flash_attn/flash_api.cpp`); it pads sizes that are not multiples of 8 itself."""


@dataclass(frozen=True)
class Part:
    """Some of a step's queries and the keys that they see, each sequence's one after another.

    Attributes:
        rows: What picks the queries out of `[batch, rows]`, an index.
        keys: What picks the keys out of `[batch, keys]`.
        cu_seqlens_q: `[batch + 1]`, int32: where each sequence's queries begin.
        cu_seqlens_k: The same of keys.
        max_seqlen_q: The most queries of a sequence.
        max_seqlen_k: The most keys.
        window_size: How many keys before and after its own token a query sees; -1: all.
        is_grouped: Whether queries, all of one group size, and keys are turned by it.

    """

    rows: tuple[Any, ...]
    keys: tuple[Any, ...]
    cu_seqlens_q: torch.Tensor
    cu_seqlens_k: torch.Tensor
    max_seqlen_q: int
    max_seqlen_k: int
    window_size: tuple[int, int]
    is_grouped: bool


@dataclass
class FlashAttention:
    """The package.

    Attributes:
        varlen_func: `flash_attn.flash_attn_varlen_func`.
        device_type: Where it runs.
        dtypes: What it takes.

    """

    varlen_func: Callable[..., Any]
    device_type: str = "cuda"
    dtypes: tuple[torch.dtype, ...] = (torch.float16, torch.bfloat16)

    def unusable(self, tensor: torch.Tensor) -> str | None:
        """Why it does not take a model of such weights, or such queries; None if it does."""
        if tensor.device.type == self.device_type and tensor.dtype in self.dtypes:
            return None
        return (
            f"FlashAttention is for float16 or bfloat16 on a GPU, and this model is in {tensor.dtype} on "
            f"{tensor.device}: load it with dtype=torch.bfloat16 and move it to a GPU before SelfExtend.apply, or "
            "leave enable_flash_attention False."
        )

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # how many queries a part has is read from the mask
    def attend(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, step: Step, params: AttentionParams
    ) -> torch.Tensor:
        """Attend; what a query that stands for padding gets may be anything finite.

        Args:
            query: `[batch, num_heads, rows, head_size]`, rotated at true positions.
            key: Like `query`, `[batch, num_kv_heads, keys, head_size]`.
            value: Like `key`.
            step: Where queries and keys are.
            params: The layer; the numbers are the same at every call.

        Returns:
            `[batch, rows, num_heads, head_size]`.

        Raises:
            ValueError: FlashAttention does not take these tensors, or the layer has no group sizes.

        """
        if reason := self.unusable(query):
            raise ValueError(reason)
        if query.shape[-1] > MAX_HEAD_SIZE:
            raise ValueError(
                f"the head size is {query.shape[-1]}, and FlashAttention takes up to {MAX_HEAD_SIZE}: leave "
                "enable_flash_attention False."
            )
        sizes, rotation = params.group_sizes, params.rotation
        if sizes is None or rotation is None:
            raise ValueError("params.group_sizes is None: ordinary attention needs no parts.")
        if "parts" not in step.prepared:
            step.prepared["parts"] = parts(step, sizes.eighths, params.neighbor_window, len(query))
        rows, wide = query.transpose(1, 2), torch.promote_types(query.dtype, torch.float32)
        query_pos, key_pos = step.query_pos.expand(rows.shape[:2]), step.key_pos.expand(len(key), -1)
        output = rows.new_zeros(rows.shape, dtype=wide)
        lse = output.new_full(rows.shape[:3], float("-inf"))
        for part in step.prepared["parts"]:
            part_query, part_pos = _pick(rows, part.rows).to(wide), _pick(query_pos, part.rows)
            part_query = log_scaled(part_query, part_pos, params)
            part_key = _pick(key.transpose(1, 2), part.keys)
            if part.is_grouped:
                eighths = sizes.eighths[part_pos]
                steps = lag(torch.full_like(eighths, params.neighbor_window), eighths) - lag(part_pos, eighths)
                part_query = rotation.turn(part_query, steps[:, None])
                steps = -lag(_pick(key_pos, part.keys), eighths[:1])
                part_key = rotation.turn(part_key.to(wide), steps[:, None])
            part_output, part_lse, _ = self.varlen_func(
                part_query.to(query.dtype),
                part_key.to(query.dtype),
                _pick(value.transpose(1, 2), part.keys),
                part.cu_seqlens_q,
                part.cu_seqlens_k,
                part.max_seqlen_q,
                part.max_seqlen_k,
                softmax_scale=params.scale,
                causal=True,
                window_size=part.window_size,
                softcap=params.soft_cap,
                return_attn_probs=True,
            )
            before, before_lse = output[part.rows], lse[part.rows]
            part_output, part_lse = part_output.view_as(before), part_lse.T.reshape(before_lse.shape)
            merged = torch.logaddexp(before_lse, part_lse)
            share, part_share = (before_lse - merged).exp()[..., None], (part_lse - merged).exp()[..., None]
            output[part.rows] = before * share + part_output * part_share
            lse[part.rows] = merged
        if params.sinks is not None:
            output *= torch.sigmoid(lse - params.sinks.to(wide))[..., None]
        return output.to(query.dtype)


def find_flash_attention(implementation: str) -> FlashAttention:
    """The package flash-attn, under the name that the authors' `apply` has for it.

    Raises:
        ValueError: Another implementation is asked for, or the package is not there.

    """
    if implementation != "flash_attn":
        raise ValueError(
            f"flash_attention_impl is {implementation!r}; it must be 'flash_attn' (the authors' 'triton' is a copy of "
            "FlashAttention that is not needed any more)."
        )
    try:
        from flash_attn import flash_attn_varlen_func  # type: ignore[import-not-found]
    except ImportError as error:
        raise ValueError(
            f"enable_flash_attention is True, and the package flash-attn cannot be imported ({error}): "
            "pip install 'flash-attn>=2.6', or leave it False."
        ) from error
    return FlashAttention(flash_attn_varlen_func)


def parts(step: Step, eighths: torch.Tensor, window: int, batch: int) -> list[Part]:
    """The parts of a step's softmax: a sequence's query has at least one of them, and in each at least one key."""
    first, length, tokens = _sequences(step)
    zero = torch.zeros_like(length)
    num_exact, runs = _runs(eighths, step.query_pos)
    exact_len = length.clamp(max=num_exact)
    near_from = torch.maximum(first, exact_len)
    spans = [
        # The positions of queries and of keys, from and to; how many keys a query sees; whether they are grouped.
        ((first, exact_len), (zero, exact_len), None, False),
        ((near_from, length), ((near_from - window + 1).clamp(min=0), length), window, False),
    ]
    for begin, end in runs:
        run_end = length.clamp(max=end)
        spans.append(((first.clamp(min=max(begin, window)), run_end), (zero, run_end - window), None, True))
    found = []
    for (row_from, row_to), (key_from, key_to), num_seen, is_grouped in spans:
        row_lens = (row_to - row_from).clamp(min=0)
        key_lens = (key_to - key_from).where(row_lens > 0, 0)
        if not row_lens.any():
            continue
        rows: tuple[Any, ...]
        keys: tuple[Any, ...]
        if tokens is None:
            start = int(first)
            rows = slice(None), slice(int(row_from) - start, int(row_to) - start)
            keys = slice(None), slice(int(key_from), int(key_to))
        else:
            rows = _indices(tokens[0], step.query_pos, row_from, row_lens)
            keys = _indices(tokens[1], step.key_pos, key_from, key_lens)
        row_lens, key_lens = row_lens.expand(batch), key_lens.expand(batch)
        cu_seqlens_q, cu_seqlens_k = (
            pad(lens.cumsum(0), (1, 0)).to(step.query_pos.device, torch.int32) for lens in (row_lens, key_lens)
        )
        found.append(
            Part(
                rows=rows,
                keys=keys,
                cu_seqlens_q=cu_seqlens_q,
                cu_seqlens_k=cu_seqlens_k,
                max_seqlen_q=int(row_lens.max()),
                max_seqlen_k=int(key_lens.max()),
                window_size=(-1, -1) if num_seen is None else (num_seen - 1, 0),
                is_grouped=is_grouped,
            )
        )
    return found


def _runs(eighths: torch.Tensor, query_pos: torch.Tensor) -> tuple[int, list[tuple[int, int]]]:
    """How many positions have group size 1, and from where to where those of each other one lie that queries have."""
    found = eighths[query_pos].unique()
    found = torch.cat([found.new_tensor([EIGHTHS]), found[found > EIGHTHS]])
    begins, ends = (torch.searchsorted(eighths, found, right=right).tolist() for right in (False, True))
    return ends[0], list(zip(begins[1:], ends[1:], strict=True))


def _sequences(step: Step) -> tuple[torch.Tensor, torch.Tensor, tuple[torch.Tensor, torch.Tensor] | None]:
    """Of each sequence the position of its first query and its length `[batch or 1]`, on the CPU.

    Also which queries `[batch, rows]` and which keys `[batch, keys]` are tokens, not padding; None: all are.
    """
    if step.hidden is None:
        first, last = step.query_pos[0, [0, -1]].cpu()
        return first[None], last[None] + 1, None
    seen = ~step.hidden
    num_seen = seen.sum(2)
    # A query that sees no more than the one before stands for padding.
    is_query = num_seen.diff(dim=1, prepend=torch.zeros_like(num_seen[:, :1])) > 0
    length = num_seen[:, -1]
    first, length = torch.stack([length - is_query.sum(1), length]).cpu()
    return first, length, (is_query, seen[:, -1])


def _indices(
    is_token: torch.Tensor, positions: torch.Tensor, begin: torch.Tensor, lens: torch.Tensor
) -> tuple[torch.Tensor, ...]:
    """Where the tokens `[batch, tokens]` are that lie at `lens` positions from `begin` `[batch]` on."""
    offsets = positions - begin.to(positions.device)[:, None]
    return (is_token & (offsets >= 0) & (offsets < lens.to(positions.device)[:, None])).nonzero(as_tuple=True)


def _pick(tensor: torch.Tensor, where: tuple[Any, ...]) -> torch.Tensor:
    """Out of `[batch, tokens, ...]`: `[picked tokens, ...]`, copied only if they do not lie one after another."""
    return tensor[where].reshape(-1, *tensor.shape[2:])
