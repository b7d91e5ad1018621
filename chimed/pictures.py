"""Pictures of rows: several joined into one, placed in the data folder."""

import functools
import hashlib
import os
import re
import shutil
from pathlib import Path

from PIL import Image

from common.files import DISK_ERRORS
from common.rows import BadRow
from common.text import text_key
from model_io.pixels import find_picture, is_dicom, open_image

MAX_PICTURES = 4  # of one text; more would be too small in one composite (paper, section 3.3)
COMPOSITE_SIDE = 1344  # pixels, the longer one: four times what the model sees of a side
CACHE = 50_000  # pictures a process remembers


def join_pictures(images):
    """One PIL image of several: side by side at one height, or stacked at one width, whichever is the less extreme; each only scaled.

    The common height (width) is that of the largest, less where the composite's longer side would pass COMPOSITE_SIDE.
    """

    def layout(sizes):  # of pictures side by side: (a, b) are along and across
        total = sum(a / b for a, b in sizes)  # the length at height 1
        height = min(max(b for _, b in sizes), COMPOSITE_SIDE / max(total, 1))
        return [(max(1, round(a / b * height)), max(1, round(height))) for a, b in sizes], max(
            total, 1 / total
        )

    beside, stacked = (
        layout([image.size for image in images]),
        layout([image.size[::-1] for image in images]),
    )
    horizontal = beside[1] <= stacked[1]
    sizes = beside[0] if horizontal else [size[::-1] for size in stacked[0]]
    if any(
        abs(w / h / (image.width / image.height) - 1) > 0.1 for (w, h), image in zip(sizes, images)
    ):  # a line a few pixels wide: rounding would bend it
        raise BadRow("pictures too unlike to be joined")
    width, height = (
        (sum(w for w, _ in sizes), sizes[0][1])
        if horizontal
        else (sizes[0][0], sum(h for _, h in sizes))
    )
    composite, offset = Image.new("RGB", (width, height)), 0
    for image, size in zip(images, sizes):
        composite.paste(
            image.resize(size, Image.Resampling.LANCZOS), (offset, 0) if horizontal else (0, offset)
        )
        offset += size[0] if horizontal else size[1]
    return composite


def mark_of(paths):
    """A time in nanoseconds that stands for sizes and times of some files: what is made of them gets it as its own, and is current while they agree."""
    status = [os.stat(path) for path in paths]
    return text_key(*(f"{one.st_size} {one.st_mtime_ns}" for one in status)) % 10**18


def put_file(write, target, paths):
    """write(path) to a path beside `target`, marked as made of `paths`, then renamed: several workers may make the same picture."""
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{os.getpid()}-{text_key(target.name):x}.partial")
    partial.unlink(missing_ok=True)  # of a killed run with this number: never to be written through
    try:
        write(partial)
        if not partial.samefile(paths[0]):
            os.utime(partial, ns=(mark_of(paths),) * 2)
        partial.replace(target)
    finally:
        partial.unlink(missing_ok=True)


def is_current(target, paths):
    """True when `target` was made from files that have not changed since: nothing needs to be decoded again."""
    try:
        return target.samefile(paths[0]) or target.stat().st_mtime_ns == mark_of(paths)
    except OSError:
        return False


def link_or_copy(path, target, copy):
    if not copy:
        try:
            return os.link(os.path.realpath(path), target)
        except OSError:
            pass  # another disk, or a file system without links
    shutil.copyfile(path, target)


@functools.lru_cache(CACHE)
def place_pictures(names, roots, folder, copy, skip):
    """The picture of a row under `folder`: (name there, None), or (None, why not). names: tuple of tuples of candidates, one tuple a picture.

    One picture keeps its name and is linked (or copied); DICOM becomes PNG; two to four become one composite under composites/.
    """
    try:
        if not names:
            raise BadRow("no picture named")
        if len(names) > MAX_PICTURES:
            raise BadRow(f"more than {MAX_PICTURES} pictures")
        if skip:
            return (
                names[0][0] if len(names) == 1 else composite_name(names, [n[0] for n in names])
            ), None
        found = [find_picture(choices, roots) for choices in names]
        paths = [path for path, _ in found]
        if len(found) > 1:
            name = composite_name(names, [name for _, name in found])
            target = Path(folder, name)
            if not is_current(target, paths):
                composite = join_pictures([decode(path) for path in paths])
                put_file(
                    lambda partial: composite.save(partial, "JPEG", quality=95, subsampling=0),
                    target,
                    paths,
                )
            return name, None
        ((path, name),) = found
        if is_dicom(path):
            name += ".png"
            if not is_current(Path(folder, name), paths):
                image = decode(path)
                put_file(lambda partial: image.save(partial, "PNG"), Path(folder, name), paths)
        elif not is_current(Path(folder, name), paths):
            decode(path)
            put_file(lambda partial: link_or_copy(path, partial, copy), Path(folder, name), paths)
        return name, None
    except BadRow as error:
        return None, str(error)
    except PermissionError:
        return None, "picture may not be read"
    except OSError as error:
        if error.errno in DISK_ERRORS:
            raise
        return (
            None,
            "picture cannot be stored",
        )  # a name too long, or a file where a folder should be


def composite_name(names, found):
    digest = hashlib.blake2b(
        "\x1f".join(found).encode("utf-8", "surrogatepass"), digest_size=8
    ).hexdigest()
    return f"composites/{re.sub(r'[^A-Za-z0-9-]+', '_', Path(found[0]).stem)[:40]}-{digest}.jpg"


def decode(path):
    """open_image, or a BadRow with its reason: nothing of a damaged picture's content is said."""
    try:
        return open_image(path)
    except ValueError:
        raise BadRow("picture does not decode") from None
