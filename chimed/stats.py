"""Tables 1 and 2 and Figures 1 and 2 of the paper (arXiv 2310.17956) for built files: token counts by set, exact quantiles in one pass; histograms,
word clouds, a sheet of pictures by modality."""

import argparse
import heapq
import importlib.util
import os
import re
import sys
from collections import Counter
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

from chimed.prompts import CONTEXT, MODALITIES
from chimed.sources import SOURCES, own_question
from chimed.workers import add_workers_option, in_order
from common.files import write_json, write_text
from common.rows import BadRow, Records, find_rows
from common.text import text_key
from model_io.pixels import find_picture, open_image
from model_io.tokens import Tokenizer, check_conversation
from qilin_min import IMAGE_TOKEN

# --- 1. one pass ----------------------------------------------------------------------------------------------------

BLOCK = 500
CLOUD_TEXTS = 20_000  # texts a word cloud is made of, drawn evenly: cutting words out of a million takes an hour
SHEET = 6  # pictures of a modality on the sheet
NAMES = {
    "pmc-oa": "PMC-OA",
    "pmc-casereport": "PMC-CaseReport",
    "pmc-vqa": "PMC-VQA",
    "own": "own",
    "chimed-alignment": "ChiMed-VL",
    "chimed-instruction": "ChiMed-VL",
}
HITS = {
    name: re.compile(
        "|".join(
            re.escape(word)
            if not word.isascii()
            else rf"(?<![A-Za-z]){re.escape(word)}(?![A-Za-z])"
            if word != word.lower()
            else rf"(?<![A-Za-z])(?i:{re.escape(word)}s?)(?![A-Za-z])"
            for word in sorted(words, key=len, reverse=True)
        )
    )
    for name, words in MODALITIES.items()
}


def source_of(row_id):
    """The set a dialog came from, by the id that build gave it."""
    return next(
        (NAMES[source] for source in SOURCES if str(row_id).startswith(f"{source}-")), "other"
    )


def modality_of(text):
    """The first row of the keyword table with a word in the text, or "unknown"."""
    return next((name for name, pattern in HITS.items() if pattern.search(text)), "unknown")


def count_block(state, f, start, stop):
    """Counts of rows start to stop of a file: lengths {(set, kind): {tokens: n}}, pairs, modalities, pictures for the sheet, texts for the cloud, bad rows."""
    (subset, rows, every), tokenizer = state[0][f], state[1]
    lengths, pairs, modalities, sheet, texts, bad = {}, Counter(), Counter(), [], [], 0
    for i in range(start, stop):
        try:
            row = rows[i]
            check_conversation(row["conversations"])
        except (ValueError, TypeError, KeyError):
            bad += 1
            continue
        source, turns = (
            source_of(row.get("id")),
            [turn["value"].encode("utf-8", "ignore").decode() for turn in row["conversations"]],
        )
        for question, answer in zip(turns[::2], turns[1::2]):
            pairs[source] += 1
            if subset == "alignment":
                kind = (
                    "C"
                    if str(row.get("id")).endswith("-context")
                    or question.replace(IMAGE_TOKEN, "").strip() in CONTEXT
                    else "I"
                )
                counted = [(kind, answer)]
            else:
                counted = [("Q", own_question(question)), ("A", answer)]
            for kind, text in counted:
                lengths.setdefault((source, kind), Counter())[len(tokenizer.encode(text))] += 1
                texts += [text] if i % every == 0 else []
        modality = modality_of(
            " ".join(turns[1::2] if subset == "alignment" else (own_question(turns[0]), *turns[1:]))
        )
        modalities[modality] += 1
        image = row.get("image")
        if isinstance(image, str):
            sheet.append((text_key(image), modality, image))
    best = [
        entry
        for name in (*HITS, "unknown")
        for entry in heapq.nsmallest(3 * SHEET, (s for s in sheet if s[1] == name))
    ]
    return lengths, pairs, modalities, best, texts, bad


def quantile(counts, p):
    """The p-quantile of numbers given as {number: how many}, as numpy.quantile of them all: between two it is interpolated."""
    numbers = sorted(counts)
    ends = np.cumsum([counts[number] for number in numbers])
    place = p * (int(ends[-1]) - 1)
    low, high = (
        numbers[int(np.searchsorted(ends, k, side="right"))]
        for k in (int(np.floor(place)), int(np.ceil(place)))
    )
    return low + (high - low) * (place - np.floor(place))


# --- 2. tables ------------------------------------------------------------------------------------------------------


