"""The raw sets as they are found: records of a file by byte offset, one Row for each, and the record again with Chinese in it.

PMC-OA          .jsonl        image, caption [, pmcid, url_name, …]
PMC-CaseReport  .csv .json .jsonl  PMC_id, context, question, answer, inline, img_ref (a string that holds a Python list of names)
PMC-VQA v1, v2  .csv          Figure_path, Question, Answer (text or letter), Choice A … Choice D [, Answer_label, Caption, index, split]
ChiMed-VL       .json .jsonl  id, image, conversations: dialogs already, with a picture or without
own             .csv .tsv .json .jsonl  image(s), question, answer or caption; columns named by flags
"""

import argparse
import ast
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from chimed.prompts import CAPTION, CONTEXT, VQA
from common.files import one_line
from common.rows import BadRow, Records
from common.text import clean_text
from qilin_min import IMAGE_TOKEN

# --- 1. rows: what the sets have in common --------------------------------------------------------------------------

LETTERS = "ABCD"
SOURCES = {  # set: what its records must hold, one of each tuple
    "pmc-oa": [("image",), ("caption",)],
    "pmc-casereport": [("PMC_id",), ("img_ref",), ("question", "context", "inline")],
    "pmc-vqa": [("Figure_path",), ("Question",), ("Answer", "Anwser", "Answer_label")],
    "chimed-alignment": [("conversations",)],
    "chimed-instruction": [("conversations",)],
    "own": [],
}
OWN_COLUMNS = {
    "image": ("image", "images"),
    "question": ("question",),
    "answer": ("answer",),
    "caption": ("caption",),
    "id": (),
    "group": (),
}  # of --own, unless named by flags


@dataclass(slots=True)
class Row:
    """A row of any set. texts: context, inline, caption, question, answer, choice_a … choice_d, those it has. article: what must stay on one side of a split."""

    source: str
    images: list  # names as written; names[i] of candidates() are tried in turn
    texts: dict
    article: str = ""
    letter: str = ""  # of the right choice
    id: str = ""
    conversations: list = field(default_factory=list)
    test: bool = False  # marked as test data by its set


def names_in(value, separators=None):
    """Picture names in a value: a list, a string that holds a Python or JSON list, names between `separators`, or one name. BadRow."""
    if (
        isinstance(value, str)
        and value.strip()[:1] == "["
        and (value.strip()[-1] == "]" or not separators)
    ):
        try:
            value = ast.literal_eval(value.strip()[:100_000])
        except (ValueError, SyntaxError, RecursionError, MemoryError, TypeError):
            raise BadRow("list of pictures cannot be read") from None
    if isinstance(value, str):
        value = re.split(separators, value) if separators else [value]
    if isinstance(value, int) and not isinstance(value, bool):
        value = [value]
    if value is None or value != value:
        return []
    if not isinstance(value, (list, tuple)) or not all(
        isinstance(name, (str, int)) for name in value
    ):
        raise BadRow("list of pictures cannot be read")
    if any(isinstance(name, int) and abs(name) > 10**18 for name in value):
        raise BadRow("list of pictures cannot be read")
    names = list(dict.fromkeys(str(name).strip() for name in value if str(name).strip()))
    if any(
        "\ud800" <= c <= "\udfff" for name in names for c in name
    ):  # half a surrogate pair: no file name
        raise BadRow("list of pictures cannot be read")
    return names


def article_of(text):
    """PMC number in a text, as PMC123, or ""."""
    match = re.search(r"PMC[-_ ]?(\d+)", str(text), re.IGNORECASE)
    return f"PMC{match[1]}" if match else ""


def candidates(row, name):
    """File names a picture may have: PMC-CaseReport's references become {PMC_id}_{reference}.jpg on disk."""
    if row.source != "pmc-casereport":
        return [name]
    whole = re.search(r"\.(?:jpe?g|png|gif|tiff?|webp|bmp)$", name, re.IGNORECASE)
    stems = (
        [name]
        if article_of(name)
        else [f"{row.article}_{name}", f"{row.article.removeprefix('PMC')}_{name}"]
    )
    return (
        [*stems, name]
        if whole
        else [f"{stem}{suffix}" for suffix in (".jpg", "") for stem in stems]
    )


def strip_mark(text, letter):
    """`Q: text`, `A: text`, `问：text` without the mark; only the letters given count as marks."""
    return re.sub(rf"^\s*(?:{letter})\s*[:\uff1a]\s*", "", text, flags=re.IGNORECASE)


def read_choices(record):
    """{A: text, …} of a PMC-VQA record: ` A: text ` loses its letter and blanks."""
    choices = {}
    for letter in LETTERS:
        text = clean_text(record.get(f"Choice {letter}"))
        if text:
            choices[letter] = text
    marks = {
        letter: re.match(rf"\(?{letter}\s*([:.)\u3001\uff1a\uff0e\uff09])\s*", text, re.IGNORECASE)
        for letter, text in choices.items()
    }
    lettered = all(
        marks.values()
    )  # a point after a letter is a mark only where all have one: C. albicans keeps its C
    return {
        letter: text[mark.end() :]
        if (mark := marks[letter])
        and (lettered or mark[1] not in ".\uff0e")
        and mark.end() < len(text)
        else text
        for letter, text in choices.items()
    }


