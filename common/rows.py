"""The rows of a data file (.json .jsonl .csv .tsv), found by byte offset and read one by one."""

import csv
import json
import mmap
import os
import re
from array import array
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, TextIO

import numpy as np

JSON_SUFFIXES = (".json", ".jsonl")
# suffix of a table: what stands between its cells
TABLE_SUFFIXES = {".csv": ",", ".tsv": "\t"}
BYTE_ORDER_MARK = b"\xef\xbb\xbf"

# a context of 16 MB is none: a quote that never closes ends here instead of in memory
csv.field_size_limit(2**24)


class BadRow(ValueError):
    """A row that is left out and counted under this reason; str() is the reason."""


def folded(record: dict[str, Any]) -> dict[str, Any]:
    """A record by its names without blanks around them and in small letters."""
    return {str(name).strip().lower(): value for name, value in record.items()}


class NotEncoded(ValueError):
    """A table that is not in the encoding tried."""


class FileChanged(ValueError):
    """A data file that is no longer what it was when its rows were found."""

    def __init__(self, path: Path):
        super().__init__(
            f"{path}: the file changed while it was in use: its rows are no longer where they were"
        )


# -1. where the rows lie------------------------------------------------------------------------
# in: a file; out: int64 (n, 2), the first byte of each row and the one after its last

# to the next bracket that stands in no string
ROW_STEP = re.compile(
    rb'(?:[^"\[\]{}]++|"[^"\\]*+(?:\\.[^"\\]*+)*+")*+([\[\]{}])',
    re.DOTALL,
)
# bytes of a file that has been passed are given back to the system in pieces of this size
RELEASE_BYTES = 2**24


