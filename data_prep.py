"""ChiMed-VL from the raw sets (arXiv 2310.17956, section 3): one command a step, every row accounted for.

    python data_prep.py translate --pmc-vqa raw/train_2.csv --out zh …    English to Chinese through any OpenAI-compatible endpoint, checked row by row
    python data_prep.py review zh/train_2.csv --images DIR --out review   a sample for a doctor: one page to fill in; --import takes it back
    python data_prep.py build --pmc-oa F --pmc-casereport F --pmc-vqa F --images DIR --out data/chimed
                                                                          pictures joined, dialogs written: what train.py reads
    python data_prep.py check data/chimed/alignment.json --images data/chimed/images
    python data_prep.py stats --alignment F --instruction F --tokenizer DIR --out stats     Tables 1 and 2, Figures 1 and 2

Each takes --help. Reading order: this file (pictures, dialogs, build, check), sources.py (the raw files), translate.py with endpoint.py, review.py,
stats.py; prompts.py holds every word that is said or looked for. Exit codes: 0 done, 1 found problems or unfinished, 2 bad input.
"""

import argparse
import json
import os
import re
import sys
from array import array
from collections import Counter
from pathlib import Path

import numpy as np
from tqdm import tqdm

from chimed import check, review, stats, translate
from chimed.groups import MAX_TURNS, Teams, connected, held_out
from chimed.pictures import MAX_PICTURES, place_pictures
from chimed.prompts import CAPTION, CONTEXT, VQA
from chimed.sources import (
    SOURCES,
    Row,
    add_source_options,
    article_of,
    candidates,
    named_columns,
    open_sources,
    read_row,
)
from chimed.workers import BLOCK, add_workers_option, in_order
from common.files import digest, lock, run_cli, write_json
from common.options import InRange
from common.rows import BadRow
from common.text import CHOICES, impractical, is_untranslated, text_key, text_length
from model_io.tokens import check_conversation
from qilin_min import IMAGE_TOKEN

# --- 1. dialogs: what a row becomes ---------------------------------------------------------------------------------

MIN_LENGTH = 5  # Chinese characters; a Latin word counts two. What is shorter describes nothing ("Figure 1", "CT图像")
REFERENCE_ONLY = re.compile(
    r"^\W*(?:see |\u89c1|\u53c2\u89c1|\u5982)?\s*(?:fig(?:ure)?s?|table|\u56fe|\u8868)\W*\d*\w?\W*$",
    re.IGNORECASE,
)


def draw_prompt(seed, row_id, what, choices):
    """One of `choices`, by seed and row id alone: the same for any number of workers, and for each row on its own."""
    return choices[text_key(str(seed), row_id, what) % len(choices)]


def dialog(row_id, image, *turns):
    """A row of the published form."""
    return {
        "id": row_id,
        "image": image,
        "conversations": [
            {"from": ("human", "gpt")[i % 2], "value": turn} for i, turn in enumerate(turns)
        ],
    }


def alignment_texts(row, row_id, options):
    """[(kind, text)] that stage 1 learns from a row: its caption; of a case report its context or its inline text, drawn by row id, or both. BadRow."""
    kinds = (
        [options["alignment_text"]]
        if options["alignment_text"] in ("context", "inline")
        else ["context", "inline"]
    )
    usable, reasons = [], []
    for kind in kinds if row.source == "pmc-casereport" else ["caption"]:
        text = row.texts.get(kind, "")
        reason = (
            "no text"
            if not text
            else impractical(text)
            or (
                "text too short"
                if text_length(text) < MIN_LENGTH or REFERENCE_ONLY.match(text)
                else "not Chinese"
                if options["require_chinese"] and is_untranslated(text)
                else None
            )
        )
        (reasons if reason else usable).append(reason or (kind, text))
    if not usable:
        raise BadRow(reasons[0])
    return (
        usable
        if options["alignment_text"] == "both"
        else [draw_prompt(options["seed"], row_id, "kind", usable)]
    )