def describe(counts):
    """{texts, tokens, max, median, q1, q3} of {tokens: how many}."""
    return {
        "texts": sum(counts.values()),
        "tokens": sum(length * n for length, n in counts.items()),
        "max": max(counts),
        **{
            name: float(quantile(counts, p))
            for name, p in (("median", 0.5), ("q1", 0.25), ("q3", 0.75))
        },
    }


def make_table(lengths, pairs, kinds):
    """{set or "total": {pairs, kind: describe()}}"""
    table = {}
    for source in [*sorted(pairs), "total"]:
        entry = {"pairs": pairs.total() if source == "total" else pairs[source]}
        for kind in kinds:
            counts = sum(
                (c for (s, k), c in lengths.items() if k == kind and source in (s, "total")),
                Counter(),
            )
            if counts:
                entry[kind] = describe(counts)
        table[source] = entry
    return table


def millions(n):
    return f"{n / 1e6:,.0f} M" if n >= 10**7 else f"{n / 1e6:.1f} M" if n >= 10**6 else f"{n:,}"


def markdown(title, table, kinds, what):
    """The table in the paper's form: sets beside each other, - where a set has no such text."""

    def cell(entry, kind, show):
        return show(entry[kind]) if kind in entry else "-"

    rows = [(what, [f"{entry['pairs']:,}" for entry in table.values()])]
    rows += [
        (
            f"{kind} tokens",
            [cell(entry, kind, lambda d: millions(d["tokens"])) for entry in table.values()],
        )
        for kind in kinds
    ]
    rows += [
        (
            f"max {' / '.join(kinds)} tokens",
            [
                " / ".join(cell(entry, kind, lambda d: f"{d['max']:,}") for kind in kinds)
                for entry in table.values()
            ],
        )
    ]
    rows += [
        (
            f"median (Q1, Q3) {kind} tokens",
            [
                cell(entry, kind, lambda d: f"{d['median']:g} ({d['q1']:g}, {d['q3']:g})")
                for entry in table.values()
            ],
        )
        for kind in kinds
    ]
    return (
        "\n".join(
            [
                f"## {title}",
                "",
                f"| | {' | '.join(table)} |",
                f"|---|{'---|' * len(table)}",
                *(f"| {name} | {' | '.join(cells)} |" for name, cells in rows),
            ]
        )
        + "\n"
    )


# --- 3. figures -----------------------------------------------------------------------------------------------------

FONT_FILES = re.compile(
    r"(?:NotoSans(?:Mono)?(?:CJK|SC)|NotoSerifCJK|SourceHanSans|SourceHanSerif|wqy-|simhei|simsun|msyh|PingFang|STHeiti|Hiragino Sans GB|DroidSansFallback|ukai|uming)[^/]*\.(?:ttc|ttf|otf)$",
    re.IGNORECASE,
)
FONT_FOLDERS = (
    "/usr/share/fonts",
    "/usr/local/share/fonts",
    "~/.fonts",
    "~/.local/share/fonts",
    "/System/Library/Fonts",
    "/Library/Fonts",
    "~/Library/Fonts",
    "C:/Windows/Fonts",
)


def has_chinese(path):
    """True for a font file that draws simplified Chinese, which Japanese ones lack in part: no box in place of a character."""
    try:
        font = ImageFont.truetype(path, 20)
        return all(
            bytes(font.getmask(c)) != bytes(font.getmask("\uffff")) for c in "\u7ed3\u68c0\u8bca"
        )
    except OSError:
        return False


def find_font(given):
    """A font file with Chinese characters: the one given, or one of the usual ones on this machine; None without. ValueError for one that has none."""
    if given:
        if not has_chinese(given):
            raise ValueError(
                f"--font {given}: no font file, or one without simplified Chinese characters"
            )
        return given
    package = importlib.util.find_spec("zhplot")  # a package that brings one along
    for folder in [
        *(package.submodule_search_locations if package else ()),
        *map(os.path.expanduser, FONT_FOLDERS),
    ]:
        for path, _, files in os.walk(folder):
            for name in sorted(files):
                if FONT_FILES.search(name) and has_chinese(os.path.join(path, name)):
                    return os.path.join(path, name)
    return None


