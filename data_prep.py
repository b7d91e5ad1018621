"""ChiMed-VL from the raw sets (arXiv 2310.17956, section 3): one command a step, every row
accounted for.

    python data_prep.py translate --pmc-vqa raw/train_2.csv --out zh …
        English to Chinese through any OpenAI-compatible endpoint, checked row by row
    python data_prep.py review zh/train_2.csv --images DIR --out review
        a sample for a doctor: one page to fill in; --import takes it back
    python data_prep.py build --pmc-oa F --pmc-casereport F --pmc-vqa F --images DIR \\
            --out data/chimed
        pictures joined, dialogs written: what train.py reads
    python data_prep.py check data/chimed/alignment.json --images data/chimed/images
    python data_prep.py stats --alignment F --instruction F --tokenizer DIR --out stats
        Tables 1 and 2, Figures 1 and 2

Each takes --help. Reading order: this file (dialogs, build), then in chimed/: sources.py (the raw
files), pictures.py, groups.py, check.py, translate.py with quality.py, review.py, stats.py;
prompts.py holds every word that is said or looked for. Exit codes: 0 done, 1 found problems or
unfinished, 2 bad input.
"""

import argparse
import json
import os
import re
import sys
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, TextIO, TypeVar

import numpy as np
from tqdm import tqdm

from chimed import check, review, stats, translate
from chimed.groups import MAX_TURNS, Teams, connected, held_out
from chimed.pictures import MAX_PICTURES, PictureFolder, picture_of, place_pictures
from chimed.prompts import CAPTION, CONTEXT, VQA
from chimed.sources import (
    SOURCES,
    RawFile,
    Row,
    add_source_options,
    article_of,
    candidates,
    named_columns,
    open_sources,
    read_row,
)
from chimed.workers import BLOCK, add_workers_option, blocks_of, in_order
from common.files import digest, lock, run_cli, write_json
from common.options import InRange
from common.rows import BadRow
from common.text import CHOICES, impractical, is_untranslated, text_key, text_length
from model_io.tokens import BadDialog, check_conversation
from qilin_min import IMAGE_TOKEN

# --- 1. dialogs: what a row becomes ---------------------------------------------------------------
# in: a Row; out: the texts that a stage learns from it, and dialogs of the published form

# Chinese characters; a Latin word counts two. What is shorter describes nothing ("Figure 1",
# "CT图像")
MIN_LENGTH = 5
# a shorter one describes many figures ("Chest CT scan")
GENERAL_BELOW = 10
# without an article a text must be as long to stand for one figure
SPECIFIC_FROM = 16
# of one article as many rows as there are share a text: too many pictures are dropped later
ANY_NUMBER = 2**62
REFERENCE_ONLY = re.compile(
    r"^\W*(?:see |\u89c1|\u53c2\u89c1|\u5982)?\s*"
    r"(?:fig(?:ure)?s?|table|\u56fe|\u8868)\W*\d*\w?\W*$",
    re.IGNORECASE,
)
QUESTION_ENDS = "\u3002\uff1f\uff01.?!:\uff1a"

Drawn = TypeVar("Drawn")


@dataclass(frozen=True)
class BuildSettings:
    """What decides the dialogs of a build, beside its files; manifest.json tells it."""

    seed: int
    choices: bool  # multiple-choice questions are kept as such
    alignment_text: str  # of a case report: "draw", "inline", "context" or "both"
    require_chinese: bool
    merge_turns: bool
    val_fraction: float


def draw_prompt(seed: int, row_id: str, what: str, choices: Sequence[Drawn]) -> Drawn:
    """One of `choices`, by seed and row id alone: the same for any number of workers, and for each
    row on its own."""
    return choices[text_key(str(seed), row_id, what) % len(choices)]


def make_dialog(row_id: str, image: str | list[str], turns: list[str]) -> dict[str, Any]:
    """A row of the published form."""
    conversations = []
    for i, turn in enumerate(turns):
        conversations.append({"from": ("human", "gpt")[i % 2], "value": turn})
    return {"id": row_id, "image": image, "conversations": conversations}


def text_problem(text: str, require_chinese: bool) -> str:
    """Why stage 1 does not learn from a text, or ""."""
    if not text:
        return "no text"
    reason = impractical(text)
    if reason:
        return reason
    if text_length(text) < MIN_LENGTH or REFERENCE_ONLY.match(text):
        return "text too short"
    if require_chinese and is_untranslated(text):
        return "not Chinese"
    return ""


