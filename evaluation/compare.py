"""The same questions put to several models, their answers side by side: Figure 4 of the paper as a
tool, and for doctors to rank without the names.

    python evaluate.py compare test.json --images DIR --out OUT
            --system Qilin-Med-VL=out/stage2 --system LLaVA-1.5=weights/llava-1.5-7b-hf
            --system "GPT-4V=https://api.openai.com/v1#MODEL"
            --system VisCPM-Chat=viscpm-answers.jsonl
    ... --blind
        OUT/blind.html for the doctors, OUT/blind_key.json to keep back
    python evaluate.py rank OUT ranking-1.csv ...
        what they gave back: mean ranks, and win rates with intervals

A system is a folder of any layout that load_qilin reads; an OpenAI-compatible vision endpoint,
where nothing is sent before that was agreed to; or a file of answers that were given elsewhere
(.jsonl .json .csv .tsv: id and answer, or question, image and answer; FILE#KEY names the key of the
answer; predictions.jsonl of evaluate.py as it is, and with #blind its answers without the picture).
Every answer is kept in OUT/answers.jsonl as it comes: stopped anywhere, the same command goes on
and asks only what is missing.
"""

import argparse
import asyncio
import random
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from common.endpoint import Endpoint, EndpointFailed, EndpointOptions, add_endpoint_options
from common.files import USER_ERRORS, digest, digest_of, one_line
from common.journal import Journal
from common.options import InRange
from common.rows import BadRow, Records, folded
from common.text import CJK, chinese_share
from evaluation.entered import EnteredAnswers, writable
from evaluation.figure4 import write_figure4
from evaluation.pages import LABELS, Compared, Glosses, write_blind, write_pages
from evaluation.systems import (
    Answer,
    FolderOptions,
    System,
    ask_endpoint,
    ask_system,
    kept_text,
    open_journal,
    picture_bytes,
    read_system,
)
from evaluation.testsets import Question, read_testset, wording
from model_io.pixels import open_image

# pixels, the longer side, of a picture on a page
SHOWN = 640
GLOSS = (
    "You translate Chinese medical text into English for a table in a paper. Reply with the "
    "translation of the user's message and nothing else: no notes, no correction of what is wrong "
    "in it, and no answer to what it asks."
)

# --- 1. questions ---------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Chosen:
    """A question to be asked, with the digests of its pictures."""

    question: Question
    pictures: list[str]


def check_text(question: Question) -> None:
    for text in (str(question.id), wording(question), question.truth):
        if "\0" in text or text != text.encode("utf-8", "replace").decode():
            raise ValueError(
                "a text holds a NUL character or half a surrogate pair: no text that anybody wrote"
            )


def named(questions: list[Question], ids: str) -> list[Question]:
    """Those that --ids names, in its order."""
    wanted = [name.strip() for name in ids.split(",") if name.strip()]
    by_id = {}
    for question in questions:
        by_id.setdefault(str(question.id), []).append(question)
    chosen = []
    for name in dict.fromkeys(wanted):
        if name not in by_id:
            raise ValueError(f"--ids {name}: no question has this id")
        chosen += by_id[name]
    return chosen


def choose_questions(
    questions: list[Question], *, file: str, ids: str | None, n: int, seed: int, skip_bad: bool
) -> list[Chosen]:
    """Those that --ids names, else n drawn by the seed, in the order of the file. Each picture is
    decoded before anything is asked."""
    if ids:
        wanted = named(questions, ids)
    else:
        n = min(n, len(questions))
        places = random.Random(seed).sample(range(len(questions)), n)
        wanted = [questions[i] for i in sorted(places)]
    chosen = []
    for question in tqdm(wanted, desc="reading pictures", disable=None):
        try:
            check_text(question)
            digests = []
            for path in question.pictures:
                open_image(path)
                digests.append(digest(path))
        except USER_ERRORS as error:
            if not skip_bad:
                raise ValueError(
                    f"{file}: question {question.id}: {one_line(error)} "
                    "(--skip-bad leaves such rows out)"
                ) from None
            print(f"left out: question {question.id}: {one_line(error)}", file=sys.stderr)
            continue
        chosen.append(Chosen(question, digests))
    if not chosen:
        raise ValueError(f"{file}: no question in it can be asked")
    return chosen


# --- 2. English beneath the Chinese ---------------------------------------------------------------


def gloss_key(endpoint: Endpoint, text: str) -> str:
    return digest_of(GLOSS, endpoint.url, endpoint.model, text)


def gloss_messages(text: str) -> list[dict[str, str]]:
    return [{"role": "system", "content": GLOSS}, {"role": "user", "content": text}]


def accept_gloss(text: str) -> str:
    if chinese_share(text) > 0.3:
        raise ValueError("the gloss is not English")
    return writable(text)


