"""Promise: a run shows what it does: a line a step, a curve that is redrawn, answers to held-out
questions, run.json; and the loop that does it fits a screen."""

import ast
import hashlib
import importlib.util
import json
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT, run
from PIL import Image

from model_io.load import read_checkpoint
from model_io.tokens import Tokenizer, encode_conversation
from training import log
from training.costs import count_sizes, flops


def test_a_line_a_step(toy, tmp_path):
    """step/total, loss, lr, gradient norm, tokens/s, share of peak (the peak being given), memory,
    padding, time left; log.jsonl has the same numbers."""
    done = run(
        toy,
        tmp_path / "out",
        "--batch-size",
        8,
        "--gpu-tflops",
        0.05,
        "--val-data",
        toy / "text.json",
        "--eval-every",
        2,
        "--samples",
        2,
        check=False,
    )
    rows = [json.loads(line) for line in open(tmp_path / "out/log.jsonl")]
    steps = [r for r in rows if "seconds" in r]
    lines = re.findall(
        r"^step (\d+)/3 \| loss ([\d.]+) \| lr ([\d.e-]+) \| grad ([\d.]+) \| "
        r"([\d,]+) tok/s \| ([\d.]+)% of peak \| ([\d.]+) GiB \| padding ([\d.]+)% \| "
        r"[\d.]+ s \| [\d:]+ to go$",
        done.stdout,
        re.M,
    )
    assert len(lines) == len(steps) == 3, done.stdout
    for line, row in zip(lines, steps, strict=True):
        assert (
            int(line[0]) == row["step"]
            and float(line[1]) == pytest.approx(row["loss"], abs=1e-4)
            and float(line[5]) == pytest.approx(100 * row["mfu"], abs=0.06)
        )
    config = read_checkpoint(llm=toy / "llama", vision=toy / "clip").config
    n = config.n_image_tokens
    sizes = count_sizes(config, ("mm_projector", "llm"))
    tokenizer, data = Tokenizer(toy / "llama"), json.loads((toy / "mixed.json").read_text())
    lengths = np.array(
        [len(encode_conversation(r["conversations"], tokenizer, n)[0]) for r in data]
    )
    labels = [
        sum(x != -100 for x in encode_conversation(r["conversations"], tokenizer, n)[1][1:])
        for r in data
    ]
    work = flops(sizes, lengths, 14 + 2, sum(labels))  # 14 rows of one picture and one of two
    assert sum(r["mfu"] * r["seconds"] * 0.05e12 for r in steps) == pytest.approx(work, rel=1e-6)
    assert [r["step"] for r in rows if "val_loss" in r] == [0, 2, 3] and sum(
        r["n_targets"] for r in steps
    ) == sum(labels)
    samples = [json.loads(line) for line in open(tmp_path / "out/samples.jsonl")]
    assert [s["step"] for s in samples] == [0, 0, 2, 2, 3, 3] and all(s["truth"] for s in samples)


def test_the_curve_shows_both_losses(tmp_path):
    """Blue for training, red dots held out, redrawn over the old picture."""
    for n in (5, 50):
        log.draw_curves(
            tmp_path / "loss.png",
            "stage 1",
            [(i, 5 / (i + 1)) for i in range(n)],
            [(0, 5.0), (n - 1, 1.0)],
        )
        pixels = np.asarray(Image.open(tmp_path / "loss.png")).astype(int)
        red = (pixels[..., 0] > 180) & (pixels[..., 1] < 110) & (pixels[..., 2] < 100)
        blue = (pixels[..., 2] > 130) & (pixels[..., 0] < 110)
        assert red.sum() > 30 and blue.sum() > 100 and len(list(tmp_path.iterdir())) == 1


def test_run_json_tells_what_was_run(toy, tmp_path):
    run(toy, tmp_path / "out", "--batch-size", 8, "--max-steps", 1)
    raw = json.loads((tmp_path / "out/run.json").read_text())
    assert raw["data"] == {
        str(toy / "mixed.json"): hashlib.sha256((toy / "mixed.json").read_bytes()).hexdigest()
    }
    assert (
        raw["versions"]["torch"] == torch.__version__
        and raw["world_size"] == 1
        and raw["arguments"]["batch_size"] == 8
        and raw["arguments"]["projector_type"] == "linear"
        and raw["command"][-1] == "1"
        and raw["started_at_step"] == 0
    )


@pytest.mark.parametrize("is_installed", [True, False])
def test_tensorboard(toy, tmp_path, is_installed):
    """Event files when the package is there; where it is not, one line with what to install."""
    if is_installed and not importlib.util.find_spec("tensorboard"):
        pytest.skip("tensorboard is not installed")
    if not is_installed:
        (tmp_path / "hide.py").write_text(
            f"import sys; sys.path.insert(0, {str(ROOT)!r}); sys.modules['tensorboard'] = None\n"
            "import train\nfrom common.files import run_cli\nrun_cli(train.main)"
        )
        words = [sys.executable, tmp_path / "hide.py", "--stage", 2]
        words += ["--llm", toy / "llama", "--vision", toy / "clip", "--projector", "fresh"]
        words += ["--images", toy / "images", "--data", toy / "one.json"]
        words += ["--out", tmp_path / "out", "--tensorboard"]
        done = subprocess.run(list(map(str, words)), capture_output=True, text=True)
        assert (
            done.returncode == 2
            and "pip install tensorboard" in done.stderr
            and "Traceback" not in done.stderr
        ), done.stderr
    else:
        run(toy, tmp_path / "out", "--batch-size", 8, "--tensorboard")
        assert list((tmp_path / "out/tensorboard").glob("events.*"))


def test_the_loop_fits_a_screen():
    """train() is at most 70 lines, and neither it nor what it calls asks for a stage by number."""
    source = (ROOT / "train.py").read_text()
    functions = {
        node.name: node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.FunctionDef)
    }
    loop = functions["train"]
    assert loop.end_lineno - loop.lineno + 1 <= 70
    assert not re.search(r"stage == |stage != ", source)
