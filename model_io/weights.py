"""Weights as the world keeps them, beside what qilin_min reads: pickled files, a projector alone.

in: a folder or file of any layout; out: WeightFiles, and a model with what no file holds made fresh
"""

import math
import warnings
import zipfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn as nn
from torch import Tensor

from common.files import model_folder, say_once
from model_io.foreign import (
    FOREIGN_NAMES,
    STRAY_NAMES,
    check_is_weights,
    deeper_in,
    first_like,
    interrupted_in,
    reason_of,
    unfinished_in,
)
from model_io.int4_files import join_int4
from qilin_min import (
    Qilin,
    Sources,
    StoredTensor,
    WeightFiles,
    check_no_pointer,
    files_of_set,
    fill_weights,
    local_part,
    local_rows,
    open_safetensors,
    shards_of,
    weight_sets,
)

# --- 1. files -> tensors ---


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
    check_is_weights(file)
    if file.suffix == ".safetensors":
        return open_safetensors(file)
    try:
        return open_pickled(file)
    # the reader raises many kinds for a damaged file, and each means this
    except Exception as error:
        raise ValueError(f"{file}: cannot be read as weights: {reason_of(error)}") from None


def open_pickled(file: Path) -> dict[str, StoredTensor]:
    """{name: tensor} of a .bin; ValueError, or whatever torch raises, when it is anything else."""
    # torch wonders aloud at a damaged file before it raises
    with warnings.catch_warnings(action="ignore"):
        # weights_only: no code runs; mmap, which the oldest format cannot: pages come as they are
        # read
        content = torch.load(
            file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file)
        )
    if not isinstance(content, dict):
        raise ValueError("not a dict from names to tensors")
    tensors: dict[str, StoredTensor] = {}
    for name, tensor in content.items():
        is_dense = isinstance(tensor, Tensor) and tensor.layout == torch.strided
        if not isinstance(name, str) or not is_dense:
            raise ValueError("not a dict from names to tensors")
        tensors[name] = PickledTensor(tensor)
    return tensors


# --- 2. a folder -> the files that count ---

# a projector alone, as train.py and the released code leave it
PROJECTOR_FILES = ("projector.safetensors", "mm_projector.bin")
# what may lie beside the files that count and look like weights of the same model
ALIKE = ("model*.safetensors", "pytorch_model*.bin", "consolidated.*.pth", "adapter_model.*")


@dataclass
class FoundWeights:
    """Which files of a folder hold the model."""

    # the file, or the index of shards, that was chosen
    place: Path
    files: list[Path]
    # names of what looks like weights of the model as well and is not read, with what is to be said
    aside: list[str]

    @property
    def line(self) -> str:
        """What was left aside, and how to choose; "" where nothing was."""
        if not self.aside:
            return ""
        return (
            f"{self.place} is read; left aside: {', '.join(self.aside)}; to read another, "
            "give the file itself in place of the folder"
        )


def is_fetched(file: Path) -> bool:
    """Whether a file is there, and more than a pointer to it."""
    if not file.is_file():
        return False
    try:
        check_no_pointer(file)
    except ValueError:
        return False
    return True


def choose_set(folder: Path) -> tuple[Path | None, list[Path]]:
    """(The set of weights that counts, those before it of which no file is there).

    A whole one, the first in transformers' order. FileNotFoundError for a set that comes first and
    is there in part: somebody wanted it, and the next may be older.
    """
    absent = []
    for place in weight_sets(folder):
        files = files_of_set(place)
        missing = [file.name for file in files if not is_fetched(file)]
        if not missing:
            return place, absent
        if len(missing) < len(files):
            raise missing_files(place, missing, len(files))
        absent.append(place)
    return None, absent


def missing_files(place: Path, missing: list[str], n_files: int) -> FileNotFoundError:
    """The error of a set of n_files files of which those named `missing` are not there."""
    return FileNotFoundError(
        f"{place} names {missing[0]}, which is not there ({len(missing)} of {n_files} files are "
        f"missing){interrupted_in(place.parent)}{other_sets(place.parent, place)}"
    )


