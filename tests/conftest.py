"""For all tests: Triton's kernels run in its interpreter, which is asked for before they are defined.

`TRITON_INTERPRET=0` runs those of `tests/gpu` on a GPU.
"""

import os

os.environ.setdefault("TRITON_INTERPRET", "1")
