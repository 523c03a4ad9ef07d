"""What GitHub and the site make of the repository: `CITATION.cff`, the form for bugs, `docs/theme/hooks.py`.

`make docs` itself holds that every page is in the navigation and that every link on the site has a target.
"""

import importlib.util
import re
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import typer
import vllm.logger  # noqa: F401  (sets vLLM's log up here: not in a test, whose stdout is closed after it)
import yaml
from vllm.entrypoints.cli.collect_env import CollectEnvSubcommand

from vllm_selfextend.cli import app

from .test_docs import PAGES, anchors

ROOT = Path(__file__).parents[2]
FORMS = ROOT / ".github/ISSUE_TEMPLATE"


@pytest.fixture(scope="module")
def hooks() -> ModuleType:
    """What `make docs` adds to MkDocs, which need not be installed for it."""
    spec = importlib.util.spec_from_file_location("hooks", ROOT / "docs/theme/hooks.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def loaded(path: Path) -> dict[str, Any]:
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def project(name: str) -> str:
    """A string of `pyproject.toml`."""
    [found] = re.findall(rf'^{name} = "(.*)"$', (ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.MULTILINE)
    return found


def test_the_citation_is_of_this_version() -> None:
    citation = loaded(ROOT / "CITATION.cff")
    said = [citation[name] for name in ("version", "license", "repository-code")]
    assert said == [project("version"), project("license"), project("Source")]


def test_the_form_for_bugs_is_one() -> None:
    form = loaded(FORMS / "bug.yml")
    assert {"name", "description"} <= set(form)
    fields = [field for field in form["body"] if field["type"] != "markdown"]
    assert {field["type"] for field in fields} == {"textarea"}
    assert all(field["attributes"]["label"] for field in fields)
    names = [field["id"] for field in fields]
    assert len(set(names)) == len(names)
    [link] = loaded(FORMS / "config.yml")["contact_links"]
    assert set(link) == {"name", "url", "about"}


def test_the_commands_that_the_form_asks_for_exist() -> None:
    known: dict[str, set[str]] = {f"vllm {CollectEnvSubcommand.name}": set()}
    for name, command in typer.main.get_command(app).commands.items():
        known[f"vllm-selfextend {name}"] = {option for parameter in command.params for option in parameter.opts}
    asked = re.findall(r"`(vllm(?:-selfextend)? \S+?)((?: [^`]*)?)`", (FORMS / "bug.yml").read_text(encoding="utf-8"))
    assert {command for command, _ in asked} >= {"vllm-selfextend plan", "vllm-selfextend doctor", "vllm collect-env"}
    for command, arguments in asked:
        assert command in known
        assert set(re.findall(r"--[\w-]+", arguments)) <= known[command], command


def test_the_links_of_the_forms_have_targets() -> None:
    text = "".join(form.read_text(encoding="utf-8") for form in FORMS.iterdir())
    links = re.findall(rf"{project('Source')}/blob/main/([\w./-]+)(?:#([\w-]+))?", text)
    assert len(links) == len(re.findall("https://", text))
    for path, anchor in links:
        assert (ROOT / path).exists(), path
        assert not anchor or anchor in anchors(ROOT / path), f"{path}#{anchor}"


def test_the_navigation_has_every_page(hooks: ModuleType) -> None:
    entries = hooks.navigation("# Title\n\n> What.\n\n## Start\n\n- [Read](README.md): me\n- [In](docs/in/a.md): it\n")
    assert entries == [{"Home": "index.md"}, {"Start": [{"In": "in/a.md"}]}]
    home, *sections = hooks.navigation(hooks.read("llms.txt"))
    pages = [
        *home.values(),
        *(uri for one in sections for group in one.values() for page in group for uri in page.values()),
    ]
    paths = [page.relative_to(ROOT).as_posix() for page in PAGES]
    assert sorted(pages) == sorted(hooks.OUTSIDE.get(path, path.removeprefix("docs/")) for path in paths)


@pytest.mark.parametrize(
    ("source", "link", "on_site"),
    [
        ("README.md", "[a](docs/install.md#cpu)", "[a](install.md#cpu)"),
        ("README.md", "![a](docs/images/passkeys.png)", "![a](images/passkeys.png)"),
        ("README.md", "[a](examples)", "[a](SOURCE/tree/main/examples)"),
        ("README.md", "[a](CHANGELOG.md)", "[a](changelog.md)"),
        ("docs/install.md", "[a](../README.md#install)", "[a](index.md#install)"),
        ("docs/install.md", "[a](gpus.md)", "[a](gpus.md)"),
        ("docs/install.md", "[a](../LICENSE)", "[a](SOURCE/blob/main/LICENSE)"),
        ("docs/recipes/one.md", "[a](../install.md)", "[a](../install.md)"),
        ("docs/recipes/one.md", "[a](../../CONTRIBUTING.md#test)", "[a](../contributing.md#test)"),
        ("docs/recipes/one.md", "[a](../../backends/cpu/ops.cpp)", "[a](SOURCE/blob/main/backends/cpu/ops.cpp)"),
        ("docs/install.md", "[a](nothing.md)", "[a](nothing.md)"),  # MkDocs ends the build
        ("docs/install.md", "[a](#cpu)", "[a](#cpu)"),
        ("docs/install.md", "[a](https://example.org/a)", "[a](https://example.org/a)"),
    ],
)
def test_links_on_the_site(hooks: ModuleType, source: str, link: str, on_site: str) -> None:
    uris = {path: hooks.OUTSIDE.get(path, path.removeprefix("docs/")) for path in (*SITE, source)}
    files = {path: site_file(ROOT / path, uri) for path, uri in uris.items()}
    found = hooks.on_page_markdown(link, SimpleNamespace(file=files[source]), None, list(files.values()))
    assert found == on_site.replace("SOURCE", project("Source"))


SITE = [page.relative_to(ROOT).as_posix() for page in PAGES] + ["docs/images/passkeys.png"]


def site_file(path: Path, uri: str) -> SimpleNamespace:
    """As much of MkDocs' `File` as the hooks use."""
    return SimpleNamespace(abs_src_path=str(path), src_uri=uri, inclusion=SimpleNamespace(is_included=lambda: True))


def test_llms_txt_on_the_site_leads_to_the_repository(hooks: ModuleType) -> None:
    found = hooks.with_raw_pages("[a](docs/ray.md): b\n[c](https://d.e)", "https://example.org/r")
    assert found == "[a](https://example.org/r/raw/main/docs/ray.md): b\n[c](https://d.e)"
