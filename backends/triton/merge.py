"""Partial answers of a softmax, joined.

A part is `(output, lse)`: the values' mean, weighted by the exponentials of some keys' scores, and the logarithm of the
sum of those, -inf where there were no keys. Two parts are, together, `2^(lse - lse') output` of each, `lse'` the
logarithm of the sum of `2^lse`; so parts can be joined in any order. An attention sink is a part whose output is 0 and
whose `lse` is the sink. Logarithms are to the base 2; in a prefill's memory natural ones, as FlashAttention gives them.
"""

import triton
import triton.language as tl

from .arithmetic import LOG2_E


@triton.jit
def merge_two(output, lse, other, other_lse):
    """Parts `[rows, dims]` with `lse` `[rows]`; one of the two has seen keys."""
    largest = tl.maximum(lse, other_lse)
    weight, other_weight = tl.exp2(lse - largest), tl.exp2(other_lse - largest)
    total = weight + other_weight
    output = output * (weight / total)[:, None] + other * (other_weight / total)[:, None]
    return output, largest + tl.log2(total)


@triton.jit
def merge_all(output, lse, others, other_lses):
    """A part `[dims]` and several `[parts, dims]`."""
    largest = tl.maximum(lse, tl.max(other_lses, 0))
    base = tl.where(largest == float("-inf"), 0.0, largest)
    weight, other_weights = tl.exp2(lse - base), tl.exp2(other_lses - base)
    total = weight + tl.sum(other_weights, 0)
    output = (output * weight + tl.sum(others * other_weights[:, None], 0)) / tl.where(total == 0.0, 1.0, total)
    return output, base + tl.log2(total)


@triton.jit(
    do_not_specialize=["num_rows", "lse_stride", "other_lse_stride"],
    do_not_specialize_on_alignment=["lse", "other_lse"],
)
def merge_kernel(
    out,
    lse,
    other,
    other_lse,
    num_rows,
    lse_stride,
    other_lse_stride,
    sinks,
    out_token_stride,
    out_head_stride,
    out_dim_stride,
    other_token_stride,
    other_head_stride,
    other_dim_stride,
    HEAD_SIZE: tl.constexpr,
    HEAD_SIZE_PADDED: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Join `other` to `out` in place, or without one `sinks`: a program for each `ROWS` tokens of a query head.

    Arguments up to `other_lse_stride` are the step's, the others the layer's.
    """
    token = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    head = tl.program_id(1).to(tl.int64)
    mask = token < num_rows
    dims = tl.arange(0, HEAD_SIZE_PADDED)[None, :]
    dim_mask = mask[:, None] & (dims < HEAD_SIZE)
    row = token.to(tl.int64)
    to = out + (row * out_token_stride + head * out_head_stride)[:, None] + dims * out_dim_stride
    to_lse = lse + head * lse_stride + token
    output = tl.load(to, mask=dim_mask, other=0.0).to(tl.float32)
    its_lse = tl.load(to_lse, mask=mask, other=0.0) * LOG2_E
    if other is None:
        theirs = tl.zeros([ROWS, HEAD_SIZE_PADDED], tl.float32)
        their_lse = tl.zeros([ROWS], tl.float32) + tl.load(sinks + head).to(tl.float32) * LOG2_E
    else:
        at = other + (row * other_token_stride + head * other_head_stride)[:, None] + dims * other_dim_stride
        theirs = tl.load(at, mask=dim_mask, other=0.0).to(tl.float32)
        their_lse = tl.load(other_lse + head * other_lse_stride + token, mask=mask, other=0.0) * LOG2_E
    output, its_lse = merge_two(output, its_lse, theirs, their_lse)
    tl.store(to, output.to(out.dtype.element_ty), mask=dim_mask)
    tl.store(to_lse, its_lse / LOG2_E, mask=mask)
