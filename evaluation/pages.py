"""Answers side by side, as pages: one for eyes, one for doctors to rank blind."""

import html
import json
import random
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from string import Template
from typing import Any, Self

from common.files import digest_of, read_json, write_json, write_text
from common.text import CJK
from evaluation.systems import Answer, System, data_url
from evaluation.testsets import Question, wording

LABELS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
RANKING_COLUMNS = ["sample", "question", "label", "rank", "note", "rater"]
STYLE = Path(__file__).with_name("pages.css").read_text(encoding="utf-8")
COMPARE_PAGE = Template(Path(__file__).with_name("compare.html").read_text(encoding="utf-8"))
BLIND_PAGE = Template(Path(__file__).with_name("blind.html").read_text(encoding="utf-8"))

# {a Chinese text: its English}
Glosses = dict[str, str]


@dataclass(frozen=True, slots=True)
class Compared:
    """A question with the answer of each system, in their order, and its pictures as JPEG files."""

    question: Question
    answers: list[Answer]
    pictures: list[bytes]


# --- 1. texts -------------------------------------------------------------------------------------


def visible(text: str) -> str:
    """Text for a page: what no eye sees becomes a mark."""
    return "".join(map(visible_character, text))


def visible_character(character: str) -> str:
    if character in "\n\u3000" or character.isprintable():
        return character
    if character.isspace():
        return " "
    return "\ufffd"


def html_text(text: str, glosses: Glosses, is_cut: bool = False) -> str:
    shown = html.escape(visible(text)) or "<small>（空 empty）</small>"
    cut = " …" if is_cut else ""
    english = ""
    if text in glosses:
        english = f'<span class="en">{html.escape(visible(glosses[text]))}</span>'
    return f'<div class="text">{shown}{cut}{english}</div>'


def html_answer(answer: Answer, glosses: Glosses) -> str:
    if answer.fault:
        return html_fault(answer.fault)
    return html_text(answer.text, glosses, answer.is_cut)


def html_fault(fault: str) -> str:
    """Why there is no answer."""
    return f'<div class="fault">没有回答 no answer: {html.escape(visible(fault))}</div>'


def html_pictures(pictures: list[bytes]) -> str:
    images = [f'<img alt="" src="{data_url(raw)}">' for raw in pictures]
    return f"<div>{''.join(images)}</div>"


def markdown_plain(text: str) -> str:
    """Text in which nothing is markup."""
    escaped = html.escape(visible(text), quote=False)
    return re.sub(r"([\\`*_\[\]|~$])", r"\\\1", escaped).replace("\n", "<br>")


def markdown_text(text: str, glosses: Glosses, is_cut: bool = False) -> str:
    """Text for a cell of a Markdown table: nothing in it is markup, fetches anything or ends the
    cell."""
    shown = markdown_plain(text) or "(empty)"
    cut = " …" if is_cut else ""
    english = ""
    if text in glosses:
        english = f"<br><sub>{markdown_plain(glosses[text])}</sub>"
    return f"{shown}{cut}{english}"


def markdown_answer(answer: Answer, glosses: Glosses) -> str:
    if answer.fault:
        return f"*no answer:* {markdown_text(answer.fault, {})}"
    return markdown_text(answer.text, glosses, answer.is_cut)


def markdown_row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


# --- 2. side by side ------------------------------------------------------------------------------


def about(question: Question) -> str:
    """The question's id, and what its set says of it."""
    return " · ".join(map(str, (question.id, *question.kinds.values())))


def html_card(number: int, compared: Compared, systems: list[System], glosses: Glosses) -> str:
    question = compared.question
    asked = html_text(wording(question), glosses)
    rows = [f"<tr><th>问题 <small>question</small></th><td>{asked}</td></tr>"]
    for system, answer in zip(systems, compared.answers, strict=True):
        name = html.escape(system.name)
        rows.append(f"<tr><th>{name}</th><td>{html_answer(answer, glosses)}</td></tr>")
    truth = html_text(question.truth, glosses)
    rows.append(
        f'<tr class="truth"><th>参考答案 <small>ground truth</small></th><td>{truth}</td></tr>'
    )
    return (
        f"<article><h2>{number} <small>{html.escape(visible(about(question)))}</small></h2>"
        f"{html_pictures(compared.pictures)}<table>{''.join(rows)}</table></article>"
    )