def add_glosses(
    endpoint: Endpoint, texts: list[str], finished: Journal
) -> tuple[Glosses, list[str]]:
    """The English of those that could be had, and the reasons for the others; each text is asked
    for once."""
    keys = {text: gloss_key(endpoint, text) for text in texts if CJK.search(text)}
    todo = {key: text for text, key in keys.items() if key not in finished}

    def keep(key, text, english):
        finished.add({"key": key, "text": english, "chinese": text})

    with tqdm(total=len(keys), initial=len(keys) - len(todo), desc="gloss", disable=None) as bar:
        try:
            asking = ask_endpoint(endpoint, todo, gloss_messages, keep, bar, accept=accept_gloss)
            failed = asyncio.run(asking)
        except EndpointFailed as error:
            failed = {key: one_line(error) for key in todo if key not in finished}
    glosses = {}
    for text, key in keys.items():
        english = kept_text(finished, key)
        if english is not None:
            glosses[text] = english
    return glosses, list(failed.values())


def read_glosses(path: str, encoding: str) -> Glosses:
    """{Chinese: English} of a table with these columns, whatever the case of their names.
    ValueError for a file without them."""
    records = Records(path, encoding)
    glosses = {}
    for i, raw in records.read(0, len(records)):
        try:
            fields = folded(records.parse(raw))
            chinese = fields["chinese"]
            english = fields["english"]
        except (BadRow, KeyError):
            raise ValueError(f"{path}: row {i} has no columns chinese and english") from None
        if isinstance(chinese, str) and isinstance(english, str) and english.strip():
            glosses[chinese.strip()] = english.strip()
    return glosses


def confirm_glosses(endpoint: Endpoint, texts: set[str], n_to_come: int, finished: Journal) -> None:
    """Have it agreed to that texts are sent, those known now and at most n_to_come more."""
    chinese = [text for text in texts if CJK.search(text)]
    n_known = sum(gloss_key(endpoint, text) not in finished for text in chinese)
    n = n_known + n_to_come
    if n:
        endpoint.confirm(
            f"for English beneath the Chinese, up to {n} texts: questions, answers, ground "
            "truths. No pictures, ids or file names."
        )


# --- 3. answers -----------------------------------------------------------------------------------


def read_systems(
    words: list[str],
    of_folder: FolderOptions,
    of_endpoint: EndpointOptions,
    is_blind: bool,
    encoding: str,
) -> list[System]:
    """The System of each --system. ValueError where they are too many, or too few to be ranked."""
    if not isinstance(of_endpoint.extra_body, dict):
        raise ValueError("--extra-body must be a JSON object")
    systems = [read_system(text, of_folder, of_endpoint, encoding) for text in words]
    names = [system.name for system in systems]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"--system {name}: two systems have this name")
    n = len(systems)
    if n > len(LABELS):
        raise ValueError(f"{n} systems: at most {len(LABELS)} fit on a page")
    if is_blind and n < 2:
        raise ValueError(f"{n} systems: --blind wants two at least, or there is nothing to rank")
    return systems


def answer_key(system: System, chosen: Chosen) -> str:
    """What an answer is kept under: all that it depends on."""
    texts = [turn["value"] for turn in chosen.question.conversation]
    return digest_of(system.settings, texts, chosen.question.n_images, chosen.pictures)


def confirm_questions(system: System, todo: dict[str, Question]) -> None:
    """Have it agreed to that questions are sent, where the system is an endpoint."""
    if not system.endpoint or not todo:
        return
    n = sum(len(question.pictures) for question in todo.values())
    system.endpoint.confirm(
        f"for {system.name}, {len(todo)} questions and {n} pictures. Of a picture the pixels "
        "alone, with whatever is written in them: no file names, no metadata."
    )


def collect_answers(
    systems: list[System],
    chosen: list[Chosen],
    options: FolderOptions,
    finished: Journal,
    glosser: Endpoint | None,
    english: Journal | None,
    known_glosses: Glosses,
) -> list[list[Answer]]:
    """The answer of each system to each question, asked for where `finished` does not hold it.

    All is agreed to before the first is asked, so that nobody has to wait for a question: the
    texts of a page that is glossed, too."""
    keys = [[answer_key(system, one) for system in systems] for one in chosen]
    todo = open_questions(systems, chosen, keys, finished)
    for system, part in zip(systems, todo, strict=True):
        confirm_questions(system, part)
    if glosser and english:
        texts = known_texts(systems, chosen, keys, finished) - known_glosses.keys()
        confirm_glosses(glosser, texts, sum(map(len, todo)), english)
    failed = {}
    for system, part in zip(systems, todo, strict=True):
        if part:
            n_done = len(chosen) - len(part)
            failed |= ask_system(system, part, n_done, options, finished)
    answers = []
    for one, own in zip(chosen, keys, strict=True):
        row = []
        for system, key in zip(systems, own, strict=True):
            if system.entered:
                row.append(entered_answer(system.entered, one.question))
            else:
                row.append(answer_of(key, finished, failed))
        answers.append(row)
    return answers


