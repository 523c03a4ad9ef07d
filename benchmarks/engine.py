"""Whole engine against whole engine: vLLM with Self-Extend and without on a CPU, `python -m benchmarks.engine`.

Both serve the same small random Llama, shaped so that attention is most of the work, whose config allows the lengths
that stock vLLM is asked for. Each engine has a process of its own; both stay up and take rounds in turns (stock, ours,
stock, ours, ...), with prompts that are new every round. Results are medians over the rounds. A round is two loads:

prefill   The prompts come in cold, with one new token each. Counted are the prompts' tokens.
decode    The same prompts come again, now with many new tokens each. Prefix caching is on, so their keys and values are
          in the cache but for each prompt's last block. They come once more with one new token, and the difference of
          the two times is that of the other new tokens alone; these are counted. (The time of the cold prefill is not
          subtracted: it is many times the decode's, and so is its noise.)

Eager mode, so that no compiler's choices are compared. Peak memory is that of an engine's whole process, after both
loads. About 8 minutes on two cores.
"""

import json
import os
import random
import statistics
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from enum import Enum
from multiprocessing import get_context
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import rich.box
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from benchmarks import machine

VOCAB_SIZE = 1024
NUM_LAYERS = 2
NUM_HEADS = 16
NUM_KV_HEADS = 4
HEAD_SIZE = 128
BLOCK_SIZE = 128
HIDDEN_SIZE = 128  # little, so that the linear layers do not hide attention
TRAINED_LENGTH = 4096

console = Console()
errors = Console(stderr=True)


class DType(str, Enum):
    """What the model and its cache may be in."""

    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"


DEFAULT_DTYPES = list(DType)


class Round(NamedTuple):
    """What one engine did in one round: seconds, and the most memory its process has held so far, MB."""

    prefill_seconds: float
    decode_seconds: float
    peak_mb: float


llm: Any = None
"""The engine, in the processes that have one."""


def start_engine(settings: dict[str, Any]) -> None:
    """Start this process's engine and run it once, so that the first round pays for no set-up."""
    global llm
    from vllm import LLM

    llm = LLM(**settings)
    generate([[0] * BLOCK_SIZE], 2)


def run_round(prompts: list[list[int]], new_tokens: int) -> Round:
    """Run both loads on this process's engine."""
    prefill, _ = generate(prompts, 1)
    longer, cached = generate(prompts, 1 + new_tokens)
    shorter, also_cached = generate(prompts, 1)
    if not all(len(prompts[0]) - count <= BLOCK_SIZE for count in cached + also_cached):
        raise RuntimeError(f"Of {len(prompts[0])} tokens per prompt, the cache held but {cached} and {also_cached}.")
    return Round(prefill, longer - shorter, peak_mb())


def generate(prompts: list[list[int]], max_tokens: int) -> tuple[float, list[int]]:
    """Answer the prompts; return the seconds it took and how many tokens of each prompt the cache held."""
    from vllm import SamplingParams, TokensPrompt

    sampling = SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True, detokenize=False)
    begin = time.perf_counter()
    outputs = llm.generate([TokensPrompt(prompt_token_ids=ids) for ids in prompts], sampling, use_tqdm=False)
    seconds = time.perf_counter() - begin
    if any(len(output.outputs[0].token_ids) != max_tokens for output in outputs):
        raise RuntimeError(f"An answer has not {max_tokens} tokens.")
    return seconds, [output.num_cached_tokens for output in outputs]


def peak_mb() -> float:
    """The most resident memory this process has held, MB.

    Not `getrusage`: what it says of a new process begins with the peak of the process that started it.
    """
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    kib = next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM:"))
    return int(kib) * 1024 / 1e6


