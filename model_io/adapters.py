"""A peft adapter: what it changes in a base, merged while the base's tensors are read.

in: adapter_config.json, adapter_model.safetensors or .bin, and what LLaVA's LoRA training leaves
beside them: config.json, non_lora_trainables.bin
out: sources whose tensors read as peft's merge_and_unload() would leave them
"""

import copy
import math
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from common.files import model_folder, read_json
from model_io.foreign import check_is_plain, check_tensors_are_plain
from model_io.weights import named_folder, open_weights
from qilin_min import (
    PARTS,
    Entry,
    Sources,
    StoredTensor,
    WeightFiles,
    check_all_known,
    check_no_pointer,
    folder_config,
    is_finite,
    named_list,
    our_name,
    part_of,
    weight_sets,
)

ADAPTER_CONFIG = "adapter_config.json"
# peft's own order
ADAPTER_FILES = ("adapter_model.safetensors", "adapter_model.bin")
# what LLaVA's training trained whole beside the adapter: the projector
NON_LORA = "non_lora_trainables.bin"

# of adapter_config.json: what is read here, and what says nothing about a finished adapter
READ_SETTINGS = {
    *("peft_type", "base_model_name_or_path", "r", "lora_alpha", "rank_pattern", "alpha_pattern"),
    *("use_rslora", "use_dora", "lora_bias", "init_lora_weights", "target_modules"),
}
SILENT_SETTINGS = {
    *("auto_mapping", "bias", "ensure_weight_tying", "eva_config", "exclude_modules"),
    # turned off by peft where a layer is a Linear, as all of ours are
    "fan_in_fan_out",
    *("inference_mode", "layers_pattern", "layers_to_transform", "loftq_config", "lora_dropout"),
    *("megatron_core", "modules_to_save", "peft_version", "qalora_group_size", "revision"),
    *("task_type",),
}
# others (PiSSA, OLoRA, LoftQ …) take the start of the adapter out of the base's own weights
INITS_THAT_LEAVE_THE_BASE = (None, True, False, "gaussian", "orthogonal", "eva")

# a tensor that belongs to a low-rank change: its layer, which piece of the change it is
PIECE = re.compile(
    r"^(?P<layer>.+)\.(?P<piece>lora_A|lora_B|lora_magnitude_vector)"
    r"(\.default)?(\.(?P<kind>weight|bias))?$"
)
# peft's name, in old files, for a layer that was trained whole; and for the weight that it saves
# whole beside a change of the vocabulary's layers
WHOLE = re.compile(r"\.(modules_to_save(\.default)?|base_layer)(?=\.)")
# of config.json: what an adapter's says about the place between tower and words, over its base's
BETWEEN = re.compile(r"mm_|vision_feature_|image_aspect_ratio$|projector_hidden_act$")


# --- 1. a change, and tensors that read as changed ------------------------------------------------


def read_floats(entry: Entry, rows: slice) -> Tensor:
    """Rows of an adapter's tensor as float32. ValueError unless they are finite."""
    values = entry.stored[rows].float()
    if not is_finite(values):
        raise ValueError(f"{entry.file}: {entry.name} holds values that are not finite")
    return values


@dataclass
class LowRank:
    """What LoRA adds to one linear layer's weight: scale * B A."""

    A: Entry  # (rank, in)
    B: Entry  # (out, rank)
    scale: float
    # DoRA: the length of each row of the sum (out,)
    magnitude: Entry | None = None
    # lora_bias: scale times it is added to the layer's bias (out,)
    bias: Entry | None = None

    @property
    def rank(self) -> int:
        return self.A.stored.get_shape()[0]

    @property
    def n_params(self) -> int:
        """Numbers that training found."""
        entries = [self.A, self.B, self.magnitude, self.bias]
        shapes = [entry.stored.get_shape() for entry in entries if entry is not None]
        return sum(math.prod(shape) for shape in shapes)


@dataclass
class MergedWeight:
    """A StoredTensor: rows of a linear layer's weight with a low-rank change added, float32.

    Added in float32 and rounded once, when a parameter takes it over: peft's own sum where the base
    is loaded in the dtype of its file.
    Sources: LoRA, arXiv 2106.09685, section 4.1; DoRA, arXiv 2402.09353, equation 5.
    """

    base: StoredTensor  # (out, in)
    change: LowRank

    def get_shape(self) -> list[int]:
        return self.base.get_shape()

    def get_dtype(self) -> str:
        """The base's: what the sum is kept in where nothing else is asked for."""
        return self.base.get_dtype()

    def __getitem__(self, rows: slice) -> Tensor:
        A = read_floats(self.change.A, slice(None))  # (rank, in)
        B = read_floats(self.change.B, rows)  # (rows, rank)
        merged = self.base[rows].float() + (B @ A) * self.change.scale  # (rows, in)
        if self.change.magnitude is None:
            return merged
        magnitude = read_floats(self.change.magnitude, rows)  # (rows,)
        factor = magnitude / torch.linalg.norm(merged, dim=1)
        return factor[:, None] * merged