def other_sets(folder: Path, place: Path) -> str:
    """How to read another set of a folder than `place`, to stand behind an error; or ""."""
    others = [other for other in weight_sets(folder) if other != place]
    return f"; to read {others[0].name} instead, give {others[0]}" if others else ""


def newest(files: Iterable[Path]) -> float:
    """When the last of some files was changed, in seconds."""
    return max((file.stat().st_mtime for file in files if file.is_file()), default=0.0)


def describe_aside(place: Path, than: list[Path]) -> str:
    """The name of a file or index that is not read; whether it is newer than the files `than`."""
    try:
        files = files_of_set(place)
    except ValueError:
        return f"{place.name} (damaged)"
    fetched = [file for file in files if is_fetched(file)]
    if len(fetched) < len(files):
        return f"{place.name} ({len(files) - len(fetched)} of its {len(files)} files are not there)"
    if newest(files) > newest(than):
        return f"{place.name} (newer)"
    return place.name


def left_aside(folder: Path, chosen: Path, files: list[Path]) -> list[str]:
    """What beside the chosen set looks like weights of the model, each with what is to be said."""
    places = [place for place in weight_sets(folder) if place != chosen]
    named = {*files, chosen, *places}
    for place in places:
        try:
            named.update(files_of_set(place))
        except ValueError:
            continue
    for pattern in ALIKE:
        places += [file for file in sorted(folder.glob(pattern)) if file not in named]
    said = [describe_aside(place, than=files) for place in places]
    for file in unfinished_in(folder):
        said.append(f"{file.name} (not finished)")
    return said


def find_weights(path: Path) -> FoundWeights:
    """The files that hold the tensors of a folder (one, or shards with an index).

    path: a folder; or, to choose, a file or an index of shards, which then counts alone.
    FileNotFoundError says what lies there instead.
    """
    if path.is_file():
        return FoundWeights(path, shards_of(path), [])
    if not path.is_dir():
        raise FileNotFoundError(f"no such folder or file: {path}")
    chosen, absent = choose_set(path)
    if chosen is not None:
        files = files_of_set(chosen)
        return FoundWeights(chosen, files, left_aside(path, chosen, files))
    for name in PROJECTOR_FILES:
        if (path / name).is_file():
            return FoundWeights(path / name, [path / name], [])
    if absent:
        files = files_of_set(absent[0])
        if files[0].is_file():
            # the other thing that is_fetched asks
            check_no_pointer(files[0])
        raise missing_files(absent[0], [file.name for file in files], len(files))
    raise FileNotFoundError(
        f"no weights in {path}: neither model.safetensors nor pytorch_model.bin, nor an index of "
        f"shards{first_like(path, FOREIGN_NAMES + STRAY_NAMES)}{interrupted_in(path)}"
        f"{deeper_in(path)}"
    )


def named_folder(name: str, *near: Path) -> Path | None:
    """The folder of a model that another one's files name by a path or hub name; None: nowhere.

    Looked for beside each of `near`, which are folders, from here, or in weights/.
    """
    last = Path(name).name
    if not last:
        return None
    places = []
    for folder in near:
        places += [folder / name, folder / last, folder.parent / last]
    places += [Path(name), Path("weights") / last]
    for place in map(model_folder, places):
        is_itself = any(place.resolve() == folder.resolve() for folder in near)
        if (place / "config.json").is_file() and not is_itself:
            return place
    return None


def open_found(path: Path, found: FoundWeights) -> WeightFiles:
    """The tensors of found files, three in 4 bits as one. path: what was named, for messages."""
    files = WeightFiles(path, found.files, open_weights)
    join_int4(files)
    return files


def weight_files(path: str | Path) -> WeightFiles:
    """The tensors of a folder or file of any layout, by our names; stderr tells what of a folder
    was left aside."""
    path = Path(path)
    found = find_weights(path)
    files = open_found(path, found)
    # only now: what cannot be opened is told in one line
    if found.line:
        say_once(found.line)
    return files


# --- 3. what no file holds ---


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
