"""Promise: every kind of picture in the field is read right, DICOM with its window, and nothing of
a DICOM but its pixels comes out.
"""

import json
import subprocess
import sys

import numpy as np
import pydicom
import pytest
from conftest import ROOT
from PIL import Image
from pydicom.dataset import FileDataset, FileMetaDataset
from pydicom.pixels import apply_modality_lut, apply_voi_lut
from pydicom.uid import ExplicitVRLittleEndian, generate_uid
from raw_sets import write_table

from model_io.dicom import dicom_image
from model_io.pixels import open_image

SECRETS = ["SECRET^PATIENT", "SECRET-ID-77", "SECRET HOSPITAL", "19700101"]


def dicom(path, pixels, kind="MONOCHROME2", **tags):
    """A DICOM file of an array, (H, W), (H, W, 3) or with frames first, with a patient's name in
    it.
    """
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID, meta.TransferSyntaxUID = (
        "1.2.840.10008.5.1.4.1.1.2",
        generate_uid(),
        ExplicitVRLittleEndian,
    )
    data = FileDataset(str(path), {}, file_meta=meta, preamble=b"\0" * 128)
    data.PatientName, data.PatientID, data.InstitutionName, data.PatientBirthDate = SECRETS
    data.SamplesPerPixel = 3 if kind in ("RGB", "YBR_FULL") else 1
    data.PhotometricInterpretation = kind
    frames = tags.pop("frames", None)
    shape = pixels.shape[1:] if frames else pixels.shape
    data.Rows, data.Columns = shape[:2]
    if frames:
        data.NumberOfFrames = frames
    data.BitsAllocated = data.BitsStored = pixels.dtype.itemsize * 8
    data.HighBit, data.PixelRepresentation = data.BitsStored - 1, int(pixels.dtype.kind == "i")
    if data.SamplesPerPixel == 3:
        data.PlanarConfiguration = 0
    for name, value in tags.items():
        setattr(data, name, value)
    data.PixelData = pixels.tobytes()
    data.save_as(path, enforce_file_format=True)
    return path


GREY = (np.arange(64 * 48).reshape(48, 64) * 3 % 3000).astype(np.int16)


@pytest.mark.parametrize("window", [(40, 400), (600, 1500), ([40, 500], [400, 2000])])
def test_the_files_own_window(tmp_path, window):
    """Equal to pydicom's own windowing, stretched to 0 to 255; of several windows the first."""
    path = dicom(
        tmp_path / "ct.dcm",
        GREY,
        RescaleSlope=1,
        RescaleIntercept=-1024,
        WindowCenter=window[0],
        WindowWidth=window[1],
    )
    data = pydicom.dcmread(path)
    expected = apply_voi_lut(apply_modality_lut(data.pixel_array, data), data)
    low, high = (
        -32768 - 1024,
        32767 - 1024,
    )  # what pydicom maps a window of a signed 16-bit picture with this intercept to
    expected = np.rint(255 * (expected - low) / (high - low))
    for image in (dicom_image(path).convert("RGB"), open_image(path)):
        assert np.abs(np.asarray(image)[..., 0] - expected).max() <= 1
    centre, width = np.atleast_1d(window[0])[0], np.atleast_1d(window[1])[0]
    values = np.asarray(open_image(path))[..., 0]
    assert (values[GREY - 1024 <= centre - width / 2 - 1] == 0).all() and (
        values[GREY - 1024 >= centre + width / 2] == 255
    ).all()


def test_other_windows(tmp_path):
    path = dicom(tmp_path / "x.dcm", GREY)
    low, high = np.percentile(GREY, [0.5, 99.5])
    assert np.array_equal(
        np.asarray(dicom_image(path)),
        np.rint(255 * np.clip((GREY - low) / (high - low), 0, 1)).astype(np.uint8),
    )
    assert np.asarray(dicom_image(path, window=(0, 2999)))[0, 1] == np.rint(255 * 3 / 2999)
    inverse = dicom(tmp_path / "y.dcm", GREY, "MONOCHROME1")
    assert (
        np.abs(
            255 - np.asarray(dicom_image(inverse)).astype(int) - np.asarray(dicom_image(path))
        ).max()
        <= 1
    )
    flat = dicom(tmp_path / "z.dcm", np.full((8, 8), 7, dtype=np.uint16))
    assert np.asarray(dicom_image(flat)).shape == (8, 8)


@pytest.mark.parametrize(
    "tags",
    [
        {"WindowCenter": "", "WindowWidth": ""},
        {"WindowCenter": 40},
        {"WindowCenter": 40, "WindowWidth": 0},
        {"WindowCenter": None, "WindowWidth": 5},
    ],
)
def test_a_window_that_is_none(tmp_path, tags):
    """Empty, half or of width 0, as de-identified files have it: the range of the pixels, not a
    grey sheet.
    """
    path = dicom(tmp_path / "x.dcm", GREY, **tags)
    assert (
        np.array_equal(np.asarray(dicom_image(path)), np.asarray(dicom_image(path, window="range")))
        and np.asarray(dicom_image(path)).std() > 50
    )


