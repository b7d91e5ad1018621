"""Promise: a linear projector goes out in a form that vLLM and transformers run, where there is
room for it; it comes back bit for bit, also after transformers saved it again; exactly that form is
taken for it, and older exports load and are rewritten.
"""

import json
import os
import subprocess
import sys

import pytest
import torch
from conftest import (
    IMG,
    ROOT,
    ROWS,
    edit_json,
    free_port,
    hf_ids,
    in_process,
    make_qilin,
    pictures,
    words,
)
from safetensors.torch import load_file, save_file
from transformers import LlavaForConditionalGeneration

import convert
import qilin_min as q
from model_io.export import save_qilin
from model_io.load import load_qilin, read_checkpoint
from model_io.tokens import Tokenizer

# text width 64; the default tower of 48 leaves no room
WIDE = dict(hidden_size=32)
FIRST = "multi_modal_projector.linear_1.weight"
FIRST_BIAS = "multi_modal_projector.linear_1.bias"
SECOND = "multi_modal_projector.linear_2.weight"
SECOND_BIAS = "multi_modal_projector.linear_2.bias"


def saved(folder, dtype=None, **changes):
    """(model, its export) with a linear projector for which there is room."""
    model = make_qilin("linear", vision=WIDE, **changes)
    save_qilin(model, None, folder, dtype)
    return model, folder


def edit_weights(folder, change):
    file = folder / "model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(file).items()}
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


def as_before(folder):
    """Turn an export into what was written before: linear_1 = W, linear_2 = I."""

    def change(tensors):
        width = tensors[FIRST].shape[1]
        tensors[FIRST] = tensors[SECOND][:, :width].clone()
        tensors[FIRST_BIAS] = tensors[SECOND_BIAS].clone()
        tensors[SECOND] = torch.eye(len(tensors[SECOND]), dtype=tensors[SECOND].dtype)
        tensors[SECOND_BIAS].zero_()

    edit_weights(folder, change)
    edit_json(folder / "config.json", projector_hidden_act="linear")


