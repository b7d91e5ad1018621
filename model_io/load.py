"""config.json of any release, where each part lies -> a model.

in: folders or files of any published layout
out: a model whose every parameter came from a named tensor
"""

import math
from dataclasses import dataclass
from pathlib import Path

import torch

from common.files import model_folder
from model_io.adapters import (
    Adapter,
    adapter_folder,
    brings_tokenizer,
    find_base,
    has_own_projector,
    merge_sources,
    open_adapter,
)
from model_io.foreign import (
    FOREIGN_NAMES,
    check_is_unpacked,
    check_tensors_are_plain,
    deeper_in,
    first_like,
)
from model_io.graphs import capture_decoding
from model_io.int4_files import holds_int4
from model_io.lowbit import quantize_linears
from model_io.processor import check_tower_processor, picture_mode, read_processors
from model_io.tokens import Tokenizer
from model_io.weights import load_weights, named_folder, weight_files
from qilin_min import (
    PARTS,
    Qilin,
    QilinConfig,
    Sources,
    TextConfig,
    VisionConfig,
    WeightFiles,
    check_all_known,
    check_llava,
    count_token_ids,
    feature_layer,
    folder_config,
    inner_config,
    named_list,
    part_of,
    projector_type_of,
    text_config,
    vision_config,
)


def folder_of(path: Path) -> Path:
    """The folder that a model is, or that its file lies in."""
    return path if path.is_dir() else path.parent


def read_config(path: Path) -> tuple[dict, Path]:
    """folder_config of weights that are not packed, else ValueError."""
    folder = folder_of(path)
    # other formats come without one
    if path.exists() and not (folder / "config.json").is_file():
        raise FileNotFoundError(
            f"no config.json in {folder}: it tells the sizes of the model"
            f"{first_like(folder, FOREIGN_NAMES)}{deeper_in(folder)}"
        )
    raw, where = folder_config(path)
    check_is_unpacked(raw, where)
    return raw, where


# of OpenAI's towers the widest; what no shape tells, heads of 64 and quick_gelu, holds up to there
OPENAI_WIDTH = 1024


def tower_config(files: WeightFiles, name: str) -> VisionConfig:
    """VisionConfig by the shapes of a tower whose config.json is nowhere, but for its `name`.

    ValueError where it is none of OpenAI's: heads and activation are in no tensor.
    """
    start = "vision_tower.encoder.layers."
    layers = {name.split(".")[3] for name in files.tensors if name.startswith(start)}
    patches = "embeddings.patch_embedding.weight"
    positions = "embeddings.position_embedding.weight"
    first_mlp = "encoder.layers.0.mlp.fc1.weight"
    missing = [
        name
        for name in (patches, positions, first_mlp)
        if "vision_tower." + name not in files.tensors
    ]
    if missing:
        raise ValueError(f"{files.path}: missing {named_list(missing)} of its vision tower")
    hidden_size, _, _, patch_size = files.shape("vision_tower." + patches)
    n_positions, _ = files.shape("vision_tower." + positions)
    intermediate_size, _ = files.shape("vision_tower." + first_mlp)
    is_openai = hidden_size <= OPENAI_WIDTH and hidden_size % 64 == 0
    if not is_openai or name.lower().startswith("laion"):
        raise ValueError(
            f"{files.path}: which heads and activation its vision tower {name!r} (width "
            f"{hidden_size}) has is in no tensor: put that tower's own config.json into "
            f"{Path('weights') / (Path(name).name or 'NAME')}/"
            " and let mm_vision_tower of config.json name it"
        )
    return VisionConfig(
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        num_hidden_layers=len(layers),
        num_attention_heads=hidden_size // 64,
        image_size=math.isqrt(n_positions - 1) * patch_size,
        patch_size=patch_size,
    )


@dataclass
class Located:
    """Which paths were named, and what config.json of the whole model among them says."""

    # the whole model's folder or file
    model: Path | None
    # its config.json, {} without a whole model
    raw: dict
    where: Path | None
    # part -> path of what was named beside it
    beside: dict[str, Path]
    # part -> path that it is taken from; a fresh projector's is missing
    places: dict[str, Path]
    # what is merged into the whole model
    adapter: Adapter | None = None
    # another projector, or a fresh one, takes the place of the model's
    is_projector_given: bool = False


