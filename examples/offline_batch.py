"""Answer prompts with `vllm.LLM`: the ones in `prompts.jsonl`, 500 to 2,000 tokens, by a model trained on 256.

    python examples/offline_batch.py

vLLM's log is on the same screen; `VLLM_LOGGING_LEVEL=ERROR` before the command leaves little but the answers.
"""

import argparse
import json
from pathlib import Path
from typing import Any

from vllm import LLM, SamplingParams
from vllm.platforms import current_platform

from vllm_selfextend.demo import MODEL_DIR


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(MODEL_DIR), help="a checkpoint's folder or name")
    parser.add_argument("--max-model-len", type=int, default=4096, help="tokens of a prompt and its answer")
    args = parser.parse_args()

    with Path(__file__).with_name("prompts.jsonl").open(encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
    # On a CPU, vLLM would take most of the memory for its cache, and compile for a minute or more before it begins.
    on_cpu: dict[str, Any] = {"kv_cache_memory_bytes": 512 << 20, "enforce_eager": True}
    more = on_cpu if current_platform.is_cpu() else {}
    llm = LLM(args.model, attention_backend="CUSTOM", max_model_len=args.max_model_len, **more)
    outputs = llm.generate([row["prompt"] for row in rows], SamplingParams(temperature=0.0, max_tokens=5))
    for row, output in zip(rows, outputs, strict=True):
        print(f"{len(output.prompt_token_ids):,} tokens: the key is {row['key']}, the answer{output.outputs[0].text}")


if __name__ == "__main__":  # vLLM's engine is a process of its own, which imports this file again
    main()
