"""What `pyproject.toml` cannot say: how the C++ kernels are built, and the README's links for a package index."""

import os
import platform
import re
import warnings
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.egg_info import egg_info
from setuptools.errors import BaseError, CCompilerError

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


class WriteMetadata(egg_info):
    """A package index has no other file of this project: the README's relative links become absolute for it."""

    def finalize_options(self) -> None:
        super().finalize_options()
        metadata = self.distribution.metadata

        def absolute(link: re.Match[str]) -> str:
            target = link[1]
            if target.startswith("#"):
                target = f"README.md{target}"
            view = "raw" if target.endswith(PICTURES) else "blob"
            return f"]({metadata.project_urls['Homepage']}/{view}/v{metadata.version}/{target})"

        metadata.long_description = re.sub(r"\]\((?!https?:)([^()\s]+)\)", absolute, metadata.long_description)


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


# In place of a link some programs write a file: git with core.symlinks=false, and some that unpack zip archives.
if not CPU.is_dir():
    raise SystemExit(
        "error: This copy of the project has lost the link vllm_selfextend/backends. Put it back with: "
        "ln -sfn ../backends vllm_selfextend/backends"
    )

setup(
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
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
    cmdclass={"build_ext": BuildKernels, "egg_info": WriteMetadata},
)
