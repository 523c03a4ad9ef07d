"""vLLM's worker on a GPU, with what Self-Extend adds."""

from vllm.v1.worker.gpu_worker import Worker

from .worker import SelfExtendWorker


class SelfExtendGPUWorker(SelfExtendWorker, Worker):
    """What `worker_cls` becomes; see `support.SELF_EXTEND_WORKERS`."""
