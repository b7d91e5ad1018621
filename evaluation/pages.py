"""Answers side by side, as pages: one for eyes, one for doctors to rank blind."""

import base64
import html
import json
import random
import re
from itertools import islice
from pathlib import Path
from string import Template

from common.files import digest_of, read_json, write_json, write_text
from common.text import CJK
from qilin_min import IMAGE_TOKEN

JPEG = b"\xff\xd8"  # what such a file begins with
LABELS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
COLUMNS = ["sample", "question", "label", "rank", "note", "rater"]


def turns(question):
    """[(who, text, pictures)] of what is asked: mostly one turn. Where <image> stands for a picture it is taken out of the text."""
    rest, found = iter(question.pictures), []
    for i, turn in enumerate(question.conversation):
        n = (
            turn["value"].count(IMAGE_TOKEN)
            if question.n_images is None
            else question.n_images * (i == 0)
        )
        found.append(
            (
                turn["from"],
                turn["value"].replace(IMAGE_TOKEN, "").strip()
                if question.n_images is None
                else turn["value"],
                list(islice(rest, n)),
            )
        )
    return found


def wording(question):
    """The question as a page shows it; of a dialog the turns before it, too."""
    return "\n".join("\u2192 " * (who == "gpt") + text for who, text, _ in turns(question))


def data_url(raw):
    return f"data:image/{'jpeg' if raw.startswith(JPEG) else 'png'};base64,{base64.b64encode(raw).decode()}"


STYLE = """
body { font: 16px/1.6 system-ui, "Noto Sans CJK SC", "PingFang SC", "Microsoft YaHei", sans-serif; max-width: 1200px; margin: 0 auto; padding: 0 1rem 6rem; color: #222; }
article { border: 1px solid #ccc; border-radius: 6px; margin: 1.2rem 0; padding: 1rem; display: grid; grid-template-columns: minmax(0, 2fr) minmax(0, 3fr); gap: 1rem;
          break-inside: avoid; }
article.done { border-color: #3a3; } h2 { grid-column: 1 / -1; font-size: 1rem; margin: 0; }
img { max-width: 100%; max-height: 480px; display: block; margin: 0 auto .6rem; background: #eee; }
table { border-collapse: collapse; width: 100%; align-self: start; } th, td { text-align: left; vertical-align: top; padding: .4rem .6rem; border-top: 1px solid #eee; }
th { width: 9rem; font-weight: 600; overflow-wrap: anywhere; } .text { white-space: pre-wrap; overflow-wrap: anywhere; } .truth { background: #f1f7f1; }
small, .en { color: #666; font-weight: 400; } .en { display: block; font-size: .85em; } .fault { color: #a33; } .caution { background: #fff6e0; padding: .3rem .6rem; }
.answer { border-top: 1px solid #eee; padding: .6rem 0; } select, input, button { font: inherit; padding: .2rem .6rem; } fieldset { border: 0; padding: 0; margin: 0; min-width: 0; }
header.top { position: sticky; top: 0; background: #fff; border-bottom: 1px solid #ccc; padding: .6rem 0; z-index: 1; }
@media (max-width: 800px) { article { grid-template-columns: minmax(0, 1fr); } }
"""


CAUTION = '<p class="caution">仅供研究，不得用于诊断或治疗。 <small>Research only: no answer on this page is medical advice.</small></p>'
PAGE = Template("""<!doctype html>
<html lang="zh"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1"><title>$title</title><style>$style</style></head><body>
$top
$caution
$cards
$script</body></html>
""")
BLIND_TOP = Template("""<header class="top"><b>盲评</b> 共 $n 题。请按优劣给每个回答排名（1 为最好，可并列，不评则留空）。
<label>评者 rater <input id="rater" maxlength="60"></label>
<span id="count"></span> <button id="save">下载 ranking.csv</button>
<br><small>Enter your name or initials, rank the answers of each question (1 is best, ties allowed, empty to skip), then download the table and give it back.
Kept in this browser until then; nothing is sent anywhere.</small></header>""")
BLIND_SCRIPT = Template("""<script>
"use strict";
const answers = [...document.querySelectorAll(".answer")], rater = document.getElementById("rater"), name = () => rater.value.trim();
const rank = a => a.querySelector("select"), note = a => a.querySelector("input");
const slot = a => "$stamp/" + name() + "/" + a.dataset.question + "/" + a.dataset.label;
function shown() {
  document.getElementById("count").textContent = answers.filter(a => rank(a).value).length + " / " + answers.length;
  document.querySelectorAll("article").forEach(card => card.classList.toggle("done", [...card.querySelectorAll("select")].every(s => s.value)));
}
function kept(key) { try { return JSON.parse(localStorage.getItem(key)); } catch (e) { return null; } }
function keep(key, value) { try { localStorage.setItem(key, JSON.stringify(value)); } catch (e) {} }
function load() {  // each rater has a table of his own, and nobody ranks without a name
  answers.forEach(a => { [rank(a).value, note(a).value] = kept(slot(a)) || ["", ""]; });
  document.getElementById("all").disabled = !name();
  keep("$stamp", name()); shown();
}
answers.forEach(a => a.addEventListener("input", () => { keep(slot(a), [rank(a).value, note(a).value]); shown(); }));
rater.value = kept("$stamp") || "";
rater.addEventListener("change", load);
document.getElementById("save").addEventListener("click", () => {
  if (!name()) { rater.focus(); return; }
  const cell = s => '"' + String(s).replaceAll('"', '""') + '"';
  const rows = answers.map(a => ["$stamp", a.dataset.question, a.dataset.label, rank(a).value, note(a).value, name()]);
  const csv = "\\ufeff" + [$columns, ...rows].map(r => r.map(cell).join(",")).join("\\r\\n") + "\\r\\n";
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([csv], {type: "text/csv"})); link.download = "ranking.csv"; link.click();
});
load();
</script>""")