def question_and_answer(row, row_id, options):
    """(question, answer) that stage 2 learns from a row, choices kept or not. BadRow."""
    question, answer = row.texts.get("question", ""), row.texts.get("answer", "")
    for text, missing in ((question, "no question"), (answer, "no answer")):
        if not re.search(r"\w", text):
            raise BadRow(missing)
    choices = [
        (name[-1].upper(), text) for name, text in row.texts.items() if name.startswith("choice_")
    ]
    if options["require_chinese"] and any(
        map(
            is_untranslated,
            (question, answer, *(text for _, text in choices if options["choices"])),
        )
    ):
        raise BadRow("not Chinese")
    if options["choices"] and choices:
        if not row.letter:
            raise BadRow("answer is none of the choices")
        listed = "\n".join(f"{letter}. {text}" for letter, text in choices)
        return (
            f"{question}\n{draw_prompt(options['seed'], row_id, 'choices', CHOICES)}\n{listed}",
            f"{row.letter}. {answer}",
        )
    return question, answer


def put_question(template, question):
    """A question in its prompt; a mark ends it where more words follow."""
    if not template.endswith("{question}") and question[-1] not in "\u3002\uff1f\uff01.?!:\uff1a":
        question += "\uff1f"
    return template.replace("{question}", question)


def published(row, row_id, place, options):
    """A dialog that is one already: as it is, its pictures placed; several for one <image> are joined. BadRow."""
    try:
        check_conversation(row.conversations)
    except ValueError:
        raise BadRow("no dialog") from None
    turns = [turn["value"].encode("utf-8", "ignore").decode() for turn in row.conversations]
    n_images = sum(turn.count(IMAGE_TOKEN) for turn in turns)
    if options["require_chinese"] and any(map(is_untranslated, turns[1::2])):
        raise BadRow("not Chinese")
    if (
        len(turns) % 2
        or not all(turn.replace(IMAGE_TOKEN, "").strip() for turn in turns[1::2])
        or any(IMAGE_TOKEN in turn for turn in turns[1::2])
    ):
        raise BadRow("no dialog")
    if n_images not in (1, len(row.images)) or bool(n_images) != bool(row.images):
        raise BadRow(f"{IMAGE_TOKEN} and pictures do not agree")
    images = [place(row.images)] if n_images == 1 else [place([name]) for name in row.images]
    made = dialog(row.id or row_id, images[0] if len(images) == 1 else images, *turns)
    return made if images else {name: value for name, value in made.items() if name != "image"}


# --- 2. build: two passes over the rows, any number of workers ------------------------------------------------------
# pass 1 asks of each row only what other rows must know: its text (to join pictures), its pictures and its article (to split and to merge).
# pass 2 makes pictures and dialogs of blocks of rows, each on its own; this process only writes them, in order.

ALIGNED, ASKED = (
    ("pmc-oa", "pmc-casereport", "chimed-alignment", "own"),
    ("pmc-casereport", "pmc-vqa", "chimed-instruction", "own"),
)


