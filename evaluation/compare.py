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
import gc
import io
import os
import random
import re
import sys
from collections import Counter
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from common.endpoint import (
    Endpoint,
    EndpointFailed,
    EndpointOptions,
    add_endpoint_options,
    ask_many,
)
from common.files import USER_ERRORS, check_ranges, digest, digest_of, model_folder, one_line
from common.journal import Journal
from common.text import CJK, chinese_share
from evaluation.pages import LABELS, data_url, turns, wording, write_blind, write_pages
from evaluation.ranking import add_rank_flags, rank
from evaluation.testsets import read_testset
from model_io.load import read_checkpoint
from model_io.options import open_model
from model_io.pixels import open_image, preprocess_image
from model_io.tokens import Tokenizer, encode_prompt
from qilin_min import answer_ids

SENT, SHOWN = 2048, 640  # pixels, the longer side, of a picture as it is sent, and on a page
MAX_SENT_BYTES = (
    4 * 2**20
)  # of one picture: some endpoints take no more than 5 MB; a larger one goes as JPEG
GLOSS = (
    "You translate Chinese medical text into English for a table in a paper. Reply with the translation of the user's message and nothing else: "
    "no notes, no correction of what is wrong in it, and no answer to what it asks."
)

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


def check_text(question):
    for text in (str(question.id), wording(question), question.truth):
        if "\0" in text or text != text.encode("utf-8", "replace").decode():
            raise ValueError(
                "a text holds a NUL character or half a surrogate pair: no text that anybody wrote"
            )


def choose(args, questions):
    """Those that --ids names, else --n drawn by --seed, in the order of the file, and the digests of their pictures. Each picture is decoded before anything is asked."""
    if args.ids:
        wanted = [name.strip() for name in args.ids.split(",") if name.strip()]
        if missing := [
            name for name in wanted if name not in {str(question.id) for question in questions}
        ]:
            raise ValueError(f"--ids {missing[0]}: no question has this id")
        chosen = [
            question
            for name in dict.fromkeys(wanted)
            for question in questions
            if str(question.id) == name
        ]
    else:
        chosen = [
            questions[i]
            for i in sorted(
                random.Random(args.seed).sample(range(len(questions)), min(args.n, len(questions)))
            )
        ]
    good, digests = [], []
    for question in tqdm(chosen, desc="reading pictures", disable=None):
        try:
            check_text(question)
            digests.append([digest(path) for path in question.pictures if open_image(path)])
            good.append(question)
        except USER_ERRORS as error:
            if not args.skip_bad:
                raise ValueError(
                    f"{args.file}: question {question.id}: {one_line(error)} (--skip-bad leaves such rows out)"
                ) from None
            print(f"left out: question {question.id}: {one_line(error)}", file=sys.stderr)
    if not good:
        raise ValueError(f"{args.file}: no question in it can be asked")
    return good, digests


def read_system(text, args, endpoint_options):
    """The System of one --system, its path or address looked at, nothing loaded or sent."""
    name, _, place = text.partition("=")
    name, is_url = name.strip(), place.startswith(("https://", "http://"))
    base, _, model = place.partition("#")
    if not name or not place or not name.isprintable() or len(name) > 60 or (is_url and not model):
        raise ValueError(
            f"--system {name or repr('')}: must be NAME=FOLDER or NAME=https://host/v1#model-name"
        )
    try:
        if is_url:
            key = os.environ.get(
                re.sub("[^A-Z0-9]", "_", name.upper()) + "_API_KEY"
            )  # else $OPENAI_API_KEY
            length = (
                {}
                if "max_completion_tokens" in endpoint_options.extra_body
                else {"max_tokens": args.max_new_tokens}
            )  # newer models of OpenAI know only the former
            endpoint = Endpoint(
                replace(
                    endpoint_options,
                    base_url=base,
                    model=model,
                    api_key=key,
                    extra_body=length | endpoint_options.extra_body,
                )
            )
            return System(
                name, None, endpoint, [name, endpoint.url, model, endpoint.options.extra_body]
            )
        read_checkpoint(place)
        Tokenizer(place)
    except USER_ERRORS as error:
        raise ValueError(f"--system {name}: {one_line(error)}") from None
    folder = model_folder(place)
    files = sorted(
        (file.name, file.stat().st_size, file.stat().st_mtime_ns)
        for file in ([folder] if folder.is_file() else folder.iterdir())
        if file.is_file()
    )
    return System(
        name,
        Path(place),
        None,
        [name, os.path.realpath(folder), files, args.dtype, args.quantize, args.max_new_tokens],
    )


