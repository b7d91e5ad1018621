"""A row's pictures, a picture of any kind -> (3, 336, 336)."""

import os
import warnings
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from PIL import Image, ImageOps

from common.files import one_line
from common.rows import BadRow
from model_io.dicom import TooManyPixels, dicom_image
from model_io.tokens import BadDialog, count_images
from qilin_min import IMAGE_TOKEN

ImageSource = str | Path | BinaryIO | Image.Image

# --- 1. a row's pictures: names -> files inside the image folder ---


def picture_names(row: dict) -> list[str]:
    """The names under a row's "image": one, a list, or none.

    BadDialog ("image is no name", "<image> and pictures do not agree") unless the text holds as
    many <image>.
    """
    names = row.get("image") or []
    if isinstance(names, str):
        names = [names]
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise BadDialog("'image' is neither a name nor a list of names", "image is no name")
    n_images = count_images(row["conversations"])
    if len(names) != n_images:
        raise BadDialog(
            f"{n_images} {IMAGE_TOKEN} in the text, but {len(names)} pictures under 'image'",
            f"{IMAGE_TOKEN} and pictures do not agree",
        )
    return names


def is_inside(name: str, root: str) -> bool:
    """True when `root`, a real path, holds `name`: no .., absolute path or link leads out of it."""
    if "\0" in name:
        return False
    path = os.path.realpath(os.path.join(root, name))
    return os.path.commonpath((root, path)) == root


def row_pictures(row: dict, folder: str | Path) -> list[Path]:
    """Paths of the pictures of a row. ValueError when one is not there, or lies outside `folder`
    (by .., an absolute path or a link)."""
    root = os.path.realpath(folder)
    paths = []
    for name in picture_names(row):
        if not is_inside(name, root):
            raise ValueError(f"picture {name!r} lies outside the image folder {folder}")
        path = Path(folder) / name
        if not os.path.isfile(os.path.join(root, name)):
            if not os.path.isdir(root):
                raise ValueError(f"no such image folder: {folder}")
            raise ValueError(f"no such picture: {path}")
        paths.append(path)
    return paths


def find_picture(names: list[str], roots: tuple[str, ...] | list[str]) -> tuple[Path, str]:
    """(path, name relative to its root) of the first of `names` that is a file inside one of the
    folders `roots`. BadRow."""
    has_outside = False
    for root in roots:
        for name in names:
            path = os.path.join(root, name)
            if not os.path.isfile(path):
                continue
            climbs = os.path.isabs(name) or ".." in name.split("/")
            if climbs or not is_inside(name, root):
                has_outside = True
                continue
            return Path(path), os.path.normpath(name)
    raise BadRow("picture outside the image folder" if has_outside else "picture missing")


# --- 2. a file of any kind -> a picture upright, in RGB, 8 bits a channel ---


class BadPicture(ValueError):
    """A picture that cannot be read; `kind` says why in a few words that can be counted."""

    def __init__(self, message: str, kind: str = ""):
        super().__init__(message)
        self.kind = kind


def is_dicom(image: str | Path | BinaryIO) -> bool:
    """True for a file (path, or binary file at its beginning) that begins as DICOM does, or is
    named .dcm."""
    if not isinstance(image, (str, Path)):
        start = image.read(132)
        image.seek(0)
        return start[128:] == b"DICM"
    with open(image, "rb") as file:
        start = file.read(132)
    return start[128:] == b"DICM" or Path(image).suffix.lower() in (".dcm", ".dicom")


def decoded(image: ImageSource) -> Image.Image:
    """A PIL image, its pixels in memory, as the file holds it. Raises what the decoders raise."""
    if isinstance(image, Image.Image):
        return image
    if is_dicom(image):
        return dicom_image(image)
    with Image.open(image) as opened:
        limit = Image.MAX_IMAGE_PIXELS
        if limit is not None and opened.width * opened.height > limit:
            raise TooManyPixels(
                f"{opened.width} x {opened.height} pixels: taken for a decompression bomb "
                f"(at most {limit}: scale it down first)"
            )
        opened.load()
        return opened


def rgb_of(image: Image.Image) -> Image.Image:
    """The image in RGB. 16-bit grey keeps its high byte: PIL's own conversion clips at 255 and
    turns a CT slice white."""
    if image.mode == "F":
        raise ValueError("floating-point pixels have no agreed range: save it with 8 or 16 bits")
    # I;16 and its byte orders, and I, which older files of 16 bits open as
    if image.mode.startswith("I"):
        values = np.asarray(image).astype(np.int64).clip(0, 65535)
        high_bytes = (values >> 8).astype(np.uint8)
        image = Image.fromarray(high_bytes)
    return image.convert("RGB")


