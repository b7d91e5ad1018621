"""Promise: a run that goes on from a checkpoint is the run that never stopped; with other ranks the
same samples in the same order; never by accident another run.
"""

import io
import json
import os
import pickle
import shutil

import numpy as np
import pytest
import torch
from conftest import run

from model_io.load import load_qilin
from training.checkpoints import PlainLoadPlanner, name_in_setup, read_state

OPTIONS = "--batch-size", 5, "--epochs", 3, "--save-every", 2, "--keep", 3  # 24 samples: 15 steps
STEPS = 15
LONG = os.environ.get("LONG")


def cut_back(out, to, step):
    """A copy of a finished run's folder as it was right after `step`: its newest checkpoint is
    step-`step`, nothing is exported, the log goes further.
    """
    shutil.copytree(
        out,
        to,
        ignore=lambda folder, names: [
            n for n in names if n == "final" or (n.startswith("step-") and int(n[5:]) > step)
        ],
    )
    return to


@pytest.fixture(scope="module")
def whole(toy, tmp_path_factory):
    """An uninterrupted run on 2 ranks that kept all its checkpoints, held-out looks between."""
    out = tmp_path_factory.mktemp("whole") / "out"
    run(
        toy,
        out,
        *OPTIONS,
        "--keep",
        99,
        "--val-data",
        toy / "text.json",
        "--eval-every",
        6,
        "--samples",
        1,
        ranks=2,
    )
    return out


def entries(out):
    return [
        {
            k: v
            for k, v in json.loads(line).items()
            if k not in ("seconds", "tokens_per_s", "memory_gib", "mfu")
        }
        for line in open(out / "log.jsonl")
    ]


@pytest.mark.parametrize("step", [2, 6, 14] if LONG else [2, 14])
def test_same_ranks_bit_for_bit(toy, tmp_path, whole, step):
    """Losses, norms, held-out losses and weights; the log holds every step once, in order."""
    out = cut_back(whole, tmp_path / "out", step)
    run(
        toy,
        out,
        *OPTIONS,
        "--keep",
        99,
        "--val-data",
        toy / "text.json",
        "--eval-every",
        6,
        "--samples",
        1,
        ranks=2,
    )
    assert entries(out) == entries(whole) and [
        e["step"] for e in entries(out) if "loss" in e
    ] == list(range(1, STEPS + 1))
    assert (out / "final/model.safetensors").read_bytes() == (
        whole / "final/model.safetensors"
    ).read_bytes()
    assert (out / "samples.jsonl").read_text() == (whole / "samples.jsonl").read_text()
    assert json.loads((out / "run.json").read_text())["started_at_step"] == step


def test_2_ranks_to_1_to_4(toy, tmp_path, whole, report):
    """Same samples in the same global order (labels a step are equal), losses within 1e-3, weights
    of the end close.
    """
    out = cut_back(whole, tmp_path / "out", 4)
    run(toy, out, *OPTIONS, "--keep", 99, ranks=1)
    for path in [out / "final", *(out / "checkpoints").glob("step-1[245]")]:
        shutil.rmtree(path)
    done = run(toy, out, *OPTIONS, ranks=4, check=False)
    assert (
        done.returncode == 0
        and "going on after step 10" in done.stdout
        and "written by 1 ranks" in done.stdout
    ), done.stderr[-2000:]
    (a, b) = ([e for e in entries(path) if "loss" in e] for path in (out, whole))
    assert [e["n_targets"] for e in a] == [e["n_targets"] for e in b] and len(a) == STEPS
    report(
        "resume: losses of 2 -> 1 -> 4 ranks and of 2",
        max(abs(x["loss"] - y["loss"]) for x, y in zip(a, b, strict=True)),
        1e-3,
    )
    p, q = (load_qilin(path) for path in (out, whole))
    report(
        "resume: weights of 2 -> 1 -> 4 ranks and of 2",
        max(
            (x - y).abs().max().item() for x, y in zip(p.parameters(), q.parameters(), strict=True)
        ),
        1e-3,
    )


def test_hybrid_sharding_is_the_same_computation(toy, tmp_path, whole, report):
    """--replicate 2 on 4 ranks, from a checkpoint of 2 plain ones."""
    out = cut_back(whole, tmp_path / "out", 8)
    losses, _ = run(toy, out, *OPTIONS, "--replicate", 2, ranks=4)
    want = [e["loss"] for e in entries(whole) if "loss" in e]
    report("resume: losses of 2 x 2 hybrid ranks and of 2", np.abs(losses - want).max(), 1e-3)


