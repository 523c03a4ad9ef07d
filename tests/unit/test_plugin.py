from importlib.metadata import PackageNotFoundError, version

import pytest

from vllm_selfextend import plugin


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


def test_a_missing_interface_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    interface = (("vllm.engine.arg_utils", "EngineArgs.create_engine_config", ("no_such_parameter",)),)
    monkeypatch.setattr(plugin, "_INTERFACE", interface)
    assert "EngineArgs.create_engine_config has no no_such_parameter" in (plugin.incompatibility() or "")
    monkeypatch.setattr(plugin, "_INTERFACE", (("vllm.engine.arg_utils", "EngineArgs.no_such_method", ()),))
    assert "has no vllm.engine.arg_utils.EngineArgs.no_such_method" in (plugin.incompatibility() or "")
