"""How numbers are counted and how large they may be, for those who ask before torch is loaded."""

MAX_POSITIONS = 2**27
"""How many positions there are, and so the most that a group size, a window or a length can be: kernels take eight
times one, and add two, in int32."""

EIGHTHS = 8
"""Group sizes are counted in eighths: this many are ordinary attention."""
