"""How a step's prefills are taken apart into calls of ordinary attention; integers only, on the host.

Rows within the trained length are ordinary, causal attention over the paged cache. A row past it sees its neighbors by
a sliding window of `W` over the paged cache, and its grouped keys `0 .. i - W` in a buffer, turned for the group size
of its query. Keys come in slabs of what the buffer holds, values are copied once a slab, keys are turned once for each
group size that meets the slab. No call has a row without keys: FlashAttention's versions differ in what they make of
that.
"""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import NamedTuple

from ..interface import GroupSizes
from ..limits import EIGHTHS


class Kind(Enum):
    """What is done to queries before they meet keys, and which keys those are."""

    PLAIN = "as they are, all keys"
    SCALED = "scaled, all keys"
    GROUPED = "scaled, neighbors; turned, the others"


class Prefill(NamedTuple):
    """A request's new tokens, from `first_token` of the step and `first_position` of the request on."""

    request: int
    first_token: int
    first_position: int
    num_rows: int


class Layer(NamedTuple):
    """What of a layer and its buffers the calls follow from.

    Attributes:
        group_sizes: None if it groups nothing.
        neighbor_window: `W`.
        log_scale_len: As in `AttentionParams`.
        num_rows: How many rows the buffers hold.
        num_keys: How many keys the buffer holds.

    """

    group_sizes: GroupSizes | None
    neighbor_window: int
    log_scale_len: int
    num_rows: int
    num_keys: int


class Part(NamedTuple):
    """Rows of one group size over some of a slab's keys.

    Attributes:
        row: The first one in its span.
        num_rows: How many.
        request: Whose they are.
        eighths: Their group size.
        first_key: The slab's.
        num_keys: How many of the slab's keys the last row sees.
        is_causal: Whether each row before it sees one less, or as many.
        num_turned: How many of the slab's keys are to be turned first; 0: they have been.
        num_copied: How many of its values are to be copied first.

    """

    row: int
    num_rows: int
    request: int
    eighths: int
    first_key: int
    num_keys: int
    is_causal: bool
    num_turned: int
    num_copied: int


@dataclass
class Span:
    """Tokens of one kind, one after another in the step, of one or more requests."""

    kind: Kind
    prefills: list[Prefill]
    parts: list[Part] = field(default_factory=list)

    @property
    def first_token(self) -> int:
        return self.prefills[0].first_token

    @property
    def num_rows(self) -> int:
        last = self.prefills[-1]
        return last.first_token + last.num_rows - self.first_token

    @property
    def seq_lens(self) -> list[int]:
        """How many keys each request's last row has, its own among them."""
        return [one.first_position + one.num_rows for one in self.prefills]


def find_prefills(query_start_loc: Sequence[int], seq_lens: Sequence[int], decode_len: int) -> list[Prefill]:
    """The requests with more than `decode_len` new tokens."""
    return [
        Prefill(request, begin, seq_len - (end - begin), end - begin)
        for request, ((begin, end), seq_len) in enumerate(
            zip(itertools.pairwise(query_start_loc), seq_lens, strict=True)
        )
        if end - begin > decode_len
    ]


def take_apart(prefills: list[Prefill], layer: Layer) -> list[Span]:
    """All calls of a step, in their order."""
    spans: list[Span] = []
    for prefill in prefills:
        for kind, begin, end in _kinds(prefill.first_position, prefill.num_rows, layer):
            for first in range(begin, end, layer.num_rows):
                token = prefill.first_token + first - prefill.first_position
                one = Prefill(prefill.request, token, first, min(layer.num_rows, end - first))
                if not spans or not _continues(spans[-1], kind, one, layer):
                    spans.append(Span(kind, []))
                span = spans[-1]
                if kind is Kind.GROUPED:
                    row = span.num_rows if span.prefills else 0
                    span.parts.extend(_parts(one, row, layer))
                span.prefills.append(one)
    return spans


def _continues(span: Span, kind: Kind, one: Prefill, layer: Layer) -> bool:
    """Whether a request's rows can be done together with those before it."""
    last = span.prefills[-1]
    return (
        span.kind is kind
        and one.num_rows > 1  # of several sequences of one query FlashAttention 2 mixes up the log-sum-exps
        and last.request + 1 == one.request
        and last.first_token + last.num_rows == one.first_token
        and span.num_rows + one.num_rows <= layer.num_rows
    )


def _kinds(first_position: int, num_rows: int, layer: Layer) -> Iterator[tuple[Kind, int, int]]:
    """The positions of each kind: group sizes never fall, and queries are scaled from some length on."""
    end = first_position + num_rows
    scaled = grouped = end
    if layer.log_scale_len:
        scaled = min(max(first_position, layer.log_scale_len), end)
    if layer.group_sizes is not None:
        above = (begin for begin, _, eighths in layer.group_sizes.runs(first_position, end) if eighths > EIGHTHS)
        grouped = next(above, end)
    for kind, begin, stop in (
        (Kind.PLAIN, first_position, min(scaled, grouped)),
        (Kind.SCALED, min(scaled, grouped), grouped),
        (Kind.GROUPED, grouped, end),
    ):
        if begin < stop:
            yield kind, begin, stop


def _parts(prefill: Prefill, row: int, layer: Layer) -> Iterator[Part]:
    """What a request's rows, the first of them `row` of its span, do with their grouped keys."""
    sizes, window = layer.group_sizes, layer.neighbor_window
    if sizes is None:
        return
    end = prefill.first_position + prefill.num_rows
    for first_key in range(0, end - window, layer.num_keys):
        num_keys = min(layer.num_keys, end - window - first_key)
        # A row at `i` sees the slab's keys up to `i - W`: first one more each row, then all of them.
        sees_any, sees_all = first_key + window, first_key + num_keys + window
        begin = max(prefill.first_position, sees_any)
        runs = [
            (begin, stop, eighths, is_causal)
            for is_causal, rows in ((True, (begin, min(sees_all, end))), (False, (max(begin, sees_all), end)))
            if rows[0] < rows[1]
            for begin, stop, eighths in sizes.runs(*rows)
        ]
        num_copied = num_keys
        for eighths, alike in itertools.groupby(runs, key=lambda run: run[2]):
            several = list(alike)
            seen = [stop - sees_any if is_causal else num_keys for _, stop, _, is_causal in several]
            num_turned = max(seen)
            for (begin, stop, _, is_causal), keys in zip(several, seen, strict=True):
                yield Part(
                    row + begin - prefill.first_position,
                    stop - begin,
                    prefill.request,
                    eighths,
                    first_key,
                    keys,
                    is_causal and stop - begin > 1,
                    num_turned,
                    num_copied,
                )
                num_turned = num_copied = 0
