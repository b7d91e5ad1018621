"""The systems that are compared, folders and endpoints: found, asked, their answers kept as they
come."""

import asyncio
import base64
import gc
import io
import os
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, Self, TypeVar

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from common.endpoint import Endpoint, EndpointFailed, EndpointOptions, ask_many
from common.files import USER_ERRORS, model_folder, one_line
from common.journal import Journal
from common.rows import JSON_SUFFIXES, TABLE_SUFFIXES
from evaluation.entered import EnteredAnswers, read_entered, writable
from evaluation.testsets import Question, by_pictures, turns_of, wording
from model_io.adapters import base_folder, language_folder
from model_io.beginnings import Beginnings
from model_io.load import read_checkpoint
from model_io.options import open_model
from model_io.pixels import open_image, preprocess_image
from model_io.tokens import Tokenizer, encode_prompt
from qilin_min import Qilin, answer_ids

# pixels, the longer side, of a picture as it is sent
SENT = 2048
# of one picture: some endpoints take no more than 5 MB; a larger one goes as JPEG
MAX_SENT_BYTES = 4 * 2**20
# what a JPEG file begins with
JPEG = b"\xff\xd8"

Asked = TypeVar("Asked")
Taken = TypeVar("Taken")

# --- 1. systems -----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class FolderOptions:
    """How the model of a folder is opened, and asked."""

    device: str | None
    dtype: str | None
    quantize: str | None
    batch_size: int
    max_new_tokens: int


@dataclass
class System:
    """One of those that are compared: a folder, an endpoint, or answers given elsewhere."""

    name: str
    folder: Path | None
    endpoint: Endpoint | None
    settings: list[Any]  # with the question, all that an answer depends on
    entered: EnteredAnswers | None = None

    @property
    def where(self) -> str:
        if self.endpoint:
            return f"{self.endpoint.model} @ {self.endpoint.host}"
        if self.entered:
            return str(self.entered.path)
        return str(self.folder)


@dataclass(frozen=True, slots=True)
class Answer:
    """What a system says to a question; or `fault`, why it says nothing."""

    text: str = ""
    is_cut: bool = False
    fault: str = ""

    @classmethod
    def from_line(cls, line: dict[str, Any]) -> Self:
        """Of a line of answers.jsonl."""
        return cls(line["text"], bool(line.get("cut")))


def folder_system(name: str, place: str, options: FolderOptions) -> System:
    """The System of a folder, looked at, nothing loaded."""
    read_checkpoint(place)
    Tokenizer(language_folder(place, llm=None, base=None))
    folder = model_folder(place)
    inside = [folder] if folder.is_file() else [*folder.iterdir()]
    base = base_folder(place, llm=None, base=None)
    if base is not None:
        inside += base.iterdir()
    files = []
    for file in inside:
        if file.is_file():
            status = file.stat()
            files.append((file.name, status.st_size, status.st_mtime_ns))
    settings = [
        name,
        os.path.realpath(folder),
        sorted(files),
        options.dtype,
        options.quantize,
        options.max_new_tokens,
    ]
    return System(name, Path(place), None, settings)


def endpoint_system(
    name: str, url: str, model: str, options: EndpointOptions, max_new_tokens: int
) -> System:
    """The System of an endpoint, nothing sent."""
    # else $OPENAI_API_KEY
    own_key = re.sub("[^A-Z0-9]", "_", name.upper()) + "_API_KEY"
    body = options.extra_body
    # newer models of OpenAI know only max_completion_tokens
    if "max_completion_tokens" not in body:
        body = {"max_tokens": max_new_tokens} | body
    own = replace(
        options,
        base_url=url,
        model=model,
        api_key=os.environ.get(own_key),
        extra_body=body,
    )
    endpoint = Endpoint(own)
    return System(name, None, endpoint, [name, endpoint.url, model, body])


