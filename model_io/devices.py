"""What can be computed on here: a GPU that torch can use, or in torch's words why there is none."""

import os
import re
import warnings

import torch

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
