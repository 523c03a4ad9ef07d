"""How tests start an engine, where they do not say otherwise."""

from typing import Any

ENGINE_DEFAULTS: dict[str, Any] = {
    "skip_tokenizer_init": True,
    "enforce_eager": True,
    "dtype": "float32",
    "block_size": 32,
    "max_num_seqs": 16,
    "kv_cache_memory_bytes": 64 << 20,
    "disable_log_stats": False,
}
