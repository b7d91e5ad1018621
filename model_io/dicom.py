"""DICOM pictures, for open_image: pixels only. No tag, no name and no library's message leaves this
file, because any of them may name a patient.

Needs pydicom (pip install pydicom); compressed files also pylibjpeg with pylibjpeg-libjpeg and
pylibjpeg-openjpeg. What is burned into the pixels stays.
"""

import logging
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from PIL import Image


class TooManyPixels(ValueError):
    """A picture that would fill the memory: its few bytes on disk are taken for a bomb."""


@dataclass
class Shape:
    """What the tags of a file say about its pixels."""

    kind: str  # PhotometricInterpretation
    n_pixels: int
    n_frames: int
    n_colours: int


def shape_of(dataset: Any) -> Shape:
    """The Shape of a pydicom dataset. Raises what pydicom raises where a tag is missing."""
    return Shape(
        kind=str(dataset.PhotometricInterpretation),
        n_pixels=int(dataset.Rows) * int(dataset.Columns),
        n_frames=int(dataset.get("NumberOfFrames") or 1),
        n_colours=int(dataset.SamplesPerPixel),
    )


def first_number(value: Any) -> float:
    """A tag's number, the first where it holds several. Raises where it holds none."""
    if not isinstance(value, (int, float, str)):
        value = value[0]
    return float(value)


def has_window(dataset: Any) -> bool:
    """True when centre and width are both there as numbers, the width at least 1: de-identified
    files may have empty ones."""
    try:
        centre = first_number(dataset.WindowCenter)
        width = first_number(dataset.WindowWidth)
    except Exception:
        return False
    return bool(np.isfinite(centre) and np.isfinite(width) and width >= 1)


def high_byte(array: np.ndarray, n_low_bits: int) -> np.ndarray:
    """uint8 of an array of bytes, or of wider numbers without their n_low_bits."""
    if array.dtype.itemsize == 1:
        return array
    return (array >> n_low_bits).astype(np.uint8)


def windowed(
    dataset: Any, array: np.ndarray, window: tuple[float, float] | str | None
) -> np.ndarray:
    """float64 (H, W), 0 to 1, of pixels in the units of the file; window as in dicom_image."""
    from pydicom.pixels.processing import apply_voi_lut

    if window is None and (has_window(dataset) or dataset.get("VOILUTSequence")):
        # what lies below and above every window: the ends of the grey scale
        ends = np.array([-(2**31), 2**31 - 1])
        array = apply_voi_lut(array, dataset)
        low, high = (float(end) for end in apply_voi_lut(ends, dataset))
    elif window is None or isinstance(window, str):
        low, high = np.percentile(array, [0.5, 99.5])
    else:
        low, high = window
    return np.clip((array.astype(np.float64) - low) / (high - low or 1), 0, 1)


def frame_image(
    dataset: Any, shape: Shape, frame: int, window: tuple[float, float] | str | None
) -> Image.Image:
    """A PIL image, 8 bits, of one frame. Raises what the decoders raise."""
    from pydicom.pixels.processing import apply_color_lut, apply_modality_lut
    from pydicom.pixels.utils import pixel_array

    array = pixel_array(dataset, index=frame)  # (H, W) or (H, W, 3), YBR already as RGB
    if shape.kind == "PALETTE COLOR":
        array = apply_color_lut(array, dataset)
        return Image.fromarray(high_byte(array, 8))
    if array.ndim == 3 or shape.n_colours == 3:
        n_low_bits = max(0, int(dataset.BitsStored) - 8)
        return Image.fromarray(high_byte(array, n_low_bits))
    grey = windowed(dataset, apply_modality_lut(array, dataset), window)
    if shape.kind == "MONOCHROME1":
        grey = 1 - grey
    return Image.fromarray(np.uint8(np.rint(255 * grey)))


def dicom_image(
    source: str | Path | BinaryIO,
    frame: int = 0,
    window: tuple[float, float] | str | None = None,
) -> Image.Image:
    """A PIL image, 8 bits, of a DICOM file (path or binary file): one frame. ValueError without a
    word from the file.

    window: (low, high) in the units of the file (HU for CT); "range": its 0.5 and 99.5 percentiles;
    None: the file's own window or table, else as "range".
    """
    try:
        import pydicom
        import pydicom.pixels
    except ImportError:
        raise ValueError("it is a DICOM file: pip install pydicom") from None
    # its messages quote values
    logging.getLogger("pydicom").setLevel(logging.CRITICAL + 1)
    # so do its warnings
    with warnings.catch_warnings(action="ignore"):
        try:
            dataset = pydicom.dcmread(source, force=True)
            shape = shape_of(dataset)
        except Exception:
            raise ValueError("no readable DICOM picture in it") from None
        limit = Image.MAX_IMAGE_PIXELS
        if limit is not None and shape.n_pixels > limit:
            raise TooManyPixels(f"{shape.n_pixels} pixels: taken for a decompression bomb")
        if not 0 <= frame < shape.n_frames:
            raise ValueError(f"it has {shape.n_frames} frames, no frame {frame}")
        try:
            return frame_image(dataset, shape, frame, window)
        except Exception:
            raise ValueError(
                "the DICOM picture does not decode (compressed ones need pip install pylibjpeg "
                "pylibjpeg-libjpeg pylibjpeg-openjpeg)"
            ) from None
