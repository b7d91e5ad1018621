"""Tables 1 and 2 and Figures 1 and 2 of the paper (arXiv 2310.17956) for built files: token counts
by set, exact quantiles in one pass; histograms, word clouds, a sheet of pictures by modality.

In Table 1 a case report is one pair and counts with both its texts (167 M tokens of contexts are
527 for each of 316,838 pairs), though a dialog holds one of them. They are read from the raw rows
that the manifest beside a built file names; what is trained is told beside the table.
"""

import argparse
import heapq
import importlib.util
import os
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

from chimed.case_reports import (
    CASE_SOURCE,
    CaseReports,
    NoCaseReports,
    case_number,
    find_case_reports,
)
from chimed.prompts import CONTEXT, MODALITIES
from chimed.sources import SOURCES, add_source_options, own_question
from chimed.workers import add_workers_option, blocks_of, in_order
from common.dialogs import read_dialog
from common.files import write_json, write_text
from common.paper import CASE_REPORT, OA, PMC_VQA, TABLE_1, TABLE_2, TOTAL, Table
from common.rows import BadRow, Records, find_rows
from common.text import text_key
from model_io.pixels import find_picture, open_image
from model_io.tokens import Tokenizer, check_conversation
from qilin_min import IMAGE_TOKEN

# --- 1. one pass ----------------------------------------------------------------------------------

# rows a worker counts at a time
ROWS_COUNTED = 500
# texts a word cloud is made of, drawn evenly: cutting words out of a million takes an hour
CLOUD_TEXTS = 20_000
# pictures of a modality on the sheet
SHEET = 6
SET_NAMES = {
    "pmc-oa": OA,
    "pmc-casereport": CASE_REPORT,
    "pmc-vqa": PMC_VQA,
    "own": "own",
    "chimed-alignment": "ChiMed-VL",
    "chimed-instruction": "ChiMed-VL",
}


def word_pattern(word: str) -> str:
    """The pattern of a keyword: Latin words must stand alone; those in capitals only so."""
    escaped = re.escape(word)
    if not word.isascii():
        return escaped
    if word != word.lower():
        return rf"(?<![A-Za-z]){escaped}(?![A-Za-z])"
    return rf"(?<![A-Za-z])(?i:{escaped}s?)(?![A-Za-z])"


def any_word(words: Iterable[str]) -> re.Pattern:
    """Finds any of some keywords, the longest first."""
    longest_first = sorted(words, key=len, reverse=True)
    return re.compile("|".join(map(word_pattern, longest_first)))


MODALITY_PATTERNS = {name: any_word(words) for name, words in MODALITIES.items()}
UNKNOWN = "unknown"


def source_of(row_id: object) -> str:
    """The set a dialog came from, by the id that build gave it."""
    for source in SOURCES:
        if str(row_id).startswith(f"{source}-"):
            return SET_NAMES[source]
    return "other"


def modality_of(text: str) -> str:
    """The first row of the keyword table with a word in the text, or "unknown"."""
    for name, pattern in MODALITY_PATTERNS.items():
        if pattern.search(text):
            return name
    return UNKNOWN


class SheetEntry(NamedTuple):
    """A picture that may stand on the sheet. The smallest keys do: drawn evenly, always alike."""

    key: int
    modality: str
    image: str


def smallest_of_each(entries: Iterable[SheetEntry]) -> list[SheetEntry]:
    """Of each modality the entries with the smallest keys: more than the sheet holds, since some
    pictures may not decode."""
    by_modality: dict[str, list[SheetEntry]] = {name: [] for name in (*MODALITY_PATTERNS, UNKNOWN)}
    for entry in entries:
        by_modality[entry.modality].append(entry)
    smallest = []
    for entries_of_one in by_modality.values():
        smallest += heapq.nsmallest(3 * SHEET, entries_of_one)
    return smallest


