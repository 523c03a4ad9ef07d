"""Caches that keep keys otherwise than as they came: an extended model reads what they hold, as it is."""

import contextlib
from typing import Any

import pytest
import torch
from transformers import Cache, DynamicCache, PreTrainedModel, StaticCache
from transformers.cache_utils import DynamicLayer, QuantizedLayer, StaticLayer

import vllm_selfextend.transformers as SelfExtend
from tests.support.batches import greedy
from tests.support.models import random_prompts

from .families import FAMILIES, random_model

PROMPTS = random_prompts([150, 61, 12], seed=7)
NEW_TOKENS = 20


class RoundedLayer(QuantizedLayer):
    """Quarters of numbers, as an integer a number: what quanto's and HQQ's layers do, without their packages."""

    def _quantize(self, tensor: torch.Tensor, axis: int) -> torch.Tensor:
        return (tensor * 4).round().to(torch.int16)

    def _dequantize(self, q_tensor: torch.Tensor) -> torch.Tensor:
        return q_tensor.float() / 4


@pytest.fixture(scope="module", params=[(4, 16), ()], ids=["G 4", "auto"])
def model(request: pytest.FixtureRequest) -> PreTrainedModel:
    model = random_model(FAMILIES["llama"])
    SelfExtend.apply(model, *request.param)
    return model


@torch.no_grad()
def test_a_quantized_cache(model: PreTrainedModel) -> None:
    """Each step answers what a plain cache does that is filled with the quantized one's keys and values."""
    num_layers = model.config.num_hidden_layers
    quantized = Cache(layers=[RoundedLayer(residual_length=8) for _ in range(num_layers)])
    exact = DynamicCache(config=model.config)
    text = torch.tensor(PROMPTS[:1])
    token = model(input_ids=text, past_key_values=quantized).logits[:, -1:].argmax(-1)
    model(input_ids=text, past_key_values=exact)
    differences = []
    for _ in range(NEW_TOKENS):  # past the residual twice
        plain = DynamicCache(config=model.config)
        for index, layer in enumerate(quantized.layers):
            states = (layer._quantized_keys, layer.keys), (layer._quantized_values, layer.values)
            plain.update(*(torch.cat([layer._dequantize(old), new], -2) for old, new in states), index)
        got = model(input_ids=token, past_key_values=quantized).logits
        wanted = model(input_ids=token, past_key_values=plain).logits
        torch.testing.assert_close(got, wanted, atol=1e-5, rtol=0.0)
        differences.append((got - model(input_ids=token, past_key_values=exact).logits).abs().max())
        token = got.argmax(-1)
    assert min(differences) > 1e-2, "nothing was rounded"


class Stream(contextlib.nullcontext[None]):
    """In place of a GPU's: everything waits for everything."""

    def wait_stream(self, stream: "Stream") -> None: ...


@pytest.mark.parametrize("kind", [DynamicCache, StaticCache])
def test_an_offloaded_cache(kind: type[Cache], model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where there is no GPU, what is not at hand is not a number."""
    away: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
    moved = [0, 0]

    def offload(layer: Any) -> None:
        if layer.is_initialized:
            away[id(layer)] = layer.keys, layer.values
            layer.keys, layer.values = (torch.full_like(state, float("nan")) for state in away[id(layer)])
            moved[0] += 1

    def prefetch(layer: Any) -> None:
        if id(layer) in away:
            layer.keys, layer.values = away.pop(id(layer))
            moved[1] += 1

    for layer_class in (DynamicLayer, StaticLayer):
        monkeypatch.setattr(layer_class, "offload", offload)
        monkeypatch.setattr(layer_class, "prefetch", prefetch)
    monkeypatch.setattr(torch, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "default_stream", lambda device: Stream())
    settings = {"max_cache_len": 200} if kind is StaticCache else {}
    cache = kind(config=model.config, offloading=True, **settings)
    wanted = greedy(model, PROMPTS[:1], NEW_TOKENS)[0]
    assert greedy(model, PROMPTS[:1], NEW_TOKENS, past_key_values=cache)[0] == wanted
    assert min(moved) > NEW_TOKENS
