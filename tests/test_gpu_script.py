"""Promise: tests/gpu.sh is never the thing that fails: its dry run goes through here, writes only
under $OUT, goes on where it stopped, and what does not hold, breaks or hangs is a row and exit code
1."""

import json
import os
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, TESTS
from gpu import preflight
from gpu.steps import STEPS

LONG = os.environ.get("LONG")
# what the fast suite has time for
SOME = ("machine", "parity")

FAKE_STEPS = """
from gpu.table import Row

def measures(context):
    context.figures["seen"] = 42
    return [Row("a figure", "-", str(context.is_dry), None), Row("it holds", "1", "1", True)]

def misses(context):
    return [Row("planted", "1", str(context.figures["seen"]), False)]

def breaks(context):
    raise KeyError("no such thing")
"""
FAKE_RUN = """
import gpu.run
from gpu.steps import Step

names = ("measures", "misses", "breaks")
gpu.run.STEPS = tuple(Step(name, f"fake_steps:{name}", True, "planted") for name in names)
gpu.run.main()
"""
# a step's process, and a rank as torchrun starts it: in a session of its own
HANGS = """
import subprocess, sys, time
rank = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(300)"],
                        start_new_session=True)
print(rank.pid, flush=True)
time.sleep(300)
"""
HANG_RUN = f"""
import os, sys
from gpu.run import adopt_orphans, run_process

adopt_orphans()
with open(sys.argv[1], "wb") as log:
    print(run_process([sys.executable, "-c", {HANGS!r}], dict(os.environ), log, 3))
"""


def gpu_sh(out, *options, **variables):
    """`bash tests/gpu.sh`, on a machine whose home is empty."""
    home = out.parent / "home"
    home.mkdir(exist_ok=True)
    env = {**os.environ, "OUT": str(out), "HOME": str(home), "OMP_NUM_THREADS": "1", **variables}
    command = ["bash", TESTS / "gpu.sh", *options]
    return subprocess.run(command, capture_output=True, text=True, env=env, cwd=home, timeout=3000)


def python(code, *words, **variables):
    """A piece of Python that may import what gpu.sh runs."""
    path = os.pathsep.join((str(ROOT), str(TESTS), variables.pop("path", "")))
    env = {**os.environ, "PYTHONPATH": path, **variables}
    return subprocess.run(
        [sys.executable, "-c", code, *words], capture_output=True, text=True, env=env, cwd=ROOT
    )


def state_of_repository():
    done = subprocess.run(["git", "status", "--porcelain"], capture_output=True, cwd=ROOT)
    return done.stdout, (ROOT / "out/gpu").exists()


def check_report(out, names):
    """The table is whole: a row or more of each step, in report.json, report.md and the log."""
    report = json.loads((out / "report.json").read_text())
    page = (out / "report.md").read_text()
    assert set(report["seconds"]) == {row["step"] for row in report["rows"]} == set(names)
    for row in report["rows"]:
        assert set(row) == {"step", "check", "expected", "measured", "holds"}
        assert row["check"] in page and row["measured"]
    assert "DRY RUN" in page and "| check | expected | measured | holds |" in page
    assert report["machine"]["torch"] == torch.__version__ and report["date"]
    return report


def test_the_dry_run_holds_and_goes_on(tmp_path):
    out = tmp_path / "result"
    before = state_of_repository()
    names = [step.name for step in STEPS] if LONG else SOME
    options = ["--dry"]
    for name in names:
        options += ["--only", name]
    done = gpu_sh(out, *options)
    assert done.returncode == 0, done.stdout + done.stderr
    report = check_report(out, names)
    assert not [row for row in report["rows"] if row["holds"] is False]
    assert report["n_failed"] == 0 and report["figures"]["gpu_name"] == "CPU"
    assert state_of_repository() == before
    assert {path.name for path in tmp_path.iterdir()} == {"home", "result"}
    assert not list((tmp_path / "home").rglob("*"))

    stamps = {path: path.stat().st_mtime_ns for path in out.glob("steps/*/result.json")}
    again = gpu_sh(out, *options)
    assert again.returncode == 0 and again.stdout.count("not run again") == len(names)
    assert stamps == {path: path.stat().st_mtime_ns for path in stamps}

    hung = gpu_sh(out, "--dry", "--only", "machine", "--again", "machine", "--limit", "0.1")
    assert hung.returncode == 1
    assert "| machine | the step ends | ended after 0.1 s | NO |" in hung.stdout


def test_a_row_that_does_not_hold_and_a_step_that_breaks(tmp_path):
    """Exit code 1; figures of a step are there in the next; what came before and after stays; a
    broken step is tried again by the next start, a measured one is not."""
    (tmp_path / "fake_steps.py").write_text(FAKE_STEPS)
    out = tmp_path / "out"
    variables = {"OUT": str(out), "path": str(tmp_path)}
    done = python(FAKE_RUN, "--dry", **variables)
    assert done.returncode == 1, done.stderr
    for line in (
        "| a figure | - | True | - |",
        "| it holds | 1 | 1 | yes |",
        "| planted | 1 | 42 | NO |",
        "| breaks | the step ends | failed: KeyError: 'no such thing' | NO |",
    ):
        assert line in done.stdout
    assert "Traceback" in (out / "log.txt").read_text() and "Traceback" not in done.stdout
    report = json.loads((out / "report.json").read_text())
    assert report["n_failed"] == 2 and report["figures"] == {"seen": 42}


def test_a_step_that_hangs_is_ended_with_its_ranks(tmp_path):
    log = tmp_path / "log"
    done = python(HANG_RUN, str(log))
    assert done.stdout.strip() == "ended after 3 s", done.stderr
    rank = int(log.read_text())
    with pytest.raises(ProcessLookupError):
        os.kill(rank, 0)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_names_the_dry_run(tmp_path):
    done = gpu_sh(tmp_path / "out")
    assert done.returncode == 2 and done.stdout == ""
    lines = done.stderr.splitlines()
    assert len(lines) == 1 and "no GPU to use" in lines[0] and "--dry" in lines[0]


def test_what_is_missing_is_named(monkeypatch):
    monkeypatch.setattr(preflight, "PACKAGES", ("numpy", "no_such_package"))
    with pytest.raises(ValueError, match="not there: no_such_package"):
        preflight.check_packages()
    monkeypatch.setattr(torch, "__version__", "2.10.1+cu128")
    with pytest.raises(ValueError, match=r"torch 2\.10\.1\+cu128 is too old: 2\.11"):
        preflight.check_torch(is_dry=True)


def test_each_step_is_explained():
    page = (ROOT / "docs/gpu.md").read_text(encoding="utf-8")
    explained = page.split("## What each step proves")[1].split("\n## ")[0]
    first_cells = [line.split("|")[1] for line in explained.splitlines() if line.startswith("|")]
    named = {name.strip() for cell in first_cells for name in cell.split(",")}
    assert {step.name for step in STEPS} == named - {"step", "---"}


def test_help_teaches(tmp_path):
    done = gpu_sh(tmp_path / "out", "--help")
    assert done.returncode == 0 and not (tmp_path / "out").exists()
    assert all(f"  {step.name} " in done.stdout for step in STEPS)
    assert "--dry" in done.stdout and "report.md" in done.stdout
