"""Test sets as they are published, one Question for each row: what is asked, about which pictures,
what is right.

dialogs   .json .jsonl   id, image, conversations [, kind]: the last answer is the one asked for
PMC-VQA   .csv           v1 and v2, English or translated:
                         Figure_path, Question, Choice A … Choice D, Answer [, Answer_label]
SLAKE     .json          img_name, question, answer,
                         q_lang, modality, location, content_type, answer_type
VQA-RAD   .json          image_name, question, answer,
                         image_organ, question_type, answer_type, phrase_type
own       .csv .tsv .json .jsonl   image(s), question, answer
"""

import json
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

# of another workshop: PMC-VQA is training data, too, and what its columns mean is said there once
from chimed.sources import read_row
from common.dialogs import read_dialog, read_row_of_dialogs
from common.files import USER_ERRORS, one_line
from common.names import names_in
from common.rows import BadRow, Records
from common.text import chinese_share, clean_text
from model_io.pixels import find_picture, row_pictures
from model_io.tokens import check_conversation
from qilin_min import IMAGE_TOKEN

# what a set says of its questions: name in the report -> column
KINDS = {
    "dialogs": {"kind": "kind"},
    "SLAKE": {
        "answer type": "answer_type",
        "content": "content_type",
        "modality": "modality",
        "organ": "location",
    },
    "VQA-RAD": {
        "answer type": "answer_type",
        "content": "question_type",
        "organ": "image_organ",
    },
}

# --- 1. questions ---------------------------------------------------------------------------------


@dataclass(slots=True)
class Question:
    id: str | int
    conversation: list[dict[str, str]]  # up to the question; its last turn is the question
    truth: str
    pictures: list[Path]
    n_images: int | None = None  # as for encode_prompt: None where <image> stands in the text
    kinds: dict[str, str] = field(default_factory=dict)  # {name in the report: value}
    choices: dict[str, str] = field(default_factory=dict)  # {letter: text}
    letter: str = ""  # of the right choice

    @property
    def question(self) -> str:
        return self.conversation[-1]["value"]

    @property
    def language(self) -> str:
        return "Chinese" if chinese_share(self.question) >= 0.3 else "English"


def by_pictures(asked: dict[Any, Question]) -> dict[Any, Question]:
    """The same, questions about the same pictures beside each other, so that each is computed once;
    in the order in which pictures come first."""
    groups: dict[tuple[Path, ...], dict[Any, Question]] = {}
    for key, question in asked.items():
        groups.setdefault(tuple(question.pictures), {})[key] = question
    together = {}
    for group in groups.values():
        together |= group
    return together


@dataclass(frozen=True, slots=True)
class Turn:
    """One turn of what is asked, with the pictures that belong to it."""

    speaker: str  # human or gpt
    text: str
    pictures: list[Path]


def turns_of(question: Question) -> list[Turn]:
    """What is asked: mostly one turn. Where <image> stands for a picture it is taken out of the
    text."""
    rest = iter(question.pictures)
    turns = []
    for i, turn in enumerate(question.conversation):
        text = turn["value"]
        if question.n_images is None:
            n = text.count(IMAGE_TOKEN)
            text = text.replace(IMAGE_TOKEN, "").strip()
        else:
            n = question.n_images if i == 0 else 0
        turns.append(Turn(turn["from"], text, list(islice(rest, n))))
    return turns


def wording(question: Question) -> str:
    """The question as a page shows it; of a dialog the turns before it, too."""
    lines = []
    for turn in turns_of(question):
        arrow = "\u2192 " if turn.speaker == "gpt" else ""
        lines.append(arrow + turn.text)
    return "\n".join(lines)


# --- 2. rows --------------------------------------------------------------------------------------


def set_of(records: Records) -> str:
    """Which set a file belongs to, by its columns. ValueError when none."""
    seen = records.names_seen()
    if "conversations" in seen:
        return "dialogs"
    if "img_name" in seen and "question" in seen:
        return "SLAKE"
    if "image_name" in seen and "question" in seen:
        return "VQA-RAD"
    if {"Figure_path", "Question"} <= seen:
        return "PMC-VQA"
    if {"question", "answer"} <= seen and seen & {"image", "images"}:
        return "own"
    if holds_dialogs(records):
        return "dialogs"
    found = ", ".join(sorted(seen)) or "nothing readable"
    raise ValueError(
        f"{records.path}: of no known test set (found: {found}; wanted e.g. image, question, "
        "answer; --help lists the sets)"
    )


def holds_dialogs(records: Records) -> bool:
    """Whether the first row holds a dialog under names of its own."""
    try:
        dialog, is_caption = read_row_of_dialogs(records.record(0))
        return len(dialog["conversations"]) > 1 and not is_caption
    except ValueError:
        return False


