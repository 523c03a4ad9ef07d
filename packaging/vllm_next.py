"""An environment with the next vLLM on a CPU, before there is a build for CPUs: `python packaging/vllm_next.py FOLDER`.

PyPI's wheel is for CUDA (on x86-64 here). Its Python goes over the compiled parts of the CPU build that is installed
beside this interpreter, and everything else is taken from there. Operators that have changed since are not there or
fail: what a test of this environment shows of those is vLLM's, not ours.
"""

import importlib.util
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import zipfile
from pathlib import Path

VERSION = "0.33.0"
LOCAL = f"{VERSION}+cpu"
"""What vLLM knows a CPU build by."""

ADDED = ("orjson",)
"""What this vLLM imports without a GPU and the one before did not."""


def main(folder: Path) -> None:
    """Make a virtual environment in `folder`."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", "--clear", folder], check=True)
    (packages,) = folder.glob("lib/python*/site-packages")
    installed = sysconfig.get_paths()["purelib"]
    # As a folder of packages with their .pth files, which a mere line of a path would leave unread.
    (packages / "installed_beside.pth").write_text(f"import site; site.addsitedir({installed!r})\n", encoding="utf-8")
    with tempfile.TemporaryDirectory() as work:
        wheel = _make_wheel(Path(work))
        subprocess.run(
            [*_pip("--python", folder / "bin" / "python"), "install", "-q", "--no-deps", wheel, *ADDED], check=True
        )
    print(f"{folder} has vLLM {LOCAL}.")


def _make_wheel(work: Path) -> Path:
    """Fetch the wheel, and pack it again with the compiled parts of the installed vLLM."""
    only = ["--no-deps", "--only-binary=:all:", "--platform", "manylinux_2_28_x86_64"]
    subprocess.run([*_pip(), "download", "-q", *only, "-d", work, f"vllm=={VERSION}"], check=True)
    (wheel,) = work.glob("*.whl")
    content = work / "content"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(content, [name for name in archive.namelist() if not name.endswith(".so")])
    spec = importlib.util.find_spec("vllm")
    if spec is None or not spec.submodule_search_locations:
        sys.exit("There is no vLLM beside this interpreter: call this with that of .venv, after make install.")
    for library in Path(spec.submodule_search_locations[0]).glob("*.so"):
        shutil.copy(library, content / "vllm")
    about = content / f"vllm-{VERSION}.dist-info"
    about = about.rename(about.with_name(f"vllm-{LOCAL}.dist-info"))
    for file in (about / "METADATA", content / "vllm" / "_version.py"):
        file.write_text(file.read_text(encoding="utf-8").replace(VERSION, LOCAL), encoding="utf-8")
    packed = work / "packed"
    packed.mkdir()
    subprocess.run([sys.executable, "-m", "wheel", "pack", "-d", packed, content], check=True, capture_output=True)
    return next(packed.glob("*.whl"))


def _pip(*arguments: object) -> list[object]:
    return [sys.executable, "-m", "pip", "--disable-pip-version-check", *arguments]


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(Path(sys.argv[1]))
