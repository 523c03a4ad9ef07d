import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import typer

from vllm_selfextend import cli
from vllm_selfextend.evaluation.records import Records, alone_in, write_json

from .full_disk import full_disk


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


def test_a_full_disk_loses_no_answer(tmp_path: Path) -> None:
    answers = tmp_path / "answers.jsonl"
    records = Records(tmp_path, {})
    for name in "abcde":
        records.add(row(name))
    kept = answers.read_bytes()
    with full_disk(len(kept) + 10), pytest.raises(OSError, match=r"answers\.jsonl"):
        records.add(row("f"))
    assert ("yarn", "f") not in records.rows
    assert len(answers.read_bytes()) == len(kept) + 10, "the disk was full in the middle of a line"
    with full_disk():
        again = Records(tmp_path, {})
    assert list(again.rows) == [("yarn", name) for name in "abcde"]
    assert answers.read_bytes() == kept
    again.add(row("f"))
    assert list(Records(tmp_path, {}).rows) == [("yarn", name) for name in "abcdef"]


def test_a_document_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    write_json(path, {"answers": [1]})
    with full_disk(10), pytest.raises(OSError, match=r"results\.json"):
        write_json(path, {"answers": [1, 2, 3]})
    assert json.loads(path.read_text()) == {"answers": [1]}
    assert list(tmp_path.iterdir()) == [path]


def test_another_runs_folder_is_refused(tmp_path: Path) -> None:
    Records(tmp_path, {"model": "A", "seed": 0}).add(row("a"))
    with pytest.raises(ValueError, match="answers of another run: there seed was 0, and now it is 1"):
        Records(tmp_path, {"model": "A", "seed": 1})
    with pytest.raises(ValueError, match="there text was None, and now it is 'book'"):
        Records(tmp_path, {"model": "A", "seed": 0, "text": "book"})


def test_only_what_differs_is_said(tmp_path: Path) -> None:
    settings = {"plan": {"group_size": "auto", "group_sizes": {256: 1.0}}, "methods": ["yarn"]}
    Records(tmp_path, settings).add(row("a"))
    with pytest.raises(ValueError, match="another run") as refused:
        Records(tmp_path, {**settings, "plan": {"group_size": 8, "group_sizes": {256: 1.0}}})
    assert "there plan.group_size was 'auto', and now it is 8. Take" in str(refused.value)
    assert "group_sizes" not in str(refused.value)
    with pytest.raises(ValueError, match=r"a was None, and now it is 1; b .*; c .*; and 2 more\. Take"):
        Records(tmp_path, settings | dict.fromkeys("abcde", 1))


@pytest.mark.parametrize("answers", [None, "", '{"name": "a'])
def test_settings_without_an_answer_do_not_count(tmp_path: Path, answers: str | None) -> None:
    """A run that failed before its first answer, or in the middle of it, leaves its settings."""
    Records(tmp_path, {"model": "A", "seed": 0})
    if answers is not None:
        (tmp_path / "answers.jsonl").write_text(answers)
    Records(tmp_path, {"model": "A", "seed": 1}).add(row("a"))
    assert list(Records(tmp_path, {"model": "A", "seed": 1}).rows) == [("yarn", "a")]


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"settings.json": '{"editor.tabSize": 4}'}, "settings.json is there, and is no run's"),
        ({"settings.json": "no json"}, r"settings.json cannot be read \("),
        ({"answers.jsonl": '{"custom_id": "1"}'}, "answers.jsonl is there without settings.json"),
        ({"answers.jsonl": '{"custom_id": "1"}\n'}, "Line 1 of .*answers.jsonl is no answer of a run"),
        ({"answers.jsonl": '{"method": "a", "name": "b"}\n[]\n'}, "Line 2 of .*answers.jsonl is no answer of a run"),
    ],
)
def test_files_of_others_are_left_as_they_are(tmp_path: Path, files: dict[str, str], message: str) -> None:
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=message):
        Records(tmp_path, {"model": "A"})
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == files


def test_two_runs_in_one_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Until the first process ends, however it does, and whether or not an engine that it forked lives on."""
    script = (
        "import os, sys, time\nfrom pathlib import Path\nfrom vllm_selfextend.evaluation.records import alone_in\n"
        "with alone_in(Path(sys.argv[1])):\n    if os.fork():\n        print('held', flush=True)\n    time.sleep(60)\n"
    )
    run = subprocess.Popen([sys.executable, "-c", script, tmp_path], stdout=subprocess.PIPE, start_new_session=True)
    try:
        assert run.stdout is not None
        assert run.stdout.readline() == b"held\n"
        with pytest.raises(ValueError, match="Another run is at work in"), alone_in(tmp_path):
            pass
        with pytest.raises(typer.Exit), cli._evaluating(tmp_path):
            pass
        assert (
            capsys.readouterr().err
            == f"error: Another run is at work in {tmp_path}: wait for it, or take another folder.\n"
        )
        assert [path.name for path in tmp_path.iterdir()] == ["run.lock"], "the log is the other's"
        run.kill()
        run.wait()
        with alone_in(tmp_path):
            pass
    finally:
        os.killpg(run.pid, signal.SIGKILL)
