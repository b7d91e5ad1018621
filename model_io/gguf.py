"""A model -> two GGUF files that llama.cpp, ollama and what is built on them run.

    DST/NAME-q8_0.gguf           the language model, its vocabulary and chat template
    DST/mmproj-NAME-f16.gguf     vision tower and projector
    DST/Modelfile                what `ollama create` reads

Needs the package gguf (requirements-extra.txt), which quantises with numpy. The language model is
written a tensor at a time; the picture half, 0.7 GB of a 13B model, is held.
"""

import errno
import filecmp
import glob
import math
import os
import shutil
import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from common.files import check_replaceable, folder_beside, write_text
from model_io.gguf_tower import Widened, check_gguf_projector, mmproj_tensors, widen
from model_io.gguf_vocabulary import (
    add_vocabulary,
    check_vocabulary,
    modelfile,
    other_ends,
)
from model_io.pixels import CLIP_MEAN, CLIP_STD
from model_io.tokens import Tokenizer
from model_io.written import check_way
from qilin_min import EMBED, HEAD, Qilin, QilinConfig, TextConfig, is_finite, named_list


@dataclass(frozen=True)
class GgufKind:
    """A row of GGUF_KINDS: names of types as the package gguf spells them."""

    matrices: str
    # embeddings and head suffer most where bits are few
    embeddings: str
    # the whole file's (gguf.LlamaFileType)
    file_type: str


GGUF_KINDS = {
    "f32": GgufKind("F32", "F32", "ALL_F32"),
    "f16": GgufKind("F16", "F16", "MOSTLY_F16"),
    "bf16": GgufKind("BF16", "BF16", "MOSTLY_BF16"),
    "q8_0": GgufKind("Q8_0", "Q8_0", "MOSTLY_Q8_0"),
    "q4_0": GgufKind("Q4_0", "Q8_0", "MOSTLY_Q4_0"),
}
# the file by which a folder is known as one of ours
MODELFILE = "Modelfile"


def import_gguf() -> ModuleType:
    """The package gguf; ValueError says how to install it."""
    try:
        import gguf
    except ImportError:
        raise ValueError(
            "GGUF files are written with the package gguf: pip install gguf==0.19.0"
        ) from None
    return gguf


# --- 1. tensors -----------------------------------------------------------------------------------


@dataclass
class Planned:
    """A tensor of a GGUF file, made when its turn comes."""

    name: str
    shape: tuple[int, ...]
    # one of GGMLQuantizationType
    kind: str
    make: Callable[[], Tensor]


# ours -> llama.cpp's, of a decoder layer
LAYER_NAMES = {
    "input_layernorm.weight": "attn_norm.weight",
    "self_attn.q_proj.weight": "attn_q.weight",
    "self_attn.k_proj.weight": "attn_k.weight",
    "self_attn.v_proj.weight": "attn_v.weight",
    "self_attn.o_proj.weight": "attn_output.weight",
    "post_attention_layernorm.weight": "ffn_norm.weight",
    "mlp.gate_proj.weight": "ffn_gate.weight",
    "mlp.up_proj.weight": "ffn_up.weight",
    "mlp.down_proj.weight": "ffn_down.weight",
}
OUTER_NAMES = {
    EMBED: "token_embd.weight",
    HEAD: "output.weight",
    "model.norm.weight": "output_norm.weight",
}


def gguf_name(name: str) -> str:
    """llama.cpp's name of one of the language model's parameters."""
    if name in OUTER_NAMES:
        return OUTER_NAMES[name]
    _, _, layer, rest = name.split(".", 3)
    return f"blk.{layer}.{LAYER_NAMES[rest]}"


def neighbours_in_pairs(weight: Tensor, n_heads: int) -> Tensor:
    """Rows of q or k (H D, C) for a RoPE that turns elements 2i and 2i + 1 as ours turns i and
    i + D/2."""
    halves = weight.view(n_heads, 2, -1, weight.shape[1])  # (H, 2, D/2, C)
    return halves.transpose(1, 2).reshape(weight.shape)  # (H D, C)


