"""`evaluate.py rank`: doctors' rankings -> who is preferred, how sure, how far they agree."""

import argparse
import csv
import io
import re
import unicodedata
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

from common.files import one_line, write_json, write_text
from common.intervals import wilson
from evaluation.pages import RANKING_COLUMNS, BlindKey, markdown_text, read_key

N_DRAWS = 2000  # of the bootstrap over questions

# {(rater, question): {system: rank}}
Ranks = dict[tuple[str, str], dict[str, int]]

# --- 1. the tables that come back -----------------------------------------------------------------


def read_keys(folder: Path) -> dict[str, BlindKey]:
    """{stamp: key} of the blind pages made in a folder, older ones too."""
    keys = {}
    for path in sorted(Path(folder).glob("blind_key*.json")):
        key = read_key(path)
        keys[key.stamp] = key
    if not keys:
        raise FileNotFoundError(
            f"no blind_key.json in {folder}: rank wants the --out folder of compare --blind"
        )
    return keys


def decode_table(raw: bytes, path: str | Path) -> str:
    """The text of a table, whatever a spreadsheet made of it: its byte marks, its encoding."""
    if raw[:2] in (b"\xff\xfe", b"\xfe\xff"):
        encodings = ["utf-16"]
    else:
        # Excel in Chinese, saving as plain CSV, writes the latter
        encodings = ["utf-8-sig", "gb18030"]
    for encoding in encodings:
        try:
            return raw.decode(encoding)
        except UnicodeDecodeError:
            pass
    raise ValueError(
        f"{path}: neither UTF-8 nor GBK: not a table that the page or a spreadsheet wrote"
    )


