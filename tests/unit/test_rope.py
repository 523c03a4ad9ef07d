"""Frequencies against transformers' own, which shares no code with ours."""

from types import SimpleNamespace

import pytest
import torch
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from vllm_selfextend.method.rope import cos_sin, inverse_frequencies, rope_parameters

WRONG = {
    "factor None": {"rope_type": "linear"},
    "factor '2'": {"rope_type": "yarn", "factor": "2", "original_max_position_embeddings": 32},
    "factor -2.0": {"rope_type": "linear", "factor": -2.0},
    "low_freq_factor None": {"rope_type": "llama3", "factor": 2.0, "high_freq_factor": 4.0},
    "beta_fast '32'": {"rope_type": "yarn", "factor": 2.0, "beta_fast": "32"},
    r"long_factor \['a'\]": {"rope_type": "longrope", "long_factor": ["a"]},
    r"long_factor \[\]": {"rope_type": "longrope", "long_factor": []},
    "long_factor None": {"rope_type": "longrope"},
    "rope_theta '1e4'": {"rope_type": "default", "rope_theta": "1e4"},
    "rope_theta None": {"rope_theta": None},
    "rope_theta inf": {"rope_theta": float("inf")},
    "partial_rotary_factor True": {"rope_type": "default", "partial_rotary_factor": True},
}


@pytest.mark.parametrize("found", WRONG)
def test_numbers_that_are_none(found: str) -> None:
    """Configs are written by hand, too."""
    config = SimpleNamespace(rope_parameters=WRONG[found], max_position_embeddings=64)
    with pytest.raises(ValueError, match=f"^its RoPE of type '.*' has {found} in the config; it must be a number"):
        list(rope_parameters(config))


ROPES = {
    "linear": {"rope_type": "linear", "factor": 4.0},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768},
    "yarn with betas": {
        "rope_type": "yarn",
        "factor": 32.0,
        "original_max_position_embeddings": 4096,
        "beta_fast": 16.0,
        "beta_slow": 2.0,
        "truncate": False,
    },
    "proportional": {"rope_type": "proportional", "partial_rotary_factor": 0.25},
    "longrope": {
        "rope_type": "longrope",
        "short_factor": [1.0] * 32,
        "long_factor": [1.0 + n for n in range(32)],
        "original_max_position_embeddings": 4096,
    },
}


@pytest.mark.parametrize("name", ROPES)
@pytest.mark.parametrize("theta", [10000.0, 500000.0])
def test_frequencies_are_transformers(name: str, theta: float) -> None:
    rope = {**ROPES[name], "rope_theta": theta}
    config = LlamaConfig(head_dim=64, max_position_embeddings=131072, rope_parameters=rope)
    wanted, _ = ROPE_INIT_FUNCTIONS[rope["rope_type"]](config, "cpu", seq_len=131072)
    (parameters,) = rope_parameters(config)
    torch.testing.assert_close(inverse_frequencies(parameters, 64), wanted, rtol=1e-6, atol=0.0)


def test_longropes_short_factors_are_transformers_within_the_original_length() -> None:
    rope = {**ROPES["longrope"], "short_factor": [1.0 + 0.1 * n for n in range(32)], "rope_theta": 10000.0}
    config = LlamaConfig(head_dim=64, max_position_embeddings=131072, rope_parameters=rope)
    wanted, _ = ROPE_INIT_FUNCTIONS["longrope"](config, "cpu", seq_len=4096)
    (parameters,) = rope_parameters(config)
    torch.testing.assert_close(inverse_frequencies(parameters, 64, long_factors=False), wanted, rtol=1e-6, atol=0.0)


def test_default_frequencies() -> None:
    wanted = [10000.0 ** (-n / 4) for n in range(4)]
    torch.testing.assert_close(inverse_frequencies({}, 8), torch.tensor(wanted))


def test_angles_stay_exact_far_out() -> None:
    row = cos_sin(torch.tensor([1.0, 0.5]), 10_000_000, 10_000_001, torch.float64)[0]
    angles = torch.tensor([1e7, 5e6], dtype=torch.float64)
    torch.testing.assert_close(row, torch.cat([angles.cos(), angles.sin()]), atol=1e-12, rtol=0.0)


def test_unsupported_types_are_named() -> None:
    with pytest.raises(ValueError, match=r"'dynamic' \(dynamic NTK\): the frequencies move with the length"):
        inverse_frequencies({"rope_type": "dynamic"}, 8)
    with pytest.raises(ValueError, match=r"'spiral' is not supported\. Supported are default, linear, llama3, yarn"):
        inverse_frequencies({"rope_type": "spiral"}, 8)


def test_parameters_a_layer_type() -> None:
    class Config:
        rope_parameters = {  # noqa: RUF012
            "full_attention": {"rope_type": "default", "rope_theta": 1e6},
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
        }

    assert [one["rope_theta"] for one in rope_parameters(Config())] == [1e6, 1e4]
