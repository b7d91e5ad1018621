"""What is finished, a line each, appended as it comes: a kill loses nothing that was paid for."""

import json
import os
import sys
from array import array
from pathlib import Path

import numpy as np

from common.files import lock


class Finished:
    """Texts that need not be asked for again, by key: a .jsonl file that grows line by line; a line cut by a kill is forgotten."""

    def __init__(self, path):
        self.file = lock(path, f"{path} is in use by another run")
        self.lines, position = {}, 0
        self.file.seek(0)
        for raw in self.file:
            if not raw.endswith(b"\n"):
                self.file.truncate(position)
                break
            position += len(raw)
            try:
                line = json.loads(raw)
                if isinstance(line["text"], str):
                    self.lines[line["key"]] = line
            except (ValueError, LookupError, TypeError, RecursionError):
                print(f"{path}: a damaged line: its text is asked for again", file=sys.stderr)

    def add(self, key, text, **more):
        self.lines[key] = {"key": key, "text": text, **more}
        self.file.write(
            json.dumps(self.lines[key], ensure_ascii=False).encode("utf-8", "backslashreplace")
            + b"\n"
        )
        self.file.flush()  # a kill after this loses nothing


class Journal:
    """Finished rows by the key of their English texts; the last line of a key counts. 16 bytes of memory a row; a line cut by a kill is forgotten."""

    def __init__(self, path):
        self.path = Path(path)
        self.file = lock(self.path, f"{self.path} is in use by another run")
        self.keys, self.offsets = np.empty(0, dtype=np.uint64), np.empty(0, dtype=np.int64)
        self.header, self.damaged, self.unsynced = None, 0, 0

    def load(self, is_good=lambda line: True):
        """Reads what is there; lines for which is_good is false, or that are damaged, do not count."""
        found, offsets, position, self.damaged = array("Q"), array("q"), 0, 0
        self.file.seek(0)
        for raw in self.file:
            if not raw.endswith(b"\n"):  # killed in the middle of it
                self.file.truncate(position)
                break
            try:
                line = json.loads(raw)
                if "raw" in line:  # where its rows come from
                    self.header, position = line, position + len(raw)
                    continue
                texts = [
                    text for name in ("english", "chinese") for text in line[name].values()
                ] + line["reasons"]
                complete = line["reasons"] or line["chinese"].keys() == line["english"].keys()
                pictures = [name for names in line["images"] for name in names] + [line["source"]]
                if (
                    len(line["key"]) != 16
                    or not complete
                    or not all(isinstance(text, str) for text in texts + pictures)
                ):
                    raise ValueError
                offsets.append(position if is_good(line) else -1)
                found.append(int(line["key"], 16))
            except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
                self.damaged += 1
            position += len(raw)
        self.keys, last = np.unique(
            np.array(found, dtype=np.uint64)[::-1], return_index=True
        )  # of the lines of a key the last
        self.offsets = np.array(offsets, dtype=np.int64)[::-1][last]

    def find(self, key):
        """The line of a key, or None."""
        i = int(np.searchsorted(self.keys, np.uint64(key)))
        if i == len(self.keys) or int(self.keys[i]) != key or self.offsets[i] < 0:
            return None
        self.file.seek(int(self.offsets[i]))
        return json.loads(self.file.readline())

    def has(self, keys):
        """bool per key (uint64 array)."""
        i = np.minimum(np.searchsorted(self.keys, keys), max(len(self.keys) - 1, 0))
        return (
            (self.keys[i] == keys) & (self.offsets[i] >= 0)
            if len(self.keys)
            else np.zeros(len(keys), dtype=bool)
        )

    def add(self, line):
        self.file.write(
            json.dumps(line, ensure_ascii=False).encode("utf-8", "backslashreplace") + b"\n"
        )
        self.file.flush()  # safe from a kill at once, from a power cut after at most 100 rows
        self.unsynced += 1
        if self.unsynced >= 100:
            self.sync()

    def sync(self):
        os.fsync(self.file.fileno())
        self.unsynced = 0