def is_answer_file(place: str) -> bool:
    """Whether a place is FILE or FILE#KEY of a kind that answers may be entered in."""
    suffixes = (*TABLE_SUFFIXES, *JSON_SUFFIXES)
    file = place if Path(place).exists() else place.rpartition("#")[0] or place
    return Path(file).suffix in suffixes and not Path(file).is_dir()


def entered_system(name: str, place: str, encoding: str) -> System:
    """The System of a file of answers, read whole."""
    return System(name, None, None, [name, place], entered=read_entered(place, encoding))


def read_system(
    text: str, of_folder: FolderOptions, of_endpoint: EndpointOptions, encoding: str = "utf-8"
) -> System:
    """The System of one --system, its path or address looked at, nothing loaded or sent. encoding:
    of a table of answers."""
    name, _, place = text.partition("=")
    name = name.strip()
    is_url = place.startswith(("https://", "http://"))
    url, _, model = place.partition("#")
    is_name = bool(name) and name.isprintable() and len(name) <= 60
    is_place = bool(model) if is_url else bool(place)
    if not is_name or not is_place:
        raise ValueError(
            f"--system {name or repr('')}: must be NAME=FOLDER, NAME=https://host/v1#model-name or "
            "NAME=answers.jsonl"
        )
    try:
        if is_url:
            return endpoint_system(name, url, model, of_endpoint, of_folder.max_new_tokens)
        if is_answer_file(place):
            return entered_system(name, place, encoding)
        return folder_system(name, place, of_folder)
    except USER_ERRORS as error:
        raise ValueError(f"--system {name}: {one_line(error)}") from None


# --- 2. endpoints ---------------------------------------------------------------------------------


def picture_bytes(path: Path, longest: int, form: str, **options: Any) -> bytes:
    """A picture file from the pixels of another and nothing else: no EXIF, no DICOM tags, no
    comments, no colour profile."""
    image = open_image(path)
    image.thumbnail((longest, longest))
    buffer = io.BytesIO()
    Image.fromarray(np.asarray(image)).save(buffer, form, **options)
    return buffer.getvalue()


def data_url(raw: bytes) -> str:
    kind = "jpeg" if raw.startswith(JPEG) else "png"
    return f"data:image/{kind};base64,{base64.b64encode(raw).decode()}"


def sent_picture(path: Path) -> dict[str, Any]:
    """A picture as part of a message."""
    raw = picture_bytes(path, SENT, "PNG")
    if len(raw) > MAX_SENT_BYTES:
        raw = picture_bytes(path, SENT, "JPEG", quality=95)
    return {"type": "image_url", "image_url": {"url": data_url(raw)}}


def vision_messages(question: Question) -> list[dict[str, Any]]:
    """The bare question with its pictures, as any OpenAI-compatible endpoint takes it."""
    messages = []
    for turn in turns_of(question):
        role = "user" if turn.speaker == "human" else "assistant"
        content: str | list[dict[str, Any]] = turn.text
        if turn.pictures:
            content = [sent_picture(path) for path in turn.pictures]
            if turn.text:
                content.append({"type": "text", "text": turn.text})
        messages.append({"role": role, "content": content})
    return messages


async def ask_endpoint(
    endpoint: Endpoint,
    todo: dict[str, Asked],
    messages_of: Callable[[Asked], list[dict[str, Any]]],
    keep: Callable[[str, Asked, Taken], None],
    bar: tqdm,
    accept: Callable[..., Taken],
    allow_cut: bool = False,
) -> dict[str, str]:
    """Asks for every item of todo ({key: item}), several at once, keep(key, item, answer) as each
    comes. accept and allow_cut: of Endpoint.ask. -> {key: why there is no answer}."""
    failed = {}

    async def ask_one(entry):
        key, item = entry
        try:
            messages = await asyncio.to_thread(messages_of, item)
            answer = await endpoint.ask(messages, accept, allow_cut)
            keep(key, item, answer)
        except EndpointFailed:
            raise
        except ValueError as error:
            # this one only: it is asked again in the next run
            failed[key] = one_line(error)

    await ask_many(endpoint, todo.items(), ask_one, bar)
    return failed


