"""Promise: what would stop a run hours later is said before anything is loaded: ranks that do not
answer, a disk, a memory or a /dev/shm that is too small; and a run is cut by the links it has."""

import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT, python_on, run

from qilin_min import QilinConfig
from training import preflight
from training.costs import GIB, Machine, count_sizes
from training.plan import LLAMA_SIZES, PAPER_TOWER, choose_fit

RANKS = """
import sys, time
sys.path.insert(0, {root!r})
import torch
from training import preflight
from training.ranks import setup_distributed

rank, world_size, device = setup_distributed()
preflight.PATIENCE = 1.0
{code}
"""


def on_ranks(tmp_path, code, ranks=2):
    script = tmp_path / "ranks.py"
    script.write_text(RANKS.format(root=str(ROOT), code=code))
    return subprocess.run(
        [*python_on(ranks), str(script)], capture_output=True, text=True, timeout=100
    )


def test_a_rank_that_never_comes_is_said(tmp_path):
    code = "time.sleep(300) if rank == 1 else preflight.check_links(device, world_size)"
    done = on_ranks(tmp_path, code)
    lines = [line for line in done.stderr.splitlines() if line.startswith("train.py: ")]
    assert done.returncode == 1 and len(lines) == 1, done.stderr
    assert "rank 0: the first all-reduce" in lines[0] and "not come back in 1 s" in lines[0]


def test_ranks_that_answer_go_on_and_an_all_gather_is_timed(tmp_path):
    """The timing as on GPUs, here between CPUs and with less; a run on them does not use it."""
    code = """
assert preflight.check_links(device, world_size) is None
preflight.GATHERED = 2**20
# written at once: ranks share one output
for n_shards in (world_size, world_size // 2):
    print(f"speed {preflight.gathering_speed(device, n_shards)}\\n", end="")
time.sleep(2.5)
"""
    done = on_ranks(tmp_path, code, ranks=4)
    assert done.returncode == 0, done.stderr[-2000:]
    speeds = [float(line.split()[1]) for line in done.stdout.splitlines() if "speed" in line]
    assert len(speeds) == 8 and min(speeds) > 1e6


def test_a_collective_that_fails_is_said_in_one_line(monkeypatch, capsys):
    def fail(_):
        raise torch.distributed.DistBackendError("NCCL error in: x.cpp\nunhandled system error")

    def leave(code):
        raise SystemExit(code)

    monkeypatch.setattr(
        preflight,
        "dist",
        SimpleNamespace(
            get_world_size=lambda: 8,
            get_rank=lambda: 0,
            get_backend_config=lambda: "cuda:nccl",
            all_reduce=fail,
            DistError=torch.distributed.DistError,
        ),
    )
    monkeypatch.setattr(preflight.os, "_exit", leave)
    with pytest.raises(SystemExit) as error:
        preflight.check_links(torch.device("cpu"), 8)
    line = capsys.readouterr().err
    assert error.value.code == 1 and line.count("\n") == 1
    assert "failed: NCCL error in: x.cpp unhandled system error" in line and "NCCL_DEBUG" in line


@pytest.mark.parametrize(
    "given, before, measured, want, words",
    [
        (None, None, None, 200e9, ""),
        (None, None, 21e9, 21e9, "21 GB/s"),
        (None, 180e9, 21e9, 180e9, "cut for 180, as it was before"),
        (30, 180e9, 21e9, 30e9, "cut for 30, as --gpu-bandwidth says"),
    ],
)
def test_which_bandwidth_counts(monkeypatch, given, before, measured, want, words):
    said = []
    monkeypatch.setattr(preflight, "print0", said.append)
    assert preflight.choose_bandwidth(given, before, measured) == want
    assert words in "".join(said) and len(said) == (measured is not None)


