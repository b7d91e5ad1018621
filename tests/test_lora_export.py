"""Promise: what train.py --lora learnt goes out without its base as well, in peft's form: peft and
we make of it the merged model.
"""

import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import (
    ROOT,
    ROW_PICTURES,
    ROWS,
    edit_json,
    hf_ids,
    in_process,
    make_qilin,
    pictures,
    randomise,
    run,
)
from peft import PeftModel
from safetensors.torch import load_file
from test_adapters import write_adapter
from transformers import LlavaForConditionalGeneration

import convert
import qilin_min as q
import train
from model_io.export import save_qilin
from model_io.load import load_qilin
from model_io.lora_export import save_adapter
from model_io.lowbit import add_lora, quantize_linears

# the exact form of a linear projector wants a text twice as wide as the tower
TEXT = dict(hidden_size=96)


@pytest.fixture(scope="module", params=["linear", "mlp2x_gelu"])
def exports(request, tmp_path_factory):
    """(base, merged, adapter): llava-hf folders and the adapter between them, its projector another
    than the base's."""
    folder = tmp_path_factory.mktemp("lora")
    model = make_qilin(request.param, TEXT)
    save_qilin(model, None, folder / "base")
    add_lora(model, rank=3, alpha=7.0)
    kept = {name: p.clone() for name, p in model.named_parameters()}
    randomise(model, seed=9)
    for name, param in model.named_parameters():
        if q.part_of(name) not in ("lora", "mm_projector"):
            param.data = kept[name]
    save_qilin(model, None, folder / "merged")
    save_adapter(
        model,
        folder / "adapter",
        alpha=7.0,
        base=str(folder / "base"),
        vision=None,
        dtype=torch.float32,
        made_from="a test",
    )
    return folder / "base", folder / "merged", folder / "adapter"


def hf_logits(model, row):
    pixels = pictures(3)[ROW_PICTURES[row]] if row else None
    with torch.no_grad():
        return model(input_ids=hf_ids(torch.tensor([ROWS[row]]), model), pixel_values=pixels).logits


def test_we_merge_it_again(exports, report):
    base, merged, adapter = exports
    want = load_qilin(merged)
    got = load_qilin(adapter)
    assert got.config == want.config
    worst = 0.0
    for name, param in want.named_parameters():
        worst = max(worst, float((got.get_parameter(name) - param).abs().max().detach()))
    report(f"lora export, {want.config.projector_type}: weights merged again", worst, 1e-6)
    before = load_qilin(base)
    name = "model.layers.0.mlp.up_proj.weight"
    assert not torch.allclose(before.get_parameter(name), want.get_parameter(name), atol=0.1)


def test_peft_loads_it(exports, report, recwarn):
    """On the base; nothing of the adapter is left over, nothing of the tower gets one."""
    base, merged, adapter = exports
    hf = LlavaForConditionalGeneration.from_pretrained(merged).eval()
    theirs = LlavaForConditionalGeneration.from_pretrained(base)
    theirs = PeftModel.from_pretrained(theirs, adapter).eval()
    assert not [w for w in recwarn if "missing" in str(w.message) or "match" in str(w.message)]
    taken = {
        name.replace(".default", "").replace(".modules_to_save", "")
        for name, _ in theirs.named_parameters()
        if "lora_" in name or "modules_to_save" in name
    }
    assert taken == set(load_file(adapter / "adapter_model.safetensors"))
    for row in range(len(ROWS)):
        difference = (hf_logits(theirs, row) - hf_logits(hf, row)).abs().max()
        report(f"lora export, peft's logits, row {row}", difference, 1e-4)
    as_merged = theirs.merge_and_unload()
    difference = (hf_logits(as_merged, 2) - hf_logits(hf, 2)).abs().max()
    report("lora export, logits of peft's merge", difference, 1e-4)


