"""The experts' part of data_prep.py: a stratified sample of translations as one self-contained page and a table, and what a doctor decided taken back in."""

import argparse
import base64
import csv
import html
import io
import json
import os
import random
import re
import sys
from collections import Counter
from pathlib import Path

from chimed.prompts import FIELDS
from chimed.quality import quality
from chimed.translate import Task, is_whole_line
from common.files import write_json, write_text
from common.intervals import wilson
from common.journal import Journal
from common.options import InRange
from common.rows import BadRow, Records
from common.text import clean_text
from model_io.pixels import find_picture, open_image

VERDICTS = {
    "accept": "accept",
    "fix": "fix",
    "reject": "reject",
    "接受": "accept",
    "修改": "fix",
    "拒绝": "reject",
}
COLUMNS = ["sample", "file", "key", "field", "english", "chinese", "verdict", "fixed", "note"]
THUMBNAIL = 512  # pixels, the longer side, of a picture on the page

# --- 1. the page ----------------------------------------------------------------------------------------------------

PAGE = """<!doctype html>
<html lang="zh"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1"><title>译文审核 translation review</title>
<style>
body {{ font: 16px/1.6 system-ui, "Noto Sans CJK SC", "PingFang SC", "Microsoft YaHei", sans-serif; max-width: 1100px; margin: 0 auto; padding: 0 1rem 6rem; color: #222; }}
header {{ position: sticky; top: 0; background: #fff; border-bottom: 1px solid #ccc; padding: .6rem 0; z-index: 1; }}
article {{ border: 1px solid #ccc; border-radius: 6px; margin: 1.2rem 0; padding: 1rem; }} article.done {{ border-color: #3a3; }}
img {{ max-width: 100%; max-height: 380px; display: block; margin: 0 auto .6rem; background: #eee; }}
.pair {{ display: grid; grid-template-columns: 1fr 1fr; gap: 1rem; border-top: 1px solid #eee; padding: .6rem 0; }}
.en {{ color: #444; overflow-wrap: anywhere; }} textarea {{ width: 100%; min-height: 5rem; font: inherit; box-sizing: border-box; }} small {{ color: #666; }}
label {{ margin-right: 1rem; }} button {{ font: inherit; padding: .3rem 1rem; }}
@media (max-width: 700px) {{ .pair {{ grid-template-columns: 1fr; }} }}
</style></head><body>
<header><b>译文审核</b> 共 {n} 条。改动文字即为"修改"。<span id="count"></span> <button id="save">下载 review.csv</button>
<br><small>Accept, fix (edit the text) or reject each text; then download the table and give it back. Kept in this browser until then; nothing is sent anywhere.</small></header>
{cards}
<script>
"use strict";
const pairs = [...document.querySelectorAll(".pair")], slot = p => "{stamp}/" + p.dataset.sample + "/" + p.dataset.key + "/" + p.dataset.field;
const verdict = p => (p.querySelector("input:checked") || {{value: ""}}).value, text = p => p.querySelector("textarea").value;
function shown() {{
  document.getElementById("count").textContent = pairs.filter(verdict).length + " / " + pairs.length;
  document.querySelectorAll("article").forEach(a => a.classList.toggle("done", [...a.querySelectorAll(".pair")].every(verdict)));
}}
function keep(p) {{ try {{ localStorage.setItem(slot(p), JSON.stringify([verdict(p), text(p), p.querySelector(".note").value])); }} catch (e) {{}} shown(); }}
pairs.forEach(p => {{
  let kept = null; try {{ kept = JSON.parse(localStorage.getItem(slot(p))); }} catch (e) {{}}
  if (kept) {{ p.querySelector("textarea").value = kept[1]; p.querySelector(".note").value = kept[2]; p.querySelectorAll("input[type=radio]").forEach(r => r.checked = r.value === kept[0]); }}
  p.querySelectorAll("input").forEach(i => i.addEventListener("input", () => keep(p)));
  p.querySelector("textarea").addEventListener("input", () => {{ p.querySelector("input[value=fix]").checked = text(p) !== p.dataset.chinese; keep(p); }});
}});
document.getElementById("save").addEventListener("click", () => {{
  const cell = s => '"' + String(s).replaceAll('"', '""') + '"';
  const rows = pairs.map(p => [p.dataset.sample, p.dataset.file, p.dataset.key, p.dataset.field, p.querySelector(".en").textContent, p.dataset.chinese,
                               verdict(p), verdict(p) === "fix" ? text(p) : "", p.querySelector(".note").value]);
  const csv = "\\ufeff" + [{columns}, ...rows].map(r => r.map(cell).join(",")).join("\\r\\n") + "\\r\\n";
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([csv], {{type: "text/csv"}})); link.download = "review.csv"; link.click();
}});
shown();
</script></body></html>
"""
CARD = "<article><small>{sample}. {file}</small>{pictures}{pairs}</article>\n"
PAIR = (
    '<div class="pair" data-sample="{sample}" data-file="{file}" data-key="{key}" data-field="{field}" data-chinese="{chinese}"><div><small>{label}</small><div class="en">{english}</div></div>'
    '<div><textarea lang="zh">{chinese}</textarea><label><input type="radio" name="{sample}-{field}" value="accept">接受</label><label><input type="radio" name="{sample}-{field}" value="fix">修改</label>'
    '<label><input type="radio" name="{sample}-{field}" value="reject">拒绝</label><input class="note" placeholder="备注"></div></div>'
)


