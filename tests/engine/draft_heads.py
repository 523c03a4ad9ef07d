"""A small model and draft heads that guess what it says, so that it shows when a head reads its text wrongly.

The model has one decoder layer. Token vectors fill the first half of a hidden vector and the layer's answer the second,
which is all that `lm_head` reads; so what comes next is what attention brings. A head runs the same layer over the same
text but for its first token, which no head of vLLM's gets, and guesses right if its attention is right.
"""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from tests.support.models import TRAINED_LENGTH, VOCAB_SIZE

HIDDEN, HALF = 128, 64
HEADS, KV_HEADS, HEAD_SIZE, INNER = 4, 2, 32, 32
SHAPE: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": HIDDEN,
    "intermediate_size": INNER,
    "num_hidden_layers": 1,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "max_position_embeddings": TRAINED_LENGTH,
    "tie_word_embeddings": False,
    "dtype": "float32",
}
LLAMA: dict[str, Any] = {**SHAPE, "model_type": "llama", "architectures": ["LlamaForCausalLM"]}
EAGLE3 = {"norm_before_residual": True, "eagle_config": {"eagle_aux_hidden_state_layer_ids": [0]}}


def save_model_and_heads(folder: Path) -> dict[str, str]:
    """Write the model as a Llama, the same one as a MiMo, whose checkpoint has an MTP head, and the other heads.

    Returns:
        The path of the Llama, "model", and one for each speculative method.

    """
    generator = torch.Generator().manual_seed(12)

    def draw(rows: int, columns: int, size: float) -> torch.Tensor:
        return size * torch.randn(rows, columns, generator=generator)

    # All of one length, so that the norm before the layer, which an EAGLE head lacks, changes nothing.
    tokens = torch.zeros(VOCAB_SIZE, HIDDEN)
    tokens[:, :HALF] = torch.nn.functional.normalize(draw(VOCAB_SIZE, HALF, 1.0)) * HIDDEN**0.5
    output = torch.zeros(HIDDEN, HEADS * HEAD_SIZE)
    output[HALF:] = draw(HALF, HEADS * HEAD_SIZE, 0.1)
    lm_head = torch.zeros(VOCAB_SIZE, HIDDEN)
    lm_head[:, HALF:] = draw(VOCAB_SIZE, HALF, 0.1)
    attention = {
        "self_attn.q_proj.weight": draw(HEADS * HEAD_SIZE, HIDDEN, 0.15),
        "self_attn.k_proj.weight": draw(KV_HEADS * HEAD_SIZE, HIDDEN, 0.15),
        "self_attn.v_proj.weight": draw(KV_HEADS * HEAD_SIZE, HIDDEN, 0.1),
        "self_attn.o_proj.weight": output,
    }
    rest = {
        "post_attention_layernorm.weight": torch.ones(HIDDEN),
        "mlp.gate_proj.weight": draw(INNER, HIDDEN, 0.1),
        "mlp.up_proj.weight": draw(INNER, HIDDEN, 0.1),
        "mlp.down_proj.weight": torch.zeros(HIDDEN, INNER),
    }
    norm = {"input_layernorm.weight": torch.ones(HIDDEN)}
    layer = {**attention, **rest, **norm}
    ignore = torch.zeros(HIDDEN, HIDDEN)
    only_the_token = torch.cat([torch.eye(HIDDEN), ignore], dim=1)
    biases = {name.replace("weight", "bias"): torch.zeros(len(layer[name])) for name in list(attention)[:3]}
    mtp = {
        **{f"{name}.weight": torch.ones(HIDDEN) for name in ("token_layernorm", "hidden_layernorm", "final_layernorm")},
        "input_proj.weight": torch.cat([ignore, torch.eye(HIDDEN)], dim=1),
        **layer,
        **biases,
    }
    model = {
        "model.embed_tokens.weight": tokens,
        "model.norm.weight": torch.ones(HIDDEN),
        "lm_head.weight": lm_head,
        **_below("model.layers.0", layer),
    }
    with_mtp = {**model, **_below("model.layers.0", biases), **_below("model.mtp_layers.0", mtp)}
    eagle = {"fc.weight": only_the_token, **_below("layers.0", {**attention, **rest})}
    # Its layer gets the token beside what the model's layers make of the one before, and adds to the latter: to zero.
    beside = {
        name: weight if "o_proj" in name else torch.cat([weight, torch.zeros_like(weight)], dim=1)
        for name, weight in attention.items()
    }
    eagle3 = {
        "fc.weight": ignore,
        "norm.weight": torch.ones(HIDDEN),
        "lm_head.weight": lm_head,
        **_below("midlayer", {**beside, **rest, **norm, "hidden_norm.weight": torch.zeros(HIDDEN)}),
    }
    mimo = {**SHAPE, "model_type": "qwen2", "architectures": ["MiMoForCausalLM"], "num_nextn_predict_layers": 1}
    return {
        "model": _save(folder / "model", LLAMA, model),
        "mtp": _save(folder / "mtp", mimo, with_mtp),
        "eagle": _save(folder / "eagle", LLAMA, eagle),
        "eagle3": _save(folder / "eagle3", {**LLAMA, **EAGLE3}, eagle3),
    }


def _below(path: str, weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {f"{path}.{name}": weight for name, weight in weights.items()}


def _save(path: Path, config: dict[str, Any], weights: dict[str, torch.Tensor]) -> str:
    path.mkdir()
    (path / "config.json").write_text(json.dumps(config))
    save_file({name: weight.contiguous().clone() for name, weight in weights.items()}, path / "model.safetensors")
    return str(path)
