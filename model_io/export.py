"""A model, sharded or not -> a llava-hf folder that transformers 4.57 and 5, vLLM and we load."""

import errno
import math
import re
import shutil
import sys
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn as nn
from safetensors import SafetensorError
from safetensors.torch import save_file
from tqdm import tqdm

from common.files import (
    one_line,
    removed_on_error,
    replace_folder,
    write_json,
)
from model_io.card import Origin, card_head, card_rows
from model_io.int4_files import int4_tensors, is_in_int4, quantization_config
from model_io.lowbit import QuantizedLinear
from model_io.pixels import CLIP_MEAN, CLIP_STD
from model_io.tokenizer_files import fast_tokenizer, tokenizer_files, tokenizer_jsons
from model_io.tokens import Tokenizer
from model_io.written import (
    Fingerprint,
    check_bytes,
    check_json,
    check_loads,
    check_place,
    check_shards,
    fingerprint,
)
from qilin_min import (
    EMBED,
    HEAD,
    IMAGE_TOKEN,
    PROJECTORS,
    HfForm,
    Qilin,
    QilinConfig,
    activation_word,
    hf_forms,
    hf_name,
    part_of,
    split_projector_name,
)

# --- 1. weights: a model -> whole tensors -> safetensors files ---


def save_tensors(tensors: dict[str, torch.Tensor], path: Path) -> None:
    """A .safetensors file that others may read as they may its folder: the library alone makes it
    private to its owner."""
    try:
        save_file(tensors, path, metadata={"format": "pt"})
    # a full disk reaches us as a text
    except SafetensorError as error:
        number = re.search(r"os error (\d+)", str(error))
        code = int(number[1]) if number else errno.EIO
        raise OSError(code, f"could not be written ({one_line(error)})", str(path)) from None
    path.chmod(path.parent.stat().st_mode & 0o666)


def is_rank0() -> bool:
    """Whether this process is the one that writes: alone, or the first of several ranks."""
    return not dist.is_initialized() or dist.get_rank() == 0