def markdown_section(
    number: int,
    compared: Compared,
    systems: list[System],
    glosses: Glosses,
    pictures: list[str],
) -> list[str]:
    """The lines on one question; `pictures` are the names of its files."""
    question = compared.question
    lines = [
        "",
        f"## {number}. {markdown_text(about(question), {})}",
        "",
        *(f"![]({name})" for name in pictures),
        "",
        markdown_row("", ""),
        markdown_row("---", "---"),
        markdown_row("question", markdown_text(wording(question), glosses)),
    ]
    for system, answer in zip(systems, compared.answers, strict=True):
        name = markdown_text(system.name, {})
        lines.append(markdown_row(name, markdown_answer(answer, glosses)))
    truth = markdown_text(question.truth, glosses)
    lines.append(markdown_row("**ground truth**", truth))
    return lines


def write_pictures(out: Path, number: int, pictures: list[bytes]) -> list[str]:
    """Writes a question's pictures, and gives their names as a page beside them says them."""
    names = []
    for k, raw in enumerate(pictures, 1):
        suffix = f"-{k}" if k > 1 else ""
        name = f"pictures/{number:03d}{suffix}.jpg"
        (out / name).write_bytes(raw)
        names.append(name)
    return names


def write_pages(
    out: Path,
    systems: list[System],
    compared: list[Compared],
    glosses: Glosses,
    *,
    title: str,
    max_new_tokens: int,
) -> str:
    """compare.html, and compare.md with pictures/ beside it. -> what to say of them."""
    note = f"{len(compared)} questions. … : cut at {max_new_tokens} tokens."
    places = []
    sections = [
        f"# {markdown_text(title, {})}",
        "",
        f"{note} Research only: no answer here is medical advice.",
        "",
        markdown_row("system", ""),
        markdown_row("---", "---"),
    ]
    for system in systems:
        name = html.escape(system.name)
        where = html.escape(system.where)
        places.append(f"<tr><th>{name}</th><td><small>{where}</small></td></tr>")
        sections.append(
            markdown_row(markdown_text(system.name, {}), markdown_text(system.where, {}))
        )
    cards = []
    (out / "pictures").mkdir(exist_ok=True)
    for number, one in enumerate(compared, 1):
        cards.append(html_card(number, one, systems, glosses))
        names = write_pictures(out, number, one.pictures)
        sections += markdown_section(number, one, systems, glosses, names)
    page = COMPARE_PAGE.substitute(
        style=STYLE,
        file=html.escape(title),
        systems="".join(places),
        n=len(compared),
        note=note,
        cards="\n".join(cards),
    )
    write_text(out / "compare.md", "\n".join(sections) + "\n")
    write_text(out / "compare.html", page)
    return (
        f"{out / 'compare.html'}, {out / 'compare.md'}: "
        f"{len(compared)} questions, {len(systems)} systems"
    )


# --- 3. without names -----------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class BlindQuestion:
    """Whose answers a question of a blind page shows."""

    id: str | int
    labels: dict[str, str]  # {label: system}


@dataclass(frozen=True, slots=True)
class BlindKey:
    """Which answer of a blind page is whose; blind_key.json."""

    stamp: str  # of the page
    systems: list[str]
    questions: dict[str, BlindQuestion]  # by the number that the page gives them

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, key: dict[str, Any]) -> Self:
        questions = {}
        for number, entry in key["questions"].items():
            questions[number] = BlindQuestion(entry["id"], entry["labels"])
        return cls(key["stamp"], key["systems"], questions)


def read_key(path: Path) -> BlindKey:
    """The key of a blind page. ValueError when the file is none."""
    key = read_json(path)
    if not isinstance(key, dict) or not key.keys() >= {"stamp", "systems", "questions"}:
        raise ValueError(f"{path}: not a key that compare --blind wrote")
    return BlindKey.from_json(key)


def write_key(out: Path, key: BlindKey) -> Path:
    """The key beside its page; one of another page is kept under its stamp."""
    path = out / "blind_key.json"
    if path.is_file():
        before = read_key(path).stamp
        # rankings of the page before may still come
        if before != key.stamp:
            path.rename(out / f"blind_key-{before}.json")
    write_json(path, key.to_json())
    return path


