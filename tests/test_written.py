"""Promise: no export takes its final name that does not hold, read again, every byte of what was
to be written; a wrong one is one line, nothing of it stays, and what stood there stands.
"""

from pathlib import Path

import pytest
import torch
from conftest import edit_json, in_process, make_qilin
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

import convert
import model_io.export as export
import train
from model_io.export import save_qilin
from model_io.tokens import Tokenizer
from model_io.written import check_file, fingerprint

HEAD_KEY = "language_model.lm_head.weight"
TEXT = dict(vocab_size=32000, hidden_size=16, intermediate_size=16, num_attention_heads=2)


def one_wrong_row(tensors):
    changed = tensors[HEAD_KEY].clone()
    changed[17] += 1
    return tensors | {HEAD_KEY: changed}


def one_wrong_bit(tensors):
    changed = tensors[HEAD_KEY].clone()
    changed.view(torch.int32)[1, 2] ^= 1
    return tensors | {HEAD_KEY: changed}


def two_rows_swapped(tensors):
    changed = tensors[HEAD_KEY].clone()
    changed[[3, 4]] = changed[[4, 3]]
    return tensors | {HEAD_KEY: changed}


def one_dropped(tensors):
    return {key: tensor for key, tensor in tensors.items() if key != HEAD_KEY}


def one_more(tensors):
    return tensors | {"language_model.model.stray.weight": torch.zeros(3)}


def another_dtype(tensors):
    return tensors | {HEAD_KEY: tensors[HEAD_KEY].half()}


def another_shape(tensors):
    return tensors | {HEAD_KEY: tensors[HEAD_KEY].t().contiguous()}


DAMAGE = {
    one_wrong_row: "other numbers",
    one_wrong_bit: "other numbers",
    two_rows_swapped: "other numbers",
    one_dropped: "not there",
    one_more: "should not be there",
    another_dtype: "torch.float16 instead of torch.float32",
    another_shape: "instead of (",
}


def save_damaged(monkeypatch, damage):
    save = export.save_tensors

    def damaged(tensors, path):
        # the file that holds the head, when there are several
        if HEAD_KEY in tensors:
            tensors = damage(tensors)
        save(tensors, path)

    monkeypatch.setattr(export, "save_tensors", damaged)


@pytest.fixture
def folder(tmp_path):
    """An export of another model at the place where the next one goes."""
    save_qilin(make_qilin(seed=1), None, tmp_path / "out")
    return tmp_path / "out"


def contents(folder):
    return {file.name: file.read_bytes() for file in folder.iterdir()}


@pytest.mark.parametrize("n_bytes", [10**9, 60_000], ids=["one file", "shards"])
@pytest.mark.parametrize("damage", DAMAGE, ids=lambda damage: damage.__name__)
def test_wrong_weights_never_take_the_name(damage, n_bytes, folder, monkeypatch):
    monkeypatch.setattr(export, "SHARD_BYTES", n_bytes)
    save_damaged(monkeypatch, damage)
    before = contents(folder)
    with pytest.raises(OSError, match="not what was meant") as error:
        save_qilin(make_qilin(), None, folder)
    assert DAMAGE[damage] in str(error.value)
    assert contents(folder) == before
    assert [path.name for path in folder.parent.iterdir()] == ["out"]


def test_a_file_cut_short(folder, monkeypatch):
    save = export.save_tensors

    def cut(tensors, path):
        save(tensors, path)
        path.write_bytes(path.read_bytes()[:-8])

    before = contents(folder)
    monkeypatch.setattr(export, "save_tensors", cut)
    with pytest.raises(OSError, match="model.safetensors"):
        save_qilin(make_qilin(), None, folder)
    assert contents(folder) == before


def spoil_json(monkeypatch, name, **changes):
    write = export.write_json

    def spoiled(path, value):
        write(path, value)
        if path.name == name:
            edit_json(path, **changes)

    monkeypatch.setattr(export, "write_json", spoiled)


@pytest.mark.parametrize(
    "name, changes",
    [
        ("config.json", dict(image_seq_length=7)),
        ("generation_config.json", dict(eos_token_id=5)),
        ("preprocessor_config.json", dict(do_pad=None)),
    ],
)
def test_wrong_json_never_takes_the_name(name, changes, folder, monkeypatch):
    before = contents(folder)
    spoil_json(monkeypatch, name, **changes)
    with pytest.raises(OSError, match="other content"):
        save_qilin(make_qilin(), None, folder)
    assert contents(folder) == before


