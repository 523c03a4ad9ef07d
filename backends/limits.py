"""How large numbers may be, for those who ask before torch is loaded."""

MAX_POSITIONS = 2**30
"""How many positions there are, and so the most that a group size, a window or a length can be: kernels add two of them
in int32."""