def test_without_nvlink_another_cut_takes_a_third_of_the_time():
    """Stage 2 of 13B on 8 GPUs: cut for 200 GB/s where there are 20, and cut for 20."""
    sizes = count_sizes(QilinConfig(LLAMA_SIZES["13B"], PAPER_TOWER), ("mm_projector", "llm"))
    lengths = np.full(128, 690)
    batches = [list(range(128))]
    near = Machine(8, 80 * GIB)
    far = Machine(8, 80 * GIB, bandwidth=20e9)
    cut = choose_fit(sizes, near, lengths, batches, at_most=16)
    kept = choose_fit(
        sizes, far, lengths, batches, micro_batch_size=cut.micro_batch_size, is_kept=cut.is_kept
    )
    better = choose_fit(sizes, far, lengths, batches, at_most=16)
    assert better.micro_batch_size > cut.micro_batch_size
    assert better.seconds < 0.4 * kept.seconds


def test_a_checkpoint_keeps_the_bandwidth_and_going_on_uses_it(toy, tmp_path):
    options = "--batch-size", 8, "--save-every", 1, "--max-steps", 2, "--keep", 9
    run(toy, tmp_path / "out", *options, "--gpu-bandwidth", 37)
    state = tmp_path / "out/checkpoints/step-1/state.json"
    assert json.loads(state.read_text())["bandwidth"] == 37e9
    for path in (tmp_path / "out/final", tmp_path / "out/checkpoints/step-2"):
        shutil.rmtree(path)
    run(toy, tmp_path / "out", *options)
    last = tmp_path / "out/checkpoints/step-2/state.json"
    assert json.loads(last.read_text())["bandwidth"] == 37e9


@pytest.mark.parametrize(
    "step, n_steps, save_every, want",
    [(0, 10, 5, 2), (0, 11, 5, 3), (5, 11, 5, 2), (7, 11, 5, 2), (11, 11, 5, 0), (0, 3, 500, 1)],
)
def test_checkpoints_to_come(step, n_steps, save_every, want):
    saved = {s for s in range(step + 1, n_steps) if s % save_every == 0}
    assert len(saved) + (step < n_steps) == want
    assert preflight.n_saves_to_come(step, n_steps, save_every) == want


def test_a_disk_that_is_too_small_stops_the_run_before_it_loads(toy, tmp_path, monkeypatch):
    free = 10 * 2**30
    monkeypatch.setattr(preflight.shutil, "disk_usage", lambda _: SimpleNamespace(free=free))
    preflight.check_disk(tmp_path, one=3 * 2**30, n_more=3, final=2**30)
    with pytest.raises(OSError, match="10.7 GB are free") as error:
        preflight.check_disk(tmp_path, one=3 * 2**30, n_more=3, final=2**30 + 1)
    assert error.value.errno == 28


def group_files(root, lines, files):
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/meminfo").write_text("MemTotal: 9000 kB\nMemAvailable:    5000 kB\n")
    (root / "proc/self/cgroup").write_text(lines)
    for name, text in files.items():
        path = root / "sys/fs/cgroup" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


@pytest.mark.parametrize(
    "lines, files, want",
    [
        ("", {}, 5000 * 1024),
        # a job inside a container: the limit stands one folder up, files count as free
        (
            "0::/job/step\n",
            {
                "job/memory.max": "1000000\n",
                "job/memory.current": "700000\n",
                "job/memory.stat": "anon 5\ninactive_file 50000\n",
                "job/step/memory.max": "max\n",
                "job/step/memory.current": "600000\n",
            },
            350_000,
        ),
        (
            "9:name=systemd:/\n4:cpu,memory:/a\n",
            {
                "memory/a/memory.limit_in_bytes": "9223372036854771712\n",
                "memory/a/memory.usage_in_bytes": "100\n",
                "memory/memory.limit_in_bytes": "2000000\n",
                "memory/memory.usage_in_bytes": "500000\n",
            },
            1_500_000,
        ),
    ],
)
def test_memory_that_is_left(tmp_path, lines, files, want):
    group_files(tmp_path, lines, files)
    assert preflight.available_memory(tmp_path) == want


