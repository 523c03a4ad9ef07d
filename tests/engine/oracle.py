"""A second oracle that shares no code with the project: `transformers`, eager, scores straight from the paper.

The rotary step of a transformers model is taken out, so that its attention sees unrotated queries and keys; this
module's attention then rotates them itself, once at true positions and once at grouped ones, with transformers' own
rotary functions, and picks each score by `i - j < W`. The whole sequence is computed at once, without a cache.
"""

import contextlib
import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from unittest import mock

import numpy as np
import torch
from transformers import AttentionInterface, AutoConfig, AutoModelForCausalLM
from transformers.utils import ModelOutput


@dataclass(frozen=True)
class SelfExtend:
    """The paper's numbers; `exact_len` and `log_scale_len` as the project defines them, `group_size=1` no grouping."""

    group_size: int
    neighbor_window: int
    exact_len: int = 0
    log_scale_len: int = 0


def next_token_logprobs(checkpoint: str, sequences: list[list[int]], method: SelfExtend) -> list[np.ndarray]:
    """For each sequence the log-probabilities `[len, vocab]` of the token after each of its tokens, in float32."""
    return [output.logits[0].log_softmax(-1).numpy() for output in _outputs(checkpoint, sequences, method)]


def hidden_states(checkpoint: str, sequences: list[list[int]], method: SelfExtend) -> list[np.ndarray]:
    """For each sequence what the model makes of each of its tokens, `[len, hidden_size]`, after the last norm."""
    return [output.hidden_states[-1][0].numpy() for output in _outputs(checkpoint, sequences, method)]


def _outputs(checkpoint: str, sequences: list[list[int]], method: SelfExtend) -> Iterator[ModelOutput]:
    AttentionInterface.register("self_extend_oracle", _attention)
    config = AutoConfig.from_pretrained(checkpoint)
    if config.rope_parameters.get("rope_type") == "longrope":
        # transformers chooses by each text's length; vLLM, serving more than the original length, takes the long ones.
        config.rope_parameters["short_factor"] = config.rope_parameters["long_factor"]
    model = AutoModelForCausalLM.from_pretrained(
        checkpoint, config=config, dtype=torch.float32, attn_implementation="eager"
    )
    model.config._attn_implementation = model.base_model.config._attn_implementation = "self_extend_oracle"
    model.eval()
    with _unrotated(model) as rotate, torch.inference_mode():
        for module in model.modules():
            module.oracle = (model.base_model.rotary_emb, rotate, method)
        for tokens in sequences:
            yield model(input_ids=torch.tensor([tokens]), use_cache=False, output_hidden_states=True)


@contextlib.contextmanager
def _unrotated(model: torch.nn.Module) -> Iterator[Callable]:
    """Within the context the model's attention gets unrotated queries and keys; yields its rotary function."""
    modeling = sys.modules[type(model).__module__]
    rotate = modeling.apply_rotary_pos_emb
    with mock.patch.object(modeling, "apply_rotary_pos_emb", lambda q, k, *args, **kwargs: (q, k)):
        yield rotate


def _attention(module, query, key, value, attention_mask, scaling, sliding_window=None, softcap=None, s_aux=None, **_):
    """`[1, heads, tokens, head_size]` queries, keys and values, not rotated, to `[1, tokens, heads, head_size]`."""
    rotary_emb, rotate, method = module.oracle
    repeats = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(repeats, 1), value.repeat_interleave(repeats, 1)
    position = torch.arange(query.shape[2])
    distance = position[:, None] - position
    group, window = (1, 1) if sliding_window else (method.group_size, method.neighbor_window)

    def scores(query_position, key_position):
        rotated_query = _rotated(module, rotary_emb, rotate, query, query_position)
        rotated_key = _rotated(module, rotary_emb, rotate, key, key_position)
        return rotated_query @ rotated_key.transpose(2, 3) * scaling

    neighbor = scores(position, position)
    grouped = scores(position // group + window - window // group, position // group)
    is_neighbor = (distance < window) | (position < method.exact_len)[:, None]
    chosen = torch.where(is_neighbor, neighbor, grouped)
    if method.log_scale_len and not sliding_window:
        chosen = chosen * ((position + 1).log() / math.log(method.log_scale_len)).clamp(min=1.0)[:, None]
    if softcap:
        chosen = softcap * torch.tanh(chosen / softcap)
    hidden = (distance < 0) | (distance >= sliding_window if sliding_window else torch.tensor(False))
    chosen = chosen.masked_fill(hidden, float("-inf"))
    if s_aux is not None:  # attention sinks: one more score per head, whose value is nothing
        chosen = torch.cat([chosen, s_aux[:, None, None].expand(1, -1, len(position), 1)], -1)
    weights = chosen.softmax(-1)[..., : len(position)]
    return (weights @ value).transpose(1, 2), weights


def _rotated(module, rotary_emb, rotate, x, position):
    """Rotate `x` with transformers' tables and function for this layer's kind."""
    kind = getattr(module, "layer_type", None)
    per_kind = kind is not None and hasattr(rotary_emb, f"{kind}_inv_freq")
    cos, sin = rotary_emb(x, position[None], *([kind] if per_kind else []))
    rotary_dim = 2 * len(getattr(rotary_emb, f"{kind}_inv_freq" if per_kind else "inv_freq"))
    turned, _ = rotate(x[..., :rotary_dim], x[..., :rotary_dim], cos, sin)
    return torch.cat([turned, x[..., rotary_dim:]], -1)
