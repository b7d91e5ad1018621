"""From data files to every rank's batches: rows by byte offset, lengths in tokens, an order that
does not depend on the number of ranks.

1. samples    a row of a file -> input_ids, labels, pixels; its lengths measured once and kept
              beside the data
2. order      lengths -> global batches of samples alike in length -> this rank's micro-batches
3. loading    worker processes that decode pictures ahead
"""

import hashlib
import json
import math
import os
import signal
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm

from common.dialogs import keys_of, read_row_of_dialogs
from common.files import USER_ERRORS, digest, one_line
from common.rows import Records, find_rows
from model_io.pixels import picture_names, preprocess_image, row_pictures
from model_io.tokens import Tokenizer, encode_conversation
from qilin_min import IGNORE_INDEX, count_image_positions, count_labels, pad_rows
from training.ranks import gather, leave, on_rank0, print0, together

# --- 1. samples -----------------------------------------------------------------------------------


class Column(IntEnum):
    """Columns of an index, int64 (n, 6): of each row its bytes in the file, its tokens as trained
    on."""

    START = 0
    STOP = 1
    LENGTH = 2
    N_PICTURES = 3
    N_LABELS = 4
    IS_CUT = 5


@dataclass
class Found:
    """What rank 0 finds out about a data file."""

    sha256: str
    # of the file that keeps the index: made of the digests of data and tokenizer and of what else
    # lengths depend on
    name: str
    # int64 (n, 6) by Column; None where none is kept
    index: np.ndarray | None
    # int64 (n, 2): where each row begins and ends
    ranges: np.ndarray


def read_index(path: Path) -> np.ndarray | None:
    """The index that a file keeps, None where there is none or a damaged one."""
    try:
        # a pipe would keep us waiting
        if not path.is_file():
            return None
        stored = np.load(path)
        if stored.dtype == np.int64 and stored[-1, 0] == zlib.crc32(stored[:-1].tobytes()):
            return stored[:-1]
    except Exception:
        # numpy raises many kinds for a damaged file, and each means that it is made anew
        return None
    return None


def write_index(path: Path, index: np.ndarray) -> None:
    """Keep an index in a file, with its checksum as a last row."""
    checksum = [zlib.crc32(index.tobytes())] + [0] * (len(Column) - 1)
    partial = path.with_name(path.name + ".partial")
    with open(partial, "wb") as file:
        np.save(file, np.vstack((index, checksum)))
    partial.replace(path)


