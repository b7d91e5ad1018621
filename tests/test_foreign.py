"""Promise: a folder from the field is read as transformers reads it, with a line about what was
left aside, or refused in one line that names the file and says what it is; nothing is unpickled.
"""

import json
import os
import shutil
import tempfile
import warnings

import pytest
import torch
from conftest import edit_json, in_process, make_qilin
from safetensors.torch import load_file, save_file
from transformers import LlavaForConditionalGeneration

import convert
import qilin_min as q
from model_io.export import save_qilin
from model_io.load import load_qilin
from model_io.weights import find_weights

NORM = "language_model.model.norm.weight"
POINTER = (
    "version https://git-lfs.github.com/spec/v1\n"
    "oid sha256:4d7a214614ab2935c943f9e0ff69d22eadbb8f32b1258daaa5e2ca24d17e2393\nsize 12345\n"
)


@pytest.fixture(scope="module")
def export(tmp_path_factory):
    folder = tmp_path_factory.mktemp("export") / "out"
    save_qilin(make_qilin(), None, folder)
    return folder


@pytest.fixture
def folder(export, tmp_path):
    """A copy of it, without weights but for what a test puts there."""
    copy = shutil.copytree(export, tmp_path / "model")
    (copy / "model.safetensors").unlink()
    return copy


def put(folder, export, kind, mark, time):
    """One set of weights of a kind; its last norm holds `mark` throughout, its files are changed at
    `time`."""
    tensors = load_file(export / "model.safetensors")
    tensors[NORM] = torch.full_like(tensors[NORM], mark)
    end = "safetensors" if "safetensors" in kind else "bin"
    stem = "model" if end == "safetensors" else "pytorch_model"
    files = [kind]
    if kind.endswith(".json"):
        files = [f"{stem}-0000{i}-of-00002.{end}" for i in (1, 2)]
    weight_map = {}
    for i, file in enumerate(files):
        names = sorted(tensors)[i :: len(files)]
        part = {name: tensors[name] for name in names}
        if end == "bin":
            torch.save(part, folder / file)
        else:
            save_file(part, folder / file, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(names, file))
        os.utime(folder / file, (time, time))
    if kind.endswith(".json"):
        (folder / kind).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def mark_of(model):
    return model.model.norm.weight[0].item()


def refusal(*words):
    """The one line that a command ends in; a warning would be another."""
    with warnings.catch_warnings(record=True, action="always") as warned:
        done = in_process(convert.main, *words, code=2)
    assert not warned
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1 and "weights_only" not in lines[0], done.stderr
    return lines[0]


# --- 1. which set of weights counts ---


@pytest.mark.parametrize("n_sets", [2, 3, 4])
@pytest.mark.parametrize("first", [0, 1, 2])
def test_the_set_that_transformers_takes(n_sets, first, folder, export, capsys):
    """Of sets that differ in one tensor; the others are named on stderr, once."""
    kinds = q.WEIGHT_SETS[first : first + n_sets]
    for i, kind in enumerate(kinds):
        put(folder, export, kind, mark=i + 2, time=1_000_000)
    theirs = LlavaForConditionalGeneration.from_pretrained(folder)
    assert theirs.model.language_model.norm.weight[0].item() == 2
    capsys.readouterr()
    assert mark_of(load_qilin(folder)) == 2
    said = capsys.readouterr().err
    load_qilin(folder)
    assert capsys.readouterr().err == ""
    if len(kinds) > 1:
        assert f"{kinds[0]} is read" in said and ", ".join(kinds[1:]) in said
        assert "newer" not in said and len(said.splitlines()) == 1


@pytest.mark.parametrize("kind", q.WEIGHT_SETS)
def test_a_file_that_is_named_counts_alone(kind, folder, export, capsys):
    for i, other in enumerate(q.WEIGHT_SETS):
        put(folder, export, other, mark=i + 2, time=1_000_000)
    assert mark_of(load_qilin(folder / kind)) == 2 + q.WEIGHT_SETS.index(kind)
    assert capsys.readouterr().err == ""


def test_what_is_left_aside_and_newer_is_said(folder, export, capsys):
    put(folder, export, "model.safetensors", mark=2, time=1_000_000)
    put(folder, export, "pytorch_model.bin", mark=3, time=1_000_060)
    assert mark_of(load_qilin(folder)) == 2
    said = capsys.readouterr().err
    assert "left aside: pytorch_model.bin (newer); to read another, give the file itself" in said


