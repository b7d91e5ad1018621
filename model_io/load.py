"""config.json of any release, where each part lies -> a model.

in: folders or files of any published layout; out: a model whose every parameter came from a named tensor
"""

import math
from dataclasses import dataclass
from pathlib import Path

import torch

from common.files import model_folder, read_json
from model_io.lowbit import quantize_linears
from model_io.tokens import Tokenizer
from qilin_min import (
    PARTS,
    Qilin,
    QilinConfig,
    VisionConfig,
    WeightFiles,
    load_weights,
    named_list,
    part_of,
    text_config,
    vision_config,
)


def folder_config(path):
    """(config.json as a dict, its path) of a model's folder, or of the folder that a weight file lies in."""
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"no such folder or file: {path}")
    file = (path if path.is_dir() else path.parent) / "config.json"
    if not file.is_file():
        raise FileNotFoundError(f"no config.json in {file.parent}: it tells the sizes of the model")
    raw = read_json(file)
    if not isinstance(raw, dict):
        raise ValueError(f"{file}: not a JSON object")
    return raw, file


def find_tower(name, model):
    """The folder of the tower that an original LLaVA config names by a path or hub name: beside the checkpoint, from here, or in weights/; or None."""
    folder, last = model if model.is_dir() else model.parent, Path(str(name)).name
    places = (
        folder / str(name),
        folder / last,
        folder.parent / last,
        Path(str(name)),
        Path("weights") / last,
    )
    return next((place for place in places if last and (place / "config.json").is_file()), None)