class Dialogs(torch.utils.data.Dataset):
    """Samples of the data files; indexed by a list of row numbers, it gives their batch.

    Rows stay on disk and are read by byte offset. Before the first run every row is checked and
    tokenised once, each rank taking its share: a bad one stops the run then. What comes of it,
    int64 (n, 6) by Column, is kept beside the data (in `out` where that folder is read-only).
    lengths, n_pictures, n_labels int64 (n,): of the samples kept; those of which max_length leaves
    no label are dropped and counted.
    """

    def __init__(
        self,
        files: Sequence[str | Path],
        tokenizer: Tokenizer,
        n_image_tokens: int,
        image_size: int,
        *,
        template: str,
        max_length: int,
        images: str | Path,
        image_mode: str,
        strict: bool,
        out: Path,
    ):
        self.tokenizer = tokenizer
        self.n_image_tokens = n_image_tokens
        self.image_size = image_size
        self.template = template
        self.max_length = max_length
        self.images = images
        self.image_mode = image_mode
        self.strict = strict
        self.out = out

        self.files = []
        self.digests = []
        # of each sample: number of its file, number of its row there
        places = []
        indices = []
        for number, path in enumerate(map(Path, files)):
            index, sha256 = self.index(path)
            self.files.append(Records(path, ranges=index[:, [Column.START, Column.STOP]]))
            self.digests.append(sha256)
            places.append(np.column_stack((np.full(len(index), number), np.arange(len(index)))))
            indices.append(index)

        index = np.concatenate(indices)
        is_kept = index[:, Column.N_LABELS] > 0
        kept = index[is_kept]
        self.places = np.concatenate(places)[is_kept]
        self.lengths = kept[:, Column.LENGTH]
        self.n_pictures = kept[:, Column.N_PICTURES]
        self.n_labels = kept[:, Column.N_LABELS]
        self.n_dropped = len(index) - len(kept)
        self.n_cut = int(kept[:, Column.IS_CUT].sum())
        if not len(kept):
            line = f"{', '.join(map(str, files))}: no sample to learn from"
            if self.n_dropped:
                line += (
                    f" ({self.n_dropped} dropped: "
                    f"longer than --max-length {max_length} before any answer)"
                )
            leave(2, line)

    def index(self, file: Path) -> tuple[np.ndarray, str]:
        """(int64 (n, 6) by Column for each row of a file, its sha256), from the cache or made by
        all ranks."""
        rank = dist.get_rank()
        world_size = dist.get_world_size()
        found = on_rank0(self.look_up, file)
        if found.index is not None:
            return found.index, found.sha256
        rows = Records(file, ranges=found.ranges)
        shares = gather(together(self.measure, rows, rank, world_size))
        index = np.empty((len(found.ranges), len(Column)), dtype=np.int64)
        index[:, [Column.START, Column.STOP]] = found.ranges
        for r, share in enumerate(shares):
            index[r::world_size, Column.LENGTH :] = share
        if rank == 0:
            self.keep(index, file, found.name)
        return index, found.sha256

    def look_up(self, file: Path) -> Found:
        """Digest and index of a file, or the places of its rows where no index is kept."""
        if not file.is_file():
            what = "not a file" if file.exists() else "no such data file"
            raise FileNotFoundError(f"{what}: {file}")
        sha256 = digest(file)
        key = [
            2,
            sha256,
            digest(self.tokenizer.path),
            self.n_image_tokens,
            self.template,
            self.max_length,
        ]
        short = hashlib.sha256(json.dumps(key).encode()).hexdigest()[:12]
        name = f"{file.name}.{short}.index.npy"
        for cache in (file.with_name(name), self.out / name):
            index = read_index(cache)
            if index is not None:
                return Found(sha256, name, index, ranges=index[:, :2])
        return Found(sha256, name, index=None, ranges=find_rows(file))

    def keep(self, index: np.ndarray, file: Path, name: str) -> None:
        """Write an index beside its data, or into `out`: the data's folder may be read-only."""
        problem = ""
        for cache in (file.with_name(name), self.out / name):
            try:
                write_index(cache, index)
                return
            except OSError as error:
                problem = one_line(error)
        print0(f"lengths are not kept for the next start: {problem}")

    def measure(self, rows: Records, rank: int, world_size: int) -> np.ndarray:
        """int64 (n, 4): length, n_pictures, n_labels, is_cut of every world_size-th row. ValueError
        names file and row."""
        out = []
        for i in tqdm(
            range(rank, len(rows), world_size),
            desc=f"tokenising {rows.path.name}",
            unit=" rows",
            unit_scale=world_size,
            disable=None if rank == 0 else True,
        ):
            row = rows[i]
            try:
                dialog = self.dialog(row)
                ids, labels = self.encode(dialog)
                n_pictures = len(picture_names(dialog))
                # half a surrogate pair stops here, not when an answer is logged
                json.dumps(row, ensure_ascii=False).encode()
            except USER_ERRORS as error:
                name = f" (id {row['id']})" if isinstance(row, dict) and "id" in row else ""
                raise ValueError(f"{rows.path}: row {i}{name}: {one_line(error)}") from None
            if self.template == "plain":
                is_cut = len(ids) == self.max_length
            else:
                # one end an answer, so that a missing one tells a cut
                n_ends = labels.count(self.tokenizer.eos_id)
                is_cut = n_ends < len(dialog["conversations"]) // 2
            n_labels = sum(label != IGNORE_INDEX for label in labels[1:])
            out.append((len(ids), n_pictures, n_labels, is_cut))
        return np.array(out, dtype=np.int64).reshape(-1, 4)

    def check_pictures(self) -> None:
        """ValueError unless every picture of this rank's share of the rows is there."""
        rank = dist.get_rank()
        n_missing = 0
        first = ""
        for i in tqdm(
            range(rank, len(self), dist.get_world_size()),
            desc="looking for pictures",
            unit=" rows",
            unit_scale=dist.get_world_size(),
            disable=None if rank == 0 else True,
            delay=2,
        ):
            if not self.n_pictures[i]:
                continue
            try:
                row_pictures(self.row(i), self.images)
            except USER_ERRORS as error:
                n_missing += 1
                if not first:
                    file, number = self.places[i]
                    name = f"row {number} (id {self.row(i).get('id')})"
                    first = f"{self.files[file].path}: {name}: {one_line(error)}"
        if n_missing > 1:
            first += f" (and {n_missing - 1} more rows)"
        if n_missing:
            raise ValueError(first)

    def row(self, i: int) -> dict[str, Any]:
        """The row of sample number i, a dialog of the published form."""
        file, number = self.places[i]
        return self.dialog(self.files[file][number])

    def dialog(self, row: Any) -> dict[str, Any]:
        """A row as a dialog of the published form: read by what it holds. ValueError where that is
        none; a caption is one only for the template that asks nothing."""
        if not isinstance(row, dict):
            raise ValueError("not an object with id, image and conversations")
        dialog, is_caption = read_row_of_dialogs(row)
        if self.template != "plain" and is_caption:
            raise ValueError(
                f"a caption that nobody asked for (its keys are {keys_of(row)}): "
                "data_prep.py build --chimed-alignment FILE --images DIR --out DIR draws a prompt "
                "for each; --template plain needs none"
            )
        return dialog

    def encode(self, dialog: dict[str, Any]) -> tuple[list[int], list[int]]:
        """(input_ids, labels) of a dialog. ValueError when it is none."""
        conversation: Any = dialog.get("conversations")
        return encode_conversation(
            conversation,
            self.tokenizer,
            self.n_image_tokens,
            self.template,
            self.max_length,
        )

    def pictures(self, row: dict[str, Any], n: int) -> tuple[list[torch.Tensor], str | None]:
        """([the first n pictures of a row, (3, size, size)], None), or n grey ones and what is
        wrong; with --strict that raises."""
        try:
            paths = row_pictures(row, self.images)[:n]
            found = [preprocess_image(path, self.image_size, self.image_mode) for path in paths]
        except USER_ERRORS as error:
            if self.strict:
                raise
            grey = torch.zeros(3, self.image_size, self.image_size)
            return [grey] * n, one_line(error)
        return found, None

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, batch: list[int]) -> dict[str, Any]:
        """A batch from row numbers: input_ids, labels (B, T), pixel_values (M, 3, H, W) or None; no
        rows at all give one row without labels, so that a rank with nothing to do still takes part
        in the collectives. A sample whose picture does not decode gets a grey one and no labels,
        and is named under "grey"; with --strict, or when the row itself cannot be read any more,
        the text comes back under "error"."""
        all_ids = []
        all_labels = []
        pictures = []
        grey = []
        try:
            for i in batch:
                row = self.row(i)
                ids, labels = self.encode(row)
                found, problem = self.pictures(row, int(self.n_pictures[i]))
                if problem:
                    grey.append(f"{row.get('id')}: {problem}")
                    labels = [IGNORE_INDEX] * len(ids)
                all_ids.append(ids)
                all_labels.append(labels)
                pictures += found
        except USER_ERRORS as error:
            return {"error": one_line(error)}
        n_tokens = sum(map(len, all_ids))
        if not batch:
            all_ids = [[self.tokenizer.bos_id] * 2]
            all_labels = [[IGNORE_INDEX] * 2]
        input_ids = pad_rows(all_ids, 0)  # (B, T)
        labels = pad_rows(all_labels, IGNORE_INDEX)  # (B, T)
        return {
            "input_ids": input_ids,
            "labels": labels,
            "pixel_values": torch.stack(pictures) if pictures else None,  # (M, 3, H, W)
            # here, since of tensors on a GPU it would wait for that
            "n_image_positions": count_image_positions(input_ids),
            "n_labels": count_labels(labels),
            "grey": grey,
            "n_tokens": n_tokens,
            "n_slots": input_ids.numel(),
        }


