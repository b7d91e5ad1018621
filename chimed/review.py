"""The experts' part of data_prep.py: a stratified sample of translations as one self-contained page
and a table, and what a doctor decided taken back in."""

import argparse
import base64
import csv
import html
import io
import json
import os
import random
import re
import sys
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from string import Template
from typing import Any

from chimed.prompts import FIELDS
from chimed.quality import quality
from chimed.translate import Task, is_whole_line
from common.files import write_json, write_text
from common.intervals import wilson
from common.journal import Journal
from common.options import InRange
from common.rows import BadRow, Records
from common.text import clean_text
from model_io.pixels import find_picture, open_image

# what may be written in the table: what it means
VERDICTS = {
    "accept": "accept",
    "fix": "fix",
    "reject": "reject",
    "接受": "accept",
    "修改": "fix",
    "拒绝": "reject",
}
REVIEW_COLUMNS = [
    "sample",
    "file",
    "key",
    "field",
    "english",
    "chinese",
    "verdict",
    "fixed",
    "note",
]
# pixels, the longer side, of a picture on the page
THUMBNAIL = 512

# --- 1. the page ----------------------------------------------------------------------------------

REVIEW_CARD = Template("<article><small>$sample. $file</small>$pictures$pairs</article>\n")
REVIEW_PAIR = Template(
    '<div class="pair" data-sample="$sample" data-file="$file" data-key="$key"'
    ' data-field="$field" data-chinese="$chinese">'
    '<div><small>$label</small><div class="en">$english</div></div>'
    '<div><textarea lang="zh">$chinese</textarea>'
    '<label><input type="radio" name="$sample-$field" value="accept">接受</label>'
    '<label><input type="radio" name="$sample-$field" value="fix">修改</label>'
    '<label><input type="radio" name="$sample-$field" value="reject">拒绝</label>'
    '<input class="note" placeholder="备注"></div></div>'
)


@dataclass(frozen=True)
class Pair:
    """A text with its translation, as it stands in a row of the table."""

    sample: int
    file: str
    key: str
    field: str
    english: str
    chinese: str

    def as_cells(self) -> list[Any]:
        """Its row of the table, with verdict, fixed and note to be filled in."""
        given = [self.sample, self.file, self.key, self.field, self.english, self.chinese]
        return [*given, "", "", ""]

    def as_html(self) -> str:
        return REVIEW_PAIR.substitute(
            sample=self.sample,
            file=html.escape(self.file),
            key=html.escape(self.key),
            field=html.escape(self.field),
            label=html.escape(f"{FIELDS.get(self.field, '')} {self.field}"),
            english=html.escape(self.english),
            chinese=html.escape(self.chinese),
        )


def picture_data(names: list[list[str]], roots: tuple[str, ...]) -> str:
    """An <img> for each picture of a row that is found and decodes; a word for one that is not."""
    tags = []
    for choices in names:
        try:
            path, _ = find_picture(choices, roots)
            image = open_image(path)
        except (BadRow, ValueError, OSError):
            if roots:
                tags.append("<p><small>没有找到图片 picture not found</small></p>")
            continue
        image.thumbnail((THUMBNAIL, THUMBNAIL))
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", quality=85)
        data = base64.b64encode(buffer.getvalue()).decode()
        tags.append(f'<img alt="" src="data:image/jpeg;base64,{data}">')
    return "".join(tags)


# --- 2. sample ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sampled:
    """A row drawn: its translated file and its line of the journal."""

    path: str
    line: dict[str, Any]

    def pairs(self, sample: int) -> list[Pair]:
        """Its texts, each with its translation."""
        # or a spreadsheet takes 12e45 for a number
        key = f"k{self.line['key']}"
        pairs = []
        for name, english in self.line["english"].items():
            chinese = self.line["chinese"].get(name, "")
            pairs.append(Pair(sample, self.path, key, name, english, chinese))
        return pairs

    def card(self, sample: int, roots: tuple[str, ...]) -> str:
        """Its part of the page."""
        return REVIEW_CARD.substitute(
            sample=sample,
            file=html.escape(f"{self.line['source']}: {self.path}"),
            pictures=picture_data(self.line.get("images", []), roots),
            pairs="".join(pair.as_html() for pair in self.pairs(sample)),
        )