def open_questions(
    systems: list[System], chosen: list[Chosen], keys: list[list[str]], finished: Journal
) -> list[dict[str, Question]]:
    """Of each system the questions that it is yet to be asked, {key: question}; of entered answers
    none."""
    todo: list[dict[str, Question]] = []
    for k, system in enumerate(systems):
        part = {}
        for one, own in zip(chosen, keys, strict=True):
            if not system.entered and own[k] not in finished:
                part[own[k]] = one.question
        todo.append(part)
    return todo


def known_texts(
    systems: list[System], chosen: list[Chosen], keys: list[list[str]], finished: Journal
) -> set[str]:
    """The texts of a page as far as they are known before anybody is asked."""
    texts = set()
    for one, own in zip(chosen, keys, strict=True):
        texts |= {wording(one.question), one.question.truth}
        for system, key in zip(systems, own, strict=True):
            if system.entered:
                texts.add(entered_answer(system.entered, one.question).text)
            else:
                texts.add(kept_text(finished, key) or "")
    return texts


def entered_answer(entered: EnteredAnswers, question: Question) -> Answer:
    """What a file of answers says to a question, or why it says nothing."""
    try:
        return Answer(entered.text_of(question))
    except ValueError as error:
        return Answer(fault=one_line(error))


def answer_of(key: str, finished: Journal, failed: dict[str, str]) -> Answer:
    line = finished.find(key)
    if line:
        return Answer.from_line(line)
    return Answer(fault=failed[key])


def count_faults(systems: list[System], answers: list[list[Answer]]) -> Counter[str]:
    """How many answers are missing, by system and reason. ValueError where all are."""
    faults = Counter()
    for row in answers:
        for system, answer in zip(systems, row, strict=True):
            if answer.fault:
                faults[f"{system.name}: {answer.fault}"] += 1
    if faults.total() == len(answers) * len(systems):
        raise ValueError(f"nobody answered anything: {faults.most_common(1)[0][0]}")
    return faults


def with_pictures(chosen: Chosen, answers: list[Answer]) -> Compared:
    """A question as a page shows it."""
    pictures = []
    for path in chosen.question.pictures:
        pictures.append(picture_bytes(path, SHOWN, "JPEG", quality=85))
    return Compared(chosen.question, answers, pictures)


def compare_systems(
    out: Path,
    systems: list[System],
    chosen: list[Chosen],
    options: FolderOptions,
    glosser: Endpoint | None,
    known_glosses: Glosses,
) -> tuple[list[Compared], Glosses, Counter[str]]:
    """(each question with its answers, their English where it is known or there is a glosser, what
    is missing).

    Texts are kept in the folder `out` as they come."""
    finished = open_journal(out / "answers.jsonl")
    english = open_journal(out / "glosses.jsonl") if glosser else None
    answers = collect_answers(systems, chosen, options, finished, glosser, english, known_glosses)
    faults = count_faults(systems, answers)
    glosses = dict(known_glosses)
    if glosser and english:
        texts = []
        for one, row in zip(chosen, answers, strict=True):
            texts += [wording(one.question), *(answer.text for answer in row), one.question.truth]
        unknown = [text for text in texts if text not in known_glosses]
        found, reasons = add_glosses(glosser, unknown, english)
        glosses |= found
        faults.update(f"gloss: {reason}" for reason in reasons)
    compared = [with_pictures(one, row) for one, row in zip(chosen, answers, strict=True)]
    return compared, glosses, faults


def print_faults(faults: Counter[str]) -> None:
    why = ", ".join(f"{reason} ({n})" for reason, n in faults.most_common(5))
    print(
        f"{faults.total()} texts are missing: {why}. What is answered is kept: "
        "run the same command again",
        file=sys.stderr,
    )


def print_costs(endpoints: list[tuple[str, Endpoint | None]]) -> None:
    for name, endpoint in endpoints:
        if not endpoint or not endpoint.answered:
            continue
        print(f"{name}: {endpoint.summary()}", file=sys.stderr)


def check_entered(systems: list[System], questions: list[Question]) -> None:
    """Says which entered answers are of no question. ValueError where ids do not tell questions
    apart."""
    for system in systems:
        left_over = system.entered.check(questions) if system.entered else ""
        if left_over:
            print(f"{system.name}: {left_over}", file=sys.stderr)


# --- 4. the command -------------------------------------------------------------------------------


