"""What an export wrote, read again: nothing takes its final name that was not looked at.

in: a folder that was just written, and what should lie in it
out: nothing, or an OSError (exit code 1) that says what is wrong
"""

import errno
import json
import zlib
from collections.abc import Collection
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import torch
from safetensors import SafetensorError, safe_open
from tqdm import tqdm

from common.files import check_replaceable, holds_only, one_line, read_json
from model_io.load import attach_tokenizer, read_checkpoint
from model_io.tokens import Tokenizer
from qilin_min import Qilin, QilinConfig, account, named_list

# all that an export or an adapter's folder holds, and what an interrupted one leaves behind
EXPORTED = (
    *("config.json", "generation_config.json", "README.md"),
    *("preprocessor_config.json", "processor_config.json", "chat_template.jinja"),
    *("tokenizer.model", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"),
    *("model.safetensors", "model-*-of-*.safetensors", "model.safetensors.index.json"),
    *("adapter_model.safetensors", "adapter_config.json"),
)
# .tmp*: safetensors gives a file its name when it is whole
UNFINISHED_EXPORT = (*EXPORTED, "shard-*", "*.partial", ".tmp*")


def check_place(path: str | Path) -> None:
    """ValueError unless an export may take this name: what lies there, or beside it under the names
    that it needs meanwhile, is nothing, empty, or an earlier export."""
    path = Path(path)
    # what tells an export from the folder of a language model
    mark = "preprocessor_config.json"
    if (path / "adapter_config.json").is_file():
        mark = "adapter_config.json"
    check_replaceable(path, mark, EXPORTED)
    check_way(path, UNFINISHED_EXPORT)


def check_way(path: Path, known: Collection[str]) -> None:
    """ValueError unless the names beside `path` by way of which a folder is made and replaced are
    free, or hold what an interrupted run of ours left. known: patterns of all that this may be."""
    for end in (".partial", ".old"):
        beside = path.with_name(path.name + end)
        if not beside.exists():
            continue
        if not beside.is_dir() or not holds_only(beside, known):
            raise ValueError(
                f"{beside} is there and holds something else, and {path} is made by way of it: "
                "give another name, or remove it"
            )


@dataclass(frozen=True)
class Fingerprint:
    """What a tensor is, without its numbers."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    checksum: int  # crc32 of all its bytes


def fingerprint(tensor: torch.Tensor) -> Fingerprint:
    """Of a tensor in memory; about a second for every 4 GB."""
    content = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
    return Fingerprint(tuple(tensor.shape), tensor.dtype, zlib.crc32(content.numpy().data))


def _refuse(file: Path, what: str) -> NoReturn:
    message = f"what was written is not what was meant ({what}), so nothing is kept of it"
    raise OSError(errno.EIO, message, str(file))


def _what_differs(found: Fingerprint, expected: Fingerprint) -> str | None:
    if found.shape != expected.shape:
        return f"shape {found.shape} instead of {expected.shape}"
    if found.dtype != expected.dtype:
        return f"{found.dtype} instead of {expected.dtype}"
    if found.checksum != expected.checksum:
        return "other numbers"
    return None


def check_file(file: Path, expected: dict[str, Fingerprint]) -> None:
    """OSError unless a .safetensors file holds these tensors, every byte of them, and no others."""
    try:
        with safe_open(file, framework="pt") as stored:
            names = set(stored.keys())
            if names - expected.keys():
                _refuse(file, f"{named_list(names - expected.keys())} should not be there")
            if expected.keys() - names:
                _refuse(file, f"{named_list(expected.keys() - names)} not there")
            for name in tqdm(sorted(names), "reading again", unit="tensor", disable=None):
                difference = _what_differs(fingerprint(stored.get_tensor(name)), expected[name])
                if difference:
                    _refuse(file, f"{name}: {difference}")
    except SafetensorError as error:
        _refuse(file, one_line(error))


def check_shards(folder: Path, expected: dict[str, dict[str, Fingerprint]]) -> None:
    """OSError unless the .safetensors files of a folder are these, each with its tensors, and the
    index, where there are several, says which file holds what.

    expected: {file name: {tensor: Fingerprint}}
    """
    found = {file.name for file in folder.glob("*.safetensors")}
    if found != expected.keys():
        _refuse(folder, f"files {named_list(found)} instead of {named_list(expected)}")
    for name, tensors in expected.items():
        check_file(folder / name, tensors)
    index = folder / "model.safetensors.index.json"
    if len(expected) > 1:
        weight_map = {}
        for name, tensors in expected.items():
            weight_map.update(dict.fromkeys(tensors, name))
        if read_json(index)["weight_map"] != weight_map:
            _refuse(index, "it names other files")
    elif index.exists():
        _refuse(index, "there is one file")


def check_json(folder: Path, files: dict[str, dict]) -> None:
    """OSError unless these JSON files of a folder say this."""
    for name, content in files.items():
        # through JSON once: a tuple comes back as a list
        if read_json(folder / name) != json.loads(json.dumps(content)):
            _refuse(folder / name, "other content")


def check_bytes(folder: Path, files: dict[str, bytes]) -> None:
    """OSError unless these files of a folder hold this."""
    for name, content in files.items():
        if (folder / name).read_bytes() != content:
            _refuse(folder / name, "other content")


def _unordered(config: QilinConfig) -> QilinConfig:
    """A copy whose ids that end an answer stand in order, since any of them does."""
    config = deepcopy(config)
    config.text.more_end_ids = tuple(sorted(config.text.more_end_ids))
    return config


def _are_equal(one: Tokenizer, other: Tokenizer) -> bool:
    return one.sp.serialized_model_proto() == other.sp.serialized_model_proto()


def check_loads(
    folder: Path, config: QilinConfig, n_rows: int, tokenizer: Tokenizer | None
) -> None:
    """OSError unless load_qilin would make of a folder the model that was exported: its config,
    with n_rows rows of words, a place for every tensor, and the tokenizer's pieces."""
    meant = deepcopy(config)
    meant.text.vocab_size = n_rows
    if tokenizer:
        attach_tokenizer(meant, tokenizer)
    try:
        checkpoint = read_checkpoint(folder)
        with torch.device("meta"):
            model = Qilin(checkpoint.config)
        account(model, checkpoint.sources)
        again = Tokenizer(folder) if tokenizer else None
    except (ValueError, FileNotFoundError) as error:
        _refuse(folder, one_line(error))
    if _unordered(checkpoint.config) != _unordered(meant):
        _refuse(folder / "config.json", "it is read as another configuration")
    if tokenizer and again and not _are_equal(again, tokenizer):
        _refuse(again.path, "another tokenizer")
