"""The same questions put to several models, their answers side by side: Figure 4 of the paper as a tool, and for doctors to rank without the names.

    python evaluate.py compare test.json --images DIR --out OUT --system Qilin-Med-VL=out/stage2 --system LLaVA-1.5=weights/llava-1.5-7b-hf
                               --system "GPT-4V=https://api.openai.com/v1#gpt-4-vision-preview" --system "VisCPM=http://localhost:8000/v1#openbmb/VisCPM-Chat"
    ... --blind                                        OUT/blind.html for the doctors, OUT/blind_key.json to keep back
    python evaluate.py rank OUT ranking-1.csv ...      what they gave back: mean ranks, and win rates with intervals

A system is a folder of any layout that load_qilin reads, or an OpenAI-compatible vision endpoint; nothing is sent before that was agreed to.
Every answer is kept in OUT/answers.jsonl as it comes: stopped anywhere, the same command goes on and asks only what is missing.
"""

import argparse
import asyncio
import base64
import csv
import gc
import hashlib
import html
import io
import json
import os
import random
import re
import sys
import unicodedata
from collections import Counter, defaultdict
from dataclasses import dataclass
from itertools import combinations, islice
from pathlib import Path
from string import Template

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from common.endpoint import Endpoint, EndpointFailed, add_endpoint_flags, ask_many
from common.files import (
    USER_ERRORS,
    check_ranges,
    model_folder,
    one_line,
    read_json,
    write_json,
    write_text,
)
from common.intervals import wilson
from common.journal import Finished
from common.text import CJK, chinese_share
from model_io.load import read_checkpoint
from model_io.options import model_from_flags
from model_io.pixels import open_image, preprocess_image
from model_io.tokens import Tokenizer, encode_prompt
from qilin_min import IMAGE_TOKEN, answer_ids
from testsets import read_testset

SENT, SHOWN = 2048, 640  # pixels, the longer side, of a picture as it is sent, and on a page
JPEG = b"\xff\xd8"  # what such a file begins with
MAX_SENT_BYTES = 4 * 2**20  # of one picture: some endpoints take no more than 5 MB; a larger one goes as JPEG
GLOSS = ("You translate Chinese medical text into English for a table in a paper. Reply with the translation of the user's message and nothing else: "
         "no notes, no correction of what is wrong in it, and no answer to what it asks.")
LABELS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
COLUMNS = ["sample", "question", "label", "rank", "note", "rater"]

# --- 1. systems and questions -----------------------------------------------------------------------------------------


@dataclass
class System:
    """One of those that are asked: a folder, or an endpoint."""
    name: str
    folder: Path | None
    endpoint: Endpoint | None
    settings: list  # with the question, all that an answer depends on

    @property
    def where(self):
        return str(self.folder) if self.folder else f"{self.endpoint.model} @ {self.endpoint.host}"


def turns(question):
    """[(who, text, pictures)] of what is asked: mostly one turn. Where <image> stands for a picture it is taken out of the text."""
    rest, found = iter(question.pictures), []
    for i, turn in enumerate(question.conversation):
        n = turn["value"].count(IMAGE_TOKEN) if question.n_images is None else question.n_images * (i == 0)
        found.append((turn["from"], turn["value"].replace(IMAGE_TOKEN, "").strip() if question.n_images is None else turn["value"], list(islice(rest, n))))
    return found


def wording(question):
    """The question as a page shows it; of a dialog the turns before it, too."""
    return "\n".join("\u2192 " * (who == "gpt") + text for who, text, _ in turns(question))


def check_text(question):
    for text in (str(question.id), wording(question), question.truth):
        if "\0" in text or text != text.encode("utf-8", "replace").decode():
            raise ValueError("a text holds a NUL character or half a surrogate pair: no text that anybody wrote")


def choose(args, questions):
    """Those that --ids names, else --n drawn by --seed, in the order of the file, and the digests of their pictures. Each picture is decoded before anything is asked."""
    if args.ids:
        wanted = [name.strip() for name in args.ids.split(",") if name.strip()]
        if missing := [name for name in wanted if name not in {str(question.id) for question in questions}]:
            raise ValueError(f"--ids {missing[0]}: no question has this id")
        chosen = [question for name in dict.fromkeys(wanted) for question in questions if str(question.id) == name]
    else:
        chosen = [questions[i] for i in sorted(random.Random(args.seed).sample(range(len(questions)), min(args.n, len(questions))))]
    good, digests = [], []
    for question in tqdm(chosen, desc="reading pictures", disable=None):
        try:
            check_text(question)
            digests.append([hashlib.sha256(Path(path).read_bytes()).hexdigest() for path in question.pictures if open_image(path)])
            good.append(question)
        except USER_ERRORS as error:
            if not args.skip_bad:
                raise ValueError(f"{args.file}: question {question.id}: {one_line(error)} (--skip-bad leaves such rows out)") from None
            print(f"left out: question {question.id}: {one_line(error)}", file=sys.stderr)
    if not good:
        raise ValueError(f"{args.file}: no question in it can be asked")
    return good, digests


