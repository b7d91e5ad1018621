"""`data_prep.py check`: what is wrong with a data file, before training finds it."""

import argparse
import functools
import json
import os
from collections import Counter
from pathlib import Path

import numpy as np
from tqdm import tqdm

from chimed.pictures import CACHE
from chimed.sources import own_question
from chimed.workers import BLOCK, add_workers_option, in_order
from common.options import InRange
from common.rows import BadRow, FileChanged, Records, find_rows
from common.text import text_key
from model_io.pixels import find_picture, open_image, picture_names
from model_io.tokens import Tokenizer, check_conversation, encode_conversation
from qilin_min import IMAGE_TOKEN


def picture_problem(path):
    """What is wrong with a picture file, or None: "picture is a decompression bomb", "picture does not decode"."""
    try:
        open_image(path)
    except ValueError as error:
        return (
            "picture is a decompression bomb" if "bomb" in str(error) else "picture does not decode"
        )
    return None


known_problem = functools.lru_cache(CACHE)(picture_problem)


def row_problems(row, root, options, tokenizer=None):
    """The problems of one parsed row, each a few words; [] when it is fit to train on."""
    problems = []
    if not isinstance(row, dict):
        return ["row is no object"]
    try:
        check_conversation(row.get("conversations"))
    except ValueError as error:
        text = str(error)
        problems.append(
            "answer is empty"
            if "empty answer" in text
            else "question is empty"
            if "empty question" in text
            else f"{IMAGE_TOKEN} in an answer"
            if "is an answer that" in text
            else "no dialog"
        )
    if not problems:
        try:
            names = picture_names(row)
        except ValueError as error:
            problems.append(
                "image is no name"
                if "neither" in str(error)
                else f"{IMAGE_TOKEN} and pictures do not agree"
            )
            names = []
        if problems == [] and len(row["conversations"]) % 2:
            problems.append("last question has no answer")
        for name in names:
            try:
                path, _ = find_picture([name], (root,))
                problem = known_problem(path)
            except BadRow as error:
                problem = str(error)
            problems += [problem] if problem and problem not in problems else []
        texts = [turn["value"] for turn in row["conversations"]]
        if any("\ud800" <= c <= "\udfff" for text in texts for c in text):
            problems.append("text is not valid Unicode")
        if any(len(text) > options["max_characters"] for text in texts):
            problems.append(f"text longer than {options['max_characters']} characters")
        if tokenizer and not problems:
            n = len(
                encode_conversation(
                    row["conversations"], tokenizer, options["n_image_tokens"], max_length=10**9
                )[0]
            )
            problems += (
                [f"longer than {options['max_length']} tokens"] if n > options["max_length"] else []
            )
    if not isinstance(row.get("id", ""), (str, int)):
        problems.append("id is no name")
    return problems


def content_key(row):
    """A key of a row's pictures, questions and answers, the prompts around them left out: they are drawn anew for each row."""
    turns = row.get("conversations") if isinstance(row.get("conversations"), list) else []
    texts = [str(turn.get("value")) if isinstance(turn, dict) else str(turn) for turn in turns]
    return text_key(
        json.dumps(row.get("image")),
        *(own_question(text) if i % 2 == 0 else text for i, text in enumerate(texts)),
    )


def check_block(shared, start, stop):
    """[(problems, id key or 0, content key or 0)] of rows start to stop."""
    rows, root, options, tokenizer = shared
    found = []
    for i in range(start, stop):
        try:
            row = rows[i]
        except FileChanged:
            raise
        except ValueError:
            found.append((["not JSON"], 0, 0))
            continue
        problems = row_problems(row, root, options, tokenizer)
        keyed = isinstance(row, dict)
        found.append(
            (
                problems,
                text_key(str(row["id"])) if keyed and row.get("id") not in (None, "") else 0,
                content_key(row) if keyed else 0,
            )
        )
    return found


def repeated(keys):
    """bool a row: an earlier row has the same key (0 is none)."""
    first = np.unique(keys, return_index=True)[1]
    again = np.ones(len(keys), dtype=bool)
    again[first] = False
    return again & (keys != 0)