@dataclass
class Counts:
    """What is counted of some rows of a subset. Sets are named as in the paper."""

    # (set, kind of text): {tokens: texts that have so many}
    lengths: dict[tuple[str, str], Counter[int]] = field(default_factory=dict)
    # set: pairs, a case report being one
    pairs: Counter[str] = field(default_factory=Counter)
    # {kind of text: {tokens: texts}} that stage 1 learns
    trained: dict[str, Counter[int]] = field(default_factory=dict)
    # modality: rows
    modalities: Counter[str] = field(default_factory=Counter)
    sheet: list[SheetEntry] = field(default_factory=list)
    # for the word cloud
    texts: list[str] = field(default_factory=list)
    n_bad: int = 0

    def add_length(self, source: str, kind: str, n_tokens: int) -> None:
        """One more text of so many tokens."""
        self.lengths.setdefault((source, kind), Counter())[n_tokens] += 1

    def add_trained(self, kind: str, n_tokens: int) -> None:
        """One more text of so many tokens that stage 1 learns."""
        self.trained.setdefault(kind, Counter())[n_tokens] += 1

    def update(self, more: "Counts") -> None:
        """Adds what was counted of further rows, but for the sheet, which all subsets share."""
        for key, lengths in more.lengths.items():
            self.lengths.setdefault(key, Counter()).update(lengths)
        for kind, lengths in more.trained.items():
            self.trained.setdefault(kind, Counter()).update(lengths)
        self.pairs.update(more.pairs)
        self.modalities.update(more.modalities)
        self.texts.extend(more.texts)
        self.n_bad += more.n_bad


@dataclass(frozen=True)
class BuiltFile:
    """A file of dialogs. every: of so many rows one gives its texts to the word cloud."""

    subset: str
    rows: Records
    every: int
    # the raw rows of its case reports; None: their dialogs are all there is
    case_reports: CaseReports | None = None

    def raw_texts(self, number: int | None) -> list[tuple[str, str]]:
        """[(kind, text)] of the raw row of a case report; [] where there is none."""
        if number is None or self.case_reports is None:
            return []
        return list(self.case_reports.texts(number).items())


@dataclass(frozen=True)
class Counting:
    """What all workers share."""

    files: list[BuiltFile]
    tokenizer: Tokenizer


def count_block(counting: Counting, f: int, start: int, stop: int) -> Counts:
    """Counts of rows start to stop of file f."""
    file = counting.files[f]
    counts = Counts()
    before = number_of(file.rows, start - 1) if start else None
    for i in range(start, stop):
        try:
            row = read_dialog(file.rows[i])
            check_conversation(row["conversations"])
        except (ValueError, TypeError, KeyError, AttributeError):
            counts.n_bad += 1
            continue
        number = case_number(row.get("id")) if file.subset == "alignment" else None
        # the two dialogs of a case report follow each other
        is_second = number is not None and number == before
        before = number
        count_row(
            counts,
            file,
            row,
            counting.tokenizer,
            number=number,
            is_second=is_second,
            for_cloud=i % file.every == 0,
        )
    counts.sheet = smallest_of_each(counts.sheet)
    return counts


def number_of(rows: Records, i: int) -> int | None:
    """The case report that row i is of; None: it is of none."""
    try:
        return case_number(rows[i].get("id"))
    except (ValueError, AttributeError):
        return None


