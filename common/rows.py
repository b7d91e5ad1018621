"""The rows of a data file (.json .jsonl .csv .tsv), found by byte offset and read one by one."""

import csv
import json
import mmap
import os
import re
from array import array
from pathlib import Path

import numpy as np

csv.field_size_limit(
    2**24
)  # a context of 16 MB is none: a quote that never closes ends here instead of in memory

ROW_STEP = re.compile(
    rb'(?:[^"\[\]{}]++|"[^"\\]*+(?:\\.[^"\\]*+)*+")*+([\[\]{}])', re.DOTALL
)  # to the next bracket that stands in no string


def find_rows(path):
    """int64 (n, 2): the first byte of each row of a .json list or .jsonl file, and the one after its last. ValueError names file and row.

    Brackets are counted, nothing is parsed, and what has been passed leaves memory: a file of 400 MB takes seconds and no memory.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no such data file: {path}")
    rows = array("q")
    with open(path, "rb") as file:
        position = (
            3 if file.read(3) == b"\xef\xbb\xbf" else 0
        )  # some releases carry a byte-order mark
        if path.suffix == ".jsonl":
            file.seek(position)
            for line in file:
                if line.strip():
                    rows.extend((position, position + len(line)))
                position += len(line)
            return np.array(rows, dtype=np.int64).reshape(-1, 2)
        if path.stat().st_size <= position:
            raise ValueError(f"{path}: not a JSON file (it is empty)")
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            depth, end, released = (
                0,
                position,
                0,
            )  # end: of what has been accounted for; released: what need not stay in memory
            while match := ROW_STEP.match(data, position):
                bracket, position = match.start(1), match.end()
                depth += 1 if data[bracket] in b"[{" else -1
                if depth == 1 and data[bracket] in b"[{":
                    if data[bracket] != ord("[") or data[end:bracket].strip():
                        raise ValueError(
                            f"{path}: not a list of rows (one object a line is .jsonl)"
                        )
                    end = position
                elif depth == 2 and data[bracket] in b"[{":
                    if data[end:bracket].strip() != (b"," if rows else b""):
                        raise ValueError(
                            f"{path}: what stands before row {len(rows) // 2} is no object, or no comma: {bytes(data[end:bracket][:40])!r}"
                        )
                    rows.extend((bracket, 0))
                elif depth == 1:
                    rows[-1] = end = position
                    if position - released > 2**24 and hasattr(data, "madvise"):
                        data.madvise(mmap.MADV_DONTNEED)
                        released = position
                elif depth == 0:
                    break
            if depth or end == 0 or not match:
                raise ValueError(
                    f"{path}: not a JSON file ({f'it breaks off, or is damaged, in row {(len(rows) - 1) // 2}' if rows else 'no list begins in it'})"
                )
            if data[end : match.start(1)].strip() or data[position:].strip():
                raise ValueError(
                    f"{path}: "
                    + (f"after row {len(rows) // 2 - 1}" if rows else "where row 0 should be")
                    + " stands something that is no row, so this is no list of objects"
                )
    return np.array(rows, dtype=np.int64).reshape(-1, 2)


class Rows:
    """The rows of a data file, each read when it is asked for: rows[i] is one parsed row. ranges: of find_rows, or None to find them."""

    def __init__(self, path, ranges=None):
        self.path, self.ranges = Path(path), find_rows(path) if ranges is None else ranges
        self.stamp = self.path.stat().st_size, self.path.stat().st_mtime_ns

    def __len__(self):
        return len(self.ranges)

    def __getitem__(self, i):
        start, stop = (
            int(n) for n in self.ranges[i]
        )  # IndexError past the last, which ends a for loop
        with open(self.path, "rb") as file:
            status = os.fstat(file.fileno())
            if (status.st_size, status.st_mtime_ns) != self.stamp:
                raise ValueError(
                    f"{self.path}: the file changed while it was in use: its rows are no longer where they were"
                )
            file.seek(start)
            raw = file.read(stop - start)
        try:
            return json.loads(raw)
        except (ValueError, RecursionError) as error:
            with open(self.path, "rb") as file:
                line = file.read(start).count(b"\n") + 1
            raise ValueError(f"{self.path}: line {line}, row {i}, is no JSON ({error})") from None


JSON_SUFFIXES, TABLE_SUFFIXES = (".json", ".jsonl"), {".csv": ",", ".tsv": "\t"}


class BadRow(ValueError):
    """A row that is left out and counted under this reason; str() is the reason."""


class NotEncoded(ValueError):
    """A table that is not in the encoding tried."""


class Records:
    """The records of one file, each a dict, read when asked for: 16 bytes of memory a record. ValueError names a file that is none."""

    def __init__(self, path, encoding="utf-8"):
        self.path, self.encoding, self.columns = Path(path), encoding, None
        if not self.path.is_file():
            raise FileNotFoundError(f"no such data file: {path}")
        if self.path.suffix in JSON_SUFFIXES:
            self.ranges = find_rows(path)
        elif self.path.suffix in TABLE_SUFFIXES:
            try:  # UTF-8 where it is, as translate writes it; JSON always is
                self.encoding, self.ranges = "utf-8", None
                self.ranges = self._find_lines()
            except NotEncoded:
                if encoding == "utf-8":
                    raise
                self.encoding, self.columns = encoding, None
                self.ranges = self._find_lines()
        else:
            raise ValueError(
                f"{path}: a data file ends in {', '.join((*TABLE_SUFFIXES, *JSON_SUFFIXES))}"
            )
        if not len(self.ranges):
            raise ValueError(f"{path}: it has no rows")
        self.stamp = self._status()

    def __len__(self):
        return len(self.ranges)

    def _status(self):
        status = os.stat(self.path)
        return status.st_size, status.st_mtime_ns

    def _find_lines(self):
        """Where each record of a table lies: a quoted text may run over several lines, so the csv module decides."""
        ranges, position, line = array("q"), 0, 0
        with open(self.path, "rb") as file:

            def lines():
                nonlocal position, line
                for raw in file:
                    position, line = position + len(raw), line + 1
                    yield self._decode(raw, line).removeprefix("\ufeff" if line == 1 else "")

            start = 0
            try:
                for values in csv.reader(
                    lines(), delimiter=TABLE_SUFFIXES[self.path.suffix], strict=True
                ):
                    if self.columns is None and values:
                        self.columns = [name.strip() for name in values]
                    elif values:
                        ranges.extend((start, position))
                    start = position
            except csv.Error as error:
                raise ValueError(f"{self.path}: no table near line {line} ({error})") from None
        if self.columns is None:
            raise ValueError(f"{self.path}: it is empty")
        if len(set(self.columns)) < len(self.columns):
            raise ValueError(f"{self.path}: two columns have one name ({', '.join(self.columns)})")
        return np.array(ranges, dtype=np.int64).reshape(-1, 2)

    def _decode(self, raw, line):
        try:
            return raw.decode(self.encoding)
        except UnicodeDecodeError:
            raise NotEncoded(
                f"{self.path}: line {line} is not {self.encoding} (a table saved by Excel in Chinese is often `--encoding gb18030`)"
            ) from None

    def parse(self, raw):
        """The dict of a record's bytes. BadRow."""
        if self.columns is None:
            try:
                record = json.loads(raw.decode())
            except (ValueError, RecursionError):
                raise BadRow("not JSON") from None
            if not isinstance(record, dict):
                raise BadRow("not an object")
            return record
        values = next(
            csv.reader(
                re.split(r"(?<=\n)", self._decode(raw, "?").removeprefix("\ufeff")),
                delimiter=TABLE_SUFFIXES[self.path.suffix],
            )
        )
        if len(values) != len(self.columns):
            raise BadRow("wrong number of columns")
        return dict(zip(self.columns, values))

    def read(self, start, stop):
        """(number, bytes) of records start to stop, in one go through the file."""
        if self._status() != self.stamp:
            raise ValueError(
                f"{self.path}: the file changed while it was in use: its rows are no longer where they were"
            )
        with open(self.path, "rb") as file:
            for i in range(start, min(stop, len(self))):
                first, last = (int(n) for n in self.ranges[i])
                file.seek(first)
                yield i, file.read(last - first)

    def __getitem__(self, i):
        return self.parse(next(self.read(i, i + 1))[1])

    def require(self, needed, what):
        """ValueError unless the columns a set needs are there: in a table its header, else one of the first 100 rows."""
        seen = set(self.columns or ())
        for _, raw in self.read(0, 0 if self.columns else 100):
            try:
                seen |= {name for name, value in self.parse(raw).items()}
            except BadRow:
                pass
        for names in needed:
            if not seen & set(names):
                raise ValueError(
                    f"{self.path}: no {' or '.join(map(repr, names))} in it, which {what} has (found: {', '.join(sorted(seen)) or 'nothing readable'})"
                )

    def write(self, out, records):
        """Records (dicts) to `out` in the form of this file: same columns, list or lines. The caller renames."""
        if self.columns is not None:
            writer = csv.writer(
                out, delimiter=TABLE_SUFFIXES[self.path.suffix], lineterminator="\r\n"
            )  # so that a \r inside a text is quoted, too
            writer.writerow(self.columns)
            writer.writerows([record[name] for name in self.columns] for record in records)
            return
        lines = self.path.suffix == ".jsonl"
        out.write("" if lines else "[\n")
        for i, record in enumerate(records):
            out.write(
                (",\n" if i and not lines else "")
                + json.dumps(record, ensure_ascii=False)
                + ("\n" if lines else "")
            )
        out.write("" if lines else "\n]\n")
