"""Shares, losses, tables and pictures of made-up answers."""

import functools
import io
from pathlib import Path

import pytest
from rich.console import Console

from vllm_selfextend.evaluation import methods, plots, tables
from vllm_selfextend.evaluation.loss import BLOCK
from vllm_selfextend.evaluation.summary import block_losses, passkey_share, summarize

METHODS = ("unmodified", "self-extend")
LENGTH = 1000


def passkey_rows() -> list[dict]:
    return [
        {"task": "passkey", "method": m, "length": n, "num_keys": 1, "depth": d, "round": 0}
        | {"found": n <= 512 or m == "self-extend"}
        for m in METHODS
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


def test_shares() -> None:
    rows = passkey_rows()
    found = passkey_share(rows, "unmodified", length=1024, num_keys=1)
    assert found is not None
    assert (found.value, found.low) == (0.0, pytest.approx(0.0))
    assert passkey_share(rows, "unmodified", length=99) is None


def test_losses_within_and_past_the_trained_length() -> None:
    rows = loss_rows()
    assert block_losses(rows, "unmodified", 0, LENGTH) == [2.0] * 3
    assert block_losses(rows, "unmodified", LENGTH, 2000) == [4.0] * 4
    summary = summarize(rows, METHODS, LENGTH)["loss"]
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
    text = console.export_text()
    assert "0% (0-66)" in text
    assert "100% (34-100)" in text
    assert "1,000 to 2,000" in text
    assert "4.000 +- 0.000" in text


@pytest.mark.parametrize("width", [60, 80, 200])
def test_no_heading_is_cut(width: int) -> None:
    """Six methods are wider than a terminal of 80 columns: what does not fit goes into another table below."""
    labels = [method.label for method in methods.METHODS.values()]
    rows = [row | {"method": name} for row in passkey_rows()[:6] for name in methods.METHODS]
    console = Console(width=width, record=True, file=io.StringIO())
    made = list(
        tables.fitting(functools.partial(tables.passkey_table, rows, title="Keys"), list(methods.METHODS), console)
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
    plots.plot_numbers(
        {(2, 64): 0.5, (4, 64): 0.25, (4, 16): 0.75}, (2, 64), (4, 64), "wrong", tmp_path / "tuning.png", is_share=True
    )
    for path in tmp_path.iterdir():
        assert path.read_bytes().startswith(b"\x89PNG")
    assert len(list(tmp_path.iterdir())) == 3
