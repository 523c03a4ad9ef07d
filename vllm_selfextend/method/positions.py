"""The algebra of Self-Extend's positions: the paper's, and the group size that follows the query's position.

`L` is the trained length, `G` the group size, `W` the neighbor window (Jin et al., arXiv 2401.01325, section 3). A
model has met no relative position that reaches `L`. Group sizes are counted in eighths, `p = 8 G`.
"""

import numbers
from typing import TYPE_CHECKING, Any, Literal

from ..backends.limits import EIGHTHS, MAX_POSITIONS

if TYPE_CHECKING:
    import torch

GroupSize = int | Literal["auto"]
"""`G` for all positions, or that it follows from each."""

SIGNIFICANT_BITS = 4
"""Of an automatic group size, in eighths: steps of 1/8 up to 2, of 1/4 up to 4, and so on, eight to each doubling."""


def auto_reach(trained_length: int) -> int:
    """`T`, two thirds of `L`: relative positions of an automatic group size stay below it.

    A model has read the longest of its relative positions seldom, and finds less at them (`docs/numbers.md`).
    """
    return max(1, 2 * trained_length // 3)


def as_count(value: Any, least: int = 1) -> int | None:
    """`value` as an int if it is an integer, of NumPy too, from `least` to `MAX_POSITIONS`; None if it is not."""
    if not isinstance(value, numbers.Integral) or isinstance(value, bool):
        return None
    return count if least <= (count := int(value)) <= MAX_POSITIONS else None


def relative_position(query: int, key: int, eighths: int, neighbor_window: int) -> int:
    """The relative position that the query at `query`, of group size `eighths / 8`, gives the key at `key <= query`."""
    if query - key < neighbor_window:
        return query - key
    grouped_query, grouped_window, grouped_key = (EIGHTHS * x // eighths for x in (query, neighbor_window, key))
    return grouped_query + neighbor_window - grouped_window - grouped_key


def default_window(trained_length: int) -> int:
    """The neighbor window that nobody has chosen: a quarter of `L`, at most 1,024 tokens."""
    return min(max(trained_length // 4, 1), 1024)


def largest_auto_window(trained_length: int) -> int:
    """The largest neighbor window with which group sizes may be automatic: it leaves a quarter of `T` to far keys.

    0 where the trained length is so small that there is none.
    """
    reach = auto_reach(trained_length)
    return max(0, reach - 1 - -(-reach // 4))


def group_sizes(
    num_positions: int, trained_length: int, neighbor_window: int, group_size: GroupSize, exact_len: int, first: int = 0
) -> "torch.Tensor":
    """The group size of the query at each position, in eighths: `[num_positions]`, int32, never falling.

    Args:
        num_positions: How many positions.
        trained_length: `L`.
        neighbor_window: `W`; with "auto" at most `largest_auto_window`.
        group_size: `G` for all positions from `exact_len` on; "auto" is the least at which no relative position reaches
            `T` (`auto_reach`), rounded up to `SIGNIFICANT_BITS`.
        exact_len: Positions below it have group size 1: the unmodified model.
        first: The first of the positions.

    `p S >= 8 (i - W)` with `S = T - W - 1` keeps the relative positions of `i` below `T`, since `floor(a) - floor(b) <=
    ceil(a - b)`.

    """
    import torch  # for whoever calls it: the module is read where torch has not been loaded

    positions = torch.arange(first, first + num_positions)
    if group_size != "auto":
        eighths = torch.full_like(positions, EIGHTHS * group_size)
    else:
        # A wider window is allowed where no text goes past L.
        far = max(1, auto_reach(trained_length) - neighbor_window - 1)
        eighths = -(-EIGHTHS * (positions - neighbor_window) // far)
        eighths = eighths.clamp(min=EIGHTHS + 1)
        # frexp says how many bits they have.
        dropped = (torch.frexp(eighths.double()).exponent.long() - SIGNIFICANT_BITS).clamp(min=0)
        eighths = -(-eighths >> dropped) << dropped
    eighths[positions < exact_len] = EIGHTHS
    return eighths.int()


def capacity(trained_length: int, group_size: int, neighbor_window: int) -> int:
    """The longest sequence, in tokens, whose relative positions stay below `trained_length` with one group size.

    `(L - W) * G + W` where `G` divides `W`. Needs `neighbor_window <= trained_length`.
    """
    grouped = (trained_length - neighbor_window + neighbor_window // group_size) * group_size
    return max(grouped, neighbor_window)


def smallest_group_size(trained_length: int, neighbor_window: int, length: int) -> int | None:
    """The smallest group size whose capacity is at least `length` tokens; None if no group size is enough."""
    if length <= trained_length:
        return 1
    if neighbor_window >= trained_length:
        return None
    # W // G adds less than one group to (L - W) * G, so only this one and perhaps the next can be the smallest.
    group_size = max(2, (length - neighbor_window) // (trained_length - neighbor_window))
    while capacity(trained_length, group_size, neighbor_window) < length:
        group_size += 1
    return group_size
