"""How a command ends, and how files are read and written: in one line, beside and renamed, or not
at all."""

import contextlib
import errno
import fcntl
import functools
import hashlib
import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any, BinaryIO

# --- 1. how a command ends ------------------------------------------------------------------------

# what a user can cause
USER_ERRORS = (ValueError, OSError)
# errno of a disk that is full or fails: not the input's fault
DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EFBIG)
OUT_OF_MEMORY = (
    "the GPU's memory is full: fewer samples, questions or pictures at a time"
    " (--micro-batch-size, --batch-size), or --quantize int8"
)


def run_cli(main: Callable[[], object]) -> None:
    """Run a script's main(): what a user can cause ends in one line on stderr and exit code 2
    (1 when the disk is full), Ctrl-C in 130."""
    try:
        main()
    except BrokenPipeError:
        # `| head` has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except USER_ERRORS as error:
        _say(one_line(error))
        sys.exit(exit_code(error))
    except RuntimeError as error:
        if not _is_out_of_memory(error):
            raise
        _say(OUT_OF_MEMORY)
        sys.exit(1)
    except KeyboardInterrupt:
        print(file=sys.stderr)
        sys.exit(130)


def exit_code(error: BaseException) -> int:
    """How a command ends that an error of USER_ERRORS stopped: 1 when the disk is full, else 2."""
    return 1 if getattr(error, "errno", None) in DISK_ERRORS else 2


def one_line(error: BaseException | str) -> str:
    """The message of an exception on a single line."""
    text = str(error)
    if isinstance(error, OSError) and error.filename:
        text = f"{error.strerror}: {error.filename}"
    return " ".join(text.split()) or type(error).__name__


def _say(line: str) -> None:
    print(f"{Path(sys.argv[0]).name}: {line}", file=sys.stderr)


@functools.cache
def say_once(line: str) -> None:
    """A line on stderr, the first time that this process comes by; of several ranks the first."""
    if os.environ.get("RANK", "0") == "0":
        _say(line)


def _is_out_of_memory(error: RuntimeError) -> bool:
    # torch is not imported for this: where nobody has, its errors cannot come up
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(error, torch.OutOfMemoryError)


# --- 2. files: read, written whole, named by what they hold ---------------------------------------


def read_json(path: str | Path) -> Any:
    """The content of a JSON file; ValueError names the file when it is empty or damaged."""
    try:
        # -sig: some releases carry a byte-order mark
        return json.loads(Path(path).read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not a JSON file ({error})") from None


def write_text(path: str | Path, text: str) -> None:
    """A text file, whole or not at all; half a surrogate pair, which UTF-8 has no bytes for,
    becomes an escape."""
    path = Path(path)
    partial = path.with_name(path.name + ".partial")
    partial.write_bytes(text.encode("utf-8", errors="backslashreplace"))
    partial.replace(path)


def write_json(path: str | Path, value: object) -> None:
    """A JSON file, whole or not at all, in a form that people can read."""
    write_text(path, json.dumps(value, ensure_ascii=False, indent=2) + "\n")


def digest(path: str | Path) -> str:
    """sha256 of a file, in hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def digest_of(*values: object) -> str:
    """32 hex digits that stand for some values that JSON can say: equal values, equal digits."""
    return hashlib.sha256(json.dumps(values).encode()).hexdigest()[:32]


# --- 3. folders: replaced, and held by one process at a time --------------------------------------


def replace_folder(partial: Path, path: Path) -> None:
    """Give a finished folder its final name; what stood there goes only when the new one is
    complete."""
    old = path.with_name(path.name + ".old")
    shutil.rmtree(old, ignore_errors=True)
    if path.exists():
        path.rename(old)
    partial.rename(path)
    shutil.rmtree(old, ignore_errors=True)


@contextlib.contextmanager
def removed_on_error(partial: Path) -> Iterator[None]:
    """What is done within, or else no folder `partial`."""
    try:
        yield
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


@contextlib.contextmanager
def folder_beside(path: Path) -> Iterator[Path]:
    """An empty folder beside `path`, which takes its name, and its place, when all that is done
    within went well; else nothing is left of it."""
    partial = path.with_name(path.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    with removed_on_error(partial):
        yield partial
    replace_folder(partial, path)


def check_replaceable(path: str | Path, mark: str, known: Collection[str] = ()) -> None:
    """ValueError when `path` cannot be made, or is there and is no folder of the kind that holds a
    file `mark`, which alone may be replaced. known: patterns of the names of all that such a folder
    holds, where it may hold nothing else (): whatever it likes."""
    path = Path(path)
    above = [*path.absolute().parents, Path("/")]
    parent = next(folder for folder in above if folder.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise ValueError(f"{parent} is no folder that can be written to: {path} cannot be made")
    if not _is_replaceable(path, mark, known):
        raise ValueError(
            f"{path} is there and holds something else: give another name, or remove it"
        )


def _is_replaceable(path: Path, mark: str, known: Collection[str]) -> bool:
    if not path.name or path.is_symlink():
        return False
    if not path.exists():
        return True
    if not path.is_dir():
        return False
    is_marked = (path / mark).is_file() and (not known or holds_only(path, known))
    return is_marked or not any(path.iterdir())


def holds_only(folder: Path, known: Collection[str]) -> bool:
    """Whether all that lies in a folder are files whose names are like one of these patterns."""
    for file in folder.iterdir():
        if file.is_dir() or not any(file.match(pattern) for pattern in known):
            return False
    return True


def model_folder(path: str | Path) -> Path:
    """The folder that holds a model: a train.py --out folder keeps it in final/."""
    path = Path(path)
    final = path / "final"
    if final.is_dir() and not (path / "config.json").exists():
        return final
    return path


def lock(path: str | Path, busy: str, *, patience: int = 0, waiting: str = "") -> BinaryIO:
    """The file at `path`, opened to read and append, and ours alone until it is closed.

    ValueError(busy) when another process has it; before that `patience` seconds are waited,
    and after the fifth the line `waiting` is printed.
    """
    file = open(path, "a+b")
    second = 0
    while not _try_lock(file):
        if second == patience:
            file.close()
            raise ValueError(busy)
        if waiting and second == 5:
            print(waiting, flush=True)
        time.sleep(1)
        second += 1
    return file


def _try_lock(file: BinaryIO) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        # a file system without locks
        pass
    return True
