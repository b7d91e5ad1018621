"""Promise: a further projector is one row of PROJECTORS, by which plan, info, both stages, sampling
and export work; a run whose result could not be exported is refused before its first step."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn as nn
from conftest import ROWS, make_qilin, pictures
from safetensors.torch import load_file, save_file

import qilin_min as q
from model_io.export import save_qilin
from model_io.load import load_qilin, read_checkpoint

ROOT = Path(__file__).resolve().parent.parent
TYPE = "mlp3x_gelu"
LAYERS = {"0": "linear_1", "2": "linear_2", "4": "linear_3"}

# the row, and a command's main as `python SCRIPT words`
DRIVER = """
import importlib, signal, sys
import torch.nn as nn
from common.files import run_cli
from qilin_min import PROJECTORS, HfForm, Projector

def build(vision_size, text_size):
    return nn.Sequential(
        nn.Linear(vision_size, text_size), nn.GELU(),
        nn.Linear(text_size, text_size), nn.GELU(),
        nn.Linear(text_size, text_size),
    )

layers = {layers}
forms = (HfForm(None, layers),) if layers else ()
PROJECTORS["mlp3x_gelu"] = Projector(build, forms)
name = sys.argv.pop(1)
sys.argv[0] = name + ".py"
run_cli(importlib.import_module(name).main)
"""


def build_mlp3x_gelu(vision_size, text_size):
    return nn.Sequential(
        nn.Linear(vision_size, text_size),
        nn.GELU(),
        nn.Linear(text_size, text_size),
        nn.GELU(),
        nn.Linear(text_size, text_size),
    )


@pytest.fixture
def row(monkeypatch):
    """The row for this process."""
    added = q.Projector(build_mlp3x_gelu, (q.HfForm(None, LAYERS),))
    monkeypatch.setitem(q.PROJECTORS, TYPE, added)
    return added


@pytest.fixture
def nameless(monkeypatch):
    """A row that no export can hold."""
    added = q.Projector(build_mlp3x_gelu, hf_forms=())
    monkeypatch.setitem(q.PROJECTORS, TYPE, added)
    return added


def drive(folder, command, *words, layers=LAYERS):
    """`python COMMAND.py words` where the row was added."""
    script = folder / "driver.py"
    script.write_text(DRIVER.replace("{layers}", repr(layers)))
    environment = dict(os.environ, PYTHONPATH=str(ROOT), OMP_NUM_THREADS="1")
    return subprocess.run(
        [sys.executable, str(script), command, *map(str, words)],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )


def train(folder, toy, stage, *words, layers=LAYERS, data="mixed.json"):
    return drive(
        folder,
        "train",
        *("--stage", stage, "--llm", toy / "llama", "--vision", toy / "clip"),
        *("--images", toy / "images", "--data", toy / data, "--out", folder / f"stage{stage}"),
        *("--max-steps", 2, "--batch-size", 4, "--workers", 0, *words),
        layers=layers,
    )


def one_line_of(done):
    """The line on stderr of a command that was refused."""
    assert done.returncode == 2, done.stdout + done.stderr
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1, done.stderr
    return lines[0]


def test_both_stages_info_and_sample_from_one_row(toy, tmp_path):
    done = train(tmp_path, toy, 1, "--projector-type", TYPE)
    assert done.returncode == 0, done.stderr
    file = tmp_path / "stage1/final/projector.safetensors"
    names = {f"model.mm_projector.{i}.{kind}" for i in (0, 2, 4) for kind in ("weight", "bias")}
    assert load_file(file).keys() == names

    # its tensors tell the type
    done = train(tmp_path, toy, 2, "--projector", file)
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "stage2/final"
    assert "multi_modal_projector.linear_3.weight" in load_file(folder / "model.safetensors")
    assert json.loads((folder / "config.json").read_text())["projector_hidden_act"] == TYPE
    card = (folder / "README.md").read_text()
    assert "Only qilin-min opens this folder" in card and "AutoProcessor" not in card

    done = drive(tmp_path, "convert", "info", folder)
    assert done.returncode == 0 and f"projector   {TYPE}" in done.stdout, done.stderr
    done = drive(tmp_path, "convert", "info", file)
    assert done.returncode == 0 and f"projector   {TYPE}: " in done.stdout, done.stderr
    picture = next((toy / "images").iterdir())
    done = drive(tmp_path, "sample", picture, "有什么？", "--model", folder, "--max-new-tokens", 3)
    assert done.returncode == 0, done.stderr


def test_the_plan_counts_its_parameters(toy, tmp_path):
    plans = {}
    for kind in ("linear", TYPE):
        done = train(tmp_path, toy, 1, "--plan", "--projector-type", kind)
        assert done.returncode == 0, done.stderr
        plans[kind] = done.stdout
    assert plans["linear"] != plans[TYPE]
    assert train(tmp_path, toy, 2, "--plan", "--projector-type", TYPE).returncode == 0


def test_what_no_folder_can_hold_is_refused_before_the_first_step(toy, tmp_path):
    """Stage 1 leaves a projector's file, which holds any type; a whole model is a folder."""
    done = train(tmp_path, toy, 1, "--projector-type", TYPE, layers={})
    assert done.returncode == 0, done.stderr
    file = tmp_path / "stage1/final/projector.safetensors"
    for words in ((), ("--lora", 2)):
        line = one_line_of(train(tmp_path, toy, 2, "--projector", file, *words, layers={}))
        assert TYPE in line and "cannot be exported" in line
        assert not (tmp_path / "stage2/log.jsonl").exists()
    parts = ("--llm", toy / "llama", "--vision", toy / "clip", "--projector", file)
    line = one_line_of(drive(tmp_path, "convert", tmp_path / "dst", *parts, layers={}))
    assert "cannot be exported" in line and not (tmp_path / "dst").exists()