# --- 2. order -------------------------------------------------------------------------------------


def batch_order(
    lengths: np.ndarray, batch_size: int, seed: int, epoch: int, window: int = 50
) -> list[list[int]]:
    """The global batches of an epoch: lists of row numbers, each row once, the longest sample first
    within a batch.

    A pure function of its arguments, whatever the number of ranks. Rows are shuffled, then sorted
    by length in windows of 50 batches, so that a batch holds samples alike in length and little is
    padding; then the batches are shuffled. The batch of the longest sample comes first: a run that
    will not fit in memory fails at once. The last, smaller batch stays last: nothing is dropped.
    """
    rng = np.random.default_rng((seed, epoch))
    order = rng.permutation(len(lengths))
    batches = []
    for start in range(0, len(order), window * batch_size):
        part = order[start : start + window * batch_size]
        part = part[np.argsort(-lengths[part], kind="stable")]
        batches += [part[i : i + batch_size].tolist() for i in range(0, len(part), batch_size)]
    tail = []
    if len(batches[-1]) < batch_size:
        tail.append(batches.pop())
    batches = [batches[i] for i in rng.permutation(len(batches))]
    if batches:
        longest = int(np.argmax([lengths[batch[0]] for batch in batches]))
        batches.insert(0, batches.pop(longest))
    return batches + tail


