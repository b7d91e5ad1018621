"""Promise: whatever happens to a run, nothing done is lost: killed at any moment it ends with the
weights of a run that was not, and what cannot go on says why.
"""

import functools
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, free_port, run

import train
from training import batches
from training.checkpoints import Progress
from training.ranks import setup_distributed

LONG = os.environ.get("LONG")
EPOCHS = (
    32 if LONG else 8
)  # of the campaign's run: long enough that it does not end before the last kill
STEPS = 5 * EPOCHS  # 5 samples a step


def command(toy, out, ranks, *options, torchrun=()):
    return list(
        map(
            str,
            [
                sys.executable,
                "-m",
                "torch.distributed.run",
                "--nproc_per_node",
                ranks,
                "--master_port",
                free_port(),
                *torchrun,
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
                toy / "mixed.json",
                "--out",
                out,
                "--lr",
                "2e-3",
                "--workers",
                1,
                *options,
            ],
        )
    )


def launch(toy, out, ranks, *options, torchrun=()):
    return subprocess.Popen(
        command(toy, out, ranks, *options, torchrun=torchrun),
        stdout=open(Path(out).with_suffix(".stdout"), "a"),
        stderr=subprocess.STDOUT,
        env=dict(os.environ, OMP_NUM_THREADS="1"),
    )


def ranks_of(launcher):
    """Process ids of the ranks that a torchrun started, by rank."""
    try:
        children = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split()
        return [
            int(pid) for pid in children if b"train.py" in Path(f"/proc/{pid}/cmdline").read_bytes()
        ]
    except OSError:
        return []


def steps_done(out):
    log = Path(out) / "log.jsonl"
    return log.read_text().count('"seconds"') if log.is_file() else 0


def wait_for(condition, seconds=90):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.003)


def kill(pid):
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        pass


CAMPAIGN = "--batch-size", 5, "--epochs", EPOCHS, "--save-every", 3


@pytest.fixture(scope="module")
def untouched(toy, tmp_path_factory):
    """The same run without a kill: (losses, bytes of its weights)."""
    out = tmp_path_factory.mktemp("untouched") / "out"
    losses, _ = run(toy, out, *CAMPAIGN, ranks=2)
    assert len(losses) == STEPS
    return losses, (out / "final/model.safetensors").read_bytes()


def losses_of(out):
    return np.array([r["loss"] for r in map(json.loads, open(out / "log.jsonl")) if "seconds" in r])


def is_saving(out, started):
    """Whether a checkpoint is being written that was begun after `started`."""
    try:
        return any(path.stat().st_mtime > started for path in out.glob("checkpoints/*.partial"))
    except FileNotFoundError:  # renamed in between
        return False


def is_moment(kind, launcher, saving, limit, out, steps):
    """Whether it is time to kill: what was waited for is there, or the run has ended."""
    if launcher.poll() is not None:
        return True
    if kind == "rank inside a save":
        return saving()
    return time.monotonic() > limit or steps_done(out) >= steps


def test_kills_at_random_moments_change_nothing(toy, tmp_path, untouched):
    """`until torchrun …; do …; done`, while a rank, the launcher, or a rank inside a save is killed
    with SIGKILL: the same losses, weights to the last bit.
    """
    out, rng, moments = tmp_path / "out", random.Random(int(os.environ.get("KILL_SEED", 0))), []
    n_kills = 20 if LONG else 3
    n_starts = 0
    while n_starts < 4 * n_kills:
        n_starts += 1
        launcher, before = launch(toy, out, 2, *CAMPAIGN), steps_done(out)
        if len(moments) < n_kills:
            kind = ("rank inside a save", "rank", "launcher")[len(moments) % 3]
            started, steps = time.time(), before + rng.randrange(1, 9)
            # now and then in the imports, mostly among the steps
            seconds = rng.uniform(1, 6) if rng.random() < 0.3 else 60
            limit = time.monotonic() + seconds

            saving = functools.partial(is_saving, out, started)
            wait_for(functools.partial(is_moment, kind, launcher, saving, limit, out, steps))
            time.sleep(rng.uniform(0, 0.05))
            victims = ranks_of(launcher)
            moments.append((kind, steps_done(out), saving()))
            if kind == "launcher" or not victims:
                kill(launcher.pid)
            else:
                kill(rng.choice(victims))
        if launcher.wait(timeout=120) == 0:
            break
    assert launcher.returncode == 0, out.with_suffix(".stdout").read_text()[-3000:]
    print(
        f"killed {len(moments)} times, (who, steps logged, a save under way): {moments}; "
        f"{n_starts} starts"
    )
    assert len(moments) == n_kills
    assert (
        np.array_equal(losses_of(out), untouched[0])
        and (out / "final/model.safetensors").read_bytes() == untouched[1]
    )