class Build:
    """What pass 1 found and pass 2 needs. Rows are numbered through all files."""

    def __init__(self, args):
        self.files = open_sources(
            args.raw_files, SOURCES, own_columns=args.own_columns, encoding=args.encoding
        )
        self.columns = named_columns(args.own_columns)
        self.options = {
            name: getattr(args, name)
            for name in (
                "seed",
                "choices",
                "alignment_text",
                "require_chinese",
                "merge_turns",
                "val_fraction",
            )
        }
        self.roots = tuple(os.path.realpath(root) for root in args.images)
        self.folder, self.copy, self.skip = args.out / "images", args.copy, args.skip_pictures
        self.starts = np.cumsum([0, *(len(records) for _, records in self.files)])
        seen, self.id_starts = Counter(), []
        for source, records in self.files:
            self.id_starts.append(seen[source])
            seen[source] += len(records)

    def blocks(self):
        return [
            (f, start, min(start + BLOCK, len(records)))
            for f, (_, records) in enumerate(self.files)
            for start in range(0, len(records), BLOCK)
        ]

    def locate(self, row):
        """(file, number in it) of a row."""
        f = int(np.searchsorted(self.starts, row, side="right")) - 1
        return f, int(row - self.starts[f])

    def id_of(self, f, i, row):
        """A dialog's id says its set, for stats; the row's own id is kept, else rows are numbered through the files of a set."""
        source = self.files[f][0]
        return (
            row.id if row.id and source != "own" else f"{source}-{row.id or self.id_starts[f] + i}"
        )

    def read(self, f, i, raw=None):
        """A Row. BadRow."""
        source, records = self.files[f]
        return read_row(
            source, records.record(i) if raw is None else records.parse(raw), self.columns
        )

    def place(self, rows):
        """The picture of some rows with one text. BadRow."""
        names = tuple(
            dict.fromkeys(tuple(candidates(row, name)) for row in rows for name in row.images)
        )
        placed = place_pictures(names, self.roots, self.folder, self.copy, self.skip)
        if placed.problem:
            raise BadRow(placed.problem)
        return placed.name

    def survey(self, args):
        """Pass 1."""
        parts, n_test = [], 0
        with tqdm(total=int(self.starts[-1]), desc="reading", unit=" rows", disable=None) as bar:
            for (_, start, stop), (arrays, tests) in zip(
                self.blocks(), in_order(survey_block, self.blocks(), args.workers, self)
            ):
                parts.append(arrays)
                n_test += tests
                bar.update(stop - start)
        texts, pictures, ties, counts = (np.concatenate(columns) for columns in zip(*parts))
        self.joined = Teams(texts)
        self.merged = Teams(
            pictures if self.options["merge_turns"] else np.zeros_like(pictures), MAX_TURNS
        )
        self.val = held_out(
            *connected(ties, counts), self.options["val_fraction"], self.options["seed"]
        )
        if n_test:
            print(
                f"data_prep.py: {n_test:,} rows are marked as test data by their set: training on them spoils that test",
                file=sys.stderr,
            )


def survey_block(build, f, start, stop):
    """Pass 1 over a block, four arrays: a key of each row's article and text (0: it joins nobody), one of its pictures, the keys that tie it to others
    and how many those are; and how many rows are test data."""
    groups, pictures, ties, counts, n_test = array("Q"), array("Q"), array("Q"), array("q"), 0
    for i, raw in build.files[f][1].read(start, stop):
        group, picture, keys = 0, 0, []
        try:
            row = build.read(f, i, raw)
            names = [candidates(row, name)[0] for name in row.images]
            n_test += row.test
            articles = {row.article, *(article_of(name) for name in names)} - {""}
            keys = [
                text_key("picture", os.path.splitext(os.path.normpath(name))[0]) for name in names
            ] + [text_key("article", article) for article in sorted(articles)]
            if row.source == "pmc-oa" and row.article and row.texts["caption"]:
                group = text_key(row.article, row.texts["caption"])
            if names and row.texts.get("question"):
                picture = text_key("pictures", *names)
        except BadRow:
            pass
        keys = keys or [text_key("row", str(f), str(i))]
        groups.append(group)
        pictures.append(picture)
        ties.extend(keys)
        counts.append(len(keys))
    return [
        np.frombuffer(values.tobytes(), dtype=kind)
        for values, kind in (
            (groups, np.uint64),
            (pictures, np.uint64),
            (ties, np.uint64),
            (counts, np.int64),
        )
    ], n_test


