"""Is all there that the steps need? Prints what the machine is as JSON, or one line that says what
is missing. A process of its own, so that what runs the steps holds no GPU.

    python -m gpu.preflight [--dry]
"""

import importlib
import json
import platform
import shutil
import subprocess
import sys
from typing import Any

from common.files import one_line

PACKAGES = ("torch", "transformers", "sentencepiece", "safetensors", "tqdm", "PIL", "numpy")


def check_packages() -> None:
    """ValueError names the packages that are missing or do not import."""
    missing = []
    for name in PACKAGES:
        try:
            importlib.import_module(name)
        except ImportError as error:
            missing.append(f"{name} ({error})")
    if missing:
        raise ValueError(f"needed and not there: {'; '.join(missing)} (see requirements.txt)")


def check_torch(is_dry: bool) -> None:
    """ValueError unless torch is new enough and, but for a dry run, has a GPU that computes."""
    import torch

    # here, since it brings the packages that are looked for first
    from model_io import devices

    devices.check_torch()
    if is_dry:
        return
    problem = devices.gpu_problem()
    if problem is None:
        try:
            torch.ones(1, device="cuda").sum().item()
            return
        except RuntimeError as error:
            # a GPU that this build has no kernels for, or whose memory is full
            problem = one_line(error)
    raise ValueError(
        f"torch {torch.__version__} has no GPU to use: {problem} "
        "(bash tests/gpu.sh --dry runs the same code at tiny sizes on a CPU)"
    )


def driver_version() -> str | None:
    """Of the NVIDIA driver, as nvidia-smi says it."""
    if shutil.which("nvidia-smi") is None:
        return None
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    lines = done.stdout.split()
    return lines[0] if done.returncode == 0 and lines else None


def describe(is_dry: bool) -> dict[str, Any]:
    """What decides whether a result of an earlier start still counts, beside the code."""
    import torch
    import transformers

    gpus = []
    if not is_dry:
        for i in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(i)
            gpus.append({"name": properties.name, "gib": round(properties.total_memory / 2**30, 1)})
    return {
        "host": platform.node(),
        "gpus": gpus,
        "driver": None if is_dry else driver_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }


def main(is_dry: bool) -> None:
    try:
        check_packages()
        check_torch(is_dry)
    except ValueError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
    print(json.dumps(describe(is_dry)))


if __name__ == "__main__":
    main("--dry" in sys.argv[1:])
