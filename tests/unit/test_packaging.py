"""What a package index is told; `tests/dist` has the package itself."""

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_the_readme_on_a_package_index_has_no_relative_links() -> None:
    home, version, readme = setup("--url"), setup("--version"), setup("--long-description")
    targets = [*re.findall(r"\]\(([^()]*)\)", readme), *re.findall(r"(?:src|href)=\"([^\"]*)\"", readme)]
    assert all(re.match("https?://", target) for target in targets), targets
    assert not re.search(r"^\[.*\]: ", readme, re.MULTILINE), "reference links are not made absolute"
    ours = [target.removeprefix(f"{home}/") for target in targets if target.startswith(f"{home}/")]
    pictures = [target.removeprefix(f"raw/v{version}/") for target in ours if target.startswith("raw")]
    pages = [target.removeprefix(f"blob/v{version}/").partition("#")[0] for target in ours if target.startswith("blob")]
    assert "docs/images/real_model_passkeys.png" in pictures
    assert "docs/models.md" in pages
    for path in [*pictures, *pages]:
        assert (ROOT / path).exists(), path


def setup(question: str) -> str:
    command = [sys.executable, "setup.py", question]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()