def find_rows(path: str | Path) -> np.ndarray:
    """int64 (n, 2): the first byte of each row of a .json list or .jsonl file, and the one after
    its last. ValueError names file and row.

    Brackets are counted, nothing is parsed, and what has been passed leaves memory: a file of
    400 MB takes seconds and no memory.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no such data file: {path}")
    with open(path, "rb") as file:
        # some releases carry a byte-order mark
        has_mark = file.read(len(BYTE_ORDER_MARK)) == BYTE_ORDER_MARK
        start = len(BYTE_ORDER_MARK) if has_mark else 0
        if path.suffix == ".jsonl":
            return as_ranges(_lines_of(file, start))
        if path.stat().st_size <= start:
            raise ValueError(f"{path}: not a JSON file (it is empty)")
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return as_ranges(_rows_of_list(data, start, path))


def as_ranges(offsets: array) -> np.ndarray:
    """Starts and ends in turn -> int64 (n, 2)."""
    return np.array(offsets, dtype=np.int64).reshape(-1, 2)


def _lines_of(file: BinaryIO, start: int) -> array:
    """The .jsonl way: a row is a line that is not blank."""
    offsets = array("q")
    position = start
    file.seek(start)
    for line in file:
        end = position + len(line)
        if line.strip():
            offsets.extend((position, end))
        position = end
    return offsets


def _rows_of_list(data: mmap.mmap, start: int, path: Path) -> array:
    """The .json way: the outermost bracket opens the list, those one level deeper are its rows."""
    offsets = array("q")
    depth = 0
    has_list = False
    # before `done` every byte has been accounted for, before `released` none stays in memory
    done = start
    released = 0
    position = start
    for position, opens in _brackets(data, start):
        depth += 1 if opens else -1
        if depth == 0:
            break
        if opens and depth == 1:
            if data[position] != ord("[") or data[done:position].strip():
                raise ValueError(f"{path}: not a list of rows (one object a line is .jsonl)")
            has_list = True
            done = position + 1
        elif opens and depth == 2:
            _check_between(data[done:position], len(offsets) // 2, path)
            offsets.extend((position, 0))
        elif depth == 1:
            done = position + 1
            offsets[-1] = done
            if done - released > RELEASE_BYTES and hasattr(data, "madvise"):
                data.madvise(mmap.MADV_DONTNEED)
                released = done
    if depth != 0 or not has_list:
        raise ValueError(f"{path}: not a JSON file ({_damage(offsets)})")
    if data[done:position].strip() or data[position + 1 :].strip():
        where = f"after row {len(offsets) // 2 - 1}" if offsets else "where row 0 should be"
        raise ValueError(
            f"{path}: {where} stands something that is no row, so this is no list of objects"
        )
    return offsets


def _brackets(data: mmap.mmap, start: int) -> Iterator[tuple[int, bool]]:
    """(where it stands, whether it opens) of every bracket that is in no string."""
    match = ROW_STEP.match(data, start)
    while match:
        position = match.start(1)
        yield position, data[position] in b"[{"
        match = ROW_STEP.match(data, position + 1)


def _check_between(between: bytes, row: int, path: Path) -> None:
    """ValueError unless a comma alone stands before a row, and nothing before the first."""
    wanted = b"," if row else b""
    if between.strip() != wanted:
        raise ValueError(
            f"{path}: what stands before row {row} is no object, or no comma: {between[:40]!r}"
        )


def _damage(offsets: array) -> str:
    if not offsets:
        return "no list begins in it"
    return f"it breaks off, or is damaged, in row {(len(offsets) - 1) // 2}"


# --- 2. the same of a table -----------------------------------------------------------------------


class _TableLines:
    """The lines of a table as texts, one by one, and how far they have been read."""

    def __init__(self, file: BinaryIO, path: Path, encoding: str):
        self.file = file
        self.path = path
        self.encoding = encoding
        # bytes and lines read so far
        self.position = 0
        self.number = 0

    def __iter__(self) -> Iterator[str]:
        for raw in self.file:
            self.position += len(raw)
            self.number += 1
            line = _decode(raw, self.encoding, self.path, self.number)
            if self.number == 1:
                line = line.removeprefix("\ufeff")
            yield line


def _decode(raw: bytes, encoding: str, path: Path, line: int | str) -> str:
    try:
        return raw.decode(encoding)
    except UnicodeDecodeError:
        raise NotEncoded(
            f"{path}: line {line} is not {encoding}"
            " (a table saved by Excel in Chinese is often `--encoding gb18030`)"
        ) from None


def find_table_rows(path: Path, encoding: str) -> tuple[list[str], np.ndarray]:
    """(columns, where each record of a table lies): a quoted text may run over several lines, so
    the csv module decides. NotEncoded, ValueError."""
    columns = None
    offsets = array("q")
    start = 0
    with open(path, "rb") as file:
        lines = _TableLines(file, path, encoding)
        table = csv.reader(iter(lines), delimiter=TABLE_SUFFIXES[path.suffix], strict=True)
        try:
            for cells in table:
                # an empty line is no record
                if cells and columns is None:
                    columns = [name.strip() for name in cells]
                elif cells:
                    offsets.extend((start, lines.position))
                start = lines.position
        except csv.Error as error:
            raise ValueError(f"{path}: no table near line {lines.number} ({error})") from None
    if columns is None:
        raise ValueError(f"{path}: it is empty")
    if len(set(columns)) < len(columns):
        raise ValueError(f"{path}: two columns have one name ({', '.join(columns)})")
    return columns, as_ranges(offsets)


# --- 3. the rows ----------------------------------------------------------------------------------


class Records:
    """The rows of one data file, each read when asked for: 16 bytes of memory a row.

    records[i] is the row itself; where it cannot be read, the ValueError names file and line.
    record(i) and parse() are for whoever counts what is left out: a dict, or a BadRow.
    ranges: of find_rows, by whom the file is JSON whatever its name, and may be empty; without
    them the name decides, and a ValueError names a file that is none. A file that changed
    since is a FileChanged.
    """

    def __init__(
        self,
        path: str | Path,
        encoding: str = "utf-8",
        *,
        ranges: np.ndarray | None = None,
    ):
        self.path = Path(path)
        self.encoding = encoding
        # of a table
        self.columns: list[str] | None = None
        self.ranges = self._find() if ranges is None else ranges
        self.stamp = _stamp(os.stat(self.path))

    def _find(self) -> np.ndarray:
        if not self.path.is_file():
            raise FileNotFoundError(f"no such data file: {self.path}")
        if self.path.suffix in JSON_SUFFIXES:
            ranges = find_rows(self.path)
        elif self.path.suffix in TABLE_SUFFIXES:
            ranges = self._find_in_table()
        else:
            suffixes = ", ".join((*TABLE_SUFFIXES, *JSON_SUFFIXES))
            raise ValueError(f"{self.path}: a data file ends in {suffixes}")
        if not len(ranges):
            raise ValueError(f"{self.path}: it has no rows")
        return ranges

    def _find_in_table(self) -> np.ndarray:
        # UTF-8 where it is, as translate writes it; JSON always is
        wanted = self.encoding
        self.encoding = "utf-8"
        try:
            self.columns, ranges = find_table_rows(self.path, "utf-8")
        except NotEncoded:
            if wanted == "utf-8":
                raise
            self.encoding = wanted
            self.columns, ranges = find_table_rows(self.path, wanted)
        return ranges

    def __len__(self) -> int:
        return len(self.ranges)

    def __iter__(self) -> Iterator[Any]:
        for i in range(len(self)):
            yield self[i]

    def __getitem__(self, i: int) -> Any:
        raw = self._bytes(i)
        if self.columns is not None:
            return self.parse(raw)
        try:
            return json.loads(raw)
        except (ValueError, RecursionError) as error:
            line = self._line_number(i)
            raise ValueError(f"{self.path}: line {line}, row {i}, is no JSON ({error})") from None

    def record(self, i: int) -> dict[str, Any]:
        """Row i as a dict. BadRow."""
        return self.parse(self._bytes(i))

    def read(self, start: int, stop: int) -> Iterator[tuple[int, bytes]]:
        """(number, bytes) of rows start to stop, in one go through the file."""
        with open(self.path, "rb") as file:
            self._check_unchanged(file)
            for i in range(start, min(stop, len(self))):
                yield i, self._bytes_from(file, i)

    def parse(self, raw: bytes) -> dict[str, Any]:
        """The dict of a row's bytes. BadRow."""
        if self.columns is not None:
            return self._parse_cells(raw, self.columns)
        try:
            record = json.loads(raw.decode())
        except (ValueError, RecursionError):
            raise BadRow("not JSON") from None
        if not isinstance(record, dict):
            raise BadRow("not an object")
        return record

    def _parse_cells(self, raw: bytes, columns: list[str]) -> dict[str, Any]:
        text = _decode(raw, self.encoding, self.path, "?").removeprefix("\ufeff")
        # the reader wants lines, with their ends: a text may run over several
        lines = re.split(r"(?<=\n)", text)
        cells = next(csv.reader(lines, delimiter=TABLE_SUFFIXES[self.path.suffix]))
        if len(cells) != len(columns):
            raise BadRow("wrong number of columns")
        return dict(zip(columns, cells, strict=True))

    def require(self, needed: Iterable[Iterable[str]], what: str) -> None:
        """ValueError unless the columns a set needs are there, one of each tuple: in a table its
        header, else one of the first 100 rows."""
        seen = self.names_seen()
        for names in needed:
            if not seen & set(names):
                wanted = " or ".join(map(repr, names))
                found = ", ".join(sorted(seen)) or "nothing readable"
                raise ValueError(
                    f"{self.path}: no {wanted} in it, which {what} has (found: {found})"
                )

    def names_seen(self) -> set[str]:
        """A table's columns; else the names in the first 100 rows, as far as they can be read."""
        if self.columns:
            return set(self.columns)
        seen = set()
        for _, raw in self.read(0, 100):
            try:
                seen |= set(self.parse(raw))
            except BadRow:
                pass
        return seen

    def write(self, out: TextIO, records: Iterable[dict[str, Any]]) -> None:
        """Records (dicts) to `out` in the form of this file: same columns, list or lines. The
        caller renames."""
        if self.columns is not None:
            # \r\n, so that a \r inside a text is quoted, too
            delimiter = TABLE_SUFFIXES[self.path.suffix]
            writer = csv.writer(out, delimiter=delimiter, lineterminator="\r\n")
            writer.writerow(self.columns)
            for record in records:
                writer.writerow([record[name] for name in self.columns])
        elif self.path.suffix == ".jsonl":
            for record in records:
                out.write(json.dumps(record, ensure_ascii=False) + "\n")
        else:
            out.write("[\n")
            for i, record in enumerate(records):
                if i:
                    out.write(",\n")
                out.write(json.dumps(record, ensure_ascii=False))
            out.write("\n]\n")

    def _bytes(self, i: int) -> bytes:
        with open(self.path, "rb") as file:
            self._check_unchanged(file)
            return self._bytes_from(file, i)

    def _bytes_from(self, file: BinaryIO, i: int) -> bytes:
        start, stop = (int(n) for n in self.ranges[i])
        file.seek(start)
        return file.read(stop - start)

    def _check_unchanged(self, file: BinaryIO) -> None:
        if _stamp(os.fstat(file.fileno())) != self.stamp:
            raise FileChanged(self.path)

    def _line_number(self, i: int) -> int:
        start = int(self.ranges[i][0])
        with open(self.path, "rb") as file:
            return file.read(start).count(b"\n") + 1


def _stamp(status: os.stat_result) -> tuple[int, int]:
    """What tells that a file changed: its size and when it was written."""
    return status.st_size, status.st_mtime_ns