def test_too_little_memory_for_a_checkpoints_copy(monkeypatch):
    monkeypatch.setattr(preflight, "available_memory", lambda: 100e9)
    preflight.check_host_memory(99e9)
    with pytest.raises(ValueError, match=r"a copy of 156\.3 GB, 100\.0 GB are available"):
        preflight.check_host_memory(156.3e9)
    monkeypatch.undo()
    assert 0 < preflight.available_memory() < math.inf


def test_workers_that_shm_has_room_for(monkeypatch):
    """64 MB, docker's default, and 8 ranks whose workers have 4 MB ready each: two fit."""
    said = []
    monkeypatch.setattr(preflight, "print0", said.append)
    monkeypatch.setattr(preflight.shutil, "disk_usage", lambda _: SimpleNamespace(free=64 * 2**20))
    assert preflight.workers_that_fit(None, 8, ahead=4 * 2**20, n_local=8) == 2
    assert "--workers 2 in place of 8" in said[0] and "--shm-size" in said[0]
    assert preflight.workers_that_fit(None, 1, ahead=4 * 2**20, n_local=8) == 1
    assert preflight.workers_that_fit(2, 8, ahead=4 * 2**20, n_local=8) == 2
    with pytest.raises(ValueError, match=r"--workers 3: .*2 fit"):
        preflight.workers_that_fit(3, 8, ahead=4 * 2**20, n_local=8)
    assert len(said) == 1


@pytest.mark.parametrize(
    "name, lie, code, words",
    [
        ("disk_usage", "lambda _: SimpleNamespace(free=1000)", 1, "not enough room for this run"),
        ("available_memory", "lambda: 1000", 2, "not enough memory on this host"),
    ],
)
def test_a_run_stops_before_it_loads(toy, tmp_path, name, lie, code, words):
    """All ranks, in one line; nothing is in checkpoints/."""
    where = "preflight.shutil" if name == "disk_usage" else "preflight"
    script = tmp_path / "small.py"
    script.write_text(
        f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
from types import SimpleNamespace
import train
from common.files import run_cli
from training import preflight
{where}.{name} = {lie}
def load(*_, **__):
    raise AssertionError("too late")
train.build_model = load
run_cli(train.main)
"""
    )
    words_of_run = ["--stage", 2, "--llm", toy / "llama", "--vision", toy / "clip"]
    words_of_run += ["--projector", "fresh", "--images", toy / "images"]
    words_of_run += ["--data", toy / "one.json", "--out", tmp_path / "out"]
    done = subprocess.run(
        [sys.executable, str(script), *map(str, words_of_run)],
        capture_output=True,
        text=True,
        env=dict(os.environ, OMP_NUM_THREADS="1"),
    )
    lines = [line for line in done.stderr.splitlines() if "train.py: " in line]
    assert done.returncode == code and len(lines) == 1 and words in lines[0], done.stderr
    assert not Path(tmp_path / "out/checkpoints").exists()


@pytest.mark.parametrize(
    "command, environment, want",
    [
        ("torchrun train.py", {}, 30),
        ("torchrun --shutdown-timeout 600 train.py", {}, 600),
        ("torchrun --shutdown_timeout=90 train.py", {}, 90),
        ("torchrun train.py", {"TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "500"}, 500),
    ],
)
def test_a_torchrun_that_will_not_wait_is_said(monkeypatch, command, environment, want):
    """13B's 156 GB need more than half a minute, and less than ten."""
    said = []
    monkeypatch.setattr(preflight, "print0", said.append)
    monkeypatch.setattr(preflight, "lines_of_file", lambda _: [command.replace(" ", "\0")])
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert preflight.torchrun_patience() == want
    preflight.say_if_impatient(156e9)
    assert not said
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
    preflight.say_if_impatient(5e9)
    assert not said
    preflight.say_if_impatient(156e9)
    assert len(said) == (want < 78) and all("--shutdown-timeout 600" in line for line in said)