def text_tensor(model: Qilin, name: str) -> Tensor:
    """float32: a parameter of the language model as llama.cpp wants it.

    Rows past the tokenizer's, which are never said, are left out.
    """
    config = model.config
    weight = model.get_parameter(name).detach().float()
    if name in (EMBED, HEAD):
        return weight[: config.n_token_ids]
    if name.endswith("q_proj.weight"):
        return neighbours_in_pairs(weight, config.text.num_attention_heads)
    if name.endswith("k_proj.weight"):
        return neighbours_in_pairs(weight, config.text.num_key_value_heads)
    return weight


def plan_text(model: Qilin, kind: str) -> list[Planned]:
    """The language model's tensors; model on any device, meta too for their sizes alone."""
    row = GGUF_KINDS[kind]
    planned = []
    for name, param in model.named_parameters():
        if not name.startswith(("model.", "lm_head.")):
            continue
        shape = tuple(param.shape)
        stored = row.matrices
        if name in (EMBED, HEAD):
            shape = (model.config.n_token_ids, shape[1])
            stored = row.embeddings
        if len(shape) == 1:
            stored = "F32"
        elif stored.startswith("Q") and shape[1] % 32:
            # such types know blocks of 32
            stored = "F16"
        planned.append(Planned(gguf_name(name), shape, stored, partial(text_tensor, model, name)))
    return planned


def uneven_rows_line(planned: list[Planned], kind: str) -> str | None:
    """What to say where rows cannot be cut into blocks of 32."""
    uneven = [tensor for tensor in planned if tensor.kind == "F16"]
    if not kind.startswith("q") or not uneven:
        return None
    lengths = sorted({tensor.shape[1] for tensor in uneven})
    return (
        f"{len(uneven)} of {len(planned)} tensors stay in f16: {kind} wants rows of a multiple of "
        f"32 numbers, theirs have {' or '.join(map(str, lengths))}"
    )


def plan_pictures(model: Qilin, wide: Widened) -> list[Planned]:
    """The picture half's tensors."""
    exact, rounded = mmproj_tensors(model, wide)
    planned = []
    for kind, tensors in (("F32", exact), ("F16", rounded)):
        for name, tensor in tensors.items():
            planned.append(Planned(name, tuple(tensor.shape), kind, partial(_same, tensor)))
    return planned


def _same(tensor):
    return tensor


def count_bytes(planned: Iterable[Planned]) -> int:
    """What tensors take in a file."""
    gguf = import_gguf()
    total = 0
    for tensor in planned:
        block, n_bytes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[tensor.kind]]
        total += torch.Size(tensor.shape).numel() // block * n_bytes
    return total


# --- 2. what stands in front of the tensors -------------------------------------------------------


def describe_text(writer: Any, name: str, config: QilinConfig, tokenizer: Tokenizer) -> None:
    """Sizes of the language model, and its vocabulary."""
    text: TextConfig = config.text
    writer.add_name(name)
    writer.add_context_length(text.max_position_embeddings)
    writer.add_embedding_length(text.hidden_size)
    writer.add_block_count(text.num_hidden_layers)
    writer.add_feed_forward_length(text.intermediate_size)
    writer.add_head_count(text.num_attention_heads)
    writer.add_head_count_kv(text.num_key_value_heads)
    writer.add_key_length(text.head_dim)
    writer.add_value_length(text.head_dim)
    writer.add_layer_norm_rms_eps(text.rms_norm_eps)
    writer.add_rope_dimension_count(text.head_dim)
    writer.add_rope_freq_base(text.rope_theta)
    writer.add_vocab_size(config.n_token_ids)
    add_vocabulary(writer, tokenizer, config.end_ids)