def count_row(
    counts: Counts,
    file: BuiltFile,
    row: dict[str, Any],
    tokenizer: Tokenizer,
    *,
    number: int | None,
    is_second: bool,
    for_cloud: bool,
) -> None:
    """One dialog: the lengths of its texts, its modality, its picture. number: of the case report
    that a dialog of stage 1 is of; is_second: another dialog of it was counted before."""
    source = source_of(row.get("id"))
    turns = []
    for turn in row["conversations"]:
        turns.append(turn["value"].encode("utf-8", "ignore").decode())
    spoken = []
    for question, answer in zip(turns[::2], turns[1::2], strict=False):
        counts.pairs[source] += not is_second
        spoken += texts_of_pair(file.subset, row.get("id"), question, answer).items()
    # of a case report both texts count, whichever the dialog holds, and once
    raw_texts = file.raw_texts(number)
    counted = raw_texts or spoken
    if raw_texts and is_second:
        counted = []
    n_tokens = {text: len(tokenizer.encode(text)) for _, text in {*counted, *spoken}}
    for kind, text in counted:
        counts.add_length(source, kind, n_tokens[text])
    if file.subset == "alignment":
        for kind, text in spoken:
            counts.add_trained(kind, n_tokens[text])
    if for_cloud:
        counts.texts += [text for _, text in spoken]
    modality = modality_of(" ".join(telling_texts(file.subset, turns)))
    counts.modalities[modality] += 1
    image = row.get("image")
    if isinstance(image, str):
        counts.sheet.append(SheetEntry(text_key(image), modality, image))


def texts_of_pair(subset: str, row_id: object, question: str, answer: str) -> dict[str, str]:
    """{kind: text} of a question and its answer: C context, I inline text or caption, Q question,
    A answer."""
    if subset != "alignment":
        return {"Q": own_question(question), "A": answer}
    asks_for_context = question.replace(IMAGE_TOKEN, "").strip() in CONTEXT
    if str(row_id).endswith("-context") or asks_for_context:
        return {"C": answer}
    return {"I": answer}


def telling_texts(subset: str, turns: list[str]) -> list[str]:
    """What of a dialog may say which kind of picture it is about: not the words of prompts."""
    if subset == "alignment":
        return turns[1::2]
    return [own_question(turns[0]), *turns[1:]]


def quantile(counts: Mapping[int, int], p: float) -> float:
    """The p-quantile of numbers given as {number: how many}, as numpy.quantile of them all: between
    two it is interpolated."""
    numbers = sorted(counts)
    ends = np.cumsum([counts[number] for number in numbers])
    place = p * (int(ends[-1]) - 1)
    low = numbers[int(np.searchsorted(ends, int(np.floor(place)), side="right"))]
    high = numbers[int(np.searchsorted(ends, int(np.ceil(place)), side="right"))]
    return low + (high - low) * (place - np.floor(place))


# --- 2. tables ------------------------------------------------------------------------------------


@dataclass
class TokenCounts:
    """A cell of the tables: how many texts of a kind a set has, and how long they are."""

    texts: int
    tokens: int
    max: int
    median: float
    q1: float
    q3: float


@dataclass
class SetColumn:
    """A column of the tables. kinds: {kind of text: TokenCounts} of those it has."""

    pairs: int
    kinds: dict[str, TokenCounts]

    def as_json(self) -> dict[str, Any]:
        """As stats.json holds it."""
        kinds = {kind: asdict(counts) for kind, counts in self.kinds.items()}
        return {"pairs": self.pairs, **kinds}


@dataclass(frozen=True)
class TableForm:
    """The form of a table of the paper. kinds: of text, a letter each; pairs: what it calls
    them."""

    subset: str
    title: str
    kinds: str
    pairs: str
    paper: Table


TABLE_FORMS = (
    TableForm("alignment", "Table 1: ChiMed-VL-Alignment", "CI", "image-text pairs", TABLE_1),
    TableForm("instruction", "Table 2: ChiMed-VL-Instruction", "QA", "QA pairs", TABLE_2),
)


def describe(counts: Mapping[int, int]) -> TokenCounts:
    """Of {tokens: how many texts}."""
    return TokenCounts(
        texts=sum(counts.values()),
        tokens=sum(length * n_texts for length, n_texts in counts.items()),
        max=max(counts),
        median=float(quantile(counts, 0.5)),
        q1=float(quantile(counts, 0.25)),
        q3=float(quantile(counts, 0.75)),
    )


