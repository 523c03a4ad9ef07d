"""What became of each architecture, as `benchmarks/results` keeps it: a line a row."""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from .architectures import ARCHITECTURES

RESULTS = Path("benchmarks/results/model_proof.jsonl")


@dataclass(frozen=True)
class Result:
    """What became of an architecture.

    Attributes:
        status: "proved", "close" (in bfloat16), "refused", "differs" or "not runnable".
        reason: Why it is not proved.
        stock: What stock vLLM does with short texts: "as transformers", or what is wrong.
        model: The class of vLLM's that ran.
        greatest: The greatest difference of a log-probability.
        applied: What became of it in transformers, by the same names.
        kv_bytes: Of the engine's KV cache per token, and per sequence of `MAX_MODEL_LEN` tokens.
        planned_kv_bytes: The same, as planned.

    """

    name: str
    variant: str
    known_as: str
    status: str
    reason: str = ""
    stock: str = ""
    model: str = ""
    greatest: float = 0.0
    seconds: float = 0.0
    notes: str = ""
    applied: dict[str, Any] = field(default_factory=dict)
    kv_bytes: list[int] = field(default_factory=list)
    planned_kv_bytes: list[int] = field(default_factory=list)


def write_json(path: Path, results: list[Result]) -> list[Result]:
    """Put the results in the place of those that the file has for the same rows; all of them, sorted."""
    before = [Result(**json.loads(line)) for line in path.read_text().splitlines()] if path.exists() else []
    rows = {(one.name, one.variant): one for one in (*before, *results)}
    known = {(one.name, one.variant) for one in ARCHITECTURES}
    merged = [rows[key] for key in sorted(rows, key=lambda key: (key[0].lower(), key[1])) if key in known]
    path.write_text("".join(json.dumps(asdict(one)) + "\n" for one in merged), encoding="utf-8")
    return merged