def test_a_type_beside_a_projector_of_another_is_refused(toy, tmp_path):
    done = train(tmp_path, toy, 1)
    assert done.returncode == 0, done.stderr
    file = tmp_path / "stage1/final/projector.safetensors"
    given = ("--projector", file, "--projector-type")
    line = one_line_of(train(tmp_path, toy, 2, *given, "mlp2x_gelu"))
    assert "--projector-type mlp2x_gelu" in line and "is linear" in line
    assert not (tmp_path / "stage2/log.jsonl").exists()
    assert train(tmp_path, toy, 2, *given, "linear").returncode == 0


def test_an_export_comes_back_bit_for_bit(row, tmp_path):
    model = make_qilin(TYPE)
    save_qilin(model, None, tmp_path / "out")
    for again in (load_qilin(tmp_path / "out"), q.load_llava_hf(tmp_path / "out")):
        assert again.config.projector_type == TYPE
        ours = dict(model.named_parameters())
        theirs = dict(again.named_parameters())
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(theirs[name][: len(p)], p) for name, p in ours.items())


def test_transformers_refuses_what_it_would_read_wrongly(row, tmp_path):
    from transformers import LlavaForConditionalGeneration

    save_qilin(make_qilin(TYPE), None, tmp_path / "out")
    with pytest.raises(KeyError, match=TYPE):
        LlavaForConditionalGeneration.from_pretrained(tmp_path / "out")


def test_a_model_that_no_folder_can_hold_is_not_saved(nameless, tmp_path):
    model = make_qilin(TYPE)
    assert model(q.pad_rows(ROWS, 0), pictures(3)).isfinite().all()
    with pytest.raises(ValueError, match=f"{TYPE} cannot be exported"):
        save_qilin(model, None, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", ["linear", "mlp2x_gelu", TYPE])
@pytest.mark.parametrize("lost", [None, "bias"])
def test_tensors_tell_their_type_among_three(kind, lost, row, llama_folder, clip_folder, tmp_path):
    """Also when one is missing, which is then named."""
    with torch.device("meta"):
        shapes = {n: p.shape for n, p in q.PROJECTORS[kind].build(64, 64).named_parameters()}
    tensors = {f"mm_projector.{name}": torch.zeros(shape) for name, shape in shapes.items()}
    if lost:
        name = sorted(name for name in tensors if name.endswith(lost))[-1]
        del tensors[name]
    file = tmp_path / "projector.safetensors"
    save_file(tensors, file)
    given = dict(llm=llama_folder, vision=clip_folder, projector=file)
    assert read_checkpoint(**given).config.projector_type == kind
    if lost:
        with pytest.raises(ValueError, match=f"missing {name}"):
            load_qilin(**given)


def test_of_two_types_with_the_same_layers_the_one_asked_for_is_taken(
    monkeypatch, llama_folder, clip_folder, tmp_path
):
    """Tensors do not tell an activation: --projector-type does, or the folder's config.json."""

    def build(vision_size, text_size):
        return nn.Sequential(
            nn.Linear(vision_size, text_size), nn.ReLU(), nn.Linear(text_size, text_size)
        )

    layers = q.PROJECTORS["mlp2x_gelu"].hf_forms[0].layers
    relu = q.Projector(build, (q.HfForm("relu", layers),))
    monkeypatch.setitem(q.PROJECTORS, "mlp2x_relu", relu)
    tensors = {f"mm_projector.{i}.weight": torch.zeros(64, 64) for i in (0, 2)}
    tensors |= {f"mm_projector.{i}.bias": torch.zeros(64) for i in (0, 2)}
    file = tmp_path / "projector.safetensors"
    save_file(tensors, file)
    given = dict(llm=llama_folder, vision=clip_folder, projector=file)
    for asked_for, found in (
        (None, "mlp2x_gelu"),
        ("mlp2x_gelu", "mlp2x_gelu"),
        ("mlp2x_relu", "mlp2x_relu"),
    ):
        checkpoint = read_checkpoint(**given, projector_type=asked_for)
        assert checkpoint.config.projector_type == found
    save_qilin(make_qilin("mlp2x_relu"), None, tmp_path / "out")
    assert load_qilin(tmp_path / "out").config.projector_type == "mlp2x_relu"


def test_a_fresh_layer_that_nobody_fills_is_refused(monkeypatch, llama_folder, clip_folder):
    """No weight is ever left at random: a norm starts as one, what is unknown is an error."""

    def with_norm(vision_size, text_size):
        return nn.Sequential(nn.LayerNorm(vision_size), nn.Linear(vision_size, text_size))

    def with_conv(vision_size, text_size):
        return nn.Sequential(nn.Conv1d(1, 1, 1), nn.Linear(vision_size, text_size))

    for build in (with_norm, with_conv):
        added = q.Projector(build, hf_forms=())
        monkeypatch.setitem(q.PROJECTORS, TYPE, added)
        given = dict(llm=llama_folder, vision=clip_folder, projector_type=TYPE)
        if build is with_norm:
            norm, linear = load_qilin(**given).mm_projector[0], load_qilin(**given).mm_projector[1]
            assert (norm.weight == 1).all() and (norm.bias == 0).all()
            assert 0.06 < linear.weight.abs().max() <= 1 / 8
        else:
            with pytest.raises(ValueError, match="fresh Conv1d"):
                load_qilin(**given)
