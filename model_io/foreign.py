"""What lies where weights should be and is none: each refused in one line that says what it is.

in: a file, or the tensors and the config.json of a checkpoint, before anything heavy is done
out: ValueError with the name of the file and what to do
"""

import json
import pickle
import re
import zipfile
from pathlib import Path
from typing import Any

from common.files import one_line
from model_io.int4_files import METHOD, check_layout
from qilin_min import DTYPES, FLOATS, Entry, WeightFiles, check_no_pointer, part_of

# --- 1. files that hold something else ---

N_BEGINNING = 64  # bytes
WEB_PAGE = (
    "is a web page or a server's error: the download was answered by it (a login, a licence to "
    "accept?)"
)
# how the file of another format begins, and what it is; no header of safetensors begins so, whose
# length in 8 bytes is small
BEGINNINGS = (
    (b"GGUF", "is GGUF, llama.cpp's format: take the release in safetensors"),
    (b"<!doc", WEB_PAGE),
    (b"<!DOC", WEB_PAGE),
    (b"<html", WEB_PAGE),
    (b"<?xml", WEB_PAGE),
    (b"<Error", WEB_PAGE),
    (b'{"error', WEB_PAGE),
    (b"\x89HDF", "holds Keras weights: take the release in safetensors"),
    (bytes(N_BEGINNING), "begins with zeros only: the download was interrupted; fetch it again"),
)
META_WEIGHTS = (
    "is in Meta's own format: take the release whose name ends in -hf, or convert it with "
    "transformers' convert_llama_weights_to_hf.py"
)
# names of other formats
FOREIGN_NAMES = (
    (
        "model-rank-*-part-*.safetensors",
        "is vLLM's sharded state, layers fused under its own names: take the folder it was made of",
    ),
    ("consolidated.*.pth", META_WEIGHTS),
    ("*.gguf", "is GGUF, llama.cpp's format: take the release in safetensors"),
    ("*.msgpack", "holds Flax weights: take the release in safetensors"),
    ("*.h5", "holds Keras weights: take the release in safetensors"),
)
# names of weights, where none are found under the names that count
STRAY_NAMES = (
    ("model-*-of-*.safetensors", "is a shard: the index model.safetensors.index.json is missing"),
    ("pytorch_model-*-of-*.bin", "is a shard: the index pytorch_model.bin.index.json is missing"),
    ("adapter_model.*", "is an adapter: it needs the model that it was trained on"),
    ("*.safetensors", "has a name of its own: give this file in place of the folder"),
    ("pytorch_model*.bin", "has a name of its own: give this file in place of the folder"),
)
# where a model lies in a folder of the hub's cache, of a trainer, or of several models
DEEPER = ("snapshots/*/config.json", "checkpoint-*/config.json", "*/config.json")
# what programs add to the name of a file that they have not finished
UNFINISHED = (".incomplete", ".aria2", ".part", ".crdownload")


def check_is_weights(file: Path) -> None:
    """ValueError when the beginning and the size of a file show that it is no whole weights."""
    if file.name.startswith("consolidated.") and file.suffix == ".pth":
        raise ValueError(f"{file} {META_WEIGHTS}")
    check_no_pointer(file)
    with open(file, "rb") as opened:
        start = opened.read(N_BEGINNING)
    if not start:
        raise ValueError(f"{file} is empty: fetch it again")
    for beginning, what in BEGINNINGS:
        if start.startswith(beginning):
            raise ValueError(f"{file} {what}")
    is_text = start.isascii() and b"\0" not in start
    if file.stat().st_size == len(start) and is_text:
        raise ValueError(f"{file} holds only the text {start.decode()!r}: fetch it again")
    # aria2 gives a file its whole size at once
    if file.with_name(file.name + ".aria2").exists():
        raise ValueError(f"{file} is not whole: {file.name}.aria2 says so; let aria2c finish it")
    if file.suffix == ".safetensors":
        check_is_long_enough(file)
    elif start.startswith(b"PK") and not zipfile.is_zipfile(file):
        raise ValueError(f"{file} is cut short (an interrupted download?): fetch it again")


def check_is_long_enough(file: Path) -> None:
    """ValueError when a .safetensors file holds less than its header announces."""
    size = file.stat().st_size
    with open(file, "rb") as opened:
        n_header = int.from_bytes(opened.read(8), "little")
        # the library's own limit: more is no header
        if n_header > 100_000_000:
            return
        header = opened.read(n_header)
    whole = 8 + n_header
    if size > whole:
        whole += _end_of_data(header)
    if size < whole:
        raise ValueError(
            f"{file} is cut short: {size} of {whole} bytes or more (an interrupted download?): "
            "fetch it again"
        )


def _end_of_data(header: bytes) -> int:
    """Where the last tensor ends, by the header of a .safetensors file; 0 for what is none."""
    try:
        entries = json.loads(header).items()
        ends = [entry["data_offsets"][1] for name, entry in entries if name != "__metadata__"]
        return max(ends, default=0)
    # whatever is wrong with it, the library says when it opens the file
    except (ValueError, AttributeError, KeyError, IndexError, TypeError):
        return 0


