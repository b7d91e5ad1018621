"""ChiMed-VL from the raw sets (arXiv 2310.17956, section 3): one command a step, every row accounted for.

    python data_prep.py translate --pmc-vqa raw/train_2.csv --out zh …    English to Chinese through any OpenAI-compatible endpoint, checked row by row
    python data_prep.py review zh/train_2.csv --images DIR --out review   a sample for a doctor: one page to fill in; --import takes it back
    python data_prep.py build --pmc-oa F --pmc-casereport F --pmc-vqa F --images DIR --out data/chimed
                                                                          pictures joined, dialogs written: what train.py reads
    python data_prep.py check data/chimed/alignment.json --images data/chimed/images
    python data_prep.py stats --alignment F --instruction F --tokenizer DIR --out stats     Tables 1 and 2, Figures 1 and 2

Each takes --help. Reading order: this file (pictures, dialogs, build, check), sources.py (the raw files), translate.py with endpoint.py, review.py,
stats.py; prompts.py holds every word that is said or looked for. Exit codes: 0 done, 1 found problems or unfinished, 2 bad input.
"""

import argparse
import errno
import functools
import hashlib
import json
import os
import re
import shutil
import sys
from array import array
from collections import Counter
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from common.endpoint import add_endpoint_flags
from common.files import check_ranges, hold, run_cli, write_json
from common.rows import BadRow, Rows
from common.text import impractical, is_untranslated, text_key, text_length
from model_io.pixels import find_picture, is_dicom, open_image, picture_names
from model_io.tokens import Tokenizer, check_conversation, encode_conversation
from prompts import CAPTION, CHOICES, CONTEXT, VQA
from qilin_min import IMAGE_TOKEN
from sources import (
    Row,
    SOURCES,
    add_source_flags,
    article_of,
    candidates,
    in_order,
    named_columns,
    open_sources,
    own_question,
    read_row,
)

# --- 1. pictures: read whole, joined, put beside the dialogs --------------------------------------------------------

MAX_PICTURES = 4  # of one text; more would be too small in one composite (paper, section 3.3)
COMPOSITE_SIDE = 1344  # pixels, the longer one: four times what the model sees of a side
CACHE = 50_000  # pictures a process remembers


def join_pictures(images):
    """One PIL image of several: side by side at one height, or stacked at one width, whichever is the less extreme; each only scaled.

    The common height (width) is that of the largest, less where the composite's longer side would pass COMPOSITE_SIDE.
    """
    def layout(sizes):  # of pictures side by side: (a, b) are along and across
        total = sum(a / b for a, b in sizes)  # the length at height 1
        height = min(max(b for _, b in sizes), COMPOSITE_SIDE / max(total, 1))
        return [(max(1, round(a / b * height)), max(1, round(height))) for a, b in sizes], max(total, 1 / total)

    beside, stacked = layout([image.size for image in images]), layout([image.size[::-1] for image in images])
    horizontal = beside[1] <= stacked[1]
    sizes = beside[0] if horizontal else [size[::-1] for size in stacked[0]]
    if any(abs(w / h / (image.width / image.height) - 1) > 0.1 for (w, h), image in zip(sizes, images)):  # a line a few pixels wide: rounding would bend it
        raise BadRow("pictures too unlike to be joined")
    width, height = (sum(w for w, _ in sizes), sizes[0][1]) if horizontal else (sizes[0][0], sum(h for _, h in sizes))
    composite, offset = Image.new("RGB", (width, height)), 0
    for image, size in zip(images, sizes):
        composite.paste(image.resize(size, Image.Resampling.LANCZOS), (offset, 0) if horizontal else (0, offset))
        offset += size[0] if horizontal else size[1]
    return composite


def mark_of(paths):
    """A time in nanoseconds that stands for sizes and times of some files: what is made of them gets it as its own, and is current while they agree."""
    status = [os.stat(path) for path in paths]
    return text_key(*(f"{one.st_size} {one.st_mtime_ns}" for one in status)) % 10**18


def put_file(write, target, paths):
    """write(path) to a path beside `target`, marked as made of `paths`, then renamed: several workers may make the same picture."""
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{os.getpid()}-{text_key(target.name):x}.partial")
    partial.unlink(missing_ok=True)  # of a killed run with this number: never to be written through
    try:
        write(partial)
        if not partial.samefile(paths[0]):
            os.utime(partial, ns=(mark_of(paths),) * 2)
        partial.replace(target)
    finally:
        partial.unlink(missing_ok=True)


def is_current(target, paths):
    """True when `target` was made from files that have not changed since: nothing needs to be decoded again."""
    try:
        return target.samefile(paths[0]) or target.stat().st_mtime_ns == mark_of(paths)
    except OSError:
        return False


def link_or_copy(path, target, copy):
    if not copy:
        try:
            return os.link(os.path.realpath(path), target)
        except OSError:
            pass  # another disk, or a file system without links
    shutil.copyfile(path, target)


