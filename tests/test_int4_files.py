"""A folder in 4 bits holds what quantising at load would make, for every CPU and GPU alike, and is
refused in one line where it is damaged or not ours."""

import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT, make_qilin
from safetensors.torch import load_file, save_file

from model_io.export import save_qilin
from model_io.load import load_qilin
from model_io.lowbit import linear_layers

IDS = torch.tensor([[1, 5, 6, 7, 8, 9]])
LAYER = "language_model.model.layers.0.mlp.down_proj.weight"


@pytest.fixture(scope="module")
def folders(tmp_path_factory, spm_path):
    """(a model, the same saved by convert.py in 4 bits)."""
    folder = tmp_path_factory.mktemp("int4")
    text = dict(hidden_size=128, intermediate_size=256, num_hidden_layers=2)
    save_qilin(make_qilin(text=text), None, folder / "model")
    done = convert(folder / "model", folder / "small", "--quantize", "int4")
    assert done.returncode == 0, done.stderr
    assert "in int4 and float32" in done.stdout and "only qilin-min opens" in done.stdout
    return folder / "model", folder / "small"


def convert(*words):
    command = [sys.executable, "convert.py", *map(str, words)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


@torch.no_grad()
def test_it_answers_as_when_quantised_at_load(folders):
    model, small = folders
    anew = load_qilin(model, quantize="int4")
    for quantize in (None, "int4"):
        saved = load_qilin(small, quantize=quantize)
        assert torch.equal(saved(IDS), anew(IDS))
    with pytest.raises(ValueError, match="small is in 4 bits already: leave --quantize int8 out"):
        load_qilin(small, quantize="int8")


def test_the_bytes_say_what_the_layout_promises(folders):
    """(number - 8) * scale + zero, the even input in the lower half, by numpy."""
    _, small = folders
    tensors = load_file(small / "model.safetensors")
    data = tensors[LAYER].numpy()
    assert data.dtype == np.uint8 and data.shape == (128, 256 // 2)
    numbers = np.stack((data & 15, data >> 4), axis=-1).reshape(128, 256).astype(np.float64)
    scale, zero = (
        tensors[f"{LAYER}_{part}"].double().numpy().repeat(32, axis=1) for part in ("scale", "zero")
    )
    want = (numbers - 8) * scale + zero
    linear = load_qilin(small).model.layers[0].get_submodule("mlp.down_proj")
    np.testing.assert_allclose(linear.dequantize(torch.float32).numpy(), want, atol=1e-6)
    said = json.loads((small / "config.json").read_text())["quantization_config"]
    assert said == {"quant_method": "qilin-min", "bits": 4, "group_size": 32, "layout": 1}


@torch.no_grad()
def test_what_a_kernel_wants_is_never_on_disk(folders, tmp_path):
    """Saved after answering, when the numbers lie in blocks, the files are the same bytes."""
    _, small = folders
    model = load_qilin(small)
    for _, _, linear in linear_layers(model):
        linear(torch.ones(1, 1, linear.shape[1]))
    assert any(linear.is_blocked for _, _, linear in linear_layers(model))
    save_qilin(model, None, tmp_path / "again")
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "again" / name).read_bytes() == (small / name).read_bytes()


def damaged(small, place, change_tensors=None, change_config=None):
    shutil.copytree(small, place)
    tensors = load_file(place / "model.safetensors")
    raw = json.loads((place / "config.json").read_text())
    if change_tensors is not None:
        change_tensors(tensors)
        save_file(tensors, place / "model.safetensors")
    if change_config is not None:
        change_config(raw)
        (place / "config.json").write_text(json.dumps(raw))
    return place


@pytest.mark.parametrize(
    "change_tensors, change_config, said",
    [
        (lambda t: t.pop(LAYER + "_zero"), None, "is in 4 bits, but there is no .*weight_zero"),
        (lambda t: t.update({LAYER + "_scale": torch.ones(3, 3)}), None, r"\[128, 8\] is needed"),
        (lambda t: t[LAYER + "_scale"].fill_(torch.nan), None, "down_proj.* values not finite"),
        (lambda t: t.pop(LAYER), None, "belongs to weights packed"),
        (None, lambda raw: raw["quantization_config"].update(layout=2), "says layout = 2"),
        (None, lambda raw: raw["quantization_config"].update(bits=3), "says bits = 3"),
    ],
)
def test_what_is_damaged_is_refused(folders, tmp_path, change_tensors, change_config, said):
    place = damaged(folders[1], tmp_path / "bad", change_tensors, change_config)
    with pytest.raises(ValueError, match=said):
        load_qilin(place)


@pytest.mark.parametrize("options", [(), ("--gguf", "f16"), ("--quantize", "int4")])
def test_it_is_no_source(folders, tmp_path, options):
    done = convert(folders[1], tmp_path / "out", *options)
    assert done.returncode == 2
    lines = [line for line in done.stderr.splitlines() if line.startswith("convert.py: ")]
    assert lines[-1].startswith("convert.py: ") and not (tmp_path / "out").exists()


def test_info_tells_of_it(folders):
    done = convert("info", folders[1])
    assert done.returncode == 0, done.stderr
    assert "int4" in done.stdout and "opens in    qilin-min alone" in done.stdout
    assert "float32     " not in done.stdout.replace("int4, float32     ", "")
