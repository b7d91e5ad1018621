"""Before anything is loaded: do the GPUs answer each other, how fast, and is there room for a run?

1. the links    one small all-reduce against the clock, one timed all-gather
2. room         disk for checkpoints, memory of the host while one is written, /dev/shm for pictures
"""

import errno
import math
import os
import re
import shutil
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.distributed as dist

from training.costs import Machine
from training.ranks import gather, print0

# --- 1. the links ---------------------------------------------------------------------------------
# in: the process group; out: bytes a second

# seconds until ranks that do not answer count as hung; NCCL's own limit is ten minutes and more
PATIENCE = 60.0
# bytes of an all-gather that is timed: 13B's blocks are 634 MB each
GATHERED = 2**28


def check_links(device: torch.device, n_shards: int) -> float | None:
    """Bytes a second that reach a GPU in an all-gather among the n_shards ranks that share the
    weights, the slowest of all; None where nothing is to be gathered, and on a CPU.

    Where the ranks do not answer within a minute, or not rightly, the process ends with a line and
    exit code 1: this is the first collective of all on a GPU.
    """
    world_size = dist.get_world_size()
    what = f"the first all-reduce ({dist.get_backend_config()}, {world_size} ranks)"
    hint = "do the GPUs reach each other? NCCL_DEBUG=INFO says more, NCCL_P2P_DISABLE=1 may help"
    # a second apart: torchrun ends the others as soon as one has said it
    patience = PATIENCE + dist.get_rank()
    watchdog = threading.Timer(
        patience, give_up, [f"{what} has not come back in {patience:.0f} s: {hint}"]
    )
    watchdog.daemon = True
    watchdog.start()
    try:
        total = torch.ones(1, device=device)
        dist.all_reduce(total)
        if total.item() != world_size:
            give_up(f"{what} gave {total.item():g}: {hint}")
        # the cut of a run follows from it: on a CPU, where a run is the same bit for bit, it must
        # not hang on how busy the machine was
        if device.type == "cpu" or n_shards == 1:
            return None
        return min(gather(gathering_speed(device, n_shards)))
    except dist.DistError as error:
        give_up(f"{what} failed: {' '.join(str(error).split())[:300]}: {hint}")
    finally:
        watchdog.cancel()


def give_up(line: str) -> NoReturn:
    """End this process at once, whatever its threads wait for."""
    print(f"train.py: rank {os.environ.get('RANK', 0)}: {line}", file=sys.stderr, flush=True)
    os._exit(1)


def choose_bandwidth(given: float | None, before: float | None, measured: float | None) -> float:
    """Machine.bandwidth that a run is cut for, in bytes a second: as the options say (given, GB/s);
    else as the run that goes on was cut, so that it comes to the same numbers; else as measured.
    What was measured is said."""
    asked_for = None if given is None else given * 1e9
    known = [asked_for, before, measured, Machine.bandwidth]
    bandwidth = next(value for value in known if value is not None)
    if measured is not None:
        line = f"the GPUs answer each other; an all-gather brings each {measured / 1e9:.0f} GB/s"
        if bandwidth != measured:
            why = "it was before" if given is None else "--gpu-bandwidth says"
            line += f" (the run is cut for {bandwidth / 1e9:.0f}, as {why})"
        print0(line)
    return bandwidth