def alignment_texts(row: Row, row_id: str, settings: BuildSettings) -> list[tuple[str, str]]:
    """[(kind, text)] that stage 1 learns from a row: its caption; of a case report its context or
    its inline text, drawn by row id, or both. BadRow."""
    if row.source != "pmc-casereport":
        kinds = ["caption"]
    elif settings.alignment_text in ("context", "inline"):
        kinds = [settings.alignment_text]
    else:
        kinds = ["context", "inline"]
    usable = []
    reasons = []
    for kind in kinds:
        text = row.texts.get(kind, "")
        reason = text_problem(text, settings.require_chinese)
        if reason:
            reasons.append(reason)
        else:
            usable.append((kind, text))
    if not usable:
        raise BadRow(reasons[0])
    if settings.alignment_text == "both":
        return usable
    return [draw_prompt(settings.seed, row_id, "kind", usable)]


def question_and_answer(row: Row, row_id: str, settings: BuildSettings) -> tuple[str, str]:
    """(question, answer) that stage 2 learns from a row, choices kept or not. BadRow."""
    question = row.texts.get("question", "")
    answer = row.texts.get("answer", "")
    if not re.search(r"\w", question):
        raise BadRow("no question")
    if not re.search(r"\w", answer):
        raise BadRow("no answer")
    choices = {}
    if settings.choices:
        choices = {
            name[-1].upper(): text for name, text in row.texts.items() if name.startswith("choice_")
        }
    said = (question, answer, *choices.values())
    if settings.require_chinese and any(is_untranslated(text) for text in said):
        raise BadRow("not Chinese")
    if not choices:
        return question, answer
    if not row.letter:
        raise BadRow("answer is none of the choices")
    lines = [question, draw_prompt(settings.seed, row_id, "choices", CHOICES)]
    for letter, text in choices.items():
        lines.append(f"{letter}. {text}")
    return "\n".join(lines), f"{row.letter}. {answer}"


def put_question(template: str, question: str) -> str:
    """A question in its prompt; a mark ends it where more words follow."""
    if not template.endswith("{question}") and question[-1] not in QUESTION_ENDS:
        question += "\uff1f"
    return template.replace("{question}", question)


def published_dialog(
    row: Row, row_id: str, pictures: PictureFolder, settings: BuildSettings
) -> dict[str, Any]:
    """A dialog that is one already: as it is, its pictures placed; several for one <image> are
    joined. BadRow."""
    if row.texts.get("caption"):
        turns = captioned_turns(row, row_id, settings)
    else:
        turns = published_turns(row.conversations, settings.require_chinese)
    n_images = sum(turn.count(IMAGE_TOKEN) for turn in turns)
    if n_images not in (1, len(row.images)) or bool(n_images) != bool(row.images):
        raise BadRow(f"{IMAGE_TOKEN} and pictures do not agree")
    if n_images == 1:
        images = [picture_of([(name,) for name in row.images], pictures)]
    else:
        images = [picture_of([(name,)], pictures) for name in row.images]
    image = images[0] if len(images) == 1 else images
    dialog = make_dialog(row.id or row_id, image, turns)
    if not images:
        del dialog["image"]
    return dialog


def captioned_turns(row: Row, row_id: str, settings: BuildSettings) -> list[str]:
    """What is said about a published picture of which there is only a caption. BadRow."""
    caption = row.texts["caption"]
    reason = text_problem(caption, settings.require_chinese)
    if reason:
        raise BadRow(reason)
    prompt = draw_prompt(settings.seed, row_id, "caption", CAPTION)
    return [f"{IMAGE_TOKEN}\n{prompt}", caption]


def published_turns(conversation: Any, require_chinese: bool) -> list[str]:
    """What is said in a dialog that is one already. BadRow."""
    try:
        check_conversation(conversation)
    except BadDialog:
        raise BadRow("no dialog") from None
    # half a surrogate pair is left out: UTF-8 has no bytes for it
    turns = [turn["value"].encode("utf-8", "ignore").decode() for turn in conversation]
    answers = turns[1::2]
    if require_chinese and any(is_untranslated(answer) for answer in answers):
        raise BadRow("not Chinese")
    if len(turns) % 2:
        raise BadRow("no dialog")
    for answer in answers:
        if not answer.strip() or IMAGE_TOKEN in answer:
            raise BadRow("no dialog")
    return turns


# --- 2. build: the files, and what all steps know -------------------------------------------------

SUBSETS = {
    "alignment": ("pmc-oa", "pmc-casereport", "chimed-alignment", "own"),
    "instruction": ("pmc-casereport", "pmc-vqa", "chimed-instruction", "own"),
}
# the file of a subset, and that of its rows that are held out
FILES = {subset: (f"{subset}.json", f"{subset}-val.json") for subset in SUBSETS}


