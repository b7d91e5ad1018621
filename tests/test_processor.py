"""Promise: pictures reach a model as its files say, pixel for pixel what transformers makes of
them, and a model that wants them otherwise is refused by name; an export says what came in.
"""

import json

import numpy as np
import pytest
import torch
from conftest import edit_json, in_process, make_qilin, run
from PIL import Image
from safetensors.torch import load_file
from test_layouts import TEXT, VISION, write_clip, write_original
from transformers import AutoImageProcessor

import convert
import qilin_min as q
import train
from model_io.export import save_qilin
from model_io.load import load_qilin, read_checkpoint
from model_io.pixels import CLIP_MEAN, CLIP_STD, preprocess_image
from model_io.tokens import Tokenizer

SIDE = 56
SQUARE = {"height": SIDE, "width": SIDE}
EDGE = {"shortest_edge": SIDE}
# preprocessor_config.json of llava-hf/llava-1.5-7b-hf, for a smaller tower
OFFICIAL = {
    "crop_size": SQUARE,
    "do_center_crop": True,
    "do_convert_rgb": True,
    "do_normalize": True,
    "do_rescale": True,
    "do_resize": True,
    "image_mean": list(CLIP_MEAN),
    "image_processor_type": "CLIPImageProcessor",
    "image_std": list(CLIP_STD),
    "processor_class": "LlavaProcessor",
    "resample": 3,
    "rescale_factor": 0.00392156862745098,
    "size": EDGE,
}
LLAVA = OFFICIAL | {"image_processor_type": "LlavaImageProcessor"}
# as CLIP's own folder spells it
OLD = {"feature_extractor_type": "CLIPFeatureExtractor", "size": SIDE, "crop_size": SIDE}
UNCROPPED = {"size": SQUARE, "do_center_crop": False}
PROCESSORS = [
    (OFFICIAL, "crop"),
    (OFFICIAL | {"do_pad": True}, "crop"),
    (OFFICIAL | {"image_processor_type": "CLIPImageProcessorFast"}, "crop"),
    (LLAVA | {"do_pad": False}, "crop"),
    (LLAVA | {"do_pad": True}, "pad"),
    (LLAVA | {"do_pad": True} | UNCROPPED, "pad"),
    (LLAVA | {"do_pad": True, "image_processor_type": "LlavaImageProcessorFast"}, "pad"),
    (OLD, "crop"),
]


@pytest.fixture
def picture(tmp_path):
    values = np.random.default_rng(0).integers(0, 256, (61, 40, 3), dtype=np.uint8)
    Image.fromarray(values).save(tmp_path / "picture.png")
    return tmp_path / "picture.png"


@pytest.fixture
def folder(tmp_path):
    """A llava-hf folder whose config.json says nothing of pictures, as the published ones."""
    save_qilin(make_qilin(), None, tmp_path / "model")
    edit_json(tmp_path / "model/config.json", image_aspect_ratio=None)
    for name in ("preprocessor_config.json", "processor_config.json"):
        (tmp_path / "model" / name).unlink()
    return tmp_path / "model"


def our_pixels(folder, picture):
    return preprocess_image(picture, SIDE, load_qilin(folder).config.image_mode)


def their_pixels(folder, picture):
    processor = AutoImageProcessor.from_pretrained(folder, backend="pil")
    return processor(Image.open(picture), return_tensors="pt")["pixel_values"][0]


@pytest.mark.parametrize("is_nested", [False, True])
@pytest.mark.parametrize("raw, mode", PROCESSORS)
def test_pixels_are_those_of_transformers(raw, mode, is_nested, folder, picture):
    """In preprocessor_config.json, or inside processor_config.json as transformers 5 saves it."""
    if is_nested:
        (folder / "processor_config.json").write_text(json.dumps({"image_processor": raw}))
    else:
        (folder / "preprocessor_config.json").write_text(json.dumps(raw))
    assert load_qilin(folder).config.image_mode == mode
    assert torch.equal(our_pixels(folder, picture), their_pixels(folder, picture))


def test_the_two_modes_differ(picture):
    """Else the test above would hold whatever is read."""
    pad = preprocess_image(picture, SIDE, "pad")
    assert not torch.equal(pad, preprocess_image(picture, SIDE, "crop"))


@pytest.mark.parametrize("mode", ["pad", "crop"])
def test_the_mode_goes_out_and_comes_back(mode, picture, tmp_path):
    model = make_qilin()
    model.config.image_mode = mode
    save_qilin(model, None, tmp_path / "out")
    in_process(convert.main, tmp_path / "out", tmp_path / "again", code=0)
    for folder in (tmp_path / "out", tmp_path / "again"):
        assert load_qilin(folder).config.image_mode == mode
        assert q.load_llava_hf(folder).config.image_mode == mode
        assert torch.equal(their_pixels(folder, picture), preprocess_image(picture, SIDE, mode))


def test_the_processor_goes_before_the_word(folder, picture, capsys):
    """As in transformers, which does not read the word; the contradiction is said."""
    (folder / "preprocessor_config.json").write_text(json.dumps(OFFICIAL))
    edit_json(folder / "config.json", image_aspect_ratio="pad")
    assert torch.equal(our_pixels(folder, picture), their_pixels(folder, picture))
    said = capsys.readouterr().err
    assert "crop, as preprocessor_config.json" in said and "image_aspect_ratio 'pad'" in said


def test_two_processors_that_differ_are_refused(folder):
    (folder / "preprocessor_config.json").write_text(json.dumps(OFFICIAL))
    nested = {"image_processor": LLAVA | {"do_pad": True}}
    (folder / "processor_config.json").write_text(json.dumps(nested))
    with pytest.raises(ValueError, match="two processors that differ"):
        load_qilin(folder)


