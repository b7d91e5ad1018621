"""How long something takes on a device."""

import time
from collections.abc import Callable

import torch


def wait_for(device: torch.device) -> None:
    """Until all that was asked of the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def best_seconds(device: torch.device, work: Callable[[], object], runs: int) -> float:
    """Seconds of the fastest of several runs of work(), after two that are not counted."""
    for _ in range(2):
        work()
    best = float("inf")
    for _ in range(runs):
        wait_for(device)
        tic = time.perf_counter()
        work()
        wait_for(device)
        best = min(best, time.perf_counter() - tic)
    return best