def test_the_newest_are_kept_and_the_halves_removed(toy, tmp_path, whole):
    """--keep 3; a folder still .partial is removed; one without its state, one with a file cut
    short lose their names: none is taken.
    """
    out = cut_back(whole, tmp_path / "out", 8)
    folder = out / "checkpoints"
    shutil.copytree(folder / "step-8", folder / "step-12.partial")
    shutil.copytree(folder / "step-8", folder / "step-10")
    (folder / "step-10/state.json").unlink()
    shutil.copytree(folder / "step-8", folder / "step-9")
    (folder / "step-9/__0_0.distcp").write_bytes(b"cut short")
    (folder / "notes").mkdir()
    done = run(toy, out, *OPTIONS, ranks=2, check=False)
    assert (
        done.returncode == 0
        and "going on after step 8" in done.stdout
        and done.stdout.count("not whole") == 3
    ), done.stderr[-2000:]
    assert sorted(p.name for p in folder.iterdir()) == [
        "notes",
        "step-10.damaged",
        "step-12",
        "step-14",
        "step-15",
        "step-9.damaged",
    ]


@pytest.mark.parametrize(
    "state",
    [
        "[]",
        "{",
        '{"progress": {"step": -2}}',
        '{"progress": {"pace": 2}, "files": {}}',
        '{"progress": {"step": 8}, "files": {"gone": 3}, "setup": {}, "world_size": 2}',
    ],
)
def test_a_state_that_no_run_wrote_is_no_checkpoint(toy, tmp_path, whole, state):
    """Asked for by name: one line. In --out: not taken."""
    shutil.copytree(whole / "checkpoints/step-8", tmp_path / "out/checkpoints/step-8")
    (tmp_path / "out/checkpoints/step-8/state.json").write_text(state)
    done = run(
        toy,
        tmp_path / "other",
        *OPTIONS,
        "--resume",
        tmp_path / "out/checkpoints/step-8",
        check=False,
    )
    lines = [line for line in done.stderr.splitlines() if line.startswith("train.py: ")]
    assert (
        done.returncode == 2
        and len(lines) == 1
        and "step-8" in lines[0]
        and "Traceback" not in done.stderr
    ), done.stderr[-2000:]
    with pytest.raises((ValueError, OSError)):
        read_state(tmp_path / "out/checkpoints/step-8")


@pytest.mark.parametrize(
    "change, words",
    [
        (("--lr", 1e-3), "lr: 0.002 there, 0.001 now"),
        (("--batch-size", 6), "batch_size"),
        (("--epochs", 4), "epochs"),
        (("--seed", 1), "seed"),
        (("--template", "plain"), None),
        (("--data", "instruction.json"), "data"),
        (("--projector", "fresh", "--projector-type", "mlp2x_gelu"), "projector_type"),
        (("--llm", "other"), "weights"),
    ],
)
def test_another_setup_is_refused_by_name(toy, tmp_path, whole, change, words):
    """One line, exit code 2, the checkpoints untouched; --allow-changes goes on where the tensors
    fit.
    """
    change = [toy / c if c == "instruction.json" else c for c in change]
    if "other" in change:
        shutil.copytree(toy / "llama", tmp_path / "llama")
        model = load_qilin(llm=toy / "llama", vision=toy / "clip")
        model.model.embed_tokens.weight.data[0] += 1e-3
        from model_io.export import save_tensors
        from qilin_min import part_of

        save_tensors(
            {n: p.data for n, p in model.named_parameters() if part_of(n) == "llm"},
            tmp_path / "llama/model.safetensors",
        )
        change = ["--llm", tmp_path / "llama"]
    out = cut_back(whole, tmp_path / "out", 4)
    done = run(toy, out, *OPTIONS, *change, check=False)
    lines = [line for line in done.stderr.splitlines() if line.startswith("train.py: ")]
    assert done.returncode == 2 and len(lines) == 1, done.stderr[-2000:]
    if words:
        assert words in lines[0] and "--allow-changes" in lines[0]
    assert sorted(p.name for p in (out / "checkpoints").iterdir()) == ["step-2", "step-4"]
    if words == "lr: 0.002 there, 0.001 now":
        run(toy, out, *OPTIONS, *change, "--allow-changes")


def test_never_and_path(toy, tmp_path, whole):
    """never: from the first step, earlier checkpoints put aside; PATH: from that one, in another
    --out as well; a wrong PATH is one line.
    """
    want = [e["loss"] for e in entries(whole) if "loss" in e]
    out = cut_back(whole, tmp_path / "out", 4)
    losses, _ = run(toy, out, *OPTIONS, "--resume", "never", ranks=2)
    assert np.array_equal(losses, want) and sorted(
        p.name for p in (out / "checkpoints.1").iterdir()
    ) == ["log.jsonl", "samples.jsonl", "step-2", "step-4"]
    other = tmp_path / "other"
    losses, _ = run(toy, other, *OPTIONS, "--resume", whole / "checkpoints/step-10", ranks=2)
    assert (
        np.array_equal(losses, want[10:])
        and (other / "final/model.safetensors").read_bytes()
        == (whole / "final/model.safetensors").read_bytes()
    )
    back = cut_back(whole, tmp_path / "back", 14)
    losses, _ = run(
        toy, back, *OPTIONS, "--keep", 2, "--resume", back / "checkpoints/step-4", ranks=2
    )  # a way back: what came later is put aside, not taken for newer
    assert np.array_equal(losses, want) and sorted(
        p.name for p in (back / "checkpoints").iterdir()
    ) == ["step-14", "step-15"]
    assert sorted(p.name for p in (back / "checkpoints.1").iterdir()) == [
        "step-10",
        "step-12",
        "step-14",
        "step-6",
        "step-8",
    ]
    done = run(toy, tmp_path / "third", *OPTIONS, "--resume", tmp_path, check=False)
    assert done.returncode == 2 and "no checkpoint there" in done.stderr


