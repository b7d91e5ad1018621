"""What a step of tests/gpu.sh is given and what it gives: a Context in, rows of the table out."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch


@dataclass
class Row:
    """A row of the table `check | expected | measured | holds`."""

    check: str
    expected: str
    measured: str
    # None: a figure that nothing is promised of
    holds: bool | None


@dataclass
class Context:
    """Where a step runs."""

    # the step's own folder, made; also the current folder of its process
    out: Path
    device: torch.device
    # on a CPU at tiny sizes: the same code, only sizes differ
    is_dry: bool
    is_quick: bool
    # of all earlier steps, by name; what a step puts there is in report.json and is read by later
    # ones ("gpu_name", "gpu_gib", "gemm_bf16_tflops", "bandwidth_gb_s", ...)
    figures: dict[str, Any]