def test_colours_and_frames(tmp_path):
    rgb = np.zeros((16, 20, 3), dtype=np.uint8)
    rgb[:, :10] = (200, 30, 60)
    assert np.array_equal(np.asarray(open_image(dicom(tmp_path / "rgb.dcm", rgb, "RGB"))), rgb)
    deep = rgb.astype(np.uint16) * 16  # 12 bits of 16
    assert np.array_equal(
        np.asarray(
            open_image(dicom(tmp_path / "deep.dcm", deep, "RGB", BitsStored=12, HighBit=11))
        ),
        rgb,
    )
    ybr = np.asarray(Image.fromarray(rgb).convert("YCbCr"))
    assert (
        np.abs(
            np.asarray(open_image(dicom(tmp_path / "ybr.dcm", ybr, "YBR_FULL"))).astype(int) - rgb
        ).max()
        <= 2
    )
    frames = np.stack(
        [np.full((10, 12), 50, np.uint8), np.arange(120, dtype=np.uint8).reshape(10, 12)]
    )
    path = dicom(tmp_path / "cine.dcm", frames, frames=2)
    assert np.asarray(dicom_image(path, frame=1, window=(0, 119)))[9, 11] == 255 and open_image(
        path
    ).size == (12, 10)


def test_nothing_but_pixels_comes_out(tmp_path):
    """Through build: good and damaged files. No tag's value in any PNG, JSON, log or message,
    damaged or not.
    """
    images = tmp_path / "images"
    images.mkdir()
    dicom(images / "good.dcm", GREY)
    dicom(images / "two.dcm", GREY[:, :32].copy())
    whole = (images / "good.dcm").read_bytes()
    (images / "cut.dcm").write_bytes(whole[:-500])
    (images / "tag.dcm").write_bytes(whole.replace(b"MONOCHROME2 ", b"SECRET HOSPI"))
    (images / "noname").write_bytes(whole)  # no suffix: known by its mark
    bad = pydicom.dcmread(images / "good.dcm")
    bad.WindowCenter, bad.WindowWidth = "40", "400"
    bad.save_as(images / "window.dcm")
    (images / "window.dcm").write_bytes(
        (images / "window.dcm").read_bytes().replace(b"400 ", b"4^A ")
    )
    names = ["good.dcm", "cut.dcm", "tag.dcm", "noname", "window.dcm", "good.dcm;two.dcm"]
    write_table(
        tmp_path / "own.csv",
        ["image", "caption"],
        [[name, f"第{i}例CT图像所见"] for i, name in enumerate(names)],
    )
    done = subprocess.run(
        [
            sys.executable,
            "-W",
            "always",
            ROOT / "data_prep.py",
            "build",
            "--own",
            tmp_path / "own.csv",
            "--images",
            images,
            "--out",
            tmp_path / "out",
        ],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "out/alignment.json").read_text())
    assert [row["image"] for row in rows][:2] == ["good.dcm.png", "noname.png"] and rows[-1][
        "image"
    ].startswith("composites/good")
    with Image.open(tmp_path / "out/images/good.dcm.png") as png:
        assert (
            png.format == "PNG"
            and not png.info
            and np.array_equal(np.asarray(png), np.asarray(open_image(images / "good.dcm")))
        )
    said = [
        done.stdout.encode(),
        done.stderr.encode(),
        *(path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()),
    ]
    assert len(said) > 5 and not any(secret.encode() in text for text in said for secret in SECRETS)
    done = subprocess.run(
        [
            sys.executable,
            "-W",
            "always",
            ROOT / "data_prep.py",
            "check",
            tmp_path / "out/alignment.json",
            "--images",
            tmp_path / "out/images",
        ],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I;16", "I"])
def test_every_mode_becomes_rgb(tmp_path, mode):
    """A grey ramp saved in each mode is that ramp again: palettes looked up, CMYK converted, 16
    bits by their high byte, alpha dropped.
    """
    ramp = np.tile(np.arange(0, 256, 4, dtype=np.uint8), (16, 1))
    if mode in ("I;16", "I"):
        image = (
            Image.fromarray(ramp.astype(np.uint16) * 256 + 99)
            if mode == "I;16"
            else Image.fromarray(ramp.astype(np.int32) * 256 + 99)
        )
    else:
        image = (
            Image.fromarray(ramp).convert("RGB").convert(mode)
            if mode == "CMYK"
            else Image.fromarray(ramp).convert(mode)
        )
    path = tmp_path / ("x.tif" if mode in ("CMYK", "I") else "x.png")
    image.save(path)
    read = np.asarray(open_image(path))
    assert read.shape == (16, 64, 3)
    if mode == "1":
        assert set(np.unique(read)) == {0, 255}
    else:
        assert np.abs(read.astype(int) - ramp[..., None]).max() <= (8 if mode == "P" else 1)


def test_rotated_and_animated(tmp_path):
    image = Image.new("RGB", (40, 20), (255, 0, 0))
    image.paste((0, 0, 255), (0, 0, 20, 20))  # blue on the left
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise
    image.save(tmp_path / "turned.png", exif=exif)
    turned = open_image(tmp_path / "turned.png")
    assert turned.size == (20, 40) and turned.getpixel((10, 5)) == (0, 0, 255)
    image.save(
        tmp_path / "moving.gif", save_all=True, append_images=[Image.new("RGB", (40, 20))] * 3
    )
    first = np.asarray(open_image(tmp_path / "moving.gif")).astype(int)
    assert (
        np.abs(first[10, 5] - (0, 0, 255)).max() < 8
        and np.abs(first[10, 35] - (255, 0, 0)).max() < 8
    )
