"""The loss task and the user's own; the passkey task has a file of its own."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from vllm_selfextend.evaluation.loss import BLOCK, LossTask, mean_losses, read_texts, standard_library_texts
from vllm_selfextend.evaluation.prompts import Prompt
from vllm_selfextend.evaluation.user_prompts import UserTask, read_prompts


def encode(text: str, answer_begins: str) -> list[int]:
    assert not answer_begins
    return [len(word) for word in text.split()]


def test_losses_are_added_up_in_blocks() -> None:
    task = LossTask({"book": "a bb ccc " * 400}, length=601)
    (prompt,) = task.prompts(encode)
    assert len(prompt.token_ids) == 600
    # The token at position p has log-probability -p; others, which vLLM may add, are not looked at.
    scored = [None, *({prompt.token_ids[p]: SimpleNamespace(logprob=-float(p)), 99: None} for p in range(1, 600))]
    blocks = task.score(prompt, SimpleNamespace(prompt_logprobs=scored))["block_losses"]
    assert blocks == [sum(range(b, min(b + BLOCK, 600))) for b in range(0, 600, BLOCK)]


def test_a_short_text_is_refused() -> None:
    with pytest.raises(ValueError, match=r"book has 3 tokens, and 99 are to be read. Give a longer text"):
        list(LossTask({"book": "a b c"}, length=100).prompts(encode))


@pytest.mark.parametrize("length", [1, 2])
def test_a_loss_of_no_token_is_refused(length: int) -> None:
    with pytest.raises(ValueError, match=f"at least 3 tokens of a text, and {length} are to be read"):
        list(LossTask({"book": "a b c d"}, length).prompts(encode))
    (prompt,) = LossTask({"book": "a b c d"}, 3).prompts(encode)
    scored = SimpleNamespace(prompt_logprobs=[None, {1: SimpleNamespace(logprob=-2.0)}])
    losses = LossTask({}, 3).score(prompt, scored)["block_losses"]
    assert list(mean_losses(losses, len(prompt.token_ids))) == [(0, 2, 2.0)]


def test_every_machine_has_long_texts() -> None:
    texts = standard_library_texts()
    assert len(texts) >= 2
    assert all(len(text) > 100_000 for text in texts.values())


def test_texts_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    for path in (tmp_path / "book.txt", tmp_path / "a" / "book.txt"):
        path.write_text("text")
    assert read_texts([tmp_path / "book.txt"]) == {"book.txt": "text"}
    with pytest.raises(ValueError, match=r"Two texts are called book.txt"):
        read_texts([tmp_path / "book.txt", tmp_path / "a" / "book.txt"])
    with pytest.raises(ValueError, match=r"no.txt cannot be read: .*No such file"):
        read_texts([tmp_path / "no.txt"])
    (tmp_path / "marked.txt").write_text("text", encoding="utf-8-sig")
    assert read_texts([tmp_path / "marked.txt"]) == {"marked.txt": "text"}, "without its byte order mark"
    (tmp_path / "binary").write_bytes(b"\xff\xfe\xfa")
    with pytest.raises(ValueError, match="binary cannot be read"):
        read_texts([tmp_path / "binary"])


def test_the_users_prompts(tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "Who wrote it?", "answer": "Ada"}\n\n{"prompt": "a b", "answer": "c"}\n')
    task = UserTask(read_prompts(path), max_length=70)
    prompts = list(task.prompts(encode))
    assert [(p.name, p.cell["length"], p.expected) for p in prompts] == [
        ("prompts/1", 67, "Ada"),
        ("prompts/3", 66, "c"),
    ]
    for text, found in (("It was ada.", True), ("Nobody.", False)):
        score = task.score(prompts[0], SimpleNamespace(outputs=[SimpleNamespace(text=text)]))
        assert score == {"expected": "Ada", "answer": text, "found": found}
    with pytest.raises(ValueError, match="line 1 and 64 tokens for its answer are 67 tokens, more than"):
        list(UserTask(read_prompts(path), max_length=66).prompts(encode))


def test_a_line_is_named_by_its_number_in_the_file(tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text('\n\n{"prompt": "a b", "answer": "c"}\n')
    with pytest.raises(ValueError, match="The prompt of line 3 and 64 tokens"):
        list(UserTask(read_prompts(path), max_length=65).prompts(encode))


def test_only_a_line_feed_ends_a_line(tmp_path: Path) -> None:
    """JSON has the other line breaks inside of its strings as they are."""
    path = tmp_path / "prompts.jsonl"
    breaks = "a\u2028b\u2029c\x85d"
    lines = [{"prompt": breaks, "answer": breaks}, {"prompt": "e", "answer": "f"}]
    path.write_bytes("".join(json.dumps(line, ensure_ascii=False) + "\r\n" for line in lines).encode("utf-8-sig"))
    assert read_prompts(path) == dict(enumerate(lines, 1)), "and a byte order mark is none of the first line's"


def test_a_line_again_is_asked_once(tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    lines = ['{"prompt": "a", "answer": "b"}', '{"answer": "b", "prompt": "a"}', '{"prompt": "a", "answer": "c"}']
    path.write_text("\n".join(lines))
    assert list(read_prompts(path)) == [1, 3]


@pytest.mark.parametrize(
    ("expected", "answer", "found"),
    [
        ("Caf\u00e9", "the cafe\u0301.", True),
        ("cafe\u0301", "the CAF\u00c9.", True),
        ("e", "\u00e9", False),
        ("e", "e\u0301", False),
        ("Stra\u00dfe", "STRASSE", True),
        (" Ada\n", "It was Ada.", True),
    ],
)
def test_letters_that_look_alike_match(expected: str, answer: str, found: bool) -> None:
    prompt = Prompt("prompts/1", {"length": 3, "line": 1}, "a", [1], expected)
    score = UserTask({}, 100).score(prompt, SimpleNamespace(outputs=[SimpleNamespace(text=answer)]))
    assert score == {"expected": expected, "answer": answer, "found": found}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "has no prompts"),
        ('\n{"prompt": "a", "answer": " \\t\\u2003"}', "Line 2 of .* texts that have more than spaces"),
        ('{"prompt": " ", "answer": "b"}', "Line 1 of .* texts that have more than spaces"),
        ('{"prompt": "a \\ud83d b", "answer": "b"}', r"Line 1 of .* has \\ud83d in its prompt, one half of a surr"),
        ('{"prompt": "a", "answer": "\\udE00"}', r"Line 1 of .* has \\ude00 in its answer"),
        ('{"prompt": "a", "answer": ' + "9" * 5000 + "}", "Line 1 of .* is not JSON"),
        ('{"prompt": "a", "answer": "b"}\nno json', "Line 2 of .* is not JSON"),
        ('{"prompt": "a"}', "Line 1 of .* must be an object such as"),
        ('["a", "b"]', "Line 1 of .* must be an object such as"),
        ('{"prompt": "a", "answer": ""}', "Line 1 of .* must be an object such as"),
    ],
)
def test_bad_prompts_are_named(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text(content)
    with pytest.raises(ValueError, match=message):
        read_prompts(path)
    with pytest.raises(ValueError, match="cannot be read"):
        read_prompts(tmp_path / "no.jsonl")


def test_a_row_is_json() -> None:
    prompt = Prompt("prompts/1", {"length": 3, "line": 1}, "a", [1], "b")
    score = UserTask({}, 100).score(prompt, SimpleNamespace(outputs=[SimpleNamespace(text="B")]))
    assert json.loads(json.dumps(score)) == score
