"""DICOM pictures, for open_image: pixels only. No tag, no name and no library's message leaves this file, because any of them may name a patient.

Needs pydicom (pip install pydicom); compressed files also pylibjpeg with pylibjpeg-libjpeg and pylibjpeg-openjpeg. What is burned into the pixels stays.
"""

import logging
import warnings

import numpy as np
from PIL import Image


class TooManyPixels(ValueError):
    """A picture that would fill the memory: its few bytes on disk are taken for a bomb."""


def has_window(dataset):
    """True when centre and width are both there as numbers, the width at least 1: de-identified files may have empty ones."""
    try:
        first = [
            float(value if isinstance(value, (int, float, str)) else value[0])
            for value in (dataset.WindowCenter, dataset.WindowWidth)
        ]
        return bool(np.isfinite(first).all() and first[1] >= 1)
    except Exception:
        return False


def dicom_image(source, frame=0, window=None):
    """A PIL image, 8 bits, of a DICOM file (path or binary file): one frame. ValueError without a word from the file.

    window: (low, high) in the units of the file (HU for CT); "range": its 0.5 and 99.5 percentiles; None: the file's own window or table, else as "range".
    """
    try:
        import pydicom
        from pydicom.pixels import apply_color_lut, apply_modality_lut, apply_voi_lut, pixel_array
    except ImportError:
        raise ValueError("it is a DICOM file: pip install pydicom") from None
    logging.getLogger("pydicom").setLevel(logging.CRITICAL + 1)  # its messages quote values
    with warnings.catch_warnings(action="ignore"):  # so do its warnings
        try:
            dataset = pydicom.dcmread(source, force=True)
            n_pixels = int(dataset.Rows) * int(dataset.Columns)
            kind, n_frames, colours = (
                str(dataset.PhotometricInterpretation),
                int(dataset.get("NumberOfFrames") or 1),
                int(dataset.SamplesPerPixel),
            )
        except Exception:
            raise ValueError("no readable DICOM picture in it") from None
        if n_pixels > Image.MAX_IMAGE_PIXELS:
            raise TooManyPixels(f"{n_pixels} pixels: taken for a decompression bomb")
        if not 0 <= frame < n_frames:
            raise ValueError(f"it has {n_frames} frames, no frame {frame}")
        try:
            array = pixel_array(dataset, index=frame)  # (H, W) or (H, W, 3), YBR already as RGB
            if kind == "PALETTE COLOR":
                array = apply_color_lut(array, dataset)
                return Image.fromarray(
                    (array >> 8).astype(np.uint8) if array.dtype.itemsize > 1 else array
                )
            if array.ndim == 3 or colours == 3:
                return Image.fromarray(
                    (array >> max(0, int(dataset.BitsStored) - 8)).astype(np.uint8)
                    if array.dtype.itemsize > 1
                    else array
                )
            array = apply_modality_lut(array, dataset)
            if window is None and (has_window(dataset) or dataset.get("VOILUTSequence")):
                ends = np.array(
                    [-(2**31), 2**31 - 1]
                )  # what lies below and above every window: the ends of the grey scale
                array, (low, high) = (
                    apply_voi_lut(array, dataset),
                    map(float, apply_voi_lut(ends, dataset)),
                )
            else:
                low, high = (
                    np.percentile(array, [0.5, 99.5]) if window in (None, "range") else window
                )
            grey = np.clip((array.astype(np.float64) - low) / (high - low or 1), 0, 1)
        except Exception:
            raise ValueError(
                "the DICOM picture does not decode (compressed ones need pip install pylibjpeg pylibjpeg-libjpeg pylibjpeg-openjpeg)"
            ) from None
    return Image.fromarray(np.uint8(np.rint(255 * (1 - grey if kind == "MONOCHROME1" else grey))))
