"""The process of one step: `python -m gpu.one_step FOLDER` reads FOLDER/job.json, runs the step's
function and writes FOLDER/result.json."""

import importlib
import os
import sys
import time
import traceback
from dataclasses import asdict
from pathlib import Path

import torch

from common.files import one_line, read_json, write_json
from gpu.table import Context, Row


def main(folder: Path) -> None:
    job = read_json(folder / "job.json")
    device = torch.device("cpu" if job["is_dry"] else "cuda:0")
    figures = dict(job["figures"])
    context = Context(
        out=folder,
        device=device,
        is_dry=job["is_dry"],
        is_quick=job["is_quick"],
        figures=figures,
    )
    module, function = job["function"].split(":")
    is_done = True
    tic = time.monotonic()
    os.chdir(folder)
    try:
        rows = getattr(importlib.import_module(module), function)(context)
    # what a step stumbles over is a finding too, and no reason to leave out the others
    except Exception as error:
        traceback.print_exc()
        is_done = False
        measured = f"failed: {type(error).__name__}: {one_line(error)[:300]}"
        rows = [Row(job["name"], "the step ends", measured, False)]
    result = {
        "key": job["key"],
        "is_done": is_done,
        "seconds": round(time.monotonic() - tic, 1),
        "rows": [asdict(row) for row in rows],
        "figures": {
            name: value
            for name, value in figures.items()
            if name not in job["figures"] or value != job["figures"][name]
        },
    }
    write_json(folder / "result.json", result)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
