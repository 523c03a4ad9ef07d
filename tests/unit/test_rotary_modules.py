"""Tables of rotations in loaded models: whether positions can be read past their end."""

import pytest
import torch
from torch import nn

from vllm_selfextend.rotary_modules import check_other_tables


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
