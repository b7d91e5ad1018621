"""What can be computed on here: a GPU that torch can use, or in torch's words why there is none."""

import functools
import os
import re
import time
import warnings

import torch
import torch.nn.functional as F

from common.files import one_line

OLDEST_TORCH = (2, 11)
NO_DRIVER = "Found no NVIDIA driver"


def check_torch() -> None:
    """ValueError where torch is older than what this is written for."""
    numbers = re.findall(r"\d+", torch.__version__)
    if tuple(map(int, numbers[:2])) < OLDEST_TORCH:
        needed = ".".join(map(str, OLDEST_TORCH))
        raise ValueError(f"torch {torch.__version__} is too old: {needed} or newer is needed")


def is_gpu_sought() -> bool:
    """Whether torch is built for NVIDIA GPUs and was not told to see none."""
    is_hidden = os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1")
    return torch.version.cuda is not None and not is_hidden


def gpu_problem() -> str | None:
    """Why torch can use no NVIDIA GPU, in its own words; None where it can."""
    with warnings.catch_warnings():
        # torch warns of what is said in one line here
        warnings.simplefilter("ignore")
        if torch.cuda.is_available():
            return None
    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:
        return one_line(error)
    return "No CUDA GPUs are available"


def has_gpu(*, is_expected: bool) -> bool:
    """Whether torch can use an NVIDIA GPU.

    ValueError where there is a driver that it cannot use (too old, its GPU gone): computing on the
    CPU instead, in silence, would be the slower by a hundred times. is_expected: without any driver
    too. A build of torch for CPUs, or one told to see no GPU, expects none.
    """
    problem = gpu_problem()
    if problem is None:
        return True
    if is_gpu_sought() and (is_expected or NO_DRIVER not in problem):
        raise ValueError(
            f"torch {torch.__version__} is built for GPUs and can use none: {problem} "
            "(mend that, or --device cpu)"
        )
    return False


def choose_training_device(device: str) -> None:
    """What --device of train.py means, for all that asks torch whether there is a GPU; auto: the
    GPUs, and ValueError where a build of torch for them can use none."""
    if device == "cpu":
        # of this process and of those that it starts
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    elif device == "auto":
        has_gpu(is_expected=True)
    else:
        problem = gpu_problem()
        if problem is not None:
            raise ValueError(f"--device cuda: {problem}")


def chosen_device(device: str | None) -> str:
    """--device as given, or the first there is. ValueError where nothing can be computed on it, or
    where a GPU is there that cannot be used and nobody said to do without."""
    if not device:
        if has_gpu(is_expected=False):
            device = "cuda"
        elif torch.backends.mps.is_available():
            device = "mps"
        else:
            device = "cpu"
    try:
        torch.ones(1, device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(
            f"--device {device}: not to be had here ({one_line(error)[:400]})"
        ) from None
    return device


# how many times as fast bfloat16 must be on a CPU to be computed in: less is not worth its
# rounding, and noise could decide it
WORTHWHILE = 1.3


@functools.cache
def bfloat16_gain() -> float:
    """How many times as fast this CPU multiplies in bfloat16 as in float32, found once.

    A product of 64 rows, some milliseconds; a tenth of a second on a CPU without instructions for
    it, where the answer may be 0.01.
    """
    seconds: dict[torch.dtype, list[float]] = {torch.float32: [], torch.bfloat16: []}
    for _ in range(5):
        for dtype, times in seconds.items():
            x = torch.ones(64, 512, dtype=dtype)
            weight = torch.ones(512, 512, dtype=dtype)
            start = time.perf_counter()
            F.linear(x, weight)
            times.append(time.perf_counter() - start)
    # what else runs here can only add, and the first call of each prepares
    return min(seconds[torch.float32]) / min(seconds[torch.bfloat16])


def default_dtype(device: str) -> tuple[str, str | None]:
    """(the dtype that a device computes fast, a line that says why where it was measured)."""
    kind = torch.device(device).type
    if kind == "cuda":
        has_bfloat16 = torch.cuda.is_bf16_supported(including_emulation=False)
        return "bfloat16" if has_bfloat16 else "float16", None
    if kind == "mps":
        return "float16", None
    gain = bfloat16_gain()
    dtype = "bfloat16" if gain > WORTHWHILE else "float32"
    measured = f"this CPU multiplies {gain:.2g} times as fast in bfloat16 as in float32"
    return dtype, f"{dtype}: {measured} (--dtype chooses)"