def journal_of(path: str, rejected: bool) -> Journal:
    """The journal of a translated file, with the rows that were rejected or without.
    FileNotFoundError says what to do."""
    journal_path = Path(f"{path}.journal.jsonl")
    if not Path(path).is_file() or not journal_path.is_file():
        raise FileNotFoundError(
            f"{path} is no file that translate wrote (no {journal_path.name} beside it): "
            "review compares its English with its Chinese"
        )
    journal = Journal(journal_path, is_whole_line)
    journal.load(lambda line: rejected or not line["reasons"])
    return journal


def shares(sizes: list[int], n: int) -> list[int]:
    """How many of n go to each stratum, in proportion to its size, one at least, all of it at most;
    largest remainders first."""
    total = sum(sizes)
    n = min(n, total)
    exact = [n * size / total for size in sizes]
    parts = []
    for size, share in zip(sizes, exact, strict=True):
        parts.append(min(size, max(1, int(share))) if size else 0)
    while sum(parts) < n:
        unfilled = [k for k, size in enumerate(sizes) if parts[k] < size]
        most_short = max(unfilled, key=lambda k: exact[k] - parts[k])
        parts[most_short] += 1
    return parts


def draw_sample(paths: list[str], n: int, seed: int) -> tuple[list[Sampled], list[int]]:
    """Rows drawn at random, over all files in proportion to their size, and the size of each."""
    # rejected rows are not in the files
    journals = [journal_of(path, rejected=False) for path in paths]
    keys = [journal.keys() for journal in journals]
    if not any(keys):
        raise ValueError("no translated row in these files")
    sizes = [len(own) for own in keys]
    rng = random.Random(seed)
    rows = []
    for path, journal, own, share in zip(paths, journals, keys, shares(sizes, n), strict=True):
        for key in rng.sample(own, share):
            line = journal.find(key)
            assert line is not None, f"{path}: {key} is gone"
            rows.append(Sampled(path, line))
    rng.shuffle(rows)
    return rows, sizes


def write_page(rows: list[Sampled], roots: tuple[str, ...], path: Path) -> None:
    """review.html: everything it needs is in it."""
    cards = [row.card(sample, roots) for sample, row in enumerate(rows, 1)]
    # what was filled in is kept by the browser under this name
    stamp = "-".join(sorted(row.line["key"] for row in rows)[:3])
    template = Path(__file__).with_name("review.html").read_text(encoding="utf-8")
    page = Template(template).substitute(
        n=len(rows),
        cards="".join(cards),
        columns=json.dumps(REVIEW_COLUMNS),
        stamp=html.escape(stamp),
    )
    write_text(path, page)


def write_table(rows: list[Sampled], path: Path) -> None:
    """review.csv: the same as a table."""
    text = io.StringIO(newline="")
    writer = csv.writer(text)
    writer.writerow(REVIEW_COLUMNS)
    for sample, row in enumerate(rows, 1):
        writer.writerows(pair.as_cells() for pair in row.pairs(sample))
    # Excel takes it for UTF-8 by the mark
    write_text(path, "\ufeff" + text.getvalue())


def take_sample(paths: list[str], images: list[str], n: int, seed: int, out: Path) -> None:
    """The page and the table for the doctor."""
    for root in images:
        if not Path(root).is_dir():
            raise FileNotFoundError(f"no such image folder: {root}")
    roots = tuple(os.path.realpath(root) for root in images)
    rows, sizes = draw_sample(paths, n, seed)
    out.mkdir(parents=True, exist_ok=True)
    write_page(rows, roots, out / "review.html")
    write_table(rows, out / "review.csv")
    drawn = Counter(row.path for row in rows)
    of_each = []
    for path, size in zip(paths, sizes, strict=True):
        of_each.append(f"{Path(path).name} {drawn[path]} of {size:,}")
    print(f"{len(rows)} rows of {sum(sizes):,}: {', '.join(of_each)}")
    print(
        f"{out / 'review.html'}: to fill in with a browser; {out / 'review.csv'}: "
        "the same as a table. "
        f"Then: data_prep.py review {' '.join(paths)} --import review.csv"
    )


# --- 3. import ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Decision:
    """What a doctor decided about a text. verdict: accept, fix, reject, or "" where it is open;
    fixed: the text of a fix."""

    verdict: str
    fixed: str


def read_lines(path: str) -> list[list[str]]:
    """The lines of a filled-in table, its header first."""
    raw = Path(path).read_bytes()
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError:
        # Excel in Chinese, saving as plain CSV
        text = raw.decode("gb18030", "replace")
    try:
        lines = list(csv.reader(io.StringIO(text, newline="")))
    except csv.Error as error:
        raise ValueError(f"{path}: no table ({error})") from None
    # a note may be missing
    needed = REVIEW_COLUMNS[:8]
    if not lines or lines[0][:8] != needed:
        raise ValueError(
            f"{path}: not a review table (its columns are {', '.join(REVIEW_COLUMNS)})"
        )
    return lines


