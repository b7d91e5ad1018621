"""From data files to every rank's batches: rows by byte offset, lengths in tokens, an order that does not depend on the number of ranks.

1. samples    a row of a file -> input_ids, labels, pixels; its lengths measured once and kept beside the data
2. order      lengths -> global batches of samples alike in length -> this rank's micro-batches
3. loading    worker processes that decode pictures ahead
"""

import hashlib
import json
import math
import os
import signal
import zlib
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm

from common.files import USER_ERRORS, digest, one_line
from common.rows import Records, find_rows
from model_io.pixels import picture_names, preprocess_image, row_pictures
from model_io.tokens import encode_conversation
from qilin_min import IGNORE_INDEX, pad_rows
from training.ranks import gather, leave, on_rank0, print0, together

# --- 1. samples -----------------------------------------------------------------------------------------------------


INDEX = (
    "start",
    "stop",
    "length",
    "n_pictures",
    "n_labels",
    "is_cut",
)  # of each row: its bytes in the file, its tokens as trained on


class Dialogs(torch.utils.data.Dataset):
    """Samples of the data files; indexed by a list of row numbers, it gives their batch.

    Rows stay on disk and are read by byte offset. Before the first run every row is checked and tokenised once, each rank taking its share: a bad one
    stops the run then. What comes of it, int64 (n, 6) by INDEX, is kept beside the data under a name made of the digests of data and tokenizer
    and of what else lengths depend on. lengths, n_pictures, n_labels int64 (n,): of the samples kept; those of which max_length leaves no label are dropped and counted.
    """

    def __init__(self, files, tokenizer, n_image_tokens, image_size, args):
        self.tokenizer, self.n_image_tokens, self.image_size, self.args = (
            tokenizer,
            n_image_tokens,
            image_size,
            args,
        )
        self.files, self.digests, indices = [], [], []
        for file in map(Path, files):
            index, sha256 = self.index(file)
            self.files.append(Records(file, ranges=index[:, :2]))
            self.digests.append(sha256)
            indices.append(
                np.column_stack(
                    (np.full(len(index), len(indices)), np.arange(len(index)), index[:, 2:])
                )
            )
        index = np.concatenate(indices)
        kept = index[index[:, 4] > 0]
        self.n_dropped, self.n_cut = len(index) - len(kept), int(kept[:, 5].sum())
        self.places, self.lengths, self.n_pictures, self.n_labels = (
            kept[:, :2],
            kept[:, 2],
            kept[:, 3],
            kept[:, 4],
        )
        if not len(kept):
            leave(
                2,
                f"{', '.join(map(str, files))}: no sample to learn from"
                + f" ({self.n_dropped} dropped: longer than --max-length {args.max_length} before any answer)"
                * bool(self.n_dropped),
            )

    def index(self, file):
        """(int64 (n, 6) of INDEX for each row of a file, its sha256), from the cache or made by all ranks."""
        rank, world_size = dist.get_rank(), dist.get_world_size()

        def look_up():
            if not file.is_file():
                raise FileNotFoundError(
                    f"{'not a file' if file.exists() else 'no such data file'}: {file}"
                )
            sha256 = digest(file)
            key = [
                2,
                sha256,
                digest(self.tokenizer.path),
                self.n_image_tokens,
                self.args.template,
                self.args.max_length,
            ]
            name = (
                f"{file.name}.{hashlib.sha256(json.dumps(key).encode()).hexdigest()[:12]}.index.npy"
            )
            for cache in (file.with_name(name), self.args.out / name):
                try:
                    stored = (
                        np.load(cache) if cache.is_file() else None
                    )  # a pipe would keep us waiting
                    if (
                        stored is not None
                        and stored.dtype == np.int64
                        and stored[-1, 0] == zlib.crc32(stored[:-1])
                    ):
                        return sha256, name, stored[:-1], None
                except Exception:  # noqa: S110, numpy raises many kinds for a damaged file, and each means that it is made anew
                    pass
            return sha256, name, None, find_rows(file)

        sha256, name, index, ranges = on_rank0(look_up)
        if index is None:
            shares = gather(together(self.measure, Records(file, ranges=ranges), rank, world_size))
            index = np.empty((len(ranges), len(INDEX)), dtype=np.int64)
            for r, share in enumerate(shares):
                index[r::world_size] = np.column_stack((ranges[r::world_size], share))
            if rank == 0:
                for cache in (
                    file.with_name(name),
                    self.args.out / name,
                ):  # the data's folder may be read-only
                    try:
                        partial = cache.with_name(cache.name + ".partial")
                        with open(partial, "wb") as opened:
                            np.save(
                                opened,
                                np.vstack((index, [zlib.crc32(index)] + [0] * (len(INDEX) - 1))),
                            )  # with its checksum as a last row
                        partial.replace(cache)
                        break
                    except OSError as error:
                        problem = error
                else:
                    print0(f"lengths are not kept for the next start: {one_line(problem)}")
        return index, sha256

    def measure(self, rows, rank, world_size):
        """int64 (n, 4): length, n_pictures, n_labels, is_cut of every world_size-th row. ValueError names file and row."""
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
                ids, labels = self.encode(row)
                n_pictures = len(picture_names(row))
                json.dumps(
                    row, ensure_ascii=False
                ).encode()  # half a surrogate pair stops here, not when an answer is logged
            except USER_ERRORS as error:
                name = f" (id {row['id']})" if isinstance(row, dict) and "id" in row else ""
                raise ValueError(f"{rows.path}: row {i}{name}: {one_line(error)}") from None
            n_ends = labels.count(
                self.tokenizer.eos_id
            )  # one an answer, so that a missing one tells a cut
            is_cut = (
                len(ids) == self.args.max_length
                if self.args.template == "plain"
                else n_ends < len(row["conversations"]) // 2
            )
            out.append(
                (len(ids), n_pictures, sum(label != IGNORE_INDEX for label in labels[1:]), is_cut)
            )
        return np.array(out, dtype=np.int64).reshape(-1, 4)

    def check_pictures(self):
        """ValueError unless every picture of this rank's share of the rows is there."""
        rank, missing, first = dist.get_rank(), 0, ""
        for i in tqdm(
            range(rank, len(self), dist.get_world_size()),
            desc="looking for pictures",
            unit=" rows",
            unit_scale=dist.get_world_size(),
            disable=None if rank == 0 else True,
            delay=2,
        ):
            if self.n_pictures[i]:
                try:
                    row_pictures(self.row(i), self.args.images)
                except USER_ERRORS as error:
                    file, number = self.places[i]
                    missing, first = (
                        missing + 1,
                        first
                        or f"{self.files[file].path}: row {number} (id {self.row(i).get('id')}): {one_line(error)}",
                    )
        if missing:
            raise ValueError(first + f" (and {missing - 1} more rows)" * (missing > 1))

    def row(self, i):
        file, number = self.places[i]
        return self.files[file][number]

    def encode(self, row):
        if not isinstance(row, dict):
            raise ValueError("not an object with id, image and conversations")
        return encode_conversation(
            row.get("conversations"),
            self.tokenizer,
            self.n_image_tokens,
            self.args.template,
            self.args.max_length,
        )

    def pictures(self, row, n):
        """([the first n pictures of a row, (3, size, size)], None), or n grey ones and what is wrong; with --strict that raises."""
        try:
            return [
                preprocess_image(path, self.image_size, self.args.image_mode)
                for path in row_pictures(row, self.args.images)[:n]
            ], None
        except USER_ERRORS as error:
            if self.args.strict:
                raise
            return [torch.zeros(3, self.image_size, self.image_size)] * n, one_line(error)

    def __len__(self):
        return len(self.places)

    def __getitem__(self, batch):
        """A batch from row numbers: input_ids, labels (B, T), pixel_values (M, 3, H, W) or None; no rows at all give one row without labels,
        so that a rank with nothing to do still takes part in the collectives. A sample whose picture does not decode gets a grey one and no labels,
        and is named under "grey"; with --strict, or when the row itself cannot be read any more, the text comes back under "error"."""
        samples, pictures, grey = [], [], []
        try:
            for i in batch:
                row = self.row(i)
                ids, labels = self.encode(row)
                found, problem = self.pictures(row, int(self.n_pictures[i]))
                if problem:
                    grey.append(f"{row.get('id')}: {problem}")
                    labels = [IGNORE_INDEX] * len(ids)
                samples.append((ids, labels))
                pictures += found
        except USER_ERRORS as error:
            return {"error": one_line(error)}
        samples = samples or [([self.tokenizer.bos_id] * 2, [IGNORE_INDEX] * 2)]
        input_ids, labels = (
            pad_rows([ids for ids, _ in samples], 0),
            pad_rows([labels for _, labels in samples], IGNORE_INDEX),
        )
        return {
            "input_ids": input_ids,
            "labels": labels,
            "pixel_values": torch.stack(pictures) if pictures else None,
            "grey": grey,
            "n_tokens": sum(len(ids) for ids, _ in samples) if batch else 0,
            "n_slots": input_ids.numel(),
        }