def visible(text):
    """Text for a page: what no eye sees becomes a mark."""
    return "".join(
        c if c in "\n\u3000" or c.isprintable() else " " if c.isspace() else "\ufffd" for c in text
    )


def html_text(text, glosses, cut=False):
    english = (
        f'<span class="en">{html.escape(visible(glosses[text]))}</span>' if text in glosses else ""
    )
    return f'<div class="text">{html.escape(visible(text)) or "<small>（空 empty）</small>"}{" …" if cut else ""}{english}</div>'


def html_answer(line, glosses):
    return (
        html_text(line["text"], glosses, line.get("cut"))
        if "text" in line
        else f'<div class="fault">没有回答 no answer: {html.escape(visible(line["fault"]))}</div>'
    )


def html_pictures(raws):
    return "<div>" + "".join(f'<img alt="" src="{data_url(raw)}">' for raw in raws) + "</div>"


def markdown_text(text, glosses, cut=False):
    """Text for a cell of a Markdown table: nothing in it is markup, fetches anything or ends the cell."""

    def plain(text):
        return re.sub(
            r"([\\`*_\[\]|~$])", r"\\\1", html.escape(visible(text), quote=False)
        ).replace("\n", "<br>")

    return (
        (plain(text) or "(empty)")
        + " …" * bool(cut)
        + (f"<br><sub>{plain(glosses[text])}</sub>" if text in glosses else "")
    )


def write_pages(args, systems, questions, answers, glosses, shown):
    """compare.html, and compare.md with pictures/ beside it. answers: of each question a line (text, cut, or fault) for each system; shown: its pictures' bytes."""

    def row(*cells):
        return f"| {' | '.join(cells)} |"

    def markdown_answer(line):
        return (
            markdown_text(line["text"], glosses, line.get("cut"))
            if "text" in line
            else "*no answer:* " + markdown_text(line["fault"], {})
        )

    title, note = (
        Path(args.file).name,
        f"{len(questions)} questions. … : cut at {args.max_new_tokens} tokens.",
    )
    names, marked = (
        [html.escape(system.name) for system in systems],
        [markdown_text(system.name, {}) for system in systems],
    )
    places = "".join(
        f"<tr><th>{name}</th><td><small>{html.escape(system.where)}</small></td></tr>"
        for name, system in zip(names, systems)
    )
    sections = [
        f"# {markdown_text(title, {})}",
        "",
        f"{note} Research only: no answer here is medical advice.",
        "",
        row("system", ""),
        row("---", "---"),
    ]
    sections += [
        row(name, markdown_text(system.where, {})) for name, system in zip(marked, systems)
    ]
    cards = []
    (args.out / "pictures").mkdir(exist_ok=True)
    for i, (question, lines, raws) in enumerate(zip(questions, answers, shown), 1):
        rows = [
            ("问题 <small>question</small>", html_text(wording(question), glosses)),
            *((name, html_answer(line, glosses)) for name, line in zip(names, lines)),
        ]
        table = "".join(f"<tr><th>{name}</th><td>{cell}</td></tr>" for name, cell in rows)
        truth = f'<tr class="truth"><th>参考答案 <small>ground truth</small></th><td>{html_text(question.truth, glosses)}</td></tr>'
        about = " · ".join(map(str, (question.id, *question.kinds.values())))
        cards.append(
            f"<article><h2>{i} <small>{html.escape(visible(about))}</small></h2>{html_pictures(raws)}<table>{table}{truth}</table></article>"
        )
        files = [f"pictures/{i:03d}{f'-{k}' if k > 1 else ''}.jpg" for k in range(1, len(raws) + 1)]
        for file, raw in zip(files, raws):
            (args.out / file).write_bytes(raw)
        sections += [
            "",
            f"## {i}. {markdown_text(about, {})}",
            "",
            *(f"![]({file})" for file in files),
            "",
            row("", ""),
            row("---", "---"),
            row("question", markdown_text(wording(question), glosses)),
            *(row(name, markdown_answer(line)) for name, line in zip(marked, lines)),
            row("**ground truth**", markdown_text(question.truth, glosses)),
        ]
    top = f"<h1>{html.escape(title)}</h1><table>{places}</table><p>共 {len(questions)} 题。 <small>{note}</small></p>"
    write_text(args.out / "compare.md", "\n".join(sections) + "\n")
    write_text(
        args.out / "compare.html",
        PAGE.substitute(
            title="问答对照 side by side",
            style=STYLE,
            top=top,
            caution=CAUTION,
            cards="\n".join(cards),
            script="",
        ),
    )
    return f"{args.out / 'compare.html'}, {args.out / 'compare.md'}: {len(questions)} questions, {len(systems)} systems"


