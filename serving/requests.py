"""A request: what a client sent -> a conversation, its pictures, options; or a refusal.

in: the JSON that a client sent, of which nothing is believed
out: a ChatQuestion and the keywords of a StreamedAnswer; or a Refusal, which becomes OpenAI's error
"""

import base64
import io
import re
import warnings
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image

from common.files import one_line
from model_io.pixels import is_dicom, open_image, preprocess_image
from model_io.tokens import Tokenizer, encode_prompt
from qilin_min import Qilin

# and DICOM. Not all that Pillow knows: for EPS it would start Ghostscript
PICTURE_FORMATS = ("PNG", "JPEG", "TIFF", "WEBP", "BMP", "GIF", "PPM", "JPEG2000")
# no token is longer: so much text need not be tokenised to know that it is too long
CHARS_PER_TOKEN = 64

# values that change nothing; any other is refused, because to ignore it would answer something else
# than was asked
NEUTRAL = {
    "n": [1],
    "best_of": [1],
    "tools": [[]],
    "tool_choice": ["none", "auto"],
    "functions": [[]],
    "response_format": [{"type": "text"}],
    "modalities": [["text"]],
    "logprobs": [False],
    "top_logprobs": [0],
    "logit_bias": [{}],
    "frequency_penalty": [0],
    "presence_penalty": [0],
    "min_p": [0],
    "stream": [False, True],
}
ERROR_TYPES = {401: "authentication_error", 403: "permission_error"}
ERROR_HEADERS = {
    503: {"Retry-After": "5"},
    # close: the rest of a body is not waited for
    413: {"Connection": "close"},
    408: {"Connection": "close"},
}


class Refusal(Exception):
    """What becomes OpenAI's error object. No line breaks, nothing that UTF-8 cannot carry."""

    def __init__(
        self, status: int, message: str, code: str | None = None, param: str | None = None
    ):
        super().__init__(message)
        kind = "server_error" if status >= 500 else "invalid_request_error"
        self.status = status
        self.headers: dict[str, str] | None = ERROR_HEADERS.get(status)
        self.body = {
            "error": {
                "message": " ".join(message.encode("utf-8", "replace").decode().split()),
                "type": ERROR_TYPES.get(status, kind),
                "param": param,
                "code": code,
            }
        }


@dataclass
class ChatQuestion:
    """What a request asks."""

    # turns as in a data file, the last one a person's
    conversation: list[dict[str, str]]
    # in front of each human turn
    n_images: list[int]
    # of all pictures, in reading order
    urls: list[str]


# --- 1. messages ----------------------------------------------------------------------------------


def read_part(part: Any, where: str) -> tuple[str, str]:
    """("text" or "image_url", its text or URL) of one part of a message."""
    kind = part.get("type") if isinstance(part, dict) else None
    value = part.get(kind) if kind in ("text", "image_url") else None
    if kind == "image_url" and isinstance(value, dict):
        value = value.get("url")
    if kind is None or not isinstance(value, str):
        raise Refusal(
            400,
            f"{where}.content must be a text, or a list of parts {{type: text, text}} and "
            "{type: image_url, image_url: {url}}",
            param="messages",
        )
    return kind, value


def read_content(message: dict[str, Any], where: str) -> tuple[str, list[str]]:
    """(text, URLs of pictures) of one message, whose content is a text or a list of parts."""
    content = message.get("content")
    if isinstance(content, str):
        return content, []
    # what is no list is refused as a part that is none
    parts = content if isinstance(content, list) else [None]
    texts = []
    urls = []
    for part in parts:
        kind, value = read_part(part, where)
        if kind == "text":
            texts.append(value)
        else:
            urls.append(value)
    return "\n".join(texts), urls


def check_role(role: Any, n_turns: int, where: str) -> None:
    """Refusal unless the message may stand here: n_turns of questions and answers went before."""
    expected = ("user", "assistant")[n_turns % 2]
    is_system = role in ("system", "developer") and n_turns == 0
    if role != expected and not is_system:
        raise Refusal(
            400,
            f"{where}.role must be {expected}: system first, then user and assistant by turns",
            param="messages",
        )


def read_messages(messages: Any) -> ChatQuestion:
    """The ChatQuestion of OpenAI's messages."""
    system = []
    question = ChatQuestion([], [], [])
    for i, message in enumerate(messages if isinstance(messages, list) else []):
        where = f"messages[{i}]"
        role = message.get("role") if isinstance(message, dict) else None
        check_role(role, len(question.conversation), where)
        text, urls = read_content(message, where)
        if urls and role != "user":
            raise Refusal(
                400, f"{where}: only the user's messages may hold pictures", param="messages"
            )
        if role in ("system", "developer"):
            system.append(text)
            continue
        if not text.strip() and not urls:
            raise Refusal(400, f"{where} is empty", param="messages")
        who = "human" if role == "user" else "gpt"
        question.conversation.append({"from": who, "value": text})
        if role == "user":
            question.n_images.append(len(urls))
            question.urls += urls
    if len(question.conversation) % 2 == 0:
        raise Refusal(
            400, "messages must be a list that ends with a user's message", param="messages"
        )
    first = question.conversation[0]
    first["value"] = "\n".join([*filter(str.strip, system), first["value"]])
    return question


# --- 2. options -----------------------------------------------------------------------------------


def read_number(
    body: dict[str, Any], name: str, default: Any, low: float, high: float, kind: type = float
) -> Any:
    """A number of the request as `kind`, the default where it is missing."""
    value = body.get(name)
    if value is None:
        return default
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not low <= value <= high or kind(value) != value:
        whole = "whole " if kind is int else ""
        raise Refusal(400, f"{name} must be a {whole}number from {low} to {high}", param=name)
    return kind(value)