def cut_batch(
    batch: list[int], rank: int, world_size: int, micro_batch_size: int
) -> list[list[int]]:
    """This rank's micro-batches of a global batch: every world_size-th sample, so that ranks get
    like lengths. As many on each rank; some may be empty."""
    mine = batch[rank::world_size]
    most = math.ceil(len(batch) / world_size)
    n = math.ceil(most / micro_batch_size)
    return [mine[i * micro_batch_size : (i + 1) * micro_batch_size] for i in range(n)]


def all_batches(
    lengths: np.ndarray, *, batch_size: int, epochs: int, seed: int, max_steps: int
) -> list[list[int]]:
    """The global batches of the whole run, lists of sample numbers, epoch after epoch; max_steps 0:
    all."""
    batches = []
    for epoch in range(epochs):
        batches += batch_order(lengths, batch_size, seed, epoch)
        if max_steps and len(batches) >= max_steps:
            return batches[:max_steps]
    return batches


# --- 3. loading -----------------------------------------------------------------------------------


# batches that a worker has ready
PREFETCHED = 4


def stand_apart(_: int) -> None:
    """A worker ends when its rank does (PyTorch sees to that), and not by the signals that the rank
    answers with a checkpoint: those reach whole groups of processes."""
    os.setpgid(0, 0)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def load_ahead(
    dataset: Dialogs, micro_batches: list[list[int]], workers: int
) -> Iterator[dict[str, Any]]:
    """An iterator over the batches of a list of row-number lists, decoded by worker processes ahead
    of time."""
    loader = torch.utils.data.DataLoader(
        dataset,
        batch_size=None,
        sampler=micro_batches,
        num_workers=workers,
        prefetch_factor=PREFETCHED if workers else None,
        pin_memory=torch.cuda.is_available(),
        worker_init_fn=stand_apart,
        # a worker that finds /dev/shm full dies without a word
        timeout=900 if workers else 0,
    )
    return iter(loader)


def check_batches(parts: list[dict[str, Any]]) -> None:
    """ValueError when the loader could not make one of the batches."""
    for batch in parts:
        if "error" in batch:
            raise ValueError(batch["error"])


def count(parts: list[dict[str, Any]]) -> dict[str, int]:
    """What sum_over_ranks adds up of a list of batches: errors, labels that the loss counts, real
    tokens, tokens with padding, pictures and grey samples."""
    n = {"errors": 0, "targets": 0, "tokens": 0, "slots": 0, "pictures": 0, "grey": 0}
    for batch in parts:
        if "error" in batch:
            n["errors"] += 1
            continue
        n["targets"] += batch["n_labels"]
        n["tokens"] += batch["n_tokens"]
        n["slots"] += batch["n_slots"]
        n["grey"] += len(batch["grey"])
        if batch["pixel_values"] is not None:
            n["pictures"] += len(batch["pixel_values"])
    return n


def to_device(batch: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """What the model takes of a batch, by the names of its parameters: tensors, copied to the
    device while the host goes on, and what was counted of them."""
    moved = {name: batch[name] for name in ("n_image_positions", "n_labels")}
    for name in ("input_ids", "pixel_values", "labels"):
        tensor = batch[name]
        moved[name] = None if tensor is None else tensor.to(device, non_blocking=True)
    return moved
