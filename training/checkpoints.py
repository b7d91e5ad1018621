"""A run on disk: checkpoints, whole or not there, and what must agree when it goes on."""

import errno
import hashlib
import json
import logging
import math
import os
import pickle
import re
import shutil
import sys
from concurrent.futures import Future
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any, BinaryIO

import torch
import torch.distributed as dist
from torch.distributed.checkpoint._nested_dict import (
    set_element,  # pyright: ignore[reportPrivateImportUsage]
)
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.distributed.checkpoint.state_dict_loader import load as load_sharded
from torch.distributed.checkpoint.state_dict_saver import async_save

from common.files import (
    USER_ERRORS,
    digest,
    lock,
    one_line,
    read_json,
    replace_folder,
    write_json,
)
from model_io.tokens import Tokenizer
from qilin_min import QilinConfig, WeightFiles, part_of
from training.ranks import leave, on_rank0, print0, together

# --- 1. where a run stands ------------------------------------------------------------------------


@dataclass
class Progress:
    """Where a run stands: with the seed it is all that order, schedule and checks depend on. Goes
    into every checkpoint."""

    # optimiser steps done or skipped
    step: int = 0
    # of them skipped
    n_bad: int = 0
    n_bad_in_a_row: int = 0
    # samples whose picture did not decode
    n_grey: int = 0
    # steps most of whose pictures did not
    n_blind_in_a_row: int = 0
    # losses of the last 50 good steps
    recent: list[float] = field(default_factory=list)

    def is_bad(self, loss: float, grad_norm: float) -> bool:
        """Whether a step must not touch the weights: not finite, or a loss far above the last ones
        (3 times their mean and 2 more; nothing gentler is wrong for certain). loss and norm are
        sums over ranks, so all agree."""
        is_finite = math.isfinite(loss) and math.isfinite(grad_norm)
        has_exploded = False
        if len(self.recent) >= 10:
            mean = sum(self.recent) / len(self.recent)
            has_exploded = loss > 3 * mean + 2
        if is_finite and not has_exploded:
            self.n_bad_in_a_row = 0
            self.recent = [*self.recent[-49:], loss]
            return False
        self.n_bad += 1
        self.n_bad_in_a_row += 1
        return True


def hold_out(out: Path) -> BinaryIO:
    """Hold --out/.lock until this process ends. While the ranks of an earlier start still save what
    they have, wait for them."""
    out.mkdir(parents=True, exist_ok=True)
    return lock(
        out / ".lock",
        f"another run is writing to {out}: stop it, or give another --out",
        patience=660,
        waiting=f"another run is still writing to {out}: waiting for it, up to 11 minutes",
    )


def name_in_setup(name: str) -> str:
    """A tensor's name as setups have always said it, so that runs of before go on: the layers of a
    llava-hf projector by their places.
    """
    name = name.replace("mm_projector.linear_1.", "mm_projector.0.")
    return name.replace("mm_projector.linear_2.", "mm_projector.2.")


def describe_setup(
    options: dict[str, Any],
    config: QilinConfig,
    tokenizer: Tokenizer,
    sources: list[tuple[WeightFiles, set[str]]],
    data: list[str],
) -> dict[str, Any]:
    """What decides a run's numbers, to be compared when it goes on. Weights by the names, shapes
    and first rows of their tensors: reading 26 GB would take minutes.

    options: those of the run that decide; data: digests of its files.
    """
    weights = hashlib.sha256()
    for files, parts in sources:
        for name in sorted(files.tensors):
            if part_of(name) not in parts:
                continue
            first_row = files.rows(name, 0, 1).contiguous().flatten()
            weights.update(f"{name_in_setup(name)} {files.shape(name)} ".encode())
            weights.update(first_row.view(torch.uint8).numpy().tobytes())
    return {
        **options,
        "projector_type": config.projector_type,
        "data": data,
        "tokenizer": digest(tokenizer.path),
        "weights": weights.hexdigest(),
    }


# --- 2. reading what someone else may have written ------------------------------------------------