def read_systems(args, endpoint_options):
    if not isinstance(endpoint_options.extra_body, dict):
        raise ValueError("--extra-body must be a JSON object")
    systems = [read_system(text, args, endpoint_options) for text in args.system]
    names = [system.name for system in systems]
    if twice := [name for name in names if names.count(name) > 1]:
        raise ValueError(f"--system {twice[0]}: two systems have this name")
    if len(systems) > len(LABELS) or len(systems) < 1 + args.blind:
        raise ValueError(
            f"{len(systems)} systems: "
            + (
                f"at most {len(LABELS)} fit on a page"
                if len(systems) > 1
                else "--blind wants two at least, or there is nothing to rank"
            )
        )
    return systems


# --- 2. answers -------------------------------------------------------------------------------------------------------


def open_journal(path: Path) -> Journal:
    """The texts of earlier runs, which need not be asked for again, and those of this one."""
    journal = Journal(path, lambda line: isinstance(line["text"], str))
    journal.load()
    for _ in range(journal.damaged):
        print(f"{path}: a damaged line: its text is asked for again", file=sys.stderr)
    return journal


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


def vision_messages(question):
    """The bare question with its pictures, as any OpenAI-compatible endpoint takes it."""
    messages = []
    for who, text, pictures in turns(question):
        content = []
        for path in pictures:
            raw = picture_bytes(path, SENT, "PNG")
            content.append(
                {
                    "type": "image_url",
                    "image_url": {
                        "url": data_url(
                            raw
                            if len(raw) <= MAX_SENT_BYTES
                            else picture_bytes(path, SENT, "JPEG", quality=95)
                        )
                    },
                }
            )
        content += [{"type": "text", "text": text}] * bool(text)
        messages.append(
            {
                "role": "user" if who == "human" else "assistant",
                "content": content if pictures else text,
            }
        )
    return messages


def ask_folder(system, todo, args, keep, bar):
    """The same for a folder: loaded, asked in batches, and freed when this returns."""
    model, tokenizer, _ = open_model(
        str(system.folder),
        llm=None,
        vision=None,
        projector=None,
        device=args.device,
        dtype=args.dtype,
        quantize=args.quantize,
    )
    config, failed = model.config, {}
    limit = config.text.max_position_embeddings

    def prepared():
        for key, question in todo.items():
            try:
                prompt = encode_prompt(
                    question.conversation,
                    tokenizer,
                    config.n_image_tokens,
                    n_images=question.n_images,
                )
                if len(prompt) >= limit:
                    raise ValueError(
                        f"the question takes {len(prompt)} tokens, the model's positions end at {limit}"
                    )
                pixels = [
                    preprocess_image(path, config.vision.image_size, config.image_mode)
                    for path in question.pictures
                ]
            except ValueError as error:
                failed[key] = one_line(error)
                bar.update()
                continue
            yield key, question, prompt, pixels

    rest = prepared()
    while batch := list(islice(rest, args.batch_size)):
        pixels = [picture for *_, pictures in batch for picture in pictures]
        answers = answer_ids(
            model,
            [prompt for _, _, prompt, _ in batch],
            torch.stack(pixels) if pixels else None,
            max_new_tokens=args.max_new_tokens,
        )
        for (key, question, prompt, _), ids in zip(batch, answers):
            keep(
                key,
                question,
                (
                    tokenizer.decode(ids),
                    len(ids) == args.max_new_tokens or len(prompt) + len(ids) >= limit,
                ),
            )
        bar.update(len(batch))
    return failed


