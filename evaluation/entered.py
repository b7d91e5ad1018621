"""Answers that a system gave elsewhere, entered as a file: whatever runs a model that is no layout
of ours (Qwen-VL-Chat, VisCPM-Chat), or the paper's own cases, typed in by whoever has them."""

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.names import all_names_in
from common.rows import BadRow, Records, folded
from common.text import clean_text, without_decimals
from evaluation.testsets import Question
from qilin_min import IMAGE_TOKEN

# names that are met in the field, the first that a row has counts. Beside a prediction, "answer" is
# the truth: it comes after all names that only a model's answer has
ID_NAMES = ("id", "question_id", "questionid", "qid", "index")
QUESTION_NAMES = ("question", "prompt", "query", "问题")
PICTURE_NAMES = ("image", "images", "image_path", "figure_path", "img_name", "image_name", "图片")
ANSWER_NAMES = (
    "prediction",
    "predicted",
    "pred",
    "model_answer",
    "response",
    "output",
    "回答",
    "answer",
    "答案",
    "text",
)


@dataclass(frozen=True, slots=True)
class EnteredAnswer:
    """A row of a file of answers; "" for what it does not say."""

    row: int
    id: str
    question: str
    pictures: tuple[str, ...]  # their names, without folders
    text: str

    def agrees(self, asked: str, question: Question) -> bool:
        """Whether what the row says of the question, beside its id, is what the question is."""
        names = tuple(path.name for path in question.pictures)
        is_same_picture = not self.pictures or not names or self.pictures == names
        return self.question in ("", asked) and is_same_picture


class EnteredAnswers:
    """A file of answers, by id, or by question where a row has no id."""

    def __init__(self, path: Path, rows: list[EnteredAnswer]):
        self.path = path
        self.rows = rows
        self.by_key: dict[tuple[str, str], list[EnteredAnswer]] = {}
        for row in rows:
            key = ("id", row.id) if row.id else ("question", row.question)
            self.by_key.setdefault(key, []).append(row)

    def text_of(self, question: Question) -> str:
        """What is said to a question. ValueError where nothing is, or two things are."""
        asked = plain(question.question)
        of_id = self.by_key.get(("id", str(question.id)), [])
        candidates = [*of_id, *self.by_key.get(("question", asked), [])]
        found = [row for row in candidates if row.agrees(asked, question)]
        texts = {row.text for row in found}
        if not texts and of_id:
            raise ValueError(
                f"{self.path}: row {of_id[0].row} has this id, but another question or picture"
            )
        if not texts:
            raise ValueError(f"no answer in {self.path}")
        if len(texts) > 1:
            numbers = ", ".join(str(row.row) for row in found[:5])
            raise ValueError(f"{len(texts)} answers in {self.path}, rows {numbers}")
        return texts.pop()

    def check(self, questions: Iterable[Question]) -> str:
        """What is to be said of the rows that answer none of a test set's questions, "" where all
        do. ValueError where an id is that of several questions, and nothing else tells them
        apart."""
        n_with_id = Counter(str(question.id) for question in questions)
        unknown = 0
        for row in self.rows:
            if row.id and not row.question and n_with_id[row.id] > 1:
                raise ValueError(
                    f"{self.path}: row {row.row}: {n_with_id[row.id]} questions of the test set "
                    f"have the id {row.id!r}: give the question's text, too"
                )
            unknown += bool(row.id) and row.id not in n_with_id
        if unknown:
            return f"{unknown:,} of {len(self.rows):,} answers are of no question of the test set"
        return ""


def plain(text: str) -> str:
    """A question's words alone, as they are compared."""
    return " ".join(clean_text(text.replace(IMAGE_TOKEN, " ")).split())


def read_entered(place: str, encoding: str) -> EnteredAnswers:
    """The answers of FILE or of FILE#KEY, the key under which they stand. ValueError names what
    the file lacks."""
    path = Path(place)
    key = ""
    if not path.is_file() and "#" in place:
        name, _, key = place.rpartition("#")
        path = Path(name)
    records = Records(path, encoding)
    rows = []
    # in one go: a file that is opened anew for each row takes minutes where it has a million
    for i, raw in records.read(0, len(records)):
        try:
            fields = folded(records.parse(raw))
            if is_unanswered(fields, key):
                continue
            rows.append(entered_row(i, fields, key))
        except BadRow as error:
            raise ValueError(f"{path}: row {i}: {error}") from None
    if not rows:
        raise ValueError(f"{path}: no answer in it")
    return EnteredAnswers(path, rows)


def is_unanswered(fields: dict[str, Any], key: str) -> bool:
    """Whether a row has a place for an answer and none in it, as a run leaves it that was refused
    or cut off: a null, an empty cell, a line of predictions.jsonl that was left out."""
    if "left_out" in fields:
        return True
    names = (key.lower(),) if key else ANSWER_NAMES
    has_place = any(name in fields for name in names)
    return has_place and "seen" not in fields and first_of(fields, names) is None


def entered_row(i: int, fields: dict[str, Any], key: str) -> EnteredAnswer:
    """A folded record as an EnteredAnswer. key: where its answer stands, or "". BadRow."""
    answer = answer_in(fields, key)
    row_id = first_of(fields, ID_NAMES)
    question = first_of(fields, QUESTION_NAMES)
    if row_id is None and question is None:
        found = ", ".join(map(repr, fields)) or "none"
        raise BadRow(f"neither an id nor a question: its keys are {found}")
    return EnteredAnswer(
        row=i,
        id=without_decimals(clean_text(row_id)),
        question=plain(str(question or "")),
        pictures=picture_names_in(first_of(fields, PICTURE_NAMES)),
        text=writable(answer),
    )


def answer_in(fields: dict[str, Any], key: str) -> str:
    """The answer of a row. Our own predictions.jsonl has two, with the picture under `seen` and
    without it under `blind`. BadRow."""
    if key:
        answer = fields.get(key.lower())
    elif isinstance(fields.get("seen"), dict):
        answer = fields["seen"]
    else:
        answer = first_of(fields, ANSWER_NAMES)
    if isinstance(answer, dict):
        answer = answer.get("answer")
    if not isinstance(answer, (str, int, float)) or isinstance(answer, bool):
        found = ", ".join(map(repr, fields)) or "none"
        raise BadRow(f"no answer under {key or 'a usual name'!r}: its keys are {found}")
    return str(answer)


def first_of(fields: dict[str, Any], names: tuple[str, ...]) -> Any:
    """What stands under the first of these names that a row has; None without."""
    for name in names:
        value = fields.get(name)
        # nan, which alone is not itself: as pandas writes a gap
        is_blank = isinstance(value, str) and not value.strip()
        is_gap = value is None or is_blank or value != value
        if not is_gap:
            return value
    return None


def picture_names_in(value: Any) -> tuple[str, ...]:
    """Picture names in a field, without their folders; none where it holds something else."""
    try:
        names = all_names_in(value, r"[;|]")
    except BadRow:
        return ()
    return tuple(re.split(r"[\\/]", name)[-1] for name in names)


def writable(text: str) -> str:
    """An answer as it can be written anywhere: without NUL, half surrogates, blanks around it."""
    return text.encode("utf-8", "replace").decode().replace("\0", "\ufffd").strip()
