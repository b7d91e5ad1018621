"""English to Chinese for data_prep.py: rows asked for together, a journal that survives any kill, and a check of every translation with a named reason."""

import argparse
import asyncio
import hashlib
import json
import os
import sys
from array import array
from collections import Counter
from pathlib import Path

import numpy as np
from tqdm import tqdm

from chimed.prompts import AGAIN, FIELDS, GLOSSARY, REASONS, TRANSLATE
from chimed.quality import REFUSAL, glossary_breaks, quality, read_glossary, reason_name
from chimed.sources import (
    add_source_options,
    candidates,
    named_columns,
    open_sources,
    put_texts,
    read_row,
    to_translate,
)
from common.endpoint import (
    Endpoint,
    EndpointFailed,
    EndpointOptions,
    RequestFailed,
    add_endpoint_options,
    ask_many,
)
from common.files import one_line
from common.journal import Journal
from common.options import InRange
from common.rows import BadRow, Records
from common.text import clean_text, impractical, is_untranslated, text_key

RAW = ("pmc-oa", "pmc-casereport", "pmc-vqa", "own")  # ChiMed-VL is Chinese already

# --- 1. one row -----------------------------------------------------------------------------------------------------


def row_key(english):
    return text_key(*(f"{name}\x1e{text}" for name, text in sorted(english.items())))


def read_answer(text, english):
    """{field: Chinese} of what the model wrote: a JSON object, perhaps in a fence or with words around. ValueError."""
    start, stop = text.find("{"), text.rfind("}")
    try:
        answer = json.loads(
            text[start : stop + 1], strict=False
        )  # a line break inside a text is forgiven
    except (ValueError, RecursionError):
        raise ValueError(
            "refusal" if REFUSAL.search(text) else "answer is no JSON object"
        ) from None
    if not isinstance(answer, dict) or not all(
        isinstance(answer.get(name), str) and answer[name].strip() for name in english
    ):
        raise ValueError("answer lacks a field")
    return {name: clean_text(answer[name]) for name in english}


async def translate_row(endpoint, english, glossary, attempts):
    """(chinese, reasons): the best of up to `attempts` translations; each that fails the rules is sent back with what is wrong."""
    terms = {
        term.english: term.accepted[0]
        for term in glossary
        if any(term.pattern.search(text) for text in english.values())
    }
    system = TRANSLATE.replace(
        "{fields}", "\uff0c".join(f"{name}\uff1a{FIELDS[name]}" for name in english)
    ) + (GLOSSARY + json.dumps(terms, ensure_ascii=False) if terms else "")
    ask = [
        {"role": "system", "content": system},
        {"role": "user", "content": json.dumps(english, ensure_ascii=False)},
    ]
    best, more = None, []
    for _ in range(attempts):
        try:
            chinese = await endpoint.ask(ask + more, lambda text: read_answer(text, english))
        except RequestFailed:
            if best is None:
                raise
            break  # what was paid for is kept
        reasons = quality(english, chinese, glossary)
        if best is None or len(reasons) < len(best[1]):
            best = chinese, reasons
        if not reasons:
            break
        more = [
            {"role": "assistant", "content": json.dumps(chinese, ensure_ascii=False)},
            {
                "role": "user",
                "content": AGAIN.format(
                    reasons="\uff1b".join(
                        f"{name}\uff1a{REASONS[reason_name(reason)]}"
                        for reason in reasons
                        for name in [reason.split(": ")[1].split(",")[0]]
                    )
                ),
            },
        ]
    return best


# --- 2. files -------------------------------------------------------------------------------------------------------


