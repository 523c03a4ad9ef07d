"""Where the tokens of one call of a model are in their sequences, told from what they see."""

from dataclasses import dataclass, field
from typing import Any

import torch


@dataclass(frozen=True)
class Step:
    """Where the queries and keys of one call of the model are in their sequences.

    Attributes:
        query_pos: `[batch or 1, rows]`, int64: how many visible keys are before a query's own token. What stands for
            padding has some position too.
        key_pos: `[batch or 1, keys]`, int64: the same of keys, in the order of the cache's slots.
        hidden: `[batch, rows, keys]`, bool: what a query does not see; None: the keys after it, and it is one of the
            last keys' tokens.
        prepared: Room for what is worked out once for all layers.

    """

    query_pos: torch.Tensor
    key_pos: torch.Tensor
    hidden: torch.Tensor | None
    prepared: dict[str, Any] = field(default_factory=dict, init=False, repr=False, compare=False)

    @staticmethod
    def of(mask: torch.Tensor | None, num_rows: int, num_keys: int, device: torch.device) -> "Step":
        """Positions told from what each query sees, whatever the padding and the cache.

        Args:
            mask: `[batch, 1, rows, keys]`, True where a query sees a key; None: see `hidden`.
            num_rows: Queries of a sequence.
            num_keys: Keys, those of the queries' tokens included.
            device: The queries'.

        Raises:
            ValueError: The mask is not that of causal attention, with some keys hidden from all.

        """
        if mask is None:
            key_pos = torch.arange(num_keys, device=device)[None]
            return Step(key_pos[:, num_keys - num_rows :], key_pos, None)
        if mask.dtype != torch.bool or mask.dim() != 4 or mask.shape[2:] != (num_rows, num_keys):
            raise ValueError(
                f"the attention mask is {mask.dtype} of shape {list(mask.shape)}; with Self-Extend it must be a 2D "
                "attention_mask of the tokens (1: a token, 0: padding), from which positions are told."
            )
        visible = mask[:, 0].to(device)  # layers on several devices may be given one mask
        query_pos = (visible.sum(2) - 1).clamp(min=0)
        key_pos = (visible[:, -1].cumsum(1) - 1).clamp(min=0)
        if not torch.compiler.is_compiling() and num_rows > 1 and not _is_causal(visible):
            raise ValueError(
                "the attention mask is not a causal one (packed sequences, tokens that see later ones, or a custom "
                "mask): Self-Extend cannot tell positions from it. Pass a 2D attention_mask of the tokens."
            )
        return Step(query_pos, key_pos, ~visible)


def _is_causal(visible: torch.Tensor) -> bool:
    """Whether queries `[batch, rows, keys]` see what the last one sees, as far as their own slots."""
    rows, slots = (torch.arange(size, device=visible.device) for size in visible.shape[1:])
    last_seen = (visible * (slots + 1)).amax(2) - 1
    # A query's slot is the last one it sees, or comes after it if the query stands for padding.
    first_slot = torch.where(last_seen >= 0, last_seen - rows, -len(rows)).amax(1)
    before = slots <= (first_slot[:, None] + rows)[:, :, None]
    return bool((visible == visible[:, -1:] & before).all())
