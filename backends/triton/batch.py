"""Which request a program's tokens belong to."""

import triton
import triton.language as tl


@triton.jit
def find_request(query_start_loc, index, num_reqs, TOKENS: tl.constexpr, EXTRA: tl.constexpr):
    """The last request `r` with `query_start_loc[r] // TOKENS + EXTRA * r <= index`.

    With `TOKENS = 1, EXTRA = 0` that is the request of token `index`. With `EXTRA = 1` it is the request of the block
    `index` of `TOKENS` queries, where each request has as many blocks as it needs or one more, whatever the lengths: so
    the grid is known without looking at them.
    """
    low = tl.full([], 0, tl.int32)
    high = num_reqs
    while high - low > 1:
        middle = (low + high) // 2
        if tl.load(query_start_loc + middle) // TOKENS + EXTRA * middle <= index:
            low = middle
        else:
            high = middle
    return low
