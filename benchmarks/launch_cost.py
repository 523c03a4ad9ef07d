"""What a layer's call costs the host with the Triton kernels, without a GPU: `python -m benchmarks.launch_cost`.

A GPU is stood in for (`no_device.py`): kernels are compiled for it and everything runs up to the driver's launch, which
does nothing. So shown is Python's time of storing and attending, per layer; the driver's comes on top, some 2
microseconds a launch, and for prefills FlashAttention's wrapper. The exit code is 1 if a kernel was compiled after the
layers had been warmed up: a request would have waited for it.
"""

import itertools
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
from vllm_selfextend.backends.flash_attention import FlashVarlen
from vllm_selfextend.backends.interface import (
    AttentionBatch,
    AttentionParams,
    GroupSizes,
    Host,
    Rotation,
)
from vllm_selfextend.backends.triton.buffers import Room
from vllm_selfextend.backends.triton.layer import TritonLayer, workspace_size
from vllm_selfextend.method.positions import group_sizes

NUM_HEADS, NUM_KV_HEADS, HEAD_SIZE, BLOCK_SIZE = 32, 8, 128, 16
MAX_SEQ_LEN = 131072
STEPS = {
    "decode, 1 request": [(1, 9000)],
    "decode, 16 requests": [(1, 9000)] * 16,
    "decode, 512 requests": [(1, 9000)] * 512,
    "speculation, 5 tokens each": [(5, 9000)] * 16,
    "prefill, 2,048 tokens, one group size": [(2048, 28000)],
    "prefill, 2,048 tokens, within the trained length": [(2048, 8192)],
    "prefill, 2,048 tokens, three group sizes": [(2048, 12288)],
    "mixed, 2,048 tokens and 16 decodes": [(1, 9000)] * 16 + [(2048, 40960)],
    "mixed, 77 tokens and 3 decodes": [(1, 9000)] * 3 + [(77, 40960)],
}
"""New tokens of each request, and how long it is."""

console = Console()


def flash_attention(*, out: torch.Tensor, **_: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """FlashAttention's function, which is not what is measured."""
    return out, LSE[:, : out.shape[0]]


def empty(*shape: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


LSE = empty(NUM_HEADS, 8192, dtype=torch.float32)


class Layer:
    """A layer in bfloat16 and the tensors that a model gives it."""

    def __init__(self, **params: Any) -> None:
        rotation = Rotation(empty(MAX_SEQ_LEN, HEAD_SIZE, dtype=torch.float32))
        layer = AttentionParams(HEAD_SIZE**-0.5, rotation=rotation, neighbor_window=1024, **params)
        attention = FlashVarlen(flash_attention, 3, layer.scale, 0.0)
        host = Host(8192, MAX_SEQ_LEN, store=lambda *_: None, attention=attention)
        self.kernels = TritonLayer(layer, host, TARGETS["sm_90"])
        self.kv_cache = empty(64, NUM_KV_HEADS, BLOCK_SIZE, 2 * HEAD_SIZE, dtype=torch.bfloat16)
        heads = NUM_HEADS, NUM_KV_HEADS, HEAD_SIZE, torch.bfloat16
        size = workspace_size(*heads, TARGETS["sm_90"], Room.of(host))
        self.workspace = empty(size, dtype=torch.uint8)

    def draw(self, num_tokens: int, *, is_fused: bool = True) -> tuple[torch.Tensor, ...]:
        """Queries, keys, values and room for the output; the first three one after another in memory, or apart."""
        heads = NUM_HEADS, NUM_KV_HEADS, NUM_KV_HEADS
        qkv = empty(num_tokens, sum(heads), HEAD_SIZE, dtype=torch.bfloat16).split(heads, dim=1)
        query, key, value = qkv if is_fused else (x.contiguous() for x in qkv)
        return query, key, value, torch.empty_like(query, memory_format=torch.contiguous_format)

    def warm_up(self) -> None:
        query, key, value, out = self.draw(2)
        self.kernels.warm_up(query, key, value, self.kv_cache, out)

    def call(self, requests: list[tuple[int, int]], *, is_fused: bool = True) -> Callable[[], None]:
        """The calls of a step; what a step's first layer works out for all has been."""
        query_lens = [query_len for query_len, _ in requests]
        num_tokens, num_reqs = sum(query_lens), len(query_lens)
        query, key, value, out = self.draw(num_tokens, is_fused=is_fused)
        batch = AttentionBatch(
            query_start_loc=empty(num_reqs + 1),
            seq_lens=empty(num_reqs),
            block_table=empty(num_reqs, MAX_SEQ_LEN // BLOCK_SIZE),
            slot_mapping=empty(num_tokens, dtype=torch.int64),
            max_query_len=max(query_lens),
            max_seq_len=MAX_SEQ_LEN,
            decode_len=triton_kernels.KERNELS.decode_len(NUM_HEADS // NUM_KV_HEADS),
            query_start_loc_cpu=torch.tensor([0, *itertools.accumulate(query_lens)]),
            seq_lens_cpu=torch.tensor([seq_len for _, seq_len in requests]),
        )

        def call() -> None:
            self.kernels.store(key, value, self.kv_cache, batch)
            self.kernels.attend(query, self.kv_cache, batch, out, self.workspace)

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
    sizes = group_sizes(MAX_SEQ_LEN, 8192, 1024, "auto", 8192)
    layers = {
        "group sizes": Layer(group_sizes=GroupSizes.of(sizes, "meta"), log_scale_len=8192),
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
    for step, requests in STEPS.items():
        calls = [layer.call(requests) for layer in layers.values()]
        table.add_row(step, *(f"{microseconds(call, repeats):.1f}" for call in calls))
        for layer in layers.values():
            layer.call(requests, is_fused=False)()
    console.print(table)
    console.print(f"Compiled at start-up: {warm}; after it: {len(compiled) - warm}.")
    if len(compiled) > warm:
        for one in compiled[warm:]:
            console.print(one, style="red", markup=False)
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
