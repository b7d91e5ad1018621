"""What a model was made from, as far as it is known -> the README.md of its folder. Names, no paths
and no times: equal weights are equal bytes.
"""

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch

from common.files import model_folder, read_json


@dataclass(frozen=True)
class Base:
    """A model that went into another."""

    name: str  # the hub's, where its folder tells it, else the folder's
    licence: str | None  # as its own README.md names it


@dataclass(frozen=True)
class Origin:
    """What is known of how a model came to be; what is not known is left out of its card."""

    how: str = "from weights in memory"
    bases: tuple[Base, ...] = ()  # the language model's first
    projector: str | None = None
    data: tuple[str, ...] = ()
    template: str | None = None


def _folder(path: str | Path) -> Path:
    """The folder that a name should tell: not final/, and not a file in it."""
    path = Path(path).absolute()
    if path.is_file():
        path = path.parent
    return path.parent if path.name == "final" else path


def _hub_name(folder: Path) -> str | None:
    """owner/name, where config.json remembers it and the folder is still called so."""
    try:
        raw = read_json(folder / "config.json")
    except (OSError, ValueError):
        return None
    name = raw.get("_name_or_path") if isinstance(raw, dict) else None
    if not isinstance(name, str) or not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        return None
    return name if name.endswith("/" + folder.name) else None


def _licence(folder: Path) -> str | None:
    """`license:` in the head of a folder's README.md."""
    try:
        text = (folder / "README.md").read_text(encoding="utf-8")
    except (OSError, ValueError):
        return None
    head = re.match(r"---\n(.*?)\n---", text, re.DOTALL)
    found = re.search(r"^license: *[\"']?([\w.-]+)", head[1], re.MULTILINE) if head else None
    return found[1] if found else None


def base_of(path: str | Path) -> Base:
    """What a model's folder, or a file in it, tells of itself."""
    folder = _folder(path)
    inside = model_folder(folder)
    return Base(_hub_name(inside) or folder.name, _licence(inside))


def bases_of(*paths: str | Path | None) -> tuple[Base, ...]:
    """Of those that are given, each once."""
    found = [base_of(path) for path in paths if path is not None]
    return tuple(dict.fromkeys(found))


def names_of_files(paths: Iterable[str | Path]) -> tuple[str, ...]:
    """Files without their folders."""
    return tuple(Path(path).name for path in paths)


def projector_name(path: str | Path | None) -> str | None:
    """Of a projector's file, None where it starts fresh or lies in a model."""
    if path is None or str(path) == "fresh":
        return None
    return f"{Path(path).name} of {_folder(path).name}"


def card_head(origin: Origin) -> str:
    """Lines for the head of a README.md, in the fields that the Hugging Face hub has."""
    lines = []
    if origin.bases:
        # JSON's texts are YAML's too
        names = [json.dumps(base.name, ensure_ascii=False) for base in origin.bases]
        lines.append("base_model: [" + ", ".join(names) + "]\n")
        if origin.bases[0].licence:
            lines.append(f"license: {origin.bases[0].licence}\n")
    return "".join(lines)


def card_rows(origin: Origin) -> str:
    """What is known, a line each."""
    licences = [f"{base.name}: {base.licence}" for base in origin.bases if base.licence]
    rows = {
        "Base models": ", ".join(base.name for base in origin.bases),
        "Projector": origin.projector,
        "Data": ", ".join(origin.data),
        "Prompt template": origin.template,
        "Licences named there": ", ".join(licences),
        # what follows the plus names a machine's build
        "Written with": f"torch {torch.__version__.partition('+')[0]}",
    }
    return "\n".join(f"- {name}: {what}" for name, what in rows.items() if what)
