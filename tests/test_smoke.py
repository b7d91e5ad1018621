"""Promise: `train.py --smoke` proves on this machine what can be proven on it: a run killed goes on
to the same weights, SIGTERM leaves a checkpoint, the export answers."""

import os
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT


def smoke(cwd, root=ROOT):
    """-> (the finished process, {check: result} of its last table)."""
    done = subprocess.run(
        [sys.executable, root / "train.py", "--smoke"],
        capture_output=True,
        text=True,
        cwd=cwd,
        timeout=600,
        env=dict(os.environ, OMP_NUM_THREADS="1"),
    )
    table = done.stdout.split("|---|---|---|")[-1]
    return done, {
        line.split(" | ")[0].strip("| "): line.split(" | ")[1]
        for line in table.splitlines()
        if line.startswith("| ")
    }


@pytest.mark.skipif(not os.environ.get("LONG"), reason="minutes; LONG=1")
def test_smoke(tmp_path):
    done, results = smoke(tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    assert all(
        results[name] == "pass"
        for name in ("stage 1", "stage 2", "kill", "resume", "SIGTERM", "export")
    )
    assert "FAIL" not in results.values() and set(results.values()) <= {
        "pass",
        "skipped",
        "skipped (no CUDA)",
    }
    assert not (tmp_path / "out/smoke").exists()


@pytest.mark.parametrize(
    "file, old, new, failing, words",
    [
        (
            "training/checkpoints.py",
            "load_sharded(",
            "dict(",  # of the same arguments: nothing is loaded
            ["resume"],
            "weights differ",
        ),
        (
            "train.py",
            "run.checkpoints.save(progress, wait=True)\n        together(check_batches",
            "together(check_batches",
            ["SIGTERM"],
            "no whole checkpoint",
        ),
        (
            "sample.py",
            "    model, tokenizer, device = open_model(",
            "    raise ValueError('no answer')\n    model, tokenizer, device = open_model(",
            ["export"],
            "sample.py: no answer",
        ),
    ],
)
@pytest.mark.skipif(not os.environ.get("LONG"), reason="minutes; LONG=1")
def test_smoke_finds_what_is_broken(tmp_path, file, old, new, failing, words):
    """A checkpoint that is not taken up, one that is not written on SIGTERM, an export that cannot
    be asked: that row fails, the others are still made."""
    shutil.copytree(
        ROOT, tmp_path / "broken", ignore=shutil.ignore_patterns(".git", ".venv", "out", "tests")
    )
    text = (tmp_path / "broken" / file).read_text()
    assert text.count(old) == 1
    (tmp_path / "broken" / file).write_text(text.replace(old, new))
    done, results = smoke(tmp_path, tmp_path / "broken")
    assert (
        done.returncode == 1
        and [name for name, result in results.items() if result == "FAIL"] == failing
    ), done.stdout
    assert words in done.stdout and list((tmp_path / "out/smoke").glob("*.log"))
