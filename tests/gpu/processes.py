"""Scripts of this project, started by a step, each with a log of its own in the step's folder."""

import json
import os
import subprocess
from pathlib import Path
from typing import Any

from gpu.table import Context
from training.options import RunSettings
from training.smoke import HERE, Started, command_line


def launch(
    context: Context,
    name: str,
    *words: object,
    ranks: int = 0,
    env: dict[str, str] | None = None,
) -> Started:
    """Start a script or a module with its options, under torchrun when ranks are given; what it
    says goes to name.log."""
    path = context.out / f"{name}.log"
    everything = {
        **os.environ,
        # torchrun kills after 30 s, which a large checkpoint may take
        "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "240",
        "PYTHONPATH": os.pathsep.join((str(HERE), os.environ.get("PYTHONPATH", ""))),
        **(env or {}),
    }
    with open(path, "a") as log:
        process = subprocess.Popen(
            command_line(words, ranks),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env=everything,
        )
    return Started(process, path)


def finish(
    context: Context,
    name: str,
    *words: object,
    ranks: int = 0,
    env: dict[str, str] | None = None,
) -> str:
    """launch(), and what it said once it has ended well; Failed names its last words and its
    log."""
    return launch(context, name, *words, ranks=ranks, env=env).finish()


def train_words(
    stage: int, toy: Path, out: Path, data: tuple[Path, ...], start: tuple[object, ...]
) -> list[object]:
    """train.py on files of the toy world. start: the options that say from which weights."""
    words: list[object] = ["train.py", "--stage", stage, *start]
    words += ["--projector", "fresh"]
    words += ["--images", toy / "images", "--data", *data]
    words += ["--workers", 0, "--log-every", 10]
    words += ["--out", out]
    return words


def has_option(name: str) -> bool:
    """Whether train.py knows it."""
    return name in RunSettings.__dataclass_fields__


def on_device(kind: str) -> list[object]:
    """The option of train.py that says where: "cuda" or "cpu"."""
    return ["--device", kind] if has_option("device") else []


def logged_steps(out: Path) -> list[dict[str, Any]]:
    """What log.jsonl of a run says of each step; a line that is being written is left out."""
    log = out / "log.jsonl"
    if not log.is_file():
        return []
    entries = [json.loads(line) for line in log.read_text().split("\n")[:-1]]
    return [entry for entry in entries if "seconds" in entry]
