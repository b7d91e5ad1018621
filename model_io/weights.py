"""Weights as the world keeps them, beside what qilin_min reads: pickled files, a projector alone.

in: a folder or file of any layout; out: WeightFiles, and a model with what no file holds made fresh
"""

import math
import zipfile
from collections.abc import Iterable
from pathlib import Path

import torch
import torch.nn as nn
from torch import Tensor

from common.files import one_line
from qilin_min import (
    Qilin,
    Sources,
    StoredTensor,
    WeightFiles,
    fill_weights,
    local_part,
    local_rows,
    open_safetensors,
    shards_of,
)

# what a folder is asked for, the first that is there
INDEXES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
SINGLE_FILES = (
    "model.safetensors",
    "pytorch_model.bin",
    "projector.safetensors",
    "mm_projector.bin",
)


class PickledTensor:
    """A tensor of a .bin file with the three methods of a safetensors slice."""

    def __init__(self, tensor: Tensor):
        self.tensor = tensor

    def get_shape(self) -> list[int]:
        return list(self.tensor.shape)

    def get_dtype(self) -> str:
        return str(self.tensor.dtype).removeprefix("torch.")

    def __getitem__(self, rows: slice) -> Tensor:
        return self.tensor[rows]


def open_weights(file: Path) -> dict[str, StoredTensor]:
    """{name: tensor or slice of one} of a .safetensors file, or of a .bin without pickled code.

    Nothing is read before it is asked for.
    """
    if file.suffix == ".safetensors":
        return open_safetensors(file)
    try:
        return open_pickled(file)
    # the reader raises many kinds for a damaged file, and each means this
    except Exception as error:
        reason = one_line(error)[:200]
        raise ValueError(f"{file}: cannot be read as weights ({reason})") from None


def open_pickled(file: Path) -> dict[str, StoredTensor]:
    """{name: tensor} of a .bin; ValueError, or whatever torch raises, when it is anything else."""
    # weights_only: no code runs; mmap, which the oldest format cannot: pages come as they are read
    content = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    if not isinstance(content, dict):
        raise ValueError("not a dict from names to tensors")
    tensors: dict[str, StoredTensor] = {}
    for name, tensor in content.items():
        is_dense = isinstance(tensor, Tensor) and tensor.layout == torch.strided
        if not isinstance(name, str) or not is_dense:
            raise ValueError("not a dict from names to tensors")
        tensors[name] = PickledTensor(tensor)
    return tensors


def find_weights(path: Path) -> list[Path]:
    """The files that hold the tensors of a folder (one, or shards with an index), or the file."""
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise FileNotFoundError(f"no such folder or file: {path}")
    for name in INDEXES:
        if (path / name).is_file():
            return shards_of(path / name)
    for name in SINGLE_FILES:
        if (path / name).is_file():
            return [path / name]
    raise FileNotFoundError(
        f"no weights in {path}: neither model.safetensors nor pytorch_model.bin, nor an index of "
        "shards"
    )


def weight_files(path: str | Path) -> WeightFiles:
    """The tensors of a folder or file of any layout, by our names."""
    path = Path(path)
    return WeightFiles(path, find_weights(path), open_weights)


@torch.no_grad()
def init_uniform(params: Iterable[Tensor], fan_in: int, generator: torch.Generator) -> None:
    """torch's own init of nn.Linear, uniform within 1 / sqrt(fan_in), from a generator.

    The same on every rank, sharded or not.
    """
    for param in params:
        start, stop = local_rows(param)
        full = torch.empty(param.shape).uniform_(-1, 1, generator=generator) / math.sqrt(fan_in)
        local_part(param).copy_(full[start:stop])


@torch.no_grad()
def init_fresh(model: Qilin, seed: int = 0, projector: bool = True) -> None:
    """What no file holds, from a seed: the projector where asked for, and LoRA's A.

    LoRA's B is zero, so that adapters start as no change (as peft's).
    """
    generator = torch.Generator().manual_seed(seed)
    if projector:
        for layer in model.mm_projector.modules():
            if isinstance(layer, nn.Linear):
                init_uniform(layer.parameters(), layer.in_features, generator)
            elif isinstance(layer, nn.LayerNorm):
                layer.reset_parameters()  # ones and zeros: nothing is drawn
            elif list(layer.parameters(recurse=False)):
                kind = type(layer).__name__
                raise ValueError(f"how a fresh {kind} of a projector starts is not implemented")
    for layer in model.model.modules():
        if hasattr(layer, "lora_A"):
            lora_A = layer.get_parameter("lora_A")
            init_uniform([lora_A], lora_A.shape[1], generator)
            nn.init.zeros_(layer.get_parameter("lora_B"))


def load_weights(
    model: Qilin,
    sources: Sources,
    device: str | torch.device,
    fresh: bool = False,
    seed: int = 0,
) -> str:
    """fill_weights, and what no file holds made by init_fresh with `seed`: a projector, adapters.

    -> the line that accounts for all tensors. fresh: the projector is in no file.
    """
    line = fill_weights(model, sources, device, fresh)
    init_fresh(model, seed, projector=fresh)
    return line
