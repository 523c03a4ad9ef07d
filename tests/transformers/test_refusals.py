"""What cannot work is refused by name, with what to do."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    Cohere2Config,
    DeepseekV3Config,
    FalconConfig,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    PreTrainedModel,
    SmolLM3Config,
    T5Config,
    T5ForConditionalGeneration,
)

import vllm_selfextend.transformers as SelfExtend
from tests.support.batches import PAD
from tests.support.models import CONFIGS, SHAPE, random_prompts
from vllm_selfextend.transformers.extension import checkpoint_length
from vllm_selfextend.transformers.layer import extended_layer

from .families import FAMILIES, random_model


def rope(**parameters: Any) -> dict[str, Any]:
    return {**SHAPE, "rope_parameters": {"rope_theta": 10000.0, **parameters}}


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return random_model(FAMILIES["llama"])


NOPE = Cohere2Config(
    **SHAPE, sliding_window=24, layer_types=["sliding_attention", "full_attention", "sliding_attention"]
)
MLA = DeepseekV3Config(
    **{**SHAPE, "num_key_value_heads": 4, "head_dim": 8},
    q_lora_rank=16, kv_lora_rank=16, qk_rope_head_dim=8, qk_nope_head_dim=16, v_head_dim=16,
    moe_intermediate_size=32, n_routed_experts=8, num_experts_per_tok=2, n_group=2, topk_group=1,
)  # fmt: skip
MODELS = {
    "dynamic": (LlamaConfig(**rope(rope_type="dynamic", factor=2.0)), "dynamic NTK.*frequencies move with the length"),
    "longrope": (CONFIGS["longrope"], "'longrope': transformers chooses its factors anew"),
    "mla": (MLA, r"multi-head latent attention \(MLA\)"),
    "RoPE where nothing is far": (NOPE, "its layers with RoPE see a part of the context only.*nothing to extend"),
    "learned positions": (
        GPT2Config(vocab_size=160, n_embd=64, n_layer=2, n_head=4, n_positions=64),
        r"its layers have no rotary position embeddings \(RoPE\)",
    ),
    "alibi": (
        FalconConfig(vocab_size=160, hidden_size=64, num_hidden_layers=1, num_attention_heads=4, alibi=True),
        "ALiBi",
    ),
    "both directions": (LlamaConfig(**SHAPE, is_causal=False), "its attention is not causal"),
    "all slide": (
        MistralConfig(**SHAPE, sliding_window=24),
        "every layer attends to a sliding window.*sliding_window=None",
    ),
}


@pytest.mark.parametrize("length", [-1, 64.0, "64", True])
def test_a_config_whose_length_is_none(length: object) -> None:
    with pytest.raises(ValueError, match=f"config has the length {length!r}, which is none: pass trained_length"):
        checkpoint_length(SimpleNamespace(max_position_embeddings=length, model_type="llama"))


@pytest.mark.parametrize("name", MODELS)
def test_models_that_cannot_be_extended(name: str) -> None:
    config, message = MODELS[name]
    model = AutoModelForCausalLM.from_config(config).eval()
    before = model.config._attn_implementation
    with pytest.raises(ValueError, match=message):
        SelfExtend.apply(model, 4, 16)
    assert model.config._attn_implementation == before
    assert not any(module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("seed", [2, 4, 8, 16])
def test_some_layers_without_rope(seed: int) -> None:
    """SmolLM3 rotates in some of the layers that see the whole context; which, no weights may hide."""
    config = SmolLM3Config(**{**SHAPE, "hidden_size": 128}, no_rope_layers=[1, 0, 1], use_sliding_window=False)
    model = random_model(config, seed)
    SelfExtend.apply(model, 4, 16)
    assert [extended_layer(layer.self_attn) is not None for layer in model.model.layers] == [True, False, True]


def test_keys_of_a_layer_of_another_kind() -> None:
    """The last layer sees the whole context; the first one, with a window, rotates in another way."""
    model = random_model(FAMILIES["gemma3n"])
    if not hasattr(model.model.layers[-1].self_attn, "kv_shared_layer_index"):
        pytest.skip("since transformers 5.23 layers find the keys of their kind, not of a layer")
    model.model.layers[-1].self_attn.kv_shared_layer_index = 0
    model.model.layers[0].self_attn.store_full_length_kv = True
    with pytest.raises(ValueError, match="Gemma3nTextAttention: its queries and keys are not what the model's RoPE"):
        SelfExtend.apply(model, 4, 16)


def test_a_module_whose_forward_is_not_its_own() -> None:
    model = random_model(FAMILIES["falcon"])
    attention = model.transformer.h[1].self_attention
    attention.forward = replaced = attention.forward
    with pytest.raises(ValueError, match="the forward of its FalconAttention has been replaced"):
        SelfExtend.apply(model, 4, 16)
    assert attention.forward is replaced
    assert "forward" not in vars(model.transformer.h[0].self_attention)


def test_an_encoder_and_what_is_no_model() -> None:
    small = T5Config(vocab_size=32, d_model=16, d_kv=4, d_ff=16, num_layers=1, num_heads=2)
    with pytest.raises(ValueError, match="encoder-decoder"):
        SelfExtend.apply(T5ForConditionalGeneration(small), 4, 16)
    with pytest.raises(ValueError, match="not a model of transformers"):
        SelfExtend.apply(torch.nn.Linear(2, 2), 4, 16)


def test_a_rotation_that_no_frequencies_of_the_model_explain(model: PreTrainedModel) -> None:
    other = random_model(FAMILIES["llama"])
    forward = other.model.rotary_emb.forward
    other.model.rotary_emb.forward = lambda x, position_ids: forward(x, 1.01 * position_ids)
    with pytest.raises(ValueError, match="LlamaAttention: its queries and keys are not what the model's RoPE"):
        SelfExtend.apply(other, 4, 16)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"group_size": 0}, 'group_size is 0; it must be an integer from 1 to 134217728, or "auto"'),
        ({"group_size": 2.0}, "group_size is 2.0"),
        ({"group_size": 2**31}, "group_size is 2147483648; it must be"),
        ({"group_size": "Auto"}, "group_size is 'Auto'"),
        ({"window_size": True}, "window_size is True"),
        ({"window_size": -4}, "window_size is -4"),
        ({"trained_length": float("nan")}, "trained_length is nan"),
        ({"trained_length": 2**63}, "trained_length is 9223372036854775808"),
        ({"window_size": 65}, "window_size is 65, more than the trained length 64.*at most 64"),
        ({"trained_length": 10}, "window_size is 16, more than the trained length 10"),
        ({"scale_base": 1}, "scale_base is 1; it must be an integer from 2 to 134217728, -1 for no scaling"),
        ({"scale_base": 2**40}, "scale_base is 1099511627776"),
        ({"scale_base": float("nan")}, "scale_base is nan"),
        ({"exact_short": 1}, "exact_short is 1"),
        ({"group_size": "auto", "exact_short": False}, 'exact_short is False, and group_size is "auto"'),
        ({"group_size": "auto", "window_size": 31}, "window_size is 31, and an automatic group_size.*at most 30"),
        ({"group_size": "auto", "trained_length": 2, "window_size": 1}, "Pass a number for group_size"),
    ],
)
def test_numbers_that_are_not_allowed(model: PreTrainedModel, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SelfExtend.apply(model, **{"group_size": 4, "window_size": 16, **arguments})


@pytest.fixture(scope="module")
def extended() -> PreTrainedModel:
    model = random_model(FAMILIES["llama"])
    SelfExtend.apply(model, 4, 16)
    return model


def text(length: int) -> torch.Tensor:
    return torch.tensor(random_prompts([length], seed=5))


def test_a_text_past_what_the_numbers_reach(extended: PreTrainedModel) -> None:
    extended(input_ids=text(208))
    with pytest.raises(
        ValueError, match=r"has 209 tokens.*reaches 208.*without a group_size, or with one of 5 or more"
    ):
        extended(input_ids=text(209))
    padded = torch.cat([torch.full((1, 20), PAD), text(208)], 1)
    extended(input_ids=padded, attention_mask=(padded != PAD).long())


def test_padding_without_a_mask(extended: PreTrainedModel) -> None:
    padding = torch.full((1, 5), PAD)
    left, right = torch.cat([padding, text(20)], 1), torch.cat([text(20), padding], 1)
    for tokens in (left, torch.cat([text(25), right])):
        with pytest.raises(ValueError, match=f"padding token {PAD}, and there is no attention mask"):
            extended(input_ids=tokens)
    extended(input_ids=right)


def test_padding_beside_a_text_model() -> None:
    """The text model is given no tokens: the whole is asked."""
    model = random_model(FAMILIES["qwen2-vl"])
    SelfExtend.apply(model, 4, 16)
    with pytest.raises(ValueError, match=f"padding token {PAD}, and there is no attention mask"):
        model(input_ids=torch.cat([torch.full((1, 5), PAD), text(20)], 1))


def test_positions_that_do_not_count_the_tokens(extended: PreTrainedModel) -> None:
    packed = torch.cat([torch.arange(10), torch.arange(20)])[None]
    with pytest.raises(ValueError, match="position_ids do not go up by one"):
        extended(input_ids=text(30), position_ids=packed)
    shifted = extended(input_ids=text(30), position_ids=torch.arange(7, 37)[None]).logits
    torch.testing.assert_close(shifted, extended(input_ids=text(30)).logits, atol=1e-4, rtol=0.0)


@pytest.mark.parametrize("name", ["qwen2-vl", "qwen3.5"])
def test_axes_that_differ(name: str) -> None:
    """As those of an image do; with equal axes the text is the one without any."""
    model = random_model(FAMILIES[name])
    SelfExtend.apply(model, 4, 16)
    positions = torch.arange(30).expand(3, 1, -1)
    equal = model(input_ids=text(30), position_ids=positions).logits
    torch.testing.assert_close(equal, model(input_ids=text(30)).logits, atol=1e-4, rtol=0.0)
    of_an_image = positions.clone()
    of_an_image[1, 0, 10:14] = torch.tensor([10, 10, 11, 11])
    with pytest.raises(ValueError, match=r"several axes \(M-RoPE\), which differ in images and videos"):
        model(input_ids=text(30), position_ids=of_an_image)


def test_masks_that_are_not_causal(extended: PreTrainedModel) -> None:
    causal = torch.ones(20, 20, dtype=torch.bool).tril()[None, None]
    extended(input_ids=text(20), attention_mask=causal)
    looks_ahead = causal.clone()
    looks_ahead[..., :5, :5] = True
    without_one = causal.clone()
    without_one[..., 10:19, 3] = False
    for mask in (looks_ahead, without_one):
        with pytest.raises(ValueError, match="not a causal one"):
            extended(input_ids=text(20), attention_mask=mask)
    with pytest.raises(ValueError, match="it must be a 2D attention_mask"):
        extended(input_ids=text(20), attention_mask=causal.float())


def test_dropout() -> None:
    model = random_model(LlamaConfig(**SHAPE, attention_dropout=0.1))
    SelfExtend.apply(model, 4, 16)
    with pytest.raises(ValueError, match=r"attention dropout is 0.1.*call model.eval\(\)"):
        model.train()(input_ids=text(20))
