"""What the rule of automatic group sizes rests on: `python -m benchmarks.group_size_rule MODEL`.

Each row has other numbers for it: `T`, the share of the trained length that relative positions stay below, and the
significant bits of a group size (3: four steps to each doubling); with `log_scale` or without, and beside it one group
size for all positions. What is measured: passkeys that the demo's model misses, and the loss of MODEL past its trained
length, on the texts that `vllm-selfextend evaluate` takes or on your own. Every row is a process of its own.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

ROWS = [
    {"share": share, "bits": bits, "log_scale": log_scale}
    for share, bits in ((2 / 3, 4), (0.8, 4), (0.9, 4), (1.0, 4), (2 / 3, 3), (2 / 3, 5), (1.0, 3), (1.0, 5))
    for log_scale in (True, False)
]
DEMO_LENGTHS = (512, 1024, 2048, 3000, 4096)
DEPTHS = 21
ROUNDS = 3


def main(
    model: Annotated[str, typer.Argument(help="of which the loss is measured")],
    length: Annotated[int, typer.Option(help="tokens of each text")] = 16384,
    text: Annotated[list[Path] | None, typer.Option(help="a long text; without one, those of `evaluate`")] = None,
    group_size: Annotated[list[int] | None, typer.Option(help="one for all positions, W 1,024, as the control")] = None,
    keys: Annotated[bool, typer.Option(help="the demo's passkeys too")] = True,
    dtype: Annotated[str, typer.Option(help="of the loss")] = "bfloat16",
    json_path: Annotated[Path | None, typer.Option("--json", help="append the rows here")] = None,
) -> None:
    """Measure every row."""
    fixed = [{"group_size": one, "log_scale": log_scale} for one in group_size or () for log_scale in (True, False)]
    environment = {**os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_NUM_OF_RESERVED_CPU": "0"}
    for row in ROWS + fixed:
        asked = {
            **row,
            "model": model,
            "length": length,
            "texts": [str(one) for one in text or ()],
            "keys": keys,
            "dtype": dtype,
        }
        command = [sys.executable, "-m", "benchmarks.group_size_rule", "--row", json.dumps(asked)]
        done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
        line = done.stdout.splitlines()[-1]
        print(line, flush=True)
        if json_path is not None:
            with json_path.open("a") as file:
                print(line, file=file)


def measure(asked: dict[str, Any]) -> dict[str, Any]:
    """One row."""
    from vllm_selfextend.method import positions

    if "share" in asked:
        share = asked["share"]
        positions.auto_reach = lambda trained_length: int(share * trained_length)
        positions.SIGNIFICANT_BITS = asked["bits"]
    settings: dict[str, Any] = {name: asked[name] for name in ("group_size", "log_scale") if name in asked}
    kept = ("share", "bits", "group_size", "log_scale", "model", "length", "dtype")
    row = {name: asked[name] for name in kept if name in asked}
    if asked["keys"] and "share" in asked:
        row["demo_keys_missed"] = missed_keys(settings)
    return {**row, "loss_past_trained_length": losses(asked, settings)}


def missed_keys(settings: dict[str, Any]) -> dict[str, str]:
    """Of the demo's model in float32, by length."""
    from vllm_selfextend.demo import MODEL_DIR
    from vllm_selfextend.evaluation.engine import prompt_encoder
    from vllm_selfextend.evaluation.passkey import PasskeyTask

    depths = tuple(depth / (DEPTHS - 1) for depth in range(DEPTHS))
    task = PasskeyTask(DEMO_LENGTHS, depths, key_counts=(1, 4), rounds=ROUNDS)
    encode, _, _ = prompt_encoder(str(MODEL_DIR), {}, chat=False)
    missed = dict.fromkeys(DEMO_LENGTHS, 0)
    asked = dict.fromkeys(DEMO_LENGTHS, 0)
    for prompt, score in answers(str(MODEL_DIR), "float32", max(DEMO_LENGTHS), settings, task, encode):
        asked[prompt.cell["length"]] += 1
        missed[prompt.cell["length"]] += not score["found"]
    return {str(length): f"{missed[length]} of {asked[length]}" for length in DEMO_LENGTHS}


def losses(asked: dict[str, Any], settings: dict[str, Any]) -> dict[str, float]:
    """Per token, by text."""
    from vllm_selfextend.evaluation.engine import prompt_encoder
    from vllm_selfextend.evaluation.loss import loss_task, mean_losses
    from vllm_selfextend.vllm.report import plan_report

    trained = plan_report(asked["model"], asked["length"], {}).trained_length
    task = loss_task([Path(name) for name in asked["texts"]], asked["length"], asked["length"])
    _, encode, _ = prompt_encoder(asked["model"], {}, chat=False)
    window = {"neighbor_window": 1024} if "group_size" in settings else {}
    found = {}
    for prompt, score in answers(asked["model"], asked["dtype"], asked["length"], settings | window, task, encode):
        num_tokens = len(prompt.token_ids)
        blocks = [one for one in mean_losses(score["block_losses"], num_tokens) if one[0] >= trained]
        found[prompt.cell["text"]] = sum((end - begin) * mean for begin, end, mean in blocks) / (num_tokens - trained)
    return {name: round(loss, 4) for name, loss in found.items()}


def answers(
    model: str, dtype: str, max_model_len: int, settings: dict[str, Any], task: Any, encode: Any
) -> list[tuple[Any, dict[str, Any]]]:
    """Every prompt of a task and its score."""
    from vllm import LLM

    from vllm_selfextend.evaluation.engine import ask

    llm = LLM(
        model,
        dtype=dtype,
        max_model_len=max_model_len,
        max_num_batched_tokens=2048,
        enforce_eager=True,
        attention_backend="CUSTOM",
        additional_config={"self_extend": settings},
        kv_cache_memory_bytes=2 << 30,
        disable_log_stats=True,
    )
    found: list[tuple[Any, dict[str, Any]]] = []
    ask(llm, task, task.prompts(encode), lambda prompt, score: found.append((prompt, score)))
    llm.llm_engine.engine_core.shutdown()
    return found


if __name__ == "__main__":
    if sys.argv[1:2] == ["--row"]:
        print(json.dumps(measure(json.loads(sys.argv[2]))))
    else:
        typer.run(main)