def read_ranking(path: str | Path) -> Iterator[tuple[int, dict[str, str]]]:
    """(row number, {column: cell}) of a ranking, with commas, semicolons or tabs between cells."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"no such ranking: {path}")
    text = decode_table(Path(path).read_bytes(), path)
    first_line = text.split("\n", 1)[0]
    delimiter = max(",;\t", key=first_line.count)
    try:
        lines = list(csv.reader(io.StringIO(text, newline=""), delimiter=delimiter))
    except csv.Error as error:
        raise ValueError(f"{path}: no table ({error})") from None
    names = [name.strip().lower() for name in lines[0]] if lines else []
    for name in RANKING_COLUMNS:
        if name not in names and name != "note":
            raise ValueError(
                f"{path}: not a ranking: no column {name!r} "
                f"(its columns are {', '.join(RANKING_COLUMNS)})"
            )
    for number, line in enumerate(lines[1:], 2):
        if any(cell.strip() for cell in line):
            yield number, read_cells(names, line)


def read_cells(names: list[str], line: list[str]) -> dict[str, str]:
    """{column: cell}: full-width letters and figures made plain, but in a note. A row may end
    early."""
    row = {"note": ""}
    for name, cell in zip(names, line, strict=False):
        if name != "note":
            cell = unicodedata.normalize("NFKC", cell)
        row[name] = cell.strip()
    return row


def read_rank(cell: str, n_answers: int) -> int:
    """A rank from 1 to n_answers, as a spreadsheet may write it: 2 or 2.0."""
    is_whole = re.fullmatch(r"\d{1,3}(\.0+)?", cell)
    if not is_whole or not 1 <= float(cell) <= n_answers:
        raise ValueError(f"rank {cell!r}: must be a whole number from 1 to {n_answers}")
    return int(float(cell))


@dataclass(frozen=True, slots=True)
class Note:
    """What a rater wrote beside an answer."""

    question: str | int  # its id
    system: str
    rater: str
    note: str


class Rankings:
    """What rows of rankings say: ranks, notes, and the key of the one page they are of."""

    def __init__(self, keys: dict[str, BlindKey]):
        self.keys = keys
        self.key: BlindKey | None = None  # of the first row
        self.ranks: Ranks = defaultdict(dict)
        self.notes: list[Note] = []

    def key_of(self, sample: str) -> BlindKey:
        """The key of the page that a row is of, which is that of all rows."""
        if self.key is None:
            self.key = self.keys.get(sample)
        if self.key is None:
            made_here = ", ".join(self.keys)
            raise ValueError(
                f"sample {sample!r} is of another page than those made here ({made_here})"
            )
        if sample != self.key.stamp:
            raise ValueError(
                f"sample {sample!r} is of another page than the rows before ({self.key.stamp})"
            )
        return self.key

    def add(self, row: dict[str, str]) -> None:
        """ValueError says what is wrong with the row."""
        for name in RANKING_COLUMNS:
            if name not in row:
                raise ValueError(f"it ends before {name!r}")
        key = self.key_of(row["sample"])
        number = row["question"].lower()
        question = key.questions.get(number)
        system = question.labels.get(row["label"].upper()) if question else None
        if question is None or system is None:
            raise ValueError(
                f"the page has no answer {row['label']!r} of question {row['question']!r}"
            )
        rater = row["rater"]
        if row["note"]:
            self.notes.append(Note(question.id, system, rater, row["note"]))
        if not row["rank"]:
            return
        rank = read_rank(row["rank"], len(question.labels))
        if not rater:
            raise ValueError("no rater")
        before = self.ranks[rater, number].setdefault(system, rank)
        if before != rank:
            raise ValueError(f"{rater} gave this answer rank {before} before")


def read_rankings(
    paths: list[str], keys: dict[str, BlindKey]
) -> tuple[BlindKey, Ranks, list[Note]]:
    """(key, ranks, notes) of the filled-in tables. ValueError names file and row."""
    rankings = Rankings(keys)
    for path in paths:
        for number, row in read_ranking(path):
            try:
                rankings.add(row)
            except ValueError as error:
                raise ValueError(f"{path}: row {number}: {one_line(error)}") from None
    if rankings.key is None or not any(len(own) > 1 for own in rankings.ranks.values()):
        raise ValueError(f"{paths[0]}: nobody ranked two answers of a question")
    return rankings.key, rankings.ranks, rankings.notes


# --- 2. what they add up to -----------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Rate:
    """A mean over questions with its 95 % interval, None where nothing is known of it."""

    mean: float
    low: float | None
    high: float | None
    questions: int
    ratings: int


@dataclass(frozen=True, slots=True)
class Standing:
    """How one system does: mean rank, and how often it is ranked first."""

    rank: Rate | None
    first: Rate | None


@dataclass(frozen=True, slots=True)
class Win:
    """How often one system is ranked before another."""

    system: str
    against: str
    rate: Rate


@dataclass(frozen=True, slots=True)
class Agreement:
    """How far raters agree, over pairs of raters and pairs of answers that both ranked."""

    pairs_of_raters: int
    pairs_of_answers: int
    tau_b: float | None
    same_order: float


@dataclass(frozen=True, slots=True)
class RankResult:
    """What rank.json holds, but for the notes."""

    sample: str
    questions: int
    raters: int
    rankings: int
    systems: dict[str, Standing]
    wins: list[Win]
    agreement: Agreement | None

    def to_json(self) -> dict[str, Any]:
        result = asdict(self)
        result["wins"] = [
            {"system": win.system, "against": win.against, **asdict(win.rate)} for win in self.wins
        ]
        return result


def interval(by_question: dict[str, list[float]], is_share: bool = True) -> Rate | None:
    """Mean over questions, each counted once however many rated it, with a 95 % interval by
    bootstrap over questions: ratings of one question go together.

    Where all questions agree the bootstrap has no width: a share then has Wilson's interval for as
    many questions, another mean none."""
    if not by_question:
        return None
    values = np.array([np.mean(own) for own in by_question.values()])
    n = len(values)
    draws = np.random.default_rng(0).integers(0, n, (N_DRAWS, n))
    means = values[draws].mean(1)
    low = None
    high = None
    if np.ptp(values):
        low, high = map(float, np.percentile(means, [2.5, 97.5]))
    elif is_share:
        low, high = map(float, wilson(values.sum(), n))
    n_ratings = sum(map(len, by_question.values()))
    return Rate(float(values.mean()), low, high, n, n_ratings)


def orders_of(one: dict[str, int], other: dict[str, int]) -> list[list[int]]:
    """Of every two answers that both ranked: how either ordered them, -1, 0 or 1."""
    orders = []
    for x, y in combinations(sorted(one.keys() & other.keys()), 2):
        orders.append([int(np.sign(one[x] - one[y])), int(np.sign(other[x] - other[y]))])
    return orders


def agreement(ranks: Ranks) -> Agreement | None:
    """Mean over pairs of raters of Kendall's tau-b, and of the share of pairs of answers that both
    put in the same order; None with one rater."""
    taus = []
    same = []
    n_pairs = 0
    raters = sorted({rater for rater, _ in ranks})
    for a, b in combinations(raters, 2):
        orders = []
        for rater, question in ranks:
            if rater == a and (b, question) in ranks:
                orders += orders_of(ranks[a, question], ranks[b, question])
        if not orders:
            continue
        x, y = np.array(orders).T
        n_pairs += len(orders)
        same.append(float((x == y).mean()))
        # who ties all answers puts them in no order
        if x.any() and y.any():
            taus.append(float((x * y).sum() / np.sqrt((x * x).sum() * (y * y).sum())))
    if not same:
        return None
    return Agreement(
        pairs_of_raters=len(same),
        pairs_of_answers=n_pairs,
        tau_b=float(np.mean(taus)) if taus else None,
        same_order=float(np.mean(same)),
    )


def shared_place(rank: int, ranks: list[int]) -> float:
    """Those who tie share the places they take: 1, 1, 3 and 1, 1, 2 are the same."""
    above = sum(other < rank for other in ranks)
    level = sum(other == rank for other in ranks)
    return above + (level + 1) / 2


def summarise(key: BlindKey, ranks: Ranks) -> RankResult:
    """What all ranks add up to. Mean rank and first place count where a rater ranked all
    systems, win rates wherever two were."""
    # {system or pair of systems: {question: [a number for each rater]}}
    places = defaultdict(lambda: defaultdict(list))
    firsts = defaultdict(lambda: defaultdict(list))
    wins = defaultdict(lambda: defaultdict(list))
    ranks = {who: own for who, own in sorted(ranks.items()) if len(own) > 1}
    pairs = list(combinations(key.systems, 2))
    for (_, question), own in ranks.items():
        for a, b in pairs:
            if a in own and b in own:
                # 1 won, 0.5 tied, 0 lost
                wins[a, b][question].append((1 + np.sign(own[b] - own[a])) / 2)
        if len(own) < len(key.systems):
            continue
        best = [name for name in own if own[name] == min(own.values())]
        for name, rank in own.items():
            places[name][question].append(shared_place(rank, list(own.values())))
            firsts[name][question].append(1 / len(best) if name in best else 0.0)
    standings = {}
    for name in key.systems:
        standings[name] = Standing(interval(places[name], is_share=False), interval(firsts[name]))
    rates = []
    for a, b in pairs:
        rate = interval(wins[a, b])
        if rate:
            rates.append(Win(a, b, rate))
    return RankResult(
        sample=key.stamp,
        questions=len({question for _, question in ranks}),
        raters=len({rater for rater, _ in ranks}),
        rankings=len(ranks),
        systems=standings,
        wins=rates,
        agreement=agreement(ranks),
    )


# --- 3. the report --------------------------------------------------------------------------------


def rate_cells(rate: Rate | None, form: str) -> str:
    """Three cells of rank.md: the mean in a number format, its interval, of how many."""
    if rate is None:
        return "- | - | 0"
    bounds = "-"
    if rate.low is not None:
        bounds = f"{rate.low:{form}} to {rate.high:{form}}"
    n = f"{rate.questions} questions, {rate.ratings} ratings"
    return f"{rate.mean:{form}} | {bounds} | {n}"


def rank_report(result: RankResult) -> list[str]:
    """rank.md."""

    def name(text):
        return markdown_text(text, {})

    def mean_rank(item):
        _, standing = item
        return standing.rank.mean if standing.rank else 99

    lines = [
        f"# Blind ranking: {result.questions} questions, {result.raters} raters, "
        f"{result.rankings} rankings",
        "",
        "| system | mean rank (1 is best) | 95 % interval | n | ranked first | 95 % interval | n |",
        "|---|---|---|---|---|---|---|",
    ]
    for system, own in sorted(result.systems.items(), key=mean_rank):
        rank = rate_cells(own.rank, ".2f")
        first = rate_cells(own.first, ".1%")
        lines.append(f"| {name(system)} | {rank} | {first} |")
    lines += ["", "| system | against | wins | 95 % interval | n |", "|---|---|---|---|---|"]
    for win in result.wins:
        rate = rate_cells(win.rate, ".1%")
        lines.append(f"| {name(win.system)} | {name(win.against)} | {rate} |")
    found = result.agreement
    if found:
        tau_b = "-" if found.tau_b is None else f"{found.tau_b:.2f}"
        lines += [
            "",
            f"Raters: Kendall's tau-b {tau_b}, the same order in {found.same_order:.1%} of the "
            f"pairs of answers that two ranked ({found.pairs_of_raters} pairs of raters, "
            f"{found.pairs_of_answers} pairs of answers).",
        ]
    return [
        *lines,
        "",
        "Ties count half. Mean rank and first place: where a rater ranked every system. Each "
        "question counts once; intervals by bootstrap over questions (Wilson's where all of them "
        "agree). Research only: no medical advice.",
    ]


# --- 4. the command -------------------------------------------------------------------------------


def add_command(commands: Any) -> None:
    parser = commands.add_parser("rank", help="what the doctors gave back")
    parser.add_argument("dir", type=Path, help="the --out folder of compare --blind")
    parser.add_argument(
        "rankings",
        nargs="+",
        metavar="RANKING.csv",
        help="what the page's button gave; one file or several for each rater",
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Takes the doctors' rankings back and writes rank.json and rank.md beside the key. -> 0."""
    key, ranks, notes = read_rankings(args.rankings, read_keys(args.dir))
    result = summarise(key, ranks)
    text = "\n".join(rank_report(result))
    write_json(
        args.dir / "rank.json", result.to_json() | {"notes": [asdict(note) for note in notes]}
    )
    write_text(args.dir / "rank.md", text + "\n")
    print(text)
    return 0
