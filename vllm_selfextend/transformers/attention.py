"""The attention and the mask that transformers finds under the name `self_extend`."""

from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import causal_mask_function, sdpa_mask

from ..backends import reference
from ..backends.interface import AttentionParams
from .call import Call, current_call
from .layer import NAME, extended_layer
from .step import Step

MAX_ELEMENTS = 1 << 24
"""Scores held at once, 64 MB in float32: few enough for any machine, enough rows for a fast product."""


def mask(
    *,
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | torch.Tensor = 0,
    kv_offset: int = 0,
    mask_function: Any = causal_mask_function,
    attention_mask: torch.Tensor | None = None,
    local_size: int | None = None,
    allow_is_causal_skip: bool = True,
    **kwargs: Any,
) -> torch.Tensor | None:
    """`[batch, 1, rows, keys]`, True where a query sees a key; see `transformers.masking_utils.sdpa_mask`.

    None has one meaning, where sdpa's has several: the layer sees the whole context, the queries are the last keys'
    tokens, and nothing is hidden but the keys after each.

    Raises:
        ValueError: The layer sees the whole context, but not as a causal one does.

    """
    is_plain = local_size is None and allow_is_causal_skip
    if local_size is None and mask_function is not causal_mask_function:
        raise ValueError(
            "the model asks for attention that is not just causal (packed sequences, or tokens that see later ones), "
            "from which Self-Extend cannot tell positions. Pass each text as a row of its own and a 2D attention_mask."
        )
    are_last = isinstance(q_offset, int) and q_offset + q_length == kv_length and kv_offset == 0
    if is_plain and are_last and not torch.compiler.is_compiling():
        seen = None if attention_mask is None else attention_mask[:, :kv_length]
        if seen is None or (seen.shape[1] == kv_length and bool(seen.all())):
            return None
    made: torch.Tensor = sdpa_mask(
        batch_size=batch_size,
        q_length=q_length,
        kv_length=kv_length,
        q_offset=q_offset,
        kv_offset=kv_offset,
        mask_function=mask_function,
        attention_mask=attention_mask,
        local_size=local_size,
        allow_is_causal_skip=False,
        **kwargs,
    )
    return made


def attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Attention of an extended layer with Self-Extend, of any other as it is.

    Args:
        module: The layer's attention module.
        query: `[batch, num_heads, rows, head_size]`, rotated at true positions.
        key: Like `query`, `[batch, num_kv_heads, keys, head_size]`.
        value: `[batch, num_kv_heads, keys, head_size]`.
        attention_mask: What `mask` made.
        scaling: Multiplies scores; None is `head_size ** -0.5`.
        dropout: Must be 0.
        softcap: As in `AttentionParams`.
        s_aux: Attention sinks, as in `AttentionParams`.
        kwargs: What else transformers passes.

    Returns:
        `[batch, rows, num_heads, head_size]`, and the weights `[batch, num_heads, rows, keys]` if asked for.

    Raises:
        ValueError: The layer asks for what this attention, or FlashAttention, does not do; or see `Call.step`.

    """
    if dropout:
        raise ValueError(f"attention dropout is {dropout}; Self-Extend is for inference: call model.eval().")
    if kwargs.get("position_bias") is not None:
        raise ValueError(
            f"{type(module).__name__} adds a position bias to its scores, which Self-Extend does not know."
        )
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    rows, num_rows, num_keys = query.transpose(1, 2), query.shape[2], key.shape[2]
    layer, call = extended_layer(module), current_call()
    if layer is None:  # it has a sliding window, or no RoPE: ordinary positions
        params = AttentionParams(scale, soft_cap=softcap or 0.0, sinks=s_aux)
        step = _ordinary_step(attention_mask, num_rows, num_keys, query.device)
    else:
        params = layer.params(num_keys, query.device, scale, softcap, s_aux)
        if torch.compiler.is_compiling():
            step = Step.of(attention_mask, num_rows, num_keys, query.device)
        else:
            step = (call or Call(layer.extension)).step(attention_mask, num_rows, num_keys, query.device)
    weights = None
    kwargs.pop("output_attentions", None)  # sdpa would warn that it gives none
    if call is not None and call.output_attentions:
        weights = reference.attention_weights(rows, key, step.query_pos, step.key_pos, params, step.hidden)
        call.has_attentions = True
    if layer is None and softcap is None and s_aux is None:
        if attention_mask is None and 1 < num_rows < num_keys:  # without a mask sdpa takes them for the first keys
            seen = torch.ones(num_rows, num_keys, dtype=torch.bool, device=query.device)
            attention_mask = seen.tril(num_keys - num_rows)[None, None]
        out, _ = sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    elif layer is not None and layer.extension.flash_attention is not None:
        out = layer.extension.flash_attention.attend(query, key, value, step, params)
    else:
        out = reference.attend(rows, key, value, step.query_pos, step.key_pos, params, step.hidden, MAX_ELEMENTS)
    return out, weights


def _ordinary_step(mask: torch.Tensor | None, num_rows: int, num_keys: int, device: torch.device) -> Step:
    """Without grouped positions all that counts of a step is what is hidden."""
    step = Step.of(None, num_rows, num_keys, device)
    return step if mask is None else Step(step.query_pos, step.key_pos, ~mask[:, 0])


AttentionInterface.register(NAME, attention)
AttentionMaskInterface.register(NAME, mask)
