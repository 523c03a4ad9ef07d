"""vLLM's worker on a CPU, with one step more: after the model is loaded, its layers get their rotations."""

from typing import Any

from vllm.v1.worker.cpu_worker import CPUWorker

from .binding import bind_models


class SelfExtendCPUWorker(CPUWorker):
    """What `worker_cls` becomes; see `support.SELF_EXTEND_WORKERS`."""

    def load_model(self, **kwargs: Any) -> None:
        super().load_model(**kwargs)
        bind_models(self.model_runner, self.vllm_config)
