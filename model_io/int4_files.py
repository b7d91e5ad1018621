"""A model in 4 bits on disk: the numbers, scales and zeros of lowbit's layers beside plain tensors.

For a linear layer X with a weight (out, in), in safetensors:

    X.weight        uint8 (out, in / 2)             two numbers of 0 to 15 a byte, the even input's
                                                    in the lower half
    X.weight_scale  bfloat16 (out, in / group_size)
    X.weight_zero   bfloat16 (out, in / group_size)

A weight is (number - 8) * scale + zero. config.json says so in its quantization_config, with the
version of this layout, so that a later one can be told from it. How a CPU's or a GPU's kernel wants
numbers to lie is made from these when the model runs, and is never on disk.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from model_io.lowbit import INT4_GROUP, QuantizedLinear
from model_io.lowbit_kernels import unpack_int4
from qilin_min import DTYPES, Entry, Sources, StoredTensor, WeightFiles

# quant_method in config.json
METHOD = "qilin-min"
LAYOUT = 1


def quantization_config() -> dict[str, Any]:
    """What config.json says of a folder in 4 bits."""
    return {"quant_method": METHOD, "bits": 4, "group_size": INT4_GROUP, "layout": LAYOUT}


def check_layout(said: dict[str, Any], where: Path | None) -> None:
    """ValueError where config.json names another layout than this one."""
    for key, value in quantization_config().items():
        if said.get(key) != value:
            raise ValueError(
                f"{where}: quantization_config says {key} = {said.get(key)!r}, and only {value!r} "
                "is read here: a newer qilin-min may read it, or make the folder anew with "
                "convert.py SRC DST --quantize int4"
            )


# --- 1. reading -----------------------------------------------------------------------------------


class StoredInt4:
    """A weight in 4 bits, its three tensors as one with the methods of a safetensors slice.

    Its rows are floats, for whoever knows of no bits; QuantizedLinear takes over the three.
    """

    def __init__(self, weight: StoredTensor, scale: StoredTensor, zero: StoredTensor):
        self.weight = weight
        self.scale = scale
        self.zero = zero

    def get_shape(self) -> list[int]:
        n_out, n_bytes = self.weight.get_shape()
        return [n_out, 2 * n_bytes]

    def get_dtype(self) -> str:
        return "F32"

    def packed(self) -> tuple[Tensor, Tensor, Tensor]:
        """int8 bytes as QuantizedLinear holds them, scale, zero."""
        # of four bits, flipping the first takes the 8 away
        return (self.weight[:] ^ 0x88).view(torch.int8), self.scale[:], self.zero[:]

    def __getitem__(self, rows: slice) -> Tensor:
        numbers = unpack_int4((self.weight[rows] ^ 0x88).view(torch.int8)).float()  # (n, in)
        scale = self.scale[rows].float()[..., None]  # (n, in / group, 1)
        zero = self.zero[rows].float()[..., None]
        return (numbers.unflatten(1, (-1, INT4_GROUP)) * scale + zero).flatten(1)


def stored_shape(entry: Entry) -> list[int]:
    return list(entry.stored.get_shape())


def join_int4(files: WeightFiles) -> None:
    """Make one tensor, a StoredInt4, of each weight in 4 bits and what belongs to it.

    ValueError where one of the three is missing or does not fit the others.
    """
    for name, entry in list(files.tensors.items()):
        scale_name = f"{name}_scale"
        zero_name = f"{name}_zero"
        dtype = entry.stored.get_dtype()
        is_bytes = DTYPES.get(dtype, dtype) == "uint8"
        # other formats have scales too, but no zeros under this name
        is_ours = is_bytes and (scale_name in files.tensors or zero_name in files.tensors)
        if not is_ours:
            continue
        for part in (scale_name, zero_name):
            if part not in files.tensors:
                raise ValueError(f"{entry.file}: {entry.name} is in 4 bits, but there is no {part}")
        scale = files.tensors[scale_name]
        zero = files.tensors[zero_name]
        shape = stored_shape(entry)
        wanted = [shape[0], 2 * shape[-1] // INT4_GROUP]
        for part in (scale, zero):
            found = stored_shape(part)
            if len(shape) != 2 or found != wanted:
                raise ValueError(
                    f"{part.file}: {part.name} has shape {found}, which does not go with "
                    f"{entry.name} of {shape}: {wanted} is needed"
                )
        entry.stored = StoredInt4(entry.stored, scale.stored, zero.stored)
        del files.tensors[scale_name]
        del files.tensors[zero_name]


def holds_int4(sources: Sources) -> bool:
    """Whether weights of a checkpoint are in 4 bits."""
    for files, _ in sources:
        if any(isinstance(entry.stored, StoredInt4) for entry in files.tensors.values()):
            return True
    return False


# --- 2. writing -----------------------------------------------------------------------------------


def is_in_int4(module: Any) -> bool:
    """Whether a layer goes to disk in 4 bits."""
    return (
        isinstance(module, QuantizedLinear) and module.bits == 4 and not hasattr(module, "lora_A")
    )


def int4_tensors(key: str, layer: QuantizedLinear) -> dict[str, Tensor]:
    """{name in the file: tensor} of a layer whose weight is called `key` there."""
    data = layer.int4_bytes().view(torch.uint8) ^ 0x88
    tensors = {key: data, f"{key}_scale": layer.scale, f"{key}_zero": layer.zero}
    return {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
