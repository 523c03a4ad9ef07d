"""What Self-Extend costs a layer in transformers, beside its plain SDPA: `python -m benchmarks.transformers_attention`.

One Llama layer, called as in a decode (one new token after what a `DynamicCache` holds) and as in a prefill (all tokens
at once); plain and extended in turns in one process, one thread, medians of processor time. All that a layer does is in
it: its projections, its cache, turning keys. Needs torch and transformers only.
"""

import functools
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from transformers import DynamicCache, LlamaConfig, LlamaModel

import vllm_selfextend.transformers as SelfExtend  # noqa: N812  # the authors' name

ROUNDS = 5


def main(
    lengths: Annotated[list[int], typer.Option("--length", help="tokens")] = [4096, 16384],  # noqa: B006
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16")] = "float32",
    group_size: int = 8,
    window_size: int = 1024,
    prefill: Annotated[bool, typer.Option(help="measure it too; minutes at 16,384 tokens")] = True,
    json_path: Annotated[Path | None, typer.Option("--json", help="append the rows here")] = None,
) -> None:
    """Time decodes and prefills of one layer."""
    torch.set_num_threads(1)
    with torch.inference_mode():
        for length in lengths:
            cases = {"decode": decode(length, dtype, group_size, window_size)}
            if prefill:
                cases["prefill"] = prefill_case(length, dtype, group_size, window_size)
            for name, calls in cases.items():
                plain, extended = in_turns(calls, ROUNDS * 4 if name == "decode" else ROUNDS)
                row = {
                    "case": name, "tokens": length, "dtype": dtype,
                    "group_size": group_size, "window_size": window_size,
                    "sdpa_ms": round(1e3 * plain, 2), "selfextend_ms": round(1e3 * extended, 2),
                    "ratio": round(extended / plain, 3), "threads": torch.get_num_threads(), "torch": torch.__version__,
                }  # fmt: skip
                print(json.dumps(row), flush=True)
                if json_path is not None:
                    with json_path.open("a") as file:
                        print(json.dumps(row), file=file)


def layer(dtype: str, group_size: int | None, window_size: int, length: int) -> Any:
    """A model of one layer, 32 / 8 heads of size 128 and next to nothing else."""
    config = LlamaConfig(
        hidden_size=256, intermediate_size=64, num_hidden_layers=1, num_attention_heads=32, num_key_value_heads=8,
        head_dim=128, vocab_size=256, max_position_embeddings=max(length // 4, 2 * window_size),
    )  # fmt: skip
    torch.manual_seed(0)
    model = LlamaModel(config).to(getattr(torch, dtype)).eval()
    model.set_attn_implementation("sdpa")
    if group_size is not None:
        SelfExtend.apply(model, group_size, window_size)
    return model


def decode(length: int, dtype: str, group_size: int, window_size: int) -> list[Callable[[], Any]]:
    """Calls of one new token after `length - 1`, and then one more each time."""

    def case(group: int | None) -> Callable[[], Any]:
        model = layer(dtype, group, window_size, length)
        cache = DynamicCache(config=model.config)
        token = torch.full((1, 1), 5)
        model(input_ids=token, past_key_values=cache)
        # What keys and values are does not matter to the time.
        keys, values = torch.randn(2, 1, 8, length - 2, 128, dtype=getattr(torch, dtype))
        DynamicCache.update(cache, keys, values, 0)

        def call() -> None:
            model(input_ids=token, past_key_values=cache)

        return call

    return [case(None), case(group_size)]


def prefill_case(length: int, dtype: str, group_size: int, window_size: int) -> list[Callable[[], Any]]:
    """Calls of all tokens at once."""
    tokens = torch.randint(3, 256, (1, length))
    models = [layer(dtype, group, window_size, length) for group in (None, group_size)]
    return [functools.partial(model, input_ids=tokens, use_cache=False) for model in models]


def in_turns(calls: list[Callable[[], Any]], rounds: int) -> list[float]:
    """The median seconds of each call: of the processor, which other programs on the machine change least."""
    times: list[list[float]] = [[] for _ in calls]
    for turn in range(rounds + 1):
        for call, seconds in zip(calls, times, strict=True):
            begin = time.process_time()
            call()
            if turn > 0:  # the first is for warming up
                seconds.append(time.process_time() - begin)
    return [statistics.median(seconds) for seconds in times]


if __name__ == "__main__":
    typer.run(main)