class Task:
    """One raw file on its way to Chinese: its records, their keys, its journal and its output."""

    def __init__(self, source, records, out, columns, glossary_digest=""):
        self.source, self.records, self.columns, self.fields, self.glossary_digest = (
            source,
            records,
            columns,
            set(),
            glossary_digest,
        )
        self.out = out / records.path.name
        if self.out.resolve() == records.path.resolve():
            raise ValueError(f"--out {out} holds {records.path} itself: name another folder")
        self.journal = Journal(out / f"{records.path.name}.journal.jsonl", is_whole_line)

    def sign(self):
        """Notes in the journal where its rows come from: what review --import writes the file from."""
        header = {
            "raw": os.path.realpath(self.records.path),
            "source": self.source,
            "encoding": self.records.encoding,
            "columns": self.columns,
        }
        if self.journal.header is None or json.dumps(self.journal.header) != json.dumps(header):
            self.journal.add(header)

    def row(self, record):
        """(Row, what to translate: {field: text}). BadRow when there is nothing, or only what cannot sensibly be translated."""
        row = read_row(self.source, record, self.columns)
        english = to_translate(row)
        if not english:
            raise BadRow("no text")
        for name in ("context", "inline", "caption"):  # an answer may well be a number
            if name in english and (reason := impractical(english[name])):
                if (
                    len([n for n in ("context", "inline", "caption", "question") if n in english])
                    == 1
                ):
                    raise BadRow(reason)
                del english[name]  # the rest of the row is worth having
        return row, english

    def images(self, i):
        """Picture names of record i, for the journal: a reviewer will want to see them."""
        row = read_row(self.source, self.records.record(i), self.columns)
        return [candidates(row, name) for name in row.images]

    def is_chinese(self, english):
        return not any(is_untranslated(text) for text in english.values())

    def survey(self, progress):
        """Of every row a key (uint64), 0 for those that are not translated, and how many characters it has (int64)."""
        keys, sizes = (
            np.zeros(len(self.records), dtype=np.uint64),
            np.zeros(len(self.records), dtype=np.int64),
        )
        for i, raw in self.records.read(0, len(self.records)):
            try:
                _, english = self.row(self.records.parse(raw))
                keys[i] = 0 if self.is_chinese(english) else row_key(english)
                self.fields.update(english)
                sizes[i] = sum(map(len, english.values()))
            except BadRow:
                pass  # counted when the file is written
            progress.update()
        return keys, sizes

    def finish(self):
        """Writes the translated file and the rejected rows. Counts of what became of the rows, and of the reasons."""
        counts, dropped = Counter(), Counter()
        partial, rejected = (
            path.with_name(path.name + ".partial")
            for path in (self.out, self.out.with_name(self.out.name + ".rejected.jsonl"))
        )

        def rows(rejects):
            for i, raw in self.records.read(0, len(self.records)):
                try:
                    record = self.records.parse(raw)
                    row, english = self.row(record)
                except BadRow as error:
                    dropped[str(error)] += 1
                    continue
                if self.is_chinese(english):
                    counts["chinese"] += 1
                    yield record
                    continue
                line = self.journal.find(row_key(english))
                if line is None:
                    counts["undone"] += 1
                elif line["reasons"]:
                    dropped.update({reason_name(reason) for reason in line["reasons"]})
                    counts["rejected"] += 1
                    rejects.write(json.dumps({"row": i, **line}, ensure_ascii=False) + "\n")
                else:
                    counts["translated"] += 1
                    yield put_texts(self.source, record, row, line["chinese"], self.columns)

        with (
            open(partial, "w", encoding="utf-8", errors="backslashreplace", newline="") as out,
            open(rejected, "w", encoding="utf-8", errors="backslashreplace") as rejects,
        ):
            self.records.write(out, rows(rejects))
        partial.replace(self.out)
        rejected.replace(self.out.with_name(self.out.name + ".rejected.jsonl"))
        return counts, dropped


def given_translations(path, tasks, encoding):
    """A function (task, row number, english) -> {field: Chinese} or None from a file of finished translations.

    path: rows {english, chinese}, each a text or {field: text} (a journal is such a file), or the raw file itself with Chinese in place, row by row."""
    records = Records(path, encoding)
    samples = (_try(records, i) or {} for i in range(min(len(records), 100)))
    sample = next(
        (
            record
            for record in samples
            if {"english", "chinese"} <= {name.lower() for name in record}
        ),
        {},
    )
    names = {name.lower(): name for name in sample}

    def pairs(record):
        """[(English, Chinese)] of one record."""
        english, chinese = record.get(names["english"]), record.get(names["chinese"])
        if isinstance(english, dict) and isinstance(chinese, dict):
            return [
                (clean_text(text), clean_text(chinese[name]))
                for name, text in english.items()
                if isinstance(text, str) and isinstance(chinese.get(name), str)
            ]
        return (
            [(clean_text(english), clean_text(chinese))]
            if isinstance(english, str) and isinstance(chinese, str)
            else []
        )

    if names:
        found, rows = (
            array("Q"),
            array("q"),
        )  # key of each English text, and the record it stands in
        for i in range(len(records)):
            for english, _ in pairs(_try(records, i) or {}):
                found.append(text_key(english))
                rows.append(i)
        keys, last = np.unique(np.array(found, dtype=np.uint64)[::-1], return_index=True)
        rows = np.array(rows, dtype=np.int64)[::-1][last]

        def by_text(_, __, english):
            chinese = {}
            for name, text in english.items():
                k = int(np.searchsorted(keys, np.uint64(text_key(text))))
                chinese[name] = (
                    dict(pairs(records.record(int(rows[k])))).get(text) if k < len(keys) else None
                )
            return None if None in chinese.values() else chinese

        return by_text
    if len(tasks) != 1 or len(records) != len(tasks[0].records):
        raise ValueError(
            f"{path}: finished translations are rows of `english` and `chinese`, or the one raw file itself, row by row, with Chinese in place"
        )

    def same_row(task, i, english):
        try:
            row, raw = (
                read_row(task.source, one.record(i), task.columns)
                for one in (records, task.records)
            )
        except BadRow:
            return None
        if row.images != raw.images:
            raise ValueError(
                f"{path}: row {i} has other pictures ({', '.join(row.images)}) than the same row of {task.records.path}: the rows must stand in the same order"
            )
        chinese = row.texts
        return {name: chinese.get(name, "") for name in english}

    return same_row


