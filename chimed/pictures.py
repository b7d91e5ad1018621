"""Pictures of rows: several joined into one, placed in the data folder."""

import functools
import hashlib
import os
import re
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from common.files import DISK_ERRORS
from common.rows import BadRow
from common.text import text_key
from model_io.pixels import find_picture, is_dicom, open_image

# of one text; more would be too small in one composite (paper, section 3.3)
MAX_PICTURES = 4
# pixels, the longer one: four times what the model sees of a side
COMPOSITE_SIDE = 1344
# pictures a process remembers
CACHE = 50_000

# --- 1. several pictures -> one -------------------------------------------------------------------

Size = tuple[int, int]


def _length(sizes: list[Size]) -> float:
    """How long pictures are together, side by side at height 1. sizes: (along, across) of each, so
    that pictures stacked at one width are given, and come back, as (height, width)."""
    return sum(along / across for along, across in sizes)


def _extremeness(sizes: list[Size]) -> float:
    """The longer side of pictures side by side by the shorter one."""
    length = _length(sizes)
    return max(length, 1 / length)


def _scaled(sizes: list[Size]) -> list[Size]:
    """Sizes of pictures side by side, all of one height."""
    longest = COMPOSITE_SIDE / max(_length(sizes), 1)
    height = min(max(across for _, across in sizes), longest)
    scaled = []
    for along, across in sizes:
        scaled.append((max(1, round(along / across * height)), max(1, round(height))))
    return scaled


def join_pictures(images: list[Image.Image]) -> Image.Image:
    """One PIL image of several: side by side at one height, or stacked at one width, whichever is
    the less extreme; each only scaled.

    The common height (width) is that of the largest, less where the composite's longer side would
    pass COMPOSITE_SIDE. BadRow where a picture would be bent.
    """
    sizes = [image.size for image in images]
    turned = [(height, width) for width, height in sizes]
    is_horizontal = _extremeness(sizes) <= _extremeness(turned)
    if is_horizontal:
        scaled = _scaled(sizes)
        width = sum(w for w, _ in scaled)
        height = scaled[0][1]
    else:
        scaled = [(w, h) for h, w in _scaled(turned)]
        width = scaled[0][0]
        height = sum(h for _, h in scaled)
    # a line a few pixels wide: rounding would bend it
    for (w, h), image in zip(scaled, images, strict=True):
        if abs(w / h / (image.width / image.height) - 1) > 0.1:
            raise BadRow("pictures too unlike to be joined")
    composite = Image.new("RGB", (width, height))
    offset = 0
    for image, size in zip(images, scaled, strict=True):
        part = image.resize(size, Image.Resampling.LANCZOS)
        if is_horizontal:
            composite.paste(part, (offset, 0))
            offset += part.width
        else:
            composite.paste(part, (0, offset))
            offset += part.height
    return composite


# --- 2. files: written beside and renamed, made again only when their sources changed -------------


def mark_of(paths: list[Path]) -> int:
    """A time in nanoseconds that stands for sizes and times of some files: what is made of them
    gets it as its own, and is current while they agree."""
    status = [os.stat(path) for path in paths]
    return text_key(*(f"{one.st_size} {one.st_mtime_ns}" for one in status)) % 10**18


@contextmanager
def made_of(paths: list[Path], target: Path) -> Iterator[Path]:
    """A path beside `target` to write to, then marked as made of `paths` and renamed: several
    workers may make the same picture."""
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{os.getpid()}-{text_key(target.name):x}.partial")
    # of a killed run with this number: never to be written through
    partial.unlink(missing_ok=True)
    try:
        yield partial
        # a link has the time of what it links to
        if not partial.samefile(paths[0]):
            mark = mark_of(paths)
            os.utime(partial, ns=(mark, mark))
        partial.replace(target)
    finally:
        partial.unlink(missing_ok=True)


def is_current(target: Path, paths: list[Path]) -> bool:
    """True when `target` was made from files that have not changed since: nothing needs to be
    decoded again."""
    try:
        return target.samefile(paths[0]) or target.stat().st_mtime_ns == mark_of(paths)
    except OSError:
        return False


