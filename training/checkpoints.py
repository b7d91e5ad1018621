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
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.checkpoint import (
    DefaultLoadPlanner,
    FileSystemReader,
    FileSystemWriter,
    async_save,
)
from torch.distributed.checkpoint import (
    load as load_sharded,
)
from torch.distributed.checkpoint._nested_dict import set_element
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict

from common.files import (
    USER_ERRORS,
    digest,
    lock,
    one_line,
    read_json,
    replace_folder,
    write_json,
)
from qilin_min import part_of
from training.ranks import leave, on_rank0, print0, together


@dataclass
class Progress:
    """Where a run stands: with the seed it is all that order, schedule and checks depend on. Goes into every checkpoint."""

    step: int = 0  # optimiser steps done or skipped
    n_bad: int = 0  # of them skipped
    n_bad_in_a_row: int = 0
    n_grey: int = 0  # samples whose picture did not decode
    n_blind_in_a_row: int = 0  # steps most of whose pictures did not
    recent: list = field(default_factory=list)  # losses of the last 50 good steps

    def is_bad(self, loss, grad_norm):
        """Whether a step must not touch the weights: not finite, or a loss far above the last ones (3 times their mean and 2 more; nothing gentler is
        wrong for certain). loss and norm are sums over ranks, so all agree."""
        exploded = len(self.recent) >= 10 and loss > 3 * sum(self.recent) / len(self.recent) + 2
        is_bad = not math.isfinite(loss) or not math.isfinite(grad_norm) or exploded
        self.n_bad, self.n_bad_in_a_row = self.n_bad + is_bad, (self.n_bad_in_a_row + 1) * is_bad
        if not is_bad:
            self.recent = [*self.recent[-49:], loss]
        return is_bad


TRAINED_ONLY = StateDictOptions(
    ignore_frozen_params=True, strict=False
)  # options of the state dict: frozen weights are in no checkpoint
STEP_FOLDER = re.compile(r"step-([1-9]\d*)$")


def check_metadata(path):
    """ValueError unless unpickling a checkpoint's .metadata, which torch does without asking, makes nothing but the descriptions of tensors."""

    class Checker(pickle.Unpickler):
        def find_class(self, module, name):
            found = getattr(
                sys.modules.get(module), name, None
            )  # no dotted names: they would lead from a module to what it imports
            if (
                (module, name) in METADATA_CLASSES
                or isinstance(found, torch.dtype)
                or (
                    isinstance(found, type)
                    and found.__module__ == module == "torch.distributed.checkpoint.metadata"
                )
            ):
                return found
            raise ValueError(f"it names {module}.{name}, which no checkpoint needs")

    try:
        with open(path, "rb") as file:
            Checker(file).load()
    except OSError:
        raise
    except Exception as error:  # a damaged pickle raises many kinds
        raise ValueError(
            f"{path}: cannot be read as a checkpoint's description ({one_line(error)[:200]})"
        ) from None


METADATA_CLASSES = {
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),
    ("pathlib", "PosixPath"),
    ("pathlib", "WindowsPath"),
    ("collections", "OrderedDict"),
}


class PlainLoadPlanner(DefaultLoadPlanner):
    """Torch's own, but what is no tensor (Adam's options) is unpickled without code."""

    def load_bytes(self, read_item, value):
        value = torch.load(value, weights_only=True)
        set_element(self.original_state_dict, self.mappings[read_item.dest_index.fqn], value)


def read_state(path):
    """(Progress, state.json) of a checkpoint; ValueError or OSError when it is not whole: a file missing or cut short, a state that no run wrote."""
    try:
        state = read_json(path / "state.json")
        progress = Progress(**state["progress"])
        is_whole = (
            all((path / name).stat().st_size == size for name, size in state["files"].items())
            and isinstance(state["setup"], dict)
            and isinstance(state["world_size"], int)
        )
        numbers = [
            progress.step,
            progress.n_bad,
            progress.n_bad_in_a_row,
            progress.n_grey,
            progress.n_blind_in_a_row,
            *progress.recent,
        ]
        if (
            is_whole
            and all(type(n) in (int, float) and n >= 0 for n in numbers)
            and type(progress.step) is int
            and progress.step > 0
        ):
            return progress, state
    except (KeyError, TypeError, AttributeError):
        pass
    raise ValueError(f"{path}: not a whole checkpoint")