def draw_histograms(tables, path):
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    kinds = [
        (subset, kind, counts)
        for subset, lengths in tables.items()
        for kind in ("C", "I", "Q", "A")
        if (counts := sum((c for (_, k), c in lengths.items() if k == kind), Counter()))
    ]
    names = {"C": "context", "I": "inline text, caption", "Q": "question", "A": "answer"}
    figure, axes = plt.subplots(1, len(kinds), figsize=(4 * len(kinds), 3.2), squeeze=False)
    for axis, (subset, kind, counts) in zip(axes[0], kinds):
        top = max(10, quantile(counts, 0.995))
        axis.hist(
            list(counts),
            weights=list(counts.values()),
            bins=np.arange(0, top + 2, max(1, round(top / 50))) - 0.5,
            color="#4477aa",
        )
        axis.axvline(quantile(counts, 0.5), color="#cc3311", linewidth=1)
        axis.set(
            title=f"{subset}: {names[kind]}",
            xlabel=f"tokens (line: median; {sum(n for length, n in counts.items() if length > top):,} longer)",
            ylabel="texts",
        )
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def draw_cloud(texts, font, path):
    """A word cloud of the nouns, verbs and terms of some texts, cut into words by jieba. False when there are no words."""
    import jieba
    from wordcloud import WordCloud

    jieba.setLogLevel(60)
    words = Counter(
        word
        for text in texts
        for word in jieba.cut(text)
        if len(word) > 1 and not word.isascii() and re.search(r"[\u4e00-\u9fff]", word)
    )
    if not words:
        return False
    WordCloud(
        font_path=font,
        width=1000,
        height=600,
        background_color="white",
        max_words=150,
        random_state=0,
    ).generate_from_frequencies(words).to_file(path)
    return True