# --- 2. order -------------------------------------------------------------------------------------------------------


def batch_order(lengths, batch_size, seed, epoch, window=50):
    """The global batches of an epoch: lists of row numbers, each row once, the longest sample first within a batch.

    A pure function of its arguments, whatever the number of ranks. Rows are shuffled, then sorted by length in windows of 50 batches, so that a
    batch holds samples alike in length and little is padding; then the batches are shuffled. The batch of the longest sample
    comes first: a run that will not fit in memory fails at once. The last, smaller batch stays last: nothing is dropped.
    """
    rng = np.random.default_rng((seed, epoch))
    order = rng.permutation(len(lengths))
    batches = []
    for start in range(0, len(order), window * batch_size):
        part = order[start : start + window * batch_size]
        part = part[np.argsort(-lengths[part], kind="stable")]
        batches += [part[i : i + batch_size].tolist() for i in range(0, len(part), batch_size)]
    tail = [batches.pop()] if len(batches[-1]) < batch_size else []
    batches = [batches[i] for i in rng.permutation(len(batches))]
    if batches:
        batches.insert(0, batches.pop(int(np.argmax([lengths[batch[0]] for batch in batches]))))
    return batches + tail


def cut_batch(batch, rank, world_size, micro_batch_size):
    """This rank's micro-batches of a global batch: every world_size-th sample, so that ranks get like lengths. As many on each rank; some may be empty."""
    mine = batch[rank::world_size]
    n = math.ceil(math.ceil(len(batch) / world_size) / micro_batch_size)
    return [mine[i * micro_batch_size : (i + 1) * micro_batch_size] for i in range(n)]


