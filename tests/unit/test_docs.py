"""The pages keep up with the code: every refusal has its entry in `docs/troubleshooting.md`, and every link a target.

On that page a table whose first column is called "message" quotes us: between backticks, word for word, `...` for a
value. Other tables quote vLLM, pip and others, which cannot be checked here.
"""

import ast
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "troubleshooting.md"
# vllm_selfextend/backends is a link, which rglob does not follow.
SOURCES = [*sorted((ROOT / "vllm_selfextend").rglob("*.py")), *sorted((ROOT / "backends").rglob("*.py"))]
SOURCES.append(ROOT / "setup.py")
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").rglob("*.md"))]
PAGES = [page for page in PAGES if page.exists()]

VALUE = "\0"
"""Where a message has a value."""

NO_MESSAGES = {
    ("vllm_selfextend/__init__.py", "__getattr__"),  # as any module says it
    ("vllm_selfextend/cli.py", "_fail"),  # prints what others raise
    ("vllm_selfextend/evaluation/tables.py", "distance_from_auto"),  # a result, in words
    ("vllm_selfextend/evaluation/tuning.py", "measure"),  # a caption
}
"""Functions whose sentences are no refusals, by file."""


class Message(NamedTuple):
    """Words of the source, with `VALUE` for each value, and where they are."""

    text: str
    where: str


def strings(node: ast.AST) -> Iterator[str]:
    """The strings in a piece of code that are no docstrings; an f-string is one, whatever it is put together from."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        yield re.sub(r"%[srd]", VALUE, node.value)
    elif isinstance(node, ast.JoinedStr):
        yield "".join(str(part.value) if isinstance(part, ast.Constant) else VALUE for part in node.values)
    elif not (isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)):
        for child in ast.iter_child_nodes(node):
            yield from strings(child)


def messages(path: Path) -> Iterator[Message]:
    """What a file may say to a user: sentences that its code raises, warns with, prints as errors or returns.

    A function that returns a sentence returns why something does not work, but for `NO_MESSAGES`.
    """
    name = path.relative_to(ROOT).as_posix()
    todo: list[ast.AST] = [ast.parse(path.read_text(encoding="utf-8"))]
    while todo:
        node = todo.pop()
        if isinstance(node, ast.FunctionDef) and (name, node.name) in NO_MESSAGES:
            continue
        todo += ast.iter_child_nodes(node)
        said: ast.AST | None = None
        if isinstance(node, ast.Raise):
            said = node.exc
        elif isinstance(node, ast.Return) and isinstance(
            node.value, ast.Constant | ast.JoinedStr | ast.BinOp | ast.IfExp
        ):
            said = node.value
        elif isinstance(node, ast.Call) and re.search(r"\b(warn|warning|errors\.print|_fail)$", ast.unparse(node.func)):
            said = node
        for text in strings(said) if said else ():
            if len(re.findall("[A-Za-z]+", text)) >= 3 and " " in text:  # others are names and punctuation
                yield Message(text, f"{name}:{node.lineno}")


def quotes() -> dict[str, int]:
    """What the page quotes of us, and in which line."""
    found, header = {}, ""
    for number, line in enumerate(PAGE.read_text(encoding="utf-8").splitlines(), 1):
        if not line.startswith("|"):
            header = ""
            continue
        first = line.split("|")[1].strip()
        if not header:
            header = first
        elif header == "message" and not first.startswith("---"):
            fragments = re.findall(r"`([^`]+)`", first)
            assert fragments, f"{PAGE.name}:{number} quotes no message: {first}"
            found |= dict.fromkeys(fragments, number)
    return found


def says(message: str, quote: str) -> bool:
    """Whether a message of the source has all of a quote, with values, and no words, where the quote has `...`."""
    # A message that shows an example has three dots itself.
    value = rf"\W*(?:{VALUE}|\.\.\.)\W*"
    return re.search(value.join(re.escape(piece.strip()) for piece in quote.split("...")), message) is not None


def test_every_message_is_on_the_page() -> None:
    quoted = quotes()
    missing = [
        f"{message.where} says {message.text.replace(VALUE, '...')!r}"
        for path in SOURCES
        for message in messages(path)
        if not any(says(message.text, quote) for quote in quoted)
    ]
    assert not missing, f"these have no entry in {PAGE.name}:\n" + "\n".join(missing)


def test_every_message_on_the_page_is_in_the_source() -> None:
    known = [text for path in SOURCES for text in strings(ast.parse(path.read_text(encoding="utf-8")))]
    for quote, line in quotes().items():
        assert len(max(quote.split("..."), key=len).strip()) >= 12, f"{PAGE.name}:{line} says too little: {quote!r}"
        assert any(says(text, quote) for text in known), f"{PAGE.name}:{line} quotes what nothing says: {quote!r}"


def without_code(page: Path) -> str:
    """A page's text, its code blocks emptied, line for line."""
    return re.sub(r"^```.*?^```", lambda block: "\n" * block[0].count("\n"), page.read_text("utf-8"), flags=re.M | re.S)


def anchors(page: Path) -> set[str]:
    """What `#...` may name in a page, by GitHub's rules."""
    found: Counter[str] = Counter()
    names = set()
    for heading in re.findall(r"^#{1,6} +(.+?)[ #]*$", without_code(page), re.M):
        shown = re.sub(r"!?\[([^]]*)\]\([^)]*\)", r"\1", heading)
        slug = re.sub(r"[^\w\- ]", "", shown.lower()).replace(" ", "-")
        names.add(f"{slug}-{found[slug]}" if found[slug] else slug)
        found[slug] += 1
    return names


def links(page: Path) -> Iterator[tuple[int, str]]:
    """The line and the target of each link and picture that stays in the repository."""
    for number, line in enumerate(without_code(page).splitlines(), 1):
        line = re.sub(r"`[^`]*`", "code", line)
        targets = re.findall(r"\]\(<?([^)\s>]+)[^)]*\)", line) + re.findall(r"""\b(?:src|href)=["']([^"']+)""", line)
        yield from ((number, target) for target in targets if not re.match(r"[a-z]+:", target))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links(page: Path) -> None:
    for number, target in links(page):
        path, _, anchor = target.partition("#")
        other = (page.parent / path).resolve() if path else page
        where = f"{page.name}:{number} links to {target}"
        assert other.is_relative_to(ROOT), f"{where}, outside of the repository"
        assert other.exists(), f"{where}, which does not exist"
        assert not anchor or other.suffix != ".md" or anchor in anchors(other), f"{where}, which has no such heading"