def link_or_copy(path: Path, target: Path, copy: bool) -> None:
    """A hard link where the disk allows and no copy is asked for."""
    if not copy:
        try:
            os.link(os.path.realpath(path), target)
            return
        except OSError:
            # another disk, or a file system without links
            pass
    shutil.copyfile(path, target)


# --- 3. the picture of a row ----------------------------------------------------------------------


@dataclass(frozen=True)
class PictureFolder:
    """Where the pictures of a build come from, and where they go."""

    roots: tuple[str, ...]  # folders they are looked for in, real paths, in this order
    path: Path  # where they go
    is_copied: bool  # never linked
    is_skipped: bool  # named as they would be, and neither sought nor made


class Placed(NamedTuple):
    """What became of a row's pictures."""

    name: str = ""  # of the one picture, in the folder
    problem: str = ""  # why there is none


def picture_of(names: Iterable[tuple[str, ...]], folder: PictureFolder) -> str:
    """The name of a row's picture in `folder`, where it is placed. names: the candidates of each of
    its pictures. BadRow."""
    placed = place_pictures(tuple(dict.fromkeys(names)), folder)
    if placed.problem:
        raise BadRow(placed.problem)
    return placed.name


@functools.lru_cache(CACHE)
def place_pictures(names: tuple[tuple[str, ...], ...], folder: PictureFolder) -> Placed:
    """picture_of, remembered: also what is wrong, for which an exception could not be.

    One picture keeps its name and is linked (or copied); DICOM becomes PNG; two to four become one
    composite under composites/.
    """
    try:
        if not names:
            raise BadRow("no picture named")
        if len(names) > MAX_PICTURES:
            raise BadRow(f"more than {MAX_PICTURES} pictures")
        if folder.is_skipped:
            return Placed(_name_unseen(names))
        if len(names) == 1:
            return Placed(_place_one(names[0], folder))
        return Placed(_place_composite(names, folder))
    except BadRow as error:
        return Placed(problem=str(error))
    except PermissionError:
        return Placed(problem="picture may not be read")
    except OSError as error:
        if error.errno in DISK_ERRORS:
            raise
        # a name too long, or a file where a folder should be
        return Placed(problem="picture cannot be stored")


def _name_unseen(names: tuple[tuple[str, ...], ...]) -> str:
    first_choices = [choices[0] for choices in names]
    if len(first_choices) == 1:
        return first_choices[0]
    return composite_name(first_choices)


def _place_composite(names: tuple[tuple[str, ...], ...], folder: PictureFolder) -> str:
    found = [find_picture(list(choices), folder.roots) for choices in names]
    paths = [path for path, _ in found]
    name = composite_name([name for _, name in found])
    target = folder.path / name
    if not is_current(target, paths):
        composite = join_pictures([decode(path) for path in paths])
        with made_of(paths, target) as partial:
            composite.save(partial, "JPEG", quality=95, subsampling=0)
    return name


def _place_one(choices: tuple[str, ...], folder: PictureFolder) -> str:
    path, name = find_picture(list(choices), folder.roots)
    is_converted = is_dicom(path)
    if is_converted:
        name += ".png"
    target = folder.path / name
    if is_current(target, [path]):
        return name
    # also where it is only linked: what does not decode is not placed
    image = decode(path)
    with made_of([path], target) as partial:
        if is_converted:
            image.save(partial, "PNG")
        else:
            link_or_copy(path, partial, folder.is_copied)
    return name


def composite_name(found: list[str]) -> str:
    """The name of a composite: it begins with its first picture's, and says all in its digits."""
    digits = hashlib.blake2b("\x1f".join(found).encode("utf-8", "surrogatepass"), digest_size=8)
    stem = re.sub(r"[^A-Za-z0-9-]+", "_", Path(found[0]).stem)
    return f"composites/{stem[:40]}-{digits.hexdigest()}.jpg"


def decode(path: Path) -> Image.Image:
    """open_image, or a BadRow with its reason: nothing of a damaged picture's content is said."""
    try:
        return open_image(path)
    except ValueError:
        raise BadRow("picture does not decode") from None