def read_question(kind: str, i: int, record: dict[str, Any], images: str) -> Question:
    """The Question of record i of a set. ValueError (BadRow too) says what is wrong with it."""
    if kind == "dialogs":
        return question_of_dialog(i, record, images)
    if kind == "PMC-VQA":
        return question_of_pmc_vqa(i, record, images)
    return question_of_columns(kind, i, record, images)


def question_of_dialog(i: int, record: dict[str, Any], images: str) -> Question:
    dialog = read_dialog(record)
    check_conversation(dialog.get("conversations"))
    conversation = dialog["conversations"]
    if conversation[-1]["from"] != "gpt":
        raise ValueError("the last turn is no answer")
    id = record.get("id", i)
    if not isinstance(record.get("kind", ""), str) or not isinstance(id, (str, int)):
        raise ValueError("'kind' is not a text, or 'id' neither text nor number")
    # a text that has no UTF-8 stops here, not when the answers are written
    json.dumps(record, ensure_ascii=False).encode()
    return Question(
        id,
        conversation[:-1],
        conversation[-1]["value"],
        row_pictures(dialog, images),
        kinds={"kind": record["kind"]} if "kind" in record else {},
    )


def question_of_pmc_vqa(i: int, record: dict[str, Any], images: str) -> Question:
    row = read_row("pmc-vqa", record)
    truth = row.texts["answer"]
    choices = {}
    for name, text in row.texts.items():
        if name.startswith("choice_"):
            choices[name.removeprefix("choice_").upper()] = text
    if choices and not row.letter:
        raise ValueError(f"the answer {truth!r} is none of the options")
    id = clean_text(record.get("index")) or i
    question = row.texts["question"]
    check_texts(question, truth)
    if not row.images:
        raise ValueError("no picture")
    pictures = find_pictures(row.images, images)
    return one_turn(id, question, truth, pictures, choices=choices, letter=row.letter)


def question_of_columns(kind: str, i: int, record: dict[str, Any], images: str) -> Question:
    """A row of SLAKE, VQA-RAD or your own: columns as they are."""
    separators = None
    id_column = "qid"
    if kind == "SLAKE":
        picture_column = "img_name"
    elif kind == "VQA-RAD":
        picture_column = "image_name"
    else:
        picture_column = "image" if "image" in record else "images"
        id_column = "id"
        separators = r"[;|]"
    question = clean_text(record.get("question"))
    truth = clean_text(record.get("answer"))
    names = names_in(record.get(picture_column), separators)
    id = clean_text(record.get(id_column)) or i
    check_texts(question, truth)
    if not names and kind != "own":
        raise ValueError("no picture")
    kinds = {}
    for label, column in KINDS.get(kind, {}).items():
        value = clean_text(record.get(column))
        if value:
            kinds[label] = value
    return one_turn(id, question, truth, find_pictures(names, images), kinds=kinds)


def check_texts(question: str, truth: str) -> None:
    if not question:
        raise ValueError("no question")
    if not truth:
        raise ValueError("no answer")


def find_pictures(names: list[str], images: str) -> list[Path]:
    return [Path(find_picture([name], (images,))[0]) for name in names]


def one_turn(
    id: str | int, question: str, truth: str, pictures: list[Path], **more: Any
) -> Question:
    """A question that is text and nothing else, its pictures in front."""
    conversation = [{"from": "human", "value": question}]
    return Question(id, conversation, truth, pictures, len(pictures), **more)


# --- 3. files -------------------------------------------------------------------------------------


def readable_records(records: Records) -> Iterator[dict[str, Any]]:
    """The records that can be read at all."""
    for i in range(len(records)):
        try:
            yield records.record(i)
        except BadRow:
            pass


def is_test(record: dict[str, Any]) -> bool:
    return clean_text(record.get("phrase_type")).startswith("test")


def read_testset(
    path: str | Path, images: str | Path, skip_bad: bool = False, encoding: str = "utf-8"
) -> tuple[str, list[Question], Counter[str]]:
    """(name of the set, its questions, a count of what was left out) of a file.

    ValueError names file and row; with skip_bad such rows are left out and counted."""
    records = Records(path, encoding)
    kind = set_of(records)
    questions = []
    left_out = Counter()
    # the published file of VQA-RAD holds both halves
    only_test = kind == "VQA-RAD" and any(is_test(record) for record in readable_records(records))
    root = os.path.realpath(images)
    for i in range(len(records)):
        try:
            record = records.record(i)
            if only_test and not is_test(record):
                left_out["not marked as test"] += 1
                continue
            questions.append(read_question(kind, i, record, root))
        except USER_ERRORS as error:
            reason = one_line(error)
            if not skip_bad:
                raise ValueError(
                    f"{path}: row {i}: {reason} (--skip-bad leaves such rows out)"
                ) from None
            left_out[reason.partition(":")[0]] += 1
    if not questions:
        reasons = ", ".join(f"{reason} x {n}" for reason, n in left_out.most_common(3))
        raise ValueError(f"{path}: no questions in it" + (f" ({reasons})" if reasons else ""))
    return kind, questions, left_out
