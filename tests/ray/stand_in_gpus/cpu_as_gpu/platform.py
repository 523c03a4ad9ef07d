from vllm.platforms.cpu import CpuPlatform


class CpuAsGpu(CpuPlatform):
    """vLLM's own CPU platform, with what Ray calls the device. vLLM's Ray executor refuses a platform without it."""

    ray_device_key = "GPU"
