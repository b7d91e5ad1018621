"""The processes of a run: how they start, agree, stop."""

import ctypes
import os
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from types import FrameType
from typing import Any, NoReturn, TypeVar

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous
from tqdm import tqdm

from common.files import USER_ERRORS, exit_code, one_line

T = TypeVar("T")


def print0(*values: object) -> None:
    """print(), from rank 0 alone, and without breaking a progress bar."""
    if dist.get_rank() == 0:
        tqdm.write(" ".join(map(str, values)))
        sys.stdout.flush()


def leave(code: int, line: str | None = None) -> NoReturn:
    """End this process, and all ranks with it, since all call this in the same step; the line comes
    from rank 0."""
    if line and dist.get_rank() == 0:
        print(f"train.py: {line}", file=sys.stderr, flush=True)
    dist.destroy_process_group()
    sys.exit(code)


# --- what ranks tell each other -------------------------------------------------------------------


@dataclass
class Failure:
    """What a user can cause and a rank met."""

    line: str
    # to exit with: 2, or 1 when it is the disk
    code: int


def gather(value: T) -> list[T]:
    """[value of each rank], on every rank; any Python object."""
    values = [value] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def agree(function: Callable[..., T], *values: Any, **named: Any) -> tuple[T, Failure | None]:
    """function(…) on every rank -> (result, None); or, on all of them, (…, Failure) if it raises
    what a user can cause on any."""
    result: Any = None
    failure = None
    try:
        result = function(*values, **named)
    except USER_ERRORS as error:
        failure = Failure(one_line(error), exit_code(error))
    failures = [one for one in gather(failure) if one]
    return result, failures[0] if failures else None


def together(function: Callable[..., T], *values: Any, **named: Any) -> T:
    """agree(), and where any rank has an error all stop, with one line from rank 0."""
    result, failure = agree(function, *values, **named)
    if failure:
        leave(failure.code, failure.line)
    return result


def on_rank0(function: Callable[..., T], *values: Any, **named: Any) -> T:
    """function(…) of rank 0 alone, its result on every rank; errors as in together()."""

    def on_this_rank() -> Any:
        if dist.get_rank() == 0:
            return function(*values, **named)

    results = gather(together(on_this_rank))
    return results[0]


def sum_over_ranks(values: dict[str, float]) -> dict[str, float]:
    """The sums over ranks of a dict of numbers, as Python floats (exact for counts up to 2^53).
    By gloo: what a GPU has still to do is not waited for."""
    total = torch.tensor(list(values.values()), dtype=torch.float64)
    dist.all_reduce(total)
    return dict(zip(values, total.tolist(), strict=True))


# --- how they start -------------------------------------------------------------------------------


def setup_distributed() -> tuple[int, int, torch.device]:
    """(rank, world size, device). Without torchrun a group of one process, so that there is one
    code path."""
    if "TORCHELASTIC_RUN_ID" in os.environ and sys.platform == "linux":
        stop_with_parent()
    device = torch.device("cpu")
    # gloo beside nccl: error messages travel as Python objects, checkpoints in the background
    backend = "gloo"
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        backend = "cpu:gloo,cuda:nccl"
        torch.cuda.set_device(device)
        torch.backends.cuda.matmul.allow_tf32 = True
        torch.backends.cudnn.allow_tf32 = True
    if "RANK" in os.environ:
        join_torchrun(backend)
    else:
        store = dist.HashStore()  # pyright: ignore[reportPrivateImportUsage]
        dist.init_process_group(backend, store=store, rank=0, world_size=1)
    return dist.get_rank(), dist.get_world_size(), device


def make_deterministic() -> None:
    """--deterministic: from here on, and before a GPU is used, what is computed twice is equal bit
    for bit. Of what the model runs on CUDA, matrix products, attention's backward and sums over
    ranks are not by themselves; an operation that knows no such way raises RuntimeError."""
    # read when cuBLAS starts: each stream has buffers of its own
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    # read when NCCL starts: sums made inside the switch have no fixed order
    os.environ.setdefault("NCCL_ALGO", "^NVLS")
    torch.use_deterministic_algorithms(True)
    # flash attention's backward follows that; cuDNN's knows no way
    torch.backends.cuda.enable_cudnn_sdp(False)
    # nothing reads memory before it is written: not filled first
    torch.utils.deterministic.fill_uninitialized_memory = False  # pyright: ignore


def stop_with_parent() -> None:
    """If torchrun is killed, its ranks are asked to stop, wherever they wait."""
    PR_SET_PDEATHSIG = 1
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def join_torchrun(backend: str) -> None:
    """Join the process group of the ranks that torchrun started."""
    # torchrun listens before it starts ranks, unless it was killed since
    seconds_to_connect = timedelta(seconds=30)
    patience = timedelta(minutes=30)
    store, rank, world_size = next(rendezvous("env://", timeout=seconds_to_connect))
    store.set_timeout(patience)
    # torchrun's store still holds the addresses of ranks that died
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)
    store = PrefixStore(f"try-{attempt}", store)
    dist.init_process_group(
        backend, store=store, rank=rank, world_size=world_size, timeout=patience
    )


# --- how they stop --------------------------------------------------------------------------------


class StopRequest:
    """Was this run asked to stop? By SIGTERM (a scheduler, torchrun), SIGHUP (a connection lost),
    by Ctrl-C, or because the torchrun that started it is gone. A second Ctrl-C is not asked."""

    def __init__(self):
        self.code = 0
        self.parent = os.getppid()
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, self.note)

    def note(self, number: int, frame: FrameType | None) -> None:
        """The handler of those signals: the first one counts."""
        if not self.code:
            self.code = 130 if number == signal.SIGINT else 143
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.default_int_handler)

    def asked(self) -> dict[str, float]:
        """For sum_over_ranks: which way this rank was asked."""
        is_orphan = "RANK" in os.environ and os.getppid() != self.parent
        return {
            "stop_term": float(self.code == 143 or is_orphan),
            "stop_int": float(self.code == 130),
        }