def locate_parts(
    model: str | Path | None,
    llm: str | Path | None,
    vision: str | Path | None,
    projector: str | Path | None,
    base: str | Path | None,
) -> Located:
    """The paths by part; of an adapter, those of the base that it is merged into.

    ValueError or FileNotFoundError when `model` is no whole model.
    """
    beside: dict[str, Path] = {}
    for part, path in zip(PARTS, (llm, vision, projector), strict=True):
        if path is not None and path != "fresh":
            beside[part] = model_folder(path)
            if adapter_folder(path) is not None:
                raise ValueError(
                    f"{beside[part]} is an adapter, no part of a model: give it as the model, "
                    "and what it is merged into as --base"
                )
    adapter = None
    folder = None if model is None else adapter_folder(model)
    if folder is not None:
        adapter = open_adapter(folder)
        model = find_base(folder, base, llm)
    elif base is not None:
        raise ValueError(f"--base {base} is for an adapter, and {model} is none")
    if model is None:
        return Located(None, {}, None, beside, dict(beside))
    model = model_folder(model)
    if (model / "projector.safetensors").exists() and not (model / "config.json").exists():
        raise ValueError(
            f"{model} holds only a projector (stage 1): give it as --projector, with --llm and "
            "--vision"
        )
    raw, where = read_config(model)
    if adapter is not None:
        raw = {**raw, **adapter.between}
    places: dict[str, Path] = dict.fromkeys(PARTS, model)
    places.update(beside)
    if projector == "fresh":
        del places["mm_projector"]
    return Located(model, raw, where, beside, places, adapter, projector is not None)


def language_config(located: Located) -> TextConfig | None:
    """Of the language model named beside, or of the one inside; None when there is neither."""
    if "llm" in located.beside:
        raw, where = read_config(located.beside["llm"])
        return text_config(inner_config(raw, where), where)
    if located.where is not None and located.raw:
        return text_config(inner_config(located.raw, located.where), located.where)
    return None


def vision_part(located: Located, inside: WeightFiles | None) -> VisionConfig | None:
    """Of the tower named beside, or of the model's own; None when there is neither.

    The tower of an original LLaVA is inside, or named by a path: then located.places learns it.
    """
    if "vision_tower" in located.beside:
        return vision_config(*read_config(located.beside["vision_tower"]))
    if located.where is None or inside is None:
        return None
    raw = located.raw
    if "vision_config" in raw:
        return vision_config(raw, located.where)
    is_inside = any(part_of(name) == "vision_tower" for name in inside.tensors)
    near = [folder_of(inside.path)]
    if located.adapter is not None:
        near.append(located.adapter.path)
    name = str(raw.get("mm_vision_tower", ""))
    folder = named_folder(name, *near)
    if folder is not None:
        if not is_inside:
            located.places["vision_tower"] = folder
        return vision_config(*read_config(folder))
    if is_inside:
        return tower_config(inside, name)
    if "mm_vision_tower" in raw:
        names_it = located.where
        if located.adapter is not None and "mm_vision_tower" in located.adapter.between:
            names_it = located.adapter.path / "config.json"
        raise ValueError(
            f"{names_it} names the vision tower {raw['mm_vision_tower']!r}, which is neither "
            "in the checkpoint nor beside it, here or in weights/: give --vision DIR"
        )
    return None


def read_sizes(located: Located, inside: WeightFiles | None) -> tuple[TextConfig, VisionConfig]:
    """Sizes of both halves. ValueError names the options for what is missing."""
    text = language_config(located)
    tower = vision_part(located, inside)
    if text is None or tower is None:
        missing = []
        if text is None:
            missing.append("--llm DIR")
        if tower is None:
            missing.append("--vision DIR")
        raise ValueError(
            "a model needs a language model and a vision tower: give a whole model, or "
            + " and ".join(missing)
        )
    tower.select_layer = feature_layer(located.raw, located.where, tower)
    return text, tower


