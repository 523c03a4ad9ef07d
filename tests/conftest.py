"""For all tests: Triton's kernels run in its interpreter, which is asked for before they are defined."""

import os

os.environ["TRITON_INTERPRET"] = "1"