def picture_data(names, roots):
    """An <img> for each picture of a row that is found and decodes; a word for one that is not."""
    tags = []
    for choices in names:
        try:
            image = open_image(find_picture(choices, roots)[0])
        except (BadRow, ValueError, OSError):
            tags.append("<p><small>没有找到图片 picture not found</small></p>" if roots else "")
            continue
        image.thumbnail((THUMBNAIL, THUMBNAIL))
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", quality=85)
        tags.append(
            f'<img alt="" src="data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}">'
        )
    return "".join(tags)


# --- 2. sample ------------------------------------------------------------------------------------------------------


def journal_of(path, rejected):
    """The journal of a translated file, with the rows that were rejected or without. FileNotFoundError says what to do."""
    journal = Path(f"{path}.journal.jsonl")
    if not Path(path).is_file() or not journal.is_file():
        raise FileNotFoundError(
            f"{path} is no file that translate wrote (no {journal.name} beside it): review compares its English with its Chinese"
        )
    journal = Journal(journal, is_whole_line)
    journal.load(lambda line: rejected or not line["reasons"])
    return journal


def shares(sizes, n):
    """How many of n go to each stratum, in proportion to its size, one at least, all of it at most; largest remainders first."""
    total = sum(sizes)
    n = min(n, total)
    exact = [n * size / total for size in sizes]
    parts = [min(size, max(1, int(x))) if size else 0 for size, x in zip(sizes, exact)]
    while sum(parts) < n:
        k = max(
            (k for k in range(len(sizes)) if parts[k] < sizes[k]), key=lambda k: exact[k] - parts[k]
        )
        parts[k] += 1
    return parts