@pytest.mark.skipif(not LONG, reason="--long")
def test_torchrun_restarts_by_itself(toy, tmp_path, untouched):
    """--max-restarts: one rank killed, all start again and go on from the newest checkpoint."""
    out = tmp_path / "out"
    launcher = launch(toy, out, 2, *CAMPAIGN, torchrun=("--max-restarts", 3))
    for steps, rank in ((7, 0), (20, 1)):
        wait_for(lambda n=steps: steps_done(out) >= n and len(ranks_of(launcher)) == 2)
        kill(ranks_of(launcher)[rank])
        time.sleep(1)
    assert launcher.wait(timeout=120) == 0, out.with_suffix(".stdout").read_text()[-3000:]
    assert out.with_suffix(".stdout").read_text().count("going on after step") == 2
    assert (
        np.array_equal(losses_of(out), untouched[0])
        and (out / "final/model.safetensors").read_bytes() == untouched[1]
    )


@pytest.mark.parametrize(
    "number, code", [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGHUP, 143)]
)
def test_a_signal_saves_and_stops(toy, tmp_path, untouched, number, code):
    """One process: its exit code is seen. The checkpoint is of the very step it stopped after."""
    out = tmp_path / "out"
    words = command(toy, out, 1, *CAMPAIGN, "--save-every", 1000)
    process = subprocess.Popen(
        [sys.executable, *words[words.index(str(ROOT / "train.py")) :]],
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
        env=dict(os.environ, OMP_NUM_THREADS="1"),
    )
    wait_for(lambda: steps_done(out) >= 3)
    process.send_signal(number)
    _, stderr = process.communicate(timeout=60)
    step = steps_done(out)
    lines = [line for line in stderr.splitlines() if line.startswith("train.py: ")]
    assert process.returncode == code and lines == [
        f"train.py: stopped after step {step} of {STEPS}; the same command goes on from there"
    ], stderr
    assert (
        json.loads((out / f"checkpoints/step-{step}/state.json").read_text())["progress"]["step"]
        == step
    )


def test_sigterm_to_the_launcher_stops_all_ranks(toy, tmp_path, untouched):
    out = tmp_path / "out"
    launcher = launch(toy, out, 2, *CAMPAIGN, "--save-every", 1000)
    wait_for(lambda: steps_done(out) >= 5)
    launcher.send_signal(signal.SIGTERM)
    launcher.wait(timeout=60)
    step = steps_done(out)
    assert (
        out / f"checkpoints/step-{step}/state.json"
    ).is_file() and f"stopped after step {step}" in out.with_suffix(".stdout").read_text()
    losses, _ = run(toy, out, *CAMPAIGN, "--save-every", 1000, ranks=2)
    assert np.array_equal(losses, untouched[0])


def test_ranks_whose_launcher_is_gone_save_and_stop(toy, tmp_path):
    out = tmp_path / "out"
    launcher = launch(toy, out, 2, *CAMPAIGN, "--save-every", 1000)
    wait_for(lambda: steps_done(out) >= 5)
    pids = ranks_of(launcher)
    kill(launcher.pid)
    launcher.wait()
    wait_for(lambda: not any(Path(f"/proc/{pid}").exists() for pid in pids), 30)
    assert (out / f"checkpoints/step-{steps_done(out)}/state.json").is_file()


def test_a_full_disk_keeps_the_earlier_checkpoints(toy, tmp_path):
    """A limit on the size of files stands for the disk: small enough for the log, too small for a
    checkpoint of 9 MB.
    """
    out = tmp_path / "out"
    options = "--batch-size", 5, "--epochs", 2, "--save-every", 3, "--workers", 0
    run(toy, out, *options, "--max-steps", 6, "--keep", 5)
    (out / "final").rename(tmp_path / "final")
    words = command(toy, out, 1, *options, "--allow-changes", "--save-every", 2)
    words = [sys.executable, *words[words.index(str(ROOT / "train.py")) :]]
    done = subprocess.run(
        ["bash", "-c", "ulimit -f 100; exec " + " ".join(words)],
        capture_output=True,
        text=True,
        env=dict(os.environ, OMP_NUM_THREADS="1"),
    )
    last = [line for line in done.stderr.splitlines() if line.strip()][-1]
    assert (
        done.returncode == 1
        and last.startswith("train.py: ")
        and "could not be written" in last
        and "GB free" in last
        and "Traceback" not in done.stderr
    ), done.stderr[-2000:]
    assert sorted(p.name for p in (out / "checkpoints").iterdir()) == ["step-3", "step-6"]
    losses, _ = run(toy, out, *options, "--allow-changes")
    assert len(losses) == 10