# what a checkpoint's .metadata may name beside dtypes and the descriptions of tensors
METADATA_CLASSES = {
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),
    ("pathlib", "PosixPath"),
    ("pathlib", "WindowsPath"),
    ("collections", "OrderedDict"),
}


class MetadataUnpickler(pickle.Unpickler):
    """Makes nothing but the descriptions of tensors; ValueError for anything else."""

    def find_class(self, module: str, name: str) -> Any:
        """The class of a name, where a description may hold it."""
        # no dotted names: they would lead from a module to what it imports
        found = getattr(sys.modules.get(module), name, None)
        if (module, name) in METADATA_CLASSES or isinstance(found, torch.dtype):
            return found
        descriptions = "torch.distributed.checkpoint.metadata"
        if module == descriptions and isinstance(found, type) and found.__module__ == descriptions:
            return found
        raise ValueError(f"it names {module}.{name}, which no checkpoint needs")


def check_metadata(path: Path) -> None:
    """ValueError unless unpickling a checkpoint's .metadata, which torch does without asking, makes
    nothing but the descriptions of tensors."""
    try:
        with open(path, "rb") as file:
            MetadataUnpickler(file).load()
    except OSError:
        raise
    except Exception as error:
        # a damaged pickle raises many kinds
        line = one_line(error)[:200]
        raise ValueError(f"{path}: cannot be read as a checkpoint's description ({line})") from None


class PlainLoadPlanner(DefaultLoadPlanner):
    """Torch's own, but what is no tensor (Adam's options) is unpickled without code."""

    def load_bytes(self, read_item: Any, value: Any) -> None:
        """Put one value that is no tensor into its place."""
        value = torch.load(value, weights_only=True)
        # private to torch, as is the method of torch's that this one replaces
        set_element(self.original_state_dict, self.mappings[read_item.dest_index.fqn], value)


def read_state(path: Path) -> tuple[Progress, dict[str, Any]]:
    """(Progress, state.json) of a checkpoint; ValueError or OSError when it is not whole: a file
    missing or cut short, a state that no run wrote."""
    try:
        state = read_json(path / "state.json")
        progress = Progress(**state["progress"])
        is_whole = has_its_files(path, state) and is_possible(progress)
    except (KeyError, TypeError, AttributeError):
        is_whole = False
    if not is_whole:
        raise ValueError(f"{path}: not a whole checkpoint")
    return progress, state


def has_its_files(path: Path, state: dict[str, Any]) -> bool:
    """Whether each file that a state.json lists is there, as long as it says."""
    for name, size in state["files"].items():
        if (path / name).stat().st_size != size:
            return False
    return isinstance(state["setup"], dict) and isinstance(state["world_size"], int)


def is_possible(progress: Progress) -> bool:
    """Whether a run can have come so far: all of it numbers, and at least one step."""
    numbers = [
        progress.step,
        progress.n_bad,
        progress.n_bad_in_a_row,
        progress.n_grey,
        progress.n_blind_in_a_row,
        *progress.recent,
    ]
    for number in numbers:
        if type(number) not in (int, float) or not number >= 0:
            return False
    return type(progress.step) is int and progress.step > 0


# --- 3. checkpoints -------------------------------------------------------------------------------

# of the state dict: frozen weights are in no checkpoint
TRAINED_ONLY = StateDictOptions(ignore_frozen_params=True, strict=False)
STEP_FOLDER = re.compile(r"step-([1-9]\d*)$")
HALF_FOLDER = re.compile(r"step-\d+\.(partial|old)$")


def step_of(path: Path) -> int | None:
    """The step of a folder named as checkpoints are, None for another name."""
    match = STEP_FOLDER.match(path.name)
    return int(match[1]) if match else None


def paths_in(folder: Path) -> list[Path]:
    """What lies in a folder, none where it is not there yet."""
    return list(folder.iterdir()) if folder.is_dir() else []


