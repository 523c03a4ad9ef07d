"""What `mkdocs.yml` cannot say: `make docs` calls these functions while it builds the site.

The pages are written for GitHub, where the README lies above `docs/` and a link may lead to any file. On the site the
README is the front page, and a link to what is no page leads to the repository.
"""

import os
import re
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import Files
    from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[2]
OUTSIDE = {"README.md": "index.md", "CHANGELOG.md": "changelog.md", "CONTRIBUTING.md": "contributing.md"}
"""Pages that do not lie in `docs/`, and what they are on the site."""

BRANCH = "main"
LINK = re.compile(r"\]\((?![a-z]+:|#)([^()\s#]+)")
"""The target of a relative link or picture, without what follows its `#`."""


def on_config(config: "MkDocsConfig") -> None:
    config.repo_url = repository()
    config.nav = navigation(read("llms.txt"))


def on_files(files: "Files", config: "MkDocsConfig") -> None:
    from mkdocs.structure.files import File

    for path, uri in OUTSIDE.items():
        files.append(File.generated(config, uri, abs_src_path=str(ROOT / path)))
    files.append(File.generated(config, "llms.txt", content=with_raw_pages(read("llms.txt"), repository())))


def on_page_markdown(markdown: str, page: "Page", config: "MkDocsConfig", files: "Files") -> str:
    on_site = {file.abs_src_path: file.src_uri for file in files if file.inclusion.is_included()}

    def target(link: re.Match[str]) -> str:
        path = os.path.normpath(Path(page.file.abs_src_path).parent / link[1])
        if path in on_site:
            return f"]({os.path.relpath(on_site[path], os.path.dirname(page.file.src_uri))}"
        if os.path.exists(path) and Path(path).is_relative_to(ROOT):
            return f"]({in_repository(Path(path), repository())}"
        return link[0]  # MkDocs says what is wrong with it

    return LINK.sub(target, markdown)


def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def repository() -> str:
    """The project's address. Python 3.10 has no parser for the file."""
    found = re.search(r'^Source = "(.*)"$', read("pyproject.toml"), re.MULTILINE)
    if found is None:
        raise ValueError("pyproject.toml names no Source")
    return found[1]


def in_repository(path: Path, address: str) -> str:
    """Where a file or a folder is shown."""
    return f"{address}/{'tree' if path.is_dir() else 'blob'}/{BRANCH}/{path.relative_to(ROOT).as_posix()}"


def with_raw_pages(llms: str, address: str) -> str:
    """`llms.txt` for the site, where there are no Markdown files beside it."""
    return LINK.sub(rf"]({address}/raw/{BRANCH}/\1", llms)


def navigation(llms: str) -> list[dict[str, object]]:
    """The sections of `llms.txt` and the pages in them, below the front page."""
    entries: list[dict[str, object]] = [{"Home": OUTSIDE["README.md"]}]
    pages: list[dict[str, str]] = []
    for line in llms.splitlines():
        if line.startswith("## "):
            pages = []
            entries.append({line[3:]: pages})
        elif (link := re.match(r"- \[(.+?)\]\((.+?)\)", line)) and link[2] != "README.md":
            pages.append({link[1]: OUTSIDE.get(link[2], link[2].removeprefix("docs/"))})
    return entries