def test_variants_beside_a_set_are_said(folder, export, capsys):
    put(folder, export, "model.safetensors", mark=2, time=1_000_000)
    names = ["adapter_model.bin", "consolidated.00.pth", "model.fp16.safetensors"]
    for name in names:
        shutil.copy(folder / "model.safetensors", folder / name)
    (folder / "model.safetensors.incomplete").write_text("half of a newer one")
    said = {f"{name} (newer)" for name in names}
    said.add("model.safetensors.incomplete (not finished)")
    assert set(find_weights(folder).aside) == said
    assert mark_of(load_qilin(folder / "model.fp16.safetensors")) == 2


def test_a_set_of_which_nothing_is_there_is_passed_over(folder, export, capsys):
    """As where the index came with the small files, and one format's weights alone were fetched."""
    index = folder / "model.safetensors.index.json"
    put(folder, export, index.name, mark=2, time=1_000_000)
    put(folder, export, "pytorch_model.bin", mark=3, time=1_000_000)
    shards = sorted(folder.glob("model-*.safetensors"))
    for shard in shards:
        shard.write_text(POINTER)
    assert mark_of(load_qilin(folder)) == 3
    assert f"{index.name} (2 of its 2 files are not there)" in capsys.readouterr().err
    for shard in shards:
        shard.unlink()
    assert mark_of(load_qilin(folder)) == 3


def test_a_set_that_is_partly_there_never_gives_way(folder, export):
    put(folder, export, "model.safetensors.index.json", mark=2, time=1_000_000)
    put(folder, export, "pytorch_model.bin", mark=3, time=1_000_000)
    lost = folder / "model-00002-of-00002.safetensors"
    lost.unlink()
    said = refusal("info", folder)
    assert lost.name in said and f"to read pytorch_model.bin instead, give {folder}" in said
    lost.write_text(POINTER)
    assert lost.name in refusal("info", folder)
    (folder / (lost.name + ".incomplete")).write_text("half")
    assert f"{lost.name}.incomplete is there" in refusal("info", folder)


def test_a_set_of_which_nothing_is_there_and_no_other(folder, export):
    index = folder / "model.safetensors.index.json"
    put(folder, export, index.name, mark=2, time=1_000_000)
    shards = sorted(folder.glob("model-*.safetensors"))
    for shard in shards:
        shard.write_text(POINTER)
    assert f"{shards[0]} is a Git LFS pointer" in refusal("info", folder)
    for shard in shards:
        shard.rename(shard.with_name(shard.name + ".incomplete"))
    line = refusal("info", folder)
    assert f"{index} names {shards[0].name}, which is not there (2 of 2 files are missing)" in line
    assert f"{shards[0].name}.incomplete is there" in line
    index.write_text(POINTER)
    assert f"{index} is a Git LFS pointer" in refusal("info", folder)


def test_an_incomplete_set_behind_the_one_that_counts_is_said(folder, export, capsys):
    put(folder, export, "model.safetensors", mark=2, time=1_000_000)
    put(folder, export, "pytorch_model.bin.index.json", mark=3, time=1_000_000)
    (folder / "pytorch_model-00001-of-00002.bin").unlink()
    assert mark_of(load_qilin(folder)) == 2
    assert (
        "pytorch_model.bin.index.json (1 of its 2 files are not there)" in capsys.readouterr().err
    )


def test_the_model_alone_takes_no_side(folder, export):
    """qilin_min.py opens safetensors, and leaves the choice between two sets to load_qilin."""
    put(folder, export, "model.safetensors", mark=2, time=1_000_000)
    put(folder, export, "pytorch_model.bin", mark=3, time=1_000_000)
    assert mark_of(q.load_llava_hf(folder)) == 2
    put(folder, export, "model.safetensors.index.json", mark=4, time=1_000_000)
    with pytest.raises(ValueError, match="two sets of weights"):
        q.load_llava_hf(folder)


@pytest.mark.parametrize(
    "name, said",
    [
        ("consolidated.00.pth", "Meta's own format"),
        ("ggml-model-q4_0.gguf", "llama.cpp's format"),
        ("model-00001-of-00002.safetensors", "the index model.safetensors.index.json is missing"),
        ("pytorch_model-00001-of-00002.bin", "the index pytorch_model.bin.index.json is missing"),
        ("model.fp16.safetensors", "give this file in place of the folder"),
        ("pytorch_model.fp16.bin", "give this file in place of the folder"),
        ("adapter_model.safetensors", "adapter"),
        ("flax_model.msgpack", "Flax"),
        ("tf_model.h5", "Keras"),
        ("model.safetensors.incomplete", "interrupted"),
        (".cache/huggingface/download/a1b2.c3d4.incomplete", "interrupted"),
    ],
)
def test_a_folder_of_another_format(name, said, folder):
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes(b"x" * 100)
    line = refusal("info", folder)
    assert str(folder) in line and name.split("/")[-1] in line and said in line


