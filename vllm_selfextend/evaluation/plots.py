"""The numbers as pictures: heat maps of depth over length, losses over position."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from matplotlib.colors import Normalize
from matplotlib.figure import Figure

from ..method.positions import GroupSize
from .intervals import Estimate, mean
from .loss import BLOCK
from .methods import Method
from .prompts import Row
from .ruler import RULER_TASKS
from .summary import block_losses, column, group_sizes_of, ruler_groups, ruler_score, task_share

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLORS = "cividis"  # told apart by people with any color vision, and in print
CURVE_STEP = 1024
"""Positions whose losses make one point of a curve, where the text has several of them."""


def plot_passkeys(rows: Sequence[Row], methods: Sequence[Method], trained_length: int, path: Path) -> None:
    """A heat map of the keys found, depth over length: a panel per method and number of keys."""
    rows = [row for row in rows if row["task"] == "passkey"]
    lengths, depths, key_counts = (column(rows, key) for key in ("length", "depth", "num_keys"))
    size = 1.6 + 2.9 * len(methods), 1.1 + 2.3 * len(key_counts)
    figure = Figure(figsize=size, layout="constrained")
    grid = figure.subplots(len(key_counts), len(methods), squeeze=False, sharex=True, sharey=True)
    for panels, num_keys in zip(grid, key_counts, strict=True):
        for axes, method in zip(panels, methods, strict=True):
            shares = [
                [
                    _value(task_share(rows, "passkey", method.name, length=n, depth=depth, num_keys=num_keys))
                    for n in lengths
                ]
                for depth in depths
            ]
            _heat_map(axes, shares, lengths, trained_length)
            keys = f", {num_keys} key{'s' if num_keys > 1 else ''}" if len(key_counts) > 1 else ""
            axes.set_title(f"{method.label}{keys}")
        labelled = range(0, len(depths), max(1, len(depths) // 5))
        panels[0].set_yticks(labelled, [f"{depths[i]:.0%}" for i in labelled])
        panels[0].set_ylabel("depth of the key")
    for axes in grid[-1]:
        axes.set_xticks(range(len(lengths)), [_short(n) for n in lengths])
        axes.set_xlabel("tokens")
    bar = figure.colorbar(grid[0][0].images[0], ax=grid, format=lambda value, _: f"{value:.0%}")
    bar.set_label("keys found")
    figure.suptitle(f"Passkeys; trained on {trained_length:,} tokens (dashed line)", fontsize="medium")
    figure.savefig(path, dpi=150)


def plot_losses(rows: Sequence[Row], methods: Sequence[Method], trained_length: int, path: Path) -> None:
    """The mean loss per token over position, a curve per method."""
    rows = [row for row in rows if row["task"] == "loss"]
    length = max(column(rows, "length"))
    step = max(BLOCK, min(CURVE_STEP, length // 8))
    figure = Figure(figsize=(8.0, 4.0), layout="constrained")
    axes = figure.subplots()
    for method in methods:
        steps = ((begin, block_losses(rows, method.name, begin, begin + step)) for begin in range(0, length, step))
        curve = [(begin + step / 2, mean(losses).value) for begin, losses in steps if losses]
        style: dict[str, Any] = {"color": method.color, "marker": method.marker}
        axes.plot(*zip(*curve, strict=True), label=method.label, markersize=4, linewidth=1.5, **style)
    axes.axvline(trained_length, color="gray", linestyle="--", label=f"trained length, {trained_length:,} tokens")
    axes.set(xlabel="position", ylabel="loss per token (nats)")
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=150)


def plot_order(rows: Sequence[Row], methods: Sequence[Method], trained_length: int, path: Path) -> None:
    """Orders told right over distance, a curve per method with its intervals: a panel per length and gap."""
    rows = [row for row in rows if row["task"] == "order"]
    lengths, gaps, distances = (column(rows, key) for key in ("length", "gap", "distance"))
    figure = Figure(figsize=(1.0 + 2.8 * len(gaps), 1.1 + 2.3 * len(lengths)), layout="constrained")
    grid = figure.subplots(len(lengths), len(gaps), squeeze=False, sharex=True, sharey=True)
    for panels, length in zip(grid, lengths, strict=True):
        for axes, gap in zip(panels, gaps, strict=True):
            shares = {
                method: [task_share(rows, "order", method.name, length=length, distance=d, gap=gap) for d in distances]
                for method in methods
            }
            _curves(axes, shares)
            axes.axhline(0.5, color="gray", linestyle=":")
            axes.set_title(f"{_short(length)} tokens, {gap:,} between", fontsize="medium")
            axes.set_xticks(range(len(distances)), [f"{d:,}" for d in distances])
        panels[0].set_ylabel("told right")
    for axes in grid[-1]:
        axes.set_xlabel("tokens before the end")
    _legend(figure, f"Which was said first; trained on {trained_length:,} tokens, a guess is right half the time")
    figure.savefig(path, dpi=150)


def plot_ruler(rows: Sequence[Row], methods: Sequence[Method], trained_length: int, path: Path) -> None:
    """RULER's scores over length, a curve per method with its intervals: a panel per task, and their mean."""
    rows = [row for row in rows if row["task"] in RULER_TASKS]
    groups, lengths = ruler_groups(rows), column(rows, "length")
    columns = min(len(groups), 4)
    lines = -(-len(groups) // columns)
    figure = Figure(figsize=(1.0 + 2.8 * columns, 1.1 + 2.3 * lines), layout="constrained")
    grid = figure.subplots(lines, columns, squeeze=False, sharex=True, sharey=True)
    panels = list(grid.flat)
    for axes, (name, tasks) in zip(panels, groups.items(), strict=False):
        _curves(axes, {method: [ruler_score(rows, method.name, tasks, n) for n in lengths] for method in methods})
        axes.axvline(sum(length <= trained_length for length in lengths) - 0.5, color="gray", linestyle="--")
        axes.set_title(name, fontsize="medium")
        axes.set_xticks(range(len(lengths)), [_short(n) for n in lengths])
    for axes in panels[len(groups) :]:
        axes.set_axis_off()
    _legend(figure, f"RULER; trained on {trained_length:,} tokens (dashed line)")
    figure.savefig(path, dpi=150)


def plot_numbers(
    costs: dict[tuple[GroupSize, int], float],
    auto: tuple[GroupSize, int],
    best: tuple[GroupSize, int],
    label: str,
    path: Path,
    *,
    is_share: bool,
) -> None:
    """A heat map over group size and neighbor window; cells that were not tried stay empty."""
    groups, windows = group_sizes_of(costs), sorted({w for _, w in costs})
    figure = Figure(figsize=(2.2 + 0.75 * len(groups), 1.6 + 0.5 * len(windows)), layout="constrained")
    axes = figure.subplots()
    values = [[costs.get((g, w), float("nan")) for g in groups] for w in windows]
    low, high = (0.0, 1.0) if is_share else (min(costs.values()), max(costs.values()))
    image = axes.imshow(values, cmap=COLORS, norm=Normalize(low, high), aspect="auto", origin="lower")
    for (group, window), cost in costs.items():
        marks = [name for name, numbers in (("best", best), ("auto", auto)) if numbers == (group, window)]
        label_lines = "\n".join([f"{cost:.3f}", *marks])
        text = axes.text(groups.index(group), windows.index(window), label_lines, fontsize="small")
        text.set(ha="center", va="center", color="black" if cost > (low + high) / 2 else "white")
    axes.set_xticks(range(len(groups)), [str(g) for g in groups])
    axes.set_yticks(range(len(windows)), [f"{w:,}" for w in windows])
    axes.set(xlabel="group size G", ylabel="neighbor window W (tokens)")
    figure.colorbar(image, ax=axes).set_label(label)
    figure.savefig(path, dpi=150)


def _curves(axes: "Axes", estimates: Mapping[Method, Sequence[Estimate | None]]) -> None:
    """A curve of shares per method with their intervals, side by side, or equal ones would hide each other."""
    for place, (method, values) in enumerate(estimates.items()):
        points = [(at, estimate) for at, estimate in enumerate(values) if estimate]
        shifted = [at + 0.12 * (place - (len(estimates) - 1) / 2) for at, _ in points]
        errors = [[one.value - one.low for _, one in points], [one.high - one.value for _, one in points]]
        style: dict[str, Any] = {"color": method.color, "marker": method.marker, "label": method.label}
        shown = [one.value for _, one in points]
        axes.errorbar(shifted, shown, yerr=errors, markersize=5, linewidth=1.2, elinewidth=0.8, **style)
    axes.set_ylim(-0.05, 1.05)
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    axes.grid(alpha=0.3)


def _legend(figure: Figure, title: str) -> None:
    """One for all panels, below them, and the title above."""
    handles, labels = figure.axes[0].get_legend_handles_labels()
    # As many columns as fit: an inch has room for about twelve letters, a handle takes six.
    columns = int(12 * figure.get_figwidth()) // (max(map(len, labels)) + 6)
    figure.legend(handles, labels, loc="outside lower center", ncols=max(1, min(columns, len(labels))))
    figure.suptitle(title, fontsize="medium")


def _heat_map(axes: "Axes", shares: list[list[float]], lengths: Sequence[int], trained_length: int) -> None:
    axes.imshow(shares, cmap=COLORS, norm=Normalize(0.0, 1.0), aspect="auto")
    within = sum(length <= trained_length for length in lengths)
    axes.axvline(within - 0.5, color="white", linewidth=3)
    axes.axvline(within - 0.5, color="black", linestyle="--", linewidth=1.5)


def _value(estimate: Any) -> float:
    return float("nan") if estimate is None else estimate.value


def _short(tokens: int) -> str:
    return f"{tokens // 1024}k" if tokens % 1024 == 0 and tokens else f"{tokens:,}"
