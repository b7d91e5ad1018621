"""Pixels are, bit for bit, those of transformers' PIL processors for CLIP and LLaVA, for upright
8-bit copies of any picture.
"""

import numpy as np
import pytest
import torch
from PIL import Image
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

from model_io.pixels import preprocess_image

SQUARE = {"height": 336, "width": 336}
SHAPES = {
    "tall": (500, 300),
    "wide": (211, 640),
    "odd": (101, 38),
    "odd pair": (38, 101),
    "tiny": (3, 2),
    "pixel": (1, 1),
    "line": (1, 50),
    "square": (400, 400),
    "exact": (336, 336),
    "large": (1400, 1801),
}


def scan(height, width, channels=3, seed=0):
    """Smooth structure, noise and full range, so that rounding and clipping of the resize both
    show.
    """
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width]
    wave = (
        128
        + 150 * np.sin(y / 7)[..., None] * np.cos(x / 11)[..., None]
        + rng.normal(0, 40, (height, width, channels))
    )
    return (
        wave.clip(0, 255).astype(np.uint8).squeeze(-1)
        if channels == 1
        else wave.clip(0, 255).astype(np.uint8)
    )


def padded(array):
    """The picture, (H, W) or (H, W, 3), in the middle of a square of the mean colour; the odd pixel
    at the bottom or right.
    """
    array = array if array.ndim == 3 else np.repeat(array[..., None], 3, 2)
    height, width = array.shape[:2]
    side = max(height, width)
    square = np.empty((side, side, 3), np.uint8)
    square[:] = (122, 116, 104)
    top, left = (side - height) // 2, (side - width) // 2
    square[top : top + height, left : left + width] = array
    return square


def clip_pixels(array):
    processor = CLIPImageProcessorPil(size=SQUARE, do_center_crop=False)
    return processor(Image.fromarray(array), return_tensors="pt")["pixel_values"][0]


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("shape", SHAPES)
def test_pad(shape, channels, report):
    array = scan(*SHAPES[shape], channels)
    image = Image.fromarray(array)
    got = preprocess_image(image)
    assert got.shape == (3, 336, 336) and got.dtype == torch.float32 and got.is_contiguous()
    want = clip_pixels(padded(array))
    llava = LlavaImageProcessorPil(do_pad=True, size=SQUARE, do_center_crop=False)(
        image, return_tensors="pt"
    )["pixel_values"][0]
    name = f"pixels, pad ({shape}, {('grey', 'RGB')[channels // 3]})"
    report(name, max((got - want).abs().max(), (got - llava).abs().max()), 0)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("shape", [s for s in SHAPES if s not in ("line",)])
def test_crop(shape, channels, report):
    image = Image.fromarray(scan(*SHAPES[shape], channels))
    processor = CLIPImageProcessorPil(size={"shortest_edge": 336}, crop_size=SQUARE)
    want = processor(image, return_tensors="pt")["pixel_values"][0]
    report(
        f"pixels, crop ({shape}, {('grey', 'RGB')[channels // 3]})",
        (preprocess_image(image, mode="crop") - want).abs().max(),
        0,
    )


def test_other_sizes():
    image = Image.fromarray(scan(61, 40))
    assert torch.equal(
        preprocess_image(image, size=56),
        LlavaImageProcessorPil(do_pad=True, size={"height": 56, "width": 56}, do_center_crop=False)(
            image, return_tensors="pt"
        )["pixel_values"][0],
    )
    with pytest.raises(ValueError, match="mode"):
        preprocess_image(image, mode="stretch")


@pytest.mark.parametrize(
    "orientation, turn",
    [
        (1, lambda a: a),
        (2, lambda a: a[:, ::-1]),
        (3, lambda a: np.rot90(a, 2)),
        (4, lambda a: a[::-1]),
        (6, lambda a: np.rot90(a, -1)),
        (8, lambda a: np.rot90(a, 1)),
    ],
)
def test_exif_orientation(orientation, turn, tmp_path):
    array = scan(40, 61)
    image = Image.fromarray(array)
    exif = image.getexif()
    exif[0x0112] = orientation
    image.save(tmp_path / "turned.png", exif=exif)
    assert torch.equal(
        preprocess_image(tmp_path / "turned.png"),
        clip_pixels(padded(np.ascontiguousarray(turn(array)))),
    )


@pytest.mark.parametrize("suffix", ["png", "tiff"])
def test_16_bit_grey_keeps_the_high_byte(suffix, tmp_path):
    array = np.random.default_rng(0).integers(0, 65536, (45, 70), dtype=np.uint16)
    Image.fromarray(array).save(tmp_path / f"ct.{suffix}")
    want = clip_pixels(padded((array // 256).astype(np.uint8)))
    assert torch.equal(preprocess_image(tmp_path / f"ct.{suffix}"), want)
    assert torch.equal(
        preprocess_image(Image.fromarray(array.astype(np.int32))), want
    )  # mode I, as older Pillows open such files


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK", "YCbCr"])
def test_other_modes_are_converted_as_pil_does(mode):
    image = Image.fromarray(scan(50, 33)).convert(mode)
    if mode == "RGBA":
        image.putalpha(Image.fromarray(scan(50, 33, 1)))
    assert torch.equal(preprocess_image(image), clip_pixels(padded(np.array(image.convert("RGB")))))


def test_damaged_exif_is_one_error(tmp_path):
    image = Image.fromarray(scan(40, 61))
    exif = image.getexif()
    exif[0x0112], exif[0x010F] = 6, "maker"
    image.save(tmp_path / "a.jpg", exif=exif)
    whole, start = (
        (tmp_path / "a.jpg").read_bytes(),
        (tmp_path / "a.jpg").read_bytes().index(b"Exif"),
    )
    for i in range(start, start + 60):
        (tmp_path / "b.jpg").write_bytes(whole[:i] + b"\0" + whole[i + 1 :])
        try:
            assert preprocess_image(tmp_path / "b.jpg").isfinite().all()
        except ValueError as error:
            assert "b.jpg" in str(error)


@pytest.mark.parametrize("mode", ["pad", "crop"])
def test_a_line_is_refused_before_it_takes_the_memory(mode, tmp_path):
    Image.fromarray(np.zeros((1, 100_000), np.uint8)).save(tmp_path / "line.png")
    with pytest.raises(ValueError, match="line.png.*100000 x 1"):
        preprocess_image(tmp_path / "line.png", mode=mode)


def test_float_pixels_are_refused(tmp_path):
    Image.fromarray(np.random.default_rng(0).random((20, 20), dtype=np.float32)).save(
        tmp_path / "float.tiff"
    )
    with pytest.raises(ValueError, match="float.tiff.*8 or 16 bits"):
        preprocess_image(tmp_path / "float.tiff")


def test_bad_files_are_named(tmp_path):
    whole = tmp_path / "whole.png"
    Image.fromarray(scan(90, 90)).save(whole)
    Image.fromarray(scan(90, 90)).save(tmp_path / "whole.jpg")
    bad = {
        "cut.png": whole.read_bytes()[:900],
        "cut.jpg": (tmp_path / "whole.jpg").read_bytes()[:900],
        "empty.png": b"",
        "text.jpg": b"no picture at all",
        "head.png": whole.read_bytes()[:20],
    }
    for name, content in bad.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=name):
            preprocess_image(tmp_path / name)
    with pytest.raises(FileNotFoundError, match="gone.png"):
        preprocess_image(tmp_path / "gone.png")
