"""A conversation -> input_ids and labels, and ids -> text in whole characters.

in: [{"from": "human", "value": "<image>\\n…"}, {"from": "gpt", "value": "…"}]
out: input_ids and labels, lists of int of one length
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

import sentencepiece
import torch

from common.files import model_folder
from model_io.beginnings import Beginnings
from qilin_min import (
    IGNORE_INDEX,
    IMAGE_TOKEN,
    IMAGE_TOKEN_INDEX,
    Qilin,
    check_no_pointer,
    generate,
)

# --- 1. text <-> ids ---


class Tokenizer:
    """The sentencepiece model of a LLaMA folder. Never adds or recognises control ids in text:
    `</s>` typed by a person is four plain characters."""

    def __init__(self, path: str | Path):
        """path: a model's folder, or a file: tokenizer.model, or weights that it lies beside.
        FileNotFoundError or ValueError names it."""
        path = model_folder(path)
        # of an index of shards as well
        if path.suffix in (".safetensors", ".bin", ".json"):
            path = path.parent
        self.path = path if path.is_file() else path / "tokenizer.model"
        if not self.path.is_file():
            raise FileNotFoundError(
                f"no tokenizer: {self.path} does not exist (it comes with the LLaMA weights)"
            )
        check_no_pointer(self.path)
        try:
            self.sp = sentencepiece.SentencePieceProcessor(model_file=str(self.path))
        except (RuntimeError, OSError):
            raise ValueError(f"{self.path}: not a sentencepiece model") from None
        self.vocab_size = self.sp.vocab_size()
        self.bos_id = self.sp.bos_id()
        self.eos_id = self.sp.eos_id()
        if min(self.bos_id, self.eos_id) < 0:
            raise ValueError(f"{self.path}: a tokenizer without ids for begin and end of text")

    def encode(self, text: str, bos: bool = False) -> list[int]:
        """The ids of a text, behind the begin id where `bos` is true. ValueError for half a
        surrogate pair."""
        try:
            ids = self.sp.encode(text)
        except RuntimeError:
            raise ValueError(f"not valid Unicode: {text[:40]!r}") from None
        return [self.bos_id, *ids] if bos else ids

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids; those that are none of the vocabulary are left out."""
        return self.sp.decode([i for i in ids if 0 <= i < self.vocab_size])

    def decode_stream(self, ids: Iterable[int]) -> Iterator[str]:
        """Text as it becomes certain, for an iterable of ids: a Chinese character may span several
        byte tokens and is held back until whole."""
        seen = []
        text = ""
        n_shown = 0
        for i in ids:
            seen.append(i)
            text = self.decode(seen)
            stable = text.rstrip("\ufffd")
            # a cut character shows as up to 3 replacement marks; more than that is no character,
            # and waiting would never end
            if len(text) - len(stable) > 3:
                stable = text
            if len(stable) > n_shown:
                yield stable[n_shown:]
                n_shown = len(stable)
        if len(text) > n_shown:
            yield text[n_shown:]


# --- 2. what a conversation may be ---


class BadDialog(ValueError):
    """What is wrong with a conversation; `kind` says it in a few words that can be counted."""

    def __init__(self, message: str, kind: str = ""):
        super().__init__(message)
        self.kind = kind


def pictures_before(i: int, n_images: int | list[int] | None) -> int:
    """How many pictures stand in front of turn i: n_images is an int (all in front of the first
    turn) or a list with a number a human turn."""
    if isinstance(n_images, list):
        k = i // 2
        is_human = i % 2 == 0
        return n_images[k] if is_human and k < len(n_images) else 0
    if i > 0 or n_images is None:
        return 0
    return n_images


def check_conversation(conversation: object, n_images: int | list[int] | None = None) -> None:
    """BadDialog unless it is a list of {"from", "value"} turns: human and gpt by turns, human
    first.

    n_images as in encode_conversation. Kinds: "no dialog", "question is empty", "answer is empty",
    "<image> in an answer".
    """
    if not isinstance(conversation, list) or not conversation:
        raise BadDialog("conversations is not a list of turns", "no dialog")
    for i, turn in enumerate(conversation):
        role = ("human", "gpt")[i % 2]
        if not isinstance(turn, dict) or not isinstance(turn.get("value"), str):
            raise BadDialog(f"turn {i} is not an object with text under 'value'", "no dialog")
        if turn.get("from") != role:
            message = f"turn {i} is from {turn.get('from')!r}, expected {role!r}"
            raise BadDialog(message, "no dialog")
        # a picture alone may be a question
        if not turn["value"].strip() and not pictures_before(i, n_images):
            side = "question" if role == "human" else "answer"
            raise BadDialog(f"turn {i} is an empty {side}", f"{side} is empty")
        if role == "gpt" and n_images is None and IMAGE_TOKEN in turn["value"]:
            message = f"turn {i} is an answer that holds {IMAGE_TOKEN}"
            raise BadDialog(message, f"{IMAGE_TOKEN} in an answer")


