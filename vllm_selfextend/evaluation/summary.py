"""What the rows of a run come to: shares of keys found, losses over position."""

import math
from collections.abc import Iterable, Sequence
from typing import Any

from ..method.positions import GroupSize
from .intervals import Estimate, average, difference, mean, share
from .loss import mean_losses
from .prompts import Row
from .ruler import RULER_TASKS


def task_share(rows: Iterable[Row], task: str, method: str, **cell: Any) -> Estimate | None:
    """The share that a method found or told right in a task's cell (`length`, `depth` and so on); None without any."""
    wanted = {"method": method, "task": task, **cell}
    asked = [row for row in rows if all(row.get(key) == value for key, value in wanted.items())]
    scores = [float(row["score"] if "score" in row else row["found"]) for row in asked]
    return share(math.fsum(scores), len(scores)) if scores else None


def ruler_score(rows: Sequence[Row], method: str, tasks: Sequence[str], length: int) -> Estimate | None:
    """The mean over tasks of a method's scores at a length; None without a score in each."""
    shares = [task_share(rows, task, method, length=length) for task in tasks]
    known = [one for one in shares if one is not None]
    return average(known) if len(known) == len(tasks) else None


def ruler_groups(rows: Sequence[Row]) -> dict[str, list[str]]:
    """What RULER's scores are given of, by a name for people: each task, and those that all methods were asked."""
    asked: dict[str, set[str]] = {}
    for row in rows:
        asked.setdefault(row["task"], set()).add(row["method"])
    groups = {name: [name] for name in RULER_TASKS if name in asked}
    methods = set().union(*asked.values())
    shared = [name for name in groups if asked[name] == methods]
    if len(shared) > 1:
        groups["mean" if len(shared) == len(groups) else f"mean of {len(shared)}"] = shared
    return groups


def share_kept(
    rows: Sequence[Row], method: str, tasks: Sequence[str], length: int, trained_length: int
) -> float | None:
    """A mean score as a share of the unmodified model's at the longest texts within the trained length, if any."""
    within = [each for each in column(rows, "length") if each <= trained_length]
    reference = ruler_score(rows, "unmodified", tasks, max(within)) if within else None
    score = ruler_score(rows, method, tasks, length)
    return score.value / reference.value if score and reference and reference.value else None


def block_losses(rows: Iterable[Row], method: str, begin: int, end: int) -> list[float]:
    """Mean losses per token of every block that lies from position `begin` to `end`, text after text."""
    scored = (row for row in rows if (row["method"], row["task"]) == (method, "loss"))
    blocks = (block for row in scored for block in mean_losses(row["block_losses"], row["num_tokens"]))
    return [loss for first, stop, loss in blocks if begin <= first and stop <= end]


def order_cells(rows: Iterable[Row]) -> list[tuple[int, int, int]]:
    """Length, distance and gap of every cell of the order task, sorted."""
    return sorted({(row["length"], row["distance"], row["gap"]) for row in rows})


def column(rows: Iterable[Row], key: str) -> list[Any]:
    """The different values that rows have for a key, sorted."""
    return sorted({row[key] for row in rows if key in row})


def loss_ranges(trained_length: int, length: int) -> list[tuple[int, int]]:
    """Within the trained length, and past it."""
    return [(0, min(trained_length, length)), *([(trained_length, length)] if length > trained_length else [])]


def summarize(rows: Sequence[Row], methods: Sequence[str], trained_length: int) -> dict[str, Any]:
    """All numbers of a run with their intervals, as JSON keeps them."""
    passkeys = [row for row in rows if row["task"] == "passkey"]
    shares = []
    for length in column(passkeys, "length"):
        for num_keys in column(passkeys, "num_keys"):
            for method in methods:
                if found := task_share(passkeys, "passkey", method, length=length, num_keys=num_keys):
                    cell = {"length": length, "num_keys": num_keys, "method": method}
                    shares.append(cell | found.as_json())
    scored = [row for row in rows if row["task"] == "loss"]
    losses = []
    for begin, end in loss_ranges(trained_length, max(column(scored, "length"), default=0)) if scored else []:
        ours = block_losses(scored, "self-extend", begin, end)
        for method in methods:
            if not (blocks := block_losses(scored, method, begin, end)):
                continue
            cell = {"begin": begin, "end": end, "method": method} | mean(blocks).as_json()
            if len(ours) == len(blocks) and method != "self-extend":
                cell["above_self_extend"] = difference(blocks, ours).as_json()
            losses.append(cell)
    asked = [row for row in rows if row["task"] in RULER_TASKS]
    scores = []
    for name, tasks in ruler_groups(asked).items():
        for length in column(asked, "length"):
            for method in methods:
                if score := ruler_score(asked, method, tasks, length):
                    kept = share_kept(asked, method, tasks, length, trained_length)
                    cell = {"task": name, "length": length, "method": method}
                    scores.append(cell | score.as_json() | {"kept": kept})
    told = [row for row in rows if row["task"] == "order"]
    orders = []
    for length, distance, gap in order_cells(told):
        for method in methods:
            cell = {"length": length, "distance": distance, "gap": gap}
            if right := task_share(told, "order", method, **cell):
                margins = [row["margin"] for row in told if row["method"] == method and cell.items() <= row.items()]
                orders.append(cell | {"method": method} | right.as_json() | {"margin": mean(margins).as_json()})
    return {"passkey": shares, "loss": losses, "ruler": scores, "order": orders}


def group_sizes_of(numbers: Iterable[tuple[GroupSize, int]]) -> list[GroupSize]:
    """The group sizes among pairs of them and a window, "auto" first."""
    return sorted({group_size for group_size, _ in numbers}, key=lambda one: 0 if one == "auto" else one)