def given_projector_type(located: Located, sources: Sources, hint: str | None) -> str | None:
    """The type of the projector that was named or is inside; None where one is to start fresh.

    ValueError when there should be one and is none.
    """
    place = located.places.get("mm_projector")
    if place is None:
        return None
    source = next(files for files, _ in sources if files.path == place)
    if any(part_of(name) == "mm_projector" for name in source.tensors):
        raw = {}
        if located.adapter is not None and place == located.adapter.path:
            raw = located.raw
        elif (folder_of(source.path) / "config.json").is_file():
            raw, _ = read_config(source.path)
        return projector_type_of(source, raw, hint)
    is_named = "mm_projector" in located.beside
    # a language model alone may stand as a whole model: its projector starts fresh
    if is_named or located.raw.keys() & {"vision_config", "mm_vision_tower"}:
        advice = "" if is_named else "; --projector FILE gives one, --projector fresh starts one"
        raise ValueError(
            f"{source.path}: no projector in it (names mm_projector.* or multi_modal_projector.*)"
            + advice
        )
    return None


def open_inside(located: Located) -> dict[Path, WeightFiles]:
    """The files of the whole model where any part is taken from it, and an adapter's own projector,
    whose place located.places learns."""
    files: dict[Path, WeightFiles] = {}
    if located.model is not None and located.model in located.places.values():
        files[located.model] = weight_files(located.model)
    adapter = located.adapter
    if adapter is None or located.is_projector_given:
        return files
    assert located.model is not None, "an adapter has a base"
    if has_own_projector(adapter, files.get(located.model)):
        located.places["mm_projector"] = adapter.path
        files[adapter.path] = adapter.projector
    return files


def take_parts(located: Located, files: dict[Path, WeightFiles]) -> Sources:
    """Of all files the parts that are taken from them, an adapter merged. files: those open."""
    for path in located.places.values():
        if path not in files:
            files[path] = weight_files(path)
    sources = []
    for path, opened in files.items():
        parts = {part for part, place in located.places.items() if place == path}
        check_tensors_are_plain(opened, parts)
        # before a part is missed that is there under another name
        check_all_known(opened)
        sources.append((opened, parts))
    if located.adapter is None:
        return sources
    return merge_sources(sources, located.adapter, located.is_projector_given)


def says_pictures(located: Located) -> Path | None:
    """The config.json, which need not be there, of the folder that says how pictures become square:
    an adapter's, where it says anything of them, goes before its base's."""
    adapter = located.adapter
    if adapter is None:
        return located.where
    is_said = "image_aspect_ratio" in adapter.between or read_processors(adapter.path)
    return adapter.path / "config.json" if is_said else located.where


def tokenizer_place(located: Located) -> Path:
    """The folder that may hold the tokenizer: an adapter's own goes before its base's."""
    adapter = located.adapter
    if adapter is not None and "llm" not in located.beside and brings_tokenizer(adapter.path):
        return adapter.path
    return folder_of(located.places["llm"])


def attach_tokenizer(config: QilinConfig, tokenizer: Tokenizer) -> None:
    """What only the tokenizer knows: how many ids it has, and which one ends an answer."""
    text = config.text
    if tokenizer.vocab_size > text.vocab_size:
        raise ValueError(
            f"{tokenizer.path} has {tokenizer.vocab_size} pieces, but the model only "
            f"{text.vocab_size} rows for them"
        )
    config.n_token_ids = tokenizer.vocab_size
    # the tokenizer's is what training teaches to say
    text.more_end_ids = tuple({*text.more_end_ids, tokenizer.eos_id} - {text.eos_token_id})


def implemented_mode(located: Located) -> tuple[str, str]:
    """picture_mode. ValueError unless config.json asks for what is implemented between the two
    halves."""
    if located.where is not None:
        check_llava(located.raw, located.where)
    return picture_mode(located.raw, says_pictures(located))


def trained_mode(model: str | Path, llm: str | Path | None, base: str | Path | None) -> str:
    """How a whole model's pictures were made square. Paths and errors as of read_checkpoint."""
    mode, _ = implemented_mode(locate_parts(model, llm, None, None, base))
    return mode


@dataclass
class Checkpoint:
    """What the given paths hold together, before any weight is read."""

    config: QilinConfig
    # of each file the parts that are taken from it
    sources: Sources
    # no projector was given or found, or `fresh` asked for: init_fresh makes it
    is_fresh: bool
    # what says how pictures become square
    mode_reason: str
    # of an adapter and its base
    is_merged: bool


