"""Tables of rotations in loaded models: whether positions can be read past their end."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn
from vllm.model_executor.layers.rotary_embedding import phi3_long_rope_scaled_rope

from vllm_selfextend.method.rope import inverse_frequencies
from vllm_selfextend.method.rotation_probe import ModelRotation
from vllm_selfextend.vllm.binding import _rotation_nearby
from vllm_selfextend.vllm.rotary_modules import check_other_tables, lengthen_tables, vllm_frequencies


def module(buffer: torch.Tensor | None = None, **attributes: torch.Tensor) -> nn.Module:
    made = nn.Module()
    if buffer is not None:
        made.register_buffer("cos_sin_cache", buffer, persistent=False)
    for name, value in attributes.items():
        setattr(made, name, value)
    return made


@pytest.mark.parametrize(
    ("name", "made"),
    [
        ("cos_sin_cache", module(torch.zeros(64, 32))),  # as in vLLM's HpcRopeNorm, a copy
        ("_rope_cos_sin_cache", module(_rope_cos_sin_cache=torch.zeros(64, 32))),  # as in its dflash drafts
        ("embed_positions", module(embed_positions=torch.zeros(64, 32))),  # as in transformers' GPT-J
        ("freqs_cis", module(freqs_cis=torch.zeros(64, 16, dtype=torch.complex64))),
    ],
)
def test_a_table_that_ends_before_the_served_length_is_refused(name: str, made: nn.Module) -> None:
    check_other_tables(made, 64)
    with pytest.raises(ValueError, match=f"this Module reads rotations from {name}, a table of its own with 64 rows"):
        check_other_tables(made, 65)


def test_what_is_no_table_of_rotations_is_not() -> None:
    check_other_tables(
        module(
            inv_freq=torch.zeros(16),
            positions=torch.zeros(2, 64, dtype=torch.int64),
            using_weight=torch.zeros(2, 64),
            single_states=torch.zeros(2, 64),
        ),
        256,
    )


@pytest.mark.parametrize(("served", "factors"), [(32, "short_factor"), (33, "long_factor"), (100, "long_factor")])
def test_longrope_rotates_by_the_factors_that_vllm_takes(
    served: int, factors: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of the original length, 32 here, while no more is served; they may have a scaling of their own."""
    settings = SimpleNamespace(model_config=SimpleNamespace(max_model_len=served))
    monkeypatch.setattr(phi3_long_rope_scaled_rope, "get_current_vllm_config", lambda: settings)
    rope = {
        "rope_type": "longrope",
        "rope_theta": 1e4,
        "short_factor": [1.0 + 0.02 * n for n in range(8)],
        "long_factor": [1.0 + 0.3 * n for n in range(8)],
        "original_max_position_embeddings": 32,
    }
    lists = rope["short_factor"], rope["long_factor"]
    made = phi3_long_rope_scaled_rope.Phi3LongRoPEScaledRotaryEmbedding(
        16, 16, 64, 32, 1e4, True, torch.float32, *lists, short_mscale=1.1, long_mscale=1.3
    )
    found = vllm_frequencies(made, SimpleNamespace(rope_parameters=rope, max_position_embeddings=64))
    torch.testing.assert_close(found, inverse_frequencies({"rope_theta": 1e4}, 16) / torch.tensor(rope[factors]))
    lengthen_tables(made, found, served)
    query = torch.eye(16)[:1].repeat(served, 1)
    turned, _ = made(torch.arange(served), query, query.clone())
    angle, scale = (served - 1) * found[0], 1.1 if factors == "short_factor" else 1.3
    torch.testing.assert_close(turned[-1, [0, 8]], scale * torch.stack([angle.cos(), angle.sin()]))


def test_the_nearest_rotary_modules_tell_where_a_layer_does_not() -> None:
    one, other = (ModelRotation(inverse_frequencies({"rope_theta": theta}, 16), False) for theta in (1e4, 1e6))
    layers = [nn.ModuleDict({"rotary": nn.Module(), "attention": nn.Module()}) for _ in range(2)]
    model = nn.ModuleDict({"layers": nn.ModuleList(layers), "bare": nn.ModuleDict({"attention": nn.Module()})})
    known = {layers[0]["rotary"]: [one], layers[1]["rotary"]: [other]}
    assert _rotation_nearby(model, "layers.0.attention", known) is one
    assert _rotation_nearby(model, "layers.1.attention", known) is other
    assert _rotation_nearby(model, "bare.attention", known) is None, "two that differ"
    assert _rotation_nearby(model, "bare.attention", {layers[0]["rotary"]: [one]}) is one
    assert _rotation_nearby(model, "bare.attention", {}) is None