def add_command(commands: Any) -> None:
    parser = commands.add_parser(
        "compare",
        help="the same questions to several systems, side by side",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("file", help="test set: PMC-VQA, SLAKE, VQA-RAD, dialogs or your own")
    add("--images", required=True, metavar="DIR", help="folder that picture names are relative to")
    add(
        "--skip-bad",
        action="store_true",
        help="leave out rows that cannot be used instead of stopping",
    )
    add("--encoding", default="utf-8", help="of a .csv or .tsv file (default %(default)s)")
    add(
        "--system",
        action="append",
        required=True,
        metavar="NAME=PLACE",
        help="a model's folder; https://host/v1#model-name (key: $NAME_API_KEY, else "
        "$OPENAI_API_KEY); or a file of answers; once for each system",
    )
    add(
        "--out",
        type=Path,
        required=True,
        metavar="DIR",
        help="folder for the pages, answers.jsonl and pictures/",
    )
    add(
        "--n",
        action=InRange,
        type=int,
        low=1,
        high=10**6,
        default=20,
        help="questions drawn from the file (default %(default)s: a page for eyes)",
    )
    add("--ids", default=None, metavar="A,B", help="these questions instead")
    add(
        "--seed",
        type=int,
        default=0,
        help="of the draw, and of the order of a blind page (default %(default)s)",
    )
    add("--blind", action="store_true", help="a page without names, to be ranked, instead")
    add(
        "--figure",
        action="store_true",
        help="also OUT/figure4.html: in the form of the paper's Figure 4, three cases a page",
    )
    add(
        "--gloss",
        action="store_true",
        help="English beneath the Chinese, from the endpoint that --base-url and --model name",
    )
    add(
        "--glosses",
        default=None,
        metavar="FILE",
        help="English beneath the Chinese from a table with columns chinese and english; with "
        "--gloss only what it lacks is asked for",
    )
    add(
        "--max-new-tokens",
        action=InRange,
        type=int,
        low=1,
        high=10**6,
        default=256,
        help="of an answer (default %(default)s)",
    )
    add(
        "--batch-size",
        action=InRange,
        type=int,
        low=1,
        high=10**6,
        default=4,
        help="questions that a folder answers at a time (default %(default)s)",
    )
    add(
        "--device", default=None, help="for folders: cuda, mps or cpu (default: the first there is)"
    )
    add(
        "--dtype",
        default=None,
        choices=("float32", "bfloat16", "float16"),
        help="for folders (default: what the device does best)",
    )
    add(
        "--quantize",
        default=None,
        choices=("int8", "int4"),
        help="for folders: keep the language model in 8 or 4 bits",
    )
    add_endpoint_options(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Asks every system every question and writes the page. -> 0, or 1 when a cell stayed empty."""
    if args.blind and args.figure:
        raise ValueError("--figure names the systems, which --blind hides: ask for one of the two")
    _, questions, left_out = read_testset(args.file, args.images, args.skip_bad, args.encoding)
    for reason, n in left_out.most_common(5):
        print(f"left out: {n} rows: {reason}", file=sys.stderr)
    of_folder = FolderOptions(
        device=args.device,
        dtype=args.dtype,
        quantize=args.quantize,
        batch_size=args.batch_size,
        max_new_tokens=args.max_new_tokens,
    )
    of_endpoint = EndpointOptions(
        base_url=args.base_url,
        model=args.endpoint_model,
        api_key=args.api_key,
        yes=args.yes,
        concurrency=args.concurrency,
        timeout=args.timeout,
        retries=args.retries,
        retry_delay=args.retry_delay,
        price_in=args.price_in,
        price_out=args.price_out,
        extra_body=args.extra_body,
    )
    systems = read_systems(args.system, of_folder, of_endpoint, args.blind, args.encoding)
    check_entered(systems, questions)
    known_glosses = read_glosses(args.glosses, args.encoding) if args.glosses else {}
    glosser = Endpoint(of_endpoint) if args.gloss else None
    chosen = choose_questions(
        questions, file=args.file, ids=args.ids, n=args.n, seed=args.seed, skip_bad=args.skip_bad
    )
    args.out.mkdir(parents=True, exist_ok=True)
    compared, glosses, faults = compare_systems(
        args.out, systems, chosen, of_folder, glosser, known_glosses
    )
    if args.blind:
        said = write_blind(args.out, systems, compared, glosses, seed=args.seed)
    else:
        said = write_pages(
            args.out,
            systems,
            compared,
            glosses,
            title=Path(args.file).name,
            max_new_tokens=args.max_new_tokens,
        )
    print(said)
    if args.figure:
        title = Path(args.file).name
        print(write_figure4(args.out, systems, compared, glosses, title=title))
    print_costs([*((system.name, system.endpoint) for system in systems), ("gloss", glosser)])
    if faults:
        print_faults(faults)
    return 1 if faults else 0