def count_images(conversation: list[dict]) -> int:
    """Placeholders in a conversation of a data file: as many pictures belong to it."""
    return sum(turn["value"].count(IMAGE_TOKEN) for turn in conversation)


# --- 3. a conversation -> the parts of its prompt ---

SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
# v1: dialogs (paper, both stages; released stage 2). plain: picture, caption (released stage 1)
TEMPLATES = ("v1", "plain")


class Mark(Enum):
    """What stands between two texts of a prompt."""

    PICTURE = "a picture"
    END = "</s>"


@dataclass
class Part:
    """A piece of a prompt, and whether the loss counts it."""

    content: str | Mark
    is_learnt: bool = False


def _question_of(turn: dict, i: int, n_images: int | list[int] | None) -> tuple[int, str]:
    """(number of pictures, the text that follows them) of human turn i."""
    text = turn["value"]
    if n_images is None:
        n = text.count(IMAGE_TOKEN)
    else:
        n = pictures_before(i, n_images)
    if n == 0:
        return 0, text
    if n_images is None:
        text = text.replace(IMAGE_TOKEN, "")
    text = text.strip()
    return n, "\n" + text if text else ""


def _v1_parts(conversation: list[dict], n_images: int | list[int] | None) -> list[Part]:
    parts = []
    text = SYSTEM + " "  # what stands in front of the next picture, or of the question
    for i, turn in enumerate(conversation):
        if turn["from"] == "gpt":
            # the blank after "ASSISTANT:" is the one that sentencepiece puts in front of every text
            parts.append(Part(turn["value"], is_learnt=True))
            parts.append(Part(Mark.END, is_learnt=True))
            continue
        n, question = _question_of(turn, i, n_images)
        text += "USER: "
        for k in range(n):
            parts.append(Part(text))
            parts.append(Part(Mark.PICTURE))
            text = "\n" if k < n - 1 else ""
        parts.append(Part(text + question + " ASSISTANT:"))
        text = ""
    return parts


def _plain_parts(conversation: list[dict], n_images: int | list[int] | None) -> list[Part]:
    if n_images is None:
        n = count_images(conversation[:1])
    else:
        n = pictures_before(0, n_images)
    if n == 0 or len(conversation) > 2:
        raise ValueError("template plain wants one turn with a picture and at most one answer")
    pictures = [Part(Mark.PICTURE) for _ in range(n)]
    captions = [Part(turn["value"] + "\n", is_learnt=True) for turn in conversation[1:]]
    return pictures + captions


def build_prompt(
    conversation: list[dict], template: str = "v1", n_images: int | list[int] | None = None
) -> list[Part]:
    """The parts of a prompt: texts, pictures and </s>, each with whether the loss counts it.

    Texts are cut only where tokenising the whole released string would cut as well: at pictures, at
    </s>, and right after "ASSISTANT:". A turn's pictures move to its front, each followed by a
    newline. Source: released code, llava/conversation.py (v1, plain) and llava/train/train.py
    preprocess_multimodal; for n pictures n times what it does for one.
    """
    check_conversation(conversation, n_images)
    if template == "v1":
        return _v1_parts(conversation, n_images)
    if template == "plain":
        return _plain_parts(conversation, n_images)
    raise ValueError(f"template {template!r} is unknown: {' or '.join(TEMPLATES)}")


# --- 4. parts -> input_ids and labels ---


def _encode_parts(
    parts: list[Part], tokenizer: Tokenizer, n_image_tokens: int
) -> tuple[list[int], list[int]]:
    ids = [tokenizer.bos_id]
    labels = [IGNORE_INDEX]
    for part in parts:
        if part.content is Mark.PICTURE:
            piece = [IMAGE_TOKEN_INDEX] * n_image_tokens
        elif part.content is Mark.END:
            piece = [tokenizer.eos_id]
        else:
            piece = tokenizer.encode(part.content)
        ids += piece
        labels += piece if part.is_learnt else [IGNORE_INDEX] * len(piece)
    return ids, labels