def add_command(commands: argparse._SubParsersAction) -> None:
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


def run(args: argparse.Namespace) -> int:
    if not Path(args.images).is_dir():
        raise FileNotFoundError(f"no such image folder: {args.images}")
    bad = Path(args.bad or f"{args.file}.bad.jsonl")
    if len(
        {path.resolve() for path in (bad, Path(args.file), *([Path(args.fix)] if args.fix else []))}
    ) < (3 if args.fix else 2):
        raise ValueError("the file checked, --bad and --fix must be three different files")
    if args.fix and Path(args.fix).suffix != Path(args.file).suffix:
        raise ValueError(
            f"--fix {args.fix}: must end in {Path(args.file).suffix}, as the file checked does"
        )
    rows = Records(args.file, ranges=find_rows(args.file))
    if not len(rows):
        raise ValueError(f"{args.file}: it has no rows")
    known_problem.cache_clear()
    shared = (
        rows,
        os.path.realpath(args.images),
        vars(args),
        Tokenizer(args.tokenizer) if args.tokenizer else None,
    )
    problems, ids, contents = (
        {},
        np.zeros(len(rows), dtype=np.uint64),
        np.zeros(len(rows), dtype=np.uint64),
    )
    tasks = [
        (start, min(start + BLOCK // 10, len(rows))) for start in range(0, len(rows), BLOCK // 10)
    ]
    with tqdm(total=len(rows), desc="checking", unit=" rows", disable=None) as bar:
        for (start, stop), found in zip(tasks, in_order(check_block, tasks, args.workers, shared)):
            for i, (wrong, id_key, content_key) in enumerate(found, start):
                ids[i], contents[i] = id_key, content_key
                if wrong:
                    problems[i] = wrong
            bar.update(stop - start)
    for name, again in (("duplicate id", repeated(ids)), ("duplicate content", repeated(contents))):
        for i in np.flatnonzero(again):
            problems.setdefault(int(i), []).append(name)
    partial = bad.with_name(bad.name + ".partial")
    with (
        open(partial, "w", encoding="utf-8", errors="backslashreplace") as file,
        open(args.file, "rb") as source,
    ):
        for i in sorted(problems):
            source.seek(int(rows.ranges[i, 0]))
            raw = source.read(int(rows.ranges[i, 1] - rows.ranges[i, 0]))
            try:
                row = json.loads(raw)
            except (ValueError, RecursionError):
                row = raw.decode("utf-8", "replace").strip()
            file.write(
                json.dumps({"row": i, "problems": problems[i], "content": row}, ensure_ascii=False)
                + "\n"
            )
    if problems:
        partial.replace(bad)
    else:
        partial.unlink()
        bad.unlink(missing_ok=True)  # of an earlier check
    counts = Counter(problem for wrong in problems.values() for problem in wrong)
    print(f"{args.file}: {len(rows):,} rows, {len(rows) - len(problems):,} fit to train on")
    for problem, n in counts.most_common():
        print(f"  {problem}: {n:,}")
    if problems:
        print(f"the rows with problems: {bad}")
    if args.fix:
        write_clean(args.file, rows, problems, Path(args.fix))
        print(f"the rows without: {args.fix} ({len(rows) - len(problems):,})")
    return 1 if problems else 0


def write_clean(path, rows, problems, target):
    """The rows without problems, byte for byte, in the form of the file."""
    lines, partial = Path(path).suffix == ".jsonl", target.with_name(target.name + ".partial")
    with open(path, "rb") as source, open(partial, "wb") as out:
        out.write(b"" if lines else b"[\n")
        first = True
        for i, (start, stop) in enumerate(rows.ranges):
            if i not in problems:
                source.seek(int(start))
                raw = source.read(int(stop - start)).strip()
                out.write((b"" if first or lines else b",\n") + raw + (b"\n" if lines else b""))
                first = False
        out.write(b"" if lines else b"\n]\n")
    partial.replace(target)