def whole_checkpoints(folder: Path) -> dict[int, Path]:
    """{step: folder} of the checkpoints of which nothing is missing, oldest first."""
    found = {}
    for path in paths_in(folder):
        step = step_of(path)
        if step is None:
            continue
        try:
            progress, _ = read_state(path)
        except USER_ERRORS:
            continue
        if progress.step == step:
            found[step] = path
    return dict(sorted(found.items()))


def clean(folder: Path) -> None:
    """Remove what an interrupted save or removal left; a step-N that is not whole was damaged by
    something else and only loses its name."""
    whole = whole_checkpoints(folder).values()
    for path in paths_in(folder):
        if HALF_FOLDER.match(path.name):
            print0(f"{path} is not whole: removed")
            shutil.rmtree(path, ignore_errors=True)
        elif step_of(path) is not None and path not in whole:
            print0(f"{path} is not whole: renamed to {path.name}.damaged")
            replace_folder(path, path.with_name(path.name + ".damaged"))


@dataclass
class Earlier:
    """What an earlier start of a run left on the disk, as far as the next one must know it before
    its model is there."""

    # steps done
    step: int = 0
    # whole checkpoints that stay
    n_kept: int = 0
    # Machine.bandwidth that it was cut for, with as many ranks; None where nobody knows
    bandwidth: float | None = None


def look_back(out: Path, choice: str) -> Earlier:
    """Where the run in --out stands, what an interrupted save left being removed. choice: of
    --resume; a path with no checkpoint is complained of by resume()."""
    clean(out / "checkpoints")
    whole = whole_checkpoints(out / "checkpoints")
    if choice == "never":
        return Earlier()
    path = Path(choice)
    if choice == "auto":
        path = whole[max(whole)] if whole else out
    if not (path / "state.json").is_file():
        return Earlier()
    progress, state = read_state(path)
    is_same_world = state["world_size"] == dist.get_world_size()
    is_inside = any(folder.samefile(path) for folder in whole.values())
    return Earlier(
        step=progress.step,
        n_kept=sum(1 for step in whole if is_inside and step <= progress.step),
        bandwidth=state.get("bandwidth") if is_same_world else None,
    )


def fsync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


def on_host(value: Any) -> Any:
    """A copy in host memory, of a tensor or of nested dicts and lists of them."""
    if isinstance(value, torch.Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, dict):
        return {key: on_host(held) for key, held in value.items()}
    if isinstance(value, list):
        return [on_host(held) for held in value]
    return value


