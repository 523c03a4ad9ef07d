"""A platform plugin of vLLM's: CPUs that count as GPUs, so that what needs Ray's GPUs can be run without any.

With this folder on `PYTHONPATH`, vLLM finds the entry point in the `.dist-info` beside it, in Ray's workers too.
"""


def register() -> str:
    """Name the platform; called while vLLM looks for one, so nothing of vLLM may be imported yet."""
    return "cpu_as_gpu.platform.CpuAsGpu"
