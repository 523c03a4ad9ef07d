"""Checkpoints of random models, written once."""

from collections.abc import Callable

import pytest

from .families import save_family


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], str]:
    """A function from the name of a family to the path of its checkpoint."""
    folder = tmp_path_factory.mktemp("families")
    return lambda name: save_family(name, folder)