def take_sample(args):
    if args.out is None:
        raise ValueError("name a folder for the sample by --out (or a filled-in table by --import)")
    for root in args.images:
        if not Path(root).is_dir():
            raise FileNotFoundError(f"no such image folder: {root}")
    roots = tuple(os.path.realpath(root) for root in args.images)
    journals = [
        journal_of(path, rejected=False) for path in args.files
    ]  # rejected rows are not in the files
    keys = [journal.keys() for journal in journals]
    if not any(keys):
        raise ValueError("no translated row in these files")
    rng, rows = random.Random(args.seed), []
    for path, journal, own, n in zip(
        args.files, journals, keys, shares([len(own) for own in keys], args.n)
    ):
        rows += [(path, journal.find(key)) for key in rng.sample(own, n)]
    rng.shuffle(rows)
    table, cards = [], []
    for sample, (path, line) in enumerate(rows, 1):
        pairs = []
        for field, english in line["english"].items():
            table.append(
                [
                    sample,
                    path,
                    f"k{line['key']}",
                    field,  # or a spreadsheet takes 12e45 for a number
                    english,
                    line["chinese"].get(field, ""),
                    "",
                    "",
                    "",
                ]
            )
            pairs.append(
                PAIR.format(
                    sample=sample,
                    label=html.escape(f"{FIELDS.get(field, '')} {field}"),
                    **{
                        name: html.escape(str(value))
                        for name, value in zip(COLUMNS[1:6], table[-1][1:6])
                    },
                )
            )
        cards.append(
            CARD.format(
                sample=sample,
                file=html.escape(f"{line['source']}: {path}"),
                pictures=picture_data(line.get("images", []), roots),
                pairs="".join(pairs),
            )
        )
    args.out.mkdir(parents=True, exist_ok=True)
    stamp = "-".join(sorted(line["key"] for _, line in rows)[:3])
    write_text(
        args.out / "review.html",
        PAGE.format(
            n=len(rows), cards="".join(cards), columns=json.dumps(COLUMNS), stamp=html.escape(stamp)
        ),
    )
    text = io.StringIO(newline="")
    csv.writer(text).writerows([COLUMNS, *table])
    write_text(
        args.out / "review.csv", "\ufeff" + text.getvalue()
    )  # Excel takes it for UTF-8 by the mark
    print(
        f"{len(rows)} rows of {sum(map(len, keys)):,}: "
        + ", ".join(
            f"{Path(path).name} {sum(1 for p, _ in rows if p == path)} of {len(own):,}"
            for path, own in zip(args.files, keys)
        )
    )
    print(
        f"{args.out / 'review.html'}: to fill in with a browser; {args.out / 'review.csv'}: the same as a table. Then: data_prep.py review {' '.join(args.files)} --import review.csv"
    )


# --- 3. import ------------------------------------------------------------------------------------------------------


def read_filled(path, files):
    """{(file, key): {field: (verdict, fixed)}} of a filled-in table. ValueError names the line."""
    raw = Path(path).read_bytes()
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError:
        text = raw.decode("gb18030", "replace")  # Excel in Chinese, saving as plain CSV
    try:
        lines = list(csv.reader(io.StringIO(text, newline="")))
    except csv.Error as error:
        raise ValueError(f"{path}: no table ({error})") from None
    if not lines or lines[0][:8] != COLUMNS[:8]:
        raise ValueError(f"{path}: not a review table (its columns are {', '.join(COLUMNS)})")
    names = Counter(Path(file).name for file in files)
    known, decided = (
        {str(file): str(file) for file in files}
        | {Path(file).name: str(file) for file in files if names[Path(file).name] == 1},
        {},
    )
    for number, line in enumerate(lines[1:], 2):
        if not any(cell.strip() for cell in line):
            continue
        row = dict(zip(COLUMNS, line))
        verdict = (
            VERDICTS.get(row.get("verdict", "").strip().lower())
            if row.get("verdict", "").strip()
            else ""
        )
        if verdict is None:
            raise ValueError(
                f"{path}: row {number}: verdict {row['verdict']!r} is none of accept, fix, reject (接受， 修改， 拒绝）"
            )
        row["key"] = row["key"].strip().lower().removeprefix("k")
        file = known.get(row["file"]) or known.get(Path(row["file"]).name)
        if file is None:
            raise ValueError(f"{path}: row {number}: {row['file']} is not among the files named")
        fixed = clean_text(row.get("fixed", ""))
        if fixed and verdict in ("accept", "reject"):
            raise ValueError(
                f"{path}: row {number}: a text under 'fixed', but the verdict is {row['verdict'].strip()}: say fix, or empty it"
            )
        verdict = "fix" if fixed else verdict
        if verdict == "fix" and not fixed:
            raise ValueError(f"{path}: row {number}: fix without a text under 'fixed'")
        fields = decided.setdefault((file, row["key"]), {})
        if fields.get(row["field"], (verdict, fixed)) != (verdict, fixed):
            raise ValueError(f"{path}: row {number}: decided otherwise in a row above")
        fields[row["field"]] = verdict, fixed
    return decided