# --- bad numbers, bad pictures --------------------------------------------------------------------


def test_bad_losses_are_told_from_good_ones():
    """Not finite, or above 3 times the mean of the last good ones and 2 more: here 3 x 1 + 2."""
    progress = Progress()
    assert [progress.is_bad(1.0, 1.0) for _ in range(10)] == [False] * 10
    assert [
        progress.is_bad(loss, norm)
        for loss, norm in ((float("nan"), 1), (1.0, float("inf")), (5.5, 1), (4.9, 1), (1.0, 1))
    ] == [True, True, True, False, False]
    assert progress.n_bad == 3 and progress.n_bad_in_a_row == 0 and len(progress.recent) == 12


def test_a_bad_step_is_skipped_and_named(toy, tmp_path, monkeypatch):
    """A sample whose loss is nan on one of two ranks: both skip the step, weights stay, its ids are
    in the log; ten in a row stop the run.
    """
    poison = tmp_path / "poison.py"
    poison.write_text(f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
import torch, train, qilin_min
from common.files import run_cli
forward, bad = qilin_min.Qilin.forward, (3, 4) if "--few" in sys.argv else range(2, 99)
def poisoned(self, *args, **kw):
    loss = forward(self, *args, **kw)
    poisoned.calls += self.training
    is_bad = self.training and poisoned.calls in bad and torch.distributed.get_rank() == 1
    return loss * float("nan") if is_bad else loss
poisoned.calls = 0
qilin_min.Qilin.forward = poisoned
if "--few" in sys.argv: sys.argv.remove("--few")
run_cli(train.main)
""")
    for few, code in ((["--few"], 0), ([], 1)):
        out = tmp_path / f"out{code}"
        words = command(toy, out, 2, "--batch-size", 4, "--epochs", 3, "--max-bad-steps", 6)
        words[words.index(str(ROOT / "train.py"))] = str(poison)
        done = subprocess.run(
            words + few, capture_output=True, text=True, env=dict(os.environ, OMP_NUM_THREADS="1")
        )
        rows = [json.loads(line) for line in open(out / "log.jsonl")]
        bad = [r for r in rows if "bad" in r]
        assert done.returncode == code, done.stderr[-2000:]
        assert [r["step"] for r in bad] == ([3, 4] if few else [2, 3, 4, 5, 6, 7]) and all(
            len(r["ids"]) == 4 for r in bad
        )
        assert all(np.isfinite(r["loss"]) for r in rows if "seconds" in r)
        if code:
            lines = [line for line in done.stderr.splitlines() if line.startswith("train.py: ")]
            assert (
                len(lines) == 1 and "6 steps in a row" in lines[0] and not (out / "final").exists()
            )


@pytest.fixture
def lost(toy, tmp_path):
    """A data file of 14 rows, the last of which names a picture that breaks off."""
    rows = json.loads((toy / "instruction.json").read_text())[:14]
    (toy / "images/lost.png").write_bytes((toy / "images" / rows[0]["image"]).read_bytes()[:300])
    rows[13] = dict(rows[13], image="lost.png")
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    return tmp_path / "rows.json"


def test_a_picture_that_does_not_decode_teaches_nothing(toy, tmp_path, lost):
    """Grey in its place, its labels ignored: the same losses and weights as if the row's answers
    had never been there. Counted, and named in the log.
    """
    run(toy, tmp_path / "out", "--batch-size", 7, data=lost, ranks=2)
    rows = [json.loads(line) for line in open(tmp_path / "out/log.jsonl")]
    grey = [name for r in rows if "grey" in r for name in r["grey"]]
    assert (
        len(grey) == 1
        and "lost.png" in grey[0]
        and grey[0].startswith(json.loads(lost.read_text())[13]["id"])
    )
    labels = sum(r["n_targets"] for r in rows if "seconds" in r)
    setup_distributed()
    dialogs = batches.Dialogs(
        [lost],
        train.Tokenizer(toy / "llama"),
        16,
        64,
        template="v1",
        max_length=2048,
        images=toy / "images",
        image_mode="pad",
        strict=False,
        out=tmp_path / "out",
    )
    batch = dialogs[[12, 13]]
    train.dist.destroy_process_group()
    assert labels == dialogs.n_labels[:13].sum() < dialogs.n_labels.sum()
    assert (
        (batch["labels"][1] == -100).all()
        and (batch["labels"][0] != -100).any()
        and (batch["pixel_values"][1] == 0).all()
        and batch["input_ids"][1].ne(0).any()
    )


def test_strict_stops_and_keeps_what_was_trained(toy, tmp_path, lost):
    done = run(toy, tmp_path / "out", "--batch-size", 1, "--strict", data=lost, check=False)
    steps = [json.loads(line)["step"] for line in open(tmp_path / "out/log.jsonl")]
    assert (
        done.returncode == 2
        and "lost.png" in done.stderr
        and steps
        and (tmp_path / f"out/checkpoints/step-{steps[-1]}/.metadata").is_file()
    )


def test_a_folder_of_pictures_that_is_gone_stops_the_run(toy, tmp_path):
    """Grey pictures are for a few that do not decode: when most of a step's are gone, training on
    would unlearn seeing.
    """
    for name in ("images", "gone"):
        (tmp_path / name).mkdir()
    rows = json.loads((toy / "instruction.json").read_text())[:14]
    for row in rows:
        (tmp_path / "images" / row["image"]).write_bytes(
            (toy / "images" / row["image"]).read_bytes()
        )
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    options = "--batch-size", 7, "--epochs", 4, "--images", tmp_path / "images"
    run(
        toy, tmp_path / "out", *options, "--save-every", 2, "--keep", 9, data=tmp_path / "rows.json"
    )
    for path in [tmp_path / "out/final", *(tmp_path / "out/checkpoints").glob("step-[4-9]")]:
        path.rename(tmp_path / "gone" / path.name)
    for picture in (tmp_path / "images").iterdir():
        picture.unlink()
    done = run(toy, tmp_path / "out", *options, data=tmp_path / "rows.json", check=False)
    assert done.returncode == 2 and "--images" in done.stderr and "still there" in done.stderr, (
        done.stderr[-1500:]
    )


def test_small_steps_whose_pictures_are_gone_stop_the_run_too(toy, tmp_path, lost):
    """Batches of one picture: a single lost one is skipped, without a step of Adam; three steps in
    a row stop the run, with what was trained saved.
    """
    rows = json.loads(lost.read_text())
    lost.write_text(json.dumps(rows[:2] + [dict(rows[13], id=str(i)) for i in range(9)]))
    done = run(toy, tmp_path / "out", "--batch-size", 1, "--epochs", 3, data=lost, check=False)
    rows = [json.loads(line) for line in open(tmp_path / "out/log.jsonl")]
    assert done.returncode == 2 and "still there" in done.stderr, done.stderr[-1500:]
    assert (
        all(r["n_targets"] > 0 for r in rows if "seconds" in r)
        and sum("grey" in r for r in rows) >= 2
    )


@pytest.mark.parametrize("what", ["held-out file", "data"])
def test_a_file_changed_in_mid_run_stops_it_and_keeps_what_was_trained(toy, tmp_path, what):
    """By size and time of the file: rows by byte offset would be others."""
    for name in ("data", "held"):
        (tmp_path / f"{name}.json").write_bytes((toy / "mixed.json").read_bytes())
    changed = tmp_path / ("held.json" if what == "held-out file" else "data.json")
    words = command(
        toy,
        tmp_path / "out",
        1,
        "--data",
        tmp_path / "data.json",
        "--val-data",
        tmp_path / "held.json",
        "--batch-size",
        2,
        "--epochs",
        40,
        "--eval-every",
        40,
        "--save-every",
        1000,
    )
    process = subprocess.Popen(
        [sys.executable, *words[words.index(str(ROOT / "train.py")) :]],
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
        env=dict(os.environ, OMP_NUM_THREADS="1"),
    )
    wait_for(lambda: steps_done(tmp_path / "out") >= 3)
    changed.write_text(changed.read_text() + " ")
    _, stderr = process.communicate(timeout=100)
    lines = [line for line in stderr.splitlines() if line.startswith("train.py: ")]
    assert (
        process.returncode == 2
        and len(lines) == 1
        and changed.name in lines[0]
        and "changed" in lines[0]
    ), stderr[-2000:]
    assert (tmp_path / f"out/checkpoints/step-{steps_done(tmp_path / 'out')}/state.json").is_file()
