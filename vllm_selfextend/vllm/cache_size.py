"""What a model takes in an engine's KV cache, asked of vLLM's own code: it makes the model, without weights.

Which layers keep keys or a state, of what size, and how vLLM lays them out in blocks, each architecture says in its own
way; no config tells it for all of them. vLLM keeps process groups and parts of models for the rest of a process: these
functions are for one that ends with them.
"""

import tempfile
from dataclasses import dataclass

import torch
from torch import nn
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.distributed.parallel_state import (
    ensure_model_parallel_initialized,
    init_distributed_environment,
    model_parallel_is_initialized,
)
from vllm.model_executor.model_loader.utils import initialize_model
from vllm.platforms import current_platform
from vllm.utils.math_utils import cdiv
from vllm.utils.torch_utils import set_default_torch_dtype
from vllm.v1.kv_cache_interface import AttentionSpec
from vllm.v1.worker.gpu.attn_utils import get_kv_cache_spec

from .attention import SelfExtendBackend

try:
    from vllm.v1.core import kv_cache_planning  # since vLLM 0.33
except ImportError:
    from vllm.v1.core import kv_cache_utils as kv_cache_planning


@dataclass(frozen=True)
class CacheSize:
    """Bytes, of all devices together.

    Attributes:
        per_token: What the layers that keep keys and values store for a token.
        per_sequence: What vLLM reserves for a sequence of `max_model_len` tokens: whole blocks, of layers with a
            sliding window only what they see, of Mamba and the like their state.

    """

    per_token: int
    per_sequence: int


def make_model(vllm_config: VllmConfig) -> nn.Module:
    """The model of a configured engine, whole and with no weights in it.

    The config is used up: it becomes that of a single device, and knows the model's layers.

    Raises:
        ValueError: vLLM or Self-Extend refuses a layer, or vLLM's code for the model fails.

    """
    for size in ("tensor_parallel_size", "pipeline_parallel_size", "data_parallel_size", "nnodes"):
        setattr(vllm_config.parallel_config, size, 1)
    with set_current_vllm_config(vllm_config), set_default_torch_dtype(vllm_config.model_config.dtype):
        if not model_parallel_is_initialized():
            with tempfile.TemporaryDirectory() as folder:
                init_distributed_environment(1, 0, f"file://{folder}/init", 0, "gloo")
                ensure_model_parallel_initialized(1, 1)
        try:
            try:
                with torch.device("meta"):
                    model: nn.Module = initialize_model(vllm_config)
            except RuntimeError:  # of code that reads a number while it makes the model, such as Apertus's
                vllm_config.compilation_config.static_forward_context.clear()
                with torch.device("cpu"):  # weights that nobody writes take no memory here either
                    model = initialize_model(vllm_config)
        except (ValueError, NotImplementedError):
            raise
        except Exception as error:
            raise ValueError(f"vLLM's code for it fails here with {type(error).__name__}: {error}") from error
    return model


def cache_size(vllm_config: VllmConfig) -> CacheSize:
    """What the model made by `make_model` takes."""
    cache_config = vllm_config.cache_config
    with set_current_vllm_config(vllm_config):
        current_platform.update_block_size_for_backend(vllm_config)
        specs = get_kv_cache_spec(vllm_config)
        if cache_config.kv_cache_layout is None:
            cache_config.kv_cache_layout = SelfExtendBackend.supported_kv_cache_layouts()[0].name
        per_token = sum(
            spec.real_page_size_bytes // spec.block_size for spec in specs.values() if isinstance(spec, AttentionSpec)
        )
        groups = kv_cache_planning.get_kv_cache_groups(vllm_config, specs)
        # As in vLLM's get_max_concurrency_for_kv_cache_config: every group takes its blocks out of one pool.
        num_blocks = sum(
            cdiv(group.kv_cache_spec.max_memory_usage_bytes(vllm_config), group.kv_cache_spec.page_size_bytes)
            for group in groups
        )
        return CacheSize(per_token, kv_cache_planning._pool_bytes_per_block(vllm_config, groups) * num_blocks)
