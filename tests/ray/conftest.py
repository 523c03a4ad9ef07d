"""Ray's tests start programs as a user would, one after another, and nothing of them may be left."""

import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from .programs import run_engine
from .prompts import PROMPTS

RAYS_NAMES = ("ray::", "raylet", "gcs_server")


@pytest.hookimpl(tryfirst=True)  # before xdist looks
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    no_ray = pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="Ray is not installed ('.[ray]')")
    for item in items:
        if item.path.parent == Path(__file__).parent:
            item.add_marker(pytest.mark.xdist_group("ray"))
            item.add_marker(pytest.mark.ray)
            item.add_marker(no_ray)


@pytest.fixture(scope="session")
def plain() -> dict[str, Any]:
    """What one ordinary engine, without Ray, makes of the prompts."""
    return run_engine("plain", [prompt["prompt"] for prompt in PROMPTS])


@pytest.fixture(scope="session", autouse=True)
def nothing_is_left() -> Iterator[None]:
    before = set(rays_processes())
    yield
    _, left = psutil.wait_procs(set(rays_processes()) - before, timeout=60)
    assert not left


def rays_processes() -> list[psutil.Process]:
    found = psutil.process_iter(["name"])
    return [process for process in found if process.info["name"].startswith(RAYS_NAMES)]