def test_peft_on_transformers_4_loads_it(exports, tmp_path, report):
    target = os.environ.get("TRANSFORMERS_4")
    if not target:
        pytest.skip("TRANSFORMERS_4 names no folder with transformers 4.57.6")
    base, merged, adapter = exports
    hf = LlavaForConditionalGeneration.from_pretrained(merged).eval()
    inputs = {"input_ids": hf_ids(torch.tensor([ROWS[2]]), hf), "pixel_values": pictures(3)[1:3]}
    torch.save(inputs, tmp_path / "inputs.pt")
    script = ROOT / "tests/tools/peft_logits.py"
    paths = (base, adapter, tmp_path / "inputs.pt", tmp_path / "logits.pt")
    done = subprocess.run(
        [sys.executable, script, *paths],
        capture_output=True,
        text=True,
        env=dict(os.environ, PYTHONPATH=target, OMP_NUM_THREADS="1"),
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.startswith("4.57") and "missing" not in done.stderr
    logits = torch.load(tmp_path / "logits.pt", weights_only=True)
    report("lora export, peft's logits, 4.57", (logits - hf_logits(hf, 2)).abs().max(), 1e-4)


def test_a_run_leaves_an_adapter(toy, tmp_path, report):
    """The same run, taken up where it had ended, leaves it in place of the merged model: sharded
    now on two ranks, of a LLaMA and a CLIP folder, whose places it names."""
    run(toy, tmp_path / "out", "--lora", 4, "--batch-size", 8)
    shutil.copytree(tmp_path / "out", tmp_path / "adapter")
    shutil.rmtree(tmp_path / "adapter/final")
    options = ("--lora", 4, "--batch-size", 8, "--lora-export", "adapter")
    run(toy, tmp_path / "adapter", *options, ranks=2)
    final = tmp_path / "adapter/final"
    names = {"README.md", "adapter_config.json", "adapter_model.safetensors", "config.json"}
    assert {file.name for file in final.iterdir()} == names
    assert json.loads((final / "adapter_config.json").read_text())["r"] == 4
    card = (final / "README.md").read_text()
    assert "`llama`" in card and str(toy) not in card
    want = load_qilin(tmp_path / "out")
    got = load_qilin(tmp_path / "adapter")
    start = load_qilin(llm=toy / "llama", vision=toy / "clip")
    assert got.config.projector_type == want.config.projector_type
    worst = 0.0
    has_moved = False
    for name, param in got.named_parameters():
        # an export pads the vocabulary
        merged = want.get_parameter(name)[: len(param)]
        worst = max(worst, float((param - merged).abs().max().detach()))
        has_moved |= not torch.equal(param, start.get_parameter(name))
    report("lora export of train.py: weights merged again", worst, 1e-6)
    assert has_moved
    # found again without its places, where they are given
    edit_json(final / "adapter_config.json", base_model_name_or_path="org/nowhere")
    done = in_process(convert.main, final, tmp_path / "dst", "--llm", toy / "llama", code=0)
    assert "linear projector" in done.stdout
    name = "model.layers.0.mlp.up_proj.weight"
    again = load_qilin(tmp_path / "dst").get_parameter(name)
    assert torch.allclose(again, want.get_parameter(name), atol=1e-6)


@pytest.mark.parametrize(
    "options, words",
    [
        ((), "--lora RANK"),
        (("--lora", "2", "--quantize", "int8"), "--quantize int8"),
    ],
)
def test_what_makes_no_sense_is_one_line(options, words):
    with pytest.raises(ValueError, match=words):
        train.read_settings(["--stage", "2", "--lora-export", "adapter", *options])


def test_an_adapter_of_an_adapter_has_no_base(toy, toy_model, tmp_path):
    """Trained on it may be, but what comes out must be merged."""
    adapter = write_adapter(toy_model, tmp_path / "adapter", r=2, target_modules=["q_proj"])
    options = ("--model", adapter, "--lora", 2, "--max-steps", 1)
    done = run(toy, tmp_path / "out", *options, "--lora-export", "adapter", check=False)
    assert done.returncode == 2 and "is an adapter itself" in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_quantised_weights_have_no_adapter(tmp_path):
    model = make_qilin()
    quantize_linears(model, 8)
    add_lora(model, 2, 4.0)
    with pytest.raises(ValueError, match="merged"):
        save_adapter(
            model,
            tmp_path / "adapter",
            alpha=4.0,
            base="base",
            vision=None,
            dtype=torch.float32,
            made_from="a test",
        )
    assert not (tmp_path / "adapter").exists()
