"""`evaluate.py rank`: doctors' rankings -> who is preferred, how sure, how far they agree."""

import csv
import io
import re
import unicodedata
from collections import defaultdict
from itertools import combinations
from pathlib import Path

import numpy as np

from common.files import one_line, write_json, write_text
from common.intervals import wilson
from evaluation.pages import COLUMNS, markdown_text, read_key


def read_keys(folder):
    """{stamp: key} of the blind pages made in a folder, older ones too."""
    keys = {
        key["stamp"]: key for key in map(read_key, sorted(Path(folder).glob("blind_key*.json")))
    }
    if not keys:
        raise FileNotFoundError(
            f"no blind_key.json in {folder}: rank wants the --out folder of compare --blind"
        )
    return keys


def read_table(path):
    """[(row number, {column: cell})] of a ranking, whatever a spreadsheet made of it: its byte marks, its encoding, commas, semicolons or tabs."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"no such ranking: {path}")
    raw = Path(path).read_bytes()
    for encoding in (
        ("utf-16",) if raw[:2] in (b"\xff\xfe", b"\xfe\xff") else ("utf-8-sig", "gb18030")
    ):  # Excel in Chinese, saving as plain CSV
        try:
            text = raw.decode(encoding)
            break
        except UnicodeDecodeError:
            pass
    else:
        raise ValueError(
            f"{path}: neither UTF-8 nor GBK: not a table that the page or a spreadsheet wrote"
        )
    delimiter = max(",;\t", key=text.split("\n", 1)[0].count)
    try:
        lines = list(csv.reader(io.StringIO(text, newline=""), delimiter=delimiter))
    except csv.Error as error:
        raise ValueError(f"{path}: no table ({error})") from None
    names = [name.strip().lower() for name in lines[0]] if lines else []
    if missing := [name for name in COLUMNS if name not in names and name != "note"]:
        raise ValueError(
            f"{path}: not a ranking: no column {missing[0]!r} (its columns are {', '.join(COLUMNS)})"
        )
    return [
        (
            i,
            {"note": ""}
            | {
                name: (cell if name == "note" else unicodedata.normalize("NFKC", cell)).strip()
                for name, cell in zip(names, line)
            },
        )
        for i, line in enumerate(lines[1:], 2)
        if any(map(str.strip, line))
    ]


def read_rankings(paths, keys):
    """(key, {(rater, question): {system: rank}}, notes) of the filled-in tables. ValueError names file and row."""
    key, ranks, notes = None, defaultdict(dict), []
    for path in paths:
        for i, row in read_table(path):
            try:
                if missing := [name for name in COLUMNS if name not in row]:
                    raise ValueError(f"it ends before {missing[0]!r}")
                key = key or keys.get(row["sample"])
                if key is None or row["sample"] != key["stamp"]:
                    raise ValueError(
                        f"sample {row['sample']!r} is of another page than "
                        + (
                            f"the rows before ({key['stamp']})"
                            if key
                            else f"those made here ({', '.join(keys)})"
                        )
                    )
                question = key["questions"].get(row["question"].lower())
                system = question and question["labels"].get(row["label"].upper())
                if system is None:
                    raise ValueError(
                        f"the page has no answer {row['label']!r} of question {row['question']!r}"
                    )
                if row["note"]:
                    notes.append(
                        {
                            "question": question["id"],
                            "system": system,
                            "rater": row["rater"],
                            "note": row["note"],
                        }
                    )
                if not row["rank"]:
                    continue
                if not re.fullmatch(r"\d{1,3}(\.0+)?", row["rank"]) or not 1 <= float(
                    row["rank"]
                ) <= len(question["labels"]):
                    raise ValueError(
                        f"rank {row['rank']!r}: must be a whole number from 1 to {len(question['labels'])}"
                    )
                if not row["rater"]:
                    raise ValueError("no rater")
                own = ranks[row["rater"], row["question"].lower()]
                if own.setdefault(system, int(float(row["rank"]))) != int(float(row["rank"])):
                    raise ValueError(f"{row['rater']} gave this answer rank {own[system]} before")
            except ValueError as error:
                raise ValueError(f"{path}: row {i}: {one_line(error)}") from None
    if not any(len(own) > 1 for own in ranks.values()):
        raise ValueError(f"{paths[0]}: nobody ranked two answers of a question")
    return key, ranks, notes


def interval(by_question, share=True):
    """Mean over questions, each counted once however many rated it, with a 95 % interval by bootstrap over questions: ratings of one question go together.

    Where all questions agree the bootstrap has no width: a share then has Wilson's interval for as many questions, another mean none."""
    if not by_question:
        return None
    values = np.array([np.mean(own) for own in by_question.values()])
    means = values[np.random.default_rng(0).integers(0, len(values), (2000, len(values)))].mean(1)
    low, high = (
        np.percentile(means, [2.5, 97.5])
        if np.ptp(values)
        else wilson(values.sum(), len(values))
        if share
        else (None, None)
    )
    return {
        "mean": float(values.mean()),
        "low": low if low is None else float(low),
        "high": high if high is None else float(high),
        "questions": len(values),
        "ratings": sum(map(len, by_question.values())),
    }


