"""`vllm run-batch` with the demo model: a file of requests in, a file of answers out, as the README shows it."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path

from vllm_selfextend.demo import MODEL_DIR

from .passkeys import SENTENCE, make_prompt

PROMPT_TOKENS = 1500


def test_long_requests_are_answered(tmp_path: Path) -> None:
    rng = random.Random(7)
    prompts = [make_prompt(PROMPT_TOKENS, rng.random(), rng) for _ in range(8)]
    assert len({prompt.answer for prompt in prompts}) == len(prompts)
    requests = [
        {
            "custom_id": str(number),
            "method": "POST",
            "url": "/v1/chat/completions",
            "body": {
                "model": str(MODEL_DIR),
                "messages": [{"role": "user", "content": prompt.text}],
                "max_tokens": 5,
                "temperature": 0.0,
            },
        }
        for number, prompt in enumerate(prompts)
    ]
    (tmp_path / "requests.jsonl").write_text("\n".join(map(json.dumps, requests)))
    command = [Path(sys.executable).with_name("vllm"), "run-batch", "-i", "requests.jsonl", "-o", "answers.jsonl"]
    command += ["--model", MODEL_DIR, "--attention-backend", "CUSTOM", "--max-model-len", 1536]
    command += ["--dtype", "float32", "--enforce-eager", "--kv-cache-memory-bytes", 512 << 20]
    environment = {**os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
    done = subprocess.run(list(map(str, command)), cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
    answers = {line["custom_id"]: line["response"]["body"] for line in lines}
    assert all(0 <= PROMPT_TOKENS - body["usage"]["prompt_tokens"] < SENTENCE for body in answers.values())
    found = {number: body["choices"][0]["message"]["content"].strip() for number, body in answers.items()}
    assert found == {str(number): prompt.answer for number, prompt in enumerate(prompts)}