def whole(param: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The whole of a parameter as `dtype`; where it is sharded, every rank must ask for it."""
    full: Any = param.detach().to(dtype)  # cast first: half the traffic
    return full.full_tensor() if hasattr(full, "full_tensor") else full


def merged_weight(layer: Any) -> torch.Tensor:
    """The float32 weight of a layer with its LoRA adapters added; that of a quantised layer is what
    its bits stood for in training, not what they were rounded from."""
    if isinstance(layer, QuantizedLinear):
        weight = layer.dequantize(torch.float32)
    else:
        weight = whole(layer.weight, torch.float32)
    lora_B = whole(layer.lora_B, torch.float32)
    lora_A = whole(layer.lora_A, torch.float32)
    return weight.float() + layer.lora_scale * (lora_B @ lora_A)


def full_tensors(
    model: Qilin, names: str | tuple[str, ...] | None = None, dtype: torch.dtype | None = None
) -> Iterator[tuple[str, torch.Tensor | None]]:
    """Yield (name, whole tensor on CPU) one by one, of names that begin with `names`; LoRA adapters
    are added to their layer's weight. On a sharded model every rank must iterate, and rank 0 alone
    gets tensors, the others None."""
    for name, param in model.named_parameters():
        if part_of(name) == "lora":
            continue
        if names is not None and not name.startswith(names):
            continue
        layer = model.get_submodule(name.rpartition(".")[0])
        if hasattr(layer, "lora_A"):
            full = merged_weight(layer).to(dtype or torch.float32)
        else:
            full = whole(param, dtype or param.dtype)
        yield name, full.cpu().contiguous() if is_rank0() else None


SHARD_BYTES = 5_000_000_000


class ShardFiles:
    """Tensors -> .safetensors files of at most SHARD_BYTES in `folder`, and the index that says
    which file holds what. One file's tensors are held at a time."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.open: dict[str, torch.Tensor] = {}  # what the next file will hold
        self.written: list[dict[str, Fingerprint]] = []  # what each file should hold
        self.n_bytes = 0

    def add(self, key: str, tensor: torch.Tensor) -> None:
        """Take one tensor; write what came before it when both do not fit into one file."""
        n_open = sum(held.nbytes for held in self.open.values())
        if self.open and n_open + tensor.nbytes > SHARD_BYTES:
            self._write()
        self.open[key] = tensor
        self.n_bytes += tensor.nbytes

    def _write(self):
        held = {key: fingerprint(self.open[key]) for key in sorted(self.open)}
        save_tensors(self.open, self.folder / f"shard-{len(self.written)}")
        self.written.append(held)
        self.open.clear()

    def finish(self) -> dict[str, dict[str, Fingerprint]]:
        """Write the rest, and give each file its name, which tells how many there are.
        -> {file name: {key: what it should hold}}"""
        self._write()
        n = len(self.written)
        if n == 1:
            names = ["model.safetensors"]
        else:
            names = [f"model-{i + 1:05d}-of-{n:05d}.safetensors" for i in range(n)]
        weight_map = {}
        for i, name in enumerate(names):
            (self.folder / f"shard-{i}").rename(self.folder / name)
            weight_map.update(dict.fromkeys(self.written[i], name))
        if n > 1:
            index = {
                "metadata": {"total_size": self.n_bytes},
                "weight_map": dict(sorted(weight_map.items())),
            }
            write_json(self.folder / "model.safetensors.index.json", index)
        return dict(zip(names, self.written, strict=True))


# --- 2. a model -> a folder ---


def hf_tensors(name: str, full: torch.Tensor, form: HfForm, n_rows: int) -> dict[str, torch.Tensor]:
    """{name in the file: tensor} of one of our parameters: one, or two where llava-hf's class has
    more layers than ours. The embeddings and the head get n_rows rows."""
    if part_of(name) == "mm_projector":
        return projector_tensors(name, full, form)
    key = hf_name(name)
    if name in (EMBED, HEAD):
        filler = full[:1].expand(n_rows - len(full), -1)
        return {key: torch.cat((full, filler))}
    return {key: full}


def projector_tensors(name: str, full: torch.Tensor, form: HfForm) -> dict[str, torch.Tensor]:
    """{name in the file: tensor} of one of a projector's parameters that goes out in a form: with
    it goes that of the layer which llava-hf has and ours lacks."""
    layer, kind = split_projector_name(name)
    ours = f"multi_modal_projector.{form.layers[layer]}.{kind}"
    added = f"multi_modal_projector.{form.constant_layer}.{kind}"
    if form.constant_weight is None:
        return {ours: full}
    if kind == "bias":
        return {ours: full, added: torch.zeros_like(full)}
    C, Cv = full.shape
    constant = form.constant_weight(Cv, C).to(full.dtype)
    if form.is_mirrored:
        rest = full.new_zeros(C, C - 2 * Cv)
        full = torch.cat((full, -full, rest), dim=1)  # (C, C)
    return {ours: full, added: constant}


def written_form(config: QilinConfig) -> HfForm:
    """The form in which a model's projector goes into a llava-hf folder: the first of its type's
    for which there is room."""
    has_room = config.text.hidden_size >= 2 * config.vision.hidden_size
    return next(
        form for form in hf_forms(config.projector_type) if has_room or not form.is_mirrored
    )


def llava_obstacle(config: QilinConfig) -> str | None:
    """Why neither transformers nor vLLM opens this model's folder, or None."""
    if written_form(config).activation is None:
        return f"llava-hf has no {config.projector_type} projector"
    return None


def vllm_obstacle(config: QilinConfig) -> str | None:
    """Why vLLM does not open this model's folder, though transformers does, or None."""
    if written_form(config).activation == "linear":
        return (
            "a linear projector for vLLM needs a text width of twice the tower's, and here are "
            f"{config.text.hidden_size} and {config.vision.hidden_size}"
        )
    return None


def export_limits(config: QilinConfig) -> str | None:
    """What a person must know of who opens this model's folder; None where all do."""
    reason = llava_obstacle(config)
    if reason:
        return f"only qilin-min opens this folder: {reason}, and transformers and vLLM refuse it"
    reason = vllm_obstacle(config)
    if reason:
        return f"only transformers and qilin-min open this folder, vLLM does not: {reason}"
    return None


INT4_LIMITS = (
    "only qilin-min opens this folder: its linear layers are in 4 bits in a layout of its own; "
    "for llama.cpp convert the model that it was made from with --gguf q4_0"
)


def check_exportable(projector_type: str) -> None:
    """ValueError when no folder can hold a model with this projector."""
    if not PROJECTORS[projector_type].hf_forms:
        raise ValueError(
            f"a model with a projector {projector_type} cannot be exported: its row of PROJECTORS "
            "has no names for its layers in a llava-hf folder"
        )


def _is_only_int8(module: nn.Module) -> bool:
    is_bare = isinstance(module, QuantizedLinear) and not hasattr(module, "lora_A")
    return is_bare and not is_in_int4(module)


def has_int4(model: Qilin) -> bool:
    """Whether a model goes to disk in 4 bits."""
    return any(is_in_int4(module) for module in model.modules())


def gather_shards(model: Qilin, folder: Path, dtype: torch.dtype | None, n_rows: int) -> ShardFiles:
    """The tensors of a model on their way into `folder`, of which the last file is still open; on
    ranks but the first none."""
    shards = ShardFiles(folder)
    form = written_form(model.config)
    # a bar on a terminal, and of several ranks only the first's
    hidden = None if is_rank0() else True
    n_tensors = sum(1 for _ in model.parameters())
    tensors = full_tensors(model, dtype=dtype)
    for name, full in tqdm(tensors, "writing", n_tensors, unit="tensor", disable=hidden):
        if full is None:
            continue
        layer = model.get_submodule(name.rpartition(".")[0])
        if isinstance(layer, QuantizedLinear) and is_in_int4(layer):
            tensors_of_name = int4_tensors(hf_name(name), layer)
        else:
            tensors_of_name = hf_tensors(name, full, form, n_rows)
        for key, tensor in tensors_of_name.items():
            shards.add(key, tensor)
    return shards


def save_qilin(
    model: Qilin,
    tokenizer: Tokenizer | None,
    path: str | Path,
    dtype: torch.dtype | None = None,
    origin: Origin | None = None,
) -> None:
    """Write `model` as a llava-hf folder: safetensors shards of at most 5 GB, config, tokenizer and
    processor files.

    tokenizer: a Tokenizer, or None (then no tokenizer files). dtype: of the floats on disk (None:
    as they are). origin: for its README.md. On a sharded model every rank calls it; tensors are
    gathered one at a time and rank 0 writes, beside, reads all of it again, then renames; OSError
    when what lies there is not what was written. The picture token is the first
    id past the tokenizer; rows are padded to a multiple of 64 with copies of <unk>'s. A linear
    projector has no llava-hf class: it is written in one of the forms of its row of PROJECTORS,
    which compute the same.
    """
    config = model.config
    if any(_is_only_int8(module) for module in model.modules()):
        raise ValueError("a model quantised to int8 cannot be saved: load it without quantize")
    is_int4 = has_int4(model)
    check_exportable(config.projector_type)
    check_place(path)
    path = Path(path)
    partial = path.with_name(path.name + ".partial")
    n_token_ids = tokenizer.vocab_size if tokenizer else config.n_token_ids
    # of the tokenizer's ids and the picture token, rounded up
    n_rows = -(-(n_token_ids + 1) // 64) * 64
    n_rows = max(config.text.vocab_size, n_rows)

    if is_rank0():
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    # a full disk, too: what is half written would only take more of its room
    with removed_on_error(partial):
        shards = gather_shards(model, partial, dtype, n_rows)
        if is_rank0():
            written = shards.finish()
            dtype_name = str(dtype or next(model.parameters()).dtype).removeprefix("torch.")
            jsons = hf_configs(config, n_token_ids, n_rows, dtype_name) | tokenizer_jsons(tokenizer)
            if is_int4:
                jsons["config.json"]["quantization_config"] = quantization_config()
            n_params = n_parameters(model)
            card = model_card(origin or Origin(), n_params, dtype_name, config, tokenizer, is_int4)
            # a name of a file may hold half a surrogate pair, which UTF-8 has no bytes for
            readme = card.encode(errors="backslashreplace")
            files = {"README.md": readme} | tokenizer_files(tokenizer)
            write_files(partial, jsons, files)
            check_shards(partial, written)
            check_json(partial, jsons)
            check_bytes(partial, files)
            check_loads(partial, config, n_rows, tokenizer)
    if is_rank0():
        replace_folder(partial, path)
        tell_of_tokenizer(path, tokenizer)
    if dist.is_initialized():
        dist.barrier()


def n_parameters(model: Qilin) -> int:
    """How many numbers a model has, those of packed bytes each."""
    n_params = 0
    for name, param in model.named_parameters():
        layer = model.get_submodule(name.rpartition(".")[0])
        if isinstance(layer, QuantizedLinear) and name.endswith(".weight"):
            n_params += math.prod(layer.shape)
        else:
            n_params += param.numel()
    return n_params


def write_files(folder: Path, jsons: dict[str, dict], files: dict[str, bytes]) -> None:
    """All that is not weights, by file name."""
    for file, content in jsons.items():
        write_json(folder / file, content)
    for file, content in files.items():
        (folder / file).write_bytes(content)


def tell_of_tokenizer(path: Path, tokenizer: Tokenizer | None) -> None:
    """A line on stderr, where a folder had to go without a tokenizer.json."""
    obstacle = fast_tokenizer(tokenizer).obstacle if tokenizer else None
    if obstacle:
        print(
            f"{path}: no tokenizer.json: {obstacle}; transformers takes its tokenizer.model, "
            "through sentencepiece",
            file=sys.stderr,
        )


def _card_text(name: str) -> str:
    return Path(__file__).with_name(name).read_text(encoding="utf-8").rstrip()


def model_card(
    origin: Origin,
    n_params: int,
    dtype_name: str,
    config: QilinConfig,
    tokenizer: Tokenizer | None,
    is_int4: bool = False,
) -> str:
    """The README.md of an exported folder."""
    if is_int4 or written_form(config).activation is None:
        use = '`python sample.py image.png "图中有什么异常？" --model .`'
    else:
        use = _card_text("model_card_use.md")
    limits = INT4_LIMITS if is_int4 else export_limits(config)
    if limits is None:
        use = f"{use}\n\nFor many users: `vllm serve .`"
    else:
        use = f"{limits[0].upper()}{limits[1:]}.\n\n{use}"
    obstacle = fast_tokenizer(tokenizer).obstacle if tokenizer else None
    if tokenizer and obstacle:
        begin = tokenizer.sp.id_to_piece(tokenizer.bos_id)
        note = _card_text("model_card_tokenizer.md").format(obstacle=obstacle, begin=begin)
        use = f"{use}\n\n{note}"
    return (
        _card_text("model_card.md").format(
            head=card_head(origin),
            how=origin.how,
            projector=config.projector_type,
            n=n_params / 1e9,
            dtype=f"int4 and {dtype_name}" if is_int4 else dtype_name,
            rows=card_rows(origin),
            use=use,
        )
        + "\n"
    )


# --- 3. the JSON files beside the weights ---


def hf_configs(
    config: QilinConfig, n_token_ids: int, n_rows: int, dtype_name: str
) -> dict[str, dict]:
    """The JSON files beside the weights: {file name: content}."""
    return {
        "config.json": _config_json(config, n_token_ids, n_rows, dtype_name),
        "generation_config.json": _generation_config(config, n_token_ids, n_rows),
        "preprocessor_config.json": _preprocessor_config(config),
        "processor_config.json": _processor_config(config),
    }


def _end_ids(config):
    """One id, or a list where there are more."""
    return config.end_ids if config.text.more_end_ids else config.text.eos_token_id


def _config_json(config, n_token_ids, n_rows, dtype_name):
    return {
        "architectures": ["LlavaForConditionalGeneration"],
        "model_type": "llava",
        "torch_dtype": dtype_name,
        "image_token_index": n_token_ids,
        "image_seq_length": config.n_image_tokens,
        "tie_word_embeddings": config.text.tie_word_embeddings,
        "projector_hidden_act": activation_word(config.projector_type, written_form(config)),
        "multimodal_projector_bias": True,
        "image_aspect_ratio": config.image_mode,
        "vision_feature_layer": config.vision.select_layer,
        "vision_feature_select_strategy": "default",
        "text_config": _text_config(config, n_rows, dtype_name),
        "vision_config": _vision_config(config.vision, dtype_name),
    }


def _text_config(config, n_rows, dtype_name):
    sizes = {field.name: getattr(config.text, field.name) for field in fields(config.text)}
    del sizes["more_end_ids"]
    sizes["eos_token_id"] = _end_ids(config)
    sizes["model_type"] = "llama"
    sizes["architectures"] = ["LlamaForCausalLM"]
    sizes["vocab_size"] = n_rows
    sizes["hidden_act"] = "silu"
    sizes["torch_dtype"] = dtype_name
    return sizes


def _vision_config(vision, dtype_name):
    sizes = {field.name: getattr(vision, field.name) for field in fields(vision)}
    del sizes["select_layer"]
    sizes["model_type"] = "clip_vision_model"
    sizes["projection_dim"] = vision.hidden_size
    sizes["torch_dtype"] = dtype_name
    return sizes


def _generation_config(config, n_token_ids, n_rows):
    return {
        "bos_token_id": config.text.bos_token_id,
        "eos_token_id": _end_ids(config),
        "pad_token_id": 0,
        # filler rows and the picture token are never said
        "suppress_tokens": list(range(n_token_ids, n_rows)),
    }


def _preprocessor_config(config):
    side = config.vision.image_size
    is_padded = config.image_mode == "pad"
    square = {"height": side, "width": side}
    return {
        "image_processor_type": "LlavaImageProcessor",
        "processor_class": "LlavaProcessor",
        "do_pad": is_padded,
        "do_resize": True,
        "size": square if is_padded else {"shortest_edge": side},
        "resample": 3,
        "do_center_crop": not is_padded,
        "crop_size": square,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": CLIP_MEAN,
        "image_std": CLIP_STD,
        "do_convert_rgb": True,
    }


def _processor_config(config):
    return {
        "processor_class": "LlavaProcessor",
        "image_token": IMAGE_TOKEN,
        "patch_size": config.vision.patch_size,
        "num_additional_image_tokens": 1,
        "vision_feature_select_strategy": "default",
    }
