"""`vllm run-batch` as `docs/serving.md` shows it: `examples/run_batch.jsonl` in, a file of answers out."""

import json
from pathlib import Path

from .commands import ROOT, run

COMMAND = """vllm run-batch -i examples/run_batch.jsonl --model vllm_selfextend/demo/model
    --attention-backend CUSTOM --max-model-len 4096 --kv-cache-memory-bytes 512M"""


def test_long_requests_are_answered(tmp_path: Path) -> None:
    requests = [json.loads(line) for line in (ROOT / "examples" / "run_batch.jsonl").read_text().splitlines()]
    run(COMMAND, "--enforce-eager", "-o", tmp_path / "answers.jsonl")  # it compiles for a minute otherwise
    answers = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
    bodies = {answer["custom_id"]: answer["response"]["body"] for answer in answers}
    assert len(bodies) == len(answers) == len(requests)
    assert all(body["usage"]["prompt_tokens"] > 256 for body in bodies.values())
    found = {name: body["choices"][0]["message"]["content"].replace(" ", "") for name, body in bodies.items()}
    assert found == {request["custom_id"]: request["custom_id"].removeprefix("key-") for request in requests}
