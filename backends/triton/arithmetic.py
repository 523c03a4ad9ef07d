"""What the attention kernels compute with."""

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def multiply(a, b, added, IS_INTERPRETED: tl.constexpr):
    """`a @ b + added`, summed in float32."""
    if IS_INTERPRETED and a.dtype == tl.bfloat16:  # the interpreter would multiply bfloat16's bits
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, added, input_precision="ieee")


@triton.jit
def tanh(x):
    """To float32's last digits: near 0 by its series, where the quotient would cancel."""
    power = tl.exp2(tl.abs(x) * (-2.0 * LOG2_E))
    far = tl.where(x < 0, -1.0, 1.0) * (1.0 - power) / (1.0 + power)
    square = x * x
    series = 62.0 / 2835.0 + square * (-1382.0 / 155925.0)
    series = 1.0 + square * (-1.0 / 3.0 + square * (2.0 / 15.0 + square * (-17.0 / 315.0 + square * series)))
    return tl.where(square < 0.0625, x * series, far)


@triton.jit
def log_factor(position, log_scale):
    """What `AttentionParams.log_scale_len` multiplies queries by; `log_scale` is the inverse of its logarithm."""
    return tl.maximum(tl.log((position + 1).to(tl.float32)) * log_scale, 1.0)


@triton.jit
def weigh(scores, row_scale, largest, total, SEES_KEYS: tl.constexpr, HAS_SOFT_CAP: tl.constexpr):
    """A step of an online softmax, to the base 2.

    Args:
        scores: Of a tile, `[rows, keys]`, -inf where a row does not see a key; not scaled yet, but with a soft cap.
        row_scale: What scores are multiplied by.
        largest: The largest of each row before.
        total: The sum of its weights.
        SEES_KEYS: Whether every row sees a key of the tile.
        HAS_SOFT_CAP: Whether there is a soft cap.

    Returns:
        The tile's weights, what weights and outputs so far are to be multiplied by, and the new `largest` and `total`.

    """
    # Scaled after the sum over dimensions, in the same instruction as the subtraction.
    of_tile = tl.max(scores, 1)
    if not HAS_SOFT_CAP:
        of_tile *= row_scale
    new_largest = tl.maximum(largest, of_tile)
    base = new_largest
    if not SEES_KEYS:  # a row that has seen nothing yet has nothing to subtract
        base = tl.where(new_largest == float("-inf"), 0.0, new_largest)
    if not HAS_SOFT_CAP:
        scores = scores * row_scale[:, None]
    weights = tl.exp2(scores - base[:, None])
    decay = tl.exp2(largest - base)
    return weights, decay, new_largest, total * decay + tl.sum(weights, 1)