def take_back(args):
    if not Path(args.filled).is_file():
        raise FileNotFoundError(f"no such review table: {args.filled}")
    decided, work = read_filled(args.filled, args.files), []
    for path in args.files:  # everything is looked at before anything is changed
        journal, lines = journal_of(path, rejected=True), []
        if not journal.header or not Path(journal.header["raw"]).is_file():
            raise ValueError(
                f"{path}: the file it was translated from is not at {journal.header and journal.header['raw']}: needed to write it again"
            )
        for (file, key), fields in decided.items():
            if file == str(path):
                line = journal.find(int(key, 16)) if re.fullmatch("[0-9a-f]{1,16}", key) else None
                if line is None:
                    raise ValueError(f"{args.filled}: {key!r} is no row of {path}")
                if unknown := set(fields) - set(line["english"]):
                    raise ValueError(f"{args.filled}: {key}: no field {sorted(unknown)[0]!r}")
                lines.append((line, fields))
        work.append((str(path), journal, lines))
    counts = {path: Counter() for path, *_ in work}
    for path, journal, lines in work:
        for line, fields in lines:
            verdicts = {verdict for verdict, _ in fields.values()}
            verdict = (
                "reject"
                if "reject" in verdicts
                else "open"
                if "" in verdicts or len(fields) < len(line["english"])
                else "fix"
                if "fix" in verdicts
                else "accept"
            )
            counts[path][verdict] += 1
            fixed = {field: text for field, (decision, text) in fields.items() if decision == "fix"}
            if verdict == "open" and not fixed:
                continue
            for reason in quality({field: line["english"][field] for field in fixed}, fixed):
                print(
                    f"data_prep.py: {path}, {line['key']}: the fix is taken, though the checks say {reason}",
                    file=sys.stderr,
                )
            journal.add(
                line
                | {
                    "chinese": line["chinese"] | fixed,
                    "reasons": ["rejected by the reviewer"] if verdict == "reject" else [],
                    "review": verdict,
                }
            )
        journal.sync()
        header = journal.header
        journal.close()
        task = Task(
            header["source"],
            Records(header["raw"], header["encoding"]),
            Path(path).parent,
            {name: tuple(names) for name, names in header["columns"].items()},
        )
        task.journal.load()
        task.finish()
        task.journal.close()
    report(args, counts)


def report(args, counts):
    total = sum(counts.values(), Counter())
    lines = [
        "| file | reviewed | accepted as they are | 95 % interval | fixed | rejected | not decided |",
        "|---|---|---|---|---|---|---|",
    ]
    result = {}
    for name, n in [*counts.items(), ("all", total)]:
        reviewed = n["accept"] + n["fix"] + n["reject"]
        low, high = wilson(n["accept"], reviewed)
        result[name] = {
            "reviewed": reviewed,
            "accepted": n["accept"],
            "fixed": n["fix"],
            "rejected": n["reject"],
            "open": n["open"],
            "acceptance": n["accept"] / reviewed if reviewed else None,
            "interval": [low, high],
        }
        lines.append(
            f"| {name} | {reviewed} | {n['accept']}"
            + (f" ({n['accept'] / reviewed:.1%}) | {low:.1%} to {high:.1%}" if reviewed else " | -")
            + f" | {n['fix']} | {n['reject']} | {n['open']} |"
        )
    print("\n".join(lines))
    print("fixes and rejections are in the files and their journals")
    write_json(Path(args.filled).with_suffix(".report.json"), result)


def add_command(commands: argparse._SubParsersAction) -> None:
    about = "a random sample of translations, stratified by file, for a doctor: review.html (self-contained) and review.csv; --import reads it back"
    parser = commands.add_parser(
        "review",
        help=about,
        description=about,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run=run)
    add = parser.add_argument
    add(
        "files",
        nargs="+",
        metavar="FILE",
        help="translated files, as translate wrote them (their journals beside them)",
    )
    add("--out", type=Path, metavar="DIR", help="where the sample goes")
    add(
        "--n",
        action=InRange,
        type=int,
        low=1,
        high=10**6,
        default=200,
        help="rows, over all files in proportion to their size (default %(default)s)",
    )
    add("--images", nargs="+", default=[], metavar="DIR", help="folders of the pictures")
    add("--seed", type=int, default=0)
    add(
        "--import",
        dest="filled",
        metavar="CSV",
        help="the filled-in file: fixes and rejections go into the files, acceptance is reported",
    )


def run(args: argparse.Namespace) -> int:
    args.files = list(dict.fromkeys(args.files))
    if args.filled:
        take_back(args)
    else:
        take_sample(args)
    return 0