class OneCopyWriter(FileSystemWriter):
    """Torch's own, but that each tensor is copied to the host once: torch copies a sharded one a
    second time, for its shape alone. A step waits for the copy, not for the writing."""

    def stage(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        """What async_save() hands to the thread that writes."""
        return on_host(state_dict)


@dataclass
class Writing:
    """A checkpoint that is being written: by whom, of what, where."""

    future: Future
    progress: Progress
    partial: Path


class Checkpoints:
    """--out/checkpoints/step-N: weights trained, Adam's moments, RNG, progress and setup, one file
    a rank, resumable with any number of ranks.

    Written by a background thread into step-N.partial from a copy in host memory, and renamed when
    every rank is done, so that a step-N is whole or not there; a kill at any moment leaves the
    earlier ones as they are. The newest `n_kept` stay.
    """

    def __init__(
        self,
        out: Path,
        model: torch.nn.Module,
        optimizer: torch.optim.Optimizer,
        setup: dict[str, Any],
        *,
        n_kept: int,
        bandwidth: float | None = None,
    ):
        self.out = out
        self.folder = out / "checkpoints"
        self.model = model
        self.optimizer = optimizer
        self.setup = setup
        self.n_kept = n_kept
        self.bandwidth = bandwidth
        # its own: on the default group it would meet training's collectives
        self.group: Any = dist.new_group(backend="gloo", timeout=timedelta(minutes=30))
        self.writing: Writing | None = None

    def tensors(self, with_rng: bool = True) -> dict[str, Any]:
        """All that a checkpoint holds beside state.json, of this rank."""
        is_new = not self.optimizer.state
        weights, moments = get_state_dict(self.model, self.optimizer, options=TRAINED_ONLY)
        if is_new:
            # an optimiser that has done nothing is given its state by a step with zero gradients,
            # which it must not count
            for state in self.optimizer.state.values():
                state["step"].zero_()
        held = {"model": weights, "optimizer": moments}
        if with_rng:
            rank = dist.get_rank()
            rng = {f"cpu-{rank}": torch.get_rng_state()}
            if torch.cuda.is_available():
                rng[f"cuda-{rank}"] = torch.cuda.get_rng_state()
            held["rng"] = rng
        return held

    def whole(self) -> dict[int, Path]:
        """{step: folder} of the checkpoints of which nothing is missing, oldest first."""
        return whole_checkpoints(self.folder)

    def put_aside(self, paths: list[Path], why: str) -> None:
        """Move checkpoints of another course of this run out of the way, to checkpoints.N beside:
        by their numbers they would pass for newer ones."""
        if not paths:
            return
        number = 1
        while self.folder.with_name(f"checkpoints.{number}").exists():
            number += 1
        aside = self.folder.with_name(f"checkpoints.{number}")
        aside.mkdir()
        for path in paths:
            path.rename(aside / path.name)
        print0(f"{why}: {', '.join(path.name for path in paths)} moved to {aside}")

    # --- writing ---

    def save(self, progress: Progress, wait: bool = False) -> None:
        """Start writing a checkpoint; what a step waits for is the copy to host memory. An earlier
        one under way is finished first."""
        self.finish()
        partial = self.folder / f"step-{progress.step}.partial"
        if progress.step and on_rank0(self.make_partial, partial, progress.step):
            # what it writes is in host memory already: nothing to copy ahead, and no CUDA context
            # in its thread
            writer = OneCopyWriter(partial, per_thread_copy_ahead=0)
            future: Any = async_save(
                self.tensors(), storage_writer=writer, process_group=self.group
            )
            self.writing = Writing(future, Progress(**asdict(progress)), partial)
        if wait:
            self.finish()

    def make_partial(self, partial: Path, step: int) -> bool:
        """An empty folder to write into; False where the checkpoint is there already."""
        # resumed from it, and stopped before another step; later ones of another course are put
        # aside
        if step in self.whole():
            return False
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        return True

    def progress(self) -> dict[str, float]:
        """For sum_over_ranks: has this rank written its part? When all have, finish() only gives
        the name and removes what is too many."""
        is_written = self.writing is not None and self.writing.future.done()
        return {"written": float(is_written)}

    def finish(self) -> None:
        """Wait until every rank has written, then give the folder its name. A disk that is full
        stops all ranks with one line and exit code 1."""
        if self.writing is None:
            return
        writing = self.writing
        self.writing = None
        together(self.wait_for, writing)
        on_rank0(self.seal, writing)

    def wait_for(self, writing: Writing) -> None:
        """OSError when this rank's part could not be written."""
        try:
            writing.future.result()
        except (CheckpointException, Exception) as error:
            # the former is no Exception
            cause = error
            if isinstance(error, CheckpointException) and error.failures:
                cause = first_failure(error)
            shutil.rmtree(writing.partial, ignore_errors=True)
            free = shutil.disk_usage(self.folder).free / 1e9
            raise OSError(
                getattr(cause, "errno", None) or errno.EIO,
                f"checkpoint could not be written ({one_line(cause)[:120]}; {free:.1f} GB free); "
                "the earlier ones are whole",
                str(writing.partial),
            ) from None

    def seal(self, writing: Writing) -> None:
        """Say in state.json what is there, and give the folder its name: on the disk, in this
        order. What is older than the newest n_kept goes."""
        partial = writing.partial
        state = {
            "progress": asdict(writing.progress),
            "world_size": dist.get_world_size(),
            # the cut follows from it: going on, a run is cut as it was
            "bandwidth": self.bandwidth,
            "setup": self.setup,
            "files": {path.name: path.stat().st_size for path in partial.iterdir()},
        }
        write_json(partial / "state.json", state)
        # the tensors' files were synced by their writer
        fsync(partial / "state.json")
        fsync(partial)
        replace_folder(partial, partial.with_suffix(""))
        fsync(self.folder)
        for step in list(self.whole())[: -self.n_kept]:
            # renamed first, so that a kill leaves no half of one
            gone = self.folder / f"step-{step}.old"
            (self.folder / f"step-{step}").rename(gone)
            shutil.rmtree(gone, ignore_errors=True)

    # --- going on ---

    def resume(self, choice: str, allow_changes: bool) -> Progress:
        """Progress from the checkpoint that --resume names, its tensors being loaded; a new one
        where there is none."""
        path = on_rank0(self.find, choice)
        if path is None:
            return Progress()
        progress, saved = together(read_state, path)
        on_rank0(self.compare, saved["setup"], path, allow_changes)
        is_same_world = saved["world_size"] == dist.get_world_size()
        self.load(path, with_rng=is_same_world)
        print0(
            f"going on after step {progress.step} ({path}, written by {saved['world_size']} ranks)"
        )
        return progress

    def find(self, choice: str) -> Path | None:
        """The folder to resume from, or None. choice: "auto", "never" or a path."""
        clean(self.folder)
        if choice == "auto":
            paths = list(self.whole().values())
            return paths[-1] if paths else None
        if choice == "never":
            self.start_over()
            return None
        return self.go_back(Path(choice))

    def start_over(self) -> None:
        """Put aside what an earlier course left, its log too."""
        paths = list(self.whole().values())
        if paths:
            logs = [self.out / name for name in ("log.jsonl", "samples.jsonl")]
            paths += [path for path in logs if path.is_file()]
        self.put_aside(paths, "--resume never")

    def go_back(self, path: Path) -> Path:
        """The given checkpoint; where it is one of --out, later ones are put aside, else all."""
        if not (path / "state.json").is_file():
            raise FileNotFoundError(
                f"--resume {path}: no checkpoint there (a folder step-N with state.json)"
            )
        steps = self.whole()
        inside = [step for step, folder in steps.items() if folder.samefile(path)]
        last = inside[0] if inside else -1
        later = [folder for step, folder in steps.items() if step > last]
        self.put_aside(later, f"--resume {path}")
        return path

    def compare(self, old: dict[str, Any], path: Path, allow_changes: bool) -> None:
        """ValueError that says what differs between this run and the one that wrote a
        checkpoint."""
        now = json.loads(json.dumps(self.setup))
        differ = []
        for name, value in now.items():
            if old.get(name) != value:
                differ.append(f"{name}: {old.get(name)} there, {value} now")
        if differ and not allow_changes:
            raise ValueError(
                f"{path} is of a run with another setup ({'; '.join(differ)[:600]}): start with "
                "the old one, or another --out, or --allow-changes to go on all the same"
            )

    def load(self, path: Path, with_rng: bool) -> None:
        """Model, optimiser and, with as many ranks as wrote it, random numbers of a checkpoint."""
        state = self.tensors(with_rng=with_rng)
        # what is wrong is said once, by us
        logging.getLogger("torch.distributed.checkpoint").setLevel(logging.CRITICAL)
        together(check_metadata, path / ".metadata")
        try:
            load_sharded(
                state,
                storage_reader=FileSystemReader(path),
                planner=PlainLoadPlanner(),
                process_group=self.group,
            )
        except CheckpointException as error:
            leave(2, f"{path} cannot be loaded: {one_line(first_failure(error))[:300]}")
        set_state_dict(
            self.model,
            self.optimizer,
            model_state_dict=state["model"],
            optim_state_dict=state["optimizer"],
            options=TRAINED_ONLY,
        )
        if with_rng:
            rank = dist.get_rank()
            torch.set_rng_state(state["rng"][f"cpu-{rank}"])
            if f"cuda-{rank}" in state["rng"]:
                torch.cuda.set_rng_state(state["rng"][f"cuda-{rank}"])


def first_failure(error: CheckpointException) -> BaseException:
    """What one of the ranks met."""
    wrapped = next(iter(error.failures.values()))
    return wrapped[0]