def write_blind(args, systems, questions, answers, glosses, shown):
    """blind.html, without a trace of which system said what, and blind_key.json, which says it. Questions with fewer than two answers are left out."""
    given = {
        word
        for system in systems
        for word in (
            system.name,
            *(
                (system.endpoint.model, system.endpoint.model.split("/")[-1])
                if system.endpoint
                else ()
            ),
        )
    }
    words = sorted(
        (word for word in given if len(word) > 2 or CJK.search(word)), key=len, reverse=True
    )  # shorter ones stand in words that mean something else
    names = re.compile(
        "|".join(rf"(?<![A-Za-z0-9]){re.escape(word)}(?![A-Za-z0-9])" for word in words) or "(?!)",
        re.IGNORECASE,
    )
    hidden, cards, key, said = 0, [], {}, []

    def without_names(text):
        return names.sub("▇▇▇", text)

    for question, lines, raws in zip(questions, answers, shown):
        order = sorted(
            (system.name, line) for system, line in zip(systems, lines) if "text" in line
        )  # whatever the order on the command line
        if len(order) < 2:
            continue
        random.Random(f"{args.seed}/{question.id}").shuffle(order)
        number, boxes = (
            f"q{len(key) + 1}",
            [],
        )  # not the id, of which a spreadsheet would make a date or a number
        key[number] = {
            "id": question.id,
            "labels": {label: name for label, (name, _) in zip(LABELS, order)},
        }
        ranks = "".join(f"<option>{i + 1}</option>" for i in range(len(order)))
        for label, (_, line) in zip(LABELS, order):
            text, gloss = without_names(line["text"]), without_names(glosses.get(line["text"], ""))
            hidden += text != line["text"]
            said.append(line["text"])
            boxes.append(
                f'<div class="answer" data-question="{number}" data-label="{label}"><b>{label}</b>{html_text(text, {text: gloss} if gloss else {}, line.get("cut"))}'
                f'<label>名次 rank <select><option value=""></option>{ranks}</select></label> <input placeholder="备注 note" aria-label="note"></div>'
            )
        cards.append(
            f"<article><h2>{len(key)}</h2>{html_pictures(raws)}<div><b>问题 <small>question</small></b>{html_text(wording(question), glosses)}{''.join(boxes)}"
            f"<details><summary>参考答案 <small>ground truth</small></summary>{html_text(question.truth, glosses)}</details></div></article>"
        )
    if not key:
        raise ValueError("no question has two answers: nothing to rank")
    stamp, path = f"s{digest_of(key, said)[:12]}", args.out / "blind_key.json"
    if (
        path.is_file() and (old := read_key(path)["stamp"]) != stamp
    ):  # rankings of the page before may still come
        path.rename(args.out / f"blind_key-{old}.json")
    write_json(
        path,
        {"stamp": stamp, "systems": sorted(system.name for system in systems), "questions": key},
    )
    write_text(
        args.out / "blind.html",
        PAGE.substitute(
            title="盲评 blind ranking",
            style=STYLE,
            top=BLIND_TOP.substitute(n=len(key)),
            caution=CAUTION,
            cards='<fieldset id="all">' + "\n".join(cards) + "</fieldset>",
            script=BLIND_SCRIPT.substitute(stamp=stamp, columns=json.dumps(COLUMNS)),
        ),
    )
    left_out = (
        f" ({len(questions) - len(key)} with fewer than two answers left out)"
        if len(key) < len(questions)
        else ""
    )
    named = f"; {hidden} answers named a system: hidden there" if hidden else ""
    return (
        f"{args.out / 'blind.html'}: {len(key)} questions for the doctors{left_out}{named}. "
        f"Keep {path.name} and the rest of the folder back. Then: evaluate.py rank {args.out} ranking.csv"
    )


def read_key(path):
    """Which answer of a blind page is whose: {stamp, systems, questions: {number: {id, labels: {label: system}}}}."""
    key = read_json(path)
    if not isinstance(key, dict) or not key.keys() >= {"stamp", "systems", "questions"}:
        raise ValueError(f"{path}: not a key that compare --blind wrote")
    return key
