"""The numbers on the screen."""

from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

from rich.console import Console
from rich.measure import Measurement
from rich.table import Table

from ..method.positions import GroupSize
from .intervals import Estimate, mean
from .methods import Method
from .prompts import Row
from .search import Search
from .summary import block_losses, column, loss_ranges, order_cells, ruler_groups, ruler_score, share_kept, task_share
from .tuning import measure

Column = TypeVar("Column")


def fitting(
    table_of: Callable[[Sequence[Column]], Table], columns: Sequence[Column], console: Console
) -> Iterator[Table]:
    """A table, or several one below another: each has as many of the columns as the screen has room for.

    Args:
        table_of: Makes a table of some of the columns.
        columns: All of them, at least one.
        console: The screen.

    """
    while columns:
        count = len(columns)
        while count > 1 and _width(table_of(columns[:count]), console) > console.width:
            count -= 1
        yield table_of(columns[:count])
        columns = columns[count:]


def _width(table: Table, console: Console) -> int:
    """Of the table with nothing cut or wrapped but its title."""
    return Measurement.get(console, console.options.update(max_width=10_000), table).maximum


def passkey_table(rows: Sequence[Row], methods: Sequence[Method], title: str) -> Table:
    """The share of keys found and its interval: a row per length, a column per method."""
    key_counts = column(rows, "num_keys")
    table = Table(title=title)
    table.add_column("tokens", justify="right")
    keys = " / ".join(f"{count} key{'s' if count > 1 else ''}" for count in key_counts)
    for method in methods:
        table.add_column(f"{method.label}\n{keys}", justify="right")
    for length in column(rows, "length"):
        cells = []
        for method in methods:
            shares = (task_share(rows, "passkey", method.name, length=length, num_keys=count) for count in key_counts)
            cells.append(" / ".join(percent(share) if share else "-" for share in shares))
        table.add_row(f"{length:,}", *cells)
    return table


def loss_table(rows: Sequence[Row], methods: Sequence[Method], trained_length: int) -> Table:
    """The mean loss per token and its interval, within the trained length and past it."""
    table = Table(title="Loss per token (nats)")
    table.add_column("tokens", justify="right")
    for method in methods:
        table.add_column(method.label, justify="right")
    for begin, end in loss_ranges(trained_length, max(column(rows, "length"))):
        blocks = [block_losses(rows, method.name, begin, end) for method in methods]
        table.add_row(f"{begin:,} to {end:,}", *(plus_minus(mean(losses)) if losses else "-" for losses in blocks))
    return table


def order_table(rows: Sequence[Row], methods: Sequence[Method]) -> Table:
    """The share of orders told right and its interval: a row per length, distance and gap."""
    table = Table(title="Which was said first (a guess is right half the time)")
    for name in ("tokens", "before the end", "between"):
        table.add_column(name, justify="right")
    for method in methods:
        table.add_column(method.label, justify="right")
    for length, distance, gap in order_cells(rows):
        cell = {"length": length, "distance": distance, "gap": gap}
        shares = (task_share(rows, "order", method.name, **cell) for method in methods)
        table.add_row(
            f"{length:,}", f"{distance:,}", f"{gap:,}", *(percent(share) if share else "-" for share in shares)
        )
    return table


def ruler_table(rows: Sequence[Row], methods: Sequence[Method], trained_length: int) -> Table:
    """RULER's scores and their intervals: a row per task and length, and what is kept past the trained length."""
    lengths = column(rows, "length")
    table = Table(title="RULER: what was asked for and found")
    table.add_column("task")
    table.add_column("tokens", justify="right")
    for method in methods:
        table.add_column(method.label, justify="right")
    groups = ruler_groups(rows)
    for name, tasks in groups.items():
        known = {n: [ruler_score(rows, method.name, tasks, n) for method in methods] for n in lengths}
        asked = {n: scores for n, scores in known.items() if any(scores)}
        for length, scores in asked.items():
            cells = [percent(score) if score else "-" for score in scores]
            table.add_row(name if length == min(asked) else "", f"{length:,}", *cells)
        table.add_section()
    name, tasks = list(groups.items())[-1]
    past = [length for length in lengths if length > trained_length]
    kept = {n: [share_kept(rows, method.name, tasks, n, trained_length) for method in methods] for n in past}
    shares = {n: values for n, values in kept.items() if any(value is not None for value in values)}
    if shares:
        table.caption = f"kept: of the unmodified model's {name} within {trained_length:,}"
    for length, values in shares.items():
        cells = ["-" if value is None else f"{value:.0%}" for value in values]
        table.add_row("kept" if length == min(shares) else "", f"{length:,}", *cells)
    return table


def numbers_table(search: Search, is_loss: bool, groups: Sequence[GroupSize]) -> Table:
    """What every cell tried costs: a row per neighbor window, a column per group size in `groups`."""
    windows = sorted({window for group, window in search.costs if group in groups})
    title = f"{measure(is_loss).capitalize()}, lower is better"
    table = Table(title=title, caption="* the best  a the default")
    table.add_column("W \\ G", justify="right")
    for group in groups:
        table.add_column(str(group), justify="right")
    for window in windows:
        cells = []
        for group in groups:
            costs = search.costs.get((group, window))
            marks = "*" * ((group, window) == search.best) + "a" * ((group, window) == search.auto)
            cells.append(f"{mean(costs).value:.3f} {marks}".strip() if costs else "")
        table.add_row(f"{window:,}", *cells)
    return table


def distance_from_auto(search: Search) -> str:
    """How far the default is from the best cell, as a sentence."""
    (group_size, window), (auto_group_size, auto_window) = search.best, search.auto
    if search.best == search.auto:
        return f"The best of {len(search.costs)} tried is the default: G {group_size}, W {window}."
    above = search.auto_above_best()
    return (
        f"The best of {len(search.costs)} tried is G {group_size}, W {window}. The default, G "
        f"{auto_group_size}, W {auto_window}, is {above.value:.3f} above it ({above.low:.3f} to {above.high:.3f})"
        + (": no difference that these prompts can show." if above.low <= 0.0 else ".")
    )


def percent(share: Estimate) -> str:
    """A share and its interval, in percent."""
    return f"{share.value:.0%} ({share.low * 100:.0f}-{share.high * 100:.0f})"


def plus_minus(estimate: Estimate) -> str:
    """A number and half its interval, in letters that every terminal has."""
    return f"{estimate.value:.3f} +- {(estimate.high - estimate.low) / 2:.3f}"
