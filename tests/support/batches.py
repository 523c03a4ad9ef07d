"""Batches of token prompts, padded, and the answers that a model gives to them."""

from collections.abc import Sequence
from typing import Any

import torch

from tests.support.models import SHAPE

PAD = SHAPE["pad_token_id"]


def padded(prompts: Sequence[list[int]], side: str = "left") -> dict[str, torch.Tensor]:
    """`input_ids` and `attention_mask`, `[batch, longest]`."""
    longest = max(map(len, prompts))
    ids = torch.full((len(prompts), longest), PAD)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        place = slice(longest - len(prompt), None) if side == "left" else slice(len(prompt))
        ids[row, place], mask[row, place] = torch.tensor(prompt), 1
    return {"input_ids": ids, "attention_mask": mask}


def greedy(
    model: Any, prompts: Sequence[list[int]], tokens: int, **settings: Any
) -> tuple[list[list[int]], torch.Tensor]:
    """Each prompt's new tokens, and the log-probabilities `[batch, tokens, vocab]` that they were chosen by."""
    inputs = padded(prompts)
    settings = {"do_sample": False, "max_new_tokens": tokens, **settings}
    out = model.generate(**inputs, **settings, return_dict_in_generate=True, output_logits=True)
    new = out.sequences[:, inputs["input_ids"].shape[1] :]
    return new.tolist(), torch.stack(out.logits, 1).log_softmax(-1)