def names_of(files: list[str]) -> dict[str, str]:
    """{what a table may call a file: the file}: its path, or its name where no other has it."""
    n_named = Counter(Path(file).name for file in files)
    known = {file: file for file in files}
    for file in files:
        name = Path(file).name
        if n_named[name] == 1:
            known[name] = file
    return known


def verdict_of(row: dict[str, str]) -> str:
    """The verdict in a row of the table, "" where there is none. ValueError for another word."""
    written = row.get("verdict", "").strip()
    if not written:
        return ""
    if written.lower() not in VERDICTS:
        raise ValueError(
            f"verdict {row['verdict']!r} is none of accept, fix, reject "
            "(\u63a5\u53d7\uff0c \u4fee\u6539\uff0c \u62d2\u7edd\uff09"
        )
    return VERDICTS[written.lower()]


def decision_of(row: dict[str, str], verdict: str) -> Decision:
    """Verdict and fixed text of a row of the table. ValueError when they contradict each other."""
    fixed = clean_text(row.get("fixed", ""))
    if fixed and verdict in ("accept", "reject"):
        raise ValueError(
            f"a text under 'fixed', but the verdict is {row['verdict'].strip()}: "
            "say fix, or empty it"
        )
    if verdict == "fix" and not fixed:
        raise ValueError("fix without a text under 'fixed'")
    return Decision("fix" if fixed else verdict, fixed)


Decided = dict[tuple[str, str], dict[str, Decision]]


def read_filled(path: str, files: list[str]) -> Decided:
    """{(file, key): {field: Decision}} of a filled-in table. ValueError names the line."""
    known = names_of(files)
    decided: Decided = {}
    for number, line in enumerate(read_lines(path)[1:], 2):
        if not any(cell.strip() for cell in line):
            continue
        row = dict(zip(REVIEW_COLUMNS, line, strict=False))
        try:
            verdict = verdict_of(row)
            file = known.get(row["file"]) or known.get(Path(row["file"]).name)
            if file is None:
                raise ValueError(f"{row['file']} is not among the files named")
            decision = decision_of(row, verdict)
            key = row["key"].strip().lower().removeprefix("k")
            fields = decided.setdefault((file, key), {})
            if fields.get(row["field"], decision) != decision:
                raise ValueError("decided otherwise in a row above")
        except ValueError as error:
            raise ValueError(f"{path}: row {number}: {error}") from None
        fields[row["field"]] = decision
    return decided


@dataclass(frozen=True)
class Reviewed:
    """A row with what was decided about its texts."""

    line: dict[str, Any]
    fields: dict[str, Decision]

    def verdict(self) -> str:
        """Of the row as a whole: reject, open, fix or accept."""
        verdicts = {decision.verdict for decision in self.fields.values()}
        if "reject" in verdicts:
            return "reject"
        if "" in verdicts or len(self.fields) < len(self.line["english"]):
            return "open"
        if "fix" in verdicts:
            return "fix"
        return "accept"

    def fixed(self) -> dict[str, str]:
        """{field: text} of what was fixed."""
        fixed = {}
        for name, decision in self.fields.items():
            if decision.verdict == "fix":
                fixed[name] = decision.fixed
        return fixed

    def as_line(self) -> dict[str, Any]:
        """The journal's new line of the row."""
        verdict = self.verdict()
        return self.line | {
            "chinese": self.line["chinese"] | self.fixed(),
            "reasons": ["rejected by the reviewer"] if verdict == "reject" else [],
            "review": verdict,
        }


@dataclass(frozen=True)
class ReviewedFile:
    """A translated file, its journal and the rows that were decided about."""

    path: str
    journal: Journal
    header: dict[str, Any]
    rows: list[Reviewed] = field(default_factory=list)

    def apply(self) -> Counter[str]:
        """Puts every decision into the journal and writes the file again. -> verdicts, counted."""
        counts = Counter()
        for row in self.rows:
            verdict = row.verdict()
            counts[verdict] += 1
            fixed = row.fixed()
            if verdict == "open" and not fixed:
                continue
            english = {name: row.line["english"][name] for name in fixed}
            for reason in quality(english, fixed):
                print(
                    f"data_prep.py: {self.path}, {row.line['key']}: the fix is taken, "
                    f"though the checks say {reason}",
                    file=sys.stderr,
                )
            self.journal.add(row.as_line())
        self.journal.sync()
        self.journal.close()
        self._write_again()
        return counts

    def _write_again(self) -> None:
        columns = {name: tuple(names) for name, names in self.header["columns"].items()}
        records = Records(self.header["raw"], self.header["encoding"])
        task = Task(self.header["source"], records, Path(self.path).parent, columns)
        task.journal.load()
        task.finish()
        task.journal.close()


