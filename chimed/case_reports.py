"""The raw rows of case reports behind built dialogs: a row has two texts, a context and an inline
text, of which a dialog of stage 1 holds one. The paper counts both (Table 1)."""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from chimed.sources import RawFile, open_sources, read_row
from common.files import digest, read_json
from common.rows import BadRow

CASE_SOURCE = "pmc-casereport"
# as build numbers its dialogs: a row of the set's files, and which of its texts
CASE_ID = re.compile(rf"{CASE_SOURCE}-(\d+)-(?:context|inline)")


class NoCaseReports(ValueError):
    """Why the raw rows of a built file cannot be had: what is counted without them is told."""


@dataclass
class CaseReports:
    """The files of PMC-CaseReport that a build was made of, in its order."""

    files: list[RawFile]
    starts: np.ndarray  # the number of each file's first row; at the end that of all rows

    def texts(self, number: int) -> dict[str, str]:
        """{kind: text} of a row, C context and I inline text, those it has. ValueError where the
        files have no such row."""
        if number >= self.starts[-1]:
            paths = ", ".join(str(records.path) for _, records in self.files)
            raise ValueError(
                f"a dialog is of row {number:,} of {CASE_SOURCE}, and {paths} "
                f"has {self.starts[-1]:,}: not what the dialogs were built of"
            )
        f = int(np.searchsorted(self.starts, number, side="right")) - 1
        source, records = self.files[f]
        try:
            row = read_row(source, records.record(int(number - self.starts[f])))
        except BadRow as error:
            raise ValueError(
                f"{records.path}: row {number - self.starts[f]:,}: {error}, "
                "and yet there is a dialog of it: not what the dialogs were built of"
            ) from None
        texts = {"C": row.texts["context"], "I": row.texts["inline"]}
        return {kind: text for kind, text in texts.items() if text}


def case_number(row_id: object) -> int | None:
    """The number of the case report that a dialog of stage 1 is of; None: it is of none."""
    match = CASE_ID.fullmatch(str(row_id))
    return int(match[1]) if match else None


def find_case_reports(built: Path, given: list[str]) -> CaseReports:
    """The raw rows of a file of dialogs: those that are given, else those that the manifest beside
    it names. NoCaseReports says why there are none; ValueError: those given are others."""
    manifest = read_manifest(built)
    inputs = [entry for entry in manifest["inputs"] if entry["set"] == CASE_SOURCE]
    paths = given or [entry["file"] for entry in inputs]
    if not paths:
        raise NoCaseReports(f"{built}: no manifest.json beside it names the raw rows")
    if not given:
        check_unchanged(inputs)
    elif inputs and [digest(path) for path in given] != [entry["sha256"] for entry in inputs]:
        raise ValueError(
            f"--{CASE_SOURCE} {' '.join(given)}: not the files that {built} was built of, "
            "by the manifest.json beside it"
        )
    encoding = manifest["settings"].get("encoding", "utf-8")
    files = open_sources({CASE_SOURCE: paths}, [CASE_SOURCE], own_columns={}, encoding=encoding)
    return CaseReports(files, np.cumsum([0, *(len(file.records) for file in files)]))


def read_manifest(built: Path) -> dict[str, Any]:
    """The settings and inputs of the build that a file is of, none where no manifest tells them.
    ValueError for a damaged one."""
    path = built.parent / "manifest.json"
    manifest = read_json(path) if path.is_file() else {}
    if not isinstance(manifest, dict):
        raise ValueError(f"{path}: not a manifest of data_prep.py build")
    settings = manifest.get("settings", {})
    inputs = manifest.get("inputs", [])
    if not isinstance(settings, dict) or not isinstance(inputs, list):
        raise ValueError(f"{path}: its settings or inputs are not those of data_prep.py build")
    if not isinstance(settings.get("encoding", ""), str):
        raise ValueError(f"{path}: the encoding of its settings is no name")
    for i, entry in enumerate(inputs):
        if not is_input(entry):
            raise ValueError(f"{path}: input {i} does not say its set, file and sha256")
    return {"settings": settings, "inputs": inputs}


def is_input(entry: object) -> bool:
    """Whether an entry of a manifest is a raw file as build writes it."""
    if not isinstance(entry, dict):
        return False
    return all(isinstance(entry.get(key), str) for key in ("set", "file", "sha256"))


def check_unchanged(inputs: Iterable[dict[str, Any]]) -> None:
    """NoCaseReports unless the files of a manifest are where they were, and what they were."""
    for entry in inputs:
        path = Path(entry["file"])
        if not path.is_file():
            raise NoCaseReports(f"{path} is not there any more")
        if digest(path) != entry["sha256"]:
            raise NoCaseReports(f"{path} has changed since the build")
