"""Draws the pictures of docs/how_it_works.md from the formula itself.

`images/relative_positions.png`: what it makes of every query and key of a short text. `images/group_sizes.png`: the
group size by position, and the largest relative position that a query then has.
"""

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure

from vllm_selfextend.backends.limits import EIGHTHS
from vllm_selfextend.method.positions import GroupSize, group_sizes, relative_position

if TYPE_CHECKING:
    from matplotlib.axes import Axes

IMAGES = Path(__file__).with_name("images")

TEXT = 16  # tokens of the short text, for a model trained on half as many
TEXT_TRAINED, TEXT_WINDOW = 8, 2
CELLS = ListedColormap(["#cfe0f0", "#f5dfae", "#c0504d"])  # told apart in print and by people with any color vision
NEIGHBOR, GROUPED, PAST_TRAINED = range(3)

TRAINED_LENGTH, NEIGHBOR_WINDOW, LONGEST = 8192, 1024, 65536
LINES: dict[GroupSize, tuple[str, str]] = {
    "auto": ('"auto"', "#0072B2"),
    4: ("4, as in the paper", "#E69F00"),
    8: ("8, as in the paper", "#009E73"),
}


def main() -> None:
    draw_relative_positions()
    draw_group_sizes()


def draw_relative_positions() -> None:
    figure = Figure(figsize=(11.5, 6.2), layout="constrained")
    panels = figure.subplots(1, 2)
    ordinary = torch.full((TEXT,), EIGHTHS)
    by_position = group_sizes(TEXT, TEXT_TRAINED, TEXT_WINDOW, "auto", TEXT_TRAINED)
    for axes, eighths in zip(panels, (ordinary, by_position), strict=True):
        draw_text(axes, eighths.tolist())
    panels[0].set_title("Unmodified")
    panels[1].set_title(f'Self-Extend, W = {TEXT_WINDOW}, group size "auto"')
    sizes = panels[1].secondary_yaxis("right")
    sizes.set_yticks(range(TEXT), [f"{size / EIGHTHS:g}" for size in by_position.tolist()])
    sizes.set_ylabel("group size of the query")
    sizes.spines[:].set_visible(False)
    sizes.tick_params(length=0)
    named = ("exact", "grouped", f"past the trained length of {TEXT_TRAINED}")
    for kind, name in enumerate(named):
        panels[0].scatter([], [], marker="s", s=90, color=CELLS(kind), label=name)
    figure.legend(loc="outside lower center", ncols=len(named), frameon=False)
    figure.suptitle(f"Relative positions of {TEXT} tokens, for a model trained on {TEXT_TRAINED}")
    figure.savefig(IMAGES / "relative_positions.png", dpi=150)


def draw_text(axes: "Axes", eighths: list[int]) -> None:
    """A cell for each key of each query, whose group size is `eighths`."""
    kinds = [[float("nan")] * TEXT for _ in range(TEXT)]
    for query in range(TEXT):
        for key in range(query + 1):
            relative = relative_position(query, key, eighths[query], TEXT_WINDOW)
            is_past = relative >= TEXT_TRAINED
            is_grouped = eighths[query] > EIGHTHS and query - key >= TEXT_WINDOW
            kinds[query][key] = PAST_TRAINED if is_past else GROUPED if is_grouped else NEIGHBOR
            color, weight = ("white", "bold") if is_past else ("black", "normal")
            axes.text(key, query, str(relative), ha="center", va="center", color=color, weight=weight, size=9)
    axes.imshow(kinds, cmap=CELLS, vmin=NEIGHBOR, vmax=PAST_TRAINED)
    axes.set_xticks(range(TEXT))
    axes.set_yticks(range(TEXT))
    axes.set_xlabel("key j")
    axes.set_ylabel("query i")
    axes.spines[:].set_visible(False)
    axes.set_xticks([edge - 0.5 for edge in range(TEXT + 1)], minor=True)
    axes.set_yticks([edge - 0.5 for edge in range(TEXT + 1)], minor=True)
    axes.grid(which="minor", color="white", linewidth=1.5)
    axes.tick_params(which="both", length=0)


def draw_group_sizes() -> None:
    figure = Figure(figsize=(11.5, 4.4), layout="constrained")
    size_axes, reach_axes = figure.subplots(1, 2)
    queries = range(0, LONGEST, 16)
    for group_size, (label, color) in LINES.items():
        exact_len = TRAINED_LENGTH if group_size == "auto" else 0
        table = group_sizes(LONGEST, TRAINED_LENGTH, NEIGHBOR_WINDOW, group_size, exact_len).tolist()
        size_axes.plot(queries, [table[query] / EIGHTHS for query in queries], color=color, label=label)
        largest = [relative_position(query, 0, table[query], NEIGHBOR_WINDOW) for query in queries]
        reach_axes.plot(queries, largest, color=color, label=label)
    reach_axes.plot(queries, queries, color="black", linewidth=1, label="unmodified")
    reach_axes.axhspan(TRAINED_LENGTH, 2 * TRAINED_LENGTH, color="#c0504d", alpha=0.25, linewidth=0)
    reach_axes.text(LONGEST * 0.98, TRAINED_LENGTH * 1.2, "not trained", ha="right", color="#8c2d2a")
    reach_axes.set_ylim(0, TRAINED_LENGTH * 1.5)
    size_axes.set_ylim(0)
    size_axes.set_title("Group size")
    reach_axes.set_title("Largest relative position, to the first key")
    ticks = [0, *(TRAINED_LENGTH * count for count in (1, 2, 4, 6, 8))]
    for axes in (size_axes, reach_axes):
        axes.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
        axes.set_xlabel("query's position i")
        axes.set_xlim(0, LONGEST)
        axes.grid(color="#dddddd", linewidth=0.6)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    reach_axes.set_yticks([0, TRAINED_LENGTH // 2, TRAINED_LENGTH], ["0", f"{TRAINED_LENGTH // 2:,}", "L = 8,192"])
    size_axes.legend(loc="upper left", frameon=False)
    reach_axes.legend(loc="lower right", frameon=False, ncols=2)
    figure.suptitle(f"A model trained on {TRAINED_LENGTH:,} tokens, W = {NEIGHBOR_WINDOW:,}")
    figure.savefig(IMAGES / "group_sizes.png", dpi=150)


if __name__ == "__main__":
    main()