def engine_arguments(model: str, dtype: DType, sequences: int, tokens: int, new_tokens: int) -> dict[str, Any]:
    """What both engines are given. The cache holds every prompt twice, so that a round finds its own in it."""
    blocks = 2 * sequences * -(-(tokens + new_tokens + 1) // BLOCK_SIZE)
    bytes_a_token = NUM_LAYERS * NUM_KV_HEADS * 2 * HEAD_SIZE * (4 if dtype is DType.FLOAT32 else 2)
    return {
        "model": model,
        "skip_tokenizer_init": True,
        "enforce_eager": True,
        "dtype": dtype.value,
        "max_model_len": tokens + new_tokens + 1,
        "max_num_seqs": sequences,
        "max_num_batched_tokens": 2048,
        "block_size": BLOCK_SIZE,
        "enable_prefix_caching": True,
        "kv_cache_memory_bytes": blocks * BLOCK_SIZE * bytes_a_token,
        "use_tqdm_on_load": False,
        "disable_log_stats": True,
    }


def set_environment(threads: int) -> None:
    """What the engines' processes inherit; read when they load their libraries, so it cannot be set there."""
    os.environ["OMP_NUM_THREADS"] = str(threads)
    os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"
    # The engine runs in the process that we start, and not in one more: its memory is counted there.
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("PYTHONWARNINGS", "ignore::FutureWarning")


def save_model(folder: str, max_length: int) -> None:
    """A checkpoint with random weights."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=HIDDEN_SIZE,
        intermediate_size=2 * HIDDEN_SIZE,
        num_hidden_layers=NUM_LAYERS,
        num_attention_heads=NUM_HEADS,
        num_key_value_heads=NUM_KV_HEADS,
        head_dim=HEAD_SIZE,
        # Stock vLLM serves no more than the config names. It does not enter into what is computed.
        max_position_embeddings=max(16384, max_length),
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        # Queries and keys with a standard deviation near 1, as in attention.py.
        initializer_range=HIDDEN_SIZE**-0.5,
    )
    LlamaForCausalLM(config).save_pretrained(folder)


def engine_process(settings: dict[str, Any]) -> ProcessPoolExecutor:
    """One process, which starts its engine when it gets its first task."""
    return ProcessPoolExecutor(1, get_context("spawn"), start_engine, (settings,))


def make_rows(facts: dict[str, Any], measured: dict[str, list[Round]], counted: dict[str, int]) -> list[dict[str, Any]]:
    """The JSON lines of one dtype: for each load the tokens that are counted over the median of its times."""
    rows = []
    for load, num_tokens in counted.items():
        rate = {
            name: num_tokens / statistics.median(getattr(one, f"{load}_seconds") for one in rounds)
            for name, rounds in measured.items()
        }
        rows.append(
            {
                **facts,
                "load": load,
                "self_extend_tokens_per_s": rate["self_extend"],
                "vllm_tokens_per_s": rate["vllm"],
                "speedup": rate["self_extend"] / rate["vllm"],
                "self_extend_peak_mb": measured["self_extend"][-1].peak_mb,
                "vllm_peak_mb": measured["vllm"][-1].peak_mb,
            }
        )
    return rows


def result_table(rows: Sequence[dict[str, Any]]) -> Table:
    """The JSON lines, for people."""
    table = Table(title="Whole engine", box=rich.box.SIMPLE_HEAD)
    table.add_column("load")
    table.add_column("dtype")
    for name in ("ours\ntokens/s", "vLLM\ntokens/s", "speedup", "ours, peak\nMB", "vLLM, peak\nMB"):
        table.add_column(name, justify="right")
    for row in rows:
        table.add_row(
            row["load"],
            row["dtype"],
            f"{row['self_extend_tokens_per_s']:,.1f}",
            f"{row['vllm_tokens_per_s']:,.1f}",
            f"{row['speedup']:.2f}",
            f"{row['self_extend_peak_mb']:,.0f}",
            f"{row['vllm_peak_mb']:,.0f}",
        )
    return table


def main(
    tokens: Annotated[int, typer.Option(min=BLOCK_SIZE, help="Of a prompt.")] = 8192,
    sequences: Annotated[int, typer.Option(min=1, help="Prompts per round, all at once.")] = 4,
    new_tokens: Annotated[int, typer.Option(min=1, help="Counted new tokens of a sequence, decode load.")] = 128,
    rounds: Annotated[int, typer.Option(min=1)] = 3,
    dtype: Annotated[list[DType], typer.Option(help="May be given more than once.")] = DEFAULT_DTYPES,
    threads: Annotated[int, typer.Option(min=1)] = 2,
    kernel: Annotated[str, typer.Option(help="Our kernel set.")] = "auto",
    trained_length: Annotated[int, typer.Option(min=4)] = TRAINED_LENGTH,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write one JSON line per load and dtype.")] = None,
) -> None:
    """Time a vLLM engine with Self-Extend against one without, on a CPU."""
    set_environment(threads)
    rng = random.Random(0)
    self_extend = {"trained_length": trained_length, "kernel": kernel}
    custom = {"attention_backend": "CUSTOM", "additional_config": {"self_extend": self_extend}}
    facts = {
        "device": machine.device(threads),
        "tokens": tokens,
        "num_heads": NUM_HEADS,
        "num_kv_heads": NUM_KV_HEADS,
        "head_size": HEAD_SIZE,
        "trained_length": trained_length,
    }
    rows: list[dict[str, Any]] = []
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with tempfile.TemporaryDirectory() as model, Progress(*columns, console=errors) as progress:
        save_model(model, tokens + new_tokens + 1)
        bar = progress.add_task("", total=len(dtype) * rounds * 2)
        for one in dtype:
            settings = engine_arguments(model, one, sequences, tokens, new_tokens)
            with engine_process(settings) as stock, engine_process(settings | custom) as ours:
                measured: dict[str, list[Round]] = {"vllm": [], "self_extend": []}
                for _ in range(rounds):
                    prompts = [rng.choices(range(VOCAB_SIZE), k=tokens) for _ in range(sequences)]
                    for name, process in (("vllm", stock), ("self_extend", ours)):
                        progress.update(bar, description=f"{one.value} {name}")
                        measured[name].append(process.submit(run_round, prompts, new_tokens).result())
                        progress.advance(bar)
            counted = {"prefill": sequences * tokens, "decode": sequences * new_tokens}
            rows += make_rows(facts | {"dtype": one.value}, measured, counted)
            if json_file is not None:  # after every dtype: a run that is ended early leaves what it has
                json_file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    console.print(f"{facts['device']}; sequences: {sequences} of {tokens:,} tokens; rounds: {rounds}")
    console.print(result_table(rows))


if __name__ == "__main__":
    typer.run(main)