class Block:
    """Pass 2 over a block of rows: what it writes, what it counts, what it drops."""

    def __init__(self, build, f, start, stop):
        self.build = build
        self.lines, self.counts, self.dropped = {}, Counter(), []
        for i, raw in self.build.files[f][1].read(start, stop):
            number = int(self.build.starts[f]) + i
            try:
                row = self.build.read(f, i, raw)
            except BadRow as error:
                row = error
            subsets = [
                subset
                for subset, sources in (("alignment", ALIGNED), ("instruction", ASKED))
                if self.build.files[f][0] in sources
            ]
            if self.build.files[f][0] == "own":
                fit = isinstance(row, Row) and [
                    subset
                    for subset, text in (("alignment", "caption"), ("instruction", "question"))
                    if row.texts[text]
                ]
                subsets = fit or subsets[:1]
            for subset in subsets:
                teams = self.build.joined if subset == "alignment" else self.build.merged
                if not teams.follows[number]:
                    self.add(subset, f, i, row, teams.of(number))

    def drop(self, subset, number, reason):
        f, i = self.build.locate(number)
        source, records = self.build.files[f]
        self.counts[subset, source, f"dropped: {reason}"] += 1
        self.dropped.append(
            json.dumps(
                {
                    "subset": subset,
                    "source": source,
                    "file": str(records.path),
                    "row": i,
                    "reason": reason,
                },
                ensure_ascii=False,
            )
        )

    def add(self, subset, f, i, row, team):
        """The dialogs of a row, or of the team it leads. Every row of it is counted once: kept, joined or merged into another, or dropped by a reason."""
        members = []  # (number, Row, id) of those that are fit
        for number in team:
            g, k = self.build.locate(number)
            self.counts[subset, self.build.files[g][0], "rows"] += 1
            try:
                other = row if (g, k) == (f, i) else self.build.read(g, k)
                if isinstance(other, BadRow):
                    raise other
                row_id = self.build.id_of(g, k, other)
                parts = (
                    ()
                    if other.source.startswith("chimed")
                    else alignment_texts(other, row_id, self.build.options)
                    if subset == "alignment"
                    else question_and_answer(other, row_id, self.build.options)
                )
                members.append((number, other, row_id, parts))
            except BadRow as error:
                self.drop(subset, number, str(error))
        try:
            dialogs = self.dialogs(subset, members) if members else []
        except BadRow as error:  # their picture
            for number, *_ in members:
                self.drop(subset, number, str(error))
            return
        for n, (_, other, *_) in enumerate(members):
            self.counts[
                subset,
                other.source,
                "kept" if n == 0 else "joined" if subset == "alignment" else "merged",
            ] += 1
            self.counts[subset, other.source, "dialogs"] += len(dialogs) if n == 0 else 0
        if dialogs:
            self.lines.setdefault((subset, bool(self.build.val[members[0][0]])), []).extend(
                json.dumps(d, ensure_ascii=False) for d in dialogs
            )

    def dialogs(self, subset, members):
        (_, row, row_id, parts), seed = members[0], self.build.options["seed"]
        if row.source.startswith("chimed"):
            made = published(
                row,
                row_id,
                lambda names: self.build.place([Row(row.source, names, {})]),
                self.build.options,
            )
            self.counts[subset, row.source, "untranslated"] += any(
                is_untranslated(turn["value"]) for turn in made["conversations"][1::2]
            )
            return [made]
        if subset == "alignment":
            picture = self.build.place([other for _, other, *_ in members])
            self.counts[subset, row.source, "untranslated"] += sum(
                is_untranslated(text) for _, text in parts
            )
            return [
                dialog(
                    f"{row_id}-{kind}",
                    picture,
                    f"{IMAGE_TOKEN}\n{draw_prompt(seed, row_id, kind, CONTEXT if kind == 'context' else CAPTION)}",
                    text,
                )
                for kind, text in parts
            ]
        picture, turns = self.build.place([row]), []
        for _, other, other_id, (question, answer) in members:
            self.counts[subset, other.source, "untranslated"] += is_untranslated(
                question
            ) or is_untranslated(answer)
            whole = (
                turns or "\n" in question
            )  # later questions of a dialog, and those with choices, stand as they are
            turns += [
                question
                if whole
                else put_question(draw_prompt(seed, other_id, "vqa", VQA), question),
                answer,
            ]
        return [dialog(row_id, picture, f"{IMAGE_TOKEN}\n{turns[0]}", *turns[1:])]


def make_block(build, f, start, stop):
    block = Block(build, f, start, stop)
    return block.lines, block.counts, block.dropped


