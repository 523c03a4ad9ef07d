"""What a running engine keeps, from its tensors and its scheduler: to hold the plan's numbers against."""

from collections.abc import Iterable
from typing import Any

from vllm import LLM
from vllm.model_executor.layers.attention import Attention
from vllm.v1.core.kv_cache_utils import get_max_concurrency_for_kv_cache_config


def cache_bytes(llm: LLM) -> tuple[int, int]:
    """Bytes of keys and values per token, and what is reserved for a sequence of `max_model_len` tokens."""
    core = llm.llm_engine.engine_core.engine_core
    layers: Iterable[Any] = core.vllm_config.compilation_config.static_forward_context.values()
    per_token, pools = 0, {}
    for layer in layers:
        cache: Any = getattr(layer, "kv_cache", ())
        if isinstance(layer, Attention):  # `[blocks, heads, tokens, numbers]`
            if layer.kv_sharing_target_layer_name is None:
                per_token += cache.shape[1] * cache.shape[3] * cache.element_size()
            cache = [cache]
        for tensor in cache:
            storage = tensor.untyped_storage()
            pools[storage.data_ptr()] = storage.nbytes()
    sequences = get_max_concurrency_for_kv_cache_config(core.vllm_config, core.scheduler.kv_cache_config)
    return per_token, round(sum(pools.values()) / sequences)