def read_checkpoint(
    model: str | Path | None = None,
    *,
    llm: str | Path | None = None,
    vision: str | Path | None = None,
    projector: str | Path | None = None,
    projector_type: str | None = None,
    base: str | Path | None = None,
) -> Checkpoint:
    """The Checkpoint of some paths.

    model: a folder or file of any layout, a train.py --out folder, or a peft adapter.
    base: what an adapter is merged into; None: the base that it names, else `llm`.
    llm, vision, projector: parts given beside it, which override (what an adapter changes in the
    first two is merged into them); projector "fresh": none of theirs is taken.
    projector_type: of a fresh one (None: QilinConfig's). A given one's tensors tell theirs.
    """
    located = locate_parts(model, llm, vision, projector, base)
    image_mode, mode_reason = implemented_mode(located)
    files = open_inside(located)
    inside = files.get(located.model) if located.model is not None else None
    text, tower = read_sizes(located, inside)
    check_tower_processor(folder_of(located.places["vision_tower"]), tower.image_size)
    sources = take_parts(located, files)

    found_type = given_projector_type(located, sources, projector_type)
    config = QilinConfig(
        text=text,
        vision=tower,
        projector_type=found_type or projector_type or QilinConfig.projector_type,
        n_token_ids=text.vocab_size,
        image_mode=image_mode,
    )
    folder = tokenizer_place(located)
    if (folder / "tokenizer.model").is_file():
        attach_tokenizer(config, Tokenizer(folder))
    elif "llm" not in located.beside:
        config.n_token_ids = count_token_ids(located.raw, text.vocab_size)
    return Checkpoint(
        config,
        sources,
        is_fresh=found_type is None,
        mode_reason=mode_reason,
        is_merged=located.adapter is not None,
    )


def empty_model(config: QilinConfig, dtype: torch.dtype, quantize: str | None) -> Qilin:
    """A Qilin on the meta device: every parameter and buffer in its shape and dtype, no memory."""
    with torch.device("meta"):
        qilin = Qilin(config).to(dtype)
        if quantize:
            # after the cast: scales of 4 bits stay in bfloat16
            quantize_linears(qilin, int(quantize.removeprefix("int")))
        return qilin


def check_stays_int4(path: str | Path | None, checkpoint: Checkpoint, quantize: str | None) -> None:
    """ValueError where something else is wanted of weights in 4 bits than to run them."""
    if quantize == "int8":
        raise ValueError(f"{path} is in 4 bits already: leave --quantize int8 out")
    if checkpoint.is_merged:
        raise ValueError(
            f"{path}: its base is in 4 bits, into which no adapter can be merged: give --base the "
            "model that it was made from"
        )


def load_qilin(
    model: str | Path | None = None,
    *,
    llm: str | Path | None = None,
    vision: str | Path | None = None,
    projector: str | Path | None = None,
    projector_type: str = "linear",
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    quantize: str | None = None,
    base: str | Path | None = None,
) -> Qilin:
    """A Qilin in eval mode from real weights.

    model: one folder or file of any layout, also a train.py --out folder; or llm + vision folders.
    base: what `model`, a peft adapter, is merged into (None: the base that it names, where found).
    projector: a file, or None for the one inside `model`, else a fresh one of projector_type
    ("linear" | "mlp2x_gelu") from a fixed seed. Parts given beside `model` override that part.
    quantize: "int8" or "int4" stores the linear layers of the decoder blocks so, each quantised as
    it is read; tower, projector, embeddings and head stay in dtype. What is in 4 bits on disk stays
    so.
    On CUDA generate() captures its steps as CUDA graphs; model_io.graphs.launch_singly undoes that.
    ValueError or FileNotFoundError says which file or tensor is wrong: no weight is ever left at
    random.
    """
    if quantize not in (None, "int8", "int4"):
        raise ValueError(f"quantize {quantize!r} is unknown: int8 or int4")
    checkpoint = read_checkpoint(
        model,
        llm=llm,
        vision=vision,
        projector=projector,
        projector_type=projector_type,
        base=base,
    )
    if holds_int4(checkpoint.sources):
        check_stays_int4(model, checkpoint, quantize)
        quantize = "int4"
    qilin = empty_model(checkpoint.config, dtype, quantize)
    load_weights(qilin, checkpoint.sources, device, checkpoint.is_fresh)
    if torch.device(device).type == "cuda":
        capture_decoding(qilin)
    return qilin.eval()