def gathering_speed(device: torch.device, n_shards: int) -> float:
    """Bytes a second that this rank gets from the others of its n_shards in an all-gather."""
    group: Any = None
    if n_shards < dist.get_world_size():
        group, _ = dist.new_subgroups(n_shards)
    mine = torch.zeros(GATHERED // n_shards, dtype=torch.uint8, device=device)
    whole = torch.zeros(n_shards * len(mine), dtype=torch.uint8, device=device)
    best = math.inf
    # the first ones connect
    for _ in range(5):
        whole[-1].item()
        tic = time.perf_counter()
        dist.all_gather_into_tensor(whole, mine, group=group)
        # waits for the device
        whole[-1].item()
        best = min(best, time.perf_counter() - tic)
    if group is not None:
        dist.destroy_process_group(group)
    return (len(whole) - len(mine)) / best


# --- 2. room --------------------------------------------------------------------------------------
# in: bytes that a run will take; ValueError, or OSError for a disk, where they are not there

# bytes a second of a fast disk
DISK_SPEED = 2e9


def n_saves_to_come(step: int, n_steps: int, save_every: int) -> int:
    """Checkpoints that a run which stands after `step` steps still writes: one at each multiple of
    save_every, and the last."""
    if step >= n_steps:
        return 0
    return math.ceil(n_steps / save_every) - step // save_every


def check_disk(out: Path, one: float, n_more: int, final: float) -> None:
    """OSError unless the disk of --out holds n_more checkpoints of `one` bytes and the final
    weights."""
    needed = n_more * one + final
    free = shutil.disk_usage(out).free
    if needed > free:
        raise OSError(
            errno.ENOSPC,
            f"not enough room for this run: it writes {needed / 1e9:.1f} GB more ({n_more} "
            f"checkpoints of {one / 1e9:.1f} GB at a time, final weights {final / 1e9:.1f} GB), "
            f"{free / 1e9:.1f} GB are free; give --out on another disk, or a smaller --keep",
            str(out),
        )


def torchrun_patience() -> float:
    """Seconds between SIGTERM and SIGKILL by the torchrun that started this process."""
    seconds = os.environ.get("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "30")
    command = "".join(lines_of_file(Path(f"/proc/{os.getppid()}/cmdline")))
    typed = re.search(r"--shutdown[-_]timeout[\0=](\d+)", command)
    return float(typed[1] if typed else seconds)


def say_if_impatient(one: float) -> None:
    """A line where torchrun would kill the ranks while they answer SIGTERM with a checkpoint of
    `one` bytes."""
    needed = one / DISK_SPEED
    if "TORCHELASTIC_RUN_ID" in os.environ and needed > torchrun_patience():
        print0(
            f"torchrun kills its ranks {torchrun_patience():.0f} s after SIGTERM, and a checkpoint "
            f"of {one / 1e9:.0f} GB takes longer: start it with --shutdown-timeout 600 (not in "
            "torch 2.11), or up to --save-every steps are lost then"
        )


def check_host_memory(needed: float) -> None:
    """ValueError unless this host has so many bytes for the copy that a checkpoint is written
    from."""
    available = available_memory()
    if needed > available:
        raise ValueError(
            f"not enough memory on this host: while a checkpoint is written its ranks hold a copy "
            f"of {needed / 1e9:.1f} GB, {available / 1e9:.1f} GB are available (more hosts, or "
            "less to train: --lora)"
        )


def available_memory(root: Path = Path("/")) -> float:
    """Bytes of memory that processes of this host can still take: by the kernel, and by the limits
    of the groups that this one runs in (a container, a job). root: for tests."""
    found = [math.inf]
    for line in lines_of_file(root / "proc/meminfo"):
        if line.startswith("MemAvailable:"):
            found.append(1024 * float(line.split()[1]))
    for folder in memory_groups(root):
        # of cgroups version 2, then 1
        for most, used in (
            ("memory.max", "memory.current"),
            ("memory.limit_in_bytes", "memory.usage_in_bytes"),
        ):
            limits = [line for line in lines_of_file(folder / most) if line.isdigit()]
            in_use = lines_of_file(folder / used)
            if limits and in_use:
                found.append(int(limits[0]) - int(in_use[0]) + file_pages(folder))
    return min(found)


def memory_groups(root: Path) -> Iterator[Path]:
    """Folders of the control groups for memory that this process is in, the inmost first."""
    for line in lines_of_file(root / "proc/self/cgroup"):
        _, controllers, name = line.split(":", 2)
        base = root / "sys/fs/cgroup"
        if "memory" in controllers.split(","):
            base = base / "memory"
        elif controllers:
            continue
        folder = base / name.lstrip("/")
        yield folder
        while folder != base:
            folder = folder.parent
            yield folder


def file_pages(folder: Path) -> int:
    """Bytes of a group that hold files and are given back when memory is asked for."""
    for line in lines_of_file(folder / "memory.stat"):
        name, _, value = line.partition(" ")
        if name in ("inactive_file", "total_inactive_file"):
            return int(value)
    return 0


def lines_of_file(path: Path) -> list[str]:
    """The lines of a file, none where it cannot be read."""
    try:
        return path.read_text().splitlines()
    except OSError:
        return []


def workers_that_fit(typed: int | None, spare: int, ahead: float, n_local: int) -> int:
    """Processes a rank that decode pictures: as typed, else the spare cores' or as many as /dev/shm
    has room for. ValueError when it has none for those that were typed: one that finds it full dies
    without a word.

    ahead: bytes that one of them has ready; n_local: ranks on this host.
    """
    shm = Path("/dev/shm")
    if not shm.is_dir():
        return spare if typed is None else typed
    free = shutil.disk_usage(shm).free
    n_fit = int(free / (n_local * max(ahead, 1)))
    room = (
        f"/dev/shm has {free / 1e9:.2f} GB free for what {n_local} ranks decode ahead, "
        f"{ahead / 1e9:.3f} GB a process (docker: --shm-size 16g)"
    )
    if typed is None:
        if n_fit < spare:
            print0(f"--workers {n_fit} in place of {spare}: {room}")
        return min(spare, n_fit)
    if typed > n_fit:
        raise ValueError(f"--workers {typed}: {room}: {n_fit} fit")
    return typed
