"""Figure 4 of the paper in its form: picture, question, what each system answers and the truth,
Chinese with English beneath, three cases a page; for a printer, or a browser's PDF."""

import html
import re
from pathlib import Path
from string import Template

from common.files import write_text
from common.text import CJK
from evaluation.pages import Compared, Glosses, html_fault, html_pictures, visible
from evaluation.systems import Answer, System
from evaluation.testsets import wording

CASES_A_PAGE = 3
# a character, or a mark of Chinese writing: "CT\u3002" is Chinese
CHINESE = re.compile(rf"{CJK.pattern}|[\u3000-\u303f\uff01-\uff5e]")
PAGE = Template(Path(__file__).with_name("figure4.html").read_text(encoding="utf-8"))


def line_of(language: str, text: str) -> str:
    """`CN: text` or `EN: text`."""
    return f"<small>{language}:</small> {html.escape(visible(text))}"


def cell(text: str, glosses: Glosses, is_cut: bool = False) -> str:
    """A text, and where it is Chinese its English beneath, if there is some."""
    cut = " …" if is_cut else ""
    if not text:
        return '<div class="text"><small>（空 empty）</small></div>'
    if not CHINESE.search(text):
        return f'<div class="text">{line_of("EN", text)}{cut}</div>'
    english = ""
    if text in glosses:
        english = f'<span class="en">{line_of("EN", glosses[text])}{cut}</span>'
    return f'<div class="text">{line_of("CN", text)}{cut}{english}</div>'


def answer_cell(answer: Answer, glosses: Glosses) -> str:
    """What a system says, or why it says nothing."""
    if answer.fault:
        return html_fault(answer.fault)
    return cell(answer.text, glosses, answer.is_cut)


def row(kind: str, name: str, content: str) -> str:
    """A line of a case's table."""
    return f'<tr class="{kind}"><th>{name}</th><td>{content}</td></tr>'


def case(compared: Compared, systems: list[System], glosses: Glosses, is_last: bool) -> str:
    """One case. is_last: of its page."""
    question = compared.question
    rows = [row("asked", "问题 <small>question</small>", cell(wording(question), glosses))]
    for system, answer in zip(systems, compared.answers, strict=True):
        rows.append(row("", html.escape(system.name), answer_cell(answer, glosses)))
    truth = cell(question.truth, glosses)
    rows.append(row("truth", "参考答案 <small>ground truth</small>", truth))
    place = "case last" if is_last else "case"
    return (
        f'<section class="{place}">{html_pictures(compared.pictures)}'
        f"<table>{''.join(rows)}</table></section>"
    )


def write_figure4(
    out: Path, systems: list[System], compared: list[Compared], glosses: Glosses, *, title: str
) -> str:
    """figure4.html. -> what to say of it."""
    cases = []
    for number, one in enumerate(compared, 1):
        is_last = number % CASES_A_PAGE == 0
        cases.append(case(one, systems, glosses, is_last))
    places = "; ".join(f"{system.name}: {system.where}" for system in systems)
    note = f"{title}. {places}. 仅供研究，不得用于诊断或治疗。 Research only, no medical advice."
    page = PAGE.substitute(
        title=html.escape(title),
        cases="\n".join(cases),
        note=html.escape(visible(note)),
    )
    path = out / "figure4.html"
    write_text(path, page)
    return f"{path}: {len(compared)} cases, {CASES_A_PAGE} a page; print it, or save it as PDF"
