"""The raw sets as they are found: records of a file by byte offset, one Row for each, and the
record again with Chinese in it.

PMC-OA          .jsonl        image, caption [, pmcid, url_name, …]
PMC-CaseReport  .csv .json .jsonl  PMC_id, context, question, answer, inline, img_ref (a string
                              that holds a Python list of names)
PMC-VQA v1, v2  .csv          Figure_path, Question, Answer (text or letter), Choice A … Choice D
                              [, Answer_label, Caption, index, split]
ChiMed-VL       .json .jsonl  id, image, conversations: dialogs already, with a picture or without;
                              or what common/dialogs.py finds under other keys. As released
                              ChiMed-VL-Alignment.jsonl is PMC-OA alone (263,175 rows by its
                              authors' word, no contexts); the Instruction file may be partial
own             .csv .tsv .json .jsonl  image(s), question, answer or caption; columns named by
                              options
"""

import argparse
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from chimed.prompts import CAPTION, CONTEXT, VQA
from common.dialogs import UnknownRow, read_dialog, read_row_of_dialogs
from common.files import one_line
from common.names import PICTURE_SUFFIX, names_in
from common.rows import BadRow, Records
from common.text import clean_text, without_decimals
from qilin_min import IMAGE_TOKEN

# --- 1. rows: what the sets have in common --------------------------------------------------------

LETTERS = "ABCD"
# set: what its records must hold, one of each tuple
SOURCES = {
    "pmc-oa": [("image",), ("caption",)],
    "pmc-casereport": [("PMC_id",), ("img_ref",), ("question", "context", "inline")],
    "pmc-vqa": [("Figure_path",), ("Question",), ("Answer", "Anwser", "Answer_label")],
    # read by what they hold: common/dialogs.py
    "chimed-alignment": [],
    "chimed-instruction": [],
    "own": [],
}
# field: columns of --own it is looked for in, unless one is named by an option
OWN_COLUMNS = {
    "image": ("image", "images"),
    "question": ("question",),
    "answer": ("answer",),
    "caption": ("caption",),
    "id": (),
    "group": (),
}


@dataclass(slots=True)
class Row:
    """A row of any set."""

    # its set, a name of SOURCES
    source: str
    # names as written; those of candidates() are tried in turn
    images: list[str]
    # context, inline, caption, question, answer, choice_a … choice_d: those it has
    texts: dict[str, str]
    # what must stay on one side of a split; "": nothing beside its pictures
    article: str = ""
    # of the right choice; "" where there is none
    letter: str = ""
    # as the set has it; "" where rows are numbered
    id: str = ""
    # turns of a dialog that is one already, as found: nobody has looked at them
    conversations: Any = field(default_factory=list)
    # marked as test data by its set
    test: bool = False


# --- 2. what stands in a field --------------------------------------------------------------------


def first_filled(record: dict, names: Iterable[str]) -> Any:
    """The first of some fields that holds something; "" where none does."""
    for name in names:
        if record.get(name) not in (None, ""):
            return record[name]
    return ""


def article_of(text: Any) -> str:
    """PMC number in a text, as PMC123, or ""."""
    match = re.search(r"PMC[-_ ]?(\d+)", str(text), re.IGNORECASE)
    return f"PMC{match[1]}" if match else ""


def candidates(row: Row, name: str) -> list[str]:
    """File names a picture may have: PMC-CaseReport's references become {PMC_id}_{reference}.jpg on
    disk."""
    if row.source != "pmc-casereport":
        return [name]
    if article_of(name):
        stems = [name]
    else:
        number = row.article.removeprefix("PMC")
        stems = [f"{row.article}_{name}", f"{number}_{name}"]
    if PICTURE_SUFFIX.search(name):
        return [*stems, name]
    return [f"{stem}.jpg" for stem in stems] + stems


def strip_mark(text: str, letter: str) -> str:
    """`Q: text`, `A: text`, `问：text` without the mark; only the letters given count as marks."""
    return re.sub(rf"^\s*(?:{letter})\s*[:\uff1a]\s*", "", text, flags=re.IGNORECASE)


def choice_mark(letter: str, text: str) -> re.Match | None:
    """The letter that stands before a choice, as in `A: text`; its group 1 is the mark after it."""
    return re.match(rf"\(?{letter}\s*([:.)\u3001\uff1a\uff0e\uff09])\s*", text, re.IGNORECASE)


def read_choices(record: dict) -> dict[str, str]:
    """{A: text, …} of a PMC-VQA record: ` A: text ` loses its letter and blanks."""
    choices = {}
    for letter in LETTERS:
        text = clean_text(record.get(f"Choice {letter}"))
        if text:
            choices[letter] = text
    marks = {letter: choice_mark(letter, text) for letter, text in choices.items()}
    is_lettered = all(marks.values())
    return {
        letter: _without_letter(text, marks[letter], is_lettered)
        for letter, text in choices.items()
    }


