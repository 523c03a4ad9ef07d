"""`examples/ray_data_batch.py` as it is: two engines give the answers of one, and a broken-off run goes on."""

import json
import signal
import subprocess
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from .programs import ROOT, environment, python, run, wait_until
from .prompts import MAX_MODEL_LEN, PROMPTS, TOO_LONG

EXAMPLE = "examples/ray_data_batch.py"
TWO_ENGINES = ("--cpu", "--engines", 2, "--batch", 4)


def read(folder: Path) -> dict[str, list[dict[str, Any]]]:
    """The rows of every file of answers, by its name."""
    found = {path.name: read_jsonl(path) for path in folder.glob("*.jsonl")}
    return found | {path.name: pyarrow.parquet.read_table(path).to_pylist() for path in folder.glob("*.parquet")}


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    with path.open() as lines:
        return [json.loads(line) for line in lines]


@pytest.mark.slow
def test_two_engines_give_the_answers_of_one_and_go_on_where_they_were_stopped(
    tmp_path: Path, plain: dict[str, Any]
) -> None:
    # U+2028 is no line's end in JSONL, though Python's `splitlines` takes it for one.
    rows = [{**row, "id": f"{row['id']}\u2028"} for row in [*PROMPTS, {"id": "too long", "prompt": TOO_LONG}]]
    prompts, answers, log = tmp_path / "prompts.jsonl", tmp_path / "answers", tmp_path / "log"
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = python(EXAMPLE, prompts, answers, *TWO_ENGINES)
    with log.open("w") as out:
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment(), text=True, stdout=out, stderr=subprocess.STDOUT
        )
    wait_until(lambda: any(answers.glob("*.jsonl")), process, log, 600)
    process.send_signal(signal.SIGINT)
    assert process.wait(180) != 0
    first = read(answers)
    assert 0 < sum(map(len, first.values())) < len(rows)

    output = run(command, env=environment())
    assert f"{sum(map(len, first.values()))} rows have been answered before." in output
    both = read(answers)
    assert {name: both[name] for name in first} == first, "files are written once"
    found = [row for file in both.values() for row in file]
    assert sorted(row["id"] for row in found) == sorted(row["id"] for row in rows), "nothing twice, nothing lost"
    expected = dict(zip([row["id"] for row in rows], [*plain["texts"], ""], strict=True))
    assert {row["id"]: row["answer"] for row in found} == expected
    assert [text.strip()[:9] for text in plain["texts"]] == [row["key"] for row in PROMPTS]
    (refused,) = (row for row in found if row["error"])
    assert refused["id"] == rows[-1]["id"]
    assert f"maximum context length is {MAX_MODEL_LEN} tokens" in refused["error"]

    output = run(command, env=environment())
    assert f"{len(rows)} rows have been answered before." in output
    assert "vLLM" not in output, "no engine starts for nothing"
    assert read(answers) == both


def test_parquet_and_a_chat_template(tmp_path: Path, plain: dict[str, Any]) -> None:
    """The demo model's template only joins messages, so that the answers are the same."""
    rows = PROMPTS[:6]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "prompts.parquet")
    run(python(EXAMPLE, tmp_path / "prompts.parquet", tmp_path / "answers", "--cpu", "--chat"), env=environment())
    (file,) = read(tmp_path / "answers").values()
    assert {row["id"]: row["answer"] for row in file} == dict(enumerate(plain["texts"][:6]))


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("prompts.csv", "id,prompt", "prompts.csv: the prompts' file ends in '.csv', not in .jsonl or .parquet"),
        ("prompts.jsonl", '{"prompt": "a", "name": "b"}', "has the columns ['prompt', 'name']; id must be among them"),
    ],
)
def test_what_cannot_be_read_is_named(tmp_path: Path, name: str, text: str, message: str) -> None:
    (tmp_path / name).write_text(text)
    command = python(EXAMPLE, tmp_path / name, tmp_path / "answers", "--cpu")
    done = subprocess.run(command, cwd=ROOT, env=environment(), text=True, capture_output=True)
    assert done.returncode == 2
    assert message in done.stderr
