"""What `plan` says of the KV cache is what an engine keeps. `make models` holds it for every architecture."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from benchmarks.model_proof.architectures import BY_TITLE
from tests.support.cache import cache_bytes
from tests.support.engine_defaults import ENGINE_DEFAULTS
from vllm_selfextend.demo import MODEL_DIR
from vllm_selfextend.vllm.report import plan_report


@pytest.mark.parametrize(
    ("title", "per_token"),
    [
        # 2 layers of 4 have caches of their own, one of them with heads of 64: 2 heads, keys and values, 4 bytes.
        ("Gemma4ForCausalLM", 2 * (32 + 64) * 2 * 4),
        # 2 layers of 4 attend; the others keep a state.
        ("Lfm2ForCausalLM", 2 * (32 + 32) * 2 * 4),
    ],
)
def test_plan_says_what_the_engine_keeps(title: str, per_token: int, tmp_path: Path, start_engine: Callable) -> None:
    checkpoint, _ = BY_TITLE[title].save(tmp_path)
    settings = {**ENGINE_DEFAULTS, **BY_TITLE[title].engine, "max_num_batched_tokens": 64}
    report = plan_report(checkpoint, 1000, {}, settings)
    assert report.kv_bytes_per_token == per_token
    engine = start_engine(checkpoint, attention_backend="CUSTOM", max_model_len=1000, **settings)
    assert cache_bytes(engine) == (report.kv_bytes_per_token, report.kv_bytes_per_sequence)


def test_plan_where_cuda_runs_already(monkeypatch: pytest.MonkeyPatch) -> None:
    """A fork could not use it, so there it is a new process, which answers the same."""
    report = plan_report(str(MODEL_DIR), 1000, {})
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    assert plan_report(str(MODEL_DIR), 1000, {}) == report
    assert report.supported
