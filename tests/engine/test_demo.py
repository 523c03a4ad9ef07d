"""The demo's own code on a few of its prompts; `make demo` runs all of them."""

import json
from pathlib import Path

import pytest

from vllm_selfextend.demo import run


@pytest.fixture
def tasks() -> list[run.Task]:
    """Every seventh of the longest prompts: 12 of 84, of which the whole demo finds 81."""
    longest = [task for task in run.make_tasks() if task.num_tokens == max(run.LENGTHS)]
    return longest[::7]


def test_self_extend_finds_what_the_unmodified_model_does_not(tasks: list[run.Task]) -> None:
    answered = []
    extended = run.run_method("self_extend", tasks, lambda: answered.append(1))
    unmodified = run.run_method("unmodified", tasks, lambda: None)
    assert len(answered) == len(extended) == len(tasks)
    assert sum(result.found for result in extended) >= len(tasks) - 1
    assert sum(result.found for result in unmodified) <= 1


def test_results_are_written(tmp_path: Path) -> None:
    results = []
    for task in run.make_tasks():
        for method, answer in (("self_extend", task.prompt.answer), ("unmodified", "none")):
            cell = method, task.num_tokens, task.num_keys, task.depth
            results.append(run.Result(*cell, expected=task.prompt.answer, answer=answer))
    run.write_results(results, 256, tmp_path / "new" / "folder")
    written = json.loads((tmp_path / "new" / "folder" / "results.json").read_text())
    assert written["trained_length"] == 256
    assert len(written["prompts"]) == len(results)
    assert {(row["self_extend"], row["unmodified"]) for row in written["accuracy"]} == {(1.0, 0.0)}
    assert (tmp_path / "new" / "folder" / "accuracy.png").read_bytes().startswith(b"\x89PNG")