def read_letter(record, choices):
    """The letter of the right choice: from Answer_label, from an Answer that is a letter, or from an Answer that is a choice's text; "" without."""
    for name in ("Answer_label", "Answer", "Anwser"):
        text = clean_text(record.get(name))
        match = re.fullmatch(r"\(?([A-D])\)?\s*[:.)\u3001\uff1a\uff0e]?", text, re.IGNORECASE)
        if match:
            if match[1].upper() not in choices:
                raise BadRow("answer letter names no choice")
            return match[1].upper()
    answer = open_answer(record)
    return next(
        (letter for letter, text in choices.items() if text.casefold() == answer.casefold()), ""
    )


def open_answer(record):
    """A PMC-VQA answer given as a text: `B: text` and `text` alike."""
    return re.sub(
        r"^\(?[A-D]\s*[:)\uff1a]\s*", "", clean_text(record.get("Answer", record.get("Anwser")))
    )


def read_row(source, record, columns=OWN_COLUMNS):
    """The Row of a record of `source`. BadRow names what is wrong with it."""

    def get(*names):
        return next((record[name] for name in names if record.get(name) not in (None, "")), "")

    if source.startswith("chimed"):
        return Row(
            source,
            names_in(get("image")),
            {},
            article_of(get("image")),
            id=clean_text(get("id")),
            conversations=record.get("conversations"),
        )
    if source == "pmc-oa":
        images = names_in(get("image"))
        return Row(
            source,
            images,
            {"caption": clean_text(get("caption"))},
            article_of(get("pmcid")) or article_of(f"PMC{get('pmcid')}") or article_of(images[:1]),
        )
    if source == "pmc-casereport":
        number = re.sub(r"\.0$", "", str(get("PMC_id")).strip())  # as pandas writes a number
        inline = get("inline")
        if isinstance(inline, (list, str)) and str(inline).strip().startswith(
            "["
        ):  # several sentences about the same figures
            try:
                inline = " ".join(names_in(inline))
            except BadRow:
                pass  # a sentence may begin with a bracket
        texts = {
            "context": clean_text(get("context")),
            "inline": clean_text(inline),
            "question": strip_mark(clean_text(get("question")), "Q|问|问题"),
            "answer": strip_mark(clean_text(get("answer")), "A|答|答案|回答"),
        }
        return Row(
            source,
            names_in(get("img_ref")),
            texts,
            article_of(number) or (f"PMC{number}" if number.isdigit() else number),
        )
    if source == "pmc-vqa":
        choices = read_choices(record)
        letter = read_letter(record, choices)
        texts = {
            "caption": clean_text(get("Caption")),
            "question": clean_text(get("Question")),
            "answer": choices[letter] if letter else open_answer(record),
            **{f"choice_{letter.lower()}": text for letter, text in choices.items()},
        }
        images = names_in(get("Figure_path"))
        return Row(
            source,
            images,
            texts,
            article_of(images[:1]),
            letter,
            test=clean_text(get("split")).lower() == "test",
        )
    texts = {name: clean_text(get(*columns[name])) for name in ("question", "answer", "caption")}
    group = (
        re.sub(r"\.0$", "", clean_text(get(*columns["group"])).casefold())
        if columns["group"]
        else ""
    )
    return Row(
        source,
        names_in(get(*columns["image"]), r"[;|]"),
        texts,
        f"own {group}" if group else "",
        id=clean_text(get(*columns["id"])) if columns["id"] else "",
    )


def to_translate(row):
    """The texts of a row that a translator is sent: an answer that is one of the choices is translated as that choice, or it would get two names."""
    return {
        name: text
        for name, text in row.texts.items()
        if text and not (name == "answer" and row.letter)
    }


def put_texts(source, record, row, chinese, columns=OWN_COLUMNS):
    """The record with `chinese` ({field: text}) in place of its texts: same columns, letters and pictures untouched."""
    record = dict(record)

    def put(text, *names):
        for name in names:
            if record.get(name) not in (None, ""):
                record[name] = text
                return

    for name, text in chinese.items():
        if name.startswith("choice_"):
            letter = name[-1].upper()
            marked = re.match(
                rf"\(?{letter}\s*[:.)\u3001\uff1a\uff0e\uff09]",
                clean_text(record.get(f"Choice {letter}")),
                re.IGNORECASE,
            )
            put(
                f"{letter}: {text}" if marked else text, f"Choice {letter}"
            )  # or `A. fumigatus` would lose its A when read again
            if (
                row.letter == letter
                and clean_text(record.get("Answer", record.get("Anwser"))).strip("()[]:. ").upper()
                != row.letter
            ):
                put(text, "Answer", "Anwser")
        elif source == "pmc-vqa":
            put(text, *{"answer": ("Answer", "Anwser")}.get(name, (name.capitalize(),)))
        else:
            put(text, *(columns[name] if source == "own" else (name,)))
    return record


