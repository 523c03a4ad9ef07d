"""What may import what: read from the source, lazy imports and modules named in strings included."""

import ast
import graphlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = ("vllm_selfextend", "vllm_selfextend/backends", "benchmarks", "tests")


def source_files() -> dict[str, Path]:
    """Every module of ours, by its dotted name."""
    found = {}
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            found[".".join(parts).removesuffix(".__init__")] = path
    return found


FILES = source_files()
TREES = {name: ast.parse(path.read_text(encoding="utf-8")) for name, path in FILES.items()}


def imports(name: str) -> Iterator[str]:
    """The dotted names of everything that a module imports, at any depth of its code."""
    package = name if FILES[name].name == "__init__.py" else name.rpartition(".")[0]
    for node in ast.walk(TREES[name]):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package.split(".")[: len(package.split(".")) - node.level + 1]) if node.level else ""
            source = ".".join(filter(None, (base, node.module)))
            # `from package import module` and `from module import name` look alike.
            modules = [f"{source}.{alias.name}" for alias in node.names if f"{source}.{alias.name}" in FILES]
            yield from modules
            if len(modules) < len(node.names):
                yield source


def named_in_strings(name: str) -> Iterator[str]:
    """Modules of ours that a module names in strings, as plugins and `worker_cls` do."""
    for node in ast.walk(TREES[name]):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            names = node.value, node.value.rpartition(".")[0]
            yield from (other for other in names if "." in other and other in FILES)


def test_the_import_graph_has_no_circle() -> None:
    graph = {name: {*imports(name), *named_in_strings(name)} & FILES.keys() - {name} for name in FILES}
    assert graph["vllm_selfextend.vllm.engine_args"] >= {"vllm_selfextend.method.plan", "vllm_selfextend.vllm.support"}
    assert "vllm_selfextend.vllm.cpu_worker" in graph["vllm_selfextend.vllm.support"], "strings count"
    graphlib.TopologicalSorter(graph).prepare()  # raises CycleError


ROOMS = {
    "backends": set(),
    "method": {"backends"},
    "vllm": {"backends", "method"},
    "transformers": {"backends", "method"},
    "evaluation": {"method", "vllm"},
    "demo": {"evaluation"},
}
"""Each package of ours, and which others it may import."""

HOSTS = {"vllm": {"vllm", "evaluation"}, "transformers": {"vllm", "transformers", "evaluation"}}
"""Packages that we extend, and which of ours may import them."""

NOT_KERNELS = {"", "interface", "limits"}
"""Modules of `backends` that hold none: what `method` may know of it."""


def room(name: str) -> tuple[str, str]:
    """A module's package of ours, "" for the top level and "-" for what is not ours, and the rest of its name."""
    if name == "vllm_selfextend":
        return "", ""
    ours, _, rest = name.partition("vllm_selfextend.")
    if ours or not rest:
        return "-", name
    package, _, module = rest.partition(".")
    return (package, module) if package in ROOMS else ("", rest)


@pytest.mark.parametrize("package", ROOMS)
def test_what_a_package_may_import(package: str) -> None:
    ours = [name for name in FILES if room(name)[0] == package]
    assert len(ours) >= (20 if package == "backends" else 2)
    for name in ours:
        for imported in {*imports(name), *named_in_strings(name)}:
            other, module = room(imported)
            if other == "-":
                allowed = HOSTS.get(imported.partition(".")[0], ROOMS.keys())
                assert package in allowed, f"{name} imports {imported}"
            else:
                assert other in {package, *ROOMS[package]}, f"{name} imports {imported}"
                assert package != "method" or other == "method" or module in NOT_KERNELS, f"{name} imports {imported}"


def test_a_set_of_kernels_knows_no_other() -> None:
    """What two share lies beside them."""
    sets = {"cpu", "triton", "reference"}
    for name in FILES:
        within, module = room(name)
        if within == "backends" and (mine := module.partition(".")[0]) in sets:
            others = {room(imported)[1].partition(".")[0] for imported in imports(name)} & sets
            assert others <= {mine}, f"{name} imports {others}"


def test_kernels_and_their_benchmarks_run_without_vllm() -> None:
    """On a GPU machine with torch and triton only."""
    modules = [name for name in FILES if name.startswith("vllm_selfextend.backends")]
    modules += ["benchmarks.gpu", "benchmarks.triton_compile", "tests.gpu.test_kernels"]
    lines = ["import sys", "sys.modules['vllm'] = None", *(f"import {name}" for name in modules)]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    subprocess.run([sys.executable, "-c", "\n".join(lines)], cwd=ROOT, env=environment, check=True)


def test_a_folder_of_tests_borrows_from_no_other() -> None:
    """What two share is in `tests.support`; the GPU benchmark makes the checks of `tests.gpu`."""
    for name in FILES:
        folders = {imported.split(".")[1] for imported in imports(name) if imported.startswith("tests.")}
        own = name.split(".")[1] if name.startswith("tests.") else "gpu" if name.startswith("benchmarks.gpu") else ""
        assert folders <= {own, "support", "stand_ins"}, f"{name} imports of {folders}"


def test_the_command_leaves_files_and_digests_to_others() -> None:
    assert not {"hashlib", "shutil", "tempfile", "traceback"} & {*imports("vllm_selfextend.cli")}


def test_every_module_has_one_name() -> None:
    """`backends/` is `vllm_selfextend.backends`, whatever folder Python starts in."""
    for name in FILES:
        assert not any(imported.partition(".")[0] == "backends" for imported in imports(name)), name


def test_no_file_edits_the_import_path() -> None:
    for name, tree in TREES.items():
        for node in ast.walk(tree):
            edits = isinstance(node, ast.Attribute) and node.attr == "path" and ast.unparse(node.value) == "sys"
            assert not edits, f"{name} uses sys.path"


def test_run_time_guards_are_exceptions() -> None:
    """`python -O` removes assert statements."""
    for name, tree in TREES.items():
        if not name.startswith("tests"):
            assert not any(isinstance(node, ast.Assert) for node in ast.walk(tree)), name


@pytest.mark.parametrize("statement", ["import vllm_selfextend", "import vllm_selfextend.cli"])
def test_what_is_imported_at_once(statement: str) -> None:
    script = f"import sys; {statement}; print(*[name for name in ('torch', 'triton', 'vllm') if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


def test_the_public_api() -> None:
    import vllm_selfextend

    assert {name: getattr(vllm_selfextend, name).__name__ for name in vllm_selfextend.__all__ if name[0] != "_"} == {
        "ExtensionPlan": "ExtensionPlan",
        "PlanReport": "PlanReport",
        "SelfExtendConfig": "SelfExtendConfig",
        "plan_report": "plan_report",
    }
    assert vllm_selfextend.__version__[0].isdigit()
    assert set(vllm_selfextend.__all__) <= set(dir(vllm_selfextend))
    with pytest.raises(AttributeError, match="module 'vllm_selfextend' has no attribute 'nothing'"):
        _ = vllm_selfextend.nothing
