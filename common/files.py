"""How a command ends, and how files are read and written: in one line, beside and renamed, or not at all."""

import errno
import fcntl
import hashlib
import json
import os
import shutil
import sys
from pathlib import Path

import torch


def digest(path):
    """sha256 of a file, in hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


USER_ERRORS = (ValueError, OSError)  # what a user can cause
OUT_OF_MEMORY = "the GPU's memory is full: fewer samples, questions or pictures at a time (--micro-batch-size, --batch-size), or --quantize int8"


def run_cli(main):
    """Run a script's main(): what a user can cause ends in one line on stderr and exit code 2 (1 when the disk is full), Ctrl-C in 130."""
    try:
        main()
    except BrokenPipeError:  # `| head` has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except USER_ERRORS as error:
        print(f"{Path(sys.argv[0]).name}: {one_line(error)}", file=sys.stderr)
        sys.exit(
            1
            if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EFBIG)
            else 2
        )
    except torch.OutOfMemoryError:
        print(f"{Path(sys.argv[0]).name}: {OUT_OF_MEMORY}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        print(file=sys.stderr)
        sys.exit(130)


def one_line(error):
    """The message of an exception on a single line."""
    text = (
        f"{error.strerror}: {error.filename}"
        if isinstance(error, OSError) and error.filename
        else str(error)
    )
    return " ".join(text.split()) or type(error).__name__


def check_ranges(options, **ranges):
    """ValueError unless each named option lies in its (low, high); what was not given (None) passes."""
    for name, (low, high) in ranges.items():
        if (
            getattr(options, name) is not None and not low <= getattr(options, name) <= high
        ):  # also catches nan
            raise ValueError(
                f"--{name.replace('_', '-')} {getattr(options, name)}: must be from {low} to {high}"
            )


def read_json(path):
    """The content of a JSON file; ValueError names the file when it is empty or damaged."""
    try:
        return json.loads(
            Path(path).read_text(encoding="utf-8-sig")
        )  # -sig: some releases carry a byte-order mark
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not a JSON file ({error})") from None


def write_text(path, text):
    """A text file, whole or not at all; half a surrogate pair, which UTF-8 has no bytes for, becomes an escape."""
    partial = Path(path).with_name(Path(path).name + ".partial")
    partial.write_bytes(text.encode("utf-8", errors="backslashreplace"))
    partial.replace(path)


def write_json(path, value):
    write_text(path, json.dumps(value, ensure_ascii=False, indent=2) + "\n")


def replace_folder(partial, path):
    """Give a finished folder its final name; what stood there goes only when the new one is complete."""
    old = path.with_name(path.name + ".old")
    shutil.rmtree(old, ignore_errors=True)
    if path.exists():
        path.rename(old)
    partial.rename(path)
    shutil.rmtree(old, ignore_errors=True)


def check_replaceable(path, mark):
    """ValueError when `path` is there and is no folder of the kind that holds a file `mark`, which alone may be replaced."""
    path = Path(path)
    if (
        not path.name
        or path.is_symlink()
        or (
            path.exists()
            and not (path.is_dir() and ((path / mark).is_file() or not any(path.iterdir())))
        )
    ):
        raise ValueError(
            f"{path or repr('')} is there and holds something else: give another name, or remove it"
        )


def model_folder(path):
    """The folder that holds a model: a train.py --out folder keeps it in final/."""
    path = Path(path)
    return (
        path / "final"
        if (path / "final").is_dir() and not (path / "config.json").exists()
        else path
    )


def hold(folder):
    """A lock on a folder that is being written; keep what is returned. ValueError when another run has it."""
    file = open(Path(folder) / ".lock", "w")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        raise ValueError(f"{folder} is being written by another run") from None
    return file
