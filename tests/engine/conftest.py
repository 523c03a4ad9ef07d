"""Engines for the tests of this folder. They run inside the test process: a start takes seconds instead of 15."""

import contextlib
import gc
import importlib.util
import multiprocessing
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.stand_ins import use_stand_ins

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")

if importlib.util.find_spec("torchvision") is None:  # before transformers looks
    use_stand_ins()

from vllm import LLM
from vllm.distributed import cleanup_dist_env_and_memory
from vllm.model_executor.models.transformers.base import Base

from tests.support.engine_defaults import ENGINE_DEFAULTS
from tests.support.models import save_random_model
from tests.support.oracle import next_token_logprobs


@pytest.hookimpl(tryfirst=True)  # before xdist looks
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """A module's tests, which share engines, run in one process."""
    for item in items:
        if item.path.parent == Path(__file__).parent:
            item.add_marker(pytest.mark.xdist_group(item.path.name))


@pytest.fixture(scope="session", autouse=True)
def transformers_as_it_is() -> Iterator[None]:
    """Also after an engine of vLLM's Transformers backend, through which phi goes, too.

    The backend makes transformers' classes fit for `torch.compile`, for good. Engines here run it eagerly, and other
    tests of this process need the classes.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Base, "_decorate_for_torch_compile", lambda self: None)
        yield


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], str]:
    """A function from the name of a random model to the path of its checkpoint."""
    folder = tmp_path_factory.mktemp("models")
    return lambda name: str(folder / name) if (folder / name).exists() else save_random_model(name, folder)


@pytest.fixture(scope="module")
def oracle() -> Iterator[Callable[..., list[torch.Tensor]]]:
    """The oracle in a process of its own: vLLM changes transformers' classes in the process where it runs them."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        yield lambda *args, what=next_token_logprobs: [torch.from_numpy(x) for x in pool.submit(what, *args).result()]


@contextlib.contextmanager
def engines() -> Iterator[Callable[..., LLM]]:
    """A function that starts an engine, ending the one it started before; the last one ends with the context."""
    running: list[LLM] = []

    def stop() -> None:
        if running:
            running.pop().llm_engine.engine_core.shutdown()
        # An engine that did not start leaves its process groups too, which another model may not do with.
        gc.collect()
        cleanup_dist_env_and_memory()

    def start(model: str | Path, **settings: Any) -> LLM:
        stop()
        running.append(LLM(str(model), **{**ENGINE_DEFAULTS, **settings}))
        return running[0]

    yield start
    stop()


@pytest.fixture(scope="module")
def start_engine() -> Iterator[Callable[..., LLM]]:
    """See `engines`; the last one ends with the module."""
    with engines() as start:
        yield start
