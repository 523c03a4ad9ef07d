"""Answer a file of prompts with Ray Data: on the GPUs of a cluster, or with `--cpu` on this machine.

    python examples/ray_data_batch.py examples/prompts.jsonl answers --cpu

Each row has an `id` of its own and a `prompt`. Answers are rows of `id`, `answer` and `error` in files of the folder
ANSWERS, in the prompts' format. A run that was broken off goes on when started again: what has a row there is done.
"""

import argparse
import json
import os
from pathlib import Path
from typing import Any
from uuid import uuid4

import pyarrow
import pyarrow.parquet
import ray
from ray.data.llm import build_processor, vLLMEngineProcessorConfig

from vllm_selfextend.demo import MODEL_DIR


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("prompts", help="a .jsonl or .parquet file")
    parser.add_argument("answers", type=Path, help="a folder, made if it is not there")
    parser.add_argument("--model", default=str(MODEL_DIR), help="a name or a path that every node knows")
    parser.add_argument("--max-model-len", type=int, default=4096, help="tokens of a prompt and its answer")
    parser.add_argument("--max-tokens", type=int, default=8, help="tokens of an answer")
    parser.add_argument("--engines", type=int, default=1, help="copies of the model")
    parser.add_argument("--tensor-parallel", type=int, default=1, help="GPUs of each copy")
    parser.add_argument("--batch", type=int, default=64, help="rows given to an engine at once, and rows of a file")
    parser.add_argument("--chat", action="store_true", help="ask through the model's chat template")
    parser.add_argument("--cpu", action="store_true", help="start Ray on this machine, without GPUs")
    args = parser.parse_args()

    suffix = Path(args.prompts).suffix
    if suffix not in (".jsonl", ".parquet"):
        parser.error(f"{args.prompts}: the prompts' file ends in {suffix!r}, not in .jsonl or .parquet")

    engine: dict[str, Any] = {
        "attention_backend": "CUSTOM",
        "max_model_len": args.max_model_len,
        "tensor_parallel_size": args.tensor_parallel,
    }
    where: dict[str, Any] = {}
    if args.cpu:
        engine |= {"dtype": "float32", "enforce_eager": True, "kv_cache_memory_bytes": 512 << 20}
        where = {"placement_group_config": {"bundles": [{"CPU": 1}]}, "runtime_env": cpu_environment(args.engines)}
        # Ray's CPUs are tickets, not cores: one for each engine, and some for the steps between them.
        ray.init(address="local", num_cpus=args.engines + 4, num_gpus=0, include_dashboard=False)
    else:
        ray.init()

    rows = ray.data.read_json(args.prompts) if suffix == ".jsonl" else ray.data.read_parquet(args.prompts)
    columns = rows.columns() or []
    if missing := {"id", "prompt"} - set(columns):
        parser.error(f"{args.prompts} has the columns {columns}; {' and '.join(sorted(missing))} must be among them")
    done = {row["id"] for path in args.answers.glob(f"*{suffix}") for row in read(path)}
    todo = rows.filter(lambda row: row["id"] not in done)
    print(f"{len(done)} rows have been answered before.")
    if not todo.take(1):
        return

    config = vLLMEngineProcessorConfig(
        model_source=args.model,
        engine_kwargs=engine,
        concurrency=(args.engines, args.engines),
        batch_size=args.batch,
        chat_template_stage=args.chat,
        tokenize_stage=False,  # the engine does it
        detokenize_stage=False,
        should_continue_on_error=True,  # a prompt that is too long costs its own answer only
        **where,
    )
    sampling = {"temperature": 0.0, "max_tokens": args.max_tokens}

    def ask(row: dict[str, Any]) -> dict[str, Any]:
        question = {"messages": [{"role": "user", "content": row["prompt"]}]} if args.chat else {}
        return {**question, "sampling_params": sampling}

    answered = build_processor(config, preprocess=ask)(todo.repartition(target_num_rows_per_block=args.batch))
    args.answers.mkdir(parents=True, exist_ok=True)
    for table in answered.iter_batches(batch_size=None, batch_format="pyarrow"):
        kept = table.select(["id", "generated_text", "__inference_error__"]).rename_columns(["id", "answer", "error"])
        write(kept, args.answers / f"{uuid4().hex}{suffix}")
        print(f"{kept.num_rows} rows answered, {sum(map(bool, kept['error'].to_pylist()))} with an error.", flush=True)


def cpu_environment(engines: int) -> dict[str, dict[str, str]]:
    """Engines that share a machine share its cores: vLLM would bind each to the same ones."""
    threads = max(1, (os.cpu_count() or 1) // engines)
    return {"env_vars": {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": str(threads)}}


def read(path: Path) -> list[dict[str, Any]]:
    if path.suffix == ".parquet":
        rows: list[dict[str, Any]] = pyarrow.parquet.read_table(path).to_pylist()
        return rows
    with path.open(encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def write(rows: pyarrow.Table, path: Path) -> None:
    """The file is there whole or not at all, whenever this process is stopped."""
    partial = path.with_suffix(".partial")
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(rows, partial)
    else:
        lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows.to_pylist())
        partial.write_text("".join(lines), encoding="utf-8")
    partial.rename(path)


if __name__ == "__main__":
    main()