@functools.lru_cache(CACHE)
def place_pictures(names, roots, folder, copy, skip):
    """The picture of a row under `folder`: (name there, None), or (None, why not). names: tuple of tuples of candidates, one tuple a picture.

    One picture keeps its name and is linked (or copied); DICOM becomes PNG; two to four become one composite under composites/.
    """
    try:
        if not names:
            raise BadRow("no picture named")
        if len(names) > MAX_PICTURES:
            raise BadRow(f"more than {MAX_PICTURES} pictures")
        if skip:
            return (names[0][0] if len(names) == 1 else composite_name(names, [n[0] for n in names])), None
        found = [find_picture(choices, roots) for choices in names]
        paths = [path for path, _ in found]
        if len(found) > 1:
            name = composite_name(names, [name for _, name in found])
            target = Path(folder, name)
            if not is_current(target, paths):
                composite = join_pictures([decode(path) for path in paths])
                put_file(lambda partial: composite.save(partial, "JPEG", quality=95, subsampling=0), target, paths)
            return name, None
        (path, name), = found
        if is_dicom(path):
            name += ".png"
            if not is_current(Path(folder, name), paths):
                image = decode(path)
                put_file(lambda partial: image.save(partial, "PNG"), Path(folder, name), paths)
        elif not is_current(Path(folder, name), paths):
            decode(path)
            put_file(lambda partial: link_or_copy(path, partial, copy), Path(folder, name), paths)
        return name, None
    except BadRow as error:
        return None, str(error)
    except PermissionError:
        return None, "picture may not be read"
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO):
            raise
        return None, "picture cannot be stored"  # a name too long, or a file where a folder should be


def composite_name(names, found):
    digest = hashlib.blake2b("\x1f".join(found).encode("utf-8", "surrogatepass"), digest_size=8).hexdigest()
    return f"composites/{re.sub(r'[^A-Za-z0-9-]+', '_', Path(found[0]).stem)[:40]}-{digest}.jpg"


def decode(path):
    """open_image, or a BadRow with its reason: nothing of a damaged picture's content is said."""
    try:
        return open_image(path)
    except ValueError:
        raise BadRow("picture does not decode") from None


# --- 2. dialogs: what a row becomes ---------------------------------------------------------------------------------

MIN_LENGTH = 5  # Chinese characters; a Latin word counts two. What is shorter describes nothing ("Figure 1", "CT图像")
REFERENCE_ONLY = re.compile(r"^\W*(?:see |\u89c1|\u53c2\u89c1|\u5982)?\s*(?:fig(?:ure)?s?|table|\u56fe|\u8868)\W*\d*\w?\W*$", re.IGNORECASE)


def draw(seed, row_id, what, choices):
    """One of `choices`, by seed and row id alone: the same for any number of workers, and for each row on its own."""
    return choices[text_key(str(seed), row_id, what) % len(choices)]


def dialog(row_id, image, *turns):
    """A row of the published form."""
    return {"id": row_id, "image": image, "conversations": [{"from": ("human", "gpt")[i % 2], "value": turn} for i, turn in enumerate(turns)]}


def alignment_texts(row, row_id, options):
    """[(kind, text)] that stage 1 learns from a row: its caption; of a case report its context or its inline text, drawn by row id, or both. BadRow."""
    kinds = [options["alignment_text"]] if options["alignment_text"] in ("context", "inline") else ["context", "inline"]
    usable, reasons = [], []
    for kind in kinds if row.source == "pmc-casereport" else ["caption"]:
        text = row.texts.get(kind, "")
        reason = ("no text" if not text else impractical(text) or ("text too short" if text_length(text) < MIN_LENGTH or REFERENCE_ONLY.match(text)
                  else "not Chinese" if options["require_chinese"] and is_untranslated(text) else None))
        (reasons if reason else usable).append(reason or (kind, text))
    if not usable:
        raise BadRow(reasons[0])
    return usable if options["alignment_text"] == "both" else [draw(options["seed"], row_id, "kind", usable)]


def question_and_answer(row, row_id, options):
    """(question, answer) that stage 2 learns from a row, choices kept or not. BadRow."""
    question, answer = row.texts.get("question", ""), row.texts.get("answer", "")
    for text, missing in ((question, "no question"), (answer, "no answer")):
        if not re.search(r"\w", text):
            raise BadRow(missing)
    choices = [(name[-1].upper(), text) for name, text in row.texts.items() if name.startswith("choice_")]
    if options["require_chinese"] and any(map(is_untranslated, (question, answer, *(text for _, text in choices if options["choices"])))):
        raise BadRow("not Chinese")
    if options["choices"] and choices:
        if not row.letter:
            raise BadRow("answer is none of the choices")
        listed = "\n".join(f"{letter}. {text}" for letter, text in choices)
        return f"{question}\n{draw(options['seed'], row_id, 'choices', CHOICES)}\n{listed}", f"{row.letter}. {answer}"
    return question, answer


def put_question(template, question):
    """A question in its prompt; a mark ends it where more words follow."""
    if not template.endswith("{question}") and question[-1] not in "\u3002\uff1f\uff01.?!:\uff1a":
        question += "\uff1f"
    return template.replace("{question}", question)


