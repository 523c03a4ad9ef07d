"""CUDA graphs and microbatches of vLLM's V2 model runner without a GPU: to replay a graph is to run its function again.

All else is vLLM's own code: which batches are captured, the metadata they are captured with, which graph a step takes,
and how its persistent buffers are filled before. What a captured function is given stays what it was at its capture, so
metadata that holds a copy of a buffer, or a number of the batch, goes on with the capture's.
"""

import copy
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from vllm.config import CUDAGraphMode
from vllm.forward_context import ForwardContext, create_forward_context, override_forward_context
from vllm.v1.worker.gpu.attn_utils import get_attn_cg_support
from vllm.v1.worker.gpu.cudagraph_utils import (
    BatchExecutionDescriptor,
    CreateForwardFn,
    CudaGraphManager,
    ModelCudaGraphManager,
)
from vllm.v1.worker.gpu.model_runner import GPUModelRunner
from vllm.v1.worker.gpu.ubatch_utils import (
    UBatchRunner,
    UBatchSlices,
    UBatchState,
    merge_ubatch_outputs,
    slice_model_inputs,
)

CAPTURE_SIZES = [6, 48]
"""Tokens of the graphs: of decodes, and of chunks of prompts."""

OTHER_RANKS_TOKENS = 20
"""Where there are microbatches: tokens of another data-parallel rank, which this one's steps are padded to."""


class Functions(CudaGraphManager):
    """Keeps what is captured as functions; below `ModelCudaGraphManager`, which makes them."""

    @torch.inference_mode()
    def capture(self, create_forward_fn: CreateForwardFn, progress_bar_desc: str = "") -> None:
        for desc in self._capture_descs[CUDAGraphMode.FULL]:
            create_forward_fn(desc, warmup=True)(CUDAGraphMode.NONE)
            self.graphs[desc] = create_forward_fn(desc, warmup=False)
            self.graphs[desc](CUDAGraphMode.NONE)
        self._graphs_captured = True

    def run_fullgraph(self, desc: BatchExecutionDescriptor) -> None:
        self.graphs[desc](CUDAGraphMode.NONE)


class Replays(ModelCudaGraphManager, Functions):
    """A runner's graphs, and how often which kind of step ran."""

    def __init__(self, runner: GPUModelRunner, mode: CUDAGraphMode) -> None:
        arguments = {"decode_query_len": runner.decode_query_len, "ubatch_runner": runner.ubatch_runner}
        # With a mode, it would ask for a GPU's memory pool.
        super().__init__(runner.vllm_config, runner.device, CUDAGraphMode.NONE, **arguments)
        self.cudagraph_mode = mode
        self._init_candidates()
        self.steps: Counter[str] = Counter()

    def dispatch(self, *args: Any, **kwargs: Any) -> BatchExecutionDescriptor:
        desc = self.choose(*args, **kwargs)
        self.steps[f"{desc.cg_mode.name} {desc.num_tokens}"] += 1
        return desc

    def choose(self, num_reqs: int, num_tokens: int, *args: Any, **kwargs: Any) -> BatchExecutionDescriptor:
        """Where there are microbatches, as data-parallel ranks do: see vLLM's `sync_cudagraph_and_dp_padding`."""
        if self.ubatch_runner is None:
            return super().dispatch(num_reqs, num_tokens, *args, **kwargs)
        desc = super().dispatch(num_reqs, num_tokens, *args, **kwargs, num_ubatches=2)
        # In every other step the other rank has a prompt.
        if desc.cg_mode == CUDAGraphMode.NONE or self.steps.total() % 2:
            num_tokens = max(num_tokens, OTHER_RANKS_TOKENS)
            return BatchExecutionDescriptor(CUDAGraphMode.NONE, num_tokens, num_reqs, num_ubatches=2)
        return desc


