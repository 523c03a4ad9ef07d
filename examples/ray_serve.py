"""The OpenAI API with Ray Serve: on the GPUs of a cluster, or with `--cpu` on this machine.

    python examples/ray_serve.py --cpu

Any client of the OpenAI API finds it at http://localhost:8000/v1; docs/ray.md has a request for curl.
"""

import argparse
import os
from typing import Any

import ray
from ray import serve
from ray.serve.llm import LLMConfig, build_openai_app

from vllm_selfextend.demo import MODEL_DIR


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(MODEL_DIR), help="a name or a path that every node knows")
    parser.add_argument("--served-model-name", default="passkey", help="what clients call it")
    parser.add_argument("--max-model-len", type=int, default=4096, help="tokens of a prompt and its answer")
    parser.add_argument("--replicas", type=int, default=1, help="copies of the model")
    parser.add_argument("--tensor-parallel", type=int, default=1, help="GPUs of each copy")
    parser.add_argument("--host", default="127.0.0.1", help="0.0.0.0 to be reached from other machines")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--cpu", action="store_true", help="start Ray on this machine, without GPUs")
    args = parser.parse_args()

    engine: dict[str, Any] = {
        "attention_backend": "CUSTOM",
        "max_model_len": args.max_model_len,
        "tensor_parallel_size": args.tensor_parallel,
    }
    where: dict[str, Any] = {}
    if args.cpu:
        engine |= {"dtype": "float32", "enforce_eager": True, "kv_cache_memory_bytes": 512 << 20}
        where = {"accelerator_config": {"kind": "cpu"}, "runtime_env": cpu_environment(args.replicas)}
        # Ray's CPUs are tickets, not cores: two for each replica, and some for what takes the requests.
        ray.init(address="local", num_cpus=2 * args.replicas + 4, num_gpus=0, include_dashboard=False)
    else:
        ray.init()

    config = LLMConfig(
        model_loading_config={"model_id": args.served_model_name, "model_source": args.model},
        engine_kwargs=engine,
        deployment_config={"num_replicas": args.replicas},
        **where,
    )
    serve.start(http_options={"host": args.host, "port": args.port})
    serve.run(build_openai_app({"llm_configs": [config]}), blocking=True)


def cpu_environment(replicas: int) -> dict[str, dict[str, str]]:
    """Replicas that share a machine share its cores: vLLM would bind each to the same ones."""
    threads = max(1, (os.cpu_count() or 1) // replicas)
    return {"env_vars": {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": str(threads)}}


if __name__ == "__main__":
    main()