def describe_pictures(writer: Any, name: str, model: Qilin, wide: Widened) -> None:
    """Sizes of the widened tower, and what a picture's pixels become."""
    vision = wide.vision
    # the two blocks in front are its first
    n_blocks = 2 + model.vision_tower.n_computed
    writer.add_name(name)
    writer.add_clip_has_vision_encoder(True)
    writer.add_clip_projector_type("mlp")
    writer.add_vision_projection_dim(model.config.text.hidden_size)
    writer.add_vision_image_size(vision.image_size)
    writer.add_vision_patch_size(vision.patch_size)
    writer.add_vision_embedding_length(wide.n_channels)
    writer.add_vision_feed_forward_length(vision.intermediate_size)
    writer.add_vision_block_count(n_blocks)
    writer.add_vision_head_count(wide.n_heads)
    writer.add_vision_attention_layernorm_eps(wide.eps)
    # without it llama.cpp leaves out the last block
    writer.add_array("clip.vision.feature_layer", [n_blocks])
    writer.add_vision_image_mean(CLIP_MEAN)
    writer.add_vision_image_std(CLIP_STD)
    # neither this nor silu is quick_gelu
    writer.add_vision_use_gelu(vision.hidden_act == "gelu")


# --- 3. files -------------------------------------------------------------------------------------


# of float16, in which the blocks of q8_0 and q4_0 keep their scales too
LARGEST_F16 = 65504.0


def encoded(tensor: Planned) -> Any:
    """The numpy array of a tensor as its file holds it. ValueError where a number does not fit."""
    gguf = import_gguf()
    made = tensor.make().float()
    largest = math.inf if tensor.kind in ("F32", "BF16") else LARGEST_F16
    # not so for nan either
    if not made.abs().max() <= largest or not is_finite(made):
        raise ValueError(f"{tensor.name} holds values that are not finite in {tensor.kind.lower()}")
    numbers = made.contiguous().numpy()
    return gguf.quantize(numbers, gguf.GGMLQuantizationType[tensor.kind])


