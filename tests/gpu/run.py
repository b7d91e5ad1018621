"""The first hour on a GPU: every CUDA promise of this project proven or broken on this machine.

    bash tests/gpu.sh              everything, under 40 minutes on one A100 or H100
    bash tests/gpu.sh --quick      the shorter steps, under 10 minutes
    bash tests/gpu.sh --dry        the same code at tiny sizes on a CPU: does the script work?
    bash tests/gpu.sh --only parity --again parity

Started again it goes on where it stopped: a step that was done by the same code on the same machine
is not run again, unless --again names it. All is written under $OUT (default out/gpu): report.md
and report.json (the table, the figures, the machine), log.txt (what the steps said), steps/.
Exit code: 0 every row holds, 1 one does not, 2 something needed is missing, 130 or 143 interrupted.
"""

import argparse
import ctypes
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from types import FrameType
from typing import Any, BinaryIO, NoReturn

from common.files import digest, digest_of, lock, read_json, run_cli, write_json
from gpu.report import write_report
from gpu.steps import STEPS, Step

ROOT = Path(__file__).resolve().parent.parent.parent
# seconds until a step counts as hung
LIMIT = 480


def read_options() -> argparse.Namespace:
    steps = "\n".join(f"  {step.name:<14} {step.about}" for step in STEPS)
    parser = argparse.ArgumentParser(
        prog="tests/gpu.sh",
        description=__doc__,
        epilog=f"the steps, in their order:\n{steps}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    names = [step.name for step in STEPS]
    add = parser.add_argument
    add("--quick", action="store_true", help="leave out the long steps, and shorten the others")
    add("--dry", action="store_true", help="on a CPU, at tiny sizes")
    add("--only", action="append", metavar="NAME", choices=names, help="this step (repeatable)")
    add(
        "--again",
        action="append",
        metavar="NAME",
        choices=names,
        default=[],
        help="run this step although it was done (repeatable)",
    )
    add("--limit", type=float, default=LIMIT, help="seconds until a step is ended (default: 480)")
    return parser.parse_args()


# --- 1. where it runs -----------------------------------------------------------------------------


def environment(out: Path, is_dry: bool) -> dict[str, str]:
    """Of all that is started: nothing is written outside `out`, nothing is asked of the network."""
    cache = out / "cache"
    folders = {
        "TMPDIR": cache / "tmp",
        "PYTHONPYCACHEPREFIX": cache / "pycache",
        "XDG_CACHE_HOME": cache / "xdg",
        "HF_HOME": cache / "huggingface",
        "TORCH_HOME": cache / "torch",
        "TORCHINDUCTOR_CACHE_DIR": cache / "inductor",
        "TRITON_HOME": cache / "triton",
        "TRITON_CACHE_DIR": cache / "triton/cache",
        "CUDA_CACHE_PATH": cache / "cuda",
    }
    for folder in folders.values():
        folder.mkdir(parents=True, exist_ok=True)
    threads = max(1, min(8, len(os.sched_getaffinity(0)) // 2))
    settings = {
        **os.environ,
        **{name: str(folder) for name, folder in folders.items()},
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(threads)),
        "HF_HUB_OFFLINE": "1",
        # the log is to be read
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    # -B is for what starts before the folder of compiled files is named
    settings.pop("PYTHONDONTWRITEBYTECODE", None)
    if is_dry:
        # also where there is a GPU
        settings["CUDA_VISIBLE_DEVICES"] = ""
    return settings


def look_at_machine(env: dict[str, str], is_dry: bool) -> dict[str, Any]:
    """What preflight says; SystemExit 2 with its line when something is missing."""
    command = [sys.executable, "-m", "gpu.preflight"]
    if is_dry:
        command.append("--dry")
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    if done.returncode == 0:
        return json.loads(done.stdout.splitlines()[-1])
    lines = done.stderr.strip().splitlines() or ["preflight ended and said nothing"]
    print(f"gpu.sh: {lines[-1]}", file=sys.stderr)
    sys.exit(2)


def digest_of_code() -> str:
    """Of everything that a step can run."""
    files = [*ROOT.glob("*.py"), *ROOT.glob("tests/gpu/*.py"), *ROOT.glob("tests/tools/*.py")]
    for folder in ("common", "model_io", "training", "serving", "demo", "evaluation", "chimed"):
        files += (ROOT / folder).glob("*.py")
    return digest_of([(str(file.relative_to(ROOT)), digest(file)) for file in sorted(files)])


def commit() -> str | None:
    """Of the repository, with a + when its files are not those of the commit; None without git."""
    # status would write what it learnt into .git
    git = ["git", "--no-optional-locks", "-C", str(ROOT)]
    with suppress(OSError):
        head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True)
        status = subprocess.run([*git, "status", "--porcelain"], capture_output=True, text=True)
        if head.returncode == 0 and status.returncode == 0:
            return head.stdout.strip()[:12] + ("+" if status.stdout.strip() else "")
    return None


# --- 2. processes: none outlives its step ---------------------------------------------------------


def adopt_orphans() -> None:
    """What a step leaves behind becomes our child, whatever session it is in (torchrun gives each
    rank one of its own)."""
    PR_SET_CHILD_SUBREAPER = 36
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1)


def descendants() -> list[int]:
    """Process ids of all that was started by us, and by what we started."""
    children: dict[int, list[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        # it may end meanwhile
        with suppress(OSError):
            # pid (name) state parent: the name may hold blanks and brackets
            parent = int(stat.read_text().rsplit(")", 1)[1].split()[1])
            children.setdefault(parent, []).append(int(stat.parent.name))
    found = []
    to_visit = [os.getpid()]
    while to_visit:
        mine = children.get(to_visit.pop(), [])
        found += mine
        to_visit += mine
    return found


def end_descendants() -> None:
    """Kill them until none is left."""
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        pids = descendants()
        for pid in pids:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        with suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        if not pids:
            return
        time.sleep(0.05)


def run_process(command: list[str], env: dict[str, str], log: BinaryIO, limit: float) -> str | None:
    """None when it ended well, else what happened. It and all it started is gone afterwards."""
    process = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=env, cwd=ROOT
    )
    try:
        code = process.wait(limit)
    except subprocess.TimeoutExpired:
        return f"ended after {limit:g} s"
    finally:
        end_descendants()
    return None if code == 0 else f"exit code {code}"


# --- 3. steps -------------------------------------------------------------------------------------


class Runner:
    """Runs the steps of one machine into one folder."""

    def __init__(
        self,
        out: Path,
        env: dict[str, str],
        key: str,
        options: dict[str, Any],
        about: dict[str, Any],
    ):
        self.out = out
        self.env = env
        self.key = key
        self.options = options
        # of the report: where, when, of which commit
        self.about = about
        self.log = open(out / "log.txt", "ab")

    def say(self, line: str) -> None:
        print(line, flush=True)
        self.log.write(f"{line}\n".encode())
        self.log.flush()

    def result(self, step: Step) -> dict[str, Any] | None:
        """Of an earlier start, if the same code gave it on the same machine."""
        path = self.out / "steps" / step.name / "result.json"
        if not path.is_file():
            return None
        result = read_json(path)
        return result if result["key"] == self.key else None

    def run(self, step: Step, figures: dict[str, Any]) -> dict[str, Any]:
        """One step in a process of its own, from an empty folder to its result."""
        folder = self.out / "steps" / step.name
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        job = {
            "name": step.name,
            "function": step.function,
            "key": self.key,
            "is_dry": self.options["dry"],
            "is_quick": self.options["quick"],
            "figures": figures,
        }
        write_json(folder / "job.json", job)
        command = [sys.executable, "-m", "gpu.one_step", str(folder)]
        tic = time.monotonic()
        trouble = run_process(command, self.env, self.log, self.options["limit"])
        if trouble is None:
            return read_json(folder / "result.json")
        row = {"check": step.name, "expected": "the step ends", "measured": trouble, "holds": False}
        seconds = round(time.monotonic() - tic, 1)
        result = {"key": self.key, "seconds": seconds, "rows": [], "figures": {}}
        if (folder / "result.json").is_file():
            # it had measured all, and broke while it ended
            result = read_json(folder / "result.json")
        result = {**result, "is_done": False, "rows": [*result["rows"], row]}
        write_json(folder / "result.json", result)
        return result

    def is_wanted(self, step: Step, only: list[str] | None) -> bool:
        if only:
            return step.name in only
        return step.is_in_quick or not self.options["quick"]

    def run_all(self, only: list[str] | None, again: list[str]) -> tuple[str, int]:
        """The table of all steps that were run, now or by an earlier start, and how many of its
        rows do not hold. The report is written after each step: the machine may be gone before the
        last."""
        results: dict[str, dict[str, Any]] = {}
        figures: dict[str, Any] = {}
        table = ""
        n_failed = 0
        for step in STEPS:
            result = self.result(step)
            is_wanted = self.is_wanted(step, only)
            if is_wanted and result and result["is_done"] and step.name not in again:
                self.say(f"gpu: {step.name}: done before, not run again (--again {step.name})")
            elif is_wanted:
                self.say(f"gpu: {step.name}: {step.about} …")
                result = self.run(step, figures)
                n = len(result["rows"])
                n_failed = sum(row["holds"] is False for row in result["rows"])
                self.say(
                    f"gpu: {step.name}: {n - n_failed} of {n} rows hold or promise nothing, "
                    f"{result['seconds']:.0f} s"
                )
            if result:
                results[step.name] = result
                figures.update(result["figures"])
                table, n_failed = write_report(self.out, self.about, results)
        return table, n_failed


def forget_other_world(out: Path, key: str) -> None:
    """Remove what steps of other code, or of another machine, made for each other."""
    mark = out / "world.key"
    if not mark.is_file() or mark.read_text() != key:
        shutil.rmtree(out / "world", ignore_errors=True)
        mark.write_text(key)


def stop_at_sigterm(number: int, frame: FrameType | None) -> NoReturn:
    """Leave in an orderly way, so that what was started is ended."""
    sys.exit(143)


def main() -> None:
    options = read_options()
    out = Path(os.environ["OUT"])
    out.mkdir(parents=True, exist_ok=True)
    held = lock(out / "lock", f"{out} is in use by another run of gpu.sh")
    env = environment(out, options.dry)
    machine = look_at_machine(env, options.dry)
    adopt_orphans()
    signal.signal(signal.SIGTERM, stop_at_sigterm)
    modes = {"dry": options.dry, "quick": options.quick}
    key = digest_of(machine, modes, digest_of_code())
    forget_other_world(out, key)
    about = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": commit(),
        "modes": modes,
        "machine": machine,
    }
    runner = Runner(out, env, key, {**modes, "limit": options.limit}, about)
    where = machine["gpus"][0]["name"] if machine["gpus"] else "a CPU, tiny sizes"
    runner.say(f"gpu: on {where}; torch {machine['torch']}; all goes to {out}")
    tic = time.monotonic()
    table, n_failed = runner.run_all(options.only, options.again)
    runner.say(table)
    runner.say(
        f"gpu: {n_failed} rows do not hold; {time.monotonic() - tic:.0f} s; "
        f"{out / 'report.md'}, report.json, log.txt"
    )
    held.close()
    sys.exit(1 if n_failed else 0)


if __name__ == "__main__":
    run_cli(main)
