"""vLLM's workers, with one step more: after the model is loaded, its layers get their rotations.

Chosen through vLLM's own `worker_cls`; the classes are made when a worker process asks for them, so that no other
process imports vLLM's worker code.
"""

from typing import Any

SELF_EXTEND_WORKERS = {
    "vllm.v1.worker.cpu_worker.CPUWorker": f"{__name__}.SelfExtendCPUWorker",
    "vllm.v1.worker.gpu_worker.Worker": f"{__name__}.SelfExtendGPUWorker",
}
"""vLLM's worker class to ours."""


def __getattr__(name: str) -> type:
    for base_path, path in SELF_EXTEND_WORKERS.items():
        if path == f"{__name__}.{name}":
            worker = globals()[name] = _make_worker(name, base_path)
            return worker
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def _make_worker(name: str, base_path: str) -> type:
    from vllm.utils.import_utils import resolve_obj_by_qualname

    from .binding import bind_models

    base = resolve_obj_by_qualname(base_path)

    def load_model(self: Any, **kwargs: Any) -> None:
        base.load_model(self, **kwargs)
        bind_models(self.model_runner, self.vllm_config)

    return type(name, (base,), {"__module__": __name__, "__doc__": base.__doc__, "load_model": load_model})