@dataclass
class Inputs:
    """The raw files of a build. Rows are numbered through all of them."""

    files: list[RawFile]
    columns: dict[str, tuple[str, ...]]  # of --own
    starts: np.ndarray  # the number of each file's first row; at the end that of all rows
    id_starts: list[int]  # how many rows the files of the same set before it have

    @property
    def n_rows(self) -> int:
        return int(self.starts[-1])

    def blocks(self) -> list[tuple[int, int, int]]:
        """(file, start, stop) of blocks of rows."""
        blocks = []
        for f, file in enumerate(self.files):
            for start, stop in blocks_of(len(file.records), BLOCK):
                blocks.append((f, start, stop))
        return blocks

    def locate(self, number: int) -> tuple[int, int]:
        """(file, number in it) of a row."""
        f = int(np.searchsorted(self.starts, number, side="right")) - 1
        return f, int(number - self.starts[f])

    def id_of(self, number: int, row: Row) -> str:
        """A dialog's id says its set, for stats; the row's own id is kept, else rows are numbered
        through the files of a set."""
        f, i = self.locate(number)
        source = self.files[f].source
        if row.id and source != "own":
            return row.id
        return f"{source}-{row.id or self.id_starts[f] + i}"

    def read(self, number: int) -> Row:
        """The Row of this number. BadRow."""
        f, i = self.locate(number)
        source, records = self.files[f]
        return read_row(source, records.record(i), self.columns)

    def parse(self, f: int, raw: bytes) -> Row:
        """The Row of a record's bytes, from file f. BadRow."""
        source, records = self.files[f]
        return read_row(source, records.parse(raw), self.columns)


def find_inputs(files: list[RawFile], own_columns: dict[str, str]) -> Inputs:
    """Inputs of opened files; own_columns: of --own, as named by options."""
    starts = np.cumsum([0, *(len(file.records) for file in files)])
    n_seen = Counter()
    id_starts = []
    for source, records in files:
        id_starts.append(n_seen[source])
        n_seen[source] += len(records)
    return Inputs(files, named_columns(own_columns), starts, id_starts)


# --- 3. pass 1: which rows belong together --------------------------------------------------------
# It asks of each row only what other rows must know: its text (to join pictures), its pictures and
# its article (to split and to merge).
#
# Pictures of PMC-OA that share one text become one composite (paper, section 3.3). Rows share a
# text where both are of one article, or where neither says of which it is; never across two
# articles. A text that is too general to belong to one figure is none that is shared:
#   - one of fewer than GENERAL_BELOW characters ("Chest CT scan"), wherever it stands;
#   - of rows whose article is not known also one of fewer than SPECIFIC_FROM characters, or one
#     that more than MAX_PICTURES rows have: nobody says that they are one figure, and the paper's
#     rule would drop all of them.
# Such rows stay, each for itself, and are counted. Case reports name their pictures themselves, a
# row each, and so do rows of one's own: a hospital's "no finding" joins nobody.


@dataclass
class BlockKeys:
    """Pass 1 over a block of rows."""

    texts: np.ndarray  # uint64 a row: a key of its article and text; 0: it joins nobody
    may_share: np.ndarray  # int64 a row: so many rows at most can have its text and be one figure
    pictures: np.ndarray  # uint64 a row: a key of its pictures; 0: nothing is asked about any
    ties: np.ndarray  # uint64: the keys that tie rows to others, row after row
    n_ties: np.ndarray  # int64 a row: how many those are
    n_test: int  # rows that are test data


@dataclass
class Groups:
    """What pass 1 found."""

    joined: Teams  # rows of one caption: their pictures become one
    merged: Teams  # questions about one picture: they become one dialog
    is_val: np.ndarray  # bool a row: held out
    n_general: int  # rows that have a text in common which is too general to join them


def survey(inputs: Inputs, settings: BuildSettings, workers: int) -> Groups:
    """Pass 1."""
    parts = []
    blocks = inputs.blocks()
    results = in_order(survey_block, blocks, workers, inputs)
    with tqdm(total=inputs.n_rows, desc="reading", unit=" rows", disable=None) as bar:
        for (_, start, stop), part in zip(blocks, results, strict=True):
            parts.append(part)
            bar.update(stop - start)
    texts = np.concatenate([part.texts for part in parts])
    pictures = np.concatenate([part.pictures for part in parts])
    may_share = np.concatenate([part.may_share for part in parts])
    texts, n_general = shared_texts(texts, may_share)
    ties = np.concatenate([part.ties for part in parts])
    n_ties = np.concatenate([part.n_ties for part in parts])
    ties, n_ties = with_ties(ties, n_ties, texts)
    if not settings.merge_turns:
        pictures = np.zeros_like(pictures)
    component, keys = connected(ties, n_ties)
    groups = Groups(
        joined=Teams(texts),
        merged=Teams(pictures, MAX_TURNS),
        is_val=held_out(component, keys, settings.val_fraction, settings.seed),
        n_general=n_general,
    )
    n_test = sum(part.n_test for part in parts)
    if n_test:
        print(
            f"data_prep.py: {n_test:,} rows are marked as test data by their set: "
            "training on them spoils that test",
            file=sys.stderr,
        )
    return groups


