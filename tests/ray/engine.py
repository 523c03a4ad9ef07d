"""A program: one engine of the demo model, plain or on vLLM's Ray executor with tensor parallel 2.

    python -m tests.ray.engine plain < prompts.json
    python -m tests.ray.engine ray < prompts.json     with the stand-in GPUs on PYTHONPATH

It prints a line of JSON after the word FOUND: answers as texts and tokens, and what every worker says of itself.
"""

import json
import os
import sys
from typing import Any

import ray
from vllm import LLM, SamplingParams

from vllm_selfextend.demo import MODEL_DIR

SETTINGS: dict[str, Any] = {
    "attention_backend": "CUSTOM",
    "max_model_len": 4096,
    "dtype": "float32",
    "enforce_eager": True,
    "kv_cache_memory_bytes": 512 << 20,
}
ON_RAY = {"distributed_executor_backend": "ray", "tensor_parallel_size": 2}
SAMPLING = SamplingParams(temperature=0.0, max_tokens=8)
"""As in `examples/ray_data_batch.py`."""


def describe(worker: Any) -> dict[str, Any]:
    """Runs in a worker's process."""
    layers = [module for module in worker.get_model().modules() if hasattr(module, "get_attn_backend")]
    return {
        "actor": ray.get_runtime_context().get_actor_id() if ray.is_initialized() else None,
        "package": sys.modules["vllm_selfextend"].__file__,
        "attention": [type(layer.impl).__name__ for layer in layers],
        "query_heads": [layer.num_heads for layer in layers],
    }


def main(where: str) -> None:
    on_ray = where == "ray"
    if on_ray:
        ray.init(address="local", num_cpus=2, num_gpus=2, include_dashboard=False)
        # The engine core, a process of its own, would start a cluster of its own.
        os.environ["RAY_ADDRESS"] = ray.get_runtime_context().gcs_address
    llm = LLM(str(MODEL_DIR), **SETTINGS, **(ON_RAY if on_ray else {}))
    outputs = [output.outputs[0] for output in llm.generate(json.load(sys.stdin), SAMPLING, use_tqdm=False)]
    found = {
        "texts": [output.text for output in outputs],
        "tokens": [list(output.token_ids) for output in outputs],
        "workers": llm.collective_rpc(describe),
    }
    print("FOUND", json.dumps(found), flush=True)
    llm.llm_engine.engine_core.shutdown()
    if on_ray:
        ray.shutdown()


if __name__ == "__main__":
    main(sys.argv[1])