def tower_config(files):
    """VisionConfig by the shapes of a tower whose config.json is nowhere: heads of 64, as in every CLIP."""
    layers = {
        name.split(".")[3]
        for name in files.tensors
        if name.startswith("vision_tower.encoder.layers.")
    }
    names = (
        "embeddings.patch_embedding.weight",
        "embeddings.position_embedding.weight",
        "encoder.layers.0.mlp.fc1.weight",
    )
    if missing := [name for name in names if "vision_tower." + name not in files.tensors]:
        raise ValueError(f"{files.path}: missing {named_list(missing)} of its vision tower")
    (hidden, _, _, patch), (n_positions, _), (intermediate, _) = (
        files.shape("vision_tower." + name) for name in names
    )
    return VisionConfig(
        hidden,
        intermediate,
        len(layers),
        max(1, hidden // 64),
        math.isqrt(n_positions - 1) * patch,
        patch,
    )


@dataclass
class Checkpoint:
    """What the given paths hold together, before any weight is read."""

    config: QilinConfig
    # of each file the parts that are taken from it
    sources: list[tuple[WeightFiles, set[str]]]
    # no projector was given or found, or `fresh` asked for: init_fresh makes it
    is_fresh: bool


def read_checkpoint(model=None, *, llm=None, vision=None, projector=None, projector_type="linear"):
    """The Checkpoint of some paths.

    model: a folder or file of any layout, or a train.py --out folder; llm, vision, projector: parts given beside it, which override.
    """
    raw, where, given = {}, None, {}
    if model is not None:
        model = model_folder(model)
        if (model / "projector.safetensors").exists() and not (model / "config.json").exists():
            raise ValueError(
                f"{model} holds only a projector (stage 1): give it as --projector, with --llm and --vision"
            )
        raw, where = folder_config(model)
        given = dict.fromkeys(PARTS, model)
    llm, vision, projector = (
        path if path in (None, "fresh") else model_folder(path) for path in (llm, vision, projector)
    )
    given.update(
        {part: path for part, path in zip(PARTS, (llm, vision, projector)) if path is not None}
    )
    inner = raw.get("text_config", raw)
    if inner is not raw and "tie_word_embeddings" in raw and isinstance(inner, dict):
        inner = dict(
            inner, tie_word_embeddings=raw["tie_word_embeddings"]
        )  # in llava-hf the outer one counts
    llm_raw, llm_where = folder_config(llm) if llm else (None, None)
    text = (
        text_config(llm_raw.get("text_config", llm_raw), llm_where)
        if llm
        else text_config(inner, where)
        if raw
        else None
    )
    tower = (
        vision_config(*folder_config(vision))
        if vision
        else vision_config(raw, where)
        if "vision_config" in raw
        else None
    )
    files = {model: WeightFiles(model)} if model in given.values() else {}
    if tower is None and model is not None:  # original LLaVA: the tower inside, or named by a path
        place, is_inside = (
            find_tower(raw.get("mm_vision_tower", ""), model),
            any(part_of(name) == "vision_tower" for name in files[model].tensors),
        )
        if place or is_inside:
            tower = vision_config(*folder_config(place)) if place else tower_config(files[model])
            given["vision_tower"] = model if is_inside else place
        elif "mm_vision_tower" in raw:
            raise ValueError(
                f"{where} names the vision tower {raw['mm_vision_tower']!r}, which is neither in the checkpoint nor beside it, here or in weights/: give --vision DIR"
            )
    if text is None or tower is None:
        raise ValueError(
            "a model needs a language model and a vision tower: give a whole model, or "
            + " and ".join(
                option
                for option, config in (("--llm DIR", text), ("--vision DIR", tower))
                if config is None
            )
        )
    layer = raw.get("vision_feature_layer", raw.get("mm_vision_select_layer", -2))
    if (
        type(layer) is not int
        or not -tower.num_hidden_layers - 1 <= layer <= tower.num_hidden_layers
    ):
        raise ValueError(f"{where}: vision_feature_layer = {layer!r} is not a layer of this tower")
    tower.select_layer = layer
    for key, allowed in (
        ("model_type", ("llava", "llava_llama", "llama")),
        ("vision_feature_select_strategy", ("default",)),
        ("mm_vision_select_feature", ("patch",)),
        ("projector_hidden_act", ("gelu", "linear")),
        ("mm_use_im_start_end", (False,)),
    ):
        if raw.get(key) not in (None, *allowed):
            raise ValueError(
                f"{where}: {key} = {raw[key]!r} is not implemented here (only {' or '.join(map(str, allowed))})"
            )

    files.update(
        {
            path: WeightFiles(path)
            for path in dict.fromkeys(given.values())
            if path != "fresh" and path not in files
        }
    )
    sources = [(f, {part for part in given if given[part] == path}) for path, f in files.items()]
    source = files.get(given.get("mm_projector"))
    found = [name for name in source.tensors if part_of(name) == "mm_projector"] if source else []
    if (
        not found
        and (source if projector else raw.keys() & {"vision_config", "mm_vision_tower"})
        and projector != "fresh"
    ):
        raise ValueError(
            f"{source.path}: no projector in it (names mm_projector.* or multi_modal_projector.*)"
            + ("" if projector else "; --projector FILE gives one, --projector fresh starts one")
        )
    if found:
        beside = (
            source.path.with_name("config.json")
            if source.path.is_file()
            else source.path / "config.json"
        )
        is_linear = "mm_projector.weight" in found or (
            beside.is_file()
            and folder_config(source.path)[0].get("projector_hidden_act") == "linear"
        )
        projector_type = "linear" if is_linear else "mlp2x_gelu"
    config = QilinConfig(
        text,
        tower,
        projector_type,
        text.vocab_size,
        "crop" if raw.get("image_aspect_ratio") == "crop" else "pad",
    )
    folder = Path(given["llm"]) if Path(given["llm"]).is_dir() else Path(given["llm"]).parent
    if (folder / "tokenizer.model").is_file():
        tokenizer = Tokenizer(folder)
        if tokenizer.vocab_size > text.vocab_size:
            raise ValueError(
                f"{tokenizer.path} has {tokenizer.vocab_size} pieces, but the model only {text.vocab_size} rows for them"
            )
        config.n_token_ids = tokenizer.vocab_size
        text.more_end_ids = tuple(
            {*text.more_end_ids, tokenizer.eos_id} - {text.eos_token_id}
        )  # the tokenizer's is what training teaches to say
    elif (
        llm is None
        and type(picture_id := raw.get("image_token_index", raw.get("image_token_id"))) is int
        and picture_id > 0
    ):
        config.n_token_ids = min(
            text.vocab_size, picture_id
        )  # a llava-hf export without tokenizer: the picture token comes right after it
    return Checkpoint(config, sources, is_fresh=not found)


def load_qilin(
    model=None,
    *,
    llm=None,
    vision=None,
    projector=None,
    projector_type="linear",
    dtype=torch.float32,
    device="cpu",
    quantize=None,
):
    """A Qilin in eval mode from real weights.

    model: one folder or file of any layout, also a train.py --out folder; or llm + vision folders. projector: a file, or None for the
    one inside `model`, else a fresh one of projector_type ("linear" | "mlp2x_gelu") from a fixed seed. Parts given beside `model` override
    that part. quantize: "int8" or "int4" stores the linear layers of the decoder blocks so, each quantised as it is read; tower, projector,
    embeddings and head stay in dtype. ValueError or FileNotFoundError says which file or tensor is wrong: no weight is ever left at random.
    """
    if quantize not in (None, "int8", "int4"):
        raise ValueError(f"quantize {quantize!r} is unknown: int8 or int4")
    checkpoint = read_checkpoint(
        model, llm=llm, vision=vision, projector=projector, projector_type=projector_type
    )
    with torch.device("meta"):
        qilin = Qilin(checkpoint.config)
        if quantize:
            quantize_linears(qilin, int(quantize[3:]))
        qilin = qilin.to(dtype)
    load_weights(qilin, checkpoint.sources, device, checkpoint.is_fresh)
    return qilin.eval()
