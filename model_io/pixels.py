"""A row's pictures, a picture of any kind -> (3, 336, 336)."""

import os
import warnings
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps

from common.files import one_line
from common.rows import BadRow
from model_io.tokens import count_images
from qilin_min import IMAGE_TOKEN


def picture_names(row):
    """The names under a row's "image": one, a list, or none. ValueError unless the text holds as many <image>."""
    names = row.get("image") or []
    names = [names] if isinstance(names, str) else names
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ValueError("'image' is neither a name nor a list of names")
    if len(names) != count_images(row["conversations"]):
        raise ValueError(
            f"{count_images(row['conversations'])} {IMAGE_TOKEN} in the text, but {len(names)} pictures under 'image'"
        )
    return names


def row_pictures(row, folder):
    """Paths of the pictures of a row. ValueError when one is not there, or lies outside `folder` (by .., an absolute path or a link)."""
    names, root = picture_names(row), os.path.realpath(folder)
    for name in names:
        if (
            "\0" in name
            or os.path.commonpath((root, os.path.realpath(os.path.join(root, name)))) != root
        ):
            raise ValueError(f"picture {name!r} lies outside the image folder {folder}")
        if not os.path.isfile(os.path.join(root, name)):
            raise ValueError(
                f"no such picture: {Path(folder) / name}"
                if os.path.isdir(root)
                else f"no such image folder: {folder}"
            )
    return [Path(folder) / name for name in names]


CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
PAD_COLOR = (122, 116, 104)  # CLIP_MEAN in 0 to 255: becomes almost 0 after normalisation
NORMALISED = (
    (np.arange(256) * (1 / 255)).astype(np.float32)[None]
    - np.array(CLIP_MEAN, dtype=np.float32)[:, None]
) / np.array(CLIP_STD, dtype=np.float32)[
    :, None
]  # (3, 256) float32: what each of 256 values becomes, looked up instead of computed for each pixel


def is_dicom(image):
    """True for a file (path, or binary file at its beginning) that begins as DICOM does, or is named .dcm."""
    if not isinstance(image, (str, Path)):
        start = image.read(132)
        image.seek(0)
        return start[128:] == b"DICM"
    with open(image, "rb") as file:
        return file.read(132)[128:] == b"DICM" or Path(image).suffix.lower() in (".dcm", ".dicom")


def open_image(image):
    """A PIL image upright and in RGB, 8 bits a channel, from a path, a binary file or a PIL image. ValueError or FileNotFoundError names the file.

    16-bit grey keeps its high byte: PIL's own conversion clips at 255 and turns a CT slice white. Of several frames the first; DICOM through dicom.py.
    """
    name = getattr(image, "filename", None) or (
        image if isinstance(image, (str, Path, Image.Image)) else "the picture"
    )
    try:
        with warnings.catch_warnings(action="ignore"):  # of Pillow about harmless damage
            if isinstance(image, Image.Image):
                pass
            elif is_dicom(image):
                from model_io.dicom import dicom_image

                image = dicom_image(image)
            else:
                with Image.open(image) as opened:
                    if opened.width * opened.height > Image.MAX_IMAGE_PIXELS:
                        raise ValueError(
                            f"{opened.width} x {opened.height} pixels: taken for a decompression bomb (at most {Image.MAX_IMAGE_PIXELS}: scale it down first)"
                        )
                    opened.load()
                    image = opened
            image = ImageOps.exif_transpose(image)
        if image.mode == "F":
            raise ValueError(
                "floating-point pixels have no agreed range: save it with 8 or 16 bits"
            )
        if image.mode.startswith(
            "I"
        ):  # I;16 and its byte orders, and I, which older files of 16 bits open as
            return Image.fromarray(
                (np.asarray(image).astype(np.int64).clip(0, 65535) >> 8).astype(np.uint8)
            ).convert("RGB")
        return image.convert("RGB")
    except FileNotFoundError:
        raise FileNotFoundError(f"no such picture: {name}") from None
    except (
        Exception
    ) as error:  # the decoders raise many kinds for a damaged file, and each means this
        raise ValueError(f"{name}: the picture does not decode ({one_line(error)})") from None


def preprocess_image(image, size=336, mode="pad"):
    """float32 (3, size, size) of a picture (path or PIL image). mode "pad": centred on a square of the mean colour, then resized;
    "crop": shorter side to `size`, then the middle (released stage 1; cuts composites of several pictures).

    Bit for bit what transformers' PIL CLIP and LLaVA processors give; rounding as there: sizes truncated, offsets floored.
    """
    image, name = open_image(image), getattr(image, "filename", None) or image
    width, height = image.size
    longest = (
        max(width, height) if mode == "pad" else size * max(width, height) // min(width, height)
    )
    if longest > 16384:  # a line of 100000 x 1 pixels would need a square of 30 GB
        raise ValueError(f"{name}: a picture of {width} x {height} pixels is too long")
    if mode == "pad":
        side = max(width, height)
        square = Image.new("RGB", (side, side), PAD_COLOR)
        square.paste(image, ((side - width) // 2, (side - height) // 2))
        image = square.resize((size, size), Image.Resampling.BICUBIC)
    elif mode == "crop":
        short = min(width, height)
        image = image.resize(
            (size * width // short, size * height // short), Image.Resampling.BICUBIC
        )
        left, top = (image.width - size) // 2, (image.height - size) // 2
        image = image.crop((left, top, left + size, top + size))
    else:
        raise ValueError(f"mode {mode!r} is unknown: pad or crop")
    channels = np.ascontiguousarray(np.asarray(image).transpose(2, 0, 1))  # (3, H, W) uint8
    return torch.from_numpy(
        np.stack([NORMALISED[c][channels[c]] for c in range(3)])
    )  # (3, H, W) float32


def find_picture(names, roots):
    """(path, name relative to its root) of the first of `names` that is a file inside one of the folders `roots`. BadRow."""
    outside = False
    for root in roots:
        for name in names:
            path = os.path.join(root, name)
            if "\0" in name or not os.path.isfile(path):
                continue
            if (
                os.path.isabs(name)
                or ".." in name.split("/")
                or os.path.commonpath((root, os.path.realpath(path))) != root
            ):  # by .., an absolute path or a link
                outside = True
                continue
            return Path(path), os.path.normpath(name)
    raise BadRow("picture outside the image folder" if outside else "picture missing")
