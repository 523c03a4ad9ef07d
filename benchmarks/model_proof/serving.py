"""What vLLM makes of a checkpoint, with Self-Extend or as it is."""

from dataclasses import dataclass, field
from typing import Any

from vllm import LLM

from tests.support.cache import cache_bytes
from tests.support.comparison import generate
from tests.support.engine_defaults import ENGINE_DEFAULTS
from tests.support.models import TRAINED_LENGTH
from vllm_selfextend.vllm.report import plan_report

from .architectures import BY_TITLE
from .texts import MAX_MODEL_LEN, NEIGHBOR_WINDOW, long_texts, short_texts


@dataclass(frozen=True)
class Served:
    """The class of vLLM's model, and what it generated, or the texts with their states or classes; see `Result`."""

    model: str
    found: list[Any]
    kv_bytes: list[int] = field(default_factory=list)
    planned_kv_bytes: list[int] = field(default_factory=list)
    why_not: str | None = None


def serve(title: str, checkpoint: str, extended: bool) -> Served:
    """Serve an architecture through vLLM."""
    architecture = BY_TITLE[title]
    settings: dict[str, Any] = {**ENGINE_DEFAULTS, "dtype": architecture.dtype, "max_num_batched_tokens": 256}
    settings |= architecture.engine
    if architecture.task != "generate":
        settings |= {"runner": "pooling", "skip_tokenizer_init": False}
    if extended:
        numbers = {"neighbor_window": NEIGHBOR_WINDOW}
        report = plan_report(checkpoint, MAX_MODEL_LEN, numbers, settings)
        settings |= {
            "attention_backend": "CUSTOM",
            "max_model_len": MAX_MODEL_LEN,
            "additional_config": {"self_extend": numbers},
        }
        texts = long_texts()
    else:
        settings["max_model_len"] = TRAINED_LENGTH
        texts = short_texts()
    llm = LLM(checkpoint, **settings)
    model = llm.apply_model(lambda one: type(one).__name__)[0]
    cache: dict[str, Any] = {}
    if extended:
        planned = [size for size in (report.kv_bytes_per_token, report.kv_bytes_per_sequence) if size is not None]
        cache = {"kv_bytes": list(cache_bytes(llm)), "planned_kv_bytes": planned, "why_not": report.why_not}
    if architecture.task == "generate":
        return Served(model, list(generate(llm, texts)), **cache)
    requests = [{"prompt_token_ids": text} for text in texts]
    if architecture.task == "embed":
        states = [output.outputs.embedding for output in llm.embed(requests, use_tqdm=False)]
    else:
        states = [output.outputs.probs for output in llm.classify(requests, use_tqdm=False)]
    return Served(model, list(zip(texts, states, strict=True)), **cache)