def names_pattern(systems: list[System]) -> re.Pattern:
    """Matches what gives a system away in a text: its name, its model's name."""
    given = set()
    for system in systems:
        given.add(system.name)
        if system.endpoint:
            given.add(system.endpoint.model)
            given.add(system.endpoint.model.split("/")[-1])
    # shorter ones stand in words that mean something else
    words = [word for word in given if len(word) > 2 or CJK.search(word)]
    words.sort(key=len, reverse=True)
    parts = [rf"(?<![A-Za-z0-9]){re.escape(word)}(?![A-Za-z0-9])" for word in words]
    nothing = "(?!)"
    return re.compile("|".join(parts) or nothing, re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class BlindAnswer:
    """An answer as the blind page shows it: under a label, without the names in it."""

    label: str
    system: str
    said: str
    text: str  # said, with names hidden
    gloss: str
    is_cut: bool

    def to_html(self, number: str, ranks: str) -> str:
        """number: of its question. ranks: the <option>s to choose from."""
        glosses = {self.text: self.gloss} if self.gloss else {}
        text = html_text(self.text, glosses, self.is_cut)
        return (
            f'<div class="answer" data-question="{number}" data-label="{self.label}">'
            f"<b>{self.label}</b>{text}"
            f'<label>名次 rank <select><option value=""></option>{ranks}</select></label> '
            '<input placeholder="备注 note" aria-label="note"></div>'
        )


def blind_answers(
    compared: Compared, systems: list[System], glosses: Glosses, names: re.Pattern, seed: int
) -> list[BlindAnswer]:
    """The answers that there are to a question, in an order of its own, drawn by the seed."""
    answers = {}
    for system, answer in zip(systems, compared.answers, strict=True):
        if not answer.fault:
            answers[system.name] = answer
    # whatever the order on the command line
    order = sorted(answers)
    random.Random(f"{seed}/{compared.question.id}").shuffle(order)
    shown = []
    for label, name in zip(LABELS, order, strict=False):
        said = answers[name].text
        shown.append(
            BlindAnswer(
                label=label,
                system=name,
                said=said,
                text=names.sub("▇▇▇", said),
                gloss=names.sub("▇▇▇", glosses.get(said, "")),
                is_cut=answers[name].is_cut,
            )
        )
    return shown


def blind_card(
    number: str, compared: Compared, answers: list[BlindAnswer], glosses: Glosses
) -> str:
    question = compared.question
    ranks = "".join(f"<option>{rank}</option>" for rank in range(1, len(answers) + 1))
    boxes = "".join(answer.to_html(number, ranks) for answer in answers)
    asked = html_text(wording(question), glosses)
    truth = html_text(question.truth, glosses)
    return (
        f"<article><h2>{number.removeprefix('q')}</h2>{html_pictures(compared.pictures)}"
        f"<div><b>问题 <small>question</small></b>{asked}{boxes}"
        "<details><summary>参考答案 <small>ground truth</small></summary>"
        f"{truth}</details></div></article>"
    )


def write_blind(
    out: Path, systems: list[System], compared: list[Compared], glosses: Glosses, *, seed: int
) -> str:
    """blind.html, without a trace of which system said what, and blind_key.json, which says it.
    Questions with fewer than two answers are left out. -> what to say of them."""
    names = names_pattern(systems)
    cards = []
    questions = {}
    said = []
    n_hidden = 0
    for one in compared:
        answers = blind_answers(one, systems, glosses, names, seed)
        if len(answers) < 2:
            continue
        # not the id, of which a spreadsheet would make a date or a number
        number = f"q{len(questions) + 1}"
        labels = {answer.label: answer.system for answer in answers}
        questions[number] = BlindQuestion(one.question.id, labels)
        said += [answer.said for answer in answers]
        n_hidden += sum(answer.text != answer.said for answer in answers)
        cards.append(blind_card(number, one, answers, glosses))
    if not questions:
        raise ValueError("no question has two answers: nothing to rank")
    labelled = {number: asdict(question) for number, question in questions.items()}
    stamp = f"s{digest_of(labelled, said)[:12]}"
    path = write_key(out, BlindKey(stamp, sorted(system.name for system in systems), questions))
    page = BLIND_PAGE.substitute(
        style=STYLE,
        n=len(questions),
        cards="\n".join(cards),
        stamp=stamp,
        columns=json.dumps(RANKING_COLUMNS),
    )
    write_text(out / "blind.html", page)
    n_left_out = len(compared) - len(questions)
    left_out = f" ({n_left_out} with fewer than two answers left out)" if n_left_out else ""
    named = f"; {n_hidden} answers named a system: hidden there" if n_hidden else ""
    return (
        f"{out / 'blind.html'}: {len(questions)} questions for the doctors{left_out}{named}. "
        f"Keep {path.name} and the rest of the folder back. "
        f"Then: evaluate.py rank {out} ranking.csv"
    )
