"""PyPI's torchvision beside a CPU build of PyTorch, for the models of images whose code imports it.

It is for CUDA, cannot load its operators there, and stops because two are not known by name. Texts need neither.
"""

import contextlib
import sys

import torch

with contextlib.suppress(ImportError):
    try:
        import torchvision
    except RuntimeError:
        for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
            del sys.modules[name]
        OPERATORS = torch.library.Library("torchvision", "FRAGMENT")
        for name in ("nms", "qnms"):
            OPERATORS.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        import torchvision  # noqa: F401