def reason_of(error: Exception) -> str:
    """Why torch could not read a pickled file, without its advice to run what is inside."""
    text = one_line(error)
    if isinstance(error, pickle.UnpicklingError) or "weights_only" in text:
        found = re.search(r"GLOBAL ([\w.]+)", text)
        what = f" ({found[1]})" if found else ""
        return (
            f"it is damaged, or holds objects beside tensors{what}, which are never loaded: "
            "take the release in safetensors"
        )
    if isinstance(error, EOFError) or "EOF" in text:
        return "it is cut short (an interrupted download?): fetch it again"
    return text[:200]


def interrupted_in(folder: Path) -> str:
    """What tells of an interrupted download in a folder, to stand behind an error; or ""."""
    places = [folder, folder / ".cache" / "huggingface" / "download"]
    for place in places:
        for file in unfinished_in(place):
            return f"; {file.name} is there: a download was interrupted, run it again"
    return ""


def unfinished_in(folder: Path) -> list[Path]:
    """Files beside the weights that some program has not finished."""
    found = []
    for end in UNFINISHED:
        found += sorted(folder.glob("*" + end))
    return found


def first_like(folder: Path, names: tuple[tuple[str, str], ...]) -> str:
    """The first file of a folder that is named like one of `names`, and what it is, to stand behind
    an error; or ""."""
    for pattern, what in names:
        for file in sorted(folder.glob(pattern)):
            if file.is_symlink() and not file.exists():
                return f"; {file.name} is a link to what is not there: fetch it again"
            if file.is_file():
                return f"; {file.name} {what}"
    return ""


def deeper_in(folder: Path) -> str:
    """Where a model lies inside a folder that is none, to stand behind an error; or ""."""
    for pattern in DEEPER:
        for file in sorted(folder.glob(pattern)):
            return f"; a model lies deeper: give {file.parent}"
    return ""


# --- 2. tensors that are no plain floats ---

# names of tensors that stand beside packed ones
PACKED_NAMES = (
    (re.compile(r"\.(qweight|qzeros|g_idx)$"), "GPTQ or AWQ"),
    (
        re.compile(r"\.(absmax|quant_map|nested_absmax|nested_quant_map|SCB|weight_format)$"),
        "bitsandbytes",
    ),
    (re.compile(r"\.quant_state\."), "bitsandbytes"),
    (re.compile(r"\.(weight_scale|weight_scale_inv|input_scale|activation_scale)$"), "FP8 or INT8"),
    (re.compile(r"\.(weight_packed|weight_zero_point|weight_shape)$"), "compressed-tensors"),
)
UNPACKED = (
    "take the release in float16, bfloat16 or float32 (--quantize packs it when it is loaded)"
)


def check_is_unpacked(raw: dict[str, Any], where: Path | None) -> None:
    """ValueError when a config.json says that the weights beside it are quantised."""
    inner = raw.get("text_config")
    halves = [raw, inner] if isinstance(inner, dict) else [raw]
    for half in halves:
        for key in ("quantization_config", "compression_config"):
            said = half.get(key)
            method = said.get("quant_method") if isinstance(said, dict) else said
            if isinstance(said, dict) and method == METHOD:
                check_layout(said, where)
                continue
            # bitsandbytes packs plain weights as they are loaded, and the word stays in config.json
            # of what was merged since: the tensors tell
            if said and method != "bitsandbytes":
                raise ValueError(
                    f"{where}: {key} says that the weights are packed by {method}: {UNPACKED}"
                )


def check_tensors_are_plain(files: WeightFiles, parts: set[str]) -> None:
    """ValueError that names a tensor of `parts` that is packed, a placeholder, or no floats."""
    for name in files.unknown:
        _check_name(files.path, name)
    taken = {name: e for name, e in files.tensors.items() if part_of(name) in parts}
    # names first: they tell by what it is packed
    for entry in taken.values():
        _check_name(entry.file, entry.name)
    for entry in taken.values():
        check_is_plain(entry)


def check_is_plain(entry: Entry) -> None:
    """ValueError when a tensor is a placeholder, or no floats."""
    if 0 in entry.stored.get_shape():
        raise ValueError(
            f"{entry.file}: {entry.name} holds no numbers: a placeholder that DeepSpeed ZeRO-3 "
            "leaves; gather the checkpoint with its zero_to_fp32.py"
        )
    dtype = entry.stored.get_dtype()
    dtype = DTYPES.get(dtype, dtype)
    if dtype not in FLOATS:
        raise ValueError(f"{entry.file}: {entry.name} holds {dtype}, no plain floats: {UNPACKED}")


def _check_name(file: Path, name: str) -> None:
    for pattern, what in PACKED_NAMES:
        if pattern.search(name):
            raise ValueError(f"{file}: {name} belongs to weights packed by {what}: {UNPACKED}")
