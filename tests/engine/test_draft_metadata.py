"""Metadata with which a drafter takes several steps, and the Triton kernels below a draft model.

vLLM's second model runner, for GPUs, updates metadata in place (`vllm/v1/worker/gpu/spec_decode/`): what it does is
done here by hand. The first runner, which a CPU runs, builds a draft's metadata anew at every step.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from vllm import LLM
from vllm.v1.attention.backend import CommonAttentionMetadata

from .test_same_tokens import answers, check, counter, prompts

BLOCK_SIZE = 32


@pytest.fixture(scope="module")
def start(checkpoint: Callable, start_engine: Callable) -> Callable[..., LLM]:
    def start(kernel: str, **settings: Any) -> LLM:
        config = {"self_extend": {"neighbor_window": 16, "kernel": kernel}}
        return start_engine(
            checkpoint("llama"), attention_backend="CUSTOM", max_model_len=320, additional_config=config, **settings
        )

    return start


def builder_and_layer(llm: LLM) -> tuple[Any, Any]:
    (found,) = llm.collective_rpc(
        lambda worker: (
            worker.model_runner.attn_groups[0][0].get_metadata_builder(),
            next(m for m in worker.model_runner.model.modules() if hasattr(m, "get_attn_backend")),
        )
    )
    return found


def test_metadata_follows_its_buffers_through_a_draft(start: Callable) -> None:
    builder, layer = builder_and_layer(start("triton"))
    assert builder.supports_draft_decode_metadata_update
    generator = torch.Generator().manual_seed(8)
    # Requests at the trained length, past it, and just before a new block.
    seq_lens = torch.tensor([62, 130, 255], dtype=torch.int32)
    block_table = torch.randperm(30, generator=generator).int().view(3, 10)
    slot_mapping = torch.zeros(3, dtype=torch.int64)
    buffers = torch.arange(4, dtype=torch.int32), seq_lens, block_table, slot_mapping

    def build(start_loc: torch.Tensor, lens: torch.Tensor, table: torch.Tensor, slots: torch.Tensor) -> Any:
        common = CommonAttentionMetadata(
            query_start_loc=start_loc,
            query_start_loc_cpu=start_loc.clone(),
            seq_lens=lens,
            num_reqs=3,
            num_actual_tokens=3,
            max_query_len=1,
            max_seq_len=320,
            block_table_tensor=table,
            slot_mapping=slots,
        )
        return builder.build_for_drafting(common, draft_index=1)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    query, key, value = draw(3, 4, 32), draw(3, 2, 32), draw(3, 2, 32)
    kv_cache = draw(30, 2, BLOCK_SIZE, 64)

    def attend(metadata: Any, cache: torch.Tensor) -> torch.Tensor:
        return layer.impl.forward(layer, query, key, value, cache, metadata, torch.empty_like(query))

    drafting = build(*buffers)
    seen: list[torch.Tensor] = []
    for step in range(4):
        if step == 3:  # the next batch, which a captured graph would be replayed for
            seq_lens.copy_(torch.tensor([17, 300, 48]))
            block_table.copy_(block_table.flip(0))
        seq_lens += 1
        slot_mapping.copy_(
            block_table[torch.arange(3), (seq_lens - 1) // BLOCK_SIZE] * BLOCK_SIZE + (seq_lens - 1) % BLOCK_SIZE
        )
        builder.update_draft_decode_metadata(drafting)
        fresh_cache = kv_cache.clone()
        wanted = attend(build(*[buffer.clone() for buffer in buffers]), fresh_cache)
        got = attend(drafting, kv_cache)
        assert torch.equal(got, wanted)
        assert torch.equal(kv_cache, fresh_cache)
        # Each step has another answer for the same query, so old metadata could not have given it.
        assert all((got - other).abs().amax((1, 2)).min() > 1e-3 for other in seen)
        seen.append(got)


def test_kernels_that_read_their_batch_once_do_not_offer_it(start: Callable) -> None:
    builder, _ = builder_and_layer(start("cpu"))
    assert not builder.supports_draft_decode_metadata_update


@pytest.mark.slow
def test_triton_kernels_serve_a_draft_model(start: Callable, checkpoint: Callable) -> None:
    texts = [text for text in prompts() if len(text) == 63]  # its answer goes past the trained length
    native = answers(start("cpu"), texts)
    speculation = {"method": "draft_model", "model": checkpoint("llama"), "num_speculative_tokens": 3}
    llm = start("triton", speculative_config=speculation)
    check(answers(llm, texts), native)
    drafted = counter(llm, "vllm:spec_decode_num_draft_tokens")
    assert counter(llm, "vllm:spec_decode_num_accepted_tokens") > 0.9 * drafted > 0