def lengths_of(
    lengths: Mapping[tuple[str, str], Counter[int]], kind: str, source: str = TOTAL
) -> Counter[int]:
    """{tokens: how many texts} of one kind, in a set or in all."""
    found = Counter()
    for (its_source, its_kind), counts in lengths.items():
        if its_kind == kind and source in (its_source, TOTAL):
            found.update(counts)
    return found


def make_table(counts: Counts, kinds: str) -> dict[str, SetColumn]:
    """{set or "total": its column}"""
    table = {}
    for source in [*sorted(counts.pairs), TOTAL]:
        n_pairs = counts.pairs.total() if source == TOTAL else counts.pairs[source]
        column = SetColumn(n_pairs, {})
        for kind in kinds:
            lengths = lengths_of(counts.lengths, kind, source)
            if lengths:
                column.kinds[kind] = describe(lengths)
        table[source] = column
    return table


def paper_columns(form: TableForm) -> dict[str, SetColumn]:
    """{set or "total": its column} as the paper has it."""
    columns = {}
    for source, n_pairs in form.paper.pairs.items():
        kinds = {}
        for kind in form.kinds:
            texts = form.paper.texts.get((source, kind))
            if texts:
                kinds[kind] = TokenCounts(
                    texts.n, texts.tokens, texts.most, texts.median, texts.q1, texts.q3
                )
        columns[source] = SetColumn(n_pairs, kinds)
    totals = {}
    for kind, total in form.paper.totals.items():
        n_texts = sum(
            column.kinds[kind].texts for column in columns.values() if kind in column.kinds
        )
        totals[kind] = TokenCounts(
            n_texts, total.tokens, total.most, total.median, total.q1, total.q3
        )
    columns[TOTAL] = SetColumn(form.paper.n_pairs, totals)
    return columns


def millions(n: int) -> str:
    """A large number as the paper writes it."""
    if n >= 10**7:
        return f"{n / 1e6:,.0f} M"
    if n >= 10**6:
        return f"{n / 1e6:.1f} M"
    return f"{n:,}"


def cells_of(
    columns: Iterable[SetColumn], kind: str, show: Callable[[TokenCounts], str]
) -> list[str]:
    """A line of the table: a cell for each set, - where a set has no such text."""
    cells = []
    for column in columns:
        cells.append(show(column.kinds[kind]) if kind in column.kinds else "-")
    return cells


def show_tokens(counts: TokenCounts) -> str:
    return millions(counts.tokens)


def show_max(counts: TokenCounts) -> str:
    return f"{counts.max:,}"


def show_median(counts: TokenCounts) -> str:
    return f"{counts.median:g} ({counts.q1:g}, {counts.q3:g})"


def markdown(form: TableForm, title: str, table: dict[str, SetColumn]) -> str:
    """The table in the paper's form: sets beside each other, - where a set has no such text."""
    columns = list(table.values())
    lines = [(form.pairs, [f"{column.pairs:,}" for column in columns])]
    for kind in form.kinds:
        lines.append((f"{kind} tokens", cells_of(columns, kind, show_tokens)))
    for kind in form.kinds:
        lines.append((f"max {kind} tokens", cells_of(columns, kind, show_max)))
    for kind in form.kinds:
        lines.append((f"median (Q1, Q3) {kind} tokens", cells_of(columns, kind, show_median)))

    rule = ["---"] * (len(columns) + 1)
    text = [f"## {title}", "", f"| | {' | '.join(table)} |", f"|{'|'.join(rule)}|"]
    for name, cells in lines:
        text.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(text) + "\n"


def trained_line(trained: Mapping[str, TokenCounts]) -> str:
    """What stage 1 learns of the pairs that were counted."""
    n_dialogs = sum(counts.texts for counts in trained.values())
    parts = []
    for kind, counts in trained.items():
        parts.append(f"{counts.texts:,} {KINDS_LEARNT[kind]} of {millions(counts.tokens)} tokens")
    n_tokens = sum(counts.tokens for counts in trained.values())
    return (
        f"Trained in stage 1: {n_dialogs:,} dialogs, {millions(n_tokens)} tokens to be said: "
        f"{', '.join(parts)}.\n"
    )


