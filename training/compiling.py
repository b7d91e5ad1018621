"""Decoder blocks under torch.compile: whether, and for what lengths."""

import importlib.util
import os
import shutil
import sysconfig
from pathlib import Path
from typing import Any

import torch
import torch._dynamo as dynamo
import torch.nn as nn

# entries that one block may make: with and without recomputation, with and without gradients, one
# row or more, each frozen or trained; at torch's own limit of 8 it would run eagerly from then on
MOST_ENTRIES = 64


def missing_for_cuda() -> str | None:
    """What torch.compile wants on CUDA and this machine lacks; None: nothing."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    compilers = (os.environ.get("CC"), "gcc", "clang")
    if not any(name and shutil.which(name) for name in compilers):
        return "there is no C compiler (gcc or clang, or CC)"
    if not (Path(sysconfig.get_paths()["include"]) / "Python.h").is_file():
        return "Python.h is not there (python3-dev)"
    return None


def choose_compiling(
    asked: bool | None, device: torch.device, is_quantized: bool
) -> tuple[bool, str | None]:
    """(whether blocks are compiled, a line where the default is kept from it).

    asked: --compile or --no-compile, None: on CUDA where it can be.
    """
    if asked is not None:
        return asked, None
    if device.type != "cuda":
        return False, None
    if is_quantized:
        return False, "blocks are not compiled: a quantised product is a call of its own"
    missing = missing_for_cuda()
    if missing is not None:
        return False, f"blocks are not compiled, which costs some 5 % of speed: {missing}"
    return True, None


@torch.compiler.disable
def mark_lengths(block: nn.Module, inputs: tuple[Any, ...]) -> None:
    """A forward pre-hook: rows and tokens differ from batch to batch, so that what is compiled
    first is for any number of them, and nothing else is."""
    x, (cos, sin) = inputs[:2]  # (B, T, C), (1, 1, T, D)
    for tensor, dimension in ((x, 0), (x, 1), (cos, 2), (sin, 2)):
        dynamo.maybe_mark_dynamic(tensor, dimension)


def compile_block(block: nn.Module) -> None:
    """Compile a decoder block in place, so that its names stay."""
    dynamo.config.recompile_limit = MOST_ENTRIES
    hook: Any = mark_lengths
    block.register_forward_pre_hook(hook)
    block.compile()
