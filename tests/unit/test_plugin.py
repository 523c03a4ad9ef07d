import dataclasses
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from pkgutil import resolve_name

import pytest
import torch
from vllm.config import VllmConfig
from vllm.engine.arg_utils import EngineArgs
from vllm.v1.attention.backends import registry

from vllm_selfextend.backends import cpu, triton
from vllm_selfextend.demo import MODEL_DIR
from vllm_selfextend.method.plan import read_plan
from vllm_selfextend.vllm import engine_args, patches, plugin
from vllm_selfextend.vllm.patches import PATCHES, Patch


def test_the_installed_vllm_fits() -> None:
    assert plugin.incompatibility() is None


@pytest.mark.parametrize("installed", ["0.31.2", "0.34.0", "1.0"])
def test_other_versions_are_named(monkeypatch: pytest.MonkeyPatch, installed: str) -> None:
    monkeypatch.setattr(plugin, "_vllm_version", lambda: installed)
    message = (
        rf"vllm-selfextend [\d.]+ supports vLLM (<0\.34,>=0\.32|>=0\.32,<0\.34), but vLLM {installed} is installed"
    )
    with pytest.raises(AssertionError, match=message):
        raise AssertionError(plugin.incompatibility())


@pytest.mark.parametrize("ray", ["2.60.0", None])
def test_ray_that_replaced_vllm_is_named(monkeypatch: pytest.MonkeyPatch, ray: str | None) -> None:
    def installed_version(name: str) -> str:
        if name != "ray":
            return version(name)
        if ray is None:
            raise PackageNotFoundError(name)
        return ray

    monkeypatch.setattr(plugin, "version", installed_version)
    monkeypatch.setattr(plugin, "_vllm_version", lambda: "0.29.0")
    problem = plugin.incompatibility() or ""
    assert "but vLLM 0.29.0 is installed." in problem
    advice = "If ray[llm] 2.60.0 replaced it by the one that it pins: install ray[serve,data]==2.60.0 instead"
    assert (advice in problem) == (ray is not None)
    assert ("ray" in problem) == (ray is not None)


@pytest.mark.parametrize("installed", ["0.32.0", "0.33.1", "0.33.0rc1", "0.32.0+cpu"])
def test_supported_versions(monkeypatch: pytest.MonkeyPatch, installed: str) -> None:
    monkeypatch.setattr(plugin, "_vllm_version", lambda: installed)
    assert plugin.incompatibility() is None


@pytest.mark.parametrize(
    ("name", "parameter", "words"),
    [
        ("create_engine_config", "no_such_parameter", "EngineArgs.create_engine_config has no no_such_parameter"),
        ("no_such_method", "", "has no vllm.engine.arg_utils.EngineArgs.no_such_method"),
    ],
)
@pytest.mark.parametrize("table", ["PATCHES", "USED"])
def test_what_is_missing_is_named(
    table: str, name: str, parameter: str, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    needs = (parameter,) if parameter else ()
    patch = Patch("vllm.engine.arg_utils.EngineArgs", name, "", "", "", needs)
    row = patch if table == "PATCHES" else (f"{patch.owner}.{name}", needs)
    monkeypatch.setattr(patches, table, (row,))
    assert words in (plugin.incompatibility() or "")


def test_every_wrapper_wraps_and_the_page_names_it() -> None:
    """What only another version or platform has is in the table all the same."""
    plugin.register()
    for patch in PATCHES:
        if patch.holder is not None:
            assert getattr(getattr(patch.holder, patch.name), "_self_extend", False), patch
        assert callable(resolve_name(patch.wrapper))
    assert sum(patch.holder is not None for patch in PATCHES) >= 4
    page = (Path(__file__).parents[2] / "docs" / "compatibility.md").read_text(encoding="utf-8")
    head, _, rest = page.partition("| function | why | what would end it |\n|---|---|---|\n")
    assert head
    assert rest.partition("\n\n")[0].splitlines() == [patch.row() for patch in PATCHES]


@pytest.fixture
def configure(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], VllmConfig]]:
    """What configures an engine, in a vLLM that has not loaded the plugin yet; afterwards it has."""
    plugin.register()
    custom = registry.AttentionBackendEnum.CUSTOM
    backend = custom.get_path()
    custom.clear_override()
    monkeypatch.setattr(engine_args, "_replaced", None)
    monkeypatch.setattr(EngineArgs, "create_engine_config", EngineArgs.create_engine_config.__wrapped__)
    yield lambda: EngineArgs(str(MODEL_DIR), attention_backend="CUSTOM", max_model_len=1024).create_engine_config()
    registry.register_backend(custom, backend)


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The lines that Self-Extend logs. (vLLM sets its loggers up anew on its way, so none could be listened to.)"""
    lines: list[str] = []
    for level in ("info", "warning"):

        def log(message: str, *values: object, level: str = level) -> None:
            lines.append(f"{level}: {message % values}")

        monkeypatch.setattr(engine_args.logger, level, log)
    return lines


def test_start_up_says_what_serves_and_why(configure: Callable[[], VllmConfig], said: list[str]) -> None:
    plugin.register()
    configure()
    assert said == [
        "info: Self-Extend: trained length 256, neighbor window 64, group size by position, 10 at 1024 tokens. "
        "Prompts within the trained length are answered as by the unmodified model.",
        f"info: Self-Extend's attention runs on the cpu kernels ({cpu.KERNELS.VARIANT}).",
    ]


def test_the_gpu_that_serves_is_named(
    configure: Callable[[], VllmConfig], said: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    plugin.register()
    vllm_config = configure()
    vllm_config.device_config.device = torch.device("cuda")
    monkeypatch.setattr(engine_args.current_platform, "get_device_name", lambda: "NVIDIA H100", raising=False)
    engine_args.apply_plan(vllm_config, dataclasses.replace(read_plan(vllm_config), kernel="auto"))
    assert (
        said[-1] == f"info: Self-Extend's attention runs on the triton kernels ({triton.KERNELS.VARIANT}, NVIDIA H100)."
    )


def test_a_plugin_that_had_custom_before_is_named(configure: Callable[[], VllmConfig], said: list[str]) -> None:
    registry.register_backend(registry.AttentionBackendEnum.CUSTOM, "other.Backend")
    plugin.register()
    plugin.register()
    configure()
    warning = (
        "warning: The attention backend CUSTOM is Self-Extend; another vLLM plugin had registered other.Backend for it."
    )
    assert said[0].startswith(warning)


def test_a_plugin_that_took_custom_later_is_an_error(configure: Callable[[], VllmConfig]) -> None:
    plugin.register()
    registry.register_backend(registry.AttentionBackendEnum.CUSTOM, "other.Backend")
    with pytest.raises(ValueError, match=r"CUSTOM is other\.Backend, not Self-Extend.*VLLM_PLUGINS=selfextend"):
        configure()
