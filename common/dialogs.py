"""A row of dialogs in any spelling -> the published one: {"id", "image", "conversations": [{"from",
"value"}, …]}.

The files of ChiMed-VL are read by what their rows hold, since their keys were never seen by us:
turns under any name, said by human and gpt or by user and assistant; a question and its answer; a
caption beside a picture. What is in the published spelling already stays as it is.
"""

import re
from typing import Any

from common.names import PICTURE_SUFFIX, all_names_in, read_list
from common.rows import BadRow, folded
from qilin_min import IMAGE_TOKEN

# who speaks, in the words of the published form
ROLES = {
    "human": "human",
    "user": "human",
    "question": "human",
    "问": "human",
    "用户": "human",
    "gpt": "gpt",
    "assistant": "gpt",
    "bot": "gpt",
    "model": "gpt",
    "answer": "gpt",
    "答": "gpt",
    "助手": "gpt",
}
# where a turn says who speaks, and what
ROLE_KEYS = ("from", "role", "speaker")
TEXT_KEYS = ("value", "content", "text")
QUESTION_KEYS = ("question", "query", "instruction", "prompt", "问题")
ANSWER_KEYS = ("answer", "response", "output", "答案", "回答")
CAPTION_KEYS = ("caption", "text", "description", "report", "图注", "描述")


class UnknownRow(ValueError):
    """A row in which no dialog and no caption is found, or more than one."""


def read_dialog(record: dict[str, Any]) -> dict[str, Any]:
    """A row as a dialog of the published form: itself, where it is one. A caption beside a picture
    becomes a dialog whose question is the picture alone. UnknownRow names the keys."""
    return read_row_of_dialogs(record)[0]


def read_row_of_dialogs(record: dict[str, Any]) -> tuple[dict[str, Any], bool]:
    """(read_dialog of a row, whether it is a caption that nobody asked for yet). UnknownRow."""
    if is_published(record):
        return record, False
    conversation = find_conversation(record) or find_question(record)
    is_caption = conversation is None
    if is_caption:
        conversation = find_caption(record)
    if conversation is None and "conversations" in record:
        # what is wrong with them is said where dialogs are checked
        return record, False
    if conversation is None:
        raise UnknownRow(
            "neither turns of a dialog, nor a question and its answer, nor a caption beside a "
            f"picture: its keys are {keys_of(record)}"
        )
    names = named_pictures(record)
    text = "".join(turn["value"] for turn in conversation if isinstance(turn["value"], str))
    if names and IMAGE_TOKEN not in text:
        first = conversation[0]
        lines = [*(IMAGE_TOKEN for _ in names), str(first["value"])]
        conversation = [{**first, "value": "\n".join(lines)}, *conversation[1:]]
    dialog: dict[str, Any] = {"conversations": conversation}
    if "id" in record:
        dialog["id"] = record["id"]
    if names:
        dialog["image"] = names[0] if len(names) == 1 else names
    return dialog, is_caption


def is_published(record: dict[str, Any]) -> bool:
    """Whether a row has the keys of the published form, whatever they hold."""
    turns = record.get("conversations")
    if turns is None or is_text_of_list(turns):
        return False
    if not has_usual_turns(turns) and read_turns(turns):
        return False
    # a text needs no picture; one that speaks of some may have them under another name
    lacks_picture = "image" not in record and IMAGE_TOKEN in str(turns)
    return not (lacks_picture and named_pictures(record))


def has_usual_turns(turns: object) -> bool:
    """Whether all turns have the names of the published form."""
    if not isinstance(turns, list):
        return False
    return all(isinstance(turn, dict) and "from" in turn and "value" in turn for turn in turns)


def is_text_of_list(value: object) -> bool:
    """Whether a value is a text that holds a list."""
    return isinstance(value, str) and value.strip().startswith("[")


def as_list(value: object) -> object:
    """A list that is written in a text; any other value as it is."""
    if not isinstance(value, str) or not is_text_of_list(value):
        return value
    try:
        return read_list(value.strip())
    except BadRow:
        return value


def keys_of(record: dict[str, Any]) -> str:
    """The keys of a row, to be told."""
    return ", ".join(map(repr, list(record)[:20])) or "none"


