"""What a layer's call costs the host with the Triton kernels, without a GPU: `python -m benchmarks.launch_cost`.

A GPU is stood in for (`no_device.py`): kernels are compiled for it and everything runs up to the driver's launch, which
does nothing. So shown is Python's time of storing and attending, per layer; the driver's comes on top, some 2
microseconds a launch. The exit code is 1 if a kernel was compiled after the layers had been warmed up: a request
would have waited for it.
"""

import os
import statistics
import time
from collections.abc import Callable
from typing import Annotated, Any

os.environ.pop("TRITON_INTERPRET", None)  # kernels defined under it cannot be compiled

import rich.box
import torch
import triton
import typer
from rich.console import Console
from rich.table import Table

from benchmarks.no_device import TARGETS, NoDevice
from vllm_selfextend.backends import triton as triton_kernels
from vllm_selfextend.backends.interface import AttentionBatch, AttentionParams, GroupSizes, Rotation
from vllm_selfextend.backends.triton import launches

NUM_HEADS, NUM_KV_HEADS, HEAD_SIZE, BLOCK_SIZE = 32, 8, 128, 16
MAX_SEQ_LEN = 131072
STEPS = {
    "decode, 1 request": [1],
    "decode, 16 requests": [1] * 16,
    "decode, 512 requests": [1] * 512,
    "speculation, 5 tokens each": [5] * 16,
    "prefill, 2,048 tokens": [2048],
    "prefill, 999 tokens": [999],
    "mixed, 2,048 tokens and 16 decodes": [2048] + [1] * 16,
    "mixed, 77 tokens and 3 decodes": [77] + [1] * 3,
}
"""New tokens of each request."""

console = Console()


def empty(*shape: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


class Layer:
    """A layer in bfloat16 and the tensors that a model gives it."""

    def __init__(self, **params: Any) -> None:
        rotation = Rotation(empty(MAX_SEQ_LEN, HEAD_SIZE, dtype=torch.float32))
        layer = AttentionParams(HEAD_SIZE**-0.5, rotation=rotation, neighbor_window=1024, **params)
        self.kernels = triton_kernels.KERNELS.prepare(layer)
        self.kv_cache = empty(64, NUM_KV_HEADS, BLOCK_SIZE, 2 * HEAD_SIZE, dtype=torch.bfloat16)
        size = launches.workspace_size(NUM_HEADS, NUM_KV_HEADS, HEAD_SIZE, TARGETS["sm_90"])
        self.workspace = empty(size, dtype=torch.float32)

    def draw(self, num_tokens: int, *, is_fused: bool = True) -> tuple[torch.Tensor, ...]:
        """Queries, keys, values and room for the output; the first three one after another in memory, or apart."""
        heads = NUM_HEADS, NUM_KV_HEADS, NUM_KV_HEADS
        qkv = empty(num_tokens, sum(heads), HEAD_SIZE, dtype=torch.bfloat16).split(heads, dim=1)
        query, key, value = qkv if is_fused else (x.contiguous() for x in qkv)
        return query, key, value, torch.empty_like(query, memory_format=torch.contiguous_format)

    def warm_up(self) -> None:
        query, key, value, out = self.draw(2)
        self.kernels.warm_up(query, key, value, self.kv_cache, out)

    def call(self, query_lens: list[int], *, is_fused: bool = True) -> Callable[[], None]:
        """The calls of a step."""
        num_tokens, num_reqs = sum(query_lens), len(query_lens)
        query, key, value, out = self.draw(num_tokens, is_fused=is_fused)
        batch = AttentionBatch(
            query_start_loc=empty(num_reqs + 1),
            seq_lens=empty(num_reqs),
            block_table=empty(num_reqs, MAX_SEQ_LEN // BLOCK_SIZE),
            slot_mapping=empty(num_tokens, dtype=torch.int64),
            max_query_len=max(query_lens),
            max_seq_len=MAX_SEQ_LEN,
            workspace=self.workspace,
        )

        def call() -> None:
            self.kernels.store(key, value, self.kv_cache, batch)
            self.kernels.attend(query, self.kv_cache, batch, out)

        return call


def microseconds(call: Callable[[], None], repeats: int) -> float:
    """Of the processor, for a call: the median of several runs' means."""
    times = []
    for _ in range(7):
        start = time.process_time()
        for _ in range(repeats):
            call()
        times.append((time.process_time() - start) / repeats)
    return 1e6 * statistics.median(times)


def main(
    repeats: Annotated[int, typer.Option(min=1, help="Calls per run; the median of 7 runs is shown.")] = 300,
) -> None:
    """Time what a layer's call costs the host, and count what is compiled after start-up."""
    compiled: list[str] = []
    triton.knobs.runtime.jit_post_compile_hook = lambda *, repr, **_: compiled.append(repr)
    triton.runtime.driver.set_active(NoDevice(TARGETS["sm_90"].target))
    setattr(launches, "find_device", lambda device: TARGETS["sm_90"])  # noqa: B010
    layers = {
        "group sizes": Layer(group_sizes=GroupSizes(empty(MAX_SEQ_LEN), largest=64, least_rows=(1,))),
        "sliding window": Layer(sliding_window=4096),
    }
    for layer in layers.values():
        layer.warm_up()
    warm = len(compiled)
    title = (
        f"Microseconds of Python per layer; {NUM_HEADS}/{NUM_KV_HEADS} heads x {HEAD_SIZE}, Triton {triton.__version__}"
    )
    table = Table(title=title, box=rich.box.SIMPLE_HEAD)
    table.add_column("step")
    for name in layers:
        table.add_column(name, justify="right")
    for step, query_lens in STEPS.items():
        calls = [layer.call(query_lens) for layer in layers.values()]
        table.add_row(step, *(f"{microseconds(call, repeats):.1f}" for call in calls))
        for layer in layers.values():
            layer.call(query_lens, is_fused=False)()
    console.print(table)
    console.print(f"Compiled at start-up: {warm}; after it: {len(compiled) - warm}.")
    if len(compiled) > warm:
        for one in compiled[warm:]:
            console.print(one, style="red", markup=False)
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
