"""What a model said to each question of a test set, and predictions.jsonl, where it is kept as it
comes."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from common.files import write_text
from evaluation.testsets import Question


@dataclass(frozen=True, slots=True)
class Likelihood:
    """How likely a model holds a text to be: the sum of log-probabilities of its tokens, and their
    number."""

    total: float
    n_tokens: int

    @property
    def per_token(self) -> float:
        return self.total / self.n_tokens


@dataclass(frozen=True, slots=True)
class Said:
    """What a model says to one question, of the picture or of a grey in its place."""

    answer: str
    truth: Likelihood
    options: list[Likelihood] = field(default_factory=list)  # in the order of the choices
    choice_answer: str = ""  # the answer when the options are shown, of a question that has some

    def to_json(self) -> dict[str, Any]:
        likelihoods = [self.truth, *self.options]
        said: dict[str, Any] = {
            "likelihood": [[likelihood.total, likelihood.n_tokens] for likelihood in likelihoods],
            "answer": self.answer,
        }
        if self.options:
            said["choice_answer"] = self.choice_answer
        return said

    @classmethod
    def from_json(cls, said: dict[str, Any]) -> Self:
        truth, *options = [Likelihood(total, n) for total, n in said["likelihood"]]
        return cls(said["answer"], truth, options, said.get("choice_answer", ""))


@dataclass(frozen=True, slots=True)
class Answered:
    """Both answers to a question: with the picture, and with the picture withheld (an even grey in
    its place)."""

    seen: Said
    withheld: Said


class Predictions:
    """The lines of predictions.jsonl by the number of their question: what was answered, and what
    was left out and why.

    A file that is there is gone on from. What follows its last newline was being written when that
    run ended, and is forgotten.
    """

    def __init__(self, path: Path):
        self.answered: dict[int, Answered] = {}
        self.left_out: dict[int, str] = {}
        if path.is_file():
            self._read(path)
        self.file = open(path, "a", encoding="utf-8")

    def _read(self, path):
        lines = {}
        for raw in path.read_bytes().split(b"\n")[:-1]:
            line = json.loads(raw)
            lines[line["row"]] = line
        whole = [json.dumps(line, ensure_ascii=False) + "\n" for line in lines.values()]
        write_text(path, "".join(whole))
        for row, line in lines.items():
            if "left_out" in line:
                self.left_out[row] = line["left_out"]
            else:
                seen = Said.from_json(line["seen"])
                self.answered[row] = Answered(seen, Said.from_json(line["blind"]))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()

    def __len__(self) -> int:
        return len(self.answered) + len(self.left_out)

    def __contains__(self, row: int) -> bool:
        return row in self.answered or row in self.left_out

    def add(self, row: int, question: Question, answered: Answered) -> None:
        self.answered[row] = answered
        line = {
            "row": row,
            "id": question.id,
            **question.kinds,
            "image": [picture.name for picture in question.pictures],
            "question": question.question,
            "truth": question.truth,
        }
        if question.choices:
            line["choices"] = question.choices
            line["letter"] = question.letter
        line["seen"] = answered.seen.to_json()
        line["blind"] = answered.withheld.to_json()
        self._write(line)

    def leave_out(self, row: int, question: Question, reason: str) -> None:
        self.left_out[row] = reason
        self._write({"row": row, "id": question.id, "left_out": reason})

    def _write(self, line):
        self.file.write(json.dumps(line, ensure_ascii=False) + "\n")

    def in_order(self, questions: list[Question]) -> tuple[list[Question], list[Answered]]:
        """The questions that were answered, and their answers, in the order of the test set."""
        rows = sorted(self.answered)
        return [questions[row] for row in rows], [self.answered[row] for row in rows]

    def flush(self) -> None:
        self.file.flush()