def survey_block(inputs: Inputs, f: int, start: int, stop: int) -> BlockKeys:
    """Pass 1 over rows start to stop of file f."""
    texts = []
    may_share = []
    pictures = []
    ties = []
    n_ties = []
    n_test = 0
    for i, raw in inputs.files[f].records.read(start, stop):
        text = 0
        n_sharing = 1
        picture = 0
        keys = []
        try:
            row = inputs.parse(f, raw)
        except BadRow:
            # pass 2 drops it
            pass
        else:
            n_test += row.test
            names = [candidates(row, name)[0] for name in row.images]
            text = key_of_text(row)
            n_sharing = most_that_share(row)
            picture = key_of_pictures(row, names)
            keys = keys_that_tie(row, names)
        if not keys:
            keys = [text_key("row", str(f), str(i))]
        texts.append(text)
        may_share.append(n_sharing)
        pictures.append(picture)
        ties.extend(keys)
        n_ties.append(len(keys))
    return BlockKeys(
        texts=np.array(texts, dtype=np.uint64),
        may_share=np.array(may_share, dtype=np.int64),
        pictures=np.array(pictures, dtype=np.uint64),
        ties=np.array(ties, dtype=np.uint64),
        n_ties=np.array(n_ties, dtype=np.int64),
        n_test=n_test,
    )


def key_of_text(row: Row) -> int:
    """A key of a row's article, if it is known, and caption: PMC-OA has a row for each picture of
    a caption. 0: there is none."""
    if row.source != "pmc-oa" or not row.texts["caption"]:
        return 0
    # written a little differently it is the same text
    text = unicodedata.normalize("NFKC", row.texts["caption"]).casefold()
    return text_key("text", row.article, text.rstrip(" .\u3002"))


def most_that_share(row: Row) -> int:
    """How many rows at most can have this row's caption and be of one figure; 1: it is too general
    to be shared at all."""
    caption = row.texts.get("caption", "")
    least = GENERAL_BELOW if row.article else SPECIFIC_FROM
    if text_length(caption) < least or REFERENCE_ONLY.match(caption):
        return 1
    if row.article:
        return ANY_NUMBER
    return MAX_PICTURES


def shared_texts(texts: np.ndarray, may_share: np.ndarray) -> tuple[np.ndarray, int]:
    """(texts with 0 for rows that share theirs with nobody, how many rows of those have a text in
    common with others that is too general). All by row, as in BlockKeys."""
    _, inverse, counts = np.unique(texts, return_inverse=True, return_counts=True)
    n_rows = counts[inverse]
    is_repeated = (texts != 0) & (n_rows > 1)
    is_shared = is_repeated & (n_rows <= may_share)
    n_general = int(is_repeated.sum() - is_shared.sum())
    return np.where(is_shared, texts, np.uint64(0)), n_general