def add_command(commands: argparse._SubParsersAction) -> None:
    about = "raw or translated sets -> OUT/alignment.json, instruction.json, images/, dropped.jsonl, manifest.json"
    parser = commands.add_parser(
        "build",
        help=about,
        description=about,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run=run)
    add = parser.add_argument
    add_source_options(parser, SOURCES)
    add(
        "--images",
        nargs="+",
        default=[],
        metavar="DIR",
        help="folders the picture names are relative to, searched in this order",
    )
    add(
        "--out",
        type=Path,
        required=True,
        metavar="DIR",
        help="where to write; run again after a stop, it makes no finished picture twice",
    )
    add(
        "--val-fraction",
        action=InRange,
        type=float,
        low=0,
        high=0.9,
        default=0,
        metavar="X",
        help="share of rows for *-val.json; rows of one article, group or picture stay on one side (default 0)",
    )
    add(
        "--alignment-text",
        choices=("draw", "inline", "context", "both"),
        default="draw",
        help="what stage 1 learns of a case report: one of its two texts drawn by row id (default), always this one, or a dialog for each",
    )
    add(
        "--choices",
        action="store_true",
        help="keep multiple-choice questions as such (default: open questions, as the paper)",
    )
    add(
        "--merge-turns",
        action="store_true",
        help="all questions about one picture in one dialog: the picture is trained on once",
    )
    add(
        "--require-chinese",
        action="store_true",
        help="drop rows that are not translated (default: keep them, and warn)",
    )
    add("--seed", type=int, default=0, help="of prompts, kinds of text and the split (default 0)")
    add(
        "--copy",
        action="store_true",
        help="copy pictures (default: hard links where the disk allows)",
    )
    add(
        "--skip-pictures",
        action="store_true",
        help="write the texts alone: pictures are named as they would be, and neither sought nor made",
    )
    add_workers_option(
        parser, "processes (default %(default)s, the CPUs here); the output does not depend on it"
    )


def run(args: argparse.Namespace) -> int:
    if not args.images and not args.skip_pictures:
        raise ValueError(
            "name the folders of the pictures by --images (or --skip-pictures, to write the texts alone)"
        )
    for root in args.images:
        if not Path(root).is_dir():
            raise FileNotFoundError(f"no such image folder: {root}")
    place_pictures.cache_clear()  # what an earlier build of this process saw may have changed
    build = Build(args)
    args.out.mkdir(parents=True, exist_ok=True)
    with lock(args.out / ".lock", f"{args.out} is being written by another run"):
        write_build(build, args)
    return 0


