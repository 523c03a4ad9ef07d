"""What a call of an extended model may not be given: inputs whose positions cannot be told."""

import inspect
from typing import Any

import torch

CACHE_ARGUMENTS = ("cache", "past_key_values")
"""What models call the cache: transformers 5.24, and before."""

ADVICE = "Pass attention_mask, as the tokenizer returns it (1: a token, 0: padding)"


def check_inputs(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """A forward pre-hook of the base model, and of the text model in one that reads more than text.

    Raises:
        ValueError: There seems to be padding and no mask, or the positions do not count the tokens, or differ between
            the axes of M-RoPE.

    """
    if torch.compiler.is_compiling():
        return
    given = inspect.signature(model.forward).bind_partial(*args, **kwargs).arguments
    given |= given.pop("kwargs", {})
    tokens, mask, positions = (given.get(name) for name in ("input_ids", "attention_mask", "position_ids"))
    past = next((given[name] for name in CACHE_ARGUMENTS if given.get(name) is not None), None)
    begin = 0 if past is None else int(past.get_seq_length())
    config = model.config.get_text_config()
    if mask is None and tokens is not None and begin == 0 and _seems_padded(config, tokens):
        raise ValueError(
            f"the input begins or ends with the padding token {config.pad_token_id}, and there is no attention "
            f"mask, so its positions cannot be told. {ADVICE}."
        )
    if positions is not None and positions.dim() == 3 and bool((positions != positions[:1]).any()):
        raise ValueError(
            "its positions have several axes (M-RoPE), which differ in images and videos, and Self-Extend groups one. "
            "Pass text alone, where they are equal."
        )
    if isinstance(mask, dict) or (mask is not None and mask.dim() != 2):  # generate may have made masks of it already
        return
    rows_mask = None if mask is None or positions is None else mask[:, begin : begin + positions.shape[-1]]
    if positions is not None and not _count_the_tokens(positions, rows_mask):
        raise ValueError(
            "position_ids do not go up by one from token to token (packed sequences?), and Self-Extend groups "
            f"tokens by their order. {ADVICE}, and leave position_ids to the model."
        )


def _seems_padded(config: Any, tokens: torch.Tensor) -> bool:
    """Whether there is padding at an end, if padding has a token of its own.

    A text alone does not end in padding: there the model may have written the token itself.
    """
    pad, others = config.pad_token_id, (config.bos_token_id, config.eos_token_id)
    if pad is None or tokens.shape[1] == 1 or any(pad == o or (isinstance(o, list) and pad in o) for o in others):
        return False
    ends = tokens[:, [0, -1]] if len(tokens) > 1 else tokens[:, 0]
    return bool((ends == pad).any())


def _count_the_tokens(positions: torch.Tensor, mask: torch.Tensor | None) -> bool:
    """Whether positions `[batch or 1, rows]`, or several axes of them, go up by one from token to token."""
    steps = positions.diff(dim=-1)
    wrong = steps != 1
    if mask is not None and mask.shape[1] == positions.shape[-1]:
        seen = mask.bool()
        wrong = wrong & seen[:, 1:] & seen[:, :-1]
    return not bool(wrong.any())