def modality_table(modalities: Counter[str]) -> str:
    """How many rows speak of each kind of picture."""
    lines = ["## Figure 1: kinds of pictures, by keywords", "", "| kind | rows |", "|---|---|"]
    for name, n_rows in modalities.most_common():
        lines.append(f"| {name} | {n_rows:,} |")
    return "\n".join(lines) + "\n"


# --- 3. figures -----------------------------------------------------------------------------------

FONT_FILES = re.compile(
    r"""
    (?:
        NotoSans(?:Mono)?(?:CJK|SC)|NotoSerifCJK|SourceHanSans|SourceHanSerif
      | wqy-|simhei|simsun|msyh|PingFang|STHeiti|Hiragino[ ]Sans[ ]GB|DroidSansFallback
      | ukai|uming
    )
    [^/]*\.(?:ttc|ttf|otf)$
    """,
    re.IGNORECASE | re.VERBOSE,
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


def has_chinese(path: str) -> bool:
    """True for a font file that draws simplified Chinese, which Japanese ones lack in part: no box
    in place of a character."""
    try:
        font = ImageFont.truetype(path, 20)
        # what stands for a character that a font has not
        box = _mask(font, "\uffff")
        return all(_mask(font, character) != box for character in "\u7ed3\u68c0\u8bca")
    except OSError:
        return False


def _mask(font, character):
    mask: Any = font.getmask(character)
    return bytes(mask)


def font_folders() -> list[str]:
    """Where fonts usually lie on this machine; first a package that brings one along."""
    package = importlib.util.find_spec("zhplot")
    folders = list(package.submodule_search_locations or ()) if package else []
    return folders + [os.path.expanduser(folder) for folder in FONT_FOLDERS]


def find_font(given: str | None) -> str | None:
    """A font file with Chinese characters: the one given, or one of the usual ones on this machine;
    None without. ValueError for one that has none."""
    if given:
        if not has_chinese(given):
            raise ValueError(
                f"--font {given}: no font file, or one without simplified Chinese characters"
            )
        return given
    for folder in font_folders():
        for path, _, files in os.walk(folder):
            for name in sorted(files):
                file = os.path.join(path, name)
                if FONT_FILES.search(name) and has_chinese(file):
                    return file
    return None


KINDS_LEARNT = {"C": "contexts", "I": "inline texts and captions"}
KIND_NAMES = {"C": "context", "I": "inline text, caption", "Q": "question", "A": "answer"}


def draw_histograms(counts: Mapping[str, Counts], path: Path) -> bool:
    """A histogram of lengths for each kind of text of each subset."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    charts = []
    for subset, of_subset in counts.items():
        for kind in KIND_NAMES:
            lengths = lengths_of(of_subset.lengths, kind)
            if lengths:
                charts.append((f"{subset}: {KIND_NAMES[kind]}", lengths))
    figure, axes = plt.subplots(1, len(charts), figsize=(4 * len(charts), 3.2), squeeze=False)
    for axis, (title, lengths) in zip(axes[0], charts, strict=True):
        top = max(10, quantile(lengths, 0.995))
        n_longer = sum(n_texts for length, n_texts in lengths.items() if length > top)
        edges = np.arange(0, top + 2, max(1, round(top / 50))) - 0.5
        axis.hist(list(lengths), weights=list(lengths.values()), bins=edges, color="#4477aa")
        axis.axvline(quantile(lengths, 0.5), color="#cc3311", linewidth=1)
        axis.set(
            title=title,
            xlabel=f"tokens (line: median; {n_longer:,} longer)",
            ylabel="texts",
        )
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return True


def cloud_words(texts: Iterable[str], cut: Callable[[str], Iterable[str]]) -> Counter[str]:
    """The nouns, verbs and terms of some texts."""
    words = Counter()
    for text in texts:
        for word in cut(text):
            if len(word) > 1 and re.search(r"[\u4e00-\u9fff]", word):
                words[word] += 1
    return words


def draw_cloud(texts: Iterable[str], font: str, path: Path) -> bool:
    """A word cloud of some texts, cut into words by jieba. False when there are no words."""
    import jieba
    from wordcloud import WordCloud

    jieba.setLogLevel(60)
    words = cloud_words(texts, jieba.cut)
    if not words:
        return False
    cloud = WordCloud(
        font_path=font,
        width=1000,
        height=600,
        background_color="white",
        max_words=150,
        random_state=0,
    )
    cloud.generate_from_frequencies(words).to_file(path)
    return True


# pixels: the longer side of a picture on the sheet, what lies between two, the width of a name
PICTURE_SIZE = 150
PICTURE_STEP = PICTURE_SIZE + 8
LABEL_WIDTH = 230


def sheet_pictures(entries: Iterable[SheetEntry], root: str) -> list[Image.Image]:
    """The first pictures that decode, small."""
    pictures = []
    for entry in sorted(entries):
        try:
            path, _ = find_picture([entry.image], (root,))
            picture = open_image(path)
        except (BadRow, ValueError, OSError):
            continue
        picture.thumbnail((PICTURE_SIZE, PICTURE_SIZE))
        pictures.append(picture)
        if len(pictures) == SHEET:
            break
    return pictures


def draw_sheet(
    entries: list[SheetEntry], modalities: Counter[str], root: str, font: str | None, path: Path
) -> bool:
    """Figure 1: a line of pictures for each modality, the smallest keys first; those that do not
    decode are passed over."""
    names = [name for name in (*MODALITY_PATTERNS, UNKNOWN) if modalities[name]]
    width = LABEL_WIDTH + SHEET * PICTURE_STEP
    sheet = Image.new("RGB", (width, max(1, len(names)) * PICTURE_STEP), "white")
    pen = ImageDraw.Draw(sheet)
    letters = ImageFont.truetype(font, 18) if font else ImageFont.load_default(18)
    for y, name in enumerate(names):
        top = y * PICTURE_STEP
        # without a font for it the Chinese half of a name is left out
        shown = name if font or name.isascii() else name.split(" ", 1)[1]
        label = f"{shown}\n{modalities[name]:,}"
        pen.text((10, top + PICTURE_SIZE // 2 - 20), label, fill="black", font=letters)
        pictures = sheet_pictures([entry for entry in entries if entry.modality == name], root)
        for x, picture in enumerate(pictures):
            left = LABEL_WIDTH + x * PICTURE_STEP + (PICTURE_SIZE - picture.width) // 2
            sheet.paste(picture, (left, top + (PICTURE_SIZE - picture.height) // 2))
    sheet.save(path)
    return True


def is_drawn(draw: Callable[..., bool], *given: Any, path: Path, needs: str) -> bool:
    """Whether draw(*given, path) made a figure. Without a package it needs: said, and False."""
    try:
        return draw(*given, path)
    except ImportError as error:
        is_known = error.name in ("jieba", "wordcloud", "matplotlib")
        package = error.name if is_known else needs
        print(f"data_prep.py: no {path.name}: it needs pip install {package}", file=sys.stderr)
        return False


def draw_figures(
    counts: Mapping[str, Counts],
    sheet: list[SheetEntry],
    modalities: Counter[str],
    *,
    out: Path,
    images: str | None,
    font: str | None,
) -> list[str]:
    """The names of the PNGs that can be made here; what cannot says why."""
    made = []
    path = out / "lengths.png"
    if is_drawn(draw_histograms, counts, path=path, needs="matplotlib"):
        made.append(path.name)
    if font is None:
        print(
            "data_prep.py: no word clouds: no font with Chinese characters was found; "
            "install one (Debian: apt install fonts-noto-cjk; anywhere: pip install zhplot) "
            "or name one by --font FILE",
            file=sys.stderr,
        )
    else:
        for subset, of_subset in counts.items():
            path = out / f"words-{subset}.png"
            if is_drawn(draw_cloud, of_subset.texts, font, path=path, needs="jieba wordcloud"):
                made.append(path.name)
    if images:
        path = out / "pictures.png"
        root = os.path.realpath(images)
        if is_drawn(draw_sheet, sheet, modalities, root, font, path=path, needs="pillow"):
            made.append(path.name)
    else:
        print("data_prep.py: no sheet of pictures: name their folder by --images", file=sys.stderr)
    return made


# --- 4. command -----------------------------------------------------------------------------------


def add_command(commands: argparse._SubParsersAction) -> None:
    about = (
        "Tables 1 and 2, Figures 1 and 2 of the paper for built files: stats.md, stats.json, PNGs"
    )
    counted = (
        "As in the paper, a case report is one pair of Table 1 and counts with both its texts,\n"
        "context and inline text, whichever of them is trained. They are read from the raw rows\n"
        "that manifest.json beside the dialogs names; where those lie elsewhere by now, name them\n"
        f"by --{CASE_SOURCE}. A line beneath the table tells what is trained."
    )
    parser = commands.add_parser(
        "stats",
        help=about,
        description=f"{about}\n\n{counted}",
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
    add_source_options(parser, [CASE_SOURCE])
    add("--images", metavar="DIR", help="folder of the pictures, for the contact sheet (Figure 1)")
    add(
        "--font",
        metavar="FILE",
        help="a font with Chinese characters, for word clouds (default: looked for)",
    )
    add("--no-figures", action="store_true", help="tables alone")
    add_workers_option(parser, "processes (default %(default)s)")


def run(args: argparse.Namespace) -> int:
    paths = [*args.alignment, *args.instruction]
    if not paths:
        raise ValueError("name built files by --alignment FILE, --instruction FILE or both")
    if args.images and not Path(args.images).is_dir():
        raise FileNotFoundError(f"no such image folder: {args.images}")
    font = find_font(args.font)
    built = {"alignment": args.alignment, "instruction": args.instruction}
    files, lacking = open_built(built, args.raw_files.get(CASE_SOURCE, []))
    n_rows = sum(len(file.rows) for file in files)
    if not n_rows:
        raise ValueError(f"{', '.join(paths)}: no rows")
    counts, sheet = count_files(Counting(files, Tokenizer(args.tokenizer)), args.workers)
    if not counts:
        raise ValueError(
            f"{', '.join(paths)}: no dialog in {n_rows:,} rows (see data_prep.py check)"
        )

    args.out.mkdir(parents=True, exist_ok=True)
    n_bad = sum(of_subset.n_bad for of_subset in counts.values())
    modalities = Counter()
    for of_subset in counts.values():
        modalities.update(of_subset.modalities)
    report = {"tokenizer": str(args.tokenizer), "files": paths, "bad_rows": n_bad}
    write_tables(counts, modalities, report, lacking, args.out)
    if n_bad:
        print(
            f"data_prep.py: {n_bad:,} rows are no dialogs and were passed over: "
            "see data_prep.py check",
            file=sys.stderr,
        )
    made = ["stats.md", "stats.json"]
    if not args.no_figures:
        made += draw_figures(counts, sheet, modalities, out=args.out, images=args.images, font=font)
    print("written: " + ", ".join(str(args.out / name) for name in made))
    return 0


def open_built(
    paths: Mapping[str, list[str]], case_reports: list[str]
) -> tuple[list[BuiltFile], str]:
    """The files of each subset, {subset: paths}, with the raw rows of their case reports; and why
    some have none, "" where all have them that need them. case_reports: as named by an option."""
    files = []
    # by folder: a file and what is held out of it are of one build. A text: why there are none
    known: dict[Path, CaseReports | str] = {}
    for subset, paths_of_one in paths.items():
        opened = [Records(path, ranges=find_rows(path)) for path in paths_of_one]
        every = max(1, sum(map(len, opened)) // CLOUD_TEXTS)
        for rows in opened:
            folder = rows.path.parent
            if subset == "alignment" and folder not in known and has_case_reports(rows):
                known[folder] = look_for_case_reports(rows.path, case_reports)
            raw = known.get(folder)
            files.append(BuiltFile(subset, rows, every, None if isinstance(raw, str) else raw))
    lacking = "; ".join(reason for reason in known.values() if isinstance(reason, str))
    if lacking:
        print(
            f"data_prep.py: {lacking}: name the raw rows by --{CASE_SOURCE} FILE, or case reports "
            "count with the texts that are trained alone, not with both as in the paper's Table 1",
            file=sys.stderr,
        )
    return files, lacking


def look_for_case_reports(built: Path, given: list[str]) -> CaseReports | str:
    """The raw rows of a built file, or why there are none."""
    try:
        return find_case_reports(built, given)
    except NoCaseReports as reason:
        return str(reason)


def has_case_reports(rows: Records) -> bool:
    """Whether dialogs of case reports are among some rows: a thousand of them are looked at."""
    step = max(1, len(rows) // 1000)
    return any(number_of(rows, i) is not None for i in range(0, len(rows), step))


def count_files(counting: Counting, workers: int) -> tuple[dict[str, Counts], list[SheetEntry]]:
    """{subset: Counts} of all files, and the pictures that may stand on the sheet."""
    tasks = []
    for f, file in enumerate(counting.files):
        for start, stop in blocks_of(len(file.rows), ROWS_COUNTED):
            tasks.append((f, start, stop))
    n_rows = sum(len(file.rows) for file in counting.files)
    counts: dict[str, Counts] = {}
    sheet = []
    blocks = in_order(count_block, tasks, workers, counting)
    with tqdm(total=n_rows, desc="counting", unit=" rows", disable=None) as bar:
        for (f, start, stop), more in zip(tasks, blocks, strict=True):
            counts.setdefault(counting.files[f].subset, Counts()).update(more)
            # a picture may come twice
            sheet = smallest_of_each({*sheet, *more.sheet})
            bar.update(stop - start)
    return counts, sheet


def write_tables(
    counts: Mapping[str, Counts],
    modalities: Counter[str],
    report: dict[str, Any],
    lacking: str,
    out: Path,
) -> None:
    """stats.md, also printed, and stats.json, which begins with what `report` holds. lacking: why
    there are no raw rows of case reports, "" where there are."""
    parts = []
    for form in TABLE_FORMS:
        of_subset = counts.get(form.subset)
        if of_subset is None or not of_subset.pairs:
            continue
        table = make_table(of_subset, form.kinds)
        report[form.subset] = {source: column.as_json() for source, column in table.items()}
        report[f"{form.subset}_modalities"] = dict(of_subset.modalities.most_common())
        parts.append(markdown(form, form.title, table))
        trained = {kind: describe(of_subset.trained[kind]) for kind in sorted(of_subset.trained)}
        if trained:
            report["alignment_trained"] = {
                kind: asdict(of_kind) for kind, of_kind in trained.items()
            }
            parts.append(trained_line(trained))
        if form.subset == "alignment" and lacking:
            parts.append(f"Case reports count with the texts that are trained alone: {lacking}.\n")
        if not form.paper.pairs.keys().isdisjoint(table):
            parts.append(markdown(form, "The same in the paper", paper_columns(form)))
    parts.append(modality_table(modalities))
    text = (
        f"Tokens of {report['tokenizer']}; C context, I inline text or caption, Q question, "
        "A answer, without the words of prompts.\n\n" + "\n".join(parts)
    )
    write_text(out / "stats.md", text)
    write_json(out / "stats.json", report)
    print(text)
