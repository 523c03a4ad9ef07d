"""On a real GPU (`make test-gpu`): the kernels as compiled for it. Needs torch, triton and pytest, not vLLM."""

import os

import pytest
import torch

from vllm_selfextend.backends import load_kernels

from . import checks

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or os.environ["TRITON_INTERPRET"] == "1",
        reason="needs a GPU that torch can use, and TRITON_INTERPRET=0",
    ),
]


@pytest.mark.parametrize("check", checks.checks(small=False, num_layers=checks.NUM_LAYERS), ids=str)
def test_against_the_reference_twice_and_in_a_graph(check: checks.Check) -> None:
    result = checks.make(check, load_kernels("triton"), torch.device("cuda"))
    assert not result.problem
