"""Engines on vLLM's V2 model runner, a GPU's default, with the Triton kernels: on a CPU, in Triton's interpreter.

FlashAttention, which does prefills there, has a stand-in, but in the workers that vLLM spawns.

`python -m tests.engine.v2_runner` reads cases from stdin (JSON, see `Case`) and writes what they answer; a process of
its own, since what a process runs on is settled when it imports vLLM.
"""

import contextlib
import json
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any, TypedDict
from unittest import mock


def let_triton_run_on_cpus() -> None:
    """Make vLLM's CPU worker take the V2 runner: it does if Triton has a driver, whose kernels the interpreter runs."""
    os.environ |= {"TRITON_INTERPRET": "1", "VLLM_USE_V2_MODEL_RUNNER": "1"}
    os.environ["TORCH_COMPILE_DISABLE"] = "1"  # vLLM has functions that are compiled in eager mode too
    os.environ |= {"VLLM_WORKER_MULTIPROC_METHOD": "spawn", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
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


class Case(TypedDict):
    """An engine and what it is asked.

    Attributes:
        settings: The engine's.
        prompts: Their tokens.
        adapters: The path of each prompt's LoRA adapter, or None; one adapter at most.
        new_tokens: How many each prompt is answered by.
        rounds: All prompts are put to the engine so often; before each round with arguments for
            `replays.capture_graphs`, graphs are captured.

    """

    settings: dict[str, Any]
    prompts: list[list[int]]
    adapters: list[str | None]
    new_tokens: int
    rounds: list[dict[str, Any] | None]


def run(case: Case, start_engine: Callable[..., Any]) -> dict[str, Any]:
    """Start an engine, and put all prompts to it as often as asked."""
    from vllm import SamplingParams
    from vllm.lora.request import LoRARequest

    llm = start_engine(**case["settings"])
    cold_layers = llm.collective_rpc(layers_without_kernels)
    llm.collective_rpc(lock_workspace)
    sampling = SamplingParams(
        temperature=0.0, max_tokens=case["new_tokens"], ignore_eos=True, detokenize=False, logprobs=0
    )
    prompts = [{"prompt_token_ids": text} for text in case["prompts"]]
    adapters = [path and LoRARequest("adapter", 1, path) for path in case["adapters"]]
    answers, logprobs, replayed = [], [], []
    for graphs in case["rounds"]:
        if graphs:
            from . import replays

            runner = llm.llm_engine.model_executor.driver_worker.worker.model_runner
            if not replayed:
                replays.spoil_cache(runner)
            replays.capture_graphs(runner, **graphs)
        outputs = llm.generate(prompts, sampling, use_tqdm=False, lora_request=adapters)
        answers.append([list(output.outputs[0].token_ids) for output in outputs])
        logprobs.append([output.outputs[0].cumulative_logprob for output in outputs])
        if graphs:
            llm.collective_rpc("execute_dummy_batch")  # as an idle data-parallel rank does
            replayed.append(replays.what_ran(runner))
    return {
        "answers": answers,
        "logprobs": logprobs,
        "replayed": replayed,
        "cold_layers": cold_layers,
        "runners": llm.collective_rpc(runner_name),
        "counters": {metric.name: metric.value for metric in llm.get_metrics() if hasattr(metric, "value")},
    }


def runner_name(worker: Any) -> str:
    kind = type(worker.model_runner)
    return f"{kind.__module__}.{kind.__qualname__}"


def lock_workspace(worker: Any) -> None:
    """As vLLM does once graphs are captured: a step that wants more is an error."""
    from vllm.v1.worker import workspace

    if workspace.is_workspace_manager_initialized():
        workspace.lock_workspace()


def layers_without_kernels(worker: Any) -> list[str]:
    """Layers, the draft's too, whose kernels are yet to be chosen and compiled, at the cost of a request."""
    layers = worker.vllm_config.compilation_config.static_forward_context
    return [name for name, layer in layers.items() if not getattr(layer.impl.layer_kernels, "made", ())]


@contextlib.contextmanager
def as_on_a_gpu(found: dict[str, Any]) -> Iterator[None]:
    """Engines of this process have what vLLM has on a GPU.

    That is a workspace manager, memory measured on the largest step before there is a cache, and FlashAttention, its
    stand-in. Into `found` go the workspace's bytes after that step, and the prefills' calls.
    """
    import torch
    from vllm.v1.worker import workspace
    from vllm.v1.worker.cpu.model_runner import CPUModelRunner
    from vllm.v1.worker.cpu_worker import CPUWorker

    from tests.support.flash_stand_in import FlashStandIn

    flash: list[FlashStandIn] = []
    profile = CPUModelRunner.profile_run

    def find_attention(head_size: int, scale: float, soft_cap: float) -> FlashStandIn:
        flash.append(FlashStandIn(scale, soft_cap))
        return flash[-1]

    def profile_run(runner: CPUModelRunner) -> None:
        workspace.init_workspace_manager(torch.device("cpu"))  # one engine's end takes away the next one's, made sooner
        profile(runner)
        found["profiled_workspace"] = workspace_size()

    with (
        mock.patch("vllm_selfextend.vllm.attention.find_attention", find_attention),
        mock.patch("vllm_selfextend.vllm.attention.HALF_DTYPES", (torch.float32,)),
        mock.patch.object(CPUWorker, "_should_warm_up_model", return_value=True),
        mock.patch.object(CPUModelRunner, "profile_run", profile_run),
    ):
        yield
    found["workspace"] = workspace_size()
    found["flash_calls"] = sorted({call for one in flash for call in one.calls})


def workspace_size() -> int:
    """How many bytes vLLM's manager holds; 0 where engines run in other processes."""
    from vllm.v1.worker import workspace

    if not workspace.is_workspace_manager_initialized():
        return 0
    manager = workspace.current_workspace_manager()
    return sum(manager._workspace_size_bytes(one) for one in manager._current_workspaces)


def main() -> None:
    """Answer every line of stdin by one of stdout."""
    let_triton_run_on_cpus()
    from .conftest import engines

    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print must not lie among the answers
    with engines() as start_engine:
        for line in sys.stdin:
            found: dict[str, Any] = {}
            with as_on_a_gpu(found):
                found |= run(json.loads(line), start_engine)
            print(json.dumps(found), file=answers, flush=True)


if __name__ == "__main__":
    main()
if __name__ == "__mp_main__":  # in the workers of several that vLLM spawns, before they import it
    let_triton_run_on_cpus()