def find_conversation(record: dict[str, Any]) -> list[dict[str, Any]] | None:
    """The turns of a row under whatever key, as {"from", "value"}; None without. UnknownRow where
    two keys hold some."""
    found = {}
    for key, value in record.items():
        turns = read_turns(as_list(value))
        if turns:
            found[key] = turns
    if len(found) > 1:
        raise UnknownRow(f"turns of a dialog under {keys_of(found)}: which of them is meant?")
    return next(iter(found.values()), None)


def read_turns(value: object) -> list[dict[str, Any]] | None:
    """{"from", "value"} of each turn; None where a value is no list of turns."""
    if not isinstance(value, list) or not value:
        return None
    turns = []
    for turn in value:
        if not isinstance(turn, dict):
            return None
        role = next((turn[key] for key in ROLE_KEYS if key in turn), None)
        text = next((turn[key] for key in TEXT_KEYS if key in turn), None)
        if not isinstance(role, str) or text is None:
            return None
        # a speaker whom nobody knows stays, and is refused by name where dialogs are checked
        turns.append({"from": ROLES.get(role.strip().lower(), role), "value": text_of(text)})
    return turns


def text_of(content: object) -> object:
    """The text of a turn: of parts, as OpenAI's form has them, joined, <image> for a picture."""
    if not isinstance(content, list):
        return content
    parts = []
    for part in content:
        if not isinstance(part, dict):
            return content
        if isinstance(part.get("text"), str):
            parts.append(part["text"])
        elif "image" in str(part.get("type")):
            parts.append(IMAGE_TOKEN)
    return "\n".join(parts)


def find_question(record: dict[str, Any]) -> list[dict[str, Any]] | None:
    """A question and its answer as two turns, by the usual names; None without."""
    question = first_text(record, QUESTION_KEYS)
    answer = first_text(record, ANSWER_KEYS)
    if not question or not answer:
        return None
    return [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]


def find_caption(record: dict[str, Any]) -> list[dict[str, Any]] | None:
    """A caption as the answer to a picture alone; None without a picture, or without a text: one
    of a usual name, else the only one there is. UnknownRow where there are several."""
    if not named_pictures(record):
        return None
    caption = first_text(record, CAPTION_KEYS)
    if is_unread_list(caption):
        return None
    if not caption:
        texts = {key: value for key, value in record.items() if is_prose(key, value)}
        if len(texts) > 1:
            raise UnknownRow(
                f"texts under {keys_of(texts)} beside a picture: name the caption `caption`"
            )
        caption = next(iter(texts.values()), "")
    if not caption:
        return None
    return [{"from": "human", "value": ""}, {"from": "gpt", "value": caption}]


def is_unread_list(text: str) -> bool:
    """Whether a text is turns of a dialog that could not be read: no caption."""
    return re.match(r"\s*\[\s*\{", text) is not None


def first_text(record: dict[str, Any], names: tuple[str, ...]) -> str:
    """What stands under the first of these names, whatever their case; "" without."""
    fields = folded(record)
    for name in names:
        value = fields.get(name)
        if isinstance(value, str) and value.strip():
            return value
    return ""


def is_prose(key: str, value: object) -> bool:
    """Whether a field may be a caption: a text, and neither a name, a number nor an address."""
    if not isinstance(value, str) or str(key).lower().endswith("id"):
        return False
    text = value.strip()
    if is_unread_list(text):
        return False
    is_name = bool(PICTURE_SUFFIX.search(text)) or text.startswith(("http://", "https://"))
    is_long = " " in text or len(text) > 4 and not text.isascii()
    return is_long and not is_name


def named_pictures(record: dict[str, Any]) -> list[str]:
    """The picture names of a row: under `image` or `images`, else under the only key that holds
    some. UnknownRow where several do."""
    for key in ("image", "images"):
        names = names_under(record.get(key))
        if names:
            return names
    found = {}
    for key, value in record.items():
        names = names_under(value)
        if names and all(PICTURE_SUFFIX.search(name) for name in names):
            found[key] = names
    if len(found) > 1:
        raise UnknownRow(f"picture names under {keys_of(found)}: name those meant `image`")
    return next(iter(found.values()), [])


def names_under(value: object) -> list[str]:
    """A name, or a list of names; [] where a value is neither."""
    try:
        return all_names_in(value)
    except BadRow:
        return []