def with_ties(
    ties: np.ndarray, n_ties: np.ndarray, texts: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Ties of rows, and how many each has, with the texts that rows share: rows of one composite
    stay on one side of a split."""
    rows = np.flatnonzero(texts)
    ends = np.cumsum(n_ties)[rows]
    more = np.zeros_like(n_ties)
    more[rows] = 1
    return np.insert(ties, ends, texts[rows]), n_ties + more


def key_of_pictures(row: Row, names: list[str]) -> int:
    """A key of the pictures a question is asked about; 0: there are none."""
    if names and row.texts.get("question"):
        return text_key("pictures", *names)
    return 0


def keys_that_tie(row: Row, names: list[str]) -> list[int]:
    """Keys of a row's pictures and of its articles: rows that share one stay on one side."""
    keys = []
    for name in names:
        stem, _ = os.path.splitext(os.path.normpath(name))
        keys.append(text_key("picture", stem))
    articles = {row.article, *(article_of(name) for name in names)} - {""}
    for article in sorted(articles):
        keys.append(text_key("article", article))
    return keys


# --- 4. pass 2: pictures and dialogs of blocks of rows, each on its own ---------------------------


@dataclass
class Build:
    """What pass 2 needs."""

    inputs: Inputs
    settings: BuildSettings
    pictures: PictureFolder
    groups: Groups


@dataclass
class Member:
    """A row that is fit, on its way into a dialog."""

    number: int
    row: Row
    id: str  # of its dialog
    texts: list[tuple[str, str]] = field(default_factory=list)  # stage 1: (kind, text)
    question: str = ""  # stage 2
    answer: str = ""


class Counted(NamedTuple):
    """What is counted of rows and dialogs."""

    subset: str
    source: str
    what: str  # rows, kept, joined, merged, dialogs, untranslated or dropped
    reason: str = ""  # of what is dropped


@dataclass
class Block:
    """Pass 2 over a block of rows."""

    lines: dict[str, list[str]] = field(default_factory=dict)  # {file: its dialogs as JSON}
    counts: Counter[Counted] = field(default_factory=Counter)
    dropped: list[str] = field(default_factory=list)  # a line of JSON a row


def make_block(build: Build, f: int, start: int, stop: int) -> Block:
    """Dialogs of the rows start to stop of file f and of those that follow them."""
    inputs = build.inputs
    source, records = inputs.files[f]
    block = Block()
    for i, raw in records.read(start, stop):
        number = int(inputs.starts[f]) + i
        try:
            row = inputs.parse(f, raw)
        except BadRow as error:
            row = error
        for subset in subsets_of(source, row):
            teams = build.groups.joined if subset == "alignment" else build.groups.merged
            if not teams.follows[number]:
                add_team(build, block, subset, teams.of(number), row)
    return block


def subsets_of(source: str, row: Row | BadRow) -> list[str]:
    """The subsets that a row is for, or is counted as dropped from."""
    subsets = [subset for subset, sources in SUBSETS.items() if source in sources]
    if source != "own":
        return subsets
    fit = []
    if isinstance(row, Row) and row.texts["caption"]:
        fit.append("alignment")
    if isinstance(row, Row) and row.texts["question"]:
        fit.append("instruction")
    return fit or subsets[:1]


def add_team(
    build: Build, block: Block, subset: str, team: list[int], leader: Row | BadRow
) -> None:
    """The dialogs of a row, or of the team it leads. Every row of it is counted once: kept, joined
    or merged into another, or dropped by a reason."""
    members = []
    for number in team:
        f, _ = build.inputs.locate(number)
        block.counts[Counted(subset, build.inputs.files[f].source, "rows")] += 1
        try:
            row = leader if number == team[0] else build.inputs.read(number)
            if isinstance(row, BadRow):
                raise row
            members.append(fit_member(build, subset, number, row))
        except BadRow as error:
            drop_row(build, block, subset, number, str(error))
    if not members:
        return
    try:
        dialogs = team_dialogs(build, subset, members)
    # their picture, or a dialog that is none
    except BadRow as error:
        for member in members:
            drop_row(build, block, subset, member.number, str(error))
        return
    count_members(block, subset, members, dialogs)
    is_val = bool(build.groups.is_val[members[0].number])
    train_name, val_name = FILES[subset]
    lines = block.lines.setdefault(val_name if is_val else train_name, [])
    for dialog in dialogs:
        lines.append(json.dumps(dialog, ensure_ascii=False))


def fit_member(build: Build, subset: str, number: int, row: Row) -> Member:
    """A row with what a subset learns from it. BadRow."""
    member = Member(number, row, build.inputs.id_of(number, row))
    if row.source.startswith("chimed"):
        return member
    if subset == "alignment":
        member.texts = alignment_texts(row, member.id, build.settings)
    else:
        question, answer = question_and_answer(row, member.id, build.settings)
        member.question = question
        member.answer = answer
    return member


def drop_row(build: Build, block: Block, subset: str, number: int, reason: str) -> None:
    """Counts and names a row that is left out."""
    f, i = build.inputs.locate(number)
    source, records = build.inputs.files[f]
    block.counts[Counted(subset, source, "dropped", reason)] += 1
    dropped = {
        "subset": subset,
        "source": source,
        "file": str(records.path),
        "row": i,
        "reason": reason,
    }
    block.dropped.append(json.dumps(dropped, ensure_ascii=False))


def count_members(
    block: Block, subset: str, members: list[Member], dialogs: list[dict[str, Any]]
) -> None:
    """Counts the rows that are in a team's dialogs, those dialogs, and what was not translated."""
    leader = members[0]
    block.counts[Counted(subset, leader.row.source, "dialogs")] += len(dialogs)
    for member in members:
        source = member.row.source
        if member is leader:
            block.counts[Counted(subset, source, "kept")] += 1
        elif subset == "alignment":
            # its text is the leader's, which is counted
            block.counts[Counted(subset, source, "joined")] += 1
            continue
        else:
            block.counts[Counted(subset, source, "merged")] += 1
        untranslated = n_untranslated(subset, member, dialogs)
        block.counts[Counted(subset, source, "untranslated")] += untranslated


def n_untranslated(subset: str, member: Member, dialogs: list[dict[str, Any]]) -> int:
    """How many texts, or questions, of a row are English still."""
    if member.row.source.startswith("chimed"):
        answers = [turn["value"] for turn in dialogs[0]["conversations"][1::2]]
        return int(any(is_untranslated(answer) for answer in answers))
    if subset == "alignment":
        return sum(is_untranslated(text) for _, text in member.texts)
    return int(is_untranslated(member.question) or is_untranslated(member.answer))


def team_dialogs(build: Build, subset: str, members: list[Member]) -> list[dict[str, Any]]:
    """The dialogs of a team's rows, the pictures placed. BadRow."""
    leader = members[0]
    if leader.row.source.startswith("chimed"):
        dialog = published_dialog(leader.row, leader.id, build.pictures, build.settings)
        return [dialog]
    if subset == "alignment":
        return described_picture(members, build.pictures, build.settings.seed)
    return [questioned_picture(members, build.pictures, build.settings.seed)]


def candidates_of(rows: Iterable[Row]) -> list[tuple[str, ...]]:
    """The candidates of each picture of some rows."""
    found = []
    for row in rows:
        for name in row.images:
            found.append(tuple(candidates(row, name)))
    return found


def described_picture(
    members: list[Member], pictures: PictureFolder, seed: int
) -> list[dict[str, Any]]:
    """Dialogs of stage 1: the members' pictures as one, a dialog for each text. BadRow."""
    leader = members[0]
    picture = picture_of(candidates_of(member.row for member in members), pictures)
    dialogs = []
    for kind, text in leader.texts:
        prompts = CONTEXT if kind == "context" else CAPTION
        prompt = draw_prompt(seed, leader.id, kind, prompts)
        turns = [f"{IMAGE_TOKEN}\n{prompt}", text]
        dialogs.append(make_dialog(f"{leader.id}-{kind}", picture, turns))
    return dialogs


def questioned_picture(members: list[Member], pictures: PictureFolder, seed: int) -> dict[str, Any]:
    """A dialog of stage 2: the members' questions about their picture. BadRow."""
    leader = members[0]
    picture = picture_of(candidates_of([leader.row]), pictures)
    turns = []
    for member in members:
        question = member.question
        # later questions of a dialog, and those with choices, stand as they are
        if not turns and "\n" not in question:
            question = put_question(draw_prompt(seed, member.id, "vqa", VQA), question)
        turns.append(question)
        turns.append(member.answer)
    turns[0] = f"{IMAGE_TOKEN}\n{turns[0]}"
    return make_dialog(leader.id, picture, turns)


# --- 5. files: written in order by one process, and renamed when all is done ----------------------


@dataclass
class BuildOutcome:
    """What pass 2 came to."""

    counts: Counter[Counted] = field(default_factory=Counter)
    n_dialogs: Counter[str] = field(default_factory=Counter)  # by file

    def total(self, what: str) -> int:
        """How many there are of something that is counted, over all sets."""
        return sum(n for counted, n in self.counts.items() if counted.what == what)

    def reasons(self) -> str:
        """Why rows were dropped, the most frequent reason first."""
        reasons = Counter()
        for counted, n in self.counts.items():
            if counted.what == "dropped":
                reasons[counted.reason] += n
        return ", ".join(f"{reason} {n:,}" for reason, n in reasons.most_common())

    def table(self) -> dict[str, dict[str, dict[str, Any]]]:
        """{subset: {set: {rows, kept, joined, merged, dialogs, untranslated, dropped: {reason:
        n}}}}; rows = kept + joined + merged + all dropped."""
        table = {}
        for counted, n in sorted(self.counts.items()):
            sets = table.setdefault(counted.subset, {})
            if counted.source not in sets:
                sets[counted.source] = {
                    "rows": 0,
                    "kept": 0,
                    "joined": 0,
                    "merged": 0,
                    "dialogs": 0,
                    "untranslated": 0,
                    "dropped": {},
                }
            entry = sets[counted.source]
            if counted.what == "dropped":
                entry["dropped"][counted.reason] = n
            else:
                entry[counted.what] = n
        return table


def output_names() -> list[str]:
    """Names of all files of dialogs that a build may write."""
    names = []
    for of_subset in FILES.values():
        names += of_subset
    return names


def partial_of(path: Path) -> Path:
    """Where a file is written until it is whole."""
    return path.with_name(path.name + ".partial")


def check_no_input(out: Path, files: list[RawFile]) -> None:
    """ValueError where a file would be written over one that is read."""
    inputs = {os.path.realpath(records.path) for _, records in files}
    for name in (*output_names(), "dropped.jsonl", "manifest.json"):
        if os.path.realpath(out / name) in inputs:
            raise ValueError(f"{out / name} is an input: name another --out")


def write_dialogs(build: Build, out: Path, workers: int) -> BuildOutcome:
    """Pass 2. Its files are whole, and still under the names of partial_of()."""
    outcome = BuildOutcome()
    files: dict[str, TextIO] = {}
    blocks = build.inputs.blocks()
    results = in_order(make_block, blocks, workers, build)
    with ExitStack() as stack:
        total = build.inputs.n_rows
        bar = stack.enter_context(tqdm(total=total, desc="building", unit=" rows", disable=None))
        dropped_path = partial_of(out / "dropped.jsonl")
        dropped = stack.enter_context(open(dropped_path, "w", encoding="utf-8"))
        for (_, start, stop), block in zip(blocks, results, strict=True):
            for name, lines in block.lines.items():
                if name not in files:
                    path = partial_of(out / name)
                    files[name] = stack.enter_context(open(path, "w", encoding="utf-8"))
                    files[name].write("[\n")
                else:
                    files[name].write(",\n")
                files[name].write(",\n".join(lines))
                outcome.n_dialogs[name] += len(lines)
            outcome.counts += block.counts
            dropped.writelines(f"{line}\n" for line in block.dropped)
            bar.update(stop - start)
            n_dialogs = outcome.n_dialogs.total()
            bar.set_postfix_str(f"{n_dialogs:,} dialogs, {outcome.total('dropped'):,} dropped")
        for file in files.values():
            file.write("\n]\n")
    return outcome


def finish_files(out: Path, outcome: BuildOutcome, n_rows: int) -> list[str]:
    """Gives the files of pass 2 their names; which of output_names() there are. ValueError where no
    dialog was made: then only dropped.jsonl is replaced."""
    dropped = out / "dropped.jsonl"
    if not outcome.n_dialogs:
        partial_of(dropped).replace(dropped)
        raise ValueError(f"no row is left of {n_rows:,}: {outcome.reasons()} (each in {dropped})")
    made = []
    for name in output_names():
        if name in outcome.n_dialogs:
            partial_of(out / name).replace(out / name)
            made.append(name)
        else:
            # of an earlier build: it would not belong to this one
            (out / name).unlink(missing_ok=True)
    partial_of(dropped).replace(dropped)
    return made


def make_manifest(
    build: Build, settings: dict[str, Any], out: Path, outcome: BuildOutcome, made: list[str]
) -> dict[str, Any]:
    """What manifest.json holds: what was read, how, what was written, what became of each row.
    settings: those beside build.settings; made: names of the files of dialogs."""
    inputs = []
    for source, records in build.inputs.files:
        inputs.append(
            {
                "set": source,
                "file": str(records.path),
                "rows": len(records),
                "sha256": digest(records.path),
            }
        )
    outputs = {}
    for name in made:
        outputs[name] = {"dialogs": outcome.n_dialogs[name], "sha256": digest(out / name)}
    return {
        "inputs": inputs,
        "settings": asdict(build.settings) | settings,
        "outputs": outputs,
        "counts": outcome.table(),
        "joining": {
            "joined": outcome.total("joined"),
            "too_general": build.groups.n_general,
        },
    }


def print_table(table: dict[str, dict[str, dict[str, Any]]]) -> None:
    """What became of the rows of each set, and why some were dropped."""
    print("| subset | set | rows | kept | joined or merged into another | dropped | dialogs |")
    print("|---|---|---|---|---|---|---|")
    reasons = []
    for subset, sets in table.items():
        for source, n in sets.items():
            n_other = n["joined"] + n["merged"]
            n_dropped = sum(n["dropped"].values())
            print(
                f"| {subset} | {source} | {n['rows']:,} | {n['kept']:,} | {n_other:,} "
                f"| {n_dropped:,} | {n['dialogs']:,} |"
            )
            if n["dropped"]:
                by_number = sorted(n["dropped"].items(), key=lambda item: -item[1])
                listed = ", ".join(f"{reason} {k:,}" for reason, k in by_number)
                reasons.append(f"dropped from {subset}, {source}: {listed}")
    for line in reasons:
        print(line)


def print_outcome(
    out: Path,
    outcome: BuildOutcome,
    made: list[str],
    settings: BuildSettings,
    n_general: int,
) -> None:
    """What there is now, and what whoever trains on it should know. n_general: of Groups."""
    print_table(outcome.table())
    if n_general:
        print(
            f"not joined: {n_general:,} rows have a text in common with others that is too general "
            "to say that their pictures belong together (--help has the rule)"
        )
    for name in made:
        print(f"{out / name}: {outcome.n_dialogs[name]:,} dialogs")
    if settings.val_fraction and not any(val in made for _, val in FILES.values()):
        print(
            "data_prep.py: no row that was held out was fit: there is no *-val.json",
            file=sys.stderr,
        )
    if settings.merge_turns:
        merged = outcome.total("merged")
        print(
            f"merged: {merged:,} questions stand in another's dialog, "
            f"{merged:,} pictures fewer to train on "
            f"({merged * 576:,} image tokens at 576 a picture)"
        )
    untranslated = outcome.total("untranslated")
    if untranslated:
        print(
            f"data_prep.py: {untranslated:,} texts or questions are English that was not "
            "translated: they are kept (--require-chinese drops them)",
            file=sys.stderr,
        )


# --- 6. commands ----------------------------------------------------------------------------------


def add_command(commands: argparse._SubParsersAction) -> None:
    """The options of `build`."""
    about = (
        "raw or translated sets -> OUT/alignment.json, instruction.json, images/, dropped.jsonl, "
        "manifest.json"
    )
    joining = (
        "Pictures of PMC-OA rows with one caption become one composite, of at most "
        f"{MAX_PICTURES}: rows of one article, or\nrows of which no article is known; never rows "
        "of two articles. A caption of fewer than "
        f"{GENERAL_BELOW} Chinese\ncharacters (a Latin word counts two) is too general for that; "
        f"without an article also one of fewer than {SPECIFIC_FROM},\nor one that more than "
        f"{MAX_PICTURES} rows have. Such rows stay, each for itself, and are counted."
    )
    parser = commands.add_parser(
        "build",
        help=about,
        description=f"{about}\n\n{joining}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run=run)
    add = parser.add_argument
    add_source_options(parser, SOURCES)
    add(
        "--images",
        nargs="+",
        default=[],
        metavar="DIR",
        help="folders the picture names are relative to, searched in this order",
    )
    add(
        "--out",
        type=Path,
        required=True,
        metavar="DIR",
        help="where to write; run again after a stop, it makes no finished picture twice",
    )
    add(
        "--val-fraction",
        action=InRange,
        type=float,
        low=0,
        high=0.9,
        default=0,
        metavar="X",
        help="share of rows for *-val.json; rows of one article, group or picture stay on one side "
        "(default 0)",
    )
    add(
        "--alignment-text",
        choices=("draw", "inline", "context", "both"),
        default="draw",
        help="what stage 1 learns of a case report: one of its two texts drawn by row id "
        "(default), always this one, or a dialog for each",
    )
    add(
        "--choices",
        action="store_true",
        help="keep multiple-choice questions as such (default: open questions, as the paper)",
    )
    add(
        "--merge-turns",
        action="store_true",
        help="all questions about one picture in one dialog: the picture is trained on once",
    )
    add(
        "--require-chinese",
        action="store_true",
        help="drop rows that are not translated (default: keep them, and warn)",
    )
    add("--seed", type=int, default=0, help="of prompts, kinds of text and the split (default 0)")
    add(
        "--copy",
        action="store_true",
        help="copy pictures (default: hard links where the disk allows)",
    )
    add(
        "--skip-pictures",
        action="store_true",
        help="write the texts alone: pictures are named as they would be, and neither sought nor "
        "made",
    )
    add_workers_option(
        parser, "processes (default %(default)s, the CPUs here); the output does not depend on it"
    )


def run(args: argparse.Namespace) -> int:
    if not args.images and not args.skip_pictures:
        raise ValueError(
            "name the folders of the pictures by --images "
            "(or --skip-pictures, to write the texts alone)"
        )
    for root in args.images:
        if not Path(root).is_dir():
            raise FileNotFoundError(f"no such image folder: {root}")
    # what an earlier build of this process saw may have changed
    place_pictures.cache_clear()
    files = open_sources(
        args.raw_files, SOURCES, own_columns=args.own_columns, encoding=args.encoding
    )
    inputs = find_inputs(files, args.own_columns)
    settings = BuildSettings(
        seed=args.seed,
        choices=args.choices,
        alignment_text=args.alignment_text,
        require_chinese=args.require_chinese,
        merge_turns=args.merge_turns,
        val_fraction=args.val_fraction,
    )
    pictures = PictureFolder(
        roots=tuple(os.path.realpath(root) for root in args.images),
        path=args.out / "images",
        is_copied=args.copy,
        is_skipped=args.skip_pictures,
    )
    args.out.mkdir(parents=True, exist_ok=True)
    with lock(args.out / ".lock", f"{args.out} is being written by another run"):
        groups = survey(inputs, settings, args.workers)
        check_no_input(args.out, files)
        build = Build(inputs, settings, pictures, groups)
        outcome = write_dialogs(build, args.out, args.workers)
        made = finish_files(args.out, outcome, inputs.n_rows)
        more_settings = {
            "images": list(args.images),
            "skip_pictures": args.skip_pictures,
            "columns": {name: names[0] for name, names in inputs.columns.items() if names},
            "encoding": args.encoding,
            "max_pictures": MAX_PICTURES,
            "min_length": MIN_LENGTH,
            "general_below": GENERAL_BELOW,
            "specific_from": SPECIFIC_FROM,
        }
        manifest = make_manifest(build, more_settings, args.out, outcome, made)
        write_json(args.out / "manifest.json", manifest)
        print_outcome(args.out, outcome, made, settings, groups.n_general)
    return 0


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    add_command(commands)
    for command in (translate, review, check, stats):
        command.add_command(commands)
    args = parser.parse_args()
    sys.exit(args.run(args))


if __name__ == "__main__":
    run_cli(main)