def open_image(image: ImageSource) -> Image.Image:
    """A PIL image upright and in RGB, 8 bits a channel, from a path, a binary file or a PIL image.

    Of several frames the first; DICOM through dicom.py. BadPicture or FileNotFoundError names the
    file; kinds: "picture is a decompression bomb", "picture does not decode".
    """
    name = getattr(image, "filename", None)
    if not name:
        has_name = isinstance(image, (str, Path, Image.Image))
        name = image if has_name else "the picture"
    try:
        # of Pillow about harmless damage
        with warnings.catch_warnings(action="ignore"):
            upright = ImageOps.exif_transpose(decoded(image))
        return rgb_of(upright)
    except FileNotFoundError:
        raise FileNotFoundError(f"no such picture: {name}") from None
    # the decoders raise many kinds for a damaged file, and each means this
    except Exception as error:
        is_bomb = isinstance(error, (TooManyPixels, Image.DecompressionBombError))
        raise BadPicture(
            f"{name}: the picture does not decode ({one_line(error)})",
            "picture is a decompression bomb" if is_bomb else "picture does not decode",
        ) from None


# --- 3. a picture -> what the vision tower takes: (3, size, size) float32, normalised ---

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
# CLIP_MEAN in 0 to 255: becomes almost 0 after normalisation
PAD_COLOR = (122, 116, 104)
# a line of 100000 x 1 pixels would need a square of 30 GB
LONGEST_SIDE = 16384


def normalised_values() -> np.ndarray:
    """float32 (3, 256): what each of 256 values becomes in each channel."""
    values = (np.arange(256) * (1 / 255)).astype(np.float32)  # (256,), 0 to 1
    mean = np.array(CLIP_MEAN, dtype=np.float32)[:, None]  # (3, 1)
    std = np.array(CLIP_STD, dtype=np.float32)[:, None]  # (3, 1)
    return (values - mean) / std  # (3, 256)


# looked up instead of computed for each pixel
NORMALISED = normalised_values()


def pad_to_square(image: Image.Image, size: int) -> Image.Image:
    """The picture centred on a square of the mean colour, then resized to size x size."""
    side = max(image.size)
    left = (side - image.width) // 2
    top = (side - image.height) // 2
    square = Image.new("RGB", (side, side), PAD_COLOR)
    square.paste(image, (left, top))
    return square.resize((size, size), Image.Resampling.BICUBIC)


def crop_to_square(image: Image.Image, size: int) -> Image.Image:
    """The picture with its shorter side resized to `size`, then its middle size x size."""
    shorter = min(image.size)
    width = size * image.width // shorter
    height = size * image.height // shorter
    resized = image.resize((width, height), Image.Resampling.BICUBIC)
    left = (width - size) // 2
    top = (height - size) // 2
    return resized.crop((left, top, left + size, top + size))


def preprocess_image(image: ImageSource, size: int = 336, mode: str = "pad") -> torch.Tensor:
    """float32 (3, size, size) of a picture (path or PIL image). mode "pad": centred on a square of
    the mean colour, then resized; "crop": shorter side to `size`, then the middle (released stage
    1; cuts composites of several pictures).

    Bit for bit what transformers' PIL CLIP and LLaVA processors give; rounding as there: sizes
    truncated, offsets floored.
    """
    name = getattr(image, "filename", None) or image
    picture = open_image(image)
    longest = max(picture.size)
    if mode != "pad":
        longest = size * longest // min(picture.size)
    if longest > LONGEST_SIDE:
        raise ValueError(
            f"{name}: a picture of {picture.width} x {picture.height} pixels is too long"
        )
    if mode == "pad":
        square = pad_to_square(picture, size)
    elif mode == "crop":
        square = crop_to_square(picture, size)
    else:
        raise ValueError(f"mode {mode!r} is unknown: pad or crop")
    channels = np.ascontiguousarray(np.asarray(square).transpose(2, 0, 1))  # (3, H, W) uint8
    normalised = [NORMALISED[c][channels[c]] for c in range(3)]  # 3 of (H, W)
    return torch.from_numpy(np.stack(normalised))  # (3, H, W) float32