def read_system(text, args):
    """The System of one --system, its path or address looked at, nothing loaded or sent."""
    name, _, place = text.partition("=")
    name, is_url = name.strip(), place.startswith(("https://", "http://"))
    base, _, model = place.partition("#")
    if not name or not place or not name.isprintable() or len(name) > 60 or (is_url and not model):
        raise ValueError(f"--system {name or repr('')}: must be NAME=FOLDER or NAME=https://host/v1#model-name")
    try:
        if is_url:
            key = os.environ.get(re.sub("[^A-Z0-9]", "_", name.upper()) + "_API_KEY")  # else $OPENAI_API_KEY
            length = {} if "max_completion_tokens" in args.extra_body else {"max_tokens": args.max_new_tokens}  # newer models of OpenAI know only the former
            endpoint = Endpoint(argparse.Namespace(**{**vars(args), "base_url": base, "endpoint_model": model, "api_key": key, "extra_body": length | args.extra_body}))
            return System(name, None, endpoint, [name, endpoint.url, model, endpoint.args.extra_body])
        read_checkpoint(place)
        Tokenizer(place)
    except USER_ERRORS as error:
        raise ValueError(f"--system {name}: {one_line(error)}") from None
    folder = model_folder(place)
    files = sorted((file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in ([folder] if folder.is_file() else folder.iterdir()) if file.is_file())
    return System(name, Path(place), None, [name, os.path.realpath(folder), files, args.dtype, args.quantize, args.max_new_tokens])


def read_systems(args):
    if not isinstance(args.extra_body, dict):
        raise ValueError("--extra-body must be a JSON object")
    systems = [read_system(text, args) for text in args.system]
    names = [system.name for system in systems]
    if twice := [name for name in names if names.count(name) > 1]:
        raise ValueError(f"--system {twice[0]}: two systems have this name")
    if len(systems) > len(LABELS) or len(systems) < 1 + args.blind:
        raise ValueError(f"{len(systems)} systems: " + (f"at most {len(LABELS)} fit on a page" if len(systems) > 1 else "--blind wants two at least, or there is nothing to rank"))
    return systems


# --- 2. answers -------------------------------------------------------------------------------------------------------


def digest(*values):
    return hashlib.sha256(json.dumps(values).encode()).hexdigest()[:32]


def clean(text):
    """An answer as it can be written anywhere: without NUL, half surrogates and blanks around it."""
    return text.encode("utf-8", "replace").decode().replace("\0", "\ufffd").strip()


def picture_bytes(path, longest, form, **options):
    """A picture file from the pixels of another and nothing else: no EXIF, no DICOM tags, no comments, no colour profile."""
    image = open_image(path)
    image.thumbnail((longest, longest))
    buffer = io.BytesIO()
    Image.fromarray(np.asarray(image)).save(buffer, form, **options)
    return buffer.getvalue()


def data_url(raw):
    return f"data:image/{'jpeg' if raw.startswith(JPEG) else 'png'};base64,{base64.b64encode(raw).decode()}"


def vision_messages(question):
    """The bare question with its pictures, as any OpenAI-compatible endpoint takes it."""
    messages = []
    for who, text, pictures in turns(question):
        content = []
        for path in pictures:
            raw = picture_bytes(path, SENT, "PNG")
            content.append({"type": "image_url", "image_url": {"url": data_url(raw if len(raw) <= MAX_SENT_BYTES else picture_bytes(path, SENT, "JPEG", quality=95))}})
        content += [{"type": "text", "text": text}] * bool(text)
        messages.append({"role": "user" if who == "human" else "assistant", "content": content if pictures else text})
    return messages


def ask_folder(system, todo, args, keep, bar):
    """The same for a folder: loaded, asked in batches, and freed when this returns."""
    model, tokenizer, _ = model_from_flags(argparse.Namespace(model=str(system.folder), llm=None, vision=None, projector=None, device=args.device, dtype=args.dtype,
                                                              quantize=args.quantize, compile=False))
    config, failed = model.config, {}
    limit = config.text.max_position_embeddings

    def prepared():
        for key, question in todo.items():
            try:
                prompt = encode_prompt(question.conversation, tokenizer, config.n_image_tokens, n_images=question.n_images)
                if len(prompt) >= limit:
                    raise ValueError(f"the question takes {len(prompt)} tokens, the model's positions end at {limit}")
                pixels = [preprocess_image(path, config.vision.image_size, config.image_mode) for path in question.pictures]
            except ValueError as error:
                failed[key] = one_line(error)
                bar.update()
                continue
            yield key, question, prompt, pixels

    rest = prepared()
    while batch := list(islice(rest, args.batch_size)):
        pixels = [picture for *_, pictures in batch for picture in pictures]
        answers = answer_ids(model, [prompt for _, _, prompt, _ in batch], torch.stack(pixels) if pixels else None, max_new_tokens=args.max_new_tokens)
        for (key, question, prompt, _), ids in zip(batch, answers):
            keep(key, question, (tokenizer.decode(ids), len(ids) == args.max_new_tokens or len(prompt) + len(ids) >= limit))
        bar.update(len(batch))
    return failed


def ask_system(system, todo, n_done, args, finished):
    """Every open question of one system. -> {key: why there is no answer}; a fault of the whole system is said, and is every question's reason."""

    def keep(key, question, answer):
        finished.add(key, clean(answer[0]), cut=answer[1], system=system.name, where=system.where, id=question.id, question=wording(question))

    with tqdm(total=len(todo) + n_done, initial=n_done, desc=system.name, disable=None) as bar:
        try:
            if system.endpoint:
                return asyncio.run(ask_many(system.endpoint, todo, vision_messages, keep, bar, accept=lambda text, cut: (text, cut), allow_cut=True))
            return ask_folder(system, todo, args, keep, bar)
        except (ValueError, torch.OutOfMemoryError) as error:
            fault = one_line(error)
        finally:
            if system.folder:
                gc.collect()  # the model goes before the next one comes
                torch.cuda.empty_cache()
    print(f"{system.name}: {fault}", file=sys.stderr)
    return {key: fault for key in todo if key not in finished.lines}


# --- 3. English beneath the Chinese -----------------------------------------------------------------------------------


def gloss_key(endpoint, text):
    return digest(GLOSS, endpoint.url, endpoint.model, text)


def accept_gloss(text):
    if chinese_share(text) > 0.3:
        raise ValueError("the gloss is not English")
    return clean(text)


def add_glosses(endpoint, texts, finished):
    """{Chinese: English} of those that could be had, and the reasons for the others; each text is asked for once."""
    keys = {text: gloss_key(endpoint, text) for text in texts if CJK.search(text)}
    todo, failed = {key: text for text, key in keys.items() if key not in finished.lines}, {}
    with tqdm(total=len(keys), initial=len(keys) - len(todo), desc="gloss", disable=None) as bar:
        try:
            failed = asyncio.run(ask_many(endpoint, todo, lambda text: [{"role": "system", "content": GLOSS}, {"role": "user", "content": text}],
                                          lambda key, text, english: finished.add(key, english, chinese=text), bar, accept=accept_gloss))
        except EndpointFailed as error:
            failed = {key: one_line(error) for key in todo if key not in finished.lines}
    return {text: finished.lines[key]["text"] for text, key in keys.items() if key in finished.lines}, list(failed.values())


# --- 4. pages ---------------------------------------------------------------------------------------------------------

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
    return "".join(c if c in "\n\u3000" or c.isprintable() else " " if c.isspace() else "\ufffd" for c in text)


def html_text(text, glosses, cut=False):
    english = f'<span class="en">{html.escape(visible(glosses[text]))}</span>' if text in glosses else ""
    return f'<div class="text">{html.escape(visible(text)) or "<small>（空 empty）</small>"}{" …" if cut else ""}{english}</div>'


def html_answer(line, glosses):
    return html_text(line["text"], glosses, line.get("cut")) if "text" in line else f'<div class="fault">没有回答 no answer: {html.escape(visible(line["fault"]))}</div>'


def html_pictures(raws):
    return "<div>" + "".join(f'<img alt="" src="{data_url(raw)}">' for raw in raws) + "</div>"


def markdown_text(text, glosses, cut=False):
    """Text for a cell of a Markdown table: nothing in it is markup, fetches anything or ends the cell."""
    def plain(text):
        return re.sub(r"([\\`*_\[\]|~$])", r"\\\1", html.escape(visible(text), quote=False)).replace("\n", "<br>")
    return (plain(text) or "(empty)") + " …" * bool(cut) + (f"<br><sub>{plain(glosses[text])}</sub>" if text in glosses else "")


def write_pages(args, systems, questions, answers, glosses, shown):
    """compare.html, and compare.md with pictures/ beside it. answers: of each question a line (text, cut, or fault) for each system; shown: its pictures' bytes."""
    def row(*cells):
        return f"| {' | '.join(cells)} |"

    def markdown_answer(line):
        return markdown_text(line["text"], glosses, line.get("cut")) if "text" in line else "*no answer:* " + markdown_text(line["fault"], {})

    title, note = Path(args.file).name, f"{len(questions)} questions. … : cut at {args.max_new_tokens} tokens."
    names, marked = [html.escape(system.name) for system in systems], [markdown_text(system.name, {}) for system in systems]
    places = "".join(f"<tr><th>{name}</th><td><small>{html.escape(system.where)}</small></td></tr>" for name, system in zip(names, systems))
    sections = [f"# {markdown_text(title, {})}", "", f"{note} Research only: no answer here is medical advice.", "", row("system", ""), row("---", "---")]
    sections += [row(name, markdown_text(system.where, {})) for name, system in zip(marked, systems)]
    cards = []
    (args.out / "pictures").mkdir(exist_ok=True)
    for i, (question, lines, raws) in enumerate(zip(questions, answers, shown), 1):
        rows = [("问题 <small>question</small>", html_text(wording(question), glosses)), *((name, html_answer(line, glosses)) for name, line in zip(names, lines))]
        table = "".join(f"<tr><th>{name}</th><td>{cell}</td></tr>" for name, cell in rows)
        truth = f'<tr class="truth"><th>参考答案 <small>ground truth</small></th><td>{html_text(question.truth, glosses)}</td></tr>'
        about = " · ".join(map(str, (question.id, *question.kinds.values())))
        cards.append(f"<article><h2>{i} <small>{html.escape(visible(about))}</small></h2>{html_pictures(raws)}<table>{table}{truth}</table></article>")
        files = [f"pictures/{i:03d}{f'-{k}' if k > 1 else ''}.jpg" for k in range(1, len(raws) + 1)]
        for file, raw in zip(files, raws):
            (args.out / file).write_bytes(raw)
        sections += ["", f"## {i}. {markdown_text(about, {})}", "", *(f"![]({file})" for file in files), "", row("", ""), row("---", "---"),
                     row("question", markdown_text(wording(question), glosses)), *(row(name, markdown_answer(line)) for name, line in zip(marked, lines)),
                     row("**ground truth**", markdown_text(question.truth, glosses))]
    top = f"<h1>{html.escape(title)}</h1><table>{places}</table><p>共 {len(questions)} 题。 <small>{note}</small></p>"
    write_text(args.out / "compare.md", "\n".join(sections) + "\n")
    write_text(args.out / "compare.html", PAGE.substitute(title="问答对照 side by side", style=STYLE, top=top, caution=CAUTION, cards="\n".join(cards), script=""))
    return f"{args.out / 'compare.html'}, {args.out / 'compare.md'}: {len(questions)} questions, {len(systems)} systems"


def write_blind(args, systems, questions, answers, glosses, shown):
    """blind.html, without a trace of which system said what, and blind_key.json, which says it. Questions with fewer than two answers are left out."""
    given = {word for system in systems for word in (system.name, *((system.endpoint.model, system.endpoint.model.split("/")[-1]) if system.endpoint else ()))}
    words = sorted((word for word in given if len(word) > 2 or CJK.search(word)), key=len, reverse=True)  # shorter ones stand in words that mean something else
    names = re.compile("|".join(rf"(?<![A-Za-z0-9]){re.escape(word)}(?![A-Za-z0-9])" for word in words) or "(?!)", re.IGNORECASE)
    hidden, cards, key, said = 0, [], {}, []

    def without_names(text):
        return names.sub("▇▇▇", text)

    for question, lines, raws in zip(questions, answers, shown):
        order = sorted((system.name, line) for system, line in zip(systems, lines) if "text" in line)  # whatever the order on the command line
        if len(order) < 2:
            continue
        random.Random(f"{args.seed}/{question.id}").shuffle(order)
        number, boxes = f"q{len(key) + 1}", []  # not the id, of which a spreadsheet would make a date or a number
        key[number] = {"id": question.id, "labels": {label: name for label, (name, _) in zip(LABELS, order)}}
        ranks = "".join(f"<option>{i + 1}</option>" for i in range(len(order)))
        for label, (_, line) in zip(LABELS, order):
            text, gloss = without_names(line["text"]), without_names(glosses.get(line["text"], ""))
            hidden += text != line["text"]
            said.append(line["text"])
            boxes.append(f'<div class="answer" data-question="{number}" data-label="{label}"><b>{label}</b>{html_text(text, {text: gloss} if gloss else {}, line.get("cut"))}'
                         f'<label>名次 rank <select><option value=""></option>{ranks}</select></label> <input placeholder="备注 note" aria-label="note"></div>')
        cards.append(f'<article><h2>{len(key)}</h2>{html_pictures(raws)}<div><b>问题 <small>question</small></b>{html_text(wording(question), glosses)}{"".join(boxes)}'
                     f'<details><summary>参考答案 <small>ground truth</small></summary>{html_text(question.truth, glosses)}</details></div></article>')
    if not key:
        raise ValueError("no question has two answers: nothing to rank")
    stamp, path = f"s{digest(key, said)[:12]}", args.out / "blind_key.json"
    if path.is_file() and (old := read_key(path)["stamp"]) != stamp:  # rankings of the page before may still come
        path.rename(args.out / f"blind_key-{old}.json")
    write_json(path, {"stamp": stamp, "systems": sorted(system.name for system in systems), "questions": key})
    write_text(args.out / "blind.html", PAGE.substitute(
        title="盲评 blind ranking", style=STYLE, top=BLIND_TOP.substitute(n=len(key)), caution=CAUTION, cards='<fieldset id="all">' + "\n".join(cards) + "</fieldset>",
        script=BLIND_SCRIPT.substitute(stamp=stamp, columns=json.dumps(COLUMNS))))
    left_out = f" ({len(questions) - len(key)} with fewer than two answers left out)" if len(key) < len(questions) else ""
    named = f"; {hidden} answers named a system: hidden there" if hidden else ""
    return (f"{args.out / 'blind.html'}: {len(key)} questions for the doctors{left_out}{named}. "
            f"Keep {path.name} and the rest of the folder back. Then: evaluate.py rank {args.out} ranking.csv")


# --- 5. compare -------------------------------------------------------------------------------------------------------


def add_compare_flags(parser):
    add = parser.add_argument
    add("--system", action="append", required=True, metavar="NAME=PLACE",
        help="a model's folder, or https://host/v1#model-name (key: $NAME_API_KEY, else $OPENAI_API_KEY); once for each system")
    add("--out", type=Path, required=True, metavar="DIR", help="folder for the pages, answers.jsonl and pictures/")
    add("--n", type=int, default=20, help="questions drawn from the file (default %(default)s: a page for eyes)")
    add("--ids", default=None, metavar="A,B", help="these questions instead")
    add("--seed", type=int, default=0, help="of the draw, and of the order of a blind page (default %(default)s)")
    add("--blind", action="store_true", help="a page without names, to be ranked, instead")
    add("--gloss", action="store_true", help="English beneath the Chinese, from the endpoint that --base-url and --model name")
    add("--max-new-tokens", type=int, default=256, help="of an answer (default %(default)s)")
    add("--batch-size", type=int, default=4, help="questions that a folder answers at a time (default %(default)s)")
    add("--device", default=None, help="for folders: cuda, mps or cpu (default: the first there is)")
    add("--dtype", default=None, choices=("float32", "bfloat16", "float16"), help="for folders (default: what the device does best)")
    add("--quantize", default=None, choices=("int8", "int4"), help="for folders: keep the language model in 8 or 4 bits")
    add_endpoint_flags(parser)


def compare(args, questions):
    """Asks every system every question (of testsets) and writes the page. -> 0, or 1 when a cell stayed empty."""
    check_ranges(args, n=(1, 10**6), max_new_tokens=(1, 10**6), batch_size=(1, 10**6))
    systems, glosser = read_systems(args), Endpoint(args) if args.gloss else None
    questions, digests = choose(args, questions)
    args.out.mkdir(parents=True, exist_ok=True)
    finished, english = Finished(args.out / "answers.jsonl"), Finished(args.out / "glosses.jsonl") if glosser else None
    keys = [[digest(system.settings, [turn["value"] for turn in question.conversation], question.n_images, own) for system in systems] for question, own in zip(questions, digests)]
    todo = [{own[k]: question for own, question in zip(keys, questions) if own[k] not in finished.lines} for k in range(len(systems))]
    for system, part in zip(systems, todo):  # all is agreed to before the first is asked, so that nobody has to wait for a question
        if system.endpoint and part:
            n = sum(len(question.pictures) for question in part.values())
            system.endpoint.confirm(f"for {system.name}, {len(part)} questions and {n} pictures. "
                                    "Of a picture the pixels alone, with whatever is written in them: no file names, no metadata.")
    if glosser:
        texts = {text for question in questions for text in (wording(question), question.truth)}
        texts |= {finished.lines[key]["text"] for own in keys for key in own if key in finished.lines}
        if n := sum(gloss_key(glosser, text) not in english.lines for text in texts if CJK.search(text)) + sum(map(len, todo)):
            glosser.confirm(f"for English beneath the Chinese, up to {n} texts: questions, answers, ground truths. No pictures, ids or file names.")
    failed = {}
    for system, part in zip(systems, todo):
        if part:
            failed |= ask_system(system, part, len(questions) - len(part), args, finished)
    answers = [[finished.lines.get(key) or {"fault": failed[key]} for key in own] for own in keys]
    faults = Counter(f"{system.name}: {line['fault']}" for lines in answers for system, line in zip(systems, lines) if "fault" in line)
    if faults.total() == len(questions) * len(systems):
        raise ValueError(f"nobody answered anything: {faults.most_common(1)[0][0]}")
    glosses = {}
    if glosser:
        texts = [text for question, lines in zip(questions, answers) for text in (wording(question), *(line.get("text", "") for line in lines), question.truth)]
        glosses, reasons = add_glosses(glosser, dict.fromkeys(texts), english)
        faults.update(f"gloss: {reason}" for reason in reasons)
    shown = [[picture_bytes(path, SHOWN, "JPEG", quality=85) for path in question.pictures] for question in questions]
    print((write_blind if args.blind else write_pages)(args, systems, questions, answers, glosses, shown))
    for name, endpoint in [(system.name, system.endpoint) for system in systems] + [("gloss", glosser)]:
        if endpoint and endpoint.answered:
            print(f"{name}: {endpoint.tokens_in:,} tokens read, {endpoint.tokens_out:,} written" + (f", cost {endpoint.cost:.4f}" if endpoint.cost else "")
                  + (f"; retried: {', '.join(f'{reason} x {n}' for reason, n in endpoint.faults.most_common())}" if endpoint.faults else ""), file=sys.stderr)
    if faults:
        why = ", ".join(f"{reason} ({n})" for reason, n in faults.most_common(5))
        print(f"{faults.total()} texts are missing: {why}. What is answered is kept: run the same command again", file=sys.stderr)
    return 1 if faults else 0


# --- 6. rankings ------------------------------------------------------------------------------------------------------


def read_key(path):
    """Which answer of a blind page is whose: {stamp, systems, questions: {number: {id, labels: {label: system}}}}."""
    key = read_json(path)
    if not isinstance(key, dict) or not key.keys() >= {"stamp", "systems", "questions"}:
        raise ValueError(f"{path}: not a key that compare --blind wrote")
    return key


def read_keys(folder):
    """{stamp: key} of the blind pages made in a folder, older ones too."""
    keys = {key["stamp"]: key for key in map(read_key, sorted(Path(folder).glob("blind_key*.json")))}
    if not keys:
        raise FileNotFoundError(f"no blind_key.json in {folder}: rank wants the --out folder of compare --blind")
    return keys


def read_table(path):
    """[(row number, {column: cell})] of a ranking, whatever a spreadsheet made of it: its byte marks, its encoding, commas, semicolons or tabs."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"no such ranking: {path}")
    raw = Path(path).read_bytes()
    for encoding in ("utf-16",) if raw[:2] in (b"\xff\xfe", b"\xfe\xff") else ("utf-8-sig", "gb18030"):  # Excel in Chinese, saving as plain CSV
        try:
            text = raw.decode(encoding)
            break
        except UnicodeDecodeError:
            pass
    else:
        raise ValueError(f"{path}: neither UTF-8 nor GBK: not a table that the page or a spreadsheet wrote")
    delimiter = max(",;\t", key=text.split("\n", 1)[0].count)
    try:
        lines = list(csv.reader(io.StringIO(text, newline=""), delimiter=delimiter))
    except csv.Error as error:
        raise ValueError(f"{path}: no table ({error})") from None
    names = [name.strip().lower() for name in lines[0]] if lines else []
    if missing := [name for name in COLUMNS if name not in names and name != "note"]:
        raise ValueError(f"{path}: not a ranking: no column {missing[0]!r} (its columns are {', '.join(COLUMNS)})")
    return [(i, {"note": ""} | {name: (cell if name == "note" else unicodedata.normalize("NFKC", cell)).strip() for name, cell in zip(names, line)})
            for i, line in enumerate(lines[1:], 2) if any(map(str.strip, line))]


def read_rankings(paths, keys):
    """(key, {(rater, question): {system: rank}}, notes) of the filled-in tables. ValueError names file and row."""
    key, ranks, notes = None, defaultdict(dict), []
    for path in paths:
        for i, row in read_table(path):
            try:
                if missing := [name for name in COLUMNS if name not in row]:
                    raise ValueError(f"it ends before {missing[0]!r}")
                key = key or keys.get(row["sample"])
                if key is None or row["sample"] != key["stamp"]:
                    raise ValueError(f"sample {row['sample']!r} is of another page than " + (f"the rows before ({key['stamp']})" if key else f"those made here ({', '.join(keys)})"))
                question = key["questions"].get(row["question"].lower())
                system = question and question["labels"].get(row["label"].upper())
                if system is None:
                    raise ValueError(f"the page has no answer {row['label']!r} of question {row['question']!r}")
                if row["note"]:
                    notes.append({"question": question["id"], "system": system, "rater": row["rater"], "note": row["note"]})
                if not row["rank"]:
                    continue
                if not re.fullmatch(r"\d{1,3}(\.0+)?", row["rank"]) or not 1 <= float(row["rank"]) <= len(question["labels"]):
                    raise ValueError(f"rank {row['rank']!r}: must be a whole number from 1 to {len(question['labels'])}")
                if not row["rater"]:
                    raise ValueError("no rater")
                own = ranks[row["rater"], row["question"].lower()]
                if own.setdefault(system, int(float(row["rank"]))) != int(float(row["rank"])):
                    raise ValueError(f"{row['rater']} gave this answer rank {own[system]} before")
            except ValueError as error:
                raise ValueError(f"{path}: row {i}: {one_line(error)}") from None
    if not any(len(own) > 1 for own in ranks.values()):
        raise ValueError(f"{paths[0]}: nobody ranked two answers of a question")
    return key, ranks, notes


def interval(by_question, share=True):
    """Mean over questions, each counted once however many rated it, with a 95 % interval by bootstrap over questions: ratings of one question go together.

    Where all questions agree the bootstrap has no width: a share then has Wilson's interval for as many questions, another mean none."""
    if not by_question:
        return None
    values = np.array([np.mean(own) for own in by_question.values()])
    means = values[np.random.default_rng(0).integers(0, len(values), (2000, len(values)))].mean(1)
    low, high = np.percentile(means, [2.5, 97.5]) if np.ptp(values) else wilson(values.sum(), len(values)) if share else (None, None)
    return {"mean": float(values.mean()), "low": low if low is None else float(low), "high": high if high is None else float(high),
            "questions": len(values), "ratings": sum(map(len, by_question.values()))}


def agreement(ranks):
    """Mean over pairs of raters of Kendall's tau-b, and of the share of pairs of answers that both put in the same order; None with one rater."""
    taus, same, n_pairs = [], [], 0
    for a, b in combinations(sorted({rater for rater, _ in ranks}), 2):
        signs = []  # of every two answers that both ranked: how either ordered them, -1, 0 or 1
        for question in {question for rater, question in ranks if rater == a and (b, question) in ranks}:
            one, other = ranks[a, question], ranks[b, question]
            signs += [[np.sign(own[x] - own[y]) for own in (one, other)] for x, y in combinations(sorted(one.keys() & other.keys()), 2)]
        if signs:
            x, y = np.array(signs).T
            n_pairs += len(signs)
            same.append(float((x == y).mean()))
            if x.any() and y.any():
                taus.append(float((x * y).sum() / np.sqrt((x * x).sum() * (y * y).sum())))
    return {"pairs_of_raters": len(same), "pairs_of_answers": n_pairs, "tau_b": float(np.mean(taus)) if taus else None, "same_order": float(np.mean(same))} if same else None


def summarise(key, ranks):
    """What rank.json holds, from {(rater, question): {system: rank}}. Mean rank and first place count where a rater ranked all systems, win rates wherever two were."""
    places, firsts, wins = defaultdict(lambda: defaultdict(list)), defaultdict(lambda: defaultdict(list)), defaultdict(lambda: defaultdict(list))
    ranks = {who: own for who, own in sorted(ranks.items()) if len(own) > 1}
    for (_, question), own in ranks.items():
        for a, b in combinations(key["systems"], 2):
            if a in own and b in own:
                wins[a, b][question].append((1 + np.sign(own[b] - own[a])) / 2)
        if len(own) == len(key["systems"]):
            best = [name for name in own if own[name] == min(own.values())]
            for name, rank in own.items():
                above, level = (sum(test(other) for other in own.values()) for test in (lambda other: other < rank, lambda other: other == rank))
                places[name][question].append(above + (level + 1) / 2)  # those who tie share the places they take: 1, 1, 3 and 1, 1, 2 are the same
                firsts[name][question].append(1 / len(best) if name in best else 0.0)
    return {"sample": key["stamp"], "questions": len({question for _, question in ranks}), "raters": len({rater for rater, _ in ranks}), "rankings": len(ranks),
            "systems": {name: {"rank": interval(places[name], share=False), "first": interval(firsts[name])} for name in key["systems"]},
            "wins": [{"system": a, "against": b, **interval(wins[a, b])} for a, b in combinations(key["systems"], 2) if wins[a, b]], "agreement": agreement(ranks)}


def rank_report(result):
    def shown(value, form):
        return "-" if value is None else format(value, form)

    def cell(found, form):
        return "- | - | 0" if found is None else (f"{found['mean']:{form}} | " + ("-" if found["low"] is None else f"{found['low']:{form}} to {found['high']:{form}}")
                                                  + f" | {found['questions']} questions, {found['ratings']} ratings")

    def name(text):
        return markdown_text(text, {})

    lines = [f"# Blind ranking: {result['questions']} questions, {result['raters']} raters, {result['rankings']} rankings", "",
             "| system | mean rank (1 is best) | 95 % interval | n | ranked first | 95 % interval | n |", "|---|---|---|---|---|---|---|"]
    for system, own in sorted(result["systems"].items(), key=lambda item: item[1]["rank"]["mean"] if item[1]["rank"] else 99):
        lines.append(f"| {name(system)} | {cell(own['rank'], '.2f')} | {cell(own['first'], '.1%')} |")
    lines += ["", "| system | against | wins | 95 % interval | n |", "|---|---|---|---|---|"]
    lines += [f"| {name(own['system'])} | {name(own['against'])} | {cell(own, '.1%')} |" for own in result["wins"]]
    if own := result["agreement"]:
        lines += ["", f"Raters: Kendall's tau-b {shown(own['tau_b'], '.2f')}, the same order in {own['same_order']:.1%} of the pairs of answers that two ranked "
                  f"({own['pairs_of_raters']} pairs of raters, {own['pairs_of_answers']} pairs of answers)."]
    return lines + ["", "Ties count half. Mean rank and first place: where a rater ranked every system. Each question counts once; intervals by bootstrap over questions "
                    "(Wilson's where all of them agree). Research only: no medical advice."]


def add_rank_flags(parser):
    parser.add_argument("dir", type=Path, help="the --out folder of compare --blind")
    parser.add_argument("rankings", nargs="+", metavar="RANKING.csv", help="what the page's button gave; one file or several for each rater")


def rank(args):
    """Takes the doctors' rankings back and writes rank.json and rank.md beside the key. -> 0."""
    key, ranks, notes = read_rankings(args.rankings, read_keys(args.dir))
    result = summarise(key, ranks)
    lines = rank_report(result)
    write_json(args.dir / "rank.json", result | {"notes": notes})
    write_text(args.dir / "rank.md", "\n".join(lines) + "\n")
    print("\n".join(lines))
    return 0


def main():
    """`evaluate.py compare …` and `evaluate.py rank …`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    asked = commands.add_parser("compare", help="the same questions to several systems, side by side")
    asked.add_argument("file", help="test set: PMC-VQA, SLAKE, VQA-RAD, dialogs or your own")
    asked.add_argument("--images", required=True, metavar="DIR", help="folder that picture names are relative to")
    asked.add_argument("--skip-bad", action="store_true", help="leave out rows that cannot be used instead of stopping")
    asked.add_argument("--encoding", default="utf-8", help="of a .csv or .tsv file (default %(default)s)")
    add_compare_flags(asked)
    add_rank_flags(commands.add_parser("rank", help="what the doctors gave back"))
    args = parser.parse_args()
    if args.command == "rank":
        sys.exit(rank(args))
    _, questions, left_out = read_testset(args.file, args.images, args.skip_bad, args.encoding)
    for reason, n in left_out.most_common(5):
        print(f"left out: {n} rows: {reason}", file=sys.stderr)
    sys.exit(compare(args, questions))