# --- 3. folders -----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Prepared:
    """A question as a model takes it."""

    key: str
    question: Question
    prompt: list[int]
    pixels: list[torch.Tensor]


def prepared(
    todo: dict[str, Question], model: Qilin, tokenizer: Tokenizer, failed: dict[str, str], bar: tqdm
) -> Iterator[Prepared]:
    """Each question that can be asked; why another cannot goes into `failed`."""
    config = model.config
    limit = config.text.max_position_embeddings
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
        yield Prepared(key, question, prompt, pixels)


# keep(key, question, answer): what is done with each answer as it comes
Keep = Callable[[str, Question, Answer], None]


def ask_folder(
    folder: Path, todo: dict[str, Question], options: FolderOptions, keep: Keep, bar: tqdm
) -> dict[str, str]:
    """ask_endpoint for a folder: loaded, asked in batches, and freed when this returns."""
    model, tokenizer, _ = open_model(
        str(folder),
        llm=None,
        vision=None,
        projector=None,
        device=options.device,
        dtype=options.dtype,
        quantize=options.quantize,
    )
    limit = model.config.text.max_position_embeddings
    failed = {}
    beginnings = Beginnings(model)
    rest = prepared(by_pictures(todo), model, tokenizer, failed, bar)
    while True:
        batch = list(islice(rest, options.batch_size))
        if not batch:
            return failed
        pixels = []
        for one in batch:
            pixels += one.pixels
        prompts = [one.prompt for one in batch]
        cache = beginnings.cache_for(
            prompts, torch.stack(pixels) if pixels else None, options.max_new_tokens
        )
        answers = answer_ids(model, prompts, cache=cache, max_new_tokens=options.max_new_tokens)
        for one, ids in zip(batch, answers, strict=True):
            is_full = len(one.prompt) + len(ids) >= limit
            is_cut = len(ids) == options.max_new_tokens or is_full
            keep(one.key, one.question, Answer(tokenizer.decode(ids), is_cut))
        bar.update(len(batch))


# --- 4. all questions of one system ---------------------------------------------------------------


def open_journal(path: Path) -> Journal:
    """The texts of earlier runs, which need not be asked for again, and those of this one."""
    journal = Journal(path, lambda line: isinstance(line["text"], str))
    journal.load()
    for _ in range(journal.damaged):
        print(f"{path}: a damaged line: its text is asked for again", file=sys.stderr)
    return journal


def kept_text(journal: Journal, key: str) -> str | None:
    """What was said under a key, or None."""
    line = journal.find(key)
    return line["text"] if line else None


def ask_system(
    system: System,
    todo: dict[str, Question],
    n_done: int,
    options: FolderOptions,
    finished: Journal,
) -> dict[str, str]:
    """Every open question of one system. -> {key: why there is no answer}; a fault of the whole
    system is said, and is every question's reason."""

    def keep(key, question, answer):
        line = {
            "key": key,
            "text": writable(answer.text),
            "cut": answer.is_cut,
            "system": system.name,
            "where": system.where,
            "id": question.id,
            "question": wording(question),
        }
        finished.add(line)

    with tqdm(total=len(todo) + n_done, initial=n_done, desc=system.name, disable=None) as bar:
        try:
            if system.endpoint:
                asking = ask_endpoint(
                    system.endpoint,
                    todo,
                    vision_messages,
                    keep,
                    bar,
                    accept=Answer,
                    allow_cut=True,
                )
                return asyncio.run(asking)
            assert system.folder is not None
            return ask_folder(system.folder, todo, options, keep, bar)
        except (ValueError, torch.OutOfMemoryError) as error:
            fault = one_line(error)
        finally:
            if system.folder:
                # the model goes before the next one comes
                gc.collect()
                torch.cuda.empty_cache()
    print(f"{system.name}: {fault}", file=sys.stderr)
    return {key: fault for key in todo if key not in finished}
