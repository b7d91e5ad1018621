"""Picture names in a field, as tables and other people's JSON have them."""

import ast
import json
import re
from typing import Any

from common.rows import BadRow
from common.text import has_half_pair

PICTURES_UNREADABLE = "list of pictures cannot be read"
PICTURE_SUFFIX = re.compile(r"\.(?:jpe?g|png|gif|tiff?|webp|bmp|dcm)$", re.IGNORECASE)


def names_in(value: Any, separators: str | None = None) -> list[str]:
    """Picture names in a value, each once: a list, a string that holds a Python or JSON list, names
    between `separators`, or one name. BadRow."""
    return list(dict.fromkeys(all_names_in(value, separators)))


def all_names_in(value: Any, separators: str | None = None) -> list[str]:
    """names_in, a name as often as it stands there. BadRow."""
    listed = _as_list(value, separators)
    if not isinstance(listed, (list, tuple)):
        raise BadRow(PICTURES_UNREADABLE)
    names = []
    for entry in listed:
        if not isinstance(entry, (str, int)):
            raise BadRow(PICTURES_UNREADABLE)
        if isinstance(entry, int) and abs(entry) > 10**18:
            raise BadRow(PICTURES_UNREADABLE)
        name = str(entry).strip()
        # half a surrogate pair: no file name
        if has_half_pair(name):
            raise BadRow(PICTURES_UNREADABLE)
        if name:
            names.append(name)
    return names


def _as_list(value: Any, separators: str | None) -> Any:
    """A list, where `value` stands for one; else what it is."""
    if isinstance(value, str):
        text = value.strip()
        if text.startswith("[") and (text.endswith("]") or not separators):
            return read_list(text)
        if separators:
            return re.split(separators, value)
        return [value]
    if isinstance(value, int) and not isinstance(value, bool):
        return [value]
    # nan, as pandas writes a gap
    if value is None or value != value:
        return []
    return value


def read_list(text: str) -> Any:
    """What a text holds that begins like a list, as JSON or Python writes it. BadRow."""
    try:
        # first: of an escaped emoji Python reads two halves
        return json.loads(text)
    except (ValueError, RecursionError):
        pass
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, RecursionError, MemoryError, TypeError):
        raise BadRow(PICTURES_UNREADABLE) from None