@pytest.mark.parametrize(
    "name, said", [("consolidated.00.pth", "Meta's own format"), ("m.gguf", "llama.cpp's format")]
)
def test_another_format_without_a_config(name, said, tmp_path):
    """As it is published; named by its folder or itself."""
    (tmp_path / "src").mkdir()
    (tmp_path / "src" / name).write_bytes(b"GGUF" + bytes(100))
    for path in (tmp_path / "src", tmp_path / "src" / name):
        for words in (("info", path), (path, tmp_path / "dst")):
            line = refusal(*words)
            assert str(tmp_path / "src") in line and name in line and said in line
    assert not (tmp_path / "dst").exists()


def test_a_link_to_what_is_not_there(folder, tmp_path):
    """What is left of the hub's cache where its blobs were not copied."""
    (folder / "model.safetensors").symlink_to(tmp_path / "blobs" / "4d7a")
    for words in (("info", folder), (folder, tmp_path / "dst")):
        assert "model.safetensors is a link to what is not there" in refusal(*words)
    assert not (tmp_path / "dst").exists()


@pytest.mark.parametrize("inside", ["snapshots/8c6d", "checkpoint-500", "llava"])
def test_a_model_that_lies_deeper(inside, export, tmp_path):
    """A folder of the hub's cache, what a trainer leaves, or a folder of models."""
    deeper = tmp_path / "src" / inside
    shutil.copytree(export, deeper)
    for words in (("info", tmp_path / "src"), (tmp_path / "src", tmp_path / "dst")):
        assert f"a model lies deeper: give {deeper}" in refusal(*words)


@pytest.mark.parametrize("start", ["module.", "_orig_mod.", "_fsdp_wrapped_module."])
def test_names_that_a_wrapper_left(start, folder, export, tmp_path):
    tensors = load_file(export / "model.safetensors")
    renamed = {start + name: tensor for name, tensor in tensors.items()}
    save_file(renamed, folder / "model.safetensors")
    for words in (("info", folder), (folder, tmp_path / "dst")):
        assert f"no place for: {start}" in refusal(*words)


# --- 2. files that are no weights ---


def cut(file, n_bytes):
    file.write_bytes(file.read_bytes()[:n_bytes])


def write_legacy(file, content):
    torch.save(content, file, _use_new_zipfile_serialization=False)


# what Trap would leave
TRACE = os.path.join(tempfile.gettempdir(), f"unpickled-{os.getpid()}")


class Trap:
    """Unpickled, it would make a folder."""

    def __reduce__(self):
        return os.mkdir, (TRACE,)


# name of the weights: how they are spoilt, and what must be said
SPOILT = [
    ("model.safetensors", lambda f: f.write_text(POINTER), "is a Git LFS pointer"),
    ("pytorch_model.bin", lambda f: f.write_text(POINTER), "is a Git LFS pointer"),
    ("model.safetensors", lambda f: cut(f, -50), "is cut short"),
    ("model.safetensors", lambda f: cut(f, 30), "is cut short"),
    ("model.safetensors", lambda f: cut(f, 5), "is cut short"),
    ("pytorch_model.bin", lambda f: cut(f, -50), "is cut short"),
    ("pytorch_model.bin", lambda f: cut(f, 1000), "is cut short"),
    ("model.safetensors", lambda f: cut(f, 0), "is empty"),
    ("pytorch_model.bin", lambda f: cut(f, 0), "is empty"),
    ("model.safetensors", lambda f: f.write_bytes(bytes(5000)), "zeros only"),
    ("pytorch_model.bin", lambda f: f.write_bytes(bytes(5000)), "zeros only"),
    ("model.safetensors", lambda f: f.write_text("<!doctype html><p>Log in"), "is a web page"),
    ("pytorch_model.bin", lambda f: f.write_text("Entry not found"), "text 'Entry not found'"),
    ("model.safetensors", lambda f: f.write_text("<?xml version='1.0'?>" * 9), "server's error"),
    ("model.safetensors", lambda f: f.write_text('{"error": "gated"}' * 9), "server's error"),
    ("model.safetensors", lambda f: f.write_bytes(b"GGUF" + bytes(99)), "is GGUF"),
    ("pytorch_model.bin", lambda f: torch.save({"a": Trap()}, f), "objects beside tensors"),
    ("pytorch_model.bin", lambda f: write_legacy(f, {"a": Trap()}), "objects beside tensors"),
    ("pytorch_model.bin", lambda f: torch.save(torch.nn.Linear(2, 2), f), "torch.nn"),
    # a pickle of a protocol that is none
    ("pytorch_model.bin", lambda f: f.write_bytes(b"\x80\x19" + bytes(99)), "it is damaged"),
    (
        "pytorch_model.bin",
        lambda f: (write_legacy(f, {"a": torch.ones(9999)}), cut(f, -9000)),
        "cut short",
    ),
    (
        "model.safetensors",
        lambda f: f.with_name(f.name + ".aria2").write_text("x"),
        "let aria2c finish it",
    ),
]


