"""A loaded model's numbers changed, and `tune`, which does so."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from vllm import SamplingParams
from vllm.inputs import TokensPrompt

from tests.support.passkeys import encode
from vllm_selfextend.demo import MODEL_DIR
from vllm_selfextend.evaluation.passkey import PasskeyTask
from vllm_selfextend.method.plan import CONFIG_KEY
from vllm_selfextend.method.positions import capacity

REACH = 1024


def generate(llm, num_prompts: int = 3) -> list[tuple[list[int], list[float]]]:
    """Tokens and their log-probabilities, for texts past the trained length of 256 that begin alike."""
    prompts = [TokensPrompt(prompt_token_ids=[3 + i % 61 for i in range(600)] + [n]) for n in range(num_prompts)]
    outputs = llm.generate(prompts, SamplingParams(temperature=0.0, max_tokens=12, logprobs=0), use_tqdm=False)
    answers = [output.outputs[0] for output in outputs]
    return [
        (
            list(answer.token_ids),
            [step[token].logprob for token, step in zip(answer.token_ids, answer.logprobs, strict=True)],
        )
        for answer in answers
    ]


def test_changed_numbers_give_the_tokens_of_an_engine_started_with_them(start_engine) -> None:
    wanted = {}
    for numbers in ((6, 64), ("auto", 100)):
        settings = {CONFIG_KEY: dict(zip(("group_size", "neighbor_window"), numbers, strict=True))}
        llm = start_engine(MODEL_DIR, max_model_len=REACH, attention_backend="CUSTOM", additional_config=settings)
        wanted[numbers] = generate(llm)
    # The engine now runs with the second numbers, and has cached the prompts' keys with them.
    for numbers in ((6, 64), ("auto", 100), (6, 64)):
        llm.collective_rpc("change_numbers", args=numbers)
        assert llm.reset_prefix_cache()
        for (tokens, logprobs), (right_tokens, right_logprobs) in zip(generate(llm), wanted[numbers], strict=True):
            assert tokens == right_tokens
            assert logprobs == pytest.approx(right_logprobs, abs=1e-4)
    (_, some), (_, other) = wanted[6, 64][0], wanted["auto", 100][0]
    assert some != pytest.approx(other, abs=1e-2), "the numbers matter here"
    with pytest.raises(ValueError, match="Set group_size to"):
        llm.collective_rpc("change_numbers", args=(2, 64))
    assert generate(llm) == generate(llm)


def test_an_engine_that_is_not_eager_or_not_extended_is_refused(start_engine) -> None:
    llm = start_engine(MODEL_DIR, max_model_len=256, attention_backend="CUSTOM")
    with pytest.raises(RuntimeError, match="Self-Extend is off in this engine"):
        llm.collective_rpc("change_numbers", args=(6, 64))
    llm = start_engine(MODEL_DIR, max_model_len=REACH, attention_backend="CUSTOM", enforce_eager=False)
    with pytest.raises(RuntimeError, match="started with enforce_eager"):
        llm.collective_rpc("change_numbers", args=(6, 64))


@pytest.mark.parametrize("task", ["passkey", "prompts"])
def test_tune_finds_a_cell_at_least_as_good_as_auto(task: str, tmp_path: Path) -> None:
    options = ["--max-model-len", str(REACH), "--budget", "0.4", "--no-chat", "--output", str(tmp_path)]
    options += ["--engine-args", '{"dtype": "float32"}']
    if task == "passkey":
        options += ["--task", "passkey", "--depths", "4", "--rounds", "1"]
    else:
        prompts = PasskeyTask((REACH - 64,), (0.2, 0.6)).prompts(encode)
        lines = [{"prompt": p.text, "answer": " ".join(p.expected or "")} for p in prompts]
        (tmp_path / "own.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        options += ["--prompts", str(tmp_path / "own.jsonl")]
    script = "from vllm_selfextend.__main__ import main; main()"
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("VLLM_", "OMP_"))}
    line = [sys.executable, "-c", script, "tune", str(MODEL_DIR), *options]
    done = subprocess.run(line, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "tuning.json").read_text())
    means = {(cell["group_size"], cell["neighbor_window"]): cell["mean"] for cell in found["cells"]}
    assert len(means) >= 4
    assert found["auto"] == ["auto", 64]
    assert all(group_size == "auto" or capacity(256, group_size, window) >= REACH for group_size, window in means)
    assert means[tuple(found["best"])] == min(means.values()) <= means[tuple(found["auto"])]
    group_size, window = found["best"]
    assert f'{{"self_extend": {{"group_size": {json.dumps(group_size)}, "neighbor_window": {window}}}}}' in done.stdout
    assert (tmp_path / "tuning.png").read_bytes().startswith(b"\x89PNG")
