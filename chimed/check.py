"""`data_prep.py check`: what is wrong with a data file, before training finds it."""

import argparse
import functools
import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from chimed.pictures import CACHE
from chimed.sources import own_question
from chimed.workers import BLOCK, add_workers_option, blocks_of, in_order
from common.dialogs import UnknownRow, read_dialog
from common.options import InRange
from common.rows import BadRow, FileChanged, Records, find_rows
from common.text import has_half_pair, text_key
from model_io.pixels import BadPicture, find_picture, open_image, picture_names
from model_io.tokens import BadDialog, Tokenizer, check_conversation, encode_conversation

# --- 1. one row: what is wrong with it ------------------------------------------------------------


@dataclass(frozen=True)
class Rules:
    """What a row must keep to."""

    root: str  # the folder of the pictures, a real path
    max_characters: int  # of one turn
    max_length: int  # tokens of a dialog, pictures included
    n_image_tokens: int  # of a picture
    tokenizer: Tokenizer | None  # None: tokens are not counted


def row_problems(row: Any, rules: Rules) -> list[str]:
    """The problems of one parsed row, each a few words; [] when it is fit to train on."""
    if not isinstance(row, dict):
        return ["row is no object"]
    problems = dialog_problems(row, rules)
    if not isinstance(row.get("id", ""), (str, int)):
        problems.append("id is no name")
    return problems


def dialog_problems(row: dict, rules: Rules) -> list[str]:
    """What is wrong with the turns of a row and with its pictures."""
    try:
        check_conversation(row.get("conversations"))
    except BadDialog as error:
        return [error.kind]
    conversation = row["conversations"]
    problems = picture_problems(row, rules.root)
    texts = [turn["value"] for turn in conversation]
    if any(has_half_pair(text) for text in texts):
        problems.append("text is not valid Unicode")
    if any(len(text) > rules.max_characters for text in texts):
        problems.append(f"text longer than {rules.max_characters} characters")
    if problems or rules.tokenizer is None:
        return problems
    input_ids, _ = encode_conversation(
        conversation, rules.tokenizer, rules.n_image_tokens, max_length=10**9
    )
    if len(input_ids) > rules.max_length:
        problems.append(f"longer than {rules.max_length} tokens")
    return problems


def picture_problems(row: dict, root: str) -> list[str]:
    """What is wrong with the pictures of a row whose turns are fit, and with its last turn: where
    pictures and turns do not agree, that alone is said."""
    try:
        names = picture_names(row)
    except BadDialog as error:
        return [error.kind]
    problems = []
    if len(row["conversations"]) % 2:
        problems.append("last question has no answer")
    for name in names:
        try:
            path, _ = find_picture([name], (root,))
            problem = file_problem(path)
        except BadRow as error:
            problem = str(error)
        if problem and problem not in problems:
            problems.append(problem)
    return problems


@functools.lru_cache(CACHE)
def file_problem(path: Path) -> str:
    """What is wrong with a picture file, or "": "picture is a decompression bomb", "picture does
    not decode"."""
    try:
        open_image(path)
    except BadPicture as error:
        return error.kind
    return ""


# --- 2. all rows: by several processes, and what is in the file twice -----------------------------


class CheckedRow(NamedTuple):
    """What was found in a row."""

    problems: list[str]
    id_key: int = 0  # of its id; 0 without
    content_key: int = 0  # of what it says; 0 where it is no object


class Checked(NamedTuple):
    """What the processes share."""

    rows: Records
    rules: Rules


def check_block(checked: Checked, start: int, stop: int) -> list[CheckedRow]:
    """What was found in rows start to stop."""
    return [check_row(checked.rows, i, checked.rules) for i in range(start, stop)]


def check_row(rows: Records, i: int, rules: Rules) -> CheckedRow:
    """What was found in row i. FileChanged."""
    try:
        row = rows[i]
    except FileChanged:
        raise
    except ValueError:
        return CheckedRow(["not JSON"])
    if isinstance(row, dict):
        try:
            row = read_dialog(row)
        except UnknownRow:
            return CheckedRow(["no dialog"])
    problems = row_problems(row, rules)
    if not isinstance(row, dict):
        return CheckedRow(problems)
    id_key = 0
    if row.get("id") not in (None, ""):
        id_key = text_key(str(row["id"]))
    return CheckedRow(problems, id_key, key_of_content(row))


def key_of_content(row: dict) -> int:
    """A key of a row's pictures, questions and answers, the prompts around them left out: they are
    drawn anew for each row."""
    turns = row.get("conversations")
    if not isinstance(turns, list):
        turns = []
    texts = []
    for i, turn in enumerate(turns):
        text = str(turn.get("value")) if isinstance(turn, dict) else str(turn)
        if i % 2 == 0:
            text = own_question(text)
        texts.append(text)
    return text_key(json.dumps(row.get("image")), *texts)


def repeated(keys: np.ndarray) -> np.ndarray:
    """bool a row: an earlier row has the same key (0 is none)."""
    _, first = np.unique(keys, return_index=True)
    again = np.ones(len(keys), dtype=bool)
    again[first] = False
    return again & (keys != 0)