def encode_conversation(
    conversation: list[dict],
    tokenizer: Tokenizer,
    n_image_tokens: int,
    template: str = "v1",
    max_length: int = 2048,
    n_images: int | list[int] | None = None,
) -> tuple[list[int], list[int]]:
    """(input_ids, labels) of a dialog for training: lists of int of the same length, at most
    max_length tokens.

    n_images: None counts the <image> in the text (data files); an int puts that many pictures in
    front of the first turn, a list as many as it says in front of each human turn, and all text is
    taken literally. Too long: the end is cut, never a picture: where a picture would be cut both
    lists come back empty. ValueError when it is no conversation or ends with a question.
    """
    check_conversation(conversation, n_images)
    if conversation[-1]["from"] != "gpt":
        raise ValueError("the conversation ends with a question: nothing to learn from")
    parts = build_prompt(conversation, template, n_images)
    ids, labels = _encode_parts(parts, tokenizer, n_image_tokens)
    if IMAGE_TOKEN_INDEX in ids[max_length:]:
        return [], []
    return ids[:max_length], labels[:max_length]


def encode_prompt(
    conversation: list[dict],
    tokenizer: Tokenizer,
    n_image_tokens: int,
    template: str = "v1",
    n_images: int | list[int] | None = None,
) -> list[int]:
    """input_ids of a dialog that ends with a question: they end where the assistant starts to
    speak, exactly as in training."""
    check_conversation(conversation, n_images)
    if conversation[-1]["from"] != "human":
        raise ValueError("the conversation ends with an answer: nothing to ask")
    parts = build_prompt(conversation, template, n_images)
    ids, _ = _encode_parts(parts, tokenizer, n_image_tokens)
    return ids


# --- 5. an answer, as it is written ---


def _n_held(text: str, stop: Sequence[str]) -> int:
    """How many characters at the end of `text` may become one of the texts `stop`."""
    n_held = 0
    for stop_text in stop:
        for n in range(1, len(stop_text)):
            if text.endswith(stop_text[:n]):
                n_held = max(n_held, n)
    return n_held


class StreamedAnswer:
    """Iterate for the text of one prompt's answer, piece by piece and in whole characters.
    Afterwards, also after an interruption: ids (list of int without the end id), n_new (with it),
    finish_reason: "stop" (an end id or a stop text, which is not shown) or "length".

    stop: texts at which the answer ends. beginnings: of this model, for a picture that was asked
    about before. Other options as for generate(), one prompt.
    """

    def __init__(
        self,
        model: Qilin,
        tokenizer: Tokenizer,
        prompt: list[int],
        pixel_values: torch.Tensor | None = None,
        stop: Sequence[str] = (),
        beginnings: Beginnings | None = None,
        **options: Any,
    ):
        self.ids = []
        self.n_new = 0
        self.finish_reason = "length"
        self.interrupted = False  # set it, from any thread, to end the answer at the next token
        self._decode = tokenizer.decode
        new_ids = self._new_ids(model, prompt, pixel_values, beginnings, options)
        self._text = self._until_stop(tokenizer.decode_stream(new_ids), stop)

    def __iter__(self) -> Iterator[str]:
        return self._text

    def _new_ids(self, model, prompt, pixel_values, beginnings, options):
        if beginnings is not None:
            room = options["max_new_tokens"]
            options["cache"] = beginnings.cache_for([prompt], pixel_values, room)
            pixel_values = None
        for (i,) in generate(model, [prompt], pixel_values, **options):
            assert i is not None, "only what follows an end id is None"
            self.n_new += 1
            if i in model.config.end_ids:
                self.finish_reason = "stop"
                return
            if self.interrupted:
                return
            self.ids.append(i)
            yield i

    def _until_stop(self, texts, stop):
        text = ""  # not shown yet
        n_shown = 0
        for piece in texts:
            text += piece
            places = [text.find(stop_text) for stop_text in stop]
            found = [place for place in places if place >= 0]
            if found:
                first = min(found)
                self.finish_reason = "stop"
                self._forget_after(n_shown + first)
                yield text[:first]
                return
            n_certain = len(text) - _n_held(text, stop)
            yield text[:n_certain]
            n_shown += n_certain
            text = text[n_certain:]
        yield text

    def _forget_after(self, n_characters):
        """Drop the ids of what was not shown: a dialog must not go on from what nobody saw."""
        while self.ids and len(self._decode(self.ids)) > n_characters:
            self.ids.pop()