def published(row, row_id, place, options):
    """A dialog that is one already: as it is, its pictures placed; several for one <image> are joined. BadRow."""
    try:
        check_conversation(row.conversations)
    except ValueError:
        raise BadRow("no dialog") from None
    turns = [turn["value"].encode("utf-8", "ignore").decode() for turn in row.conversations]
    n_images = sum(turn.count(IMAGE_TOKEN) for turn in turns)
    if options["require_chinese"] and any(map(is_untranslated, turns[1::2])):
        raise BadRow("not Chinese")
    if len(turns) % 2 or not all(turn.replace(IMAGE_TOKEN, "").strip() for turn in turns[1::2]) or any(IMAGE_TOKEN in turn for turn in turns[1::2]):
        raise BadRow("no dialog")
    if n_images not in (1, len(row.images)) or bool(n_images) != bool(row.images):
        raise BadRow(f"{IMAGE_TOKEN} and pictures do not agree")
    images = [place(row.images)] if n_images == 1 else [place([name]) for name in row.images]
    made = dialog(row.id or row_id, images[0] if len(images) == 1 else images, *turns)
    return made if images else {name: value for name, value in made.items() if name != "image"}


# --- 3. build: two passes over the rows, any number of workers ------------------------------------------------------
# pass 1 asks of each row only what other rows must know: its text (to join pictures), its pictures and its article (to split and to merge).
# pass 2 makes pictures and dialogs of blocks of rows, each on its own; this process only writes them, in order.

BLOCK = 1000  # rows a worker takes at a time
MAX_TURNS = 10  # questions in one merged dialog: of the paper's lengths that is some 600 tokens beside the picture's 576
ALIGNED, ASKED = ("pmc-oa", "pmc-casereport", "chimed-alignment", "own"), ("pmc-casereport", "pmc-vqa", "chimed-instruction", "own")
BUILD = None  # the Build that worker processes inherit


class Teams:
    """Rows that become one dialog. keys: uint64 a row, equal within a team, 0: alone; limit: members at most. The first row leads."""

    def __init__(self, keys, limit=None):
        order = np.argsort(keys, kind="stable")
        order = order[keys[order] != 0]
        new = np.diff(keys[order], prepend=np.uint64(0)) != 0  # where a team begins in `order`
        if limit and len(order):
            place = np.arange(len(order)) - np.maximum.accumulate(np.where(new, np.arange(len(order)), 0))
            new |= place % limit == 0
        self.follows = np.zeros(len(keys), dtype=bool)
        self.follows[order[~new]] = True
        begins = np.append(np.flatnonzero(new), len(order))
        by_leader = np.argsort(order[begins[:-1]])
        self.order, self.leaders, self.begins, self.ends = order, order[begins[:-1]][by_leader], begins[:-1][by_leader], begins[1:][by_leader]

    def of(self, row):
        """The row numbers of the team that `row` leads, itself first."""
        k = np.searchsorted(self.leaders, row)
        if k == len(self.leaders) or self.leaders[k] != row:
            return [row]
        return [int(r) for r in self.order[self.begins[k]:self.ends[k]]]


def connected(ties, counts):
    """Which rows belong together because they share a key, directly or through others: a number a row, and the keys by that number.

    ties: uint64 keys of all rows, one after another; counts: how many each row has, at least one."""
    keys, tie = np.unique(ties, return_inverse=True)
    begins = np.cumsum(counts) - counts
    left, right, parent = tie, tie[np.repeat(begins, counts)], np.arange(len(keys))
    while not np.array_equal(parent[left], parent[right]):
        low = np.minimum(parent[left], parent[right])
        np.minimum.at(parent, parent[left], low)
        np.minimum.at(parent, parent[right], low)
        while not np.array_equal(parent, parent[parent]):
            parent = parent[parent]
    return parent[tie[begins]], keys


def held_out(component, keys, fraction, seed):
    """bool a row: whole components, in an order drawn from the seed, taken while they fit into `fraction` of the rows; at least one."""
    roots, inverse, sizes = np.unique(component, return_inverse=True, return_counts=True)
    if fraction and len(roots) < 2:
        raise ValueError("--val-fraction: all rows share an article or a picture, so none can be held out")
    taken, left = np.zeros(len(roots), dtype=bool), round(fraction * len(component))
    for r in sorted(range(len(roots)), key=lambda r: text_key(str(seed), str(keys[roots[r]]))) if fraction else ():
        if sizes[r] <= left:
            taken[r], left = True, left - sizes[r]
    if fraction and not taken.any():
        taken[np.argmin(sizes)] = True
    return taken[inverse]