def reviewed_file(path: str, decided: Decided, table: str) -> ReviewedFile:
    """A file with what was decided about its rows. ValueError names what is not in it."""
    journal = journal_of(path, rejected=True)
    raw = journal.header and journal.header["raw"]
    if not journal.header or not Path(journal.header["raw"]).is_file():
        raise ValueError(
            f"{path}: the file it was translated from is not at {raw}: needed to write it again"
        )
    reviewed = ReviewedFile(path, journal, journal.header)
    for (file, key), fields in decided.items():
        if file != path:
            continue
        line = journal.find(int(key, 16)) if re.fullmatch("[0-9a-f]{1,16}", key) else None
        if line is None:
            raise ValueError(f"{table}: {key!r} is no row of {path}")
        unknown = set(fields) - set(line["english"])
        if unknown:
            raise ValueError(f"{table}: {key}: no field {min(unknown)!r}")
        reviewed.rows.append(Reviewed(line, fields))
    return reviewed


def take_back(paths: list[str], table: str) -> None:
    """Applies a filled-in table and reports it."""
    if not Path(table).is_file():
        raise FileNotFoundError(f"no such review table: {table}")
    decided = read_filled(table, paths)
    # everything is looked at before anything is changed
    files = [reviewed_file(path, decided, table) for path in paths]
    counts = {file.path: file.apply() for file in files}
    report_acceptance(counts, Path(table).with_suffix(".report.json"))


def report_acceptance(counts: dict[str, Counter[str]], path: Path) -> None:
    """How many rows of each file, and of all, were accepted as they are; printed and written."""
    print(
        "| file | reviewed | accepted as they are | 95 % interval | fixed | rejected "
        "| not decided |"
    )
    print("|---|---|---|---|---|---|---|")
    result = {}
    total = sum(counts.values(), Counter())
    for name, n in [*counts.items(), ("all", total)]:
        reviewed = n["accept"] + n["fix"] + n["reject"]
        low, high = wilson(n["accept"], reviewed)
        share = n["accept"] / reviewed if reviewed else None
        result[name] = {
            "reviewed": reviewed,
            "accepted": n["accept"],
            "fixed": n["fix"],
            "rejected": n["reject"],
            "open": n["open"],
            "acceptance": share,
            "interval": [low, high],
        }
        accepted = " | -"
        if share is not None:
            accepted = f" ({share:.1%}) | {low:.1%} to {high:.1%}"
        print(
            f"| {name} | {reviewed} | {n['accept']}{accepted} "
            f"| {n['fix']} | {n['reject']} | {n['open']} |"
        )
    print("fixes and rejections are in the files and their journals")
    write_json(path, result)


# --- 4. the command -------------------------------------------------------------------------------


def add_command(commands: argparse._SubParsersAction) -> None:
    about = (
        "a random sample of translations, stratified by file, for a doctor: "
        "review.html (self-contained) and review.csv; --import reads it back"
    )
    parser = commands.add_parser(
        "review",
        help=about,
        description=about,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run=run)
    add = parser.add_argument
    add(
        "files",
        nargs="+",
        metavar="FILE",
        help="translated files, as translate wrote them (their journals beside them)",
    )
    add("--out", type=Path, metavar="DIR", help="where the sample goes")
    add(
        "--n",
        action=InRange,
        type=int,
        low=1,
        high=10**6,
        default=200,
        help="rows, over all files in proportion to their size (default %(default)s)",
    )
    add("--images", nargs="+", default=[], metavar="DIR", help="folders of the pictures")
    add("--seed", type=int, default=0)
    add(
        "--import",
        dest="filled",
        metavar="CSV",
        help="the filled-in file: fixes and rejections go into the files, acceptance is reported",
    )


def run(args: argparse.Namespace) -> int:
    paths = list(dict.fromkeys(args.files))
    if args.filled:
        take_back(paths, args.filled)
    elif args.out is None:
        raise ValueError("name a folder for the sample by --out (or a filled-in table by --import)")
    else:
        take_sample(paths, args.images, args.n, args.seed, args.out)
    return 0
