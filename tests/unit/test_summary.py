"""Shares, losses, tables and pictures of made-up answers."""

import functools
import io
from pathlib import Path

import pytest
from rich.console import Console
from scipy import stats

from vllm_selfextend.evaluation import methods, plots, tables
from vllm_selfextend.evaluation.intervals import share
from vllm_selfextend.evaluation.loss import BLOCK
from vllm_selfextend.evaluation.summary import (
    block_losses,
    ruler_groups,
    ruler_score,
    share_kept,
    summarize,
    task_share,
)

NAMES = ("unmodified", "self-extend")
METHODS = [methods.METHODS[name] for name in NAMES]
LENGTH = 1000


def passkey_rows() -> list[dict]:
    return [
        {"task": "passkey", "method": m, "length": n, "num_keys": 1, "depth": d, "round": 0}
        | {"found": n <= 512 or m == "self-extend"}
        for m in NAMES
        for n in (512, 1024, 2048)
        for d in (0.25, 0.75)
    ]


def loss_rows() -> list[dict]:
    """1,999 tokens: 3 blocks end within `LENGTH`, one straddles it, the last is a part."""
    rows = []
    for method, beyond in (("unmodified", 4.0), ("self-extend", 2.0)):
        begins = range(0, 1999, BLOCK)
        sizes = [min(BLOCK, 1999 - begin) - (begin == 0) for begin in begins]
        rates = [2.0 if begin < LENGTH else beyond for begin in begins]
        blocks = [size * rate for size, rate in zip(sizes, rates, strict=True)]
        rows.append({"task": "loss", "method": method, "length": 2000, "num_tokens": 1999, "block_losses": blocks})
    return rows


def ruler_rows() -> list[dict]:
    """Two tasks of which Self-Extend keeps 3/4 and all at 2,048 tokens, two prompts each."""
    scores = {("unmodified", 1000): (1.0, 0.6), ("self-extend", 1000): (1.0, 0.6), ("self-extend", 2048): (0.75, 0.6)}
    scores["unmodified", 2048] = 0.0, 0.0
    return [
        {"task": task, "method": method, "length": length, "round": turn, "score": score}
        for (method, length), both in scores.items()
        for task, score in zip(("niah_multikey_2", "ruler_vt"), both, strict=True)
        for turn in range(2)
    ]


def test_rulers_scores() -> None:
    rows = ruler_rows()
    tasks = ["niah_multikey_2", "ruler_vt"]
    score = ruler_score(rows, "self-extend", ["ruler_vt"], 2048)
    assert score is not None
    assert (score.value, score.low < 0.2, score.high > 0.9) == (pytest.approx(0.6), True, True)
    assert ruler_score(rows, "self-extend", tasks, 4096) is None
    assert share_kept(rows, "self-extend", tasks, 2048, LENGTH) == pytest.approx((0.75 + 0.6) / (1.0 + 0.6))
    assert share_kept(rows, "self-extend", tasks, 2048, 999) is None, "nothing was asked within so little"
    found = summarize(rows, NAMES, LENGTH)["ruler"]
    values = {(cell["task"], cell["length"], cell["method"]): cell["value"] for cell in found}
    assert len(values) == len(found) == 3 * 2 * 2
    assert values["mean", 1000, "unmodified"] == values["mean", 1000, "self-extend"] == pytest.approx(0.8)
    assert values["ruler_vt", 2048, "unmodified"] == 0.0


def test_the_mean_is_of_tasks_that_all_methods_were_asked() -> None:
    rows = ruler_rows()
    more = {"task": "ruler_cwe", "method": "unmodified", "length": 1000, "round": 0, "score": 0.0}
    assert list(ruler_groups(rows)) == ["niah_multikey_2", "ruler_vt", "mean"]
    assert list(ruler_groups([*rows, more])) == ["niah_multikey_2", "ruler_vt", "ruler_cwe", "mean of 2"]
    assert ruler_groups([*rows, more])["mean of 2"] == ["niah_multikey_2", "ruler_vt"]
    assert list(ruler_groups(rows[::4])) == ["niah_multikey_2"]


def order_rows() -> list[dict]:
    return [
        {"task": "order", "method": method, "length": 2048, "distance": distance, "gap": gap, "round": 0, "first": city}
        | {"score": score, "margin": score - 0.5}
        for method in NAMES
        for distance, gap, scores in ((512, 0, (1.0, 1.0)), (512, 64, (1.0, 0.5)), (128, 0, (1.0, 0.0)))
        for city, score in zip(("Oslo", "Lima"), scores, strict=True)
    ]