class Build:
    """What pass 1 found and pass 2 needs. Rows are numbered through all files."""

    def __init__(self, args):
        self.files, self.columns = open_sources(args, SOURCES), named_columns(args)
        self.options = {name: getattr(args, name) for name in ("seed", "choices", "alignment_text", "require_chinese", "merge_turns", "val_fraction")}
        self.roots = tuple(os.path.realpath(root) for root in args.images)
        self.folder, self.copy, self.skip = args.out / "images", args.copy, args.skip_pictures
        self.starts = np.cumsum([0, *(len(records) for _, records in self.files)])
        seen, self.id_starts = Counter(), []
        for source, records in self.files:
            self.id_starts.append(seen[source])
            seen[source] += len(records)

    def blocks(self):
        return [(f, start, min(start + BLOCK, len(records))) for f, (_, records) in enumerate(self.files) for start in range(0, len(records), BLOCK)]

    def locate(self, row):
        """(file, number in it) of a row."""
        f = int(np.searchsorted(self.starts, row, side="right")) - 1
        return f, int(row - self.starts[f])

    def id_of(self, f, i, row):
        """A dialog's id says its set, for stats; the row's own id is kept, else rows are numbered through the files of a set."""
        source = self.files[f][0]
        return row.id if row.id and source != "own" else f"{source}-{row.id or self.id_starts[f] + i}"

    def read(self, f, i, raw=None):
        """A Row. BadRow."""
        source, records = self.files[f]
        return read_row(source, records[i] if raw is None else records.parse(raw), self.columns)

    def place(self, rows):
        """The picture of some rows with one text. BadRow."""
        names = tuple(dict.fromkeys(tuple(candidates(row, name)) for row in rows for name in row.images))
        name, reason = place_pictures(names, self.roots, self.folder, self.copy, self.skip)
        if reason:
            raise BadRow(reason)
        return name

    def survey(self, args):
        """Pass 1."""
        parts, n_test = [], 0
        with tqdm(total=int(self.starts[-1]), desc="reading", unit=" rows", disable=None) as bar:
            for (_, start, stop), (arrays, tests) in zip(self.blocks(), in_order(survey_block, self.blocks(), args.workers)):
                parts.append(arrays)
                n_test += tests
                bar.update(stop - start)
        texts, pictures, ties, counts = (np.concatenate(columns) for columns in zip(*parts))
        self.joined = Teams(texts)
        self.merged = Teams(pictures if self.options["merge_turns"] else np.zeros_like(pictures), MAX_TURNS)
        self.val = held_out(*connected(ties, counts), self.options["val_fraction"], self.options["seed"])
        if n_test:
            print(f"data_prep.py: {n_test:,} rows are marked as test data by their set: training on them spoils that test", file=sys.stderr)


def survey_block(f, start, stop):
    """Pass 1 over a block, four arrays: a key of each row's article and text (0: it joins nobody), one of its pictures, the keys that tie it to others
    and how many those are; and how many rows are test data."""
    groups, pictures, ties, counts, n_test = array("Q"), array("Q"), array("Q"), array("q"), 0
    for i, raw in BUILD.files[f][1].read(start, stop):
        group, picture, keys = 0, 0, []
        try:
            row = BUILD.read(f, i, raw)
            names = [candidates(row, name)[0] for name in row.images]
            n_test += row.test
            articles = {row.article, *(article_of(name) for name in names)} - {""}
            keys = [text_key("picture", os.path.splitext(os.path.normpath(name))[0]) for name in names] + [text_key("article", article) for article in sorted(articles)]
            if row.source == "pmc-oa" and row.article and row.texts["caption"]:
                group = text_key(row.article, row.texts["caption"])
            if names and row.texts.get("question"):
                picture = text_key("pictures", *names)
        except BadRow:
            pass
        keys = keys or [text_key("row", str(f), str(i))]
        groups.append(group)
        pictures.append(picture)
        ties.extend(keys)
        counts.append(len(keys))
    return [np.frombuffer(values.tobytes(), dtype=kind) for values, kind in ((groups, np.uint64), (pictures, np.uint64), (ties, np.uint64), (counts, np.int64))], n_test


class Block:
    """Pass 2 over a block of rows: what it writes, what it counts, what it drops."""

    def __init__(self, f, start, stop):
        self.lines, self.counts, self.dropped = {}, Counter(), []
        for i, raw in BUILD.files[f][1].read(start, stop):
            number = int(BUILD.starts[f]) + i
            try:
                row = BUILD.read(f, i, raw)
            except BadRow as error:
                row = error
            subsets = [subset for subset, sources in (("alignment", ALIGNED), ("instruction", ASKED)) if BUILD.files[f][0] in sources]
            if BUILD.files[f][0] == "own":
                fit = isinstance(row, Row) and [subset for subset, text in (("alignment", "caption"), ("instruction", "question")) if row.texts[text]]
                subsets = fit or subsets[:1]
            for subset in subsets:
                teams = BUILD.joined if subset == "alignment" else BUILD.merged
                if not teams.follows[number]:
                    self.add(subset, f, i, row, teams.of(number))

    def drop(self, subset, number, reason):
        f, i = BUILD.locate(number)
        source, records = BUILD.files[f]
        self.counts[subset, source, f"dropped: {reason}"] += 1
        self.dropped.append(json.dumps({"subset": subset, "source": source, "file": str(records.path), "row": i, "reason": reason}, ensure_ascii=False))

    def add(self, subset, f, i, row, team):
        """The dialogs of a row, or of the team it leads. Every row of it is counted once: kept, joined or merged into another, or dropped by a reason."""
        members = []  # (number, Row, id) of those that are fit
        for number in team:
            g, k = BUILD.locate(number)
            self.counts[subset, BUILD.files[g][0], "rows"] += 1
            try:
                other = row if (g, k) == (f, i) else BUILD.read(g, k)
                if isinstance(other, BadRow):
                    raise other
                row_id = BUILD.id_of(g, k, other)
                parts = () if other.source.startswith("chimed") else alignment_texts(other, row_id, BUILD.options) if subset == "alignment" else question_and_answer(other, row_id, BUILD.options)
                members.append((number, other, row_id, parts))
            except BadRow as error:
                self.drop(subset, number, str(error))
        try:
            dialogs = self.dialogs(subset, members) if members else []
        except BadRow as error:  # their picture
            for number, *_ in members:
                self.drop(subset, number, str(error))
            return
        for n, (_, other, *_) in enumerate(members):
            self.counts[subset, other.source, "kept" if n == 0 else "joined" if subset == "alignment" else "merged"] += 1
            self.counts[subset, other.source, "dialogs"] += len(dialogs) if n == 0 else 0
        if dialogs:
            self.lines.setdefault((subset, bool(BUILD.val[members[0][0]])), []).extend(json.dumps(d, ensure_ascii=False) for d in dialogs)

    def dialogs(self, subset, members):
        (_, row, row_id, parts), seed = members[0], BUILD.options["seed"]
        if row.source.startswith("chimed"):
            made = published(row, row_id, lambda names: BUILD.place([Row(row.source, names, {})]), BUILD.options)
            self.counts[subset, row.source, "untranslated"] += any(is_untranslated(turn["value"]) for turn in made["conversations"][1::2])
            return [made]
        if subset == "alignment":
            picture = BUILD.place([other for _, other, *_ in members])
            self.counts[subset, row.source, "untranslated"] += sum(is_untranslated(text) for _, text in parts)
            return [dialog(f"{row_id}-{kind}", picture, f"{IMAGE_TOKEN}\n{draw(seed, row_id, kind, CONTEXT if kind == 'context' else CAPTION)}", text) for kind, text in parts]
        picture, turns = BUILD.place([row]), []
        for _, other, other_id, (question, answer) in members:
            self.counts[subset, other.source, "untranslated"] += is_untranslated(question) or is_untranslated(answer)
            whole = turns or "\n" in question  # later questions of a dialog, and those with choices, stand as they are
            turns += [question if whole else put_question(draw(seed, other_id, "vqa", VQA), question), answer]
        return [dialog(row_id, picture, f"{IMAGE_TOKEN}\n{turns[0]}", *turns[1:])]


