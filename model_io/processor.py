"""How a model wants its pictures, by the files of transformers' processors beside its weights.

in: config.json, preprocessor_config.json, processor_config.json; out: a mode of preprocess_image
"""

import math
from pathlib import Path
from typing import Any

from common.files import read_json, say_once
from model_io.pixels import CLIP_MEAN, CLIP_STD
from qilin_min import check_no_pointer, square_mode, vision_config

# what preprocess_image does; a processor that is asked for anything else is refused
FIXED: dict[str, Any] = {
    "do_resize": True,
    "do_rescale": True,
    "do_normalize": True,
    "do_convert_rgb": True,
    "resample": 3,
    "rescale_factor": 1 / 255,
    "image_mean": CLIP_MEAN,
    "image_std": CLIP_STD,
}
# class of the processor, without "Fast" or "Pil" -> whether its do_pad makes pictures square
PROCESSORS = {
    "LlavaImageProcessor": True,
    "CLIPImageProcessor": False,
    "CLIPFeatureExtractor": False,
}


def is_about(value: Any, wanted: Any) -> bool:
    """Whether a value of a JSON file is a number, or a list of numbers, up to rounding."""
    if isinstance(wanted, tuple):
        is_list = isinstance(value, list) and len(value) == len(wanted)
        return is_list and all(map(is_about, value, wanted))
    if isinstance(wanted, float):
        return isinstance(value, int | float) and math.isclose(value, wanted, rel_tol=1e-6)
    return value == wanted


def sides_of(size: Any, name: str) -> Any:
    """size or crop_size in its newer spelling: older files hold one number."""
    if type(size) is not int:
        return size
    return {"shortest_edge": size} if name == "size" else {"height": size, "width": size}


def processor_mode(raw: dict, where: Path, image_size: int) -> str:
    """The mode of preprocess_image that gives what a processor of transformers would.

    raw: its JSON, of `where`. ValueError names the key that asks for anything else.
    """
    kind = raw.get("image_processor_type") or raw.get("feature_extractor_type")
    kind = str(kind or "LlavaImageProcessor").removesuffix("Fast").removesuffix("Pil")
    if kind not in PROCESSORS:
        raise ValueError(f"{where}: pictures as {kind} makes them are not implemented here")
    for key, wanted in FIXED.items():
        value = raw.get(key)
        if value is not None and not is_about(value, wanted):
            raise ValueError(f"{where}: {key} = {value!r} is not implemented here (only {wanted})")
    square = {"height": image_size, "width": image_size}
    edge = {"shortest_edge": image_size}
    # what is not said is CLIP's
    size = sides_of(raw.get("size", 224), "size")
    crop_size = sides_of(raw.get("crop_size", 224), "crop_size")
    is_cropped = raw.get("do_center_crop") in (None, True)
    is_padded = PROCESSORS[kind] and bool(raw.get("do_pad"))
    if is_cropped and crop_size != square:
        raise ValueError(
            f"{where}: crop_size = {crop_size!r}, but the tower takes {image_size} pixels"
        )
    if is_padded and size in (square, edge):
        return "pad"
    if is_cropped and size == edge:
        return "crop"
    raise ValueError(
        f"{where}: size = {size!r} with do_pad {is_padded} and do_center_crop {is_cropped} is not "
        f"implemented here: {image_size} pixels are reached by padding or by cropping"
    )


def read_processors(folder: Path) -> list[tuple[dict, Path]]:
    """The JSON of each picture processor that a folder's files describe, and where it stands."""
    found = []
    for name, key in (
        ("processor_config.json", "image_processor"),
        ("preprocessor_config.json", ""),
    ):
        file = folder / name
        if not file.is_file():
            continue
        check_no_pointer(file)
        raw = read_json(file)
        if key and isinstance(raw, dict):
            # newer saves nest it there, older ones hold no pictures' part
            raw = raw.get(key) or {}
        if not isinstance(raw, dict):
            raise ValueError(f"{file}: not a JSON object")
        if raw:
            found.append((raw, file))
    return found


def check_tower_processor(folder: Path, image_size: int) -> None:
    """ValueError when the files beside a tower ask for other pixels than preprocess_image gives."""
    for raw, file in read_processors(folder):
        processor_mode(raw, file, image_size)


def picture_mode(raw: dict, where: Path | None) -> tuple[str, str]:
    """(How pictures become square: QilinConfig.image_mode, what says so) of a whole model.

    raw: its config.json, of `where`; None without one. A llava-hf folder says it by its processor's
    files, as transformers reads them, which go before a word in config.json.
    ValueError for what is not implemented, and for files that differ.
    """
    if where is None:
        return square_mode(raw), "the default where parts are given"
    word = raw.get("image_aspect_ratio")
    by_config = square_mode(raw)
    reason = f"image_aspect_ratio {word!r} in config.json"
    if not word:
        reason = "config.json says nothing else"
    if "vision_config" not in raw:
        return by_config, reason
    modes = {}
    for processor, file in read_processors(where.parent):
        modes[file.name] = processor_mode(processor, file, vision_config(raw, where).image_size)
    if not modes:
        return by_config, reason
    if len(set(modes.values())) > 1:
        said = ", ".join(f"{name}: {mode}" for name, mode in modes.items())
        raise ValueError(f"{where.parent}: two processors that differ ({said}): remove one of them")
    name, mode = modes.popitem()
    if word and mode != by_config:
        say_once(
            f"{where.parent}: pictures are made square by {mode}, as {name} and transformers have "
            f"it, though config.json says image_aspect_ratio {word!r}"
        )
    return mode, name