@dataclass
class MergedBias:
    """A StoredTensor: rows of a linear layer's bias with a low-rank change's own added, float32."""

    base: StoredTensor  # (out,)
    bias: Entry
    scale: float

    def get_shape(self) -> list[int]:
        return self.base.get_shape()

    def get_dtype(self) -> str:
        return self.base.get_dtype()

    def __getitem__(self, rows: slice) -> Tensor:
        return self.base[rows].float() + read_floats(self.bias, rows) * self.scale


# --- 2. an adapter's folder -----------------------------------------------------------------------


@dataclass
class Adapter:
    """A peft adapter, nothing of its tensors read yet."""

    path: Path
    # adapter_config.json
    settings: dict[str, Any]
    # what config.json beside it says about the place between tower and words
    between: dict[str, Any]
    # {weight of the base, named as here: what is added to it}
    changes: dict[str, LowRank]
    # what was trained whole and takes the place of the base's
    whole: WeightFiles

    @property
    def base_name(self) -> str:
        """The base by a path or hub name; "" where it names none."""
        return base_name_in(self.settings)

    @property
    def projector(self) -> WeightFiles:
        """Of what was trained whole, the projector."""
        return only_part(self.whole, "mm_projector")


def only_part(files: WeightFiles, part: str) -> WeightFiles:
    """The tensors of one of PARTS alone."""
    some = copy.copy(files)
    some.tensors = {name: e for name, e in files.tensors.items() if part_of(name) == part}
    return some


def adapter_folder(path: str | Path) -> Path | None:
    """The folder of the peft adapter that a path names, by itself, by its file, or as the --out
    folder of a train.py run; None: what it names is no adapter."""
    folder = model_folder(path)
    if folder.name in ADAPTER_FILES:
        folder = folder.parent
    return folder if (folder / ADAPTER_CONFIG).is_file() else None


def read_adapter_config(path: Path) -> dict[str, Any]:
    """adapter_config.json of a folder. ValueError names the setting that is not implemented."""
    where = path / ADAPTER_CONFIG
    check_no_pointer(where)
    settings = read_json(where)
    check_settings(settings, where)
    return settings


def base_name_in(settings: dict[str, Any]) -> str:
    """The base that an adapter names by a path or hub name; "" where it names none."""
    return str(settings.get("base_model_name_or_path") or "")


def open_adapter(path: Path) -> Adapter:
    """The Adapter in a folder. ValueError or FileNotFoundError names the file, and the tensor or
    setting that is not implemented here."""
    where = path / ADAPTER_CONFIG
    settings = read_adapter_config(path)
    for place in weight_sets(path):
        raise ValueError(
            f"{path} holds an adapter and weights of its own ({place.name}): remove one, or give "
            f"{place} itself"
        )
    files = [path / name for name in ADAPTER_FILES if (path / name).is_file()][:1]
    if not files:
        raise FileNotFoundError(f"no {' or '.join(ADAPTER_FILES)} in {path}, but {ADAPTER_CONFIG}")
    if (path / NON_LORA).is_file():
        files.append(path / NON_LORA)

    pieces: dict[str, dict[str, Entry]] = {}

    def open_whole(file: Path) -> dict[str, StoredTensor]:
        """Those of a file's tensors that are no piece of a low-rank change."""
        whole = {}
        for name, stored in open_weights(file).items():
            found = PIECE.match(name)
            if found:
                piece = ".".join(filter(None, (found["piece"], found["kind"])))
                pieces.setdefault(found["layer"], {})[piece] = Entry(file, name, stored)
            else:
                whole[WHOLE.sub("", name)] = stored
        return whole

    whole = WeightFiles(path, files, open_whole)
    check_all_known(whole)
    check_tensors_are_plain(whole, set(PARTS))
    between = {}
    if (path / "config.json").is_file():
        raw, _ = folder_config(path)
        between = {key: value for key, value in raw.items() if BETWEEN.match(key)}
    return Adapter(path, settings, between, read_changes(pieces, settings, where), whole)


