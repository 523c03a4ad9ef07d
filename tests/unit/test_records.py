import json
from pathlib import Path

import pytest

from vllm_selfextend.evaluation.records import Records


def row(name: str, method: str = "yarn") -> dict:
    return {"name": name, "method": method, "found": True}


def test_what_was_kept_is_there_again(tmp_path: Path) -> None:
    records = Records(tmp_path / "new" / "run", {"lengths": (1, 2)})
    for one in (row("a"), row("b"), row("a", "ntk")):
        records.add(one)
    again = Records(tmp_path / "new" / "run", {"lengths": (1, 2)})
    assert again.rows == records.rows
    assert list(again.rows) == [("yarn", "a"), ("yarn", "b"), ("ntk", "a")]


def test_a_line_broken_off_is_asked_for_again(tmp_path: Path) -> None:
    records = Records(tmp_path, {})
    records.add(row("a"))
    with (tmp_path / "answers.jsonl").open("a") as file:
        file.write(json.dumps(row("b"))[:20])
    again = Records(tmp_path, {})
    assert list(again.rows) == [("yarn", "a")]
    again.add(row("b"))
    assert list(Records(tmp_path, {}).rows) == [("yarn", "a"), ("yarn", "b")]


def test_another_runs_folder_is_refused(tmp_path: Path) -> None:
    Records(tmp_path, {"model": "A", "seed": 0}).add(row("a"))
    with pytest.raises(ValueError, match="answers of another run: there seed was 0, and now it is 1"):
        Records(tmp_path, {"model": "A", "seed": 1})
    with pytest.raises(ValueError, match="there text was None, and now it is 'book'"):
        Records(tmp_path, {"model": "A", "seed": 0, "text": "book"})
