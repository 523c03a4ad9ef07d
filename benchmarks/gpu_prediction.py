"""What each case of `benchmarks.gpu` should take, worked out beforehand: `python -m benchmarks.gpu_prediction`.

A decode waits for memory: bytes of keys, values, queries and outputs over the rate of a copy, times what kernels like
it reach, and its launches. A prefill is attention, at FlashAttention's rate, and what turning adds, which does not
overlap with it: keys, values and queries read and written, answers read and written again where they are joined.
"""

import itertools
from dataclasses import dataclass

import torch

from benchmarks.gpu import LOADS, Case
from benchmarks.layers import Heads, three_digits
from vllm_selfextend.backends.interface import GroupSizes, Host
from vllm_selfextend.backends.triton.buffers import Room
from vllm_selfextend.backends.triton.prefill_spans import Kind, Layer, Prefill, Span, take_apart
from vllm_selfextend.method.positions import default_window, group_sizes


@dataclass(frozen=True)
class Gpu:
    """What a GPU does, as published or measured elsewhere.

    Attributes:
        copies_tb_per_s: Bytes read and written by a copy, TB/s.
        decode_share: What of that a paged decode reaches.
        flash_tflop_per_s: FlashAttention's rate in bfloat16, heads of 128, long causal contexts.
        launch_us: Between a kernel's end and the next one's first work.

    """

    copies_tb_per_s: float
    decode_share: float
    flash_tflop_per_s: float
    launch_us: float


H200 = Gpu(copies_tb_per_s=4.3, decode_share=0.9, flash_tflop_per_s=600.0, launch_us=4.0)
"""Copies were measured; FlashAttention 3's rate is that of arXiv 2407.08608 on an H100, which multiplies as fast."""

EDGE = 128
"""Rows and keys of FlashAttention's tiles: a grouped row has two edges more than a causal one, and at each half of that
many keys are for nothing."""


def spans_of(case: Case) -> list[Span]:
    """How the case's prefill is taken apart."""
    _, _, query_len, context, _ = case.load
    window = default_window(case.trained_length)
    table = group_sizes(context, case.trained_length, window, "auto", case.trained_length)
    layer = Layer(GroupSizes.of(table), window, 0, *Room.of(Host()))
    return take_apart([Prefill(0, 0, context - query_len, query_len)], layer)


def turned_bytes(case: Case, spans: list[Span]) -> int:
    """Bytes that turning, copying and joining read and write."""
    num_heads, num_kv_heads, head_size = case.heads
    row, key = (heads * head_size * case.dtype.itemsize for heads in (num_heads, num_kv_heads))
    grouped = [span for span in spans if span.kind is Kind.GROUPED]
    parts = [part for span in grouped for part in span.parts]
    keys = sum(2 * key * (max(part.num_turned, part.num_copied) + part.num_copied) for part in parts)
    queries = sum(2 * row * span.num_rows for span in grouped)
    joined = sum(3 * row * part.num_rows for part in parts)
    return keys + queries + joined


def predict_prefill(case: Case, gpu: Gpu) -> tuple[float, float]:
    """Attention, and what turning adds, ms."""
    spans = spans_of(case)
    window_rows = sum(span.num_rows for span in spans if span.kind is Kind.GROUPED)
    wasted = 4.0 * case.heads.head_size * case.heads.num_heads * window_rows * EDGE
    attention = (case.operations + wasted) / gpu.flash_tflop_per_s / 1e9
    parts = list(itertools.chain.from_iterable(span.parts for span in spans))
    # Those that FlashAttention alone has not.
    launches = sum(1 + (span.kind is Kind.GROUPED) for span in spans) - 1
    launches += sum(2 + bool(part.num_turned) for part in parts)
    return attention, turned_bytes(case, spans) / gpu.copies_tb_per_s / 1e9 + launches * gpu.launch_us / 1e3


def predict_decode(case: Case, gpu: Gpu) -> float:
    """Milliseconds; at most two launches, of which the second joins."""
    return case.num_bytes / (gpu.copies_tb_per_s * gpu.decode_share) / 1e9 + 2 * gpu.launch_us / 1e3


LAYER = Heads(32, 8, 128), torch.bfloat16, 8192, 16
"""Heads, dtype, trained length and block size: `benchmarks.gpu`'s when nothing else is asked for."""


def tables(gpu: Gpu = H200) -> str:
    """What `docs/gpus.md` shows."""
    lines = ["| decode: requests of tokens | MB | predicted |", "|---|---:|---:|"]
    for load in LOADS["decode"]:
        case = Case(load, *LAYER)
        name = f"{load.batch} of {load.context:,}{', fp8 cache' if load.is_fp8 else ''}"
        time = three_digits(predict_decode(case, gpu), 4)
        lines.append(f"| {name} | {case.num_bytes / 1e6:,.0f} | {time} ms |")
    lines += [
        "",
        "| prefill: tokens after others | TFLOP | MB | attention | turning | predicted | of FlashAttention alone |",
    ]
    lines += ["|---|---:|---:|---:|---:|---:|---:|"]
    for load in LOADS["prefill"]:
        case = Case(load, *LAYER)
        attention, turning = predict_prefill(case, gpu)
        alone = case.operations / gpu.flash_tflop_per_s / 1e9
        times = (f"{number:.2f} ms" for number in (attention, turning, attention + turning))
        turned = f"{turned_bytes(case, spans_of(case)) / 1e6:,.0f}"
        name = f"{load.query_len:,} after {load.context - load.query_len:,}"
        cells = name, f"{case.operations / 1e12:.2f}", turned, *times, f"{alone / (attention + turning):.2f} x"
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(tables())