def make_block(f, start, stop):
    block = Block(f, start, stop)
    return block.lines, block.counts, block.dropped


def file_digest(path):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def build(args):
    global BUILD
    check_ranges(args, val_fraction=(0, 0.9), workers=(1, 512))
    if not args.images and not args.skip_pictures:
        raise ValueError("name the folders of the pictures by --images (or --skip-pictures, to write the texts alone)")
    for root in args.images:
        if not Path(root).is_dir():
            raise FileNotFoundError(f"no such image folder: {root}")
    place_pictures.cache_clear()  # what an earlier build of this process saw may have changed
    BUILD = Build(args)
    args.out.mkdir(parents=True, exist_ok=True)
    with hold(args.out):
        write_build(args)


def write_build(args):
    """Both passes, and what they leave in --out."""
    BUILD.survey(args)
    targets = {(subset, side): args.out / f"{subset}{'-val' if side else ''}.json" for subset in ("alignment", "instruction") for side in (False, True)}
    inputs = {os.path.realpath(records.path) for _, records in BUILD.files}
    for target in (*targets.values(), args.out / "dropped.jsonl", args.out / "manifest.json"):
        if os.path.realpath(target) in inputs:
            raise ValueError(f"{target} is an input: name another --out")
    files, counts, written = {}, Counter(), Counter()
    with tqdm(total=int(BUILD.starts[-1]), desc="building", unit=" rows", disable=None) as bar, open(args.out / "dropped.jsonl.partial", "w", encoding="utf-8") as dropped:
        for (_, start, stop), (lines, more, drops) in zip(BUILD.blocks(), in_order(make_block, BUILD.blocks(), args.workers)):
            for key, rows in lines.items():
                if key not in files:
                    files[key] = open(f"{targets[key]}.partial", "w", encoding="utf-8")
                files[key].write(("[\n" if not written[key] else ",\n") + ",\n".join(rows))
                written[key] += len(rows)
            counts += more
            dropped.writelines(f"{line}\n" for line in drops)
            bar.update(stop - start)
            bar.set_postfix_str(f"{sum(written.values()):,} dialogs, {sum(n for (*_, what), n in counts.items() if what.startswith('dropped')):,} dropped")
    for file in files.values():
        file.write("\n]\n")
        file.close()
    table = summary(counts)
    if not written:
        Path(args.out, "dropped.jsonl.partial").replace(args.out / "dropped.jsonl")
        raise ValueError(f"no row is left of {int(BUILD.starts[-1]):,}: {reasons_of(counts)} (each in {args.out / 'dropped.jsonl'})")
    for key, target in targets.items():
        if key in files:
            Path(f"{target}.partial").replace(target)
        else:
            target.unlink(missing_ok=True)  # of an earlier build: it would not belong to this one
    Path(args.out, "dropped.jsonl.partial").replace(args.out / "dropped.jsonl")
    write_json(args.out / "manifest.json", {
        "inputs": [{"set": source, "file": str(records.path), "rows": len(records), "sha256": file_digest(records.path)} for source, records in BUILD.files],
        "settings": BUILD.options | {"images": list(args.images), "skip_pictures": args.skip_pictures, "columns": {name: names[0] for name, names in BUILD.columns.items() if names}, "encoding": args.encoding, "max_pictures": MAX_PICTURES, "min_length": MIN_LENGTH},
        "outputs": {target.name: {"dialogs": written[key], "sha256": file_digest(target)} for key, target in targets.items() if key in files},
        "counts": table})
    print_summary(table)
    for key, target in targets.items():
        if key in files:
            print(f"{target}: {written[key]:,} dialogs")
    if args.val_fraction and not any(written[subset, True] for subset in ("alignment", "instruction")):
        print("data_prep.py: no row that was held out was fit: there is no *-val.json", file=sys.stderr)
    merged = sum(n for (*_, what), n in counts.items() if what == "merged")
    if args.merge_turns:
        print(f"merged: {merged:,} questions stand in another's dialog, {merged:,} pictures fewer to train on ({merged * 576:,} image tokens at 576 a picture)")
    if untranslated := sum(n for (*_, what), n in counts.items() if what == "untranslated"):
        print(f"data_prep.py: {untranslated:,} texts or questions are English that was not translated: they are kept (--require-chinese drops them)", file=sys.stderr)