def test_what_a_checkpoint_holds(whole):
    """Weights trained, both moments, RNG of each rank, progress, digests; the copy of step 2 is not
    step 4 (a copy that shares memory would be).
    """
    from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

    states = []
    for step in (2, 4):
        dcp_to_torch_save(whole / f"checkpoints/step-{step}", whole / "all.pt")
        states.append(torch.load(whole / "all.pt", weights_only=True))
    (whole / "all.pt").unlink()
    name = "model.layers.0.mlp.up_proj.weight"
    assert not torch.equal(states[0]["model"][name], states[1]["model"][name]) and not any(
        n.startswith("vision_tower") for n in states[0]["model"]
    )
    assert states[0]["optimizer"]["state"][name]["step"] == 2 and set(
        states[0]["optimizer"]["state"][name]
    ) == {"step", "exp_avg", "exp_avg_sq"}
    assert set(states[0]["rng"]) == {"cpu-0", "cpu-1"}
    state = json.loads((whole / "checkpoints/step-4/state.json").read_text())
    assert (
        state["progress"]["step"] == 4
        and len(state["setup"]["data"][0]) == len(state["setup"]["weights"]) == 64
    )


class Bomb:
    def __reduce__(self):
        return open, (str(Bomb.marker), "w")


@pytest.mark.parametrize("damage", ["code", "dotted name", "garbage"])
def test_no_code_of_a_checkpoint_runs(toy, tmp_path, whole, damage):
    """Torch unpickles .metadata without asking: a crafted one is refused in one line, and leaves no
    trace.
    """
    Bomb.marker = tmp_path / "ran"
    path = tmp_path / "step-8"
    shutil.copytree(whole / "checkpoints/step-8", path)
    raw = (
        pickle.dumps(Bomb())
        if damage == "code"
        else b"\x80\x04\x8c\x26torch.distributed.checkpoint.metadata\x8c\x09os.system\x93."
        if damage == "dotted name"
        else b"\x80garbage"
    )
    (path / ".metadata").write_bytes(raw)
    state = json.loads((path / "state.json").read_text())
    state["files"][".metadata"] = len(raw)
    (path / "state.json").write_text(json.dumps(state))
    done = run(toy, tmp_path / "out", *OPTIONS, "--resume", path, check=False)
    lines = done.stderr.strip().splitlines()
    assert (
        done.returncode == 2
        and len(lines) == 1
        and ".metadata" in lines[0]
        and not Bomb.marker.exists()
    ), done.stderr[-2000:]


def test_bytes_of_a_checkpoint_run_no_code(tmp_path):
    """What is no tensor (Adam's options) is read by a planner of ours, weights only."""
    Bomb.marker = tmp_path / "ran"
    buffer = io.BytesIO()
    torch.save(Bomb(), buffer)
    buffer.seek(0)
    with pytest.raises(pickle.UnpicklingError):
        PlainLoadPlanner().load_bytes(None, buffer)
    assert not Bomb.marker.exists()


def test_a_damaged_log_does_not_keep_a_run_from_going_on(toy, tmp_path, whole):
    """Lines that are none are dropped, the others stay, a line separator inside a question too."""
    out = cut_back(whole, tmp_path / "out", 4)
    good = (out / "log.jsonl").read_bytes().splitlines(keepends=True)
    bad = [
        b"\xff\xfe\n",
        b"[" * 5000 + b"\n",
        b'{"step": 1, "seconds": 1}\n',
        b'{"step": 2, "seconds": 1, "loss": "x"}\n',
        b"[1]\n",
        b'{"step": 0, "val_loss": null}\n',
    ]
    (out / "log.jsonl").write_bytes(b"".join(bad + good))
    samples = out / "samples.jsonl"
    samples.write_text(
        json.dumps({"step": 0, "question": "a\u2028b\u0085c"}, ensure_ascii=False)
        + "\n"
        + samples.read_text()
    )
    run(
        toy,
        out,
        *OPTIONS,
        "--keep",
        99,
        "--val-data",
        toy / "text.json",
        "--eval-every",
        6,
        "--samples",
        1,
        ranks=2,
    )
    assert (
        entries(out) == entries(whole)
        and json.loads(samples.read_text().split("\n")[0])["question"] == "a\u2028b\u0085c"
    )


def test_a_setup_names_layers_as_it_always_did():
    """A run that started from a llava-hf folder says the same of its weights as one from original
    names: a checkpoint of either, written before names were looked up in a table, goes on.
    """
    assert name_in_setup("mm_projector.linear_1.weight") == "mm_projector.0.weight"
    assert name_in_setup("mm_projector.linear_2.bias") == "mm_projector.2.bias"
    for name in ("mm_projector.weight", "model.layers.0.mlp.up_proj.weight"):
        assert name_in_setup(name) == name