def assert_same(again, model, dtype=torch.float32):
    """again holds the one linear layer of `model`, rounded to dtype, bit for bit."""
    assert again.config.projector_type == "linear"
    assert dict(again.mm_projector.named_parameters()).keys() == {"weight", "bias"}
    for name, param in model.mm_projector.named_parameters():
        assert torch.equal(again.mm_projector.get_parameter(name).to(dtype), param.to(dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_form_and_back(dtype, tmp_path):
    model, folder = saved(tmp_path / "out", dtype)
    tensors = load_file(folder / "model.safetensors")
    weight = model.mm_projector.weight.detach().to(dtype)
    eye = torch.eye(32, dtype=dtype)
    # text width 64 = 32 + 32, which leaves no zeros
    assert torch.equal(tensors[FIRST], torch.cat((eye, -eye)))
    assert torch.equal(tensors[SECOND], torch.cat((weight, -weight), dim=1))
    assert torch.equal(tensors[SECOND_BIAS], model.mm_projector.bias.detach().to(dtype))
    assert not tensors[FIRST_BIAS].any()
    assert json.loads((folder / "config.json").read_text())["projector_hidden_act"] == "gelu"
    assert "vllm serve" in (folder / "README.md").read_text()
    assert_same(load_qilin(folder, dtype=dtype), model, dtype)
    assert_same(q.load_llava_hf(folder, dtype=dtype), model, dtype)


def test_zeros_fill_what_is_wider(tmp_path):
    model = make_qilin("linear", vision=dict(hidden_size=24))
    save_qilin(model, None, tmp_path / "out")
    tensors = load_file(tmp_path / "out/model.safetensors")
    assert tensors[FIRST].shape == (64, 24) and not tensors[FIRST][48:].any()
    assert tensors[SECOND].shape == (64, 64) and not tensors[SECOND][:, 48:].any()
    assert_same(load_qilin(tmp_path / "out"), model)


def test_where_there_is_no_room_transformers_alone_opens_it(tmp_path):
    model = make_qilin("linear", vision=dict(hidden_size=36))
    save_qilin(model, None, tmp_path / "out")
    tensors = load_file(tmp_path / "out/model.safetensors")
    assert torch.equal(tensors[FIRST], model.mm_projector.weight)
    assert torch.equal(tensors[SECOND], torch.eye(64))
    raw = json.loads((tmp_path / "out/config.json").read_text())
    assert raw["projector_hidden_act"] == "linear"
    card = (tmp_path / "out/README.md").read_text()
    assert "Only transformers and qilin-min open this folder" in card and "vllm serve" not in card
    assert_same(load_qilin(tmp_path / "out"), model)
    done = in_process(convert.main, tmp_path / "out", tmp_path / "again", code=0)
    assert "only transformers and qilin-min open" in done.stdout and "64 and 36" in done.stdout


def test_convert_rewrites_an_older_export(tmp_path):
    model, folder = saved(tmp_path / "new")
    as_before(saved(tmp_path / "old")[1])
    assert_same(load_qilin(tmp_path / "old"), model)
    done = in_process(convert.main, tmp_path / "old", tmp_path / "dst", code=0)
    assert "open this folder" not in done.stdout
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "dst" / name).read_bytes() == (folder / name).read_bytes()


NEAR_MISSES = {
    "I of linear_1": (FIRST, (3, 3), 1.0 + 2.0**-20),
    "-I of linear_1": (FIRST, (40, 8), -1.0 + 2.0**-20),
    "a zero of linear_1": (FIRST, (0, 31), 2.0**-30),
    "bias of linear_1": (FIRST_BIAS, (63,), 2.0**-30),
    "W against -W": (SECOND, (63, 1), 0.25),
}


@pytest.mark.parametrize("where", NEAR_MISSES)
def test_whatever_differs_is_two_layers(where, tmp_path):
    name, place, value = NEAR_MISSES[where]
    _, folder = saved(tmp_path / "out")
    edit_weights(folder, lambda tensors: tensors[name].__setitem__(place, value))
    tensors = load_file(folder / "model.safetensors")
    for again in (load_qilin(folder), q.load_llava_hf(folder)):
        assert again.config.projector_type == "mlp2x_gelu"
        assert torch.equal(again.mm_projector[0].weight, tensors[FIRST])
        assert torch.equal(again.mm_projector[0].bias, tensors[FIRST_BIAS])
        assert torch.equal(again.mm_projector[2].weight, tensors[SECOND])


def test_a_column_past_both_copies_is_no_zero(tmp_path):
    save_qilin(make_qilin("linear", vision=dict(hidden_size=24)), None, tmp_path / "out")
    edit_weights(tmp_path / "out", lambda tensors: tensors[SECOND].__setitem__((5, 63), 2.0**-30))
    assert load_qilin(tmp_path / "out").config.projector_type == "mlp2x_gelu"


def test_under_another_activation_it_is_refused(tmp_path):
    """x and -x without GELU between them would give 2 W x."""
    _, folder = saved(tmp_path / "out")
    edit_json(folder / "config.json", projector_hidden_act="linear")
    for load in (load_qilin, q.load_llava_hf):
        with pytest.raises(ValueError, match=r"made of I and -I.* config\.json says linear"):
            load(folder)


def test_a_tensor_that_is_missing_is_named(tmp_path):
    _, folder = saved(tmp_path / "out")
    edit_weights(folder, lambda tensors: tensors.pop(SECOND_BIAS))
    with pytest.raises(ValueError, match=r"missing mm_projector.2.bias"):
        load_qilin(folder)


def test_of_two_layers_one_row_is_read_to_know_them(tmp_path, monkeypatch):
    save_qilin(make_qilin("mlp2x_gelu", vision=WIDE), None, tmp_path / "out")
    n_rows = 0
    rows = q.WeightFiles.rows

    def counted(self, name, start=0, stop=None):
        nonlocal n_rows
        found = rows(self, name, start, stop)
        n_rows += len(found) if part_is_projector(name) else 0
        return found

    def part_is_projector(name):
        return q.part_of(name) == "mm_projector"

    monkeypatch.setattr(q.WeightFiles, "rows", counted)
    assert read_checkpoint(tmp_path / "out").config.projector_type == "mlp2x_gelu"
    assert n_rows == 1


def test_a_rank_reads_its_rows(tmp_path):
    """W lies in the first columns of linear_2, and each of its rows in the same row there."""
    model, folder = saved(tmp_path / "out")
    checkpoint = read_checkpoint(folder)
    with torch.device("meta"):
        empty = q.Qilin(checkpoint.config)
    found, line = q.account(empty, checkpoint.sources)
    assert "none missing, none left over" in line
    place = found["mm_projector.weight"]
    assert place.shape() == (64, 32)
    assert torch.equal(place.rows(10, 13), model.mm_projector.weight[10:13])
    assert torch.equal(found["mm_projector.bias"].rows(10, 13), model.mm_projector.bias[10:13])


def test_two_ranks_load_it_and_give_it_back(toy, tmp_path):
    """A rate below all float32: what comes out is what went in. The second rank's rows of one
    matrix are zeros, which is no damage."""
    model = load_qilin(llm=toy / "llama", vision=toy / "clip")
    rows = model.model.layers[0].mlp.up_proj.weight.data
    rows[len(rows) // 2 :] = 0
    save_qilin(model, Tokenizer(toy / "llama"), tmp_path / "in")
    raw = json.loads((tmp_path / "in/config.json").read_text())
    assert raw["projector_hidden_act"] == "gelu", "the toy world has room for it"
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"]
    command += ["--master_port", free_port(), ROOT / "train.py", "--stage", 2, "--lr", 1e-46]
    command += ["--model", tmp_path / "in", "--data", toy / "one.json", "--images", toy / "images"]
    command += ["--out", tmp_path / "out", "--max-steps", 1, "--batch-size", 2, "--workers", 0]
    subprocess.run(
        list(map(str, command)),
        check=True,
        capture_output=True,
        env=dict(os.environ, OMP_NUM_THREADS="1"),
    )
    assert_same(load_qilin(tmp_path / "out"), model)
    assert_same(q.load_llava_hf(tmp_path / "out/final"), model)


# --- what transformers computes, and what it saves ------------------------------------------------


@torch.no_grad()
def logits_of(folder, hf, row, pixels):
    """Logits (T, V) of one row of ids, by us and by transformers."""
    ids = torch.tensor([row])
    model = load_qilin(folder, dtype=hf.dtype)
    ours = model(ids, pixels)[0]
    theirs = hf(input_ids=hf_ids(ids, hf), pixel_values=pixels.to(hf.dtype)).logits[0]
    return ours, theirs.float()[:, : ours.shape[1]]


ROW = [1] + words(2, 4) + IMG + words(4, 5)


@pytest.mark.parametrize(
    "dtype, limit", [(torch.float32, 1e-4), (torch.bfloat16, 0.2), (torch.float16, 0.02)]
)
def test_transformers_computes_the_same(dtype, limit, tmp_path, report):
    """In halves each GELU rounds by itself: x = GELU(x) - GELU(-x) is off by some last bits."""
    _, folder = saved(tmp_path / "out", dtype)
    hf = LlavaForConditionalGeneration.from_pretrained(
        folder, dtype=dtype, attn_implementation="eager"
    ).eval()
    ours, theirs = logits_of(folder, hf, ROW, pictures(1))
    assert ours.std() > 0.5
    report(f"mirrored linear projector, logits ({dtype})", (ours - theirs).abs().max(), limit)


def test_what_transformers_saved_again(tmp_path):
    model, folder = saved(tmp_path / "out")
    hf = LlavaForConditionalGeneration.from_pretrained(folder)
    hf.save_pretrained(tmp_path / "again")
    assert_same(load_qilin(tmp_path / "again"), model)
    assert_same(q.load_llava_hf(tmp_path / "again"), model)


def test_what_vllm_saved_is_refused_by_name(tmp_path):
    """save_sharded_state writes q, k and v as one tensor, under the names of vLLM's own classes."""
    _, folder = saved(tmp_path / "out")
    (folder / "model.safetensors").rename(folder / "model-rank-0-part-0.safetensors")
    with pytest.raises(FileNotFoundError, match=r"rank-0-part-0.safetensors is vLLM's sharded"):
        load_qilin(folder)


def test_transformers_4_reads_it_and_saves_it_again(tmp_path, report):
    target = os.environ.get("TRANSFORMERS_4")
    if not target:
        pytest.skip(
            "TRANSFORMERS_4 names no folder with transformers 4.57.6 (tests/run.sh makes one)"
        )
    model, folder = saved(tmp_path / "out")
    pixels = pictures(3)
    torch.save({"ids": ROWS[1], "pixels": pixels[:1]}, tmp_path / "asked.pt")
    done = subprocess.run(
        [
            *(sys.executable, ROOT / "tests/tools/transformers4_saves.py"),
            *(folder, tmp_path / "asked.pt", tmp_path / "logits.pt", tmp_path / "again"),
        ],
        capture_output=True,
        text=True,
        env=dict(os.environ, PYTHONPATH=target, OMP_NUM_THREADS="1"),
    )
    assert done.returncode == 0, done.stderr[-3000:]
    with torch.no_grad():
        ours = model(torch.tensor([ROWS[1]]), pixels[:1])[0]
    theirs = torch.load(tmp_path / "logits.pt", weights_only=True)[:, : ours.shape[1]]
    report("mirrored linear projector in transformers 4.57", (ours - theirs).abs().max(), 1e-4)
    assert_same(load_qilin(tmp_path / "again"), model)
    assert_same(q.load_llava_hf(tmp_path / "again"), model)
