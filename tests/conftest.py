"""For all tests: Triton's kernels run in its interpreter, which is asked for before they are defined.

`TRITON_INTERPRET=0` runs those of `tests/gpu` on a GPU.
"""

import importlib.util
import os

os.environ.setdefault("TRITON_INTERPRET", "1")
if "PYTEST_XDIST_WORKER" in os.environ:
    # Processes share the cores: their threads must not wait for work by spinning, nor all be bound to the same ones.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")

if importlib.util.find_spec("hypothesis"):  # `tests/gpu` does without
    from hypothesis import HealthCheck, settings

    # How long an example takes depends on the machine, and on what else runs there.
    settings.register_profile("any machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
    settings.load_profile("any machine")