def check_settings(settings: Any, where: Path) -> None:
    """ValueError for an adapter_config.json that asks for what is not implemented here."""
    if not isinstance(settings, dict):
        raise ValueError(f"{where}: not a JSON object")
    kind = settings.get("peft_type")
    if kind != "LORA":
        raise ValueError(f"{where}: peft_type {kind!r} is not implemented here (only 'LORA')")
    for key in settings.keys() - READ_SETTINGS - SILENT_SETTINGS:
        # what peft learns to do later is off where it is not asked for
        if settings[key] not in (None, False, "", [], {}):
            raise ValueError(f"{where}: {key} = {settings[key]!r} is not implemented here")
    init = settings.get("init_lora_weights")
    if init not in INITS_THAT_LEAVE_THE_BASE:
        raise ValueError(
            f"{where}: init_lora_weights = {init!r} is not implemented here: such an adapter "
            "belongs to a base changed by that start; merge it with peft"
        )
    for key in ("rank_pattern", "alpha_pattern"):
        if not isinstance(settings.get(key) or {}, dict):
            raise ValueError(f"{where}: {key} = {settings[key]!r} is no object")


def setting_of(layer: str, settings: dict[str, Any], key: str, where: Path) -> float:
    """r or lora_alpha of a layer: by the first pattern that its name ends with, else for all.

    layer: its name in the base as peft knows it.
    """
    pattern_key = {"r": "rank_pattern", "lora_alpha": "alpha_pattern"}[key]
    value = settings.get(key)
    for pattern, special in (settings.get(pattern_key) or {}).items():
        try:
            is_meant = re.match(rf"(.*\.)?({pattern})$", layer)
        except re.error:
            raise ValueError(f"{where}: {pattern_key} {pattern!r} is no pattern") from None
        if is_meant:
            value = special
            break
    if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
        raise ValueError(f"{where}: {key} = {value!r} is no number above 0")
    return value


def read_changes(
    pieces: dict[str, dict[str, Entry]], settings: dict[str, Any], where: Path
) -> dict[str, LowRank]:
    """{weight of the base: its change} of {layer in the file: its pieces}."""
    changes: dict[str, LowRank] = {}
    for layer, found in pieces.items():
        ours = our_name(f"{layer}.weight")
        if ours is None:
            raise ValueError(f"{where.parent}: this model has no layer {layer}")
        if ours in changes:
            raise ValueError(f"{changes[ours].A.file}: {layer} is also there as {ours}")
        changes[ours] = read_change(layer, found, settings, where)
    return changes


def read_change(
    layer: str, found: dict[str, Entry], settings: dict[str, Any], where: Path
) -> LowRank:
    """One layer's LowRank. ValueError unless its pieces are those that the settings ask for."""
    magnitude = found.pop("lora_magnitude_vector.weight", None)
    if magnitude is not None:
        # an older peft's name
        found["lora_magnitude_vector"] = magnitude
    wanted = {"lora_A.weight", "lora_B.weight"}
    if settings.get("use_dora"):
        wanted.add("lora_magnitude_vector")
    if settings.get("lora_bias"):
        wanted.add("lora_B.bias")
    if found.keys() != wanted:
        # either none is there, or one too many
        names = named_list(f"{layer}.{piece}" for piece in found.keys() ^ wanted)
        raise ValueError(f"{where.parent}: {names}: missing, or not asked for by {ADAPTER_CONFIG}")

    for entry in found.values():
        check_is_plain(entry)
    bare = layer.removeprefix("base_model.model.")
    rank = setting_of(bare, settings, "r", where)
    alpha = setting_of(bare, settings, "lora_alpha", where)
    A = found["lora_A.weight"]
    B = found["lora_B.weight"]
    if len(A.stored.get_shape()) != 2 or len(B.stored.get_shape()) != 2:
        raise ValueError(f"{A.file}: {layer} is no linear layer's")
    if {A.stored.get_shape()[0], B.stored.get_shape()[1]} != {rank}:
        raise ValueError(
            f"{A.file}: {layer} has ranks {A.stored.get_shape()[0]} and "
            f"{B.stored.get_shape()[1]}, {ADAPTER_CONFIG} says {rank}"
        )
    return LowRank(
        A=A,
        B=B,
        scale=alpha / math.sqrt(rank) if settings.get("use_rslora") else alpha / rank,
        magnitude=found.get("lora_magnitude_vector"),
        bias=found.get("lora_B.bias"),
    )


# --- 3. its base ----------------------------------------------------------------------------------


