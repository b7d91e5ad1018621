"""Promise: both READMEs hold the same commands, and every file, function and table that they name
is there.
"""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
READMES = ("README.md", "README.zh.md")


def blocks(name):
    """The commands of a README: lines of its bash blocks, without what is said beside them."""
    text = (ROOT / name).read_text(encoding="utf-8")
    lines = []
    for block in re.findall(r"```bash\n(.*?)```", text, re.DOTALL):
        for line in block.splitlines():
            command = re.split(r"\s+# |^# ", line)[0].rstrip()
            # questions are asked in the reader's language
            lines.append(re.sub(r'"[^"]*"', '"…"', command))
    return [line for line in lines if line]


def test_both_languages_hold_the_same_commands():
    english, chinese = map(blocks, READMES)
    assert english == chinese and len(english) > 20


@pytest.mark.parametrize("name", READMES)
def test_every_file_that_is_named_is_there(name):
    text = (ROOT / name).read_text(encoding="utf-8")
    named = set(re.findall(r"`((?:[\w.-]+/)*[\w.-]+\.(?:py|sh|html|txt))`", text))
    # what a command writes is there after it
    assert len(named) > 15
    missing = [path for path in named if not (ROOT / path).is_file()]
    assert not missing


@pytest.mark.parametrize("name", READMES)
def test_the_map_lists_every_folder_and_command(name):
    text = (ROOT / name).read_text(encoding="utf-8")
    listed = re.findall(r"^([\w.]+(?:\.py|/)) ", text, re.MULTILINE)
    commands = [path.name for path in ROOT.glob("*.py")]
    folders = [f"{path.parent.name}/" for path in ROOT.glob("*/*.py")]
    assert sorted(listed) == sorted({*commands, *folders})


@pytest.mark.parametrize("name", READMES)
def test_every_function_and_table_of_the_figure_is_there(name):
    """`file.py` and the names after it in one row of a table: each is defined or used there."""
    text = (ROOT / name).read_text(encoding="utf-8")
    n_names = 0
    for row in re.findall(r"^\|.*\.py`.*$", text, re.MULTILINE):
        source = ""
        for word in re.findall(r"`([^`]+)`", row):
            if word.endswith(".py"):
                source = (ROOT / word).read_text(encoding="utf-8")
            elif re.fullmatch(r"[A-Za-z_.]+", word) and source:
                last = word.split(".")[-1]
                pattern = rf"^\s*(?:def|class) {last}\b|^{last}\b.* = "
                assert re.search(pattern, source, re.MULTILINE), f"{word} in: {row}"
                n_names += 1
    assert n_names >= 10