def agreement(ranks):
    """Mean over pairs of raters of Kendall's tau-b, and of the share of pairs of answers that both put in the same order; None with one rater."""
    taus, same, n_pairs = [], [], 0
    for a, b in combinations(sorted({rater for rater, _ in ranks}), 2):
        signs = []  # of every two answers that both ranked: how either ordered them, -1, 0 or 1
        for question in {
            question for rater, question in ranks if rater == a and (b, question) in ranks
        }:
            one, other = ranks[a, question], ranks[b, question]
            signs += [
                [np.sign(own[x] - own[y]) for own in (one, other)]
                for x, y in combinations(sorted(one.keys() & other.keys()), 2)
            ]
        if signs:
            x, y = np.array(signs).T
            n_pairs += len(signs)
            same.append(float((x == y).mean()))
            if x.any() and y.any():
                taus.append(float((x * y).sum() / np.sqrt((x * x).sum() * (y * y).sum())))
    return (
        {
            "pairs_of_raters": len(same),
            "pairs_of_answers": n_pairs,
            "tau_b": float(np.mean(taus)) if taus else None,
            "same_order": float(np.mean(same)),
        }
        if same
        else None
    )


def summarise(key, ranks):
    """What rank.json holds, from {(rater, question): {system: rank}}. Mean rank and first place count where a rater ranked all systems, win rates wherever two were."""
    places, firsts, wins = (
        defaultdict(lambda: defaultdict(list)),
        defaultdict(lambda: defaultdict(list)),
        defaultdict(lambda: defaultdict(list)),
    )
    ranks = {who: own for who, own in sorted(ranks.items()) if len(own) > 1}
    for (_, question), own in ranks.items():
        for a, b in combinations(key["systems"], 2):
            if a in own and b in own:
                wins[a, b][question].append((1 + np.sign(own[b] - own[a])) / 2)
        if len(own) == len(key["systems"]):
            best = [name for name in own if own[name] == min(own.values())]
            for name, rank in own.items():
                above, level = (
                    sum(test(other) for other in own.values())
                    for test in (lambda other: other < rank, lambda other: other == rank)
                )
                places[name][question].append(
                    above + (level + 1) / 2
                )  # those who tie share the places they take: 1, 1, 3 and 1, 1, 2 are the same
                firsts[name][question].append(1 / len(best) if name in best else 0.0)
    return {
        "sample": key["stamp"],
        "questions": len({question for _, question in ranks}),
        "raters": len({rater for rater, _ in ranks}),
        "rankings": len(ranks),
        "systems": {
            name: {"rank": interval(places[name], share=False), "first": interval(firsts[name])}
            for name in key["systems"]
        },
        "wins": [
            {"system": a, "against": b, **interval(wins[a, b])}
            for a, b in combinations(key["systems"], 2)
            if wins[a, b]
        ],
        "agreement": agreement(ranks),
    }


def rank_report(result):
    def shown(value, form):
        return "-" if value is None else format(value, form)

    def cell(found, form):
        return (
            "- | - | 0"
            if found is None
            else (
                f"{found['mean']:{form}} | "
                + (
                    "-"
                    if found["low"] is None
                    else f"{found['low']:{form}} to {found['high']:{form}}"
                )
                + f" | {found['questions']} questions, {found['ratings']} ratings"
            )
        )

    def name(text):
        return markdown_text(text, {})

    lines = [
        f"# Blind ranking: {result['questions']} questions, {result['raters']} raters, {result['rankings']} rankings",
        "",
        "| system | mean rank (1 is best) | 95 % interval | n | ranked first | 95 % interval | n |",
        "|---|---|---|---|---|---|---|",
    ]
    for system, own in sorted(
        result["systems"].items(),
        key=lambda item: item[1]["rank"]["mean"] if item[1]["rank"] else 99,
    ):
        lines.append(
            f"| {name(system)} | {cell(own['rank'], '.2f')} | {cell(own['first'], '.1%')} |"
        )
    lines += ["", "| system | against | wins | 95 % interval | n |", "|---|---|---|---|---|"]
    lines += [
        f"| {name(own['system'])} | {name(own['against'])} | {cell(own, '.1%')} |"
        for own in result["wins"]
    ]
    if own := result["agreement"]:
        lines += [
            "",
            f"Raters: Kendall's tau-b {shown(own['tau_b'], '.2f')}, the same order in {own['same_order']:.1%} of the pairs of answers that two ranked "
            f"({own['pairs_of_raters']} pairs of raters, {own['pairs_of_answers']} pairs of answers).",
        ]
    return lines + [
        "",
        "Ties count half. Mean rank and first place: where a rater ranked every system. Each question counts once; intervals by bootstrap over questions "
        "(Wilson's where all of them agree). Research only: no medical advice.",
    ]


def add_rank_flags(parser):
    parser.add_argument("dir", type=Path, help="the --out folder of compare --blind")
    parser.add_argument(
        "rankings",
        nargs="+",
        metavar="RANKING.csv",
        help="what the page's button gave; one file or several for each rater",
    )


def rank(args):
    """Takes the doctors' rankings back and writes rank.json and rank.md beside the key. -> 0."""
    key, ranks, notes = read_rankings(args.rankings, read_keys(args.dir))
    result = summarise(key, ranks)
    lines = rank_report(result)
    write_json(args.dir / "rank.json", result | {"notes": notes})
    write_text(args.dir / "rank.md", "\n".join(lines) + "\n")
    print("\n".join(lines))
    return 0
