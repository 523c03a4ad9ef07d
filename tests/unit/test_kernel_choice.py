"""Which kernels a name means on a device."""

import pytest
import torch
import vllm_selfextend.backends as backends
from vllm_selfextend.backends import choose_kernels, load_kernels, reference

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def test_auto_is_the_native_kernels_on_a_cpu() -> None:
    assert choose_kernels("auto", CPU) == "cpu"
    assert load_kernels("auto", CPU) is backends.KERNELS["cpu"]


def test_auto_is_triton_on_a_gpu_and_pytorch_elsewhere() -> None:
    assert choose_kernels("auto", CUDA) == "triton"
    assert choose_kernels("auto", torch.device("xpu")) == "reference"


def test_names_are_taken_at_their_word() -> None:
    assert load_kernels("reference", CPU) is reference
    assert choose_kernels("reference", CUDA) == "reference"


def test_unknown_kernels_are_an_error() -> None:
    with pytest.raises(ValueError, match="kernel is 'cuda'; it must be one of auto, cpu, triton, reference"):
        choose_kernels("cuda", CPU)


def test_cpu_kernels_on_a_gpu_are_an_error() -> None:
    with pytest.raises(ValueError, match="kernel is 'cpu', which cannot run on the device cuda; leave it 'auto'"):
        choose_kernels("cpu", CUDA)


def test_without_a_compiler_at_install_pytorch_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "KERNELS", {"reference": reference})
    monkeypatch.setattr(backends, "MISSING", {"cpu": "No module named '_kernels'"})
    assert choose_kernels("auto", CPU) == "reference"
    with pytest.raises(RuntimeError, match=r"cannot be loaded: No module named '_kernels'.*with a C\+\+ compiler"):
        choose_kernels("cpu", CPU)


def test_triton_kernels_on_a_cpu_need_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    assert choose_kernels("triton", CUDA) == "triton"
    monkeypatch.setattr(backends.KERNELS["triton"], "IS_INTERPRETED", False)
    with pytest.raises(ValueError, match="kernel is 'triton', which runs on a CPU under TRITON_INTERPRET=1 only"):
        choose_kernels("triton", CPU)
    monkeypatch.setattr(backends.KERNELS["triton"], "IS_INTERPRETED", True)
    assert choose_kernels("triton", CPU) == "triton"