def _without_letter(text: str, mark: re.Match | None, is_lettered: bool) -> str:
    """A choice without its letter. is_lettered: all choices of the row have one."""
    if mark is None:
        return text
    # a point after a letter is a mark only where all have one: C. albicans keeps its C
    if mark[1] in ".\uff0e" and not is_lettered:
        return text
    rest = text[mark.end() :]
    return rest or text


def read_letter(record: dict, choices: dict[str, str]) -> str:
    """The letter of the right choice: from Answer_label, from an Answer that is a letter, or from
    an Answer that is a choice's text; "" without."""
    for name in ("Answer_label", "Answer", "Anwser"):
        text = clean_text(record.get(name))
        match = re.fullmatch(r"\(?([A-D])\)?\s*[:.)\u3001\uff1a\uff0e]?", text, re.IGNORECASE)
        if match:
            letter = match[1].upper()
            if letter not in choices:
                raise BadRow("answer letter names no choice")
            return letter
    answer = open_answer(record).casefold()
    for letter, text in choices.items():
        if text.casefold() == answer:
            return letter
    return ""


def written_answer(record: dict) -> str:
    """What stands under Answer in a PMC-VQA record; v1 writes Anwser."""
    return clean_text(record.get("Answer", record.get("Anwser")))


def open_answer(record: dict) -> str:
    """A PMC-VQA answer given as a text: `B: text` and `text` alike."""
    return re.sub(r"^\(?[A-D]\s*[:)\uff1a]\s*", "", written_answer(record))


# --- 3. a record -> a Row -------------------------------------------------------------------------


def read_row(source: str, record: dict, columns: dict[str, tuple[str, ...]] = OWN_COLUMNS) -> Row:
    """The Row of a record of `source`. BadRow names what is wrong with it."""
    if source.startswith("chimed"):
        return read_published(source, record)
    if source == "pmc-oa":
        return read_pmc_oa(record)
    if source == "pmc-casereport":
        return read_case(record)
    if source == "pmc-vqa":
        return read_pmc_vqa(record)
    return read_own(record, columns)


def read_published(source: str, record: dict) -> Row:
    """A Row of ChiMed-VL: a dialog, or a caption, which gets a prompt like those of PMC-OA.
    BadRow."""
    try:
        dialog, is_caption = read_row_of_dialogs(record)
    except UnknownRow as error:
        raise BadRow(str(error)) from None
    image = first_filled(dialog, ["image"])
    texts = {}
    if is_caption:
        texts["caption"] = clean_text(dialog["conversations"][1]["value"])
    return Row(
        source=source,
        images=names_in(image),
        texts=texts,
        article=article_of(image),
        id=clean_text(first_filled(dialog, ["id"])),
        conversations=dialog["conversations"],
    )


def read_pmc_oa(record: dict) -> Row:
    """A Row of PMC-OA. BadRow."""
    images = names_in(first_filled(record, ["image"]))
    caption = clean_text(first_filled(record, ["caption"]))
    number = first_filled(record, ["pmcid"])
    article = article_of(number) or article_of(f"PMC{number}") or article_of(images[:1])
    return Row(source="pmc-oa", images=images, texts={"caption": caption}, article=article)


def read_case(record: dict) -> Row:
    """A Row of PMC-CaseReport. BadRow."""
    question = clean_text(first_filled(record, ["question"]))
    texts = {
        "context": clean_text(first_filled(record, ["context"])),
        "inline": clean_text(joined_sentences(first_filled(record, ["inline"]))),
        "question": strip_mark(question, "Q|问|问题"),
        "answer": strip_mark(clean_text(first_filled(record, ["answer"])), "A|答|答案|回答"),
    }
    number = without_decimals(str(first_filled(record, ["PMC_id"])).strip())
    article = article_of(number)
    if not article:
        article = f"PMC{number}" if number.isdigit() else number
    images = names_in(first_filled(record, ["img_ref"]))
    return Row(source="pmc-casereport", images=images, texts=texts, article=article)


def joined_sentences(inline: Any) -> Any:
    """The inline text of a case report, where it is a list of several sentences about the same
    figures as one text; else what it is."""
    if not isinstance(inline, (list, str)) or not str(inline).strip().startswith("["):
        return inline
    try:
        return " ".join(names_in(inline))
    except BadRow:
        # a sentence may begin with a bracket
        return inline


def read_pmc_vqa(record: dict) -> Row:
    """A Row of PMC-VQA. BadRow."""
    choices = read_choices(record)
    right = read_letter(record, choices)
    texts = {
        "caption": clean_text(first_filled(record, ["Caption"])),
        "question": clean_text(first_filled(record, ["Question"])),
        "answer": choices[right] if right else open_answer(record),
    }
    for letter, text in choices.items():
        texts[f"choice_{letter.lower()}"] = text
    images = names_in(first_filled(record, ["Figure_path"]))
    return Row(
        source="pmc-vqa",
        images=images,
        texts=texts,
        article=article_of(images[:1]),
        letter=right,
        test=clean_text(first_filled(record, ["split"])).lower() == "test",
    )