def all_batches(
    lengths: np.ndarray, *, batch_size: int, epochs: int, seed: int, max_steps: int
) -> list[list[int]]:
    """The global batches of the whole run, lists of sample numbers, epoch after epoch; max_steps 0: all."""
    batches = []
    for epoch in range(epochs):
        batches += batch_order(lengths, batch_size, seed, epoch)
        if max_steps and len(batches) >= max_steps:
            return batches[:max_steps]
    return batches


# --- 3. loading -----------------------------------------------------------------------------------------------------


def stand_apart(_):
    """A worker ends when its rank does (PyTorch sees to that), and not by the signals that the rank answers with a checkpoint: those reach whole groups of processes."""
    os.setpgid(0, 0)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def load_ahead(dataset, micro_batches, workers):
    """An iterator over the batches of a list of row-number lists, decoded by worker processes ahead of time."""
    return iter(
        torch.utils.data.DataLoader(
            dataset,
            batch_size=None,
            sampler=micro_batches,
            num_workers=workers,
            prefetch_factor=4 if workers else None,
            pin_memory=torch.cuda.is_available(),
            worker_init_fn=stand_apart,
            timeout=900 if workers else 0,
        )
    )  # a worker that finds /dev/shm full dies without a word


def check_batches(parts):
    """ValueError when the loader could not make one of the batches."""
    for batch in parts:
        if "error" in batch:
            raise ValueError(batch["error"])


def count(parts):
    """What sum_over_ranks adds up of a list of batches: errors, labels that the loss counts, real tokens, tokens with padding, pictures and grey samples."""
    good = [batch for batch in parts if "error" not in batch]
    return {
        "errors": len(parts) - len(good),
        "targets": sum(int((batch["labels"][:, 1:] != IGNORE_INDEX).sum()) for batch in good),
        "tokens": sum(batch["n_tokens"] for batch in good),
        "slots": sum(batch["n_slots"] for batch in good),
        "pictures": sum(
            len(batch["pixel_values"]) for batch in good if batch["pixel_values"] is not None
        ),
        "grey": sum(len(batch["grey"]) for batch in good),
    }


def to_device(batch, device):
    return {
        k: None if batch[k] is None else batch[k].to(device, non_blocking=True)
        for k in ("input_ids", "pixel_values", "labels")
    }
