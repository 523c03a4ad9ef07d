"""Checkpoints of random models, written once, and how many threads compute them."""

from collections.abc import Callable, Iterator

import pytest
import torch

from .families import save_family


@pytest.fixture(scope="package", autouse=True)
def one_thread() -> Iterator[None]:
    """The models are so small that threads make them slower, many times so where processes share the processor."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], str]:
    """A function from the name of a family to the path of its checkpoint."""
    folder = tmp_path_factory.mktemp("families")
    return lambda name: save_family(name, folder)