def summary(counts):
    """{subset: {set: {rows, kept, joined, merged, dialogs, untranslated, dropped: {reason: n}}}}; rows = kept + joined + merged + all dropped."""
    table = {}
    for (subset, source, what), n in sorted(counts.items()):
        entry = table.setdefault(subset, {}).setdefault(source, {"rows": 0, "kept": 0, "joined": 0, "merged": 0, "dialogs": 0, "untranslated": 0, "dropped": {}})
        if what.startswith("dropped: "):
            entry["dropped"][what.removeprefix("dropped: ")] = n
        else:
            entry[what] = n
    return table


def reasons_of(counts):
    reasons = Counter()
    for (*_, what), n in counts.items():
        if what.startswith("dropped: "):
            reasons[what.removeprefix("dropped: ")] += n
    return ", ".join(f"{reason} {n:,}" for reason, n in reasons.most_common())


def print_summary(table):
    print("| subset | set | rows | kept | joined or merged into another | dropped | dialogs |\n|---|---|---|---|---|---|---|")
    for subset, sources in table.items():
        for source, n in sources.items():
            print(f"| {subset} | {source} | {n['rows']:,} | {n['kept']:,} | {n['joined'] + n['merged']:,} | {sum(n['dropped'].values()):,} | {n['dialogs']:,} |")
    for subset, sources in table.items():
        for source, n in sources.items():
            if n["dropped"]:
                print(f"dropped from {subset}, {source}: {', '.join(f'{reason} {k:,}' for reason, k in sorted(n['dropped'].items(), key=lambda item: -item[1]))}")


# --- 4. check: every row of a finished file -------------------------------------------------------------------------


def picture_problem(path):
    """What is wrong with a picture file, or None: "picture is a decompression bomb", "picture does not decode"."""
    try:
        open_image(path)
    except ValueError as error:
        return "picture is a decompression bomb" if "bomb" in str(error) else "picture does not decode"
    return None


known_problem = functools.lru_cache(CACHE)(picture_problem)


def row_problems(row, root, options, tokenizer=None):
    """The problems of one parsed row, each a few words; [] when it is fit to train on."""
    problems = []
    if not isinstance(row, dict):
        return ["row is no object"]
    try:
        check_conversation(row.get("conversations"))
    except ValueError as error:
        text = str(error)
        problems.append("answer is empty" if "empty answer" in text else "question is empty" if "empty question" in text else f"{IMAGE_TOKEN} in an answer" if "is an answer that" in text else "no dialog")
    if not problems:
        try:
            names = picture_names(row)
        except ValueError as error:
            problems.append("image is no name" if "neither" in str(error) else f"{IMAGE_TOKEN} and pictures do not agree")
            names = []
        if problems == [] and len(row["conversations"]) % 2:
            problems.append("last question has no answer")
        for name in names:
            try:
                path, _ = find_picture([name], (root,))
                problem = known_problem(path)
            except BadRow as error:
                problem = str(error)
            problems += [problem] if problem and problem not in problems else []
        texts = [turn["value"] for turn in row["conversations"]]
        if any("\ud800" <= c <= "\udfff" for text in texts for c in text):
            problems.append("text is not valid Unicode")
        if any(len(text) > options["max_characters"] for text in texts):
            problems.append(f"text longer than {options['max_characters']} characters")
        if tokenizer and not problems:
            n = len(encode_conversation(row["conversations"], tokenizer, options["n_image_tokens"], max_length=10**9)[0])
            problems += [f"longer than {options['max_length']} tokens"] if n > options["max_length"] else []
    if not isinstance(row.get("id", ""), (str, int)):
        problems.append("id is no name")
    return problems


CHECK = None  # (Rows, root, options, tokenizer) that worker processes inherit


def content_key(row):
    """A key of a row's pictures, questions and answers, the prompts around them left out: they are drawn anew for each row."""
    turns = row.get("conversations") if isinstance(row.get("conversations"), list) else []
    texts = [str(turn.get("value")) if isinstance(turn, dict) else str(turn) for turn in turns]
    return text_key(json.dumps(row.get("image")), *(own_question(text) if i % 2 == 0 else text for i, text in enumerate(texts)))