def test_wrong_index_never_takes_the_name(folder, monkeypatch):
    monkeypatch.setattr(export, "SHARD_BYTES", 60_000)
    spoil_json(monkeypatch, "model.safetensors.index.json", weight_map={HEAD_KEY: "gone"})
    with pytest.raises(OSError, match="names other files"):
        save_qilin(make_qilin(), None, folder)


def test_a_config_that_is_read_otherwise(folder, monkeypatch):
    """Written as it was meant, but not the model: a config writer that lost a field."""
    text_config = export._text_config

    def forgetful(*arguments):
        sizes = text_config(*arguments)
        del sizes["rope_theta"]
        return sizes

    monkeypatch.setattr(export, "_text_config", forgetful)
    with pytest.raises(OSError, match="another configuration"):
        save_qilin(make_qilin(text=dict(rope_theta=500.0)), None, folder)


def test_a_tokenizer_whose_file_changed_meanwhile(tmp_path, spm_path, toy):
    """It was replaced while the model trained: what the model learnt with goes out."""
    file = tmp_path / "tokenizer.model"
    file.write_bytes(spm_path.read_bytes())
    tokenizer = Tokenizer(file)
    file.write_bytes((toy / "llama/tokenizer.model").read_bytes())
    save_qilin(make_qilin(text=TEXT, n_token_ids=32000), tokenizer, tmp_path / "out")
    assert (tmp_path / "out/tokenizer.model").read_bytes() == spm_path.read_bytes()


@pytest.mark.parametrize("name", ["tokenizer.model", "chat_template.jinja", "README.md"])
def test_wrong_files_beside_the_weights(name, tmp_path, spm_path, monkeypatch):
    write = Path.write_bytes

    def cut(path, content):
        write(path, content[:-1] if path.name == name else content)

    monkeypatch.setattr(Path, "write_bytes", cut)
    with pytest.raises(OSError, match="other content"):
        save_qilin(make_qilin(text=TEXT, n_token_ids=32000), Tokenizer(spm_path), tmp_path / "out")
    assert not any(tmp_path.iterdir())


def test_a_command_says_it_in_one_line(folder, tmp_path, monkeypatch):
    save_damaged(monkeypatch, one_wrong_row)
    done = in_process(convert.main, folder, tmp_path / "dst", code=1)
    assert "lm_head" in done.stderr
    assert len([line for line in done.stderr.splitlines() if "meant" in line]) == 1
    assert not (tmp_path / "dst").exists() and not (tmp_path / "dst.partial").exists()


def test_a_full_disk_keeps_nothing_half_written(folder, tmp_path, monkeypatch):
    def save_file(tensors, path, metadata):
        Path(path).write_bytes(b"half")
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(export, "save_file", save_file)
    done = in_process(convert.main, folder, tmp_path / "dst", code=1)
    assert "could not be written" in done.stderr
    assert list(tmp_path.iterdir()) == [folder]


def test_what_is_right_passes(tmp_path):
    """Every dtype, a tensor without numbers and one of a single number."""
    tensors = {
        "a": torch.arange(6, dtype=torch.float32).reshape(2, 3),
        "b": torch.arange(6).bfloat16(),
        "c": torch.tensor(3.0, dtype=torch.float16),
        "d": torch.zeros(0, 4),
    }
    save_file(tensors, tmp_path / "x.safetensors")
    check_file(tmp_path / "x.safetensors", {key: fingerprint(t) for key, t in tensors.items()})


def test_the_projector_of_stage_1_as_well(tmp_path, monkeypatch):
    monkeypatch.setattr(train.dist, "get_rank", lambda: 0)
    monkeypatch.setattr(train.dist, "barrier", lambda: None)
    model = make_qilin()
    train.save_projector(model, tmp_path / "final", "projector.safetensors", torch.float32)
    kept = load_file(tmp_path / "final/projector.safetensors")
    monkeypatch.setattr(
        train, "save_tensors", lambda t, path: save_file({"x": t.popitem()[1]}, path)
    )
    with pytest.raises(OSError, match="not what was meant"):
        train.save_projector(model, tmp_path / "final", "projector.safetensors", torch.float32)
    assert [path.name for path in tmp_path.iterdir()] == ["final"]
    assert load_file(tmp_path / "final/projector.safetensors").keys() == kept.keys()