def read_stop(body: dict[str, Any]) -> list[str]:
    """The texts at which the answer ends."""
    stop = body.get("stop") or []
    if isinstance(stop, str):
        stop = [stop]
    is_list = isinstance(stop, list) and len(stop) <= 16
    if not is_list or not all(isinstance(s, str) and 0 < len(s) <= 200 for s in stop):
        raise Refusal(
            400,
            "stop must be a text or a list of at most 16, each of 1 to 200 characters",
            param="stop",
        )
    return stop


def read_options(body: dict[str, Any], max_new_tokens: int) -> dict[str, Any]:
    """Keywords for StreamedAnswer. max_new_tokens: where the request names none."""
    for name, values in NEUTRAL.items():
        if body.get(name) is not None and body[name] not in values:
            raise Refusal(
                400, f"{name}: this value is not supported here", "unsupported_parameter", name
            )
    stop = read_stop(body)
    temperature = read_number(body, "temperature", 0.0, 0, 2)
    # the older name of the same
    max_new_tokens = read_number(body, "max_tokens", max_new_tokens, 1, 10**9, int)
    max_new_tokens = read_number(body, "max_completion_tokens", max_new_tokens, 1, 10**9, int)
    top_p = read_number(body, "top_p", 1.0, 1e-6, 1)
    top_k = read_number(body, "top_k", 0, -1, 10**9, int)
    return {
        "max_new_tokens": max_new_tokens,
        # logits divided by less leave the range of float32
        "temperature": temperature if temperature >= 0.01 else 0.0,
        "top_p": top_p,
        # -1: vLLM's word for all
        "top_k": max(top_k, 0),
        "repetition_penalty": read_number(body, "repetition_penalty", 1.0, 0.01, 100),
        "seed": read_number(body, "seed", None, -(2**63), 2**63 - 1, int),
        "stop": stop,
    }


# --- 3. pictures ----------------------------------------------------------------------------------


def read_data_url(url: str, name: str) -> io.BytesIO:
    """The bytes of a data URL. ValueError says what is wrong with the picture called `name`."""
    head, _, data = url.partition(",")
    if head[:5].lower() != "data:":
        raise ValueError(
            f"{name}: its URL must be a data URL (data:image/png;base64,...); "
            "nothing is fetched from elsewhere"
        )
    if not head.lower().endswith(";base64"):
        raise ValueError(f"{name}: its data URL must be in base64")
    try:
        file = io.BytesIO(base64.b64decode("".join(data.split()), validate=True))
    except ValueError:
        raise ValueError(f"{name}: its base64 is damaged") from None
    if not file.getbuffer().nbytes:
        raise ValueError(f"{name} is empty (0 bytes)")
    return file


def check_format(file: io.BytesIO) -> None:
    """Let Pillow read the header as one of PICTURE_FORMATS, which raises for any other."""
    with warnings.catch_warnings(action="ignore"):
        # the warning is Pillow's own about size: open_image refuses
        Image.open(file, formats=PICTURE_FORMATS)
    file.seek(0)


def read_picture(url: str, name: str) -> Image.Image:
    """A PIL image of a data URL. ValueError says what is wrong with the picture called `name`."""
    file = read_data_url(url, name)
    try:
        if not is_dicom(file):
            check_format(file)
        image = open_image(file)
    except Exception as error:  # the decoders raise many kinds for a damaged file
        ours = r" ?<_io\.BytesIO[^>]*>|^the picture: the picture does not decode "
        said = re.sub(ours, "", one_line(error)).strip("()")
        raise ValueError(f"{name} does not decode ({said})") from None
    # for the errors of preprocess_image
    image.filename = name  # pyright: ignore[reportAttributeAccessIssue]
    return image


def read_pixels(urls: list[str], image_size: int, image_mode: str) -> torch.Tensor | None:
    """float32 (M, 3, size, size) of the pictures, None without any. ValueError names one."""
    pixels = []
    for k, url in enumerate(urls):
        name = f"picture {k + 1}" if len(urls) > 1 else "the picture"
        pixels.append(preprocess_image(read_picture(url, name), image_size, image_mode))
    return torch.stack(pixels) if pixels else None


# --- 4. together ----------------------------------------------------------------------------------


def too_long(limit: int, length: str) -> Refusal:
    return Refusal(
        400,
        f"the model's positions end at {limit}, the messages take {length}: "
        "fewer pictures, or shorter texts",
        "context_length_exceeded",
        "messages",
    )


def prepare_question(
    model: Qilin, tokenizer: Tokenizer, template: str, question: ChatQuestion
) -> tuple[list[int], torch.Tensor | None]:
    """(prompt, pixels (M, 3, size, size) or None). Pictures come last: only when they fit."""
    config = model.config
    limit = config.text.max_position_embeddings
    n_pictures = len(question.urls)
    n_chars = sum(len(turn["value"]) for turn in question.conversation)
    if n_pictures * config.n_image_tokens >= limit or n_chars > CHARS_PER_TOKEN * limit:
        pictures = f"{n_pictures} pictures of {config.n_image_tokens} tokens each"
        raise too_long(limit, f"{pictures} and {n_chars} characters")
    try:
        prompt = encode_prompt(
            question.conversation, tokenizer, config.n_image_tokens, template, question.n_images
        )
        if len(prompt) >= limit:
            raise too_long(limit, f"{len(prompt)} tokens")
        pixels = read_pixels(question.urls, config.vision.image_size, config.image_mode)
        return prompt, pixels
    except ValueError as error:
        raise Refusal(400, str(error), param="messages") from None