async def answer_all(endpoint, todo, messages_of, keep, bar, **options):
    """Asks for every item of todo ({key: item}), several at once, keep(key, item, answer) as each comes. -> {key: why there is none}."""
    failed = {}

    async def ask_one(entry):
        key, item = entry
        try:
            messages = await asyncio.to_thread(messages_of, item)
            answer = await endpoint.ask(messages, **options)
            keep(key, item, answer)
        except EndpointFailed:
            raise
        except ValueError as error:
            # this one only: it is asked again in the next run
            failed[key] = one_line(error)

    await ask_many(endpoint, todo.items(), ask_one, bar)
    return failed


def ask_system(system, todo, n_done, args, finished):
    """Every open question of one system. -> {key: why there is no answer}; a fault of the whole system is said, and is every question's reason."""

    def keep(key, question, answer):
        line = {
            "key": key,
            "text": clean(answer[0]),
            "cut": answer[1],
            "system": system.name,
            "where": system.where,
            "id": question.id,
            "question": wording(question),
        }
        finished.add(line)

    with tqdm(total=len(todo) + n_done, initial=n_done, desc=system.name, disable=None) as bar:
        try:
            if system.endpoint:
                return asyncio.run(
                    answer_all(
                        system.endpoint,
                        todo,
                        vision_messages,
                        keep,
                        bar,
                        accept=lambda text, cut: (text, cut),
                        allow_cut=True,
                    )
                )
            return ask_folder(system, todo, args, keep, bar)
        except (ValueError, torch.OutOfMemoryError) as error:
            fault = one_line(error)
        finally:
            if system.folder:
                gc.collect()  # the model goes before the next one comes
                torch.cuda.empty_cache()
    print(f"{system.name}: {fault}", file=sys.stderr)
    return {key: fault for key in todo if key not in finished}


# --- 3. English beneath the Chinese -----------------------------------------------------------------------------------


def gloss_key(endpoint, text):
    return digest_of(GLOSS, endpoint.url, endpoint.model, text)


def accept_gloss(text):
    if chinese_share(text) > 0.3:
        raise ValueError("the gloss is not English")
    return clean(text)


def add_glosses(endpoint, texts, finished):
    """{Chinese: English} of those that could be had, and the reasons for the others; each text is asked for once."""
    keys = {text: gloss_key(endpoint, text) for text in texts if CJK.search(text)}
    todo, failed = {key: text for text, key in keys.items() if key not in finished}, {}
    with tqdm(total=len(keys), initial=len(keys) - len(todo), desc="gloss", disable=None) as bar:
        try:
            failed = asyncio.run(
                answer_all(
                    endpoint,
                    todo,
                    lambda text: [
                        {"role": "system", "content": GLOSS},
                        {"role": "user", "content": text},
                    ],
                    lambda key, text, english: finished.add(
                        {"key": key, "text": english, "chinese": text}
                    ),
                    bar,
                    accept=accept_gloss,
                )
            )
        except EndpointFailed as error:
            failed = {key: one_line(error) for key in todo if key not in finished}
    return {
        text: finished.find(key)["text"] for text, key in keys.items() if key in finished
    }, list(failed.values())


# --- 4. compare -------------------------------------------------------------------------------------------------------


