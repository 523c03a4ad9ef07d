"""Engines on vLLM's V2 model runner, a GPU's default, with the Triton kernels: on a CPU, in Triton's interpreter.

`python -m tests.engine.v2_runner` reads cases from stdin (JSON: engine arguments, prompts and rounds) and writes what
they answer; a process of its own, since what a process runs on is settled when it imports vLLM.
"""

import json
import os
import sys
from collections.abc import Callable
from typing import Any


def let_triton_run_on_cpus() -> None:
    """Make vLLM's CPU worker take the V2 runner: it does if Triton has a driver, whose kernels the interpreter runs."""
    os.environ |= {"TRITON_INTERPRET": "1", "VLLM_USE_V2_MODEL_RUNNER": "1"}
    import torch
    import triton.backends
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver

    class CpuDriver:
        """What vLLM and Triton ask of a driver."""

        @staticmethod
        def is_active() -> bool:
            return True

        def get_current_target(self) -> GPUTarget:
            return GPUTarget("cpu", 0, 1)

        def get_current_device(self) -> int:
            return 0

        def set_current_device(self, device: int) -> None:
            pass

        def get_current_stream(self, device: int) -> int:
            return 0

        def get_device_interface(self) -> Any:
            return torch.cpu

        def get_active_torch_device(self) -> torch.device:
            return torch.device("cpu")

    triton.backends.backends["cpu"] = triton.backends.Backend(compiler=None, driver=CpuDriver)
    driver.set_active(CpuDriver())


def run(case: dict[str, Any], start_engine: Callable[..., Any]) -> dict[str, Any]:
    """Start an engine, and put all prompts to it as often as asked."""
    from vllm import SamplingParams

    llm = start_engine(**case["settings"])
    sampling = SamplingParams(temperature=0.0, max_tokens=case["new_tokens"], ignore_eos=True, detokenize=False)
    prompts = [{"prompt_token_ids": text} for text in case["prompts"]]
    answers = []
    for _ in range(case["rounds"]):
        outputs = llm.generate(prompts, sampling, use_tqdm=False)
        answers.append([list(output.outputs[0].token_ids) for output in outputs])
    runner = type(llm.llm_engine.model_executor.driver_worker.worker.model_runner)
    return {
        "answers": answers,
        "runner": f"{runner.__module__}.{runner.__qualname__}",
        "counters": {metric.name: metric.value for metric in llm.get_metrics() if hasattr(metric, "value")},
    }


def main() -> None:
    """Answer every line of stdin by one of stdout."""
    let_triton_run_on_cpus()
    from .conftest import engines

    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print must not lie among the answers
    with engines() as start_engine:
        for line in sys.stdin:
            print(json.dumps(run(json.loads(line), start_engine)), file=answers, flush=True)


if __name__ == "__main__":
    main()
