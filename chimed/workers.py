"""Work shared out to processes, its results in order."""

import argparse
import multiprocessing
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any

from common.options import InRange

BLOCK = 1000  # rows a worker takes at a time


def usable_cpus() -> int:
    """CPUs that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def add_workers_option(parser: argparse.ArgumentParser, about: str) -> None:
    """--workers N, the same for every command."""
    parser.add_argument(
        "--workers",
        action=InRange,
        type=int,
        low=1,
        high=512,
        default=usable_cpus(),
        help=about,
    )


def blocks_of(n_rows: int, size: int) -> Iterator[tuple[int, int]]:
    """(start, stop) of each block of `size` rows, the last one shorter."""
    for start in range(0, n_rows, size):
        yield start, min(start + size, n_rows)


# What a worker process was handed when it began, its one entry. Forked, the process has it without
# a copy: a million keys are neither pickled nor held once a worker.
_handed: list[Any] = []


def _begin(parent: int, shared: Any) -> None:
    """In a worker, first of all: keeps what all its tasks share, and watches its parent."""
    _handed.append(shared)
    end_with(parent)


def _call(work: Callable, task: tuple) -> Any:
    """In a worker: one task."""
    return work(_handed[0], *task)


def end_with(parent: int) -> None:
    """In a worker: ends it when its parent is gone, killed, and nobody will ever ask it for
    anything again."""

    def watch():
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def in_order(
    work: Callable[..., Any], tasks: Iterable[tuple], workers: int, shared: Any
) -> Iterator[Any]:
    """work(shared, *task) of every task, in order; with several workers by processes that stay a
    few tasks ahead. ValueError when one of them dies."""
    if workers < 2:
        for task in tasks:
            yield work(shared, *task)
        return
    with ProcessPoolExecutor(
        workers,
        mp_context=multiprocessing.get_context("fork"),
        initializer=_begin,
        initargs=(os.getpid(), shared),
    ) as pool:
        waiting = deque()
        try:
            for task in tasks:
                waiting.append(pool.submit(_call, work, task))
                if len(waiting) > 4 * workers:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        except BrokenProcessPool:
            raise ValueError(
                "a worker process died (out of memory?): try fewer --workers"
            ) from None
        finally:
            pool.shutdown(cancel_futures=True)
