"""Which kernels a name means on a device."""

import sys
from pathlib import Path

import pytest
import torch

from vllm_selfextend import backends
from vllm_selfextend.backends import KernelSet, choose_kernels, cpu, load_kernels, reference, triton

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def test_auto_is_the_native_kernels_on_a_cpu() -> None:
    assert choose_kernels("auto", CPU) == ("cpu", cpu.KERNELS, {})


def test_auto_is_triton_on_a_gpu_and_pytorch_elsewhere() -> None:
    assert choose_kernels("auto", CUDA) == ("triton", triton.KERNELS, {})
    assert choose_kernels("auto", torch.device("xpu")) == ("reference", reference.KERNELS, {})


def test_names_are_taken_at_their_word() -> None:
    assert load_kernels("reference") is reference.KERNELS
    assert load_kernels("cpu") is cpu.KERNELS
    assert choose_kernels("reference", CUDA).name == "reference"


def test_unknown_kernels_are_an_error() -> None:
    for call in (load_kernels, lambda name: choose_kernels(name, CPU)):
        with pytest.raises(ValueError, match="kernel is 'cuda'; it must be one of auto, cpu, triton, reference"):
            call("cuda")


def test_cpu_kernels_on_a_gpu_are_an_error() -> None:
    with pytest.raises(ValueError, match=r"the cpu kernels cannot run on the device cuda: they run on CPUs.*'auto'"):
        choose_kernels("cpu", CUDA)


def test_without_a_compiler_at_install_pytorch_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> None:
        raise ImportError("No module named '_kernels'")

    monkeypatch.setitem(backends.KERNEL_SETS, "cpu", KernelSet(missing, "cpu"))
    assert choose_kernels("auto", CPU) == ("reference", reference.KERNELS, {"cpu": "No module named '_kernels'"})
    with pytest.raises(RuntimeError, match=r"cannot be loaded: No module named '_kernels'; or set kernel to 'refer"):
        choose_kernels("cpu", CPU)


def test_a_clone_imported_in_the_place_of_what_is_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As by Python started in the clone's root after an install that is not editable."""
    clone, site = tmp_path / "clone", tmp_path / "site-packages"
    for root in (clone, site):
        (root / "vllm_selfextend/backends/cpu").mkdir(parents=True)
    # pip's build leaves metadata in the clone, too.
    for folder in (clone / "vllm_selfextend.egg-info", site / "vllm_selfextend-0.0.dist-info"):
        folder.mkdir()
        for name in ("METADATA", "PKG-INFO"):
            (folder / name).write_text("Metadata-Version: 2.1\nName: vllm-selfextend\nVersion: 0.0\n")
    for name in [name for name in sys.modules if name.startswith(f"{cpu.__name__}._kernels")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(cpu, "__path__", [str(clone / "vllm_selfextend/backends/cpu")])
    monkeypatch.setattr(sys, "path", [str(clone)])
    with pytest.raises(ImportError, match=r"built when vllm-selfextend is installed with a C\+\+ compiler"):
        cpu._register_operators()
    monkeypatch.setattr(sys, "path", [str(clone), str(site)])
    for built in ("nothing", "_kernels_torch1_0.abi3.so"):
        (clone / "vllm_selfextend/backends/cpu" / built).touch()
        with pytest.raises(ImportError) as refused:
            cpu._register_operators()
        assert f"imported from {clone}/vllm_selfextend, where they are not built for torch" in str(refused.value)
        assert f"not from {site}/vllm_selfextend, where it is installed: start Python in another" in str(refused.value)


def test_triton_kernels_on_a_cpu_need_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    assert choose_kernels("triton", CUDA).name == "triton"
    monkeypatch.setattr(triton, "IS_INTERPRETED", False)
    with pytest.raises(ValueError, match="device cpu: on a CPU they run under TRITON_INTERPRET=1 only"):
        choose_kernels("triton", CPU)
    monkeypatch.setattr(triton, "IS_INTERPRETED", True)
    assert choose_kernels("triton", CPU).name == "triton"


def test_triton_kernels_need_ampere() -> None:
    with pytest.raises(
        ValueError,
        match=r"compute capability of 8\.0 \(Ampere\).* is 7\.5\. Set kernel to 'refer",
    ):
        choose_kernels("auto", CUDA, (7, 5))
    assert choose_kernels("auto", CUDA, (8, 0)).name == "triton"
    assert choose_kernels("reference", CUDA, (7, 5)).name == "reference"


def test_what_the_sets_say_of_head_sizes_and_graphs() -> None:
    assert [size for size in range(1, 600) if not cpu.KERNELS.unsupported_head_size(size)] == [*range(16, 513, 16)]
    assert cpu.KERNELS.unsupported_head_size(24) == "they take multiples of 16 up to 512"
    assert [size for size in (24, 256, 257) if not triton.KERNELS.unsupported_head_size(size)] == [24, 256]
    assert reference.KERNELS.unsupported_head_size(24) is None
    assert [one.KERNELS.IS_CAPTURABLE for one in (cpu, triton, reference)] == [False, True, False]
    assert [one.KERNELS.VARIANT for one in (cpu, reference)] == [cpu.INSTRUCTION_SETS[0], "PyTorch"]
