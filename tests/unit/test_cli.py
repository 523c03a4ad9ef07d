import importlib.util
import json
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from vllm_selfextend import cli
from vllm_selfextend.demo import MODEL_DIR


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(cli.app, [str(argument) for argument in arguments])


def plan(*arguments: object) -> dict:
    result = invoke("plan", *arguments, "--json")
    return json.loads(result.stdout)


def test_plan_of_the_demo_model() -> None:
    report = plan(MODEL_DIR, "--max-model-len", 4096)
    assert report["supported"] is True
    assert (report["trained_length"], report["neighbor_window"], report["group_size"]) == (256, 64, 38)
    assert report["capacity"] >= 4096
    assert report["rule_share"] == pytest.approx((64 + (4096 - 64) / 38) / 256)
    # 4 layers, keys and values, 2 heads of 32; vLLM serves float32 checkpoints in 16 bits.
    assert report["kv_bytes_per_token"] == 4 * 2 * 2 * 32 * 2
    assert report["kv_bytes_per_sequence"] == 4096 * report["kv_bytes_per_token"]


def test_plan_prints_a_table_and_the_command() -> None:
    result = invoke("plan", MODEL_DIR, "--max-model-len", 4096)
    assert result.exit_code == 0
    for text in ("trained length L", "256 tokens", "two thirds", "--attention-backend CUSTOM --max-model-len 4096"):
        assert text in result.stdout


def test_plan_with_the_users_numbers() -> None:
    report = plan(MODEL_DIR, "--max-model-len", 1600, "--group-size", 8, "--neighbor-window", 64)
    assert (report["capacity"], report["reason"]) == (1600, "group size and neighbor window set by the user")
    assert plan(MODEL_DIR, "--max-model-len", 4096, "--trained-length", 512)["trained_length"] == 512


def test_plan_past_the_capacity() -> None:
    result = invoke("plan", MODEL_DIR, "--max-model-len", 4096, "--group-size", 8)
    assert result.exit_code == 1
    assert "Set group_size to 22 or more" in " ".join(result.stderr.split())


def test_plan_of_an_unsupported_model(tmp_path: Path) -> None:
    config = json.loads((MODEL_DIR / "config.json").read_text())
    config["rope_parameters"] = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    (tmp_path / "config.json").write_text(json.dumps(config))
    result = invoke("plan", tmp_path, "--max-model-len", 4096)
    assert result.exit_code == 1
    assert "dynamic NTK" in result.stdout
    report = plan(tmp_path, "--max-model-len", 4096)
    assert report["supported"] is False
    assert "dynamic NTK" in report["why_not"]


def test_plan_of_a_model_with_sliding_layers(tmp_path: Path) -> None:
    config = json.loads((MODEL_DIR / "config.json").read_text())
    config |= {"model_type": "gemma2", "architectures": ["Gemma2ForCausalLM"], "sliding_window": 128}
    (tmp_path / "config.json").write_text(json.dumps(config))
    report = plan(tmp_path, "--max-model-len", 4096)
    assert report["kv_bytes_per_token"] == 1024
    assert report["kv_bytes_per_sequence"] == 512 * 4096 + 512 * 128, "every other layer keeps its window only"


def test_plan_of_nothing() -> None:
    result = invoke("plan", "no/such/model", "--max-model-len", 4096)
    assert result.exit_code == 1
    assert "no/such/model" in result.stderr


@pytest.mark.parametrize("command", [["demo"], ["plan", "x", "--max-model-len", "1"]])
def test_without_vllm_the_commands_say_what_to_install(monkeypatch: pytest.MonkeyPatch, command: list[str]) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    result = invoke(*command)
    assert result.exit_code == 1
    said = " ".join(result.stderr.split())
    assert "needs vLLM" in said
    assert "vllm-selfextend[cuda]" in said
    assert "vllm-selfextend[cpu]" in said