def find_base(path: Path, given: str | Path | None, llm: str | Path | None) -> Path:
    """The folder that the adapter in `path` is merged into: the one given, else the one that it
    names, else the language model that is given. None of its tensors is looked at.

    ValueError says what to give; FileNotFoundError when what is given is not there.
    """
    base_name = base_name_in(read_adapter_config(path))
    place = given
    if place is None:
        place = named_folder(base_name, path) or llm
    if place is None:
        if base_name:
            reason = f"of {base_name!r}, which is neither beside it, here nor in weights/"
        else:
            reason = f"whose {ADAPTER_CONFIG} names no base"
        raise ValueError(f"{path} is an adapter {reason}: give --base DIR, what it was trained on")
    folder = model_folder(place)
    if adapter_folder(folder) is not None:
        raise ValueError(f"{folder} is an adapter itself: merge it first (convert.py {folder} DST)")
    return folder


def base_folder(
    model: str | Path | None, llm: str | Path | None, base: str | Path | None
) -> Path | None:
    """What `model` is merged into; None: it is no adapter. Errors as of find_base."""
    folder = None if model is None else adapter_folder(model)
    return None if folder is None else find_base(folder, base, llm)


def brings_tokenizer(folder: Path) -> bool:
    """Whether an adapter's folder holds the tokenizer that it was trained with."""
    return (folder / "tokenizer.model").is_file()


def language_folder(
    model: str | Path | None, llm: str | Path | None, base: str | Path | None
) -> Path:
    """The folder with the tokenizer: of the language model given, or of the model's, or of an
    adapter's base where the adapter brings none."""
    if llm is not None:
        return Path(llm)
    assert model is not None, "the options name a model, or both parts"
    folder = adapter_folder(model)
    if folder is None:
        return Path(model)
    if brings_tokenizer(folder):
        return folder
    return find_base(folder, base, llm)


def has_own_projector(adapter: Adapter, base: WeightFiles | None) -> bool:
    """Whether an adapter brings a whole projector, not just some tensors of the base's."""
    own = adapter.projector.tensors.keys()
    base_has = set()
    if base is not None:
        base_has = only_part(base, "mm_projector").tensors.keys()
    return bool(own) and not own < base_has


# --- 4. merging -----------------------------------------------------------------------------------


def merge_sources(sources: Sources, adapter: Adapter, is_projector_given: bool) -> Sources:
    """Sources whose tensors read as those of `sources` changed by an adapter.

    is_projector_given: another projector takes the place of the adapter's, which is then skipped
    and counted.
    ValueError names what of the adapter fits none of them.
    """
    whole = dict(adapter.whole.tensors)
    if is_projector_given:
        for name in adapter.projector.tensors:
            del whole[name]
    left = {*adapter.changes, *whole}
    merged: Sources = []
    for files, parts in sources:
        changed = copy.copy(files)
        changed.tensors = dict(files.tensors)
        names = [name for name in files.tensors if part_of(name) in parts]
        for name in names:
            if name in whole:
                changed.tensors[name] = whole[name]
        # after that: a change may bring more to a bias that was trained whole
        for name in names:
            if name in adapter.changes:
                merge_change(changed, name, adapter.changes[name])
        left.difference_update(names)
        merged.append((changed, parts))
    if left:
        where = ", ".join(str(files.path) for files, _ in sources if files.path != adapter.path)
        raise ValueError(
            f"{adapter.path} changes what its base has not ({where}): {named_list(left)}"
        )
    if is_projector_given:
        merged.append((adapter.projector, set()))
    return merged


def merge_change(files: WeightFiles, name: str, change: LowRank) -> None:
    """Let a layer's weight, and its bias where the change has one, read as changed."""
    entry = files.tensors[name]
    n_out = change.B.stored.get_shape()[0]
    n_in = change.A.stored.get_shape()[1]
    if files.shape(name) != (n_out, n_in):
        raise ValueError(
            f"{change.A.file}: {change.A.name} and lora_B are for {(n_out, n_in)}, but {name} is "
            f"{files.shape(name)} in {entry.file}"
        )
    files.tensors[name] = replace(entry, stored=MergedWeight(entry.stored, change))
    if change.bias is None:
        return
    bias_name = name.removesuffix("weight") + "bias"
    if bias_name not in files.tensors:
        raise ValueError(f"{change.bias.file}: {change.bias.name}: {name} has no bias in the base")
    entry = files.tensors[bias_name]
    merged = MergedBias(entry.stored, change.bias, change.scale)
    files.tensors[bias_name] = replace(entry, stored=merged)
