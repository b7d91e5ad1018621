"""Test sets as they are published, one Question for each row: what is asked, about which pictures, what is right.

dialogs     .json .jsonl  id, image, conversations [, kind]: the last answer is the one asked for
PMC-VQA     .csv          v1 and v2, English or translated: Figure_path, Question, Choice A … Choice D, Answer [, Answer_label]
SLAKE       .json         img_name, question, answer, q_lang, modality, location, content_type, answer_type
VQA-RAD     .json         image_name, question, answer, image_organ, question_type, answer_type, phrase_type
own         .csv .tsv .json .jsonl  image(s), question, answer
"""

import json
import os
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from chimed.sources import names_in, read_row
from common.files import USER_ERRORS, one_line
from common.rows import BadRow, Records
from common.text import chinese_share, clean_text
from model_io.pixels import find_picture, row_pictures
from model_io.tokens import check_conversation

KINDS = {  # what a set says of its questions: name in the report -> column
    "dialogs": {"kind": "kind"},
    "SLAKE": {
        "answer type": "answer_type",
        "content": "content_type",
        "modality": "modality",
        "organ": "location",
    },
    "VQA-RAD": {"answer type": "answer_type", "content": "question_type", "organ": "image_organ"},
}


@dataclass(slots=True)
class Question:
    id: object  # str or int
    conversation: list  # up to the question; its last turn is the question
    truth: str
    pictures: list  # of Path
    n_images: int | None = None  # as for encode_prompt: None where <image> stands in the text
    kinds: dict = field(default_factory=dict)  # {name in the report: value}
    choices: dict = field(default_factory=dict)  # {letter: text} of a multiple-choice question
    letter: str = ""  # of the right choice

    @property
    def question(self):
        return self.conversation[-1]["value"]

    @property
    def language(self):
        return "Chinese" if chinese_share(self.question) >= 0.3 else "English"


def set_of(records):
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
    raise ValueError(
        f"{records.path}: of no known test set (found: {', '.join(sorted(seen)) or 'nothing readable'}; wanted e.g. image, question, answer; --help lists the sets)"
    )


def read_question(kind, i, record, images):
    """The Question of a record. ValueError (BadRow too) says what is wrong with it."""
    if kind == "dialogs":
        conversation = record.get("conversations")
        check_conversation(conversation)
        if conversation[-1]["from"] != "gpt":
            raise ValueError("the last turn is no answer")
        if not isinstance(record.get("kind", ""), str) or not isinstance(
            record.get("id", i), (str, int)
        ):
            raise ValueError("'kind' is not a text, or 'id' neither text nor number")
        json.dumps(
            record, ensure_ascii=False
        ).encode()  # a text that has no UTF-8 stops here, not when the answers are written
        return Question(
            record.get("id", i),
            conversation[:-1],
            conversation[-1]["value"],
            row_pictures(record, images),
            kinds={"kind": record["kind"]} if "kind" in record else {},
        )
    choices, letter = {}, ""
    if kind == "PMC-VQA":
        row = read_row("pmc-vqa", record)
        question, truth, names, letter = (
            row.texts["question"],
            row.texts["answer"],
            row.images,
            row.letter,
        )
        choices = {
            name[-1].upper(): text for name, text in row.texts.items() if name.startswith("choice_")
        }
        if choices and not letter:
            raise ValueError(f"the answer {truth!r} is none of the options")
        id = clean_text(record.get("index")) or i
    else:
        name, id_name = {
            "SLAKE": ("img_name", "qid"),
            "VQA-RAD": ("image_name", "qid"),
            "own": ("image" if "image" in record else "images", "id"),
        }[kind]
        question, truth, names = (
            clean_text(record.get("question")),
            clean_text(record.get("answer")),
            names_in(record.get(name), r"[;|]" if kind == "own" else None),
        )
        id = clean_text(record.get(id_name)) or i
    if not question or not truth:
        raise ValueError("no question" if not question else "no answer")
    if not names and kind != "own":
        raise ValueError("no picture")
    kinds = {
        label: text
        for label, column in KINDS.get(kind, {}).items()
        if (text := clean_text(record.get(column)))
    }
    pictures = [Path(find_picture([name], (images,))[0]) for name in names]
    return Question(
        id,
        [{"from": "human", "value": question}],
        truth,
        pictures,
        len(pictures),
        kinds,
        choices,
        letter,
    )


def readable(records):
    """The records that can be read at all."""
    for i in range(len(records)):
        try:
            yield records.record(i)
        except BadRow:
            pass


def is_test(record):
    return clean_text(record.get("phrase_type")).startswith("test")


def read_testset(path, images, skip_bad=False, encoding="utf-8"):
    """(name of the set, [Question], Counter of what was left out) of a file. ValueError names file and row; with skip_bad such rows are left out and counted."""
    records = Records(path, encoding)
    kind, questions, left_out = set_of(records), [], Counter()
    only_test = kind == "VQA-RAD" and any(
        is_test(record) for record in readable(records)
    )  # the published file holds both halves
    for i in range(len(records)):
        try:
            record = records.record(i)
            if only_test and not is_test(record):
                left_out["not marked as test"] += 1
                continue
            questions.append(read_question(kind, i, record, os.path.realpath(images)))
        except USER_ERRORS as error:
            if not skip_bad:
                raise ValueError(
                    f"{path}: row {i}: {one_line(error)} (--skip-bad leaves such rows out)"
                ) from None
            left_out[one_line(error).partition(":")[0]] += 1
    if not questions:
        raise ValueError(
            f"{path}: no questions in it"
            + (
                f" ({', '.join(f'{reason} x {n}' for reason, n in left_out.most_common(3))})"
                if left_out
                else ""
            )
        )
    return kind, questions, left_out
