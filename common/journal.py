"""What is finished, a line each, appended as it comes: a kill loses nothing that was paid for."""

import json
import os
from array import array
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from common.files import lock

# a power cut loses this many lines at most
SYNC_EVERY = 100


def key_number(key: str) -> int:
    """A key's first 16 hex digits as a number of 64 bits, by which lines are found."""
    return int(key[:16], 16)


class Journal:
    """Finished lines by their key, in a .jsonl file that grows line by line and is ours alone.

    A line is a dict; its "key" is hex digits, of which the first 16 tell it from others. The last
    line of a key counts. 16 bytes of memory a line; a line cut by a kill is forgotten.
    is_whole: whether a line has all it needs; those that have not, or are damaged, are counted.
    """

    def __init__(self, path: str | Path, is_whole: Callable[[dict], bool]):
        self.path = Path(path)
        self.is_whole = is_whole
        self.file = lock(self.path, f"{self.path} is in use by another run")
        # the line without a key, which says where the others come from
        self.header: dict[str, Any] | None = None
        self.damaged = 0
        self.size = 0
        self.unsynced = 0
        self._clear()

    def load(self, is_good: Callable[[dict], bool] = lambda line: True) -> None:
        """Reads what is there; lines for which is_good is false, or that are damaged, do not
        count."""
        self._clear()
        self.damaged = 0
        self.size = 0
        self.file.seek(0)
        for raw in self.file:
            if not raw.endswith(b"\n"):
                # killed in the middle of it
                self.file.truncate(self.size)
                break
            try:
                self._take(json.loads(raw), is_good)
            except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
                self.damaged += 1
            self.size += len(raw)

    def _take(self, line: dict, is_good: Callable[[dict], bool]) -> None:
        if "raw" in line:
            self.header = line
            return
        if not self.is_whole(line):
            raise ValueError("a line that lacks something")
        key = key_number(line["key"])
        offset = self.size if is_good(line) else -1
        self._new_keys.append(key)
        self._new_offsets.append(offset)

    def find(self, key: int | str) -> dict[str, Any] | None:
        """The line of a key, or None."""
        number = key_number(key) if isinstance(key, str) else key
        self._sort()
        i = int(np.searchsorted(self._keys, np.uint64(number)))
        if i == len(self._keys) or int(self._keys[i]) != number or self._offsets[i] < 0:
            return None
        self.file.seek(int(self._offsets[i]))
        return json.loads(self.file.readline())

    def __contains__(self, key: str) -> bool:
        return bool(self.has(np.array([key_number(key)], dtype=np.uint64))[0])

    def has(self, keys: np.ndarray) -> np.ndarray:
        """bool per key (uint64 array)."""
        self._sort()
        if not len(self._keys):
            return np.zeros(len(keys), dtype=bool)
        i = np.minimum(np.searchsorted(self._keys, keys), len(self._keys) - 1)
        return (self._keys[i] == keys) & (self._offsets[i] >= 0)

    def keys(self) -> list[int]:
        """The keys of the lines that count, ascending."""
        self._sort()
        return self._keys[self._offsets >= 0].tolist()

    def add(self, line: dict[str, Any]) -> None:
        """A line at the end: safe from a kill at once, from a power cut after at most 100 lines."""
        raw = json.dumps(line, ensure_ascii=False).encode("utf-8", "backslashreplace") + b"\n"
        self.file.write(raw)
        self.file.flush()
        if "key" in line:
            self._new_keys.append(key_number(line["key"]))
            self._new_offsets.append(self.size)
        self.size += len(raw)
        self.unsynced += 1
        if self.unsynced >= SYNC_EVERY:
            self.sync()

    def sync(self) -> None:
        """Have the disk hold what was added."""
        os.fsync(self.file.fileno())
        self.unsynced = 0

    def close(self) -> None:
        """Close the file, and with it give up the lock."""
        self.file.close()

    def _clear(self) -> None:
        # ascending, each once, with where its last line begins, or -1
        self._keys = np.empty(0, dtype=np.uint64)
        self._offsets = np.empty(0, dtype=np.int64)
        # in the order of the file, not yet among those above
        self._new_keys = array("Q")
        self._new_offsets = array("q")

    def _sort(self) -> None:
        """Puts what came since the last time in its place: of a key's lines the last counts."""
        if not self._new_keys:
            return
        keys = np.concatenate((self._keys, np.array(self._new_keys, dtype=np.uint64)))
        offsets = np.concatenate((self._offsets, np.array(self._new_offsets, dtype=np.int64)))
        self._new_keys = array("Q")
        self._new_offsets = array("q")
        # the first of each that unique meets, going backwards
        self._keys, last = np.unique(keys[::-1], return_index=True)
        self._offsets = offsets[::-1][last]