@pytest.mark.parametrize("name, spoil, said", SPOILT)
def test_a_file_that_is_no_weights(name, spoil, said, folder, export, tmp_path):
    put(folder, export, name, mark=2, time=1_000_000)
    spoil(folder / name)
    for words in (("info", folder), (folder, tmp_path / "dst"), ("info", folder / name)):
        line = refusal(*words)
        assert str(folder / name) in line and said in line
    assert not (tmp_path / "dst").exists() and not os.path.exists(TRACE)


@pytest.mark.parametrize("kind", ["model.safetensors", "pytorch_model.bin"])
def test_a_file_of_which_the_rest_was_never_written(kind, folder, export, tmp_path):
    """Its whole size was taken at once, as some programs do that fetch files."""
    tensors = load_file(export / "model.safetensors")
    name = "vision_tower.vision_model.encoder.layers.2.mlp.fc2.weight"
    tensors[name] = torch.zeros_like(tensors[name])
    if kind.endswith(".bin"):
        torch.save(tensors, folder / kind)
    else:
        save_file(tensors, folder / kind)
    line = refusal(folder, tmp_path / "dst")
    assert f"{kind}: {name} holds only zeros" in line
    assert list(tmp_path.iterdir()) == [folder]


@pytest.mark.parametrize("name", ["config.json", "tokenizer.model"])
def test_small_files_that_are_pointers(name, folder, export):
    put(folder, export, "model.safetensors", mark=2, time=1_000_000)
    (folder / name).write_text(POINTER)
    assert f"{folder / name} is a Git LFS pointer" in refusal("info", folder)
    with pytest.raises(ValueError, match="Git LFS pointer"):
        load_qilin(folder)


@pytest.mark.parametrize("name", ["projector.safetensors", "mm_projector.bin"])
def test_a_projector_that_is_a_pointer(name, folder, export, tmp_path):
    put(folder, export, "model.safetensors", mark=2, time=1_000_000)
    (tmp_path / name).write_text(POINTER)
    for words in (
        ("info", tmp_path / name),
        (folder, tmp_path / "dst", "--projector", tmp_path / name),
    ):
        assert f"{tmp_path / name} is a Git LFS pointer" in refusal(*words)


@pytest.mark.parametrize("first", [ord("<"), ord("G"), ord("P")])
def test_a_header_of_any_length_is_read(first, folder, export):
    """The file's first byte is the lowest of its header's length, and no mark of another format."""
    put(folder, export, "model.safetensors", mark=2, time=1_000_000)
    content = (folder / "model.safetensors").read_bytes()
    n_header = int.from_bytes(content[:8], "little")
    blanks = (first - n_header) % 256
    header = content[8 : 8 + n_header] + b" " * blanks
    whole = len(header).to_bytes(8, "little") + header + content[8 + n_header :]
    assert whole[0] == first
    (folder / "model.safetensors").write_bytes(whole)
    assert mark_of(load_qilin(folder)) == 2


# --- 3. tensors that are no plain floats ---

