"""Each method's settings, held against the rotary tables that vLLM makes of them."""

import dataclasses
import json
import math
from pathlib import Path

import pytest
import torch
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.engine.arg_utils import EngineArgs
from vllm.model_executor.layers.rotary_embedding import get_rope

from vllm_selfextend.demo import MODEL_DIR
from vllm_selfextend.evaluation.methods import (
    METHODS,
    SCALED,
    allowed_methods,
    engine_arguments,
    read_checkpoint,
    self_extend_variants,
)
from vllm_selfextend.method.plan import CONFIG_KEY

LENGTH, SERVED, HEAD_SIZE, BASE = 256, 4000, 32, 10000.0


def rotary_table(settings: dict) -> torch.Tensor:
    """`[rows, HEAD_SIZE]`: the table of a server with these settings, which have to allow its length."""
    config = EngineArgs(model=str(MODEL_DIR), max_model_len=SERVED, dtype="float32", **settings).create_model_config()
    assert config.max_model_len == SERVED
    with set_current_vllm_config(VllmConfig()):
        rope = get_rope(
            HEAD_SIZE,
            config.hf_text_config.max_position_embeddings,
            rope_parameters=config.hf_text_config.rope_parameters,
            dtype=torch.float32,
        )
    return rope.cos_sin_cache


def plain_table(base: float = BASE, stretch: float = 1.0) -> torch.Tensor:
    frequencies = base ** -(torch.arange(0, HEAD_SIZE, 2, dtype=torch.float64) / HEAD_SIZE) / stretch
    angles = torch.arange(SERVED)[:, None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=1).float()


@pytest.mark.parametrize("method", ["unmodified", *SCALED])
def test_every_position_has_its_row(method: str) -> None:
    checkpoint = read_checkpoint(str(MODEL_DIR), SERVED, {}, {})
    table = rotary_table(engine_arguments(METHODS[method], checkpoint))
    assert table.shape[0] >= SERVED
    assert table.isfinite().all()
    factor = SERVED / LENGTH
    wanted = {
        "unmodified": plain_table(),
        "linear": plain_table(stretch=factor),
        # bloc97's NTK-aware base.
        "dynamic": plain_table(BASE * factor ** (HEAD_SIZE / (HEAD_SIZE - 2))),
    }
    if method in wanted:
        # vLLM computes angles in float32.
        torch.testing.assert_close(table[:SERVED], wanted[method], rtol=0, atol=SERVED * 2.0**-21)
    elif method == "yarn":
        assert not torch.allclose(table[:SERVED], plain_table(), atol=0.01)
        fastest = table[:SERVED, 0] / plain_table()[:, 0]
        assert fastest.median().item() == pytest.approx(0.1 * math.log(factor) + 1, rel=1e-3), "attention factor"
        assert table[:SERVED, -1].abs().max() < plain_table()[:, -1].abs().max(), "the slowest is interpolated"


def test_self_extend_is_the_backend_and_its_numbers() -> None:
    checkpoint = read_checkpoint(str(MODEL_DIR), SERVED, {"group_size": 40}, {})
    assert checkpoint.report.group_size == 40
    method = dataclasses.replace(METHODS["self-extend"], settings={"group_size": 40})
    settings = engine_arguments(method, checkpoint)
    assert settings == {"attention_backend": "CUSTOM", "additional_config": {CONFIG_KEY: {"group_size": 40}}}


def test_other_self_extends_beside() -> None:
    checkpoint = read_checkpoint(str(MODEL_DIR), SERVED, {}, {})
    fixed, plain, short = self_extend_variants([{"group_size": 40}, {"log_scale": False}, {"group_size": 2}], {})
    assert fixed.label == "Self-Extend, group_size 40"
    assert plain.label == "Self-Extend, log_scale false"
    assert len({(method.name, method.color, method.marker) for method in (fixed, plain, METHODS["self-extend"])}) == 3
    assert engine_arguments(fixed, checkpoint)["additional_config"] == {CONFIG_KEY: {"group_size": 40}}
    with pytest.raises(ValueError, match="Set group_size to 21 or more"):
        engine_arguments(short, checkpoint)
    with pytest.raises(ValueError, match="given twice"):
        list(self_extend_variants([{"group_size": 40, "log_scale": False}, {"log_scale": False, "group_size": 40}], {}))
    with pytest.raises(ValueError, match="--self-extend is given 5 times; a picture has room for 4 more"):
        list(self_extend_variants([{"group_size": size} for size in range(2, 7)], {}))
    with pytest.raises(ValueError, match=r"--self-extend '\{\}' is given twice, or is what --method self-extend has"):
        list(self_extend_variants([{}], {}))
    plain = {"group_size": 40, "trained_length": 128}
    (automatic,) = self_extend_variants([{}], plain)
    assert (automatic.settings, automatic.label) == ({"trained_length": 128}, "Self-Extend, nothing chosen")
    with pytest.raises(ValueError, match="what --method self-extend has"):
        list(self_extend_variants([{"group_size": 40}], plain))


def test_there_has_to_be_something_to_extend() -> None:
    with pytest.raises(ValueError, match="trained for 256 tokens, and 200 are within them"):
        read_checkpoint(str(MODEL_DIR), 200, {}, {})


def checkpoint_with(folder: Path, **changes: object):
    config = json.loads((MODEL_DIR / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(config))
    return read_checkpoint(str(folder), SERVED, {}, {})


def test_a_checkpoint_that_scales_already(tmp_path: Path) -> None:
    rope = {"rope_type": "linear", "factor": 2.0, "rope_theta": BASE}
    checkpoint = checkpoint_with(tmp_path, rope_parameters=rope)
    assert engine_arguments(METHODS["self-extend"], checkpoint)["attention_backend"] == "CUSTOM"
    for method in SCALED:
        with pytest.raises(ValueError, match=rf"'{method}' scales a plain RoPE, and .* has RoPE of type 'linear'"):
            engine_arguments(METHODS[method], checkpoint)
    asked = [METHODS[name] for name in ("unmodified", "yarn", "self-extend")]
    methods, reasons = allowed_methods(asked, checkpoint)
    assert methods == [asked[0], asked[2]]
    assert [reason.split("'")[1] for reason in reasons] == ["yarn"]


def test_what_self_extend_cannot_serve(tmp_path: Path) -> None:
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": BASE}
    with pytest.raises(ValueError, match=r"Self-Extend cannot serve .*dynamic NTK"):
        engine_arguments(METHODS["self-extend"], checkpoint_with(tmp_path, rope_parameters=rope))


def test_the_command_line_knows_every_method() -> None:
    from vllm_selfextend.cli import MethodName

    assert [name.value for name in MethodName] == list(METHODS)