def test_orders() -> None:
    found = summarize(order_rows(), NAMES, LENGTH)["order"]
    assert [(cell["distance"], cell["gap"], cell["value"]) for cell in found if cell["method"] == "unmodified"] == [
        (128, 0, 0.5),
        (512, 0, 1.0),
        (512, 64, 0.75),
    ]
    assert {cell["margin"]["value"] for cell in found} == {0.0, 0.5, 0.25}


@pytest.mark.parametrize("found", [0, 1, 7, 20])
def test_wilsons_interval_is_scipys(found: int) -> None:
    theirs = stats.binomtest(found, 20).proportion_ci(0.95, method="wilson")
    ours = share(found, 20)
    assert (ours.value, ours.low, ours.high) == pytest.approx((found / 20, theirs.low, theirs.high))


def test_shares() -> None:
    rows = passkey_rows()
    found = task_share(rows, "passkey", "unmodified", length=1024, num_keys=1)
    assert found is not None
    assert (found.value, found.low) == (0.0, pytest.approx(0.0))
    assert task_share(rows, "passkey", "unmodified", length=99) is None


def test_losses_within_and_past_the_trained_length() -> None:
    rows = loss_rows()
    assert block_losses(rows, "unmodified", 0, LENGTH) == [2.0] * 3
    assert block_losses(rows, "unmodified", LENGTH, 2000) == [4.0] * 4
    summary = summarize(rows, NAMES, LENGTH)["loss"]
    means = {(cell["method"], cell["begin"]): cell["value"] for cell in summary}
    assert means == {
        ("unmodified", 0): 2.0,
        ("self-extend", 0): 2.0,
        ("unmodified", 1000): 4.0,
        ("self-extend", 1000): 2.0,
    }
    (above,) = (
        cell["above_self_extend"] for cell in summary if (cell["method"], cell["begin"]) == ("unmodified", 1000)
    )
    assert above["value"] == 2.0


def test_tables() -> None:
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(tables.passkey_table(passkey_rows(), METHODS, "Passkeys"))
    console.print(tables.loss_table(loss_rows(), METHODS, LENGTH))
    console.print(tables.ruler_table(ruler_rows(), METHODS, LENGTH))
    console.print(tables.order_table(order_rows(), METHODS))
    text = console.export_text()
    assert "0% (0-66)" in text
    assert "100% (34-100)" in text
    assert "1,000 to 2,000" in text
    assert "4.000 +- 0.000" in text
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in text.splitlines() if line.startswith("│")]
    assert ["ruler_vt", "1,000", "60% (13-94)", "60% (13-94)"] in rows
    assert ["", "2,048", "0% (0-66)", "60% (13-94)"] in rows
    assert ["mean", "1,000", "80% (40-97)", "80% (40-97)"] in rows
    assert ["kept", "2,048", "0%", "84%"] in rows
    assert ["2,048", "512", "64", "75% (20-97)", "75% (20-97)"] in rows
    assert "kept: of the unmodified model's mean within 1,000" in text


@pytest.mark.parametrize("width", [60, 80, 200])
def test_no_heading_is_cut(width: int) -> None:
    """Six methods are wider than a terminal of 80 columns: what does not fit goes into another table below."""
    labels = [method.label for method in methods.METHODS.values()]
    rows = [row | {"method": name} for row in passkey_rows()[:6] for name in methods.METHODS]
    console = Console(width=width, record=True, file=io.StringIO())
    made = list(
        tables.fitting(
            functools.partial(tables.passkey_table, rows, title="Keys"), list(methods.METHODS.values()), console
        )
    )
    for table in made:
        console.print(table)
    lines = console.export_text().splitlines()
    cells = (cell.strip() for line in lines if line.startswith("┃") for cell in line.split("┃"))
    assert [cell for cell in cells if cell not in ("", "tokens", "1 key")] == labels
    assert sum("100% (34-100)" in line for line in lines) == len(made)
    assert len(made) == {60: 2, 80: 2, 200: 1}[width]
    assert max(map(len, lines)) <= width


def test_pictures(tmp_path: Path) -> None:
    plots.plot_passkeys(passkey_rows(), METHODS, LENGTH, tmp_path / "passkeys.png")
    plots.plot_losses(loss_rows(), METHODS, LENGTH, tmp_path / "loss.png")
    plots.plot_ruler(ruler_rows(), METHODS, LENGTH, tmp_path / "ruler.png")
    plots.plot_order(order_rows(), METHODS, LENGTH, tmp_path / "order.png")
    plots.plot_numbers(
        {(2, 64): 0.5, (4, 64): 0.25, (4, 16): 0.75}, (2, 64), (4, 64), "wrong", tmp_path / "tuning.png", is_share=True
    )
    for path in tmp_path.iterdir():
        assert path.read_bytes().startswith(b"\x89PNG")
    assert len(list(tmp_path.iterdir())) == 5
