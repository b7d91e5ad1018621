"""English to Chinese for data_prep.py: rows asked for together, a journal that survives any kill,
and a check of every translation with a named reason."""

import argparse
import asyncio
import json
import os
import sys
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from hashlib import sha256
from pathlib import Path
from typing import Any, TextIO

import numpy as np
from tqdm import tqdm

from chimed.prompts import AGAIN, FIELDS, GLOSSARY, REASONS, TRANSLATE
from chimed.quality import (
    REFUSAL,
    Term,
    glossary_breaks,
    quality,
    read_glossary,
    reason_field,
    reason_name,
)
from chimed.sources import (
    RawFile,
    Row,
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

# ChiMed-VL is Chinese already
RAW = ("pmc-oa", "pmc-casereport", "pmc-vqa", "own")

# --- 1. one row -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Glossary:
    """The terms that must be used, and a digest of them: a journal's line tells by it which terms
    it was checked for."""

    terms: list[Term]
    digest: str

    def asked_in(self, english: dict[str, str]) -> dict[str, str]:
        """{English: Chinese} of the terms that a row holds."""
        terms = {}
        for term in self.terms:
            if any(term.pattern.search(text) for text in english.values()):
                terms[term.english] = term.accepted[0]
        return terms

    def is_kept_in(self, line: dict[str, Any]) -> bool:
        """Whether a finished line has the words that are wanted now. What a doctor decided, or what
        was rejected, stays as it is."""
        if line.get("glossary") == self.digest or "review" in line or line["reasons"]:
            return True
        for name, text in line["english"].items():
            if glossary_breaks(text, line["chinese"].get(name, ""), self.terms):
                return False
        return True


def open_glossary(path: str | None, encoding: str) -> Glossary:
    """The glossary in a table; an empty one without."""
    terms = read_glossary(path, encoding)
    said = repr([(term.english, term.accepted) for term in terms])
    return Glossary(terms, sha256(said.encode()).hexdigest()[:16])


@dataclass(frozen=True)
class Translation:
    """The translation of a row, and why it is not good enough: [] when every rule passes."""

    chinese: dict[str, str]
    reasons: list[str]


def row_key(english: dict[str, str]) -> int:
    """The key of a row's texts and their names, in whatever order."""
    return text_key(*(f"{name}\x1e{text}" for name, text in sorted(english.items())))


def read_answer(text: str, english: dict[str, str]) -> dict[str, str]:
    """{field: Chinese} of what the model wrote: a JSON object, perhaps in a fence or with words
    around. ValueError."""
    start = text.find("{")
    stop = text.rfind("}")
    try:
        # not strict: a line break inside a text is forgiven
        answer = json.loads(text[start : stop + 1], strict=False)
    except (ValueError, RecursionError):
        is_refusal = REFUSAL.search(text)
        raise ValueError("refusal" if is_refusal else "answer is no JSON object") from None
    if not isinstance(answer, dict):
        raise ValueError("answer lacks a field")
    chinese = {}
    for name in english:
        said = answer.get(name)
        if not isinstance(said, str) or not said.strip():
            raise ValueError("answer lacks a field")
        chinese[name] = clean_text(said)
    return chinese


def instructions(english: dict[str, str], glossary: Glossary) -> str:
    """What the translator is told before it sees a row."""
    fields = "\uff0c".join(f"{name}\uff1a{FIELDS[name]}" for name in english)
    text = TRANSLATE.replace("{fields}", fields)
    terms = glossary.asked_in(english)
    if terms:
        text += GLOSSARY + json.dumps(terms, ensure_ascii=False)
    return text


def complaint(reasons: list[str]) -> str:
    """What the translator is told of a translation that fails the rules."""
    faults = []
    for reason in reasons:
        faults.append(f"{reason_field(reason)}\uff1a{REASONS[reason_name(reason)]}")
    return AGAIN.format(reasons="\uff1b".join(faults))


async def translate_row(
    endpoint: Endpoint, english: dict[str, str], glossary: Glossary, attempts: int
) -> Translation:
    """The best of up to `attempts` translations; each that fails the rules is sent back with what
    is wrong. RequestFailed when there is none."""
    first = [
        {"role": "system", "content": instructions(english, glossary)},
        {"role": "user", "content": json.dumps(english, ensure_ascii=False)},
    ]
    again = []
    best = None
    for _ in range(attempts):
        try:
            chinese = await endpoint.ask(first + again, lambda text: read_answer(text, english))
        except RequestFailed:
            if best is None:
                raise
            # what was paid for is kept
            break
        reasons = quality(english, chinese, glossary.terms)
        if best is None or len(reasons) < len(best.reasons):
            best = Translation(chinese, reasons)
        if not reasons:
            break
        again = [
            {"role": "assistant", "content": json.dumps(chinese, ensure_ascii=False)},
            {"role": "user", "content": complaint(reasons)},
        ]
    assert best is not None, f"{attempts} attempts"
    return best


# --- 2. files -------------------------------------------------------------------------------------

# of a row, those that are left out where they cannot sensibly be translated: an answer may well be
# a number
DESCRIPTIONS = ("context", "inline", "caption")


@dataclass
class Outcome:
    """What became of the rows of a file, counted."""

    translated: int = 0
    # already
    chinese: int = 0
    undone: int = 0
    rejected: int = 0
    # reason: rows, of those rejected and those that cannot be translated
    dropped: Counter[str] = field(default_factory=Counter)


class Task:
    """One raw file on its way to Chinese: its records, its journal and its output."""

    def __init__(
        self,
        source: str,
        records: Records,
        out: Path,
        columns: dict[str, tuple[str, ...]],
        glossary_digest: str = "",
    ):
        self.source = source
        self.records = records
        self.columns = columns
        self.glossary_digest = glossary_digest
        # those that a row was found to have
        self.fields: set[str] = set()
        self.out = out / records.path.name
        if self.out.resolve() == records.path.resolve():
            raise ValueError(f"--out {out} holds {records.path} itself: name another folder")
        self.journal = Journal(out / f"{records.path.name}.journal.jsonl", is_whole_line)

    def sign(self) -> None:
        """Notes in the journal where its rows come from: what review --import writes the file
        from."""
        header = {
            "raw": os.path.realpath(self.records.path),
            "source": self.source,
            "encoding": self.records.encoding,
            "columns": self.columns,
        }
        if self.journal.header is None or json.dumps(self.journal.header) != json.dumps(header):
            self.journal.add(header)

    def row(self, record: dict[str, Any]) -> Row:
        """A record as a Row. BadRow."""
        return read_row(self.source, record, self.columns)

    def english(self, i: int) -> dict[str, str]:
        """What to translate of record i. BadRow."""
        return english_of(self.row(self.records.record(i)))

    def images(self, i: int) -> list[list[str]]:
        """Picture names of record i, for the journal: a reviewer will want to see them."""
        row = self.row(self.records.record(i))
        return [candidates(row, name) for name in row.images]

    def survey(self, progress: tqdm) -> tuple[np.ndarray, np.ndarray]:
        """Of every row a key (uint64), 0 for those that are not translated, and how many characters
        it has (int64)."""
        keys = np.zeros(len(self.records), dtype=np.uint64)
        sizes = np.zeros(len(self.records), dtype=np.int64)
        for i, raw in self.records.read(0, len(self.records)):
            try:
                english = english_of(self.row(self.records.parse(raw)))
                keys[i] = 0 if is_chinese(english) else row_key(english)
                self.fields.update(english)
                sizes[i] = sum(map(len, english.values()))
            except BadRow:
                # counted when the file is written
                pass
            progress.update()
        return keys, sizes

    def finish(self) -> Outcome:
        """Writes the translated file and the rejected rows."""
        outcome = Outcome()
        rejected = self.out.with_name(f"{self.out.name}.rejected.jsonl")
        partial = self.out.with_name(f"{self.out.name}.partial")
        partial_rejected = rejected.with_name(f"{rejected.name}.partial")
        with (
            open(partial, "w", encoding="utf-8", errors="backslashreplace", newline="") as out,
            open(partial_rejected, "w", encoding="utf-8", errors="backslashreplace") as rejects,
        ):
            self.records.write(out, self._finished(outcome, rejects))
        partial.replace(self.out)
        partial_rejected.replace(rejected)
        return outcome

    def _finished(self, outcome: Outcome, rejects: TextIO) -> Iterator[dict[str, Any]]:
        """The records of the translated file; every row is counted, a rejected one is written to
        `rejects`."""
        for i, raw in self.records.read(0, len(self.records)):
            try:
                record = self.records.parse(raw)
                row = self.row(record)
                english = english_of(row)
            except BadRow as error:
                outcome.dropped[str(error)] += 1
                continue
            if is_chinese(english):
                outcome.chinese += 1
                yield record
                continue
            line = self.journal.find(row_key(english))
            if line is None:
                outcome.undone += 1
            elif line["reasons"]:
                outcome.rejected += 1
                outcome.dropped.update({reason_name(reason) for reason in line["reasons"]})
                rejects.write(json.dumps({"row": i, **line}, ensure_ascii=False) + "\n")
            else:
                outcome.translated += 1
                yield put_texts(self.source, record, row, line["chinese"], self.columns)


def english_of(row: Row) -> dict[str, str]:
    """What to translate: {field: text}. BadRow when there is nothing, or only what cannot sensibly
    be translated."""
    english = to_translate(row)
    if not english:
        raise BadRow("no text")
    for name in DESCRIPTIONS:
        reason = impractical(english[name]) if name in english else None
        if reason is None:
            continue
        if sum(other in english for other in (*DESCRIPTIONS, "question")) == 1:
            raise BadRow(reason)
        # the rest of the row is worth having
        del english[name]
    return english


def is_chinese(english: dict[str, str]) -> bool:
    """Whether nothing of a row is left to translate."""
    return not any(is_untranslated(text) for text in english.values())


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


@dataclass(frozen=True)
class Work:
    """A row that is to be translated: its task, its number there, its texts and their key."""

    task: Task
    i: int
    english: dict[str, str]
    key: int

    def is_done_by(self, translation: Translation, by: str) -> None:
        """Puts the translation into the journal. by: who made it."""
        self.task.journal.add(
            {
                "key": f"{self.key:016x}",
                "source": self.task.source,
                "row": self.i,
                "images": self.task.images(self.i),
                "english": self.english,
                "chinese": translation.chinese,
                "reasons": translation.reasons,
                "by": by,
                "glossary": self.task.glossary_digest,
            }
        )


@dataclass(frozen=True)
class FileWork:
    """What is to be done of one file."""

    task: Task
    # of every row
    keys: np.ndarray
    # numbers of the rows to translate
    rows: np.ndarray
    # texts, each counted once: finished before, and characters of those to translate
    n_done: int
    n_characters: int

    def each(self) -> Iterator[Work]:
        """The rows, read when they are asked for."""
        for i in map(int, self.rows):
            yield Work(self.task, i, self.task.english(i), int(self.keys[i]))

    def n_open(self) -> int:
        """How many of the rows the journal does not have."""
        return int((~self.task.journal.has(self.keys[self.rows])).sum())


def work_of(task: Task, progress: tqdm) -> FileWork:
    """Which rows of a file are to be translated, by its journal."""
    keys, sizes = task.survey(progress)
    # equal texts are translated once, and alike
    first = np.unique(keys, return_index=True)[1]
    first = first[keys[first] != 0]
    done = task.journal.has(keys[first])
    rows = first[~done]
    # in any order: rows that an endpoint refuses often stand together, and must not look like an
    # endpoint that refuses all
    shuffled = np.random.default_rng().permutation(rows)
    return FileWork(task, keys, shuffled, int(done.sum()), int(sizes[rows].sum()))


def plan_work(tasks: list[Task], glossary: Glossary, retry_rejected: bool) -> list[FileWork]:
    """Reads journals and files: what is to be done of each."""

    def counts(line: dict[str, Any]) -> bool:
        is_retried = retry_rejected and bool(line["reasons"])
        return glossary.is_kept_in(line) and not is_retried

    plan = []
    n_rows = sum(len(task.records) for task in tasks)
    with tqdm(total=n_rows, desc="reading", unit=" rows", disable=None) as bar:
        for task in tasks:
            task.journal.load(counts)
            task.sign()
            if task.journal.damaged:
                print(
                    f"{task.journal.path}: {task.journal.damaged} damaged lines: "
                    "their rows are translated again",
                    file=sys.stderr,
                )
            plan.append(work_of(task, bar))
    return plan


def each_of(plan: Iterable[FileWork]) -> Iterator[Work]:
    """All rows of all files."""
    for file in plan:
        yield from file.each()


# --- 3. finished translations ---------------------------------------------------------------------


def readable_record(records: Records, i: int) -> dict[str, Any] | None:
    """Record i, or None for one that cannot be read."""
    try:
        return records.record(i)
    except BadRow:
        return None


class GivenPairs:
    """Translations by text: rows {english, chinese}, each a text or {field: text}. A journal is
    such a file. Of equal texts the last counts; 16 bytes of memory a text."""

    def __init__(self, records: Records, english: str, chinese: str):
        """english, chinese: the two columns, as they are written there."""
        self.records = records
        self.english = english
        self.chinese = chinese
        # key of each English text, and the record it stands in
        keys = array("Q")
        rows = array("q")
        for i in range(len(records)):
            for text in self._pairs(readable_record(records, i) or {}):
                keys.append(text_key(text))
                rows.append(i)
        backwards = np.array(keys, dtype=np.uint64)[::-1]
        self.keys, last = np.unique(backwards, return_index=True)
        self.rows = np.array(rows, dtype=np.int64)[::-1][last]

    def _pairs(self, record: dict[str, Any]) -> dict[str, str]:
        """{English: Chinese} of one record."""
        english = record.get(self.english)
        chinese = record.get(self.chinese)
        if isinstance(english, str) and isinstance(chinese, str):
            return {clean_text(english): clean_text(chinese)}
        pairs = {}
        if isinstance(english, dict) and isinstance(chinese, dict):
            for name, text in english.items():
                translated = chinese.get(name)
                if isinstance(text, str) and isinstance(translated, str):
                    pairs[clean_text(text)] = clean_text(translated)
        return pairs

    def _find_text(self, text: str) -> str | None:
        k = int(np.searchsorted(self.keys, np.uint64(text_key(text))))
        if k == len(self.keys):
            return None
        return self._pairs(self.records.record(int(self.rows[k]))).get(text)

    def find(self, work: Work) -> dict[str, str] | None:
        """The Chinese of a row, when all of its texts are there."""
        chinese = {}
        for name, text in work.english.items():
            translated = self._find_text(text)
            if translated is None:
                return None
            chinese[name] = translated
        return chinese


class GivenFile:
    """Translations by place: the raw file itself with Chinese in place, row by row."""

    def __init__(self, records: Records):
        self.records = records

    def find(self, work: Work) -> dict[str, str] | None:
        """The Chinese of a row. ValueError when the same row there has other pictures."""
        task = work.task
        try:
            row = task.row(self.records.record(work.i))
            raw = task.row(task.records.record(work.i))
        except BadRow:
            return None
        if row.images != raw.images:
            raise ValueError(
                f"{self.records.path}: row {work.i} has other pictures ({', '.join(row.images)}) "
                f"than the same row of {task.records.path}: "
                "the rows must stand in the same order"
            )
        return {name: row.texts.get(name, "") for name in work.english}


def given_translations(path: str, tasks: list[Task], encoding: str) -> GivenPairs | GivenFile:
    """Finished translations from a file. ValueError for one of neither form."""
    records = Records(path, encoding)
    for i in range(min(len(records), 100)):
        names = {name.lower(): name for name in readable_record(records, i) or {}}
        if "english" in names and "chinese" in names:
            return GivenPairs(records, names["english"], names["chinese"])
    if len(tasks) != 1 or len(records) != len(tasks[0].records):
        raise ValueError(
            f"{path}: finished translations are rows of `english` and `chinese`, "
            "or the one raw file itself, row by row, with Chinese in place"
        )
    return GivenFile(records)


def take_given(
    plan: list[FileWork],
    given: GivenPairs | GivenFile,
    glossary: Glossary,
    *,
    by: str,
    is_last: bool,
) -> list[FileWork]:
    """Puts finished translations into the journals. -> what is left to do. is_last: nobody else is
    asked, so that one that fails the rules is the row's last, too."""
    n_rows = sum(len(file.rows) for file in plan)
    rest = []
    with tqdm(total=n_rows, desc="taking", unit=" rows", disable=None) as bar:
        for file in plan:
            left = array("q")
            for work in file.each():
                chinese = given.find(work)
                reasons = quality(work.english, chinese, glossary.terms) if chinese else []
                if chinese is None or (reasons and not is_last):
                    left.append(work.i)
                else:
                    work.is_done_by(Translation(chinese, reasons), by)
                bar.update()
            rest.append(replace(file, rows=np.array(left, dtype=np.int64)))
    return rest


# --- 4. the endpoint ------------------------------------------------------------------------------


@dataclass
class Refused:
    """A row that the endpoint will not take, now or another time."""

    work: Work
    reason: str


class Asking:
    """Rows asked for at an endpoint, a few at a time; each finished one goes into its journal."""

    def __init__(self, endpoint: Endpoint, glossary: Glossary, attempts: int):
        self.endpoint = endpoint
        self.glossary = glossary
        self.attempts = attempts
        # reasons of the rows that are to be asked for again another time
        self.failed: Counter[str] = Counter()
        self.refused: list[Refused] = []
        # why nothing more can be asked for
        self.fault: EndpointFailed | None = None

    async def ask_row(self, work: Work) -> None:
        """One row: into the journal, or among the failed or the refused."""
        try:
            translation = await translate_row(
                self.endpoint, work.english, self.glossary, self.attempts
            )
        except RequestFailed as error:
            if error.final:
                self.refused.append(Refused(work, one_line(error)))
            else:
                self.failed[one_line(error)] += 1
        else:
            work.is_done_by(translation, self.endpoint.model)

    def settle(self, any_done: bool) -> None:
        """A row that the endpoint refuses for good is finished, too: rejected."""
        for refused in self.refused:
            if self.endpoint.answered or any_done:
                translation = Translation({}, [f"not translated: {refused.reason}"])
                refused.work.is_done_by(translation, self.endpoint.model)
            else:
                # where nothing was ever answered, the fault is not the row's
                self.failed[refused.reason] += 1

    def run(self, plan: list[FileWork], n_done: int) -> None:
        """Asks for every row of the plan, until the endpoint fails. n_done: finished before."""
        n_todo = sum(len(file.rows) for file in plan)
        with tqdm(
            total=n_todo + n_done,
            initial=n_done,
            desc="translating",
            unit=" rows",
            disable=None,
            smoothing=0.05,
        ) as bar:
            try:
                asyncio.run(ask_many(self.endpoint, each_of(plan), self.ask_row, bar))
            except EndpointFailed as error:
                self.fault = error
            finally:
                self.settle(any_done=bool(n_done))
        print(self.endpoint.summary(), file=sys.stderr)


def what_is_sent(plan: list[FileWork], n_characters: int, with_glossary: bool) -> str:
    """For the question whether it may be sent."""
    fields = set()
    for file in plan:
        fields |= file.task.fields
    said = ", ".join(sorted(fields, key=list(FIELDS).index))
    n_rows = sum(len(file.rows) for file in plan)
    names = ", ".join(file.task.records.path.name for file in plan)
    terms = ", and glossary terms" if with_glossary else ""
    return (
        f"the texts ({said}) of {n_rows:,} rows of {names}, some {n_characters:,} "
        f"characters{terms}. No pictures, ids or file names are sent."
    )


# --- 5. the command -------------------------------------------------------------------------------


def add_command(commands: argparse._SubParsersAction) -> None:
    about = (
        "English to Chinese: OUT/<same name and form>, a journal beside it; "
        "stopped at any moment, the same command goes on"
    )
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
        help="finished translations instead of an endpoint (with --base-url: before it): "
        "rows of english and chinese, a journal, or the raw file with Chinese in place",
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
    glossary = open_glossary(args.glossary, args.encoding)
    raw_files = open_sources(
        args.raw_files, RAW, own_columns=args.own_columns, encoding=args.encoding
    )
    tasks = open_tasks(raw_files, Path(args.out), named_columns(args.own_columns), glossary)
    try:
        given = None
        if args.translations:
            given = given_translations(args.translations, tasks, args.encoding)
        # translations given are all there is, unless an endpoint is named with them
        is_asked = bool(args.base_url or not given)

        plan = plan_work(tasks, glossary, args.retry_rejected)
        n_done = sum(file.n_done for file in plan)
        n_characters = sum(file.n_characters for file in plan)
        rest = plan
        if given:
            by = Path(args.translations).name
            rest = take_given(plan, given, glossary, by=by, is_last=not is_asked)
        asking = None
        if is_asked and any(len(file.rows) for file in rest):
            asking = Asking(Endpoint(endpoint_options), glossary, args.attempts)
            asking.endpoint.confirm(what_is_sent(rest, n_characters, bool(glossary.terms)))
            asking.run(rest, n_done)

        for task in tasks:
            task.journal.sync()
            task.journal.load(glossary.is_kept_in)
        if asking and (asking.fault or asking.failed):
            report_open(plan, asking)
            is_dead = asking.fault and not n_done and not asking.endpoint.answered
            return 2 if is_dead else 1
        for task in tasks:
            report_outcome(task, task.finish())
        return 0
    finally:
        for task in tasks:
            task.journal.close()


def open_tasks(
    raw_files: list[RawFile], out: Path, columns: dict[str, tuple[str, ...]], glossary: Glossary
) -> list[Task]:
    """A task for each file, its journal open. ValueError when two would be written as one."""
    names = [file.records.path.name for file in raw_files]
    if len(set(names)) < len(names):
        raise ValueError(
            f"two files are named {max(names, key=names.count)}: translate them into two folders"
        )
    out.mkdir(parents=True, exist_ok=True)
    tasks = []
    for file in raw_files:
        tasks.append(Task(file.source, file.records, out, columns, glossary.digest))
    return tasks


def report_open(plan: list[FileWork], asking: Asking) -> None:
    """How many rows are still to be translated, and why."""
    n_open = sum(file.n_open() for file in plan)
    if asking.fault:
        why = one_line(asking.fault)
    else:
        why = ", ".join(f"{reason} ({n})" for reason, n in asking.failed.most_common(3))
    print(
        f"data_prep.py: {n_open:,} rows are still to be translated: {why}. "
        "What is finished is kept: run the same command again",
        file=sys.stderr,
    )


def report_outcome(task: Task, outcome: Outcome) -> None:
    """What became of a file, in one line."""
    n_written = outcome.translated + outcome.chinese
    text = f"{task.out}: {n_written:,} rows of {len(task.records):,}"
    if outcome.chinese:
        text += f" ({outcome.chinese:,} were Chinese already)"
    if outcome.undone:
        text += f"; {outcome.undone:,} without a translation given"
    if outcome.rejected:
        text += f"; {outcome.rejected:,} rejected (in {task.out.name}.rejected.jsonl)"
    if outcome.dropped:
        reasons = [f"{reason} {n:,}" for reason, n in outcome.dropped.most_common()]
        text += f"; left out, by reason: {', '.join(reasons)}"
    print(text)
