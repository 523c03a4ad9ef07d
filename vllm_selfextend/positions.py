"""The algebra of Self-Extend's positions: plain integers, no tensors.

`L` is the trained length, `G` the group size, `W` the neighbor window (Jin et al., arXiv 2401.01325, section 3). A
model reads a sequence well while no relative position reaches `L`.
"""

import numbers
from fractions import Fraction
from typing import Any

from .backends.limits import MAX_POSITIONS


def as_count(value: Any, least: int = 1) -> int | None:
    """`value` as an int if it is an integer, of NumPy too, from `least` to `MAX_POSITIONS`; None if it is not."""
    if not isinstance(value, numbers.Integral) or isinstance(value, bool):
        return None
    return count if least <= (count := int(value)) <= MAX_POSITIONS else None


def relative_position(query: int, key: int, group_size: int, neighbor_window: int) -> int:
    """The relative position that the query at position `query` gives the key at position `key <= query`."""
    if query - key < neighbor_window:
        return query - key
    return query // group_size + neighbor_window - neighbor_window // group_size - key // group_size


def capacity(trained_length: int, group_size: int, neighbor_window: int) -> int:
    """The longest sequence, in tokens, whose relative positions stay below `trained_length`.

    `(L - W) * G + W` where `G` divides `W`. Needs `neighbor_window <= trained_length`.
    """
    grouped = (trained_length - neighbor_window + neighbor_window // group_size) * group_size
    return max(grouped, neighbor_window)


def rule_share(trained_length: int, group_size: int, neighbor_window: int, length: int) -> Fraction:
    """`(W + (N - W) / G) / L`, exactly: the authors find good answers below about 1/2 to 2/3."""
    beyond = max(0, length - neighbor_window)
    return (neighbor_window + Fraction(beyond, group_size)) / trained_length


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