LINEAR = "language_model.model.layers.0.mlp.up_proj"
FP8 = torch.zeros(96, 64).to(torch.float8_e4m3fn)
INT8 = torch.zeros(96, 64, dtype=torch.int8)
# what takes the place of a linear layer's weight, and what must be said
PACKED = [
    ({"qweight": torch.zeros(8, 96, dtype=torch.int32)}, "GPTQ or AWQ"),
    ({"weight": INT8, "SCB": torch.ones(96)}, "bitsandbytes"),
    (
        {
            "weight": torch.zeros(3072, 1, dtype=torch.uint8),
            "weight.absmax": torch.ones(96),
            "weight.quant_state.bitsandbytes__nf4": torch.zeros(9, dtype=torch.uint8),
        },
        "bitsandbytes",
    ),
    ({"weight": FP8, "weight_scale_inv": torch.ones(1, 1)}, "FP8"),
    ({"weight": FP8}, "float8_e4m3fn"),
    ({"weight_packed": torch.zeros(96, 8, dtype=torch.int32)}, "compressed-tensors"),
    ({"weight": torch.zeros(0)}, "ZeRO-3"),
]


@pytest.mark.parametrize("kind", ["model.safetensors", "pytorch_model.bin"])
@pytest.mark.parametrize("layer, said", PACKED)
def test_packed_tensors(kind, layer, said, folder, export, tmp_path):
    tensors = load_file(export / "model.safetensors")
    del tensors[LINEAR + ".weight"]
    for end, tensor in layer.items():
        tensors[f"{LINEAR}.{end}"] = tensor
    if kind.endswith(".bin"):
        torch.save(tensors, folder / kind)
    else:
        save_file(tensors, folder / kind)
    for words in (("info", folder), (folder, tmp_path / "dst")):
        line = refusal(*words)
        assert str(folder / kind) in line and LINEAR in line and said in line
    assert not (tmp_path / "dst").exists()


def test_the_model_alone_takes_no_packed_tensors_either(folder, export):
    """FP8 is a float to torch: cast without its scale it would be wrong in silence."""
    tensors = load_file(export / "model.safetensors")
    save_file(tensors | {LINEAR + ".weight": FP8}, folder / "model.safetensors")
    with pytest.raises(ValueError, match="up_proj.weight holds float8_e4m3fn"):
        q.load_llava_hf(folder)


@pytest.mark.parametrize("where", ["outer", "text_config"])
@pytest.mark.parametrize("method", ["gptq", "awq", "fp8", "compressed-tensors"])
def test_a_config_that_says_packed(where, method, folder, export):
    put(folder, export, "model.safetensors", mark=2, time=1_000_000)
    said = {"quantization_config": {"quant_method": method, "bits": 4}}
    if where == "text_config":
        inner = json.loads((folder / "config.json").read_text())["text_config"]
        said = {"text_config": inner | said}
    edit_json(folder / "config.json", **said)
    line = refusal("info", folder)
    assert str(folder / "config.json") in line and f"packed by {method}" in line


def test_plain_weights_under_a_word_of_bitsandbytes_are_read(folder, export):
    """It stays in the config.json of what was trained in 4 bits and merged since."""
    put(folder, export, "model.safetensors", mark=2, time=1_000_000)
    said = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    edit_json(folder / "config.json", quantization_config=said)
    assert mark_of(load_qilin(folder)) == 2


@pytest.mark.parametrize("name", ["projector.safetensors", "mm_projector.bin"])
def test_a_projector_that_zero3_never_gathered(name, folder, export, tmp_path):
    """As LLaVA's stage 1 leaves it when it is saved without gathering."""
    put(folder, export, "model.safetensors", mark=2, time=1_000_000)
    tensors = {"model.mm_projector.0.weight": torch.zeros(0)}
    if name.endswith(".bin"):
        torch.save(tensors, tmp_path / name)
    else:
        save_file(tensors, tmp_path / name)
    given = (folder, tmp_path / "dst", "--projector", tmp_path / name)
    for words in (("info", tmp_path / name), given):
        line = refusal(*words)
        assert str(tmp_path / name) in line and "ZeRO-3" in line


def test_parts_that_are_not_taken_may_be_packed(
    folder, export, clip_folder, llama_folder, tmp_path
):
    """The projector out of a model whose language model is packed."""
    sizes = dict(hidden_size=64, intermediate_size=96)
    save_qilin(make_qilin(vision=sizes), None, tmp_path / "whole")
    file = tmp_path / "whole/model.safetensors"
    tensors = load_file(file)
    save_file(tensors | {LINEAR + ".weight": FP8}, file)
    model = load_qilin(llm=llama_folder, vision=clip_folder, projector=file)
    ours = model.mm_projector.state_dict()["0.weight"]
    assert torch.equal(ours, tensors["multi_modal_projector.linear_1.weight"])