def check_block(start, stop):
    """[(problems, id key or 0, content key or 0)] of rows start to stop."""
    rows, root, options, tokenizer = CHECK
    found = []
    for i in range(start, stop):
        try:
            row = rows[i]
        except ValueError as error:
            if "changed while" in str(error):
                raise
            found.append((["not JSON"], 0, 0))
            continue
        problems = row_problems(row, root, options, tokenizer)
        keyed = isinstance(row, dict)
        found.append((problems, text_key(str(row["id"])) if keyed and row.get("id") not in (None, "") else 0, content_key(row) if keyed else 0))
    return found


def repeated(keys):
    """bool a row: an earlier row has the same key (0 is none)."""
    first = np.unique(keys, return_index=True)[1]
    again = np.ones(len(keys), dtype=bool)
    again[first] = False
    return again & (keys != 0)


def check(args):
    global CHECK
    check_ranges(args, workers=(1, 512), max_length=(1, 10**9), max_characters=(1, 10**9), n_image_tokens=(1, 10**6))
    if not Path(args.images).is_dir():
        raise FileNotFoundError(f"no such image folder: {args.images}")
    bad = Path(args.bad or f"{args.file}.bad.jsonl")
    if len({path.resolve() for path in (bad, Path(args.file), *([Path(args.fix)] if args.fix else []))}) < (3 if args.fix else 2):
        raise ValueError("the file checked, --bad and --fix must be three different files")
    if args.fix and Path(args.fix).suffix != Path(args.file).suffix:
        raise ValueError(f"--fix {args.fix}: must end in {Path(args.file).suffix}, as the file checked does")
    rows = Rows(args.file)
    if not len(rows):
        raise ValueError(f"{args.file}: it has no rows")
    known_problem.cache_clear()
    CHECK = rows, os.path.realpath(args.images), vars(args), Tokenizer(args.tokenizer) if args.tokenizer else None
    problems, ids, contents = {}, np.zeros(len(rows), dtype=np.uint64), np.zeros(len(rows), dtype=np.uint64)
    tasks = [(start, min(start + BLOCK // 10, len(rows))) for start in range(0, len(rows), BLOCK // 10)]
    with tqdm(total=len(rows), desc="checking", unit=" rows", disable=None) as bar:
        for (start, stop), found in zip(tasks, in_order(check_block, tasks, args.workers)):
            for i, (wrong, id_key, content_key) in enumerate(found, start):
                ids[i], contents[i] = id_key, content_key
                if wrong:
                    problems[i] = wrong
            bar.update(stop - start)
    for name, again in (("duplicate id", repeated(ids)), ("duplicate content", repeated(contents))):
        for i in np.flatnonzero(again):
            problems.setdefault(int(i), []).append(name)
    partial = bad.with_name(bad.name + ".partial")
    with open(partial, "w", encoding="utf-8", errors="backslashreplace") as file, open(args.file, "rb") as source:
        for i in sorted(problems):
            source.seek(int(rows.ranges[i, 0]))
            raw = source.read(int(rows.ranges[i, 1] - rows.ranges[i, 0]))
            try:
                row = json.loads(raw)
            except (ValueError, RecursionError):
                row = raw.decode("utf-8", "replace").strip()
            file.write(json.dumps({"row": i, "problems": problems[i], "content": row}, ensure_ascii=False) + "\n")
    if problems:
        partial.replace(bad)
    else:
        partial.unlink()
        bad.unlink(missing_ok=True)  # of an earlier check
    counts = Counter(problem for wrong in problems.values() for problem in wrong)
    print(f"{args.file}: {len(rows):,} rows, {len(rows) - len(problems):,} fit to train on")
    for problem, n in counts.most_common():
        print(f"  {problem}: {n:,}")
    if problems:
        print(f"the rows with problems: {bad}")
    if args.fix:
        write_clean(args.file, rows, problems, Path(args.fix))
        print(f"the rows without: {args.fix} ({len(rows) - len(problems):,})")
    return 1 if problems else 0


def write_clean(path, rows, problems, target):
    """The rows without problems, byte for byte, in the form of the file."""
    lines, partial = Path(path).suffix == ".jsonl", target.with_name(target.name + ".partial")
    with open(path, "rb") as source, open(partial, "wb") as out:
        out.write(b"" if lines else b"[\n")
        first = True
        for i, (start, stop) in enumerate(rows.ranges):
            if i not in problems:
                source.seek(int(start))
                raw = source.read(int(stop - start)).strip()
                out.write((b"" if first or lines else b",\n") + raw + (b"\n" if lines else b""))
                first = False
        out.write(b"" if lines else b"\n]\n")
    partial.replace(target)


# --- 5. command line ------------------------------------------------------------------------------------------------


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    n_cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1

    def command(name, about):
        return commands.add_parser(name, help=about, description=about, formatter_class=argparse.RawDescriptionHelpFormatter)

    b = command("build", "raw or translated sets -> OUT/alignment.json, instruction.json, images/, dropped.jsonl, manifest.json")
    add_source_flags(b, *SOURCES)
    b.add_argument("--images", nargs="+", default=[], metavar="DIR", help="folders the picture names are relative to, searched in this order")
    b.add_argument("--out", type=Path, required=True, metavar="DIR", help="where to write; run again after a stop, it makes no finished picture twice")
    b.add_argument("--val-fraction", type=float, default=0, metavar="X", help="share of rows for *-val.json; rows of one article, group or picture stay on one side (default 0)")
    b.add_argument("--alignment-text", choices=("draw", "inline", "context", "both"), default="draw",
                   help="what stage 1 learns of a case report: one of its two texts drawn by row id (default), always this one, or a dialog for each")
    b.add_argument("--choices", action="store_true", help="keep multiple-choice questions as such (default: open questions, as the paper)")
    b.add_argument("--merge-turns", action="store_true", help="all questions about one picture in one dialog: the picture is trained on once")
    b.add_argument("--require-chinese", action="store_true", help="drop rows that are not translated (default: keep them, and warn)")
    b.add_argument("--seed", type=int, default=0, help="of prompts, kinds of text and the split (default 0)")
    b.add_argument("--copy", action="store_true", help="copy pictures (default: hard links where the disk allows)")
    b.add_argument("--skip-pictures", action="store_true", help="write the texts alone: pictures are named as they would be, and neither sought nor made")
    b.add_argument("--workers", type=int, default=n_cpus, help="processes (default %(default)s, the CPUs here); the output does not depend on it")

    t = command("translate", "English to Chinese: OUT/<same name and form>, a journal beside it; stopped at any moment, the same command goes on")
    add_source_flags(t, "pmc-oa", "pmc-casereport", "pmc-vqa", "own")
    t.add_argument("--out", required=True, metavar="DIR", help="where the translated files and journals go")
    t.add_argument("--glossary", metavar="FILE", help=".csv of English and Chinese terms that must be used (a|b: either)")
    t.add_argument("--translations", metavar="FILE", help="finished translations instead of an endpoint (with --base-url: before it): rows of english and chinese, a journal, or the raw file with Chinese in place")
    t.add_argument("--attempts", type=int, default=2, metavar="N", help="translations asked for of a row that fails the checks (default %(default)s)")
    t.add_argument("--retry-rejected", action="store_true", help="ask again for rows that failed the checks earlier")
    add_endpoint_flags(t)

    r = command("review", "a random sample of translations, stratified by file, for a doctor: review.html (self-contained) and review.csv; --import reads it back")
    r.add_argument("files", nargs="+", metavar="FILE", help="translated files, as translate wrote them (their journals beside them)")
    r.add_argument("--out", type=Path, metavar="DIR", help="where the sample goes")
    r.add_argument("--n", type=int, default=200, help="rows, over all files in proportion to their size (default %(default)s)")
    r.add_argument("--images", nargs="+", default=[], metavar="DIR", help="folders of the pictures")
    r.add_argument("--seed", type=int, default=0)
    r.add_argument("--import", dest="filled", metavar="CSV", help="the filled-in file: fixes and rejections go into the files, acceptance is reported")

    c = command("check", "every row and picture of a dialog file; exit code 1 when any is unfit")
    c.add_argument("file", help="a .json or .jsonl of dialogs, the published form")
    c.add_argument("--images", required=True, metavar="DIR", help="folder the picture names are relative to")
    c.add_argument("--bad", metavar="FILE", help="where rows with problems go (default: FILE.bad.jsonl)")
    c.add_argument("--fix", metavar="FILE", help="where to write the rows without problems")
    c.add_argument("--tokenizer", metavar="DIR", help="a LLaMA folder: lengths are then counted in tokens, too")
    c.add_argument("--max-length", type=int, default=2048, help="tokens of a dialog, pictures included (default %(default)s)")
    c.add_argument("--n-image-tokens", type=int, default=576, help="tokens of a picture (default %(default)s)")
    c.add_argument("--max-characters", type=int, default=20_000, help="of one turn (default %(default)s)")
    c.add_argument("--workers", type=int, default=n_cpus, help="processes (default %(default)s)")

    s = command("stats", "Tables 1 and 2, Figures 1 and 2 of the paper for built files: stats.md, stats.json, PNGs")
    s.add_argument("--alignment", nargs="+", default=[], metavar="FILE", help="dialogs of stage 1")
    s.add_argument("--instruction", nargs="+", default=[], metavar="FILE", help="dialogs of stage 2")
    s.add_argument("--tokenizer", required=True, metavar="DIR", help="a LLaMA folder or tokenizer.model: what tokens are counted with")
    s.add_argument("--out", type=Path, required=True, metavar="DIR")
    s.add_argument("--images", metavar="DIR", help="folder of the pictures, for the contact sheet (Figure 1)")
    s.add_argument("--font", metavar="FILE", help="a font with Chinese characters, for word clouds (default: looked for)")
    s.add_argument("--no-figures", action="store_true", help="tables alone")
    s.add_argument("--workers", type=int, default=n_cpus, help="processes (default %(default)s)")
    return parser.parse_args()


def main():
    args = parse_args()
    if args.command == "build":
        return build(args)
    if args.command == "check":
        sys.exit(check(args))
    if args.command == "translate":
        from translate import translate as run
    elif args.command == "review":
        from review import review as run
    else:
        from stats import stats as run
    sys.exit(run(args) or 0)


if __name__ == "__main__":
    run_cli(main)