def read_own(record: dict, columns: dict[str, tuple[str, ...]]) -> Row:
    """A Row of one's own. columns: where each field of OWN_COLUMNS is looked for. BadRow."""
    texts = {}
    for name in ("question", "answer", "caption"):
        texts[name] = clean_text(first_filled(record, columns[name]))
    group = clean_text(first_filled(record, columns["group"])).casefold()
    group = without_decimals(group)
    return Row(
        source="own",
        images=names_in(first_filled(record, columns["image"]), r"[;|]"),
        texts=texts,
        article=f"own {group}" if group else "",
        id=clean_text(first_filled(record, columns["id"])),
    )


# --- 4. translation: what is sent, and the record with Chinese in it ------------------------------


def to_translate(row: Row) -> dict[str, str]:
    """The texts of a row that a translator is sent: an answer that is one of the choices is
    translated as that choice, or it would get two names."""
    texts = {name: text for name, text in row.texts.items() if text}
    if row.letter:
        texts.pop("answer", None)
    return texts


def put_texts(
    source: str,
    record: dict,
    row: Row,
    chinese: dict[str, str],
    columns: dict[str, tuple[str, ...]] = OWN_COLUMNS,
) -> dict:
    """The record with `chinese` ({field: text}) in place of its texts: same columns, letters and
    pictures untouched."""
    record = dict(record)
    for name, text in chinese.items():
        if name.startswith("choice_"):
            _put_choice(record, row, name[-1].upper(), text)
        elif source == "own":
            _put(record, columns[name], text)
        elif source == "pmc-vqa" and name == "answer":
            _put(record, ("Answer", "Anwser"), text)
        elif source == "pmc-vqa":
            _put(record, (name.capitalize(),), text)
        else:
            _put(record, (name,), text)
    return record


def _put(record: dict, names: Iterable[str], text: str) -> None:
    """Puts a text in place of the first of these fields that holds something."""
    for name in names:
        if record.get(name) not in (None, ""):
            record[name] = text
            return


def _put_choice(record: dict, row: Row, letter: str, text: str) -> None:
    column = f"Choice {letter}"
    # or `A. fumigatus` would lose its A when read again
    is_marked = choice_mark(letter, clean_text(record.get(column)))
    _put(record, (column,), f"{letter}: {text}" if is_marked else text)
    if row.letter != letter:
        return
    # an answer that is a letter stays one
    answer = written_answer(record).strip("()[]:. ").upper()
    if answer != row.letter:
        _put(record, ("Answer", "Anwser"), text)


# --- 5. options: which files ----------------------------------------------------------------------


class RawFile(NamedTuple):
    """A file of one of the raw sets."""

    source: str  # a name of SOURCES
    records: Records


class UnderName(argparse.Action):
    """An option's value, put into one dictionary with those of its kind, under the name `const`."""

    def __call__(self, parser, namespace, values, option_string=None):
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
        "chimed-alignment": "dialogs or captions for stage 1: ChiMed-VL-Alignment.jsonl (as "
        "released PMC-OA alone, no contexts), or your own",
        "chimed-instruction": "dialogs for stage 2: ChiMed-VL-Instruction.json (it may be "
        "partial), -Chat.json",
        "own": "your own .csv .tsv .json .jsonl: image(s) and question + answer, or caption, "
        "or both",
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
            if source.startswith("chimed"):
                check_published(records)
            opened.append(RawFile(source, records))
    if not opened:
        raise ValueError(f"name a raw set: {', '.join(f'--{source} FILE' for source in sources)}")
    return opened


def check_published(records: Records) -> None:
    """ValueError unless one of a file's first rows holds a dialog or a caption: names the keys."""
    problem = "nothing readable"
    for _, raw in records.read(0, 100):
        try:
            read_dialog(records.parse(raw))
            return
        except (BadRow, UnknownRow) as error:
            problem = str(error)
    raise ValueError(f"{records.path}: {problem}")


# --- 6. dialogs as they are built: back to what was asked -----------------------------------------


def _prompt_parts() -> list[tuple[str, str]]:
    """What stands before and after the question in each prompt of VQA, the longest prompt first."""
    parts = []
    for template in VQA:
        if template != "{question}":
            before, after = template.split("{question}")
            parts.append((before, after))
    return sorted(parts, key=lambda part: -len(part[0] + part[1]))


PROMPT_PARTS = _prompt_parts()


def own_question(text: str) -> str:
    """A question without <image>, the prompt around it and the choices below it; "" where it is the
    prompt of a caption."""
    text = text.replace(IMAGE_TOKEN, "").strip()
    if text in CAPTION or text in CONTEXT:
        return ""
    for before, after in PROMPT_PARTS:
        n_prompt = len(before) + len(after)
        if text.startswith(before) and text.endswith(after) and len(text) > n_prompt:
            text = text[len(before) : len(text) - len(after)]
            break
    return text.split("\n")[0]