class Checkpoints:
    """--out/checkpoints/step-N: weights trained, Adam's moments, RNG, progress and setup, one file a rank, resumable with any number of ranks.

    Written by a background thread into step-N.partial from a copy in host memory, and renamed when every rank is done, so that a step-N is whole or not there;
    a kill at any moment leaves the earlier ones as they are. The newest --keep stay.
    """

    def __init__(self, args, model, optimizer, setup):
        self.args, self.model, self.optimizer, self.setup, self.folder = (
            args,
            model,
            optimizer,
            setup,
            args.out / "checkpoints",
        )
        self.group = dist.new_group(
            backend="gloo", timeout=timedelta(minutes=30)
        )  # its own: on the default group it would meet training's collectives
        self.writing = None  # (future, progress)

    def tensors(self, with_rng=True):
        is_new = not self.optimizer.state
        weights, moments = get_state_dict(self.model, self.optimizer, options=TRAINED_ONLY)
        for state in (
            self.optimizer.state.values() if is_new else ()
        ):  # an optimiser that has done nothing is given its state by a step with zero gradients, which it must not count
            state["step"].zero_()
        rng = {f"cpu-{dist.get_rank()}": torch.get_rng_state()}
        if torch.cuda.is_available():
            rng[f"cuda-{dist.get_rank()}"] = torch.cuda.get_rng_state()
        return {"model": weights, "optimizer": moments, **({"rng": rng} if with_rng else {})}

    def whole(self):
        """{step: folder} of the checkpoints of which nothing is missing, oldest first."""
        found = {}
        for path in self.folder.iterdir() if self.folder.is_dir() else ():
            try:
                if (match := STEP_FOLDER.match(path.name)) and read_state(path)[0].step == int(
                    match[1]
                ):
                    found[int(match[1])] = path
            except USER_ERRORS:
                continue
        return dict(sorted(found.items()))

    def clean(self):
        """Remove what an interrupted save or removal left; a step-N that is not whole was damaged by something else and only loses its name."""
        whole = self.whole().values()
        for path in list(self.folder.iterdir()) if self.folder.is_dir() else ():
            if re.match(r"step-\d+\.(partial|old)$", path.name):
                print0(f"{path} is not whole: removed")
                shutil.rmtree(path, ignore_errors=True)
            elif STEP_FOLDER.match(path.name) and path not in whole:
                print0(f"{path} is not whole: renamed to {path.name}.damaged")
                replace_folder(path, path.with_name(path.name + ".damaged"))

    def put_aside(self, paths, why):
        """Move checkpoints of another course of this run out of the way, to checkpoints.N beside: by their numbers they would pass for newer ones."""
        if paths:
            aside = next(
                p
                for i in range(1, 10**6)
                if not (p := self.folder.with_name(f"checkpoints.{i}")).exists()
            )
            aside.mkdir()
            for path in paths:
                path.rename(aside / path.name)
            print0(f"{why}: {', '.join(path.name for path in paths)} moved to {aside}")

    def save(self, progress, wait=False):
        """Start writing a checkpoint; what a step waits for is the copy to host memory. An earlier one under way is finished first."""
        self.finish()
        partial = self.folder / f"step-{progress.step}.partial"

        def prepare():
            if (
                progress.step in self.whole()
            ):  # resumed from it, and stopped before another step; later ones of another course are put aside
                return False
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
            return True

        if progress.step and on_rank0(prepare):
            writer = FileSystemWriter(
                partial, per_thread_copy_ahead=0
            )  # what it writes is in host memory already: nothing to copy ahead, and no CUDA context in its thread
            self.writing = (
                async_save(self.tensors(), storage_writer=writer, process_group=self.group),
                Progress(**asdict(progress)),
                partial,
            )
        if wait:
            self.finish()

    def progress(self):
        """For sum_over_ranks: has this rank written its part? When all have, finish() only gives the name and removes what is too many."""
        return {"written": float(self.writing is not None and self.writing[0].done())}

    def finish(self):
        """Wait until every rank has written, then give the folder its name. A disk that is full stops all ranks with one line and exit code 1."""
        if self.writing is None:
            return
        (future, progress, partial), self.writing = self.writing, None

        def written():
            try:
                future.result()
            except (CheckpointException, Exception) as error:  # the former is no Exception
                cause = (
                    next(iter(error.failures.values()))[0]
                    if isinstance(error, CheckpointException) and error.failures
                    else error
                )
                shutil.rmtree(partial, ignore_errors=True)
                raise OSError(
                    getattr(cause, "errno", None) or errno.EIO,
                    f"checkpoint could not be written ({one_line(cause)[:120]}; {shutil.disk_usage(self.folder).free / 1e9:.1f} GB free); the earlier ones are whole",
                    str(partial),
                ) from None

        def seal():
            files = {path.name: path.stat().st_size for path in partial.iterdir()}
            write_json(
                partial / "state.json",
                {
                    "progress": asdict(progress),
                    "world_size": dist.get_world_size(),
                    "setup": self.setup,
                    "files": files,
                },
            )
            for path in (
                partial / "state.json",
                partial,
                self.folder,
            ):  # the tensors' files were synced by their writer
                if path == self.folder:
                    replace_folder(partial, partial.with_suffix(""))
                descriptor = os.open(path, os.O_RDONLY)
                os.fsync(descriptor)
                os.close(descriptor)
            for step in list(self.whole())[: -self.args.keep]:
                gone = self.folder / f"step-{step}.old"
                (self.folder / f"step-{step}").rename(gone)
                shutil.rmtree(gone, ignore_errors=True)

        together(written)
        on_rank0(seal)

    def resume(self):
        """Progress from the checkpoint that --resume names, its tensors being loaded; a new one where there is none."""
        path = on_rank0(self.find)
        if path is None:
            return Progress()
        progress, saved = together(read_state, path)
        on_rank0(self.compare, saved["setup"], path)
        is_same = saved["world_size"] == dist.get_world_size()
        state = self.tensors(with_rng=is_same)
        logging.getLogger("torch.distributed.checkpoint").setLevel(
            logging.CRITICAL
        )  # what is wrong is said once, by us
        together(check_metadata, path / ".metadata")
        try:
            load_sharded(
                state,
                storage_reader=FileSystemReader(path),
                planner=PlainLoadPlanner(),
                process_group=self.group,
            )
        except CheckpointException as error:
            leave(
                2,
                f"{path} cannot be loaded: {one_line(next(iter(error.failures.values()))[0])[:300]}",
            )
        set_state_dict(
            self.model,
            self.optimizer,
            model_state_dict=state["model"],
            optim_state_dict=state["optimizer"],
            options=TRAINED_ONLY,
        )
        if is_same:
            torch.set_rng_state(state["rng"][f"cpu-{dist.get_rank()}"])
            if f"cuda-{dist.get_rank()}" in state["rng"]:
                torch.cuda.set_rng_state(state["rng"][f"cuda-{dist.get_rank()}"])
        print0(
            f"going on after step {progress.step} ({path}, written by {saved['world_size']} ranks)"
        )
        return progress

    def find(self):
        """The folder to resume from, or None."""
        self.clean()
        steps = self.whole()
        if self.args.resume not in ("auto", "never"):
            path = Path(self.args.resume)
            if not (path / "state.json").is_file():
                raise FileNotFoundError(
                    f"--resume {path}: no checkpoint there (a folder step-N with state.json)"
                )
            inside = next((step for step, folder in steps.items() if folder.samefile(path)), -1)
            self.put_aside(
                [folder for step, folder in steps.items() if step > inside], f"--resume {path}"
            )
            return path
        if self.args.resume == "never":
            self.put_aside(
                [
                    *steps.values(),
                    *(
                        path
                        for name in ("log.jsonl", "samples.jsonl")
                        if (path := self.args.out / name).is_file()
                    ),
                ]
                if steps
                else [],
                "--resume never",
            )
            return None
        return list(steps.values())[-1] if steps else None

    def compare(self, old, path):
        """ValueError that says what differs between this run and the one that wrote a checkpoint."""
        differ = [
            f"{name}: {old.get(name)} there, {value} now"
            for name, value in json.loads(json.dumps(self.setup)).items()
            if old.get(name) != value
        ]
        if differ and not self.args.allow_changes:
            raise ValueError(
                f"{path} is of a run with another setup ({'; '.join(differ)[:600]}): start with the old one, or another --out, or --allow-changes to go on all the same"
            )