class Microbatches(UBatchRunner):
    """A step in two halves, one after the other: without a thread and a stream for each."""

    def __init__(self, runner: GPUModelRunner) -> None:
        self.vllm_config, self.parallel_config = runner.vllm_config, runner.parallel_config
        self.num_ubatches, self.dcp_size, self.dcp_rank, self.cp_interleave = 2, 1, 0, 1
        self.model_state, self.attn_groups = runner.model_state, runner.attn_groups
        self.kv_cache_config = runner.kv_cache_config
        self.ubatch_query_start_loc, self.ubatch_seq_lens = (
            [torch.zeros(runner.max_num_reqs + extra, dtype=torch.int32) for _ in range(2)] for extra in (1, 0)
        )
        self.ubatch_dcp_local_seq_lens = [None, None]
        self.num_empty = 0

    def _make_forward_contexts(
        self, ubatch_slices: UBatchSlices, attn_metadata: list, slot_mappings: list, is_padding: list
    ) -> list[ForwardContext]:
        """Without what data-parallel ranks say of each other."""
        self.num_empty += sum(next(iter(metadata.values())).num_actual_tokens == 0 for metadata in attn_metadata)
        return [
            create_forward_context(metadata, self.vllm_config, slot_mapping=slots, is_padding=padding)
            for metadata, slots, padding in zip(attn_metadata, slot_mappings, is_padding, strict=True)
        ]

    def begin_capturable_run(
        self, model: Any, model_inputs: dict[str, Any], ubatch_state: UBatchState, for_capture: bool = False
    ) -> Callable[[], Any]:
        def run_in_turn() -> Any:
            outputs = []
            for ubatch, context in zip(ubatch_state.slices, ubatch_state.forward_contexts, strict=True):
                with override_forward_context(context):
                    outputs.append(model(**slice_model_inputs(model_inputs, ubatch.token_slice)))
            return merge_ubatch_outputs(outputs)

        return run_in_turn


def capture_graphs(runner: GPUModelRunner, mode: str, microbatches: bool) -> None:
    """Have a runner's steps run from graphs from now on; `mode` is the user's `cudagraph_mode`."""
    runner.compilation_config.cudagraph_capture_sizes = CAPTURE_SIZES
    runner.compilation_config.max_cudagraph_capture_size = max(CAPTURE_SIZES)
    support = get_attn_cg_support(runner.attn_groups, runner.vllm_config)
    asked = copy.copy(runner.compilation_config)
    asked.cudagraph_mode = CUDAGraphMode[mode]
    resolved = asked.resolve_cudagraph_mode_and_sizes(
        support.min_cg_support, support.min_cg_attn_backend, runner.decode_query_len, use_v2_model_runner=True
    )
    if microbatches:
        runner.parallel_config.ubatch_size = 2
        runner.parallel_config.dbo_decode_token_threshold = 1
        for groups, block_size in zip(runner.attn_groups, runner.kernel_block_sizes, strict=True):
            for group in groups:
                group.create_metadata_builders(runner.vllm_config, runner.device, block_size, num_metadata_builders=2)
        runner.ubatch_runner = Microbatches(runner)
    runner.cudagraph_manager = Replays(runner, resolved)
    runner.cudagraph_manager.capture(
        runner.model,
        runner.model_state,
        runner.input_buffers,
        runner.intermediate_tensors,
        runner.block_tables,
        runner.attn_groups,
        runner.kv_cache_config,
    )


def spoil_cache(runner: GPUModelRunner) -> None:
    """Fill it with what shows in every answer that it gets into."""
    for cache in runner.kv_caches:
        cache.fill_(float("nan"))


def what_ran(runner: GPUModelRunner) -> dict[str, Any]:
    """The graphs' mode, the steps since the last capture, and whether anything was stored where padding points."""
    return {
        "mode": runner.cudagraph_manager.cudagraph_mode.name,
        "steps": runner.cudagraph_manager.steps,
        "empty_microbatches": runner.ubatch_runner.num_empty if runner.ubatch_runner else 0,
        "null_block_is_untouched": all(bool(cache[0].isnan().all()) for cache in runner.kv_caches),
    }
