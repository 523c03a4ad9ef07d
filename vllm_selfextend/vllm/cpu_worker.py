"""vLLM's worker on a CPU, with what Self-Extend adds."""

from vllm.v1.worker.cpu_worker import CPUWorker

from .worker import SelfExtendWorker


class SelfExtendCPUWorker(SelfExtendWorker, CPUWorker):
    """What `worker_cls` becomes; see `support.SELF_EXTEND_WORKERS`."""