def add_compare_flags(parser):
    add = parser.add_argument
    add(
        "--system",
        action="append",
        required=True,
        metavar="NAME=PLACE",
        help="a model's folder, or https://host/v1#model-name (key: $NAME_API_KEY, else $OPENAI_API_KEY); once for each system",
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
        type=int,
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
        "--gloss",
        action="store_true",
        help="English beneath the Chinese, from the endpoint that --base-url and --model name",
    )
    add("--max-new-tokens", type=int, default=256, help="of an answer (default %(default)s)")
    add(
        "--batch-size",
        type=int,
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


def compare(args, questions):
    """Asks every system every question (of testsets) and writes the page. -> 0, or 1 when a cell stayed empty."""
    check_ranges(args, n=(1, 10**6), max_new_tokens=(1, 10**6), batch_size=(1, 10**6))
    endpoint_options = EndpointOptions(
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
    systems = read_systems(args, endpoint_options)
    glosser = Endpoint(endpoint_options) if args.gloss else None
    questions, digests = choose(args, questions)
    args.out.mkdir(parents=True, exist_ok=True)
    finished, english = (
        open_journal(args.out / "answers.jsonl"),
        open_journal(args.out / "glosses.jsonl") if glosser else None,
    )
    keys = [
        [
            digest_of(
                system.settings,
                [turn["value"] for turn in question.conversation],
                question.n_images,
                own,
            )
            for system in systems
        ]
        for question, own in zip(questions, digests)
    ]
    todo = [
        {own[k]: question for own, question in zip(keys, questions) if own[k] not in finished}
        for k in range(len(systems))
    ]
    for system, part in zip(
        systems, todo
    ):  # all is agreed to before the first is asked, so that nobody has to wait for a question
        if system.endpoint and part:
            n = sum(len(question.pictures) for question in part.values())
            system.endpoint.confirm(
                f"for {system.name}, {len(part)} questions and {n} pictures. "
                "Of a picture the pixels alone, with whatever is written in them: no file names, no metadata."
            )
    if glosser:
        texts = {text for question in questions for text in (wording(question), question.truth)}
        texts |= {finished.find(key)["text"] for own in keys for key in own if key in finished}
        if n := sum(
            gloss_key(glosser, text) not in english for text in texts if CJK.search(text)
        ) + sum(map(len, todo)):
            glosser.confirm(
                f"for English beneath the Chinese, up to {n} texts: questions, answers, ground truths. No pictures, ids or file names."
            )
    failed = {}
    for system, part in zip(systems, todo):
        if part:
            failed |= ask_system(system, part, len(questions) - len(part), args, finished)
    answers = [[finished.find(key) or {"fault": failed[key]} for key in own] for own in keys]
    faults = Counter(
        f"{system.name}: {line['fault']}"
        for lines in answers
        for system, line in zip(systems, lines)
        if "fault" in line
    )
    if faults.total() == len(questions) * len(systems):
        raise ValueError(f"nobody answered anything: {faults.most_common(1)[0][0]}")
    glosses = {}
    if glosser:
        texts = [
            text
            for question, lines in zip(questions, answers)
            for text in (
                wording(question),
                *(line.get("text", "") for line in lines),
                question.truth,
            )
        ]
        glosses, reasons = add_glosses(glosser, dict.fromkeys(texts), english)
        faults.update(f"gloss: {reason}" for reason in reasons)
    shown = [
        [picture_bytes(path, SHOWN, "JPEG", quality=85) for path in question.pictures]
        for question in questions
    ]
    print(
        (write_blind if args.blind else write_pages)(
            args, systems, questions, answers, glosses, shown
        )
    )
    for name, endpoint in [(system.name, system.endpoint) for system in systems] + [
        ("gloss", glosser)
    ]:
        if endpoint and endpoint.answered:
            print(f"{name}: {endpoint.summary()}", file=sys.stderr)
    if faults:
        why = ", ".join(f"{reason} ({n})" for reason, n in faults.most_common(5))
        print(
            f"{faults.total()} texts are missing: {why}. What is answered is kept: run the same command again",
            file=sys.stderr,
        )
    return 1 if faults else 0


def main():
    """`evaluate.py compare …` and `evaluate.py rank …`."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    asked = commands.add_parser(
        "compare", help="the same questions to several systems, side by side"
    )
    asked.add_argument("file", help="test set: PMC-VQA, SLAKE, VQA-RAD, dialogs or your own")
    asked.add_argument(
        "--images", required=True, metavar="DIR", help="folder that picture names are relative to"
    )
    asked.add_argument(
        "--skip-bad",
        action="store_true",
        help="leave out rows that cannot be used instead of stopping",
    )
    asked.add_argument(
        "--encoding", default="utf-8", help="of a .csv or .tsv file (default %(default)s)"
    )
    add_compare_flags(asked)
    add_rank_flags(commands.add_parser("rank", help="what the doctors gave back"))
    args = parser.parse_args()
    if args.command == "rank":
        sys.exit(rank(args))
    _, questions, left_out = read_testset(args.file, args.images, args.skip_bad, args.encoding)
    for reason, n in left_out.most_common(5):
        print(f"left out: {n} rows: {reason}", file=sys.stderr)
    sys.exit(compare(args, questions))