class RawFile(NamedTuple):
    """A file of one of the raw sets."""

    source: str  # a name of SOURCES
    records: Records


class UnderName(argparse.Action):
    """An option's value, put into one dictionary with those of its kind, under the name `const`."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        values_by_name = dict(getattr(namespace, self.dest))
        values_by_name[self.const] = values
        setattr(namespace, self.dest, values_by_name)


def add_source_options(parser: argparse.ArgumentParser, sources: Iterable[str]) -> None:
    """--pmc-oa FILE … and the like, the same for every command: args.raw_files, {set: paths}, and,
    where rows of one's own are taken, args.own_columns, {field: column}, and args.encoding."""
    about = {
        "pmc-oa": "PMC-OA, .jsonl",
        "pmc-casereport": "PMC-CaseReport, .csv .json .jsonl",
        "pmc-vqa": "PMC-VQA v1 or v2, .csv",
        "chimed-alignment": "dialogs for stage 1: ChiMed-VL-Alignment.jsonl, or your own",
        "chimed-instruction": "dialogs for stage 2: ChiMed-VL-Instruction.json, -Chat.json",
        "own": "your own .csv .tsv .json .jsonl: image(s) and question + answer, or caption, or both",
    }
    group = parser.add_argument_group(
        "the raw sets (several files each; translated ones have the same form)"
    )
    for source in sources:
        group.add_argument(
            f"--{source}",
            dest="raw_files",
            action=UnderName,
            const=source,
            nargs="+",
            default={},
            metavar="FILE",
            help=about[source],
        )
    if "own" in sources:
        add_column_options(parser)


def add_column_options(parser: argparse.ArgumentParser) -> None:
    """--image-column NAME … and --encoding, of rows of one's own."""
    about = {
        "id": "where a row's id stands (default: rows are numbered)",
        "image": "several in one field: a.png;b.png, or a list (default image or images)",
        "group": "what must stay on one side of --val-fraction, e.g. the patient "
        "(default: the pictures)",
    }
    group = parser.add_argument_group("columns of --own, where they are named otherwise")
    for name, usual in OWN_COLUMNS.items():
        group.add_argument(
            f"--{name}-column",
            dest="own_columns",
            action=UnderName,
            const=name,
            default={},
            metavar="NAME",
            help=about.get(name, f"(default {' or '.join(usual)})"),
        )
    group.add_argument(
        "--encoding", default="utf-8", help="of tables that are not UTF-8, e.g. gb18030"
    )


def named_columns(given: dict[str, str]) -> dict[str, tuple[str, ...]]:
    """OWN_COLUMNS with the names given by options in place."""
    columns = dict(OWN_COLUMNS)
    for name, column in given.items():
        if column:
            columns[name] = (column,)
    return columns


def needed_columns(source: str, given: dict[str, str]) -> list[tuple[str, ...]]:
    """What the records of a set must hold, one of each tuple; given: columns of --own by option."""
    needed = list(SOURCES[source])
    if source != "own":
        return needed
    columns = named_columns(given)
    asked = [name for name in columns if given.get(name)]
    for name in dict.fromkeys(["image", *asked]):
        needed.append(columns[name])
    needed.append((*columns["question"], *columns["caption"]))
    return needed


def open_sources(
    files: dict[str, list[str]],
    sources: Iterable[str],
    *,
    own_columns: dict[str, str],
    encoding: str,
) -> list[RawFile]:
    """The files named on the command line, {set: paths}, in the order of `sources`. ValueError
    names a file that is not what its option says."""
    opened = []
    for source in sources:
        for path in files.get(source, []):
            try:
                records = Records(path, encoding)
            except (LookupError, UnicodeError) as error:
                raise ValueError(f"--encoding {encoding}: {one_line(error)}") from None
            records.require(needed_columns(source, own_columns), f"--{source}")
            opened.append(RawFile(source, records))
    if not opened:
        raise ValueError(f"name a raw set: {', '.join(f'--{source} FILE' for source in sources)}")
    return opened


PROMPTS = sorted(
    (tuple(template.split("{question}")) for template in VQA if template != "{question}"),
    key=lambda parts: -len("".join(parts)),
)


def own_question(text):
    """A question without <image>, the prompt around it and the choices below it; "" where it is the prompt of a caption."""
    text = text.replace(IMAGE_TOKEN, "").strip()
    if text in CAPTION or text in CONTEXT:
        return ""
    for before, after in PROMPTS:
        if (
            text.startswith(before)
            and text.endswith(after)
            and len(text) > len(before) + len(after)
        ):
            text = text[len(before) : len(text) - len(after)]
            break
    return text.split("\n")[0]