@pytest.mark.parametrize(
    "change, culprit",
    [
        ({"image_mean": [0.5, 0.5, 0.5]}, "image_mean"),
        ({"image_std": [0.5, 0.5, 0.5]}, "image_std"),
        ({"image_mean": 0.5}, "image_mean"),
        ({"resample": 2}, "resample"),
        ({"rescale_factor": 1 / 127.5}, "rescale_factor"),
        ({"do_normalize": False}, "do_normalize"),
        ({"do_resize": False}, "do_resize"),
        ({"size": {"shortest_edge": 72}}, "size"),
        ({"size": SQUARE}, "size"),
        ({"size": 224}, "size"),
        ({"crop_size": {"height": 48, "width": 48}}, "crop_size"),
        ({"do_center_crop": False}, "do_center_crop False"),
        (UNCROPPED, "do_center_crop False"),
        ({"size": None}, "size"),
        ({"image_processor_type": "SiglipImageProcessor"}, "SiglipImageProcessor"),
        ({"image_processor_type": "LlavaNextImageProcessor"}, "LlavaNextImageProcessor"),
    ],
)
def test_other_pixels_are_refused(change, culprit, folder):
    (folder / "preprocessor_config.json").write_text(json.dumps(OFFICIAL | change))
    done = in_process(convert.main, "info", folder, code=2)
    assert f"{folder}/preprocessor_config.json: " in done.stderr and culprit in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


@pytest.mark.parametrize(
    "change, culprit",
    [
        ({"image_aspect_ratio": "anyres"}, "image_aspect_ratio = 'anyres'"),
        ({"image_aspect_ratio": "anyres_max_9"}, "anyres_max_9"),
        ({"mm_patch_merge_type": "spatial_unpad"}, "mm_patch_merge_type = 'spatial_unpad'"),
        ({"mm_resampler_type": "spatial_pool"}, "mm_resampler_type = 'spatial_pool'"),
        ({"s2": True}, "s2 = True"),
    ],
)
def test_layouts_of_later_llavas_are_refused(change, culprit, folder):
    edit_json(folder / "config.json", **change)
    with pytest.raises(ValueError, match=culprit):
        load_qilin(folder)
    with pytest.raises(ValueError, match=culprit):
        q.load_llava_hf(folder)


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    folder = tmp_path_factory.mktemp("reference") / "out"
    save_qilin(make_qilin("mlp2x_gelu", TEXT, VISION, n_token_ids=320), None, folder)
    return folder, load_file(folder / "model.safetensors"), None, "mlp2x_gelu"


@pytest.mark.parametrize(
    "word, mode", [("pad", "pad"), ("square", "crop"), (None, "crop"), ("anyres", None)]
)
def test_the_original_layout(word, mode, reference, tmp_path):
    """llava/mm_utils.py, process_images: pad pads, anyres is another model's, and whatever else is
    said, or nothing, goes to CLIP's own processor."""
    folder = write_original(tmp_path / "ckpt", reference, False, "clip")
    clip = write_clip(tmp_path / "ckpt/clip", reference)
    (clip / "preprocessor_config.json").write_text(json.dumps(OLD))
    edit_json(folder / "config.json", image_aspect_ratio=word, mm_patch_merge_type="flat")
    if mode is None:
        with pytest.raises(ValueError, match="image_aspect_ratio = 'anyres'"):
            load_qilin(folder)
        return
    assert load_qilin(folder).config.image_mode == mode
    in_process(convert.main, folder, tmp_path / "dst", code=0)
    assert load_qilin(tmp_path / "dst").config.image_mode == mode


def test_a_tower_that_wants_other_pixels_is_refused(reference, tmp_path, llama_folder):
    clip = write_clip(tmp_path / "clip", reference)
    (clip / "preprocessor_config.json").write_text(json.dumps(OLD | {"image_std": [1, 1, 1]}))
    with pytest.raises(ValueError, match="clip/preprocessor_config.json: image_std"):
        load_qilin(llm=llama_folder, vision=clip)
    done = in_process(convert.main, "info", clip, code=2)
    assert "clip/preprocessor_config.json: image_std" in done.stderr


def test_parts_pad(reference, tmp_path, llama_folder):
    clip = write_clip(tmp_path / "clip", reference)
    (clip / "preprocessor_config.json").write_text(json.dumps(OLD))
    assert read_checkpoint(llm=llama_folder, vision=clip).config.image_mode == "pad"


@pytest.fixture(scope="module")
def cropping(toy, tmp_path_factory):
    """A whole model of the toy world that was trained with pictures cropped."""
    model = load_qilin(llm=toy / "llama", vision=toy / "clip")
    model.config.image_mode = "crop"
    out = tmp_path_factory.mktemp("cropping") / "model"
    save_qilin(model, Tokenizer(toy / "llama"), out)
    return out


@pytest.mark.parametrize("words, mode", [((), "crop"), (("--image-mode", "pad"), "pad")])
def test_training_goes_on_as_the_model_was_trained(words, mode, cropping, toy):
    command = ["--stage", "2", "--data", str(toy / "mixed.json"), *words]
    settings = train.read_settings([*command, "--model", str(cropping)])
    assert settings is not None and settings.image_mode == mode
    parts = ["--llm", str(toy / "llama"), "--vision", str(toy / "clip"), "--projector", "fresh"]
    settings = train.read_settings([*command, *parts])
    assert settings is not None and settings.image_mode == "pad"


def test_another_mode_is_said_and_goes_out(cropping, toy, tmp_path):
    options = ("--model", cropping, "--image-mode", "pad", "--max-steps", "1", "--batch-size", "2")
    done = run(toy, tmp_path / "out", *options, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "was trained with pictures made square by crop" in done.stderr
    assert load_qilin(tmp_path / "out").config.image_mode == "pad"
