"""Draws docs/images/relative_positions.png: what the formula makes of every query and key of a short text."""

from pathlib import Path

from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure

from vllm_selfextend.positions import capacity, relative_position

TRAINED_LENGTH, GROUP_SIZE, NEIGHBOR_WINDOW = 8, 2, 4
LENGTH = capacity(TRAINED_LENGTH, GROUP_SIZE, NEIGHBOR_WINDOW)
COLORS = ListedColormap(["#cfe0f0", "#f5dfae", "#c0504d"])  # told apart in print and by people with any color vision
NEIGHBOR, GROUPED, PAST_TRAINED = range(3)


def main() -> None:
    figure = Figure(figsize=(10.0, 5.4), layout="constrained")
    panels = figure.subplots(1, 2)
    titles = ("Unmodified", f"Self-Extend, G = {GROUP_SIZE}, W = {NEIGHBOR_WINDOW}")
    for axes, title, group_size in zip(panels, titles, (1, GROUP_SIZE), strict=True):
        kinds = [[float("nan")] * LENGTH for _ in range(LENGTH)]
        for query in range(LENGTH):
            for key in range(query + 1):
                relative = relative_position(query, key, group_size, NEIGHBOR_WINDOW)
                is_past = relative >= TRAINED_LENGTH
                is_grouped = group_size > 1 and query - key >= NEIGHBOR_WINDOW
                kinds[query][key] = PAST_TRAINED if is_past else GROUPED if is_grouped else NEIGHBOR
                style = {"color": "white", "weight": "bold"} if is_past else {"color": "black"}
                axes.text(key, query, str(relative), ha="center", va="center", **style)
        axes.imshow(kinds, cmap=COLORS, vmin=NEIGHBOR, vmax=PAST_TRAINED)
        axes.set_title(title)
        axes.set_xticks(range(LENGTH))
        axes.set_yticks(range(LENGTH))
        axes.set_xlabel("key j")
        axes.set_ylabel("query i")
        axes.spines[:].set_visible(False)
        axes.tick_params(length=0)
        axes.set_xticks([edge - 0.5 for edge in range(LENGTH + 1)], minor=True)
        axes.set_yticks([edge - 0.5 for edge in range(LENGTH + 1)], minor=True)
        axes.grid(which="minor", color="white", linewidth=1.5)
        axes.tick_params(which="minor", length=0)
    named = ("exact", "grouped", f"past the trained length of {TRAINED_LENGTH}")
    for kind, name in enumerate(named):
        panels[0].scatter([], [], marker="s", s=90, color=COLORS(kind), label=name)
    figure.legend(loc="outside lower center", ncols=len(named), frameon=False)
    figure.suptitle(f"Relative positions of {LENGTH} tokens, for a model trained on {TRAINED_LENGTH}")
    figure.savefig(Path(__file__).with_name("images") / "relative_positions.png", dpi=150)


if __name__ == "__main__":
    main()
