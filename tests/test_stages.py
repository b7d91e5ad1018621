"""Promise: a further stage is a further row of STAGES, and all follows it: what is trained, kept,
planned and exported, and what a row says wrong is one line."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, free_port, in_process, make_qilin

import train
from model_io.load import load_qilin
from training.freeze import freeze, trained_names
from training.stages import Stage

ROW = Stage(
    goal="projector and the last two blocks on questions",
    trained=("mm_projector", "llm.layers.-2:"),
    lr=2e-3,
    batch_size=6,
    micro_batch_size=3,
    data="toy/mixed.json",
    projector_of=1,
    out="out/stage3",
    export="model",
    result="a projector and two decoder blocks",
    table=2,
)
N_STEPS = 20  # 24 samples, 6 a step, 5 epochs
DRIVER = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
import train
from common.files import run_cli
from training.stages import Stage
train.STAGES[3] = {ROW!r}
run_cli(train.main)
"""


@pytest.fixture
def command(toy, tmp_path):
    """command(out, *options, ranks=1): a run of stage 3 by a script that adds its row."""
    script = tmp_path / "further.py"
    script.write_text(DRIVER)

    def words(out, *options, ranks=1):
        torchrun = []
        if ranks > 1:
            torchrun = ["-m", "torch.distributed.run", "--nproc_per_node", ranks]
            torchrun += ["--master_port", free_port()]
        data = ["--images", toy / "images", "--data", toy / "mixed.json", "--val-data"]
        data += [toy / "text.json", "--eval-every", 8, "--samples", 1, "--workers", 0]
        weights = ["--llm", toy / "llama", "--vision", toy / "clip", "--projector", "fresh"]
        how = ["--epochs", 5, "--save-every", 3, "--out", out]
        everything = [*torchrun, script, "--stage", 3, *weights, *data, *how, *options]
        return [sys.executable, *map(str, everything)]

    return words