def describe_setup(args, config, tokenizer, sources, data):
    """What decides a run's numbers, to be compared when it goes on. Weights by the names, shapes and first rows of their tensors: reading 26 GB would take minutes."""
    sha256 = hashlib.sha256()
    for files, parts in sources:
        for name in sorted(name for name in files.tensors if part_of(name) in parts):
            sha256.update(
                f"{name} {files.shape(name)} ".encode()
                + files.rows(name, 0, 1).contiguous().flatten().view(torch.uint8).numpy().tobytes()
            )
    names = (
        "stage",
        "batch_size",
        "lr",
        "warmup_ratio",
        "weight_decay",
        "max_grad_norm",
        "epochs",
        "max_steps",
        "max_length",
        "template",
        "image_mode",
        "seed",
        "lora",
        "lora_alpha",
        "quantize",
    )
    return {
        **{name: getattr(args, name) for name in names},
        "projector_type": config.projector_type,
        "data": data,
        "tokenizer": digest(tokenizer.path),
        "weights": sha256.hexdigest(),
    }


def hold_out(out):
    """Hold --out/.lock until this process ends. While the ranks of an earlier start still save what they have, wait for them."""
    out.mkdir(parents=True, exist_ok=True)
    return lock(
        out / ".lock",
        f"another run is writing to {out}: stop it, or give another --out",
        patience=660,
        waiting=f"another run is still writing to {out}: waiting for it, up to 11 minutes",
    )