def _try(records, i):
    try:
        return records.record(i)
    except BadRow:
        return None


def is_whole_line(line: dict) -> bool:
    """Whether a journal's line has all that its row is written from."""
    english = line["english"]
    chinese = line["chinese"]
    texts = [*english.values(), *chinese.values(), *line["reasons"], line["source"]]
    for names in line["images"]:
        texts += names
    if len(line["key"]) != 16 or not all(isinstance(text, str) for text in texts):
        return False
    return bool(line["reasons"]) or chinese.keys() == english.keys()


def journal_line(task, key, i, english, chinese, reasons, by):
    return {
        "key": f"{key:016x}",
        "source": task.source,
        "row": i,
        "images": task.images(i),
        "english": english,
        "chinese": chinese,
        "reasons": reasons,
        "by": by,
        "glossary": task.glossary_digest,
    }


async def run_requests(endpoint, todo, glossary, attempts, bar, any_done):
    """Every row of `todo` (an iterator of (task, key, row number, english)), a few at a time; each finished one goes into its journal.

    -> reasons of those that are to be asked for again another time. A row that the endpoint refuses for good is finished, too: rejected."""
    failed = Counter()
    refused = []

    async def ask_row(row):
        task, key, i, english = row
        try:
            chinese, reasons = await translate_row(endpoint, english, glossary, attempts)
        except RequestFailed as error:
            if error.final:
                refused.append((task, key, i, english, one_line(error)))
            else:
                failed[one_line(error)] += 1
        else:
            task.journal.add(journal_line(task, key, i, english, chinese, reasons, endpoint.model))

    try:
        await ask_many(endpoint, todo, ask_row, bar)
    finally:
        for task, key, i, english, reason in refused:
            if endpoint.answered or any_done:
                reasons = [f"not translated: {reason}"]
                task.journal.add(journal_line(task, key, i, english, {}, reasons, endpoint.model))
            else:
                # where nothing was ever answered, the fault is not the row's
                failed[reason] += 1
    return failed


def add_command(commands: argparse._SubParsersAction) -> None:
    about = "English to Chinese: OUT/<same name and form>, a journal beside it; stopped at any moment, the same command goes on"
    parser = commands.add_parser(
        "translate",
        help=about,
        description=about,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run=run)
    add = parser.add_argument
    add_source_options(parser, RAW)
    add("--out", required=True, metavar="DIR", help="where the translated files and journals go")
    add(
        "--glossary",
        metavar="FILE",
        help=".csv of English and Chinese terms that must be used (a|b: either)",
    )
    add(
        "--translations",
        metavar="FILE",
        help="finished translations instead of an endpoint (with --base-url: before it): rows of english and chinese, a journal, or the raw file with Chinese in place",
    )
    add(
        "--attempts",
        action=InRange,
        type=int,
        low=1,
        high=20,
        default=2,
        metavar="N",
        help="translations asked for of a row that fails the checks (default %(default)s)",
    )
    add(
        "--retry-rejected",
        action="store_true",
        help="ask again for rows that failed the checks earlier",
    )
    add_endpoint_options(parser)


def run(args: argparse.Namespace) -> int:
    endpoint_options = EndpointOptions(
        base_url=args.base_url,
        model=args.endpoint_model,
        api_key=args.api_key,
        yes=args.yes,
        concurrency=args.concurrency,
        timeout=args.timeout,
        retries=args.retries,
        retry_delay=args.retry_delay,
        price_in=args.price_in,
        price_out=args.price_out,
        extra_body=args.extra_body,
    )
    glossary = read_glossary(args.glossary, args.encoding)
    digest = hashlib.sha256(
        repr([(term.english, term.accepted) for term in glossary]).encode()
    ).hexdigest()[:16]
    columns, out = named_columns(args.own_columns), Path(args.out)
    opened = open_sources(args.raw_files, RAW, own_columns=args.own_columns, encoding=args.encoding)
    names = [records.path.name for _, records in opened]
    if len(set(names)) < len(names):
        raise ValueError(
            f"two files are named {max(names, key=names.count)}: translate them into two folders"
        )
    out.mkdir(parents=True, exist_ok=True)
    tasks = [Task(source, records, out, columns, digest) for source, records in opened]
    try:
        return translate_files(args, endpoint_options, tasks, glossary, digest)
    finally:
        for task in tasks:
            task.journal.close()