def write_build(build, args):
    """Both passes, and what they leave in --out."""
    build.survey(args)
    targets = {
        (subset, side): args.out / f"{subset}{'-val' if side else ''}.json"
        for subset in ("alignment", "instruction")
        for side in (False, True)
    }
    inputs = {os.path.realpath(records.path) for _, records in build.files}
    for target in (*targets.values(), args.out / "dropped.jsonl", args.out / "manifest.json"):
        if os.path.realpath(target) in inputs:
            raise ValueError(f"{target} is an input: name another --out")
    files, counts, written = {}, Counter(), Counter()
    with (
        tqdm(total=int(build.starts[-1]), desc="building", unit=" rows", disable=None) as bar,
        open(args.out / "dropped.jsonl.partial", "w", encoding="utf-8") as dropped,
    ):
        for (_, start, stop), (lines, more, drops) in zip(
            build.blocks(), in_order(make_block, build.blocks(), args.workers, build)
        ):
            for key, rows in lines.items():
                if key not in files:
                    files[key] = open(f"{targets[key]}.partial", "w", encoding="utf-8")
                files[key].write(("[\n" if not written[key] else ",\n") + ",\n".join(rows))
                written[key] += len(rows)
            counts += more
            dropped.writelines(f"{line}\n" for line in drops)
            bar.update(stop - start)
            bar.set_postfix_str(
                f"{sum(written.values()):,} dialogs, {sum(n for (*_, what), n in counts.items() if what.startswith('dropped')):,} dropped"
            )
    for file in files.values():
        file.write("\n]\n")
        file.close()
    table = summary(counts)
    if not written:
        Path(args.out, "dropped.jsonl.partial").replace(args.out / "dropped.jsonl")
        raise ValueError(
            f"no row is left of {int(build.starts[-1]):,}: {reasons_of(counts)} (each in {args.out / 'dropped.jsonl'})"
        )
    for key, target in targets.items():
        if key in files:
            Path(f"{target}.partial").replace(target)
        else:
            target.unlink(missing_ok=True)  # of an earlier build: it would not belong to this one
    Path(args.out, "dropped.jsonl.partial").replace(args.out / "dropped.jsonl")
    write_json(
        args.out / "manifest.json",
        {
            "inputs": [
                {
                    "set": source,
                    "file": str(records.path),
                    "rows": len(records),
                    "sha256": digest(records.path),
                }
                for source, records in build.files
            ],
            "settings": build.options
            | {
                "images": list(args.images),
                "skip_pictures": args.skip_pictures,
                "columns": {name: names[0] for name, names in build.columns.items() if names},
                "encoding": args.encoding,
                "max_pictures": MAX_PICTURES,
                "min_length": MIN_LENGTH,
            },
            "outputs": {
                target.name: {"dialogs": written[key], "sha256": digest(target)}
                for key, target in targets.items()
                if key in files
            },
            "counts": table,
        },
    )
    print_summary(table)
    for key, target in targets.items():
        if key in files:
            print(f"{target}: {written[key]:,} dialogs")
    if args.val_fraction and not any(
        written[subset, True] for subset in ("alignment", "instruction")
    ):
        print(
            "data_prep.py: no row that was held out was fit: there is no *-val.json",
            file=sys.stderr,
        )
    merged = sum(n for (*_, what), n in counts.items() if what == "merged")
    if args.merge_turns:
        print(
            f"merged: {merged:,} questions stand in another's dialog, {merged:,} pictures fewer to train on ({merged * 576:,} image tokens at 576 a picture)"
        )
    if untranslated := sum(n for (*_, what), n in counts.items() if what == "untranslated"):
        print(
            f"data_prep.py: {untranslated:,} texts or questions are English that was not translated: they are kept (--require-chinese drops them)",
            file=sys.stderr,
        )


def summary(counts):
    """{subset: {set: {rows, kept, joined, merged, dialogs, untranslated, dropped: {reason: n}}}}; rows = kept + joined + merged + all dropped."""
    table = {}
    for (subset, source, what), n in sorted(counts.items()):
        entry = table.setdefault(subset, {}).setdefault(
            source,
            {
                "rows": 0,
                "kept": 0,
                "joined": 0,
                "merged": 0,
                "dialogs": 0,
                "untranslated": 0,
                "dropped": {},
            },
        )
        if what.startswith("dropped: "):
            entry["dropped"][what.removeprefix("dropped: ")] = n
        else:
            entry[what] = n
    return table


def reasons_of(counts):
    reasons = Counter()
    for (*_, what), n in counts.items():
        if what.startswith("dropped: "):
            reasons[what.removeprefix("dropped: ")] += n
    return ", ".join(f"{reason} {n:,}" for reason, n in reasons.most_common())


def print_summary(table):
    print(
        "| subset | set | rows | kept | joined or merged into another | dropped | dialogs |\n|---|---|---|---|---|---|---|"
    )
    for subset, sources in table.items():
        for source, n in sources.items():
            print(
                f"| {subset} | {source} | {n['rows']:,} | {n['kept']:,} | {n['joined'] + n['merged']:,} | {sum(n['dropped'].values()):,} | {n['dialogs']:,} |"
            )
    for subset, sources in table.items():
        for source, n in sources.items():
            if n["dropped"]:
                print(
                    f"dropped from {subset}, {source}: {', '.join(f'{reason} {k:,}' for reason, k in sorted(n['dropped'].items(), key=lambda item: -item[1]))}"
                )


# --- 3. command line ------------------------------------------------------------------------------------------------


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    add_command(commands)
    for command in (translate, review, check, stats):
        command.add_command(commands)
    args = parser.parse_args()
    sys.exit(args.run(args))


if __name__ == "__main__":
    run_cli(main)
