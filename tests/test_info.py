"""Promise: convert.py info tells before anyone waits what loading would find: which files count,
projector, pictures, tokenizer, and to the byte the memory that the loaded model takes.
"""

import shutil

import pytest
import torch
from conftest import IMG, in_process, make_qilin, pictures
from safetensors.torch import load_file, save_file

import convert
from model_io import devices
from model_io.export import save_qilin
from model_io.info import RUNS, memory_needs
from model_io.load import load_qilin, read_checkpoint
from qilin_min import KVCache


def told(path):
    """{what: the rest of its line} of what info says."""
    lines = in_process(convert.main, "info", path, code=0).stdout.splitlines()[1:]
    return {line[:14].strip(): line[14:] for line in lines}


@pytest.fixture(scope="module")
def export(tmp_path_factory):
    folder = tmp_path_factory.mktemp("info") / "model"
    save_qilin(make_qilin("linear"), None, folder)
    return folder


@pytest.mark.parametrize("is_tied", [False, True])
@pytest.mark.parametrize("name, dtype, quantize, _", RUNS)
@torch.no_grad()
def test_memory_is_what_the_model_holds(name, dtype, quantize, _, is_tied, tmp_path):
    """On a CPU: parameters, scales, and keys and values of all its 256 positions."""
    text = dict(tie_word_embeddings=is_tied)
    save_qilin(make_qilin("mlp2x_gelu", text), None, tmp_path / "model")
    model = load_qilin(tmp_path / "model", dtype=dtype, quantize=quantize)
    needs = memory_needs(read_checkpoint(tmp_path / "model").config)
    need = next(need for need in needs if need.name == name)
    held = {tensor.data_ptr(): tensor for tensor in [*model.parameters(), *model.buffers()]}
    assert need.weights == sum(tensor.nbytes for tensor in held.values())

    text = model.config.text
    cache = KVCache(text.num_hidden_layers, text.max_position_embeddings)
    ids = torch.tensor([[1, *IMG, 5]])
    embeds = model.embed(ids, pictures(1).to(dtype))
    model.model(embeds, cache)
    assert cache.k is not None and cache.v is not None
    assert need.cached == cache.k.nbytes + cache.v.nbytes


def test_the_defaults_of_a_cpu_are_named(export, monkeypatch):
    named = {dtype for _, dtype, _, remark in RUNS if "CPUs" in remark}
    defaults = set()
    for gain in (0.01, 4.0):
        monkeypatch.setattr(devices, "bfloat16_gain", lambda gain=gain: gain)
        defaults.add(getattr(torch, devices.default_dtype("cpu")[0]))
    assert defaults == named


def test_what_it_tells_of_a_model(export, tmp_path, spm_path):
    folder = shutil.copytree(export, tmp_path / "model")
    lines = told(folder)
    assert lines["files"] == "model.safetensors" and "left aside" not in lines
    assert lines["projector"] == "linear: 48 -> 64"
    assert lines["pictures"].startswith("padded to a square (preprocessor_config.json")
    assert lines["tokenizer"].startswith("none")
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    assert told(folder)["left aside"].startswith("pytorch_model.bin")
    lines = told(folder / "pytorch_model.bin")
    assert lines["files"] == "pytorch_model.bin" and "left aside" not in lines


def test_shards_are_counted(monkeypatch, tmp_path):
    monkeypatch.setattr("model_io.export.SHARD_BYTES", 300_000)
    save_qilin(make_qilin("mlp2x_gelu"), None, tmp_path / "model")
    n_shards = len(list((tmp_path / "model").glob("*.safetensors")))
    lines = told(tmp_path / "model")
    assert n_shards > 1
    assert lines["files"] == f"model.safetensors.index.json, {n_shards} shards"
    assert lines["projector"] == "mlp2x_gelu: 48 -> 64 -> 64"


def test_the_widths_of_a_projector_alone(tmp_path):
    tensors = {
        "model.mm_projector.0.weight": torch.zeros(64, 48),
        "model.mm_projector.0.bias": torch.zeros(64),
        "model.mm_projector.2.weight": torch.zeros(64, 64),
        "model.mm_projector.2.bias": torch.zeros(64),
    }
    save_file(tensors, tmp_path / "projector.safetensors")
    assert told(tmp_path / "projector.safetensors")["projector"] == "mlp2x_gelu: 48 -> 64 -> 64"


@pytest.mark.parametrize("name", ["model.mm_projector.bias", "model.mm_projector.weight"])
def test_a_projector_without_a_weight_is_refused(name, tmp_path):
    save_file({name: torch.zeros(64)}, tmp_path / "projector.safetensors")
    done = in_process(convert.main, "info", tmp_path / "projector.safetensors", code=2)
    assert "no weight of a projector's layer" in done.stderr and "mm_projector" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
