"""Promise: qilin_min.py alone, with torch and safetensors, goes from a llava-hf folder and lists of
ids to the logits and the greedy answers of transformers."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROW_PICTURES, ROWS, edit_json, hf_ids, make_qilin, pictures
from transformers import LlavaForConditionalGeneration

from model_io.export import save_qilin

ROOT = Path(__file__).resolve().parent.parent
N_NEW = 12

# beside torch nothing may be imported that is not in the standard library: not ours, not numpy
SCRIPT = """
import json, sys
for name in ("common", "model_io", "training", "numpy", "sentencepiece", "PIL", "transformers"):
    sys.modules[name] = None
import torch
from qilin_min import generate, load_llava_hf

folder, work = sys.argv[1:]
given = torch.load(work + "/given.pt", weights_only=True)
model = load_llava_hf(folder)
answers = []
logits = []
with torch.no_grad():
    for row, x in zip(given["rows"], given["pictures"]):
        logits.append(model(torch.tensor([row]), x)[0])
        steps = generate(model, [row], x, max_new_tokens=given["n_new"])
        answers.append([ids[0] for ids in steps])
torch.save({"logits": logits, "answers": answers}, work + "/found.pt")
"""


def run_alone(folder, work):
    """What qilin_min.py, copied to where nothing else of ours lies, finds."""
    (work / "qilin_min.py").write_bytes((ROOT / "qilin_min.py").read_bytes())
    (work / "script.py").write_text(SCRIPT)
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "script.py", str(folder), str(work)],
        cwd=work,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return torch.load(work / "found.pt", weights_only=True)


@pytest.mark.parametrize("projector_type", ["linear", "mlp2x_gelu"])
@pytest.mark.parametrize("n_shards", ["one file", "shards"])
def test_a_folder_to_logits_and_answers(projector_type, n_shards, tmp_path, monkeypatch, report):
    if n_shards == "shards":
        monkeypatch.setattr("model_io.export.SHARD_BYTES", 60_000)
    folder = tmp_path / "out"
    save_qilin(make_qilin(projector_type), None, folder)
    assert (folder / "model.safetensors.index.json").is_file() == (n_shards == "shards")

    x = pictures(3)
    given = [x[part] if len(x[part]) else None for part in ROW_PICTURES]
    torch.save({"rows": ROWS, "pictures": given, "n_new": N_NEW}, tmp_path / "given.pt")
    found = run_alone(folder, tmp_path)

    hf = LlavaForConditionalGeneration.from_pretrained(folder, attn_implementation="eager").eval()
    worst = 0.0
    for row, some_pictures, logits, answer in zip(
        ROWS, given, found["logits"], found["answers"], strict=True
    ):
        ids = hf_ids(torch.tensor([row]), hf)
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        if some_pictures is not None:
            inputs["pixel_values"] = some_pictures
        with torch.no_grad():
            want = hf(**inputs).logits[0]
            out = hf.generate(**inputs, max_new_tokens=N_NEW, do_sample=False)
        worst = max(worst, (logits[:, :300] - want[:, :300]).abs().max())
        assert answer == out[0, len(row) :].tolist()
    report(f"qilin_min.py alone, logits ({projector_type}, {n_shards})", worst, 1e-4)


def test_a_folder_of_another_layout_is_refused(tmp_path):
    from qilin_min import load_llava_hf

    save_qilin(make_qilin(), None, tmp_path / "out")
    edit_json(tmp_path / "out/config.json", vision_config=None)
    with pytest.raises(ValueError, match="load_qilin opens it"):
        load_llava_hf(tmp_path / "out")
    with pytest.raises(FileNotFoundError, match="nowhere"):
        load_llava_hf(tmp_path / "nowhere")


def test_every_tensor_is_accounted_for(tmp_path):
    from safetensors.torch import load_file, save_file

    from qilin_min import load_llava_hf

    save_qilin(make_qilin(), None, tmp_path / "out")
    file = tmp_path / "out/model.safetensors"
    tensors = load_file(file)
    lost = "language_model.model.norm.weight"
    save_file({name: t for name, t in tensors.items() if name != lost}, file)
    with pytest.raises(ValueError, match="missing model.norm.weight"):
        load_llava_hf(tmp_path / "out")
    save_file(tensors | {"stray.weight": torch.zeros(2)}, file)
    with pytest.raises(ValueError, match="no place for: stray.weight"):
        load_llava_hf(tmp_path / "out")
    file.unlink()
    with pytest.raises((ValueError, FileNotFoundError), match=r"model\.safetensors"):
        load_llava_hf(tmp_path / "out")


def test_the_script_blocks_what_it_says():
    """A check that finds nothing must be one that could: our own loader needs what is blocked."""
    code = SCRIPT.split("import torch")[0] + "import model_io.load"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode != 0 and "model_io" in done.stderr
