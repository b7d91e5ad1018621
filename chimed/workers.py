"""Work shared out to processes, its results in order."""

import multiprocessing
import os
import threading
import time
from collections import deque
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool

BLOCK = 1000  # rows a worker takes at a time


def end_with(parent):
    """In a worker: ends it when its parent is gone, killed, and nobody will ever ask it for anything again."""

    def watch():
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def in_order(work, tasks, workers):
    """work(*task) of every task, in order; with several workers by processes that stay a few tasks ahead. ValueError when one of them dies."""
    if workers < 2:
        yield from (work(*task) for task in tasks)
        return
    with ProcessPoolExecutor(
        workers,
        mp_context=multiprocessing.get_context("fork"),
        initializer=end_with,
        initargs=(os.getpid(),),
    ) as pool:
        waiting = deque()
        try:
            for task in tasks:
                waiting.append(pool.submit(work, *task))
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