def find_problems(rows: Records, rules: Rules, workers: int) -> dict[int, list[str]]:
    """{row: its problems} of the rows that have any."""
    problems = {}
    ids = np.zeros(len(rows), dtype=np.uint64)
    contents = np.zeros(len(rows), dtype=np.uint64)
    tasks = list(blocks_of(len(rows), BLOCK // 10))
    results = in_order(check_block, tasks, workers, Checked(rows, rules))
    with tqdm(total=len(rows), desc="checking", unit=" rows", disable=None) as bar:
        for (start, stop), findings in zip(tasks, results, strict=True):
            for i, finding in enumerate(findings, start):
                ids[i] = finding.id_key
                contents[i] = finding.content_key
                if finding.problems:
                    problems[i] = finding.problems
            bar.update(stop - start)
    for name, keys in (("duplicate id", ids), ("duplicate content", contents)):
        for i in np.flatnonzero(repeated(keys)):
            problems.setdefault(int(i), []).append(name)
    return problems


# --- 3. what is written ---------------------------------------------------------------------------


def raw_rows(rows: Records, numbers: Iterable[int]) -> Iterator[tuple[int, bytes]]:
    """(number, bytes) of some rows, in one go through the file."""
    with open(rows.path, "rb") as file:
        for i in numbers:
            start, stop = (int(n) for n in rows.ranges[i])
            file.seek(start)
            yield i, file.read(stop - start)


def write_bad(rows: Records, problems: dict[int, list[str]], target: Path) -> None:
    """The rows with problems, each a line that names them; without any no file is left."""
    partial = target.with_name(target.name + ".partial")
    with open(partial, "w", encoding="utf-8", errors="backslashreplace") as file:
        for i, raw in raw_rows(rows, sorted(problems)):
            try:
                content = json.loads(raw)
            except (ValueError, RecursionError):
                content = raw.decode("utf-8", "replace").strip()
            line = {"row": i, "problems": problems[i], "content": content}
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
    if problems:
        partial.replace(target)
    else:
        partial.unlink()
        # of an earlier check
        target.unlink(missing_ok=True)


def write_clean(rows: Records, problems: dict[int, list[str]], target: Path) -> None:
    """The rows without problems, byte for byte, in the form of the file."""
    partial = target.with_name(target.name + ".partial")
    fit = (i for i in range(len(rows)) if i not in problems)
    texts = (raw.strip() for _, raw in raw_rows(rows, fit))
    with open(partial, "wb") as out:
        if rows.path.suffix == ".jsonl":
            for text in texts:
                out.write(text + b"\n")
        else:
            out.write(b"[\n")
            separator = b""
            for text in texts:
                out.write(separator + text)
                separator = b",\n"
            out.write(b"\n]\n")
    partial.replace(target)


# --- 4. command -----------------------------------------------------------------------------------


def add_command(commands: argparse._SubParsersAction) -> None:
    """The options of `check`."""
    about = "every row and picture of a dialog file; exit code 1 when any is unfit"
    parser = commands.add_parser(
        "check",
        help=about,
        description=about,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run=run)
    add = parser.add_argument
    add("file", help="a .json or .jsonl of dialogs, the published form")
    add("--images", required=True, metavar="DIR", help="folder the picture names are relative to")
    add("--bad", metavar="FILE", help="where rows with problems go (default: FILE.bad.jsonl)")
    add("--fix", metavar="FILE", help="where to write the rows without problems")
    add(
        "--tokenizer", metavar="DIR", help="a LLaMA folder: lengths are then counted in tokens, too"
    )
    add(
        "--max-length",
        action=InRange,
        type=int,
        low=1,
        high=10**9,
        default=2048,
        help="tokens of a dialog, pictures included (default %(default)s)",
    )
    add(
        "--n-image-tokens",
        action=InRange,
        type=int,
        low=1,
        high=10**6,
        default=576,
        help="tokens of a picture (default %(default)s)",
    )
    add(
        "--max-characters",
        action=InRange,
        type=int,
        low=1,
        high=10**9,
        default=20_000,
        help="of one turn (default %(default)s)",
    )
    add_workers_option(parser, "processes (default %(default)s)")


def check_paths(file: str, bad: str, fix: str | None) -> None:
    """ValueError where one file would be written over another, or a fixed one would have another
    form."""
    paths = [file, bad]
    if fix:
        paths.append(fix)
    if len({Path(path).resolve() for path in paths}) < len(paths):
        raise ValueError("the file checked, --bad and --fix must be three different files")
    suffix = Path(file).suffix
    if fix and Path(fix).suffix != suffix:
        raise ValueError(f"--fix {fix}: must end in {suffix}, as the file checked does")


def run(args: argparse.Namespace) -> int:
    if not Path(args.images).is_dir():
        raise FileNotFoundError(f"no such image folder: {args.images}")
    bad = args.bad or f"{args.file}.bad.jsonl"
    check_paths(args.file, bad, args.fix)
    rows = Records(args.file, ranges=find_rows(args.file))
    if not len(rows):
        raise ValueError(f"{args.file}: it has no rows")
    # what an earlier check of this process saw may have changed
    file_problem.cache_clear()
    rules = Rules(
        root=os.path.realpath(args.images),
        max_characters=args.max_characters,
        max_length=args.max_length,
        n_image_tokens=args.n_image_tokens,
        tokenizer=Tokenizer(args.tokenizer) if args.tokenizer else None,
    )
    problems = find_problems(rows, rules, args.workers)
    write_bad(rows, problems, Path(bad))
    n_fit = len(rows) - len(problems)
    counts = Counter()
    for named in problems.values():
        counts.update(named)
    print(f"{args.file}: {len(rows):,} rows, {n_fit:,} fit to train on")
    for problem, n in counts.most_common():
        print(f"  {problem}: {n:,}")
    if problems:
        print(f"the rows with problems: {Path(bad)}")
    if args.fix:
        write_clean(rows, problems, Path(args.fix))
        print(f"the rows without: {args.fix} ({n_fit:,})")
    return 1 if problems else 0