def finish(words):
    """What a run said; it must end well."""
    done = subprocess.run(
        words,
        capture_output=True,
        text=True,
        timeout=240,
        env=dict(os.environ, OMP_NUM_THREADS="1"),
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def steps_of(out):
    """What log.jsonl says of each step; a line that is being written is left out."""
    log = out / "log.jsonl"
    lines = log.read_text().split("\n")[:-1] if log.is_file() else []
    return [entry for entry in map(json.loads, lines) if "seconds" in entry]


def losses_of(out):
    return np.array([step["loss"] for step in steps_of(out)])


def kill_after(words, out, n_steps):
    """Start a run, and kill it when so many steps are logged and a checkpoint is whole."""
    process = subprocess.Popen(
        words,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env=dict(os.environ, OMP_NUM_THREADS="1"),
    )
    limit = time.monotonic() + 200
    checkpoint = out / "checkpoints/step-3/state.json"
    while len(steps_of(out)) < n_steps or not checkpoint.is_file():
        assert process.poll() is None and time.monotonic() < limit
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()


def test_a_further_row_trains_resumes_and_exports(toy, tmp_path, command, report):
    """Killed and started again: the same losses and bytes as the run that was not. Two ranks learn
    the same. Only what the row names has changed in the exported folder."""
    whole = tmp_path / "whole"
    said = finish(command(whole))
    assert "stage 3" in said and len(losses_of(whole)) == N_STEPS

    killed = tmp_path / "killed"
    kill_after(command(killed), killed, n_steps=5)
    assert len(steps_of(killed)) < N_STEPS and not (killed / "final").exists()
    assert "going on after step" in finish(command(killed))
    assert np.array_equal(losses_of(killed), losses_of(whole))
    weights = "final/model.safetensors"
    assert (killed / weights).read_bytes() == (whole / weights).read_bytes()
    assert "finished" in finish(command(killed))

    two = tmp_path / "two"
    finish(command(two, ranks=2))
    report(
        "stages: losses of 2 processes and of 1", abs(losses_of(two) - losses_of(whole)).max(), 1e-4
    )

    before = load_qilin(llm=toy / "llama", vision=toy / "clip")
    after = load_qilin(whole)
    trained = ("mm_projector.", "model.layers.1.", "model.layers.2.")
    assert len(before.model.layers) == 3
    for name, param in before.named_parameters():
        # an export pads the vocabulary
        is_same = torch.equal(param, after.get_parameter(name)[: len(param)])
        assert is_same != name.startswith(trained), name
    card = (whole / "final/README.md").read_text()
    assert "a projector and two decoder blocks tuned in stage 3" in card
    n_trained = sum(p.numel() for name, p in before.named_parameters() if name.startswith(trained))
    run = json.loads((whole / "run.json").read_text())
    assert run["parameters"]["trained"] == n_trained
    assert run["arguments"]["lr"] == ROW.lr and run["arguments"]["batch_size"] == ROW.batch_size


def further(monkeypatch, *words, code, **changes):
    """train.py --stage 3 in this process, with a changed row."""
    monkeypatch.setitem(train.STAGES, 3, dataclasses.replace(ROW, **changes))
    return in_process(train.main, "--stage", 3, *words, code=code)


def test_a_further_row_is_planned_and_described(monkeypatch, tmp_path):
    """On the paper's sizes: two of 40 blocks, 317.2 M parameters each, and the projector's 5.2 M
    are trained, and less memory is needed than for all. --help has its numbers."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(train.STAGES, 3, ROW)
    done = in_process(train.main, "--stage", 3, "--plan", "--batch-size", 128, code=0)
    torch.distributed.destroy_process_group()
    text = done.stdout
    assert "plan of stage 3 on 8 GPUs" in text and "no data at toy/mixed.json" in text
    assert "  0.64 of 13.3" in text and "the paper's Table 2" in text
    assert "final weights 26." in text  # the whole model, in bf16

    said = in_process(train.main, "--help", code=0).stdout
    said = " ".join(said.split())
    assert "--stage {1,2,3}" in said
    assert "3: projector and the last two blocks on questions" in said
    assert "(default 256, 128, 6)" in said and "(default 1e-3, 2e-5, 2e-3; with --lora" in said
    assert "out/stage1, out/stage2, out/stage3" in said


@pytest.mark.parametrize(
    "word", ["llm.layer.-2:", "llm.layers.-2", "llm.layers.a:", "vision_tower", "projector", ""]
)
def test_an_unknown_word_is_one_line_that_lists_the_known_ones(monkeypatch, word):
    done = further(monkeypatch, "--projector", "fresh", code=2, trained=("mm_projector", word))
    assert done.stdout == "" and len(done.stderr.splitlines()) == 1
    for known in (repr(word), "mm_projector", "llm (", "llm.layers.A:B", "lora"):
        assert known in done.stderr
    with pytest.raises(ValueError, match="mm_projector; llm"):
        freeze(make_qilin(), ("mm_projector", word))


def test_blocks_that_are_not_there_stop_the_run_before_it_reads_data(toy, tmp_path, monkeypatch):
    words = ["--llm", toy / "llama", "--vision", toy / "clip", "--projector", "fresh"]
    words += ["--out", tmp_path / "out", "--data", toy / "mixed.json"]
    done = further(monkeypatch, *words, code=2, trained=("llm.layers.3:",))
    assert "llm.layers.3: is none of the 3 blocks" in done.stderr
    assert len(done.stderr.splitlines()) == 1 and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"export": "projector"}, "exports the projector alone"),
        ({"export": "gguf"}, "'gguf' is none of projector, model"),
        ({"projector_of": 7}, "stage 7"),
        ({}, "run --stage 1"),
    ],
)
def test_a_row_that_cannot_be_followed_is_one_line(tmp_path, monkeypatch, changes, words):
    """A result that would be lost, a kind of export or a stage that is not there, and where the
    projector of stage 1 is not there, as in stage 2."""
    monkeypatch.chdir(tmp_path)
    done = further(monkeypatch, code=2, **changes)
    assert len(done.stderr.splitlines()) == 1 and words in done.stderr


def test_what_the_options_say_follows_the_row(monkeypatch):
    """Blocks that are trained cannot be quantised, and adapters take their place."""
    monkeypatch.setitem(train.STAGES, 3, ROW)
    done = in_process(train.main, "--stage", 3, "--quantize", "int8", code=2)
    assert "add --lora RANK" in done.stderr
    settings = train.read_settings(["--stage", "3", "--projector", "fresh", "--lora", "4"])
    assert settings.trained == ("mm_projector", "lora") and settings.lr == 2e-4
    done = in_process(train.main, "--stage", 1, "--lora", 4, code=2)
    assert "give it to --stage 2, 3" in done.stderr


def test_a_stage_without_a_row_is_one_line():
    done = subprocess.run(
        [sys.executable, ROOT / "train.py", "--stage", "3"], capture_output=True, text=True
    )
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.splitlines() == [
        "train.py: --stage 3: no such stage; train.py's STAGES has 1, 2"
    ]


@pytest.mark.parametrize(
    "words, blocks, n_others",
    [
        (("llm.layers.-2:",), {1, 2}, 0),
        (("llm.layers.:1", "llm.layers.2:"), {0, 2}, 0),
        (("llm.layers.0:2", "mm_projector"), {0, 1}, 4),
        (("llm.layers.:",), {0, 1, 2}, 0),
        (("llm",), {0, 1, 2}, 3),
    ],
)
def test_words_stand_for_parameters(words, blocks, n_others):
    """Slices of the blocks as of a Python list; all of the language model holds embeddings, last
    norm and head as well. The two layers of the projector have weight and bias."""
    model = make_qilin("mlp2x_gelu", dict(num_hidden_layers=3))
    names = trained_names(model, words)
    inside = {int(Path(name).name.split(".")[2]) for name in names if ".layers." in name}
    assert inside == blocks
    assert sum(".layers." not in name for name in names) == n_others
    freeze(model, words)
    assert {name for name, p in model.named_parameters() if p.requires_grad} == names