def draw_sheet(entries, counts, root, font, path):
    """Figure 1: a line of pictures for each modality. entries: (key, modality, name), the smallest keys first; those that do not decode are passed over."""
    size, label = 150, 230
    lines = []
    for name in [*HITS, "unknown"]:
        pictures = []
        for _, _, image in sorted(e for e in entries if e[1] == name):
            try:
                picture = open_image(find_picture([image], (root,))[0])
            except (BadRow, ValueError, OSError):
                continue
            picture.thumbnail((size, size))
            pictures.append(picture)
            if len(pictures) == SHEET:
                break
        if counts[name]:
            lines.append((name, pictures))
    sheet = Image.new("RGB", (label + SHEET * (size + 8), max(1, len(lines)) * (size + 8)), "white")
    pen, letters = (
        ImageDraw.Draw(sheet),
        ImageFont.truetype(font, 18) if font else ImageFont.load_default(18),
    )
    for y, (name, pictures) in enumerate(lines):
        shown = name if font or name.isascii() else name.split(" ", 1)[1]
        pen.text(
            (10, y * (size + 8) + size // 2 - 20),
            f"{shown}\n{counts[name]:,}",
            fill="black",
            font=letters,
        )
        for x, picture in enumerate(pictures):
            sheet.paste(
                picture,
                (
                    label + x * (size + 8) + (size - picture.width) // 2,
                    y * (size + 8) + (size - picture.height) // 2,
                ),
            )
    sheet.save(path)


# --- 4. command -----------------------------------------------------------------------------------------------------


def add_command(commands: argparse._SubParsersAction) -> None:
    about = (
        "Tables 1 and 2, Figures 1 and 2 of the paper for built files: stats.md, stats.json, PNGs"
    )
    parser = commands.add_parser(
        "stats",
        help=about,
        description=about,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run=run)
    add = parser.add_argument
    add("--alignment", nargs="+", default=[], metavar="FILE", help="dialogs of stage 1")
    add("--instruction", nargs="+", default=[], metavar="FILE", help="dialogs of stage 2")
    add(
        "--tokenizer",
        required=True,
        metavar="DIR",
        help="a LLaMA folder or tokenizer.model: what tokens are counted with",
    )
    add("--out", type=Path, required=True, metavar="DIR")
    add("--images", metavar="DIR", help="folder of the pictures, for the contact sheet (Figure 1)")
    add(
        "--font",
        metavar="FILE",
        help="a font with Chinese characters, for word clouds (default: looked for)",
    )
    add("--no-figures", action="store_true", help="tables alone")
    add_workers_option(parser, "processes (default %(default)s)")


def run(args: argparse.Namespace) -> int:
    named = [("alignment", path) for path in args.alignment] + [
        ("instruction", path) for path in args.instruction
    ]
    if not named:
        raise ValueError("name built files by --alignment FILE, --instruction FILE or both")
    if args.images and not Path(args.images).is_dir():
        raise FileNotFoundError(f"no such image folder: {args.images}")
    font = find_font(args.font)
    files = [(subset, Records(path, ranges=find_rows(path))) for subset, path in named]
    totals = Counter()
    for subset, rows in files:
        totals[subset] += len(rows)
    if not totals.total():
        raise ValueError(f"{', '.join(path for _, path in named)}: no rows")
    state = (
        [(subset, rows, max(1, totals[subset] // CLOUD_TEXTS)) for subset, rows in files],
        Tokenizer(args.tokenizer),
    )
    lengths, pairs, modalities, sheets, clouds, bad = {}, {}, {}, [], {}, 0
    tasks = [
        (f, start, min(start + BLOCK, len(rows)))
        for f, (_, rows) in enumerate(files)
        for start in range(0, len(rows), BLOCK)
    ]
    with tqdm(total=totals.total(), desc="counting", unit=" rows", disable=None) as bar:
        for (f, start, stop), (more, n_pairs, kinds, sheet, texts, n_bad) in zip(
            tasks, in_order(count_block, tasks, args.workers, state)
        ):
            subset = files[f][0]
            for key, counts in more.items():
                lengths.setdefault(subset, {}).setdefault(key, Counter()).update(counts)
            pairs.setdefault(subset, Counter()).update(n_pairs)
            modalities.setdefault(subset, Counter()).update(kinds)
            sheets = [
                entry
                for name in (*HITS, "unknown")
                for entry in heapq.nsmallest(
                    3 * SHEET, {e for e in (*sheets, *sheet) if e[1] == name}
                )
            ]
            clouds.setdefault(subset, []).extend(texts)
            bad += n_bad
            bar.update(stop - start)
    if not pairs:
        raise ValueError(
            f"{', '.join(path for _, path in named)}: no dialog in {totals.total():,} rows (see data_prep.py check)"
        )
    args.out.mkdir(parents=True, exist_ok=True)
    made, report, parts = (
        [],
        {"tokenizer": str(args.tokenizer), "files": [path for _, path in named], "bad_rows": bad},
        [],
    )
    for subset, kinds, title, what in (
        ("alignment", "CI", "Table 1: ChiMed-VL-Alignment", "image-text pairs"),
        ("instruction", "QA", "Table 2: ChiMed-VL-Instruction", "QA pairs"),
    ):
        if pairs.get(subset):
            report[subset] = make_table(lengths[subset], pairs[subset], kinds)
            report[subset + "_modalities"] = dict(modalities[subset].most_common())
            parts.append(markdown(title, report[subset], kinds, what))
    total = sum(modalities.values(), Counter())
    parts.append(
        "## Figure 1: kinds of pictures, by keywords\n\n| kind | rows |\n|---|---|\n"
        + "".join(f"| {name} | {n:,} |\n" for name, n in total.most_common())
    )
    text = (
        f"Tokens of {args.tokenizer}; C context, I inline text or caption, Q question, A answer, without the words of prompts.\n\n"
        + "\n".join(parts)
    )
    write_text(args.out / "stats.md", text)
    write_json(args.out / "stats.json", report)
    print(text)
    if bad:
        print(
            f"data_prep.py: {bad:,} rows are no dialogs and were passed over: see data_prep.py check",
            file=sys.stderr,
        )
    if not args.no_figures:
        made += figures(args, lengths, clouds, sheets, total, font)
    print(
        "written: " + ", ".join(str(args.out / name) for name in ("stats.md", "stats.json", *made))
    )
    return 0


def figures(args, lengths, clouds, sheets, total, font):
    """The PNGs that can be made here; what cannot says why."""
    made = []

    def attempt(name, package, draw):
        try:
            if draw() is not False:
                made.append(name)
        except ImportError as error:
            print(
                f"data_prep.py: no {name}: it needs pip install {error.name if error.name in ('jieba', 'wordcloud', 'matplotlib') else package}",
                file=sys.stderr,
            )

    attempt("lengths.png", "matplotlib", lambda: draw_histograms(lengths, args.out / "lengths.png"))
    if font is None:
        print(
            "data_prep.py: no word clouds: no font with Chinese characters was found; install one (Debian: apt install fonts-noto-cjk; anywhere: pip install zhplot) or name one by --font FILE",
            file=sys.stderr,
        )
    for subset, texts in clouds.items() if font else ():
        attempt(
            f"words-{subset}.png",
            "jieba wordcloud",
            lambda subset=subset, texts=texts: draw_cloud(
                texts, font, args.out / f"words-{subset}.png"
            ),
        )
    if args.images:
        attempt(
            "pictures.png",
            "pillow",
            lambda: draw_sheet(
                sheets, total, os.path.realpath(args.images), font, args.out / "pictures.png"
            ),
        )
    else:
        print("data_prep.py: no sheet of pictures: name their folder by --images", file=sys.stderr)
    return made