def write_gguf(
    path: Path,
    architecture: str,
    file_type: str,
    describe: Callable[[Any], None],
    planned: list[Planned],
) -> None:
    """A GGUF file, a tensor at a time, all of it read again when it is written.

    describe: adds what stands in front of the tensors to a gguf.GGUFWriter.
    OSError where the disk has no room for it, before it is begun, or holds something else after.
    """
    gguf = import_gguf()
    if shutil.disk_usage(path.parent).free < count_bytes(planned):
        raise OSError(errno.ENOSPC, "No space left on device", str(path))
    writer = gguf.GGUFWriter(path, architecture)
    describe(writer)
    writer.add_file_type(gguf.LlamaFileType[file_type])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    for tensor in planned:
        kind = gguf.GGMLQuantizationType[tensor.kind]
        # to the package a float's type says that the shape is not yet one of blocks
        writer.add_tensor_info(tensor.name, tensor.shape, "float32", count_bytes([tensor]), kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    checksums: dict[str, int] = {}
    for tensor in tqdm(planned, path.name, unit="tensor", disable=None):
        array = encoded(tensor)
        checksums[tensor.name] = zlib.crc32(array.data)
        writer.write_tensor_data(array)
    writer.close()
    check_gguf_file(path, planned, checksums)


def check_gguf_file(path: Path, planned: list[Planned], checksums: dict[str, int]) -> None:
    """OSError unless a file holds just these tensors, in their shapes and types, and every byte."""
    expected = {t.name: (t.shape, t.kind, checksums[t.name]) for t in planned}
    found = {}
    for stored in import_gguf().GGUFReader(path).tensors:
        # the last dimension stands first there
        shape = tuple(map(int, reversed(stored.shape)))
        checksum = zlib.crc32(stored.data.data)
        found[stored.name] = (shape, stored.tensor_type.name, checksum)
    if found != expected:
        wrong = [name for name in expected | found if found.get(name) != expected.get(name)]
        message = f"what was written is not what was meant ({named_list(wrong)})"
        raise OSError(errno.EIO, message, str(path))


def gguf_obstacle(config: QilinConfig, tokenizer: Tokenizer | None) -> str | None:
    """Why a model cannot be written for llama.cpp, or None; the package gguf may be absent."""
    if tokenizer is None:
        return "a GGUF file holds its vocabulary, and no tokenizer lies beside the weights"
    try:
        check_gguf_projector(config.projector_type)
        check_vocabulary(tokenizer)
        other_ends(tokenizer, config.end_ids)
    except ValueError as error:
        return str(error)
    return None


def check_gguf(config: QilinConfig, tokenizer: Tokenizer, kind: str, path: str | Path) -> None:
    """ValueError for what cannot be written, before anything is read or written."""
    if kind not in GGUF_KINDS:
        raise ValueError(f"--gguf {kind} is unknown: {' or '.join(GGUF_KINDS)}")
    import_gguf()
    obstacle = gguf_obstacle(config, tokenizer)
    if obstacle:
        raise ValueError(obstacle)
    name = Path(path).name
    own = [MODELFILE]
    for each in GGUF_KINDS:
        own += [glob.escape(file) for file in file_names(name, each)]
    check_replaceable(path, MODELFILE, own)
    check_way(Path(path), [*own, "*.partial"])


def file_names(name: str, kind: str) -> tuple[str, str]:
    """The files of a model called `name`: language model, picture half."""
    return f"{name}-{kind}.gguf", f"mmproj-{name}-f16.gguf"


def write_folder(
    model: Qilin, tokenizer: Tokenizer, folder: Path, name: str, kind: str
) -> list[Planned]:
    """The files of a model called `name`, into `folder`. -> the language model's tensors."""
    text_file, mmproj_file = file_names(name, kind)
    text = plan_text(model, kind)
    describe = partial(describe_text, name=name, config=model.config, tokenizer=tokenizer)
    write_gguf(folder / text_file, "llama", GGUF_KINDS[kind].file_type, describe, text)

    wide = widen(model.vision_tower, model.config.vision)
    describe = partial(describe_pictures, name=name, model=model, wide=wide)
    pictures = plan_pictures(model, wide)
    write_gguf(folder / mmproj_file, "clip", "MOSTLY_F16", describe, pictures)
    write_text(folder / MODELFILE, modelfile(text_file, mmproj_file, tokenizer))
    return text


def keep_other_kinds(path: Path, folder: Path, kind: str) -> None:
    """Take over, into `folder`, which is to replace `path`, the kinds that were written before.

    ValueError when their picture half is another, so that they are of another model.
    """
    for other in GGUF_KINDS:
        text_file, mmproj_file = file_names(path.name, other)
        if other == kind or not (path / text_file).is_file():
            continue
        if not filecmp.cmp(path / mmproj_file, folder / mmproj_file, shallow=False):
            raise ValueError(
                f"{path} holds {text_file} of another model: give another name, or remove it"
            )
        try:
            os.link(path / text_file, folder / text_file)
        # a file system without links
        except OSError:
            shutil.copyfile(path / text_file, folder / text_file)


@torch.no_grad()
def save_gguf(model: Qilin, tokenizer: Tokenizer, path: str | Path, kind: str) -> list[str]:
    """Write the folder `path`: language model as `kind` (of GGUF_KINDS), picture half in f16.

    -> lines on what a person should know of it. The folder appears when it is whole.
    ValueError says what llama.cpp could not run, OSError what the disk did.
    """
    check_gguf(model.config, tokenizer, kind, path)
    path = Path(path)
    with folder_beside(path) as folder:
        text = write_folder(model, tokenizer, folder, path.name, kind)
        keep_other_kinds(path, folder, kind)
    lines = []
    uneven = uneven_rows_line(text, kind)
    if uneven:
        lines.append(uneven)
    if model.config.image_mode != "pad":
        lines.append(
            "this model was trained on pictures cropped to a square, llama.cpp pads them: crop "
            "pictures before you send them"
        )
    return lines
