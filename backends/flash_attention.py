"""FlashAttention's `flash_attn_varlen_func`, whoever brings it, as the kernels call it."""

from collections.abc import Callable
from typing import Any

import torch

from .interface import VarlenLengths


class FlashVarlen:
    """`interface.VarlenAttention` by `flash_attn_varlen_func` as in `vllm/vllm_flash_attn/flash_attn_interface.py`."""

    def __init__(self, function: Callable[..., Any], version: int, scale: float, soft_cap: float) -> None:
        # One split: a prefill has programs enough, and the answer does not depend on what else is in the batch.
        self._arguments = {
            "softmax_scale": scale,
            "softcap": soft_cap,
            "fa_version": version,
            "num_splits": 1,
            "return_softmax_lse": True,
        }
        self._function, self.version = function, version

    def __call__(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        out: torch.Tensor,
        lse: torch.Tensor,
        lengths: VarlenLengths,
        block_table: torch.Tensor | None,
        *,
        is_causal: bool,
        window: int,
    ) -> torch.Tensor:
        """See `interface.VarlenAttention`; the log-sum-exp is FlashAttention's own tensor."""
        if block_table is None:
            keys = {"cu_seqlens_k": lengths.key_start_loc}
        else:
            keys = {"seqused_k": lengths.seq_lens, "block_table": block_table}
        _, found = self._function(
            q=query,
            k=key,
            v=value,
            out=out,
            cu_seqlens_q=lengths.query_start_loc,
            max_seqlen_q=lengths.max_query_len,
            max_seqlen_k=lengths.max_seq_len,
            causal=is_causal,
            window_size=[window - 1, 0] if window else [-1, -1],
            **keys,
            **self._arguments,
        )
        result: torch.Tensor = found
        return result
