"""Promise: training is the same computation however it is cut, learns what it should, and leaves
alone what it should.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, free_port, run
from safetensors.torch import load_file
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

import train
from model_io.load import load_qilin
from training import batches


def test_ranks_and_micro_batches_do_not_matter(toy, tmp_path, report):
    """1 process, 2 processes, and accumulation give the same losses and gradient norms (AdamW hides
    a constant factor, the norm does not), on a batch that mixes text-only, one-picture and
    two-picture samples, with a last batch that leaves a rank nothing to do.
    """
    options = "--batch-size", 7, "--max-grad-norm", 0
    losses, norms = run(toy, tmp_path / "a", *options)
    assert len(losses) == 4 and losses[-1] != losses[0]
    others = [
        ("2 processes", (), 2),
        ("micro-batches of 2", ("--micro-batch-size", 2), 1),
        ("2 processes, micro-batches of 1", ("--micro-batch-size", 1), 2),
    ]
    if os.environ.get("LONG"):
        others.append(("4 processes", (), 4))
    for name, more, ranks in others:
        other, other_norms = run(toy, tmp_path / name, *options, *more, ranks=ranks)
        report(f"train: losses of {name} and of 1", abs(other - losses).max(), 1e-4)
        report(
            f"train: gradient norms of {name} and of 1 (relative)",
            (abs(other_norms - norms) / norms).max(),
            1e-3,
        )


def test_accumulation_1_x_8_is_2_x_4_is_8_x_1(toy, tmp_path, report):
    """Micro-batches x samples in each, of a batch of 8, weights of the end too."""
    ends = {}
    for size in (8, 4, 1):
        losses, norms = run(
            toy, tmp_path / str(size), "--batch-size", 8, "--micro-batch-size", size
        )
        ends[size] = (
            losses,
            norms,
            torch.cat([p.flatten() for p in load_qilin(tmp_path / str(size)).parameters()]),
        )
    for size in (4, 1):
        report(
            f"train: losses of {8 // size} x {size} and of 1 x 8",
            abs(ends[size][0] - ends[8][0]).max(),
            1e-4,
        )
        report(
            f"train: gradient norms of {8 // size} x {size} and of 1 x 8 (relative)",
            abs(ends[size][1] / ends[8][1] - 1).max(),
            1e-3,
        )
        report(
            f"train: weights of {8 // size} x {size} and of 1 x 8",
            (ends[size][2] - ends[8][2]).abs().max().item(),
            1e-3,
        )


def test_stage_1_trains_the_projector_only(toy, tmp_path):
    """final/ holds the projector alone, changed; ranks without a picture take part; a finished run
    says so and exits 0.
    """
    run(toy, tmp_path / "out", "--batch-size", 8, "--epochs", 2, stage=1, ranks=2)
    tensors = load_file(tmp_path / "out/final/projector.safetensors")
    assert set(tensors) == {"model.mm_projector.weight", "model.mm_projector.bias"}
    fresh = load_qilin(llm=toy / "llama", vision=toy / "clip")
    assert not torch.equal(fresh.mm_projector.weight, tensors["model.mm_projector.weight"])
    dcp_to_torch_save(
        tmp_path / "out/checkpoints/step-6", tmp_path / "all.pt"
    )  # 24 samples, 8 a step, 2 epochs
    state = torch.load(tmp_path / "all.pt", weights_only=True)
    assert json.loads((tmp_path / "out/checkpoints/step-6/state.json").read_text())["progress"][
        "step"
    ] == 6 and set(state["model"]) == {"mm_projector.weight", "mm_projector.bias"}
    assert torch.equal(state["model"]["mm_projector.weight"], tensors["model.mm_projector.weight"])
    assert (
        state["optimizer"]["state"]["mm_projector.weight"]["exp_avg"].shape
        == tensors["model.mm_projector.weight"].shape
    )
    again = run(toy, tmp_path / "out", stage=1, check=False)
    assert again.returncode == 0 and "finished" in again.stdout


def test_stage_2_leaves_the_tower_bit_for_bit(toy, tmp_path):
    run(toy, tmp_path / "out", "--batch-size", 8, ranks=2)
    before, after = load_qilin(llm=toy / "llama", vision=toy / "clip"), load_qilin(tmp_path / "out")
    for name, param in before.named_parameters():
        same = torch.equal(param, after.get_parameter(name)[: len(param)])
        assert same == name.startswith("vision_tower."), name


def test_the_dtype_of_compute_can_be_said(toy, tmp_path):
    """--dtype bfloat16 on a CPU: losses are float32's but for bf16's 8 bits, the export is bf16."""
    exact, _ = run(toy, tmp_path / "auto", "--batch-size", 12)
    rounded, _ = run(toy, tmp_path / "bf16", "--batch-size", 12, "--dtype", "bfloat16")
    kinds = {}
    for out in ("auto", "bf16"):
        tensors = load_file(tmp_path / out / "final/model.safetensors")
        kinds[out] = {tensor.dtype for tensor in tensors.values()}
    assert kinds == {"auto": {torch.float32}, "bf16": {torch.bfloat16}}
    assert 0 < abs(rounded / exact - 1).max() < 0.01


def test_text_only_data_trains_on_2_ranks(toy, tmp_path):
    losses, _ = run(toy, tmp_path / "out", "--batch-size", 3, data="text.json", ranks=2)
    assert np.isfinite(losses).all()


def test_one_sample_is_learnt_by_heart(toy, tmp_path):
    losses, _ = run(toy, tmp_path / "out", "--batch-size", 1, "--epochs", 40, data="one.json")
    assert losses[0] > 1 and losses[-1] < 0.01


@pytest.mark.parametrize(
    "script, limit", [("sharded_gradients.py", 1e-4), ("sharded_bf16.py", 5e-2)]
)
def test_gradients_under_two_ranks(toy, report, script, limit):
    """float32: equal to the unsharded model on the whole batch at once, so no factor world_size and
    no mean of means. bf16 compute, as on CUDA: equal to float32 within bf16's 8 bits, with a rank
    that has no picture.
    """
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--nproc_per_node",
            "2",
            "--master_port",
            str(free_port()),
            Path(__file__).parent / "tools" / script,
            toy,
        ],
        capture_output=True,
        text=True,
        timeout=240,
        env=dict(os.environ, OMP_NUM_THREADS="1", PYTHONPATH=str(ROOT)),
    )
    assert done.returncode == 0, done.stderr[-3000:]
    report(
        f"train: gradients of 2 ranks, {script} (relative)", float(done.stdout.split()[-1]), limit
    )


@pytest.mark.parametrize(
    "step, want", [(0, 0.25), (1, 0.5), (3, 1.0), (4, 1.0), (52, 0.5), (100, 0.0)]
)
def test_lr_at(step, want):
    """Linear over ceil(0.04 * 100) = 4 steps, then half a cosine over 96: half way at 4 + 48, zero
    at the end.
    """
    assert train.lr_at(step, 100, 1.0, 0.04) == pytest.approx(want, abs=1e-12)


def test_batch_order_takes_every_sample_once():
    lengths = np.random.default_rng(0).integers(10, 2000, 1003).astype(np.int32)
    order = batches.batch_order(lengths, 16, seed=1, epoch=0)
    assert sorted(i for b in order for i in b) == list(range(1003)) and [len(b) for b in order] == [
        16
    ] * 62 + [11]
    assert max(lengths) in lengths[order[0]] and order == batches.batch_order(
        lengths, 16, 1, 0
    ) != batches.batch_order(lengths, 16, 1, 1)
    for world_size in (1, 2, 3, 8):
        for batch in (order[0], order[-1], [5]):
            cuts = [batches.cut_batch(batch, rank, world_size, 4) for rank in range(world_size)]
            assert (
                sorted(i for cut in cuts for micro in cut for i in micro) == sorted(batch)
                and len({len(cut) for cut in cuts}) == 1
            )


@pytest.mark.parametrize(
    "row, words, ranks",
    [
        ({"conversations": None}, "not a list of turns", 1),
        ([1, 2], "not an object", 1),
        ({"id": "\ud800"}, "row 1", 1),
        ({"image": "gone.png"}, "gone.png", 2),
        ({"image": "../clip/config.json"}, "outside", 1),
        ({"image": ["{a}", "{a}"]}, "1 <image>", 1),
    ],
)
def test_bad_rows_stop_with_one_line(toy, tmp_path, row, words, ranks):
    """Exit code 2 (torchrun's own is 1), the line once, no traceback, nothing under final/."""
    good = json.loads((toy / "instruction.json").read_text())[0]
    text = json.dumps([good, dict(good, **row) if isinstance(row, dict) else row]).replace(
        "{a}", good["image"]
    )
    (tmp_path / "bad.json").write_text(text)
    done = run(
        toy,
        tmp_path / "out",
        "--batch-size",
        2,
        data=tmp_path / "bad.json",
        ranks=ranks,
        check=False,
    )
    lines = [line for line in done.stderr.splitlines() if line.startswith("train.py: ")]
    assert done.returncode == (2 if ranks == 1 else 1) and len(lines) == 1 and words in lines[0], (
        done.stderr[-2000:]
    )
    ours = done.stderr.split("torch/distributed")[0]  # torchrun ends with a report of its own
    assert (
        "Traceback" not in ours
        and 'train.py", line' not in done.stderr
        and not (tmp_path / "out/final").exists()
    )


def test_a_run_that_leaves_the_numbers_stops_before_it_writes_them(toy, tmp_path):
    done = run(
        toy, tmp_path / "out", "--lr", 9, "--max-grad-norm", 0, "--epochs", 40, ranks=2, check=False
    )
    lines = [line for line in done.stderr.splitlines() if line.startswith("train.py: ")]
    assert (
        done.returncode == 1
        and len(lines) == 1
        and "--lr" in lines[0]
        and not (tmp_path / "out/final").exists()
    ), done.stderr[-2000:]


@pytest.mark.parametrize("stage", [1, 2])
def test_a_strangers_final_folder_stops_the_run_at_its_start(toy, tmp_path, stage):
    (tmp_path / "out/final").mkdir(parents=True)
    (tmp_path / "out/final/notes.txt").write_text("mine")
    done = run(
        toy, tmp_path / "out", "--batch-size", 8, stage=stage, data="instruction.json", check=False
    )
    assert (
        done.returncode == 2
        and "final" in done.stderr
        and [p.name for p in (tmp_path / "out").iterdir()] == ["final"]
    )
    assert (tmp_path / "out/final/notes.txt").read_text() == "mine"


def test_a_full_disk_is_one_line_and_exit_code_1(toy, tmp_path):
    """A limit on the size of files stands for the disk: the export of 3 MB meets it."""
    words = [
        sys.executable,
        ROOT / "train.py",
        "--stage",
        2,
        "--llm",
        toy / "llama",
        "--vision",
        toy / "clip",
        "--projector",
        "fresh",
        "--images",
        toy / "images",
        "--data",
        toy / "one.json",
        "--out",
        tmp_path / "out",
        "--workers",
        0,
    ]
    done = subprocess.run(
        ["bash", "-c", "ulimit -f 100; exec " + " ".join(map(str, words))],
        capture_output=True,
        text=True,
        env=dict(os.environ, OMP_NUM_THREADS="1"),
    )
    assert (
        done.returncode == 1
        and "Traceback" not in done.stderr
        and "could not be written" in done.stderr.splitlines()[-1]
    ), done.stderr[-2000:]
    assert not (tmp_path / "out/final").exists()


@pytest.mark.parametrize(
    "options, words, ranks",
    [
        (("--llm", "gone"), "gone", 2),
        (("--images", "gone"), "gone", 1),
        (("--batch-size", 0), "--batch-size", 1),
        (("--projector", "gone"), "gone", 1),
        (("--lr", "nan"), "--lr", 2),
        (("--max-grad-norm", -1), "--max-grad-norm", 1),
        (("--out", "/dev/null"), "/dev/null", 2),
    ],
)
def test_bad_options_stop_with_one_line(toy, tmp_path, options, words, ranks):
    """Exit code 2, which torchrun turns into its own 1."""
    done = run(toy, tmp_path / "out", *options, ranks=ranks, check=False)
    lines = [line for line in done.stderr.splitlines() if line.startswith("train.py: ")]
    assert (
        done.returncode == (1 if ranks > 1 else 2)
        and len(lines) == 1
        and words in lines[0]
        and 'train.py", line' not in done.stderr
    ), done.stderr[-2000:]
