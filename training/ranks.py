"""The processes of a run: how they start, agree, stop."""

import ctypes
import os
import signal
import sys
from datetime import timedelta

import torch
import torch.distributed as dist
from tqdm import tqdm

from common.files import USER_ERRORS, exit_code, one_line


def print0(*values):
    if dist.get_rank() == 0:
        tqdm.write(" ".join(map(str, values)))
        sys.stdout.flush()


def leave(code, line=None):
    """End this process, and all ranks with it, since all call this in the same step; the line comes from rank 0."""
    if line and dist.get_rank() == 0:
        print(f"train.py: {line}", file=sys.stderr, flush=True)
    dist.destroy_process_group()
    sys.exit(code)


def gather(value):
    """[value of each rank], on every rank; any Python object."""
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def agree(function, *args):
    """function(*args) on every rank -> (result, None); or, on all of them, (…, (line, exit code)) if it raises what a user can cause on any. Code 2, or 1: the disk."""
    result, error = None, None
    try:
        result = function(*args)
    except USER_ERRORS as raised:
        error = one_line(raised), exit_code(raised)
    return result, next((e for e in gather(error) if e), None)


def together(function, *args):
    """agree(), and where any rank has an error all stop, with one line from rank 0."""
    result, error = agree(function, *args)
    if error:
        leave(error[1], error[0])
    return result


def on_rank0(function, *args):
    """function(*args) of rank 0 alone, its result on every rank; errors as in together()."""
    return gather(together(lambda: function(*args) if dist.get_rank() == 0 else None))[0]


def sum_over_ranks(values, device):
    """The sums over ranks of a dict of numbers, as Python floats (exact for counts up to 2^53)."""
    total = torch.tensor(list(values.values()), dtype=torch.float64, device=device)
    dist.all_reduce(total)
    return dict(zip(values, total.tolist()))


def setup_distributed():
    """(rank, world size, device). Without torchrun a group of one process, so that there is one code path."""
    is_cuda = torch.cuda.is_available()
    device = (
        torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        if is_cuda
        else torch.device("cpu")
    )
    if "TORCHELASTIC_RUN_ID" in os.environ and sys.platform == "linux":
        ctypes.CDLL(None).prctl(
            1, signal.SIGTERM
        )  # PR_SET_PDEATHSIG: if torchrun is killed, its ranks are asked to stop, wherever they wait
    if is_cuda:
        torch.cuda.set_device(device)
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    backend = (
        "cpu:gloo,cuda:nccl" if is_cuda else "gloo"
    )  # gloo beside nccl: error messages travel as Python objects, checkpoints in the background
    if "RANK" in os.environ:
        store, rank, world_size = next(
            dist.rendezvous("env://", timeout=timedelta(seconds=30))
        )  # torchrun listens before it starts ranks, unless it was killed since
        store.set_timeout(timedelta(minutes=30))
        store = dist.PrefixStore(
            f"try-{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store
        )  # torchrun's store still holds the addresses of ranks that died
        dist.init_process_group(
            backend, store=store, rank=rank, world_size=world_size, timeout=timedelta(minutes=30)
        )
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    return dist.get_rank(), dist.get_world_size(), device


class StopRequest:
    """Was this run asked to stop? By SIGTERM (a scheduler, torchrun), SIGHUP (a connection lost), by Ctrl-C, or because the torchrun that started it is gone. A second Ctrl-C is not asked."""

    def __init__(self):
        self.code, self.parent = 0, os.getppid()
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, self.note)

    def note(self, number, frame):
        self.code = self.code or (130 if number == signal.SIGINT else 143)
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.default_int_handler)

    def asked(self):
        is_orphan = "RANK" in os.environ and os.getppid() != self.parent
        return {
            "stop_term": float(self.code == 143 or is_orphan),
            "stop_int": float(self.code == 130),
        }