def translate_files(args, endpoint_options, tasks, glossary, digest):
    names = [task.records.path.name for task in tasks]
    given = (
        given_translations(args.translations, tasks, args.encoding) if args.translations else None
    )
    ask = bool(
        args.base_url or not given
    )  # translations given are all there is, unless an endpoint is named with them

    def keeps_glossary(line):
        return (
            line.get("glossary") == digest
            or "review" in line
            or bool(line["reasons"])
            or not any(
                glossary_breaks(text, line["chinese"].get(name, ""), glossary)
                for name, text in line["english"].items()
            )
        )

    plan, n_done, characters = [], 0, 0  # plan: (task, keys, numbers of the rows to translate)
    with tqdm(
        total=sum(len(task.records) for task in tasks), desc="reading", unit=" rows", disable=None
    ) as bar:
        for task in tasks:
            task.journal.load(
                lambda line: keeps_glossary(line) and not (args.retry_rejected and line["reasons"])
            )
            task.sign()
            if task.journal.damaged:
                print(
                    f"{task.journal.path}: {task.journal.damaged} damaged lines: their rows are translated again",
                    file=sys.stderr,
                )
            keys, sizes = task.survey(bar)
            first = np.unique(keys, return_index=True)[
                1
            ]  # equal texts are translated once, and alike
            first = first[keys[first] != 0]
            done = task.journal.has(keys[first])
            # in any order: rows that an endpoint refuses often stand together, and must not look like an endpoint that refuses all
            plan.append((task, keys, np.random.default_rng().permutation(first[~done])))
            n_done += int(done.sum())
            characters += int(sizes[first[~done]].sum())

    def rows_of(numbers):
        for (task, keys, _), rows in zip(plan, numbers):
            for i in rows:
                yield task, int(keys[i]), int(i), task.row(task.records.record(int(i)))[1]

    todo = [rows for *_, rows in plan]
    if given:
        todo, open_rows = [], {task: array("q") for task in tasks}
        for task, key, i, english in tqdm(
            rows_of([rows for *_, rows in plan]),
            total=sum(len(rows) for *_, rows in plan),
            desc="taking",
            unit=" rows",
            disable=None,
        ):
            chinese = given(task, i, english)
            reasons = quality(english, chinese, glossary) if chinese else None
            if chinese is None or (reasons and ask):
                open_rows[task].append(i)
            else:
                task.journal.add(
                    journal_line(
                        task, key, i, english, chinese, reasons, Path(args.translations).name
                    )
                )
        todo = [open_rows[task] for task in tasks]
    failed, fault, n_todo = Counter(), None, sum(map(len, todo))
    if n_todo and ask:
        endpoint = Endpoint(endpoint_options)
        said = ", ".join(
            sorted(set().union(*(task.fields for task in tasks)), key=list(FIELDS).index)
        )
        endpoint.confirm(
            f"the texts ({said}) of {n_todo:,} rows of {', '.join(names)}, some {characters:,} characters{', and glossary terms' if glossary else ''}. "
            "No pictures, ids or file names are sent."
        )
        with tqdm(
            total=n_todo + n_done,
            initial=n_done,
            desc="translating",
            unit=" rows",
            disable=None,
            smoothing=0.05,
        ) as bar:
            try:
                failed = asyncio.run(
                    run_requests(
                        endpoint, rows_of(todo), glossary, args.attempts, bar, bool(n_done)
                    )
                )
            except EndpointFailed as error:
                fault = error
        print(endpoint.summary(), file=sys.stderr)
    for task in tasks:
        task.journal.sync()
        task.journal.load(keeps_glossary)
    if fault or failed:
        n = sum(int((~task.journal.has(keys[rows])).sum()) for task, keys, rows in plan)
        why = (
            one_line(fault)
            if fault
            else ", ".join(f"{reason} ({k})" for reason, k in failed.most_common(3))
        )
        print(
            f"data_prep.py: {n:,} rows are still to be translated: {why}. What is finished is kept: run the same command again",
            file=sys.stderr,
        )
        return 2 if fault and not n_done and not endpoint.answered else 1
    for task in tasks:
        counts, dropped = task.finish()
        print(
            f"{task.out}: {counts['translated'] + counts['chinese']:,} rows of {len(task.records):,}"
            + (f" ({counts['chinese']:,} were Chinese already)" if counts["chinese"] else "")
            + (f"; {counts['undone']:,} without a translation given" if counts["undone"] else "")
            + (
                f"; {counts['rejected']:,} rejected (in {task.out.name}.rejected.jsonl)"
                if counts["rejected"]
                else ""
            )
            + (
                f"; left out, by reason: {', '.join(f'{reason} {n:,}' for reason, n in dropped.most_common())}"
                if dropped
                else ""
            )
        )
    return 0
