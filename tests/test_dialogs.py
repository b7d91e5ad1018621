"""Promise: rows of dialogs are read by what they hold, whatever their keys are called, or refused
with the keys found; and data that is not the paper's says so.
"""

import json
import subprocess
import sys

import pytest
from conftest import ROOT
from PIL import Image
from raw_sets import prep

import train as train_command
from chimed.prompts import CAPTION
from common.dialogs import UnknownRow, read_dialog, read_row_of_dialogs

ASKED = [
    {"from": "human", "value": "<image>\n这是什么？"},
    {"from": "gpt", "value": "左肺结节。"},
]
PUBLISHED = {"id": "7", "image": "a.png", "conversations": ASKED}
SAID = [
    {"role": "user", "content": "<image>\n这是什么？"},
    {"role": "assistant", "content": "左肺结节。"},
]
SHAPES = {
    "as published": PUBLISHED,
    "picture under another key": {"id": "7", "file": "a.png", "conversations": ASKED},
    "picture in a list": {"id": "7", "images": ["a.png"], "conversations": ASKED},
    "turns under another key": {"id": "7", "image": "a.png", "dialogue": ASKED},
    "messages": {"id": "7", "images": ["a.png"], "messages": SAID},
    "messages under conversations": {"id": "7", "image": "a.png", "conversations": SAID},
    "a list written as text": {
        "id": "7",
        "image": "a.png",
        "conversations": json.dumps(ASKED, ensure_ascii=False),
    },
    "names written as text": {"id": "7", "pictures": "['a.png']", "conversations": ASKED},
    "no mark for the picture": {
        "id": "7",
        "img_path": "a.png",
        "messages": [
            {"role": "user", "content": "这是什么？"},
            {"role": "assistant", "content": "左肺结节。"},
        ],
    },
    "parts": {
        "id": "7",
        "image": "a.png",
        "messages": [
            {
                "role": "user",
                "content": [{"type": "image_url"}, {"type": "text", "text": "这是什么？"}],
            },
            {"role": "assistant", "content": [{"type": "text", "text": "左肺结节。"}]},
        ],
    },
    "Chinese roles": {
        "id": "7",
        "image": "a.png",
        "对话": [
            {"role": "用户", "text": "<image>\n这是什么？"},
            {"role": "助手", "text": "左肺结节。"},
        ],
    },
    "question and answer": {
        "id": "7",
        "image": "a.png",
        "Question": "这是什么？",
        "Answer": "左肺结节。",
    },
}


@pytest.mark.parametrize("shape", SHAPES)
def test_every_spelling_is_the_same_dialog(shape):
    dialog = read_dialog(SHAPES[shape])
    assert dialog["conversations"] == ASKED
    image = dialog["image"]
    assert image == "a.png" or image == ["a.png"]
    assert dialog["id"] == "7"


def long_turns(n):
    return [{"from": "human", "value": "<image>\n这是什么？"}, {"from": "gpt", "value": "肺" * n}]


@pytest.mark.parametrize(
    "text, turns",
    [
        # an emoji, which JSON escapes in two halves
        (json.dumps([ASKED[0], {"from": "gpt", "value": "好\U0001f600"}]), "好\U0001f600"),
        (json.dumps([ASKED[0], {**ASKED[1], "score": None, "is_good": True}]), "左肺结节。"),
        (json.dumps(long_turns(250_000)), "肺" * 250_000),
        (str(long_turns(250_000)), "肺" * 250_000),
    ],
    ids=["emoji", "null and true", "long JSON", "long Python"],
)
def test_a_list_written_as_text_is_read_whole(text, turns):
    for key in ("conversations", "turns"):
        row = {"image": "a.png", key: text}
        assert not read_row_of_dialogs(row)[1]
        assert read_dialog(row)["conversations"][1]["value"] == turns


def test_turns_that_are_cut_off_are_no_caption():
    cut = json.dumps(ASKED, ensure_ascii=False)[:-3]
    with pytest.raises(UnknownRow, match="'turns'"):
        read_dialog({"image": "a.png", "turns": cut})


def test_what_is_published_stays_as_it_is():
    """The very object: other fields, empty ones and damaged ones too."""
    for row in (
        PUBLISHED,
        {**PUBLISHED, "source": "b.png", "messages": SAID},
        {"conversations": ASKED[:0], "image": "a.png"},
        {"conversations": 7},
        {"conversations": [{"from": "human", "value": "你好"}, {"from": "gpt", "value": "你好"}]},
    ):
        assert read_dialog(row) is row
        assert not read_row_of_dialogs(row)[1]


@pytest.mark.parametrize(
    "row, caption",
    [
        ({"image": "a.png", "caption": "胸部CT示左肺结节。"}, "胸部CT示左肺结节。"),
        ({"file_name": "a.png", "zh": "胸部CT示左肺结节。"}, "胸部CT示左肺结节。"),
        ({"id": "q8", "img": "x/a.jpg", "Caption": "胸部", "note": "又 一段"}, "胸部"),
    ],
)
def test_captions(row, caption):
    dialog = read_dialog(row)
    assert read_row_of_dialogs(row)[1]
    assert dialog["conversations"][1] == {"from": "gpt", "value": caption}
    assert dialog["conversations"][0]["value"].count("<image>") == 1


@pytest.mark.parametrize(
    "row, words",
    [
        ({"a": 1, "b": "x"}, ["'a', 'b'"]),
        ({}, ["none"]),
        ({"image": "a.png", "text": '[{"role": "user", "content": "这是什么'}, ["'image', 'text'"]),
        ({"caption": "没有图片的说明"}, ["'caption'"]),
        ({"image": "a.png", "zh": "一段 文字", "en": "a text"}, ["'zh', 'en'", "`caption`"]),
        ({"x": ASKED, "y": ASKED}, ["'x', 'y'"]),
        ({"a": "1.png", "b": "2.png", "caption": "说明文字"}, ["'a', 'b'", "`image`"]),
    ],
)
def test_refusals_name_the_keys(row, words):
    with pytest.raises(UnknownRow) as refused:
        read_dialog(row)
    for word in words:
        assert word in str(refused.value)


def rows_of(n, spell):
    rows = []
    for i in range(n):
        answer = f"左肺第{i}个结节，边界清楚。"
        rows.append(spell(i, f"这是第{i}张图的什么？", answer))
    return rows


def published(i, question, answer):
    turns = [
        {"from": "human", "value": f"<image>\n{question}"},
        {"from": "gpt", "value": answer},
    ]
    return {"id": str(i), "image": f"{i % 3}.png", "conversations": turns}


def renamed(i, question, answer):
    messages = [
        {"role": "user", "content": f"<image>\n{question}"},
        {"role": "assistant", "content": answer},
    ]
    return {"id": str(i), "pic": f"{i % 3}.png", "messages": messages}


def captioned(i, question, answer):
    return {"image_path": f"{i % 3}.png", "text_zh": answer}


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    for i in range(3):
        Image.new("RGB", (20, 20 + i), (40 * i, 90, 20)).save(folder / f"{i}.png")
    return folder


def write_lines(path, rows, start=""):
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    path.write_text(start + lines, encoding="utf-8")
    return path


def train(toy, data, images, out, *options, code=0):
    """(log, what was printed) of four steps of stage 1."""
    command = [
        *(sys.executable, ROOT / "train.py", "--stage", 1),
        *("--llm", toy / "llama", "--vision", toy / "clip", "--data", data, "--images", images),
        *("--out", out, "--batch-size", 2, "--max-steps", 4, "--workers", 0, "--samples", 0),
        *("--device", "cpu", *options),
    ]
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True)
    assert done.returncode == code, done.stderr
    if code:
        return [], done.stderr
    log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [line["loss"] for line in log if "loss" in line], done.stdout


def test_training_is_the_same_whatever_the_keys(tmp_path, toy, images):
    """Losses equal to the last digit, of rows in the published spelling and in another."""
    plain = write_lines(tmp_path / "plain.jsonl", rows_of(8, published))
    other = write_lines(tmp_path / "other.jsonl", rows_of(8, renamed))
    losses, said = train(toy, plain, images, tmp_path / "one")
    again, _ = train(toy, other, images, tmp_path / "two")
    assert len(losses) == 4
    assert losses == again
    # eight rows are not the paper's
    assert "8 rows, 4 steps of 2 an epoch; the paper has 580,014 in its Table 1" in said


def test_captions_want_prompts_or_the_template_without(tmp_path, toy, images):
    """train.py says how to make dialogs of them; with --template plain it reads them; build draws
    a prompt of its list for each, and what it makes is trained."""
    data = write_lines(tmp_path / "captions.jsonl", rows_of(8, captioned))
    _, error = train(toy, data, images, tmp_path / "a", code=2)
    assert len(error.strip().splitlines()) == 1
    assert "'image_path', 'text_zh'" in error
    assert "data_prep.py build --chimed-alignment" in error
    losses, _ = train(toy, data, images, tmp_path / "b", "--template", "plain")
    assert len(losses) == 4

    built = tmp_path / "built"
    prep("build", "--chimed-alignment", data, "--images", images, "--out", built, code=0)
    rows = json.loads((built / "alignment.json").read_text())
    questions = [row["conversations"][0]["value"].removeprefix("<image>\n") for row in rows]
    assert set(questions) <= set(CAPTION) and len(set(questions)) > 2
    answers = [row["conversations"][1]["value"] for row in rows]
    assert answers == [row["text_zh"] for row in rows_of(8, captioned)]
    losses, _ = train(toy, built / "alignment.json", built / "images", tmp_path / "c")
    assert len(losses) == 4


def test_build_and_check_read_other_keys(tmp_path, images):
    """A byte-order mark, a first row that is none, other keys: read; what is none is counted."""
    rows = [{"note": 1}, *rows_of(4, renamed)]
    data = write_lines(tmp_path / "rows.jsonl", rows, start="\ufeff")
    built = tmp_path / "built"
    done = prep("build", "--chimed-instruction", data, "--images", images, "--out", built, code=0)
    assert "| instruction | chimed-instruction | 5 | 4 | 0 | 1 | 4 |" in done.stdout
    found = json.loads((built / "instruction.json").read_text())
    assert found[0]["conversations"] == rows_of(4, published)[0]["conversations"]
    assert found[0]["image"] == "0.png"
    whole = write_lines(tmp_path / "whole.jsonl", rows_of(4, renamed))
    prep("check", whole, "--images", images, code=0)


def test_a_file_of_nothing_known_is_refused(tmp_path, images):
    data = write_lines(tmp_path / "rows.jsonl", [{"foo": 1, "bar": "x"}] * 3)
    done = prep("build", "--chimed-alignment", data, "--images", images, "--out", "x", code=2)
    assert "'foo', 'bar'" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_the_released_file_is_known_by_its_rows():
    """263,175 rows: PMC-OA alone, which the line at the start says; the paper's number says
    nothing."""
    line = train_command.beside_paper(1, 263_175, 256)
    assert "263,175 rows, 1,029 steps of 256" in line
    assert "580,014 in its Table 1, 2,266 steps" in line
    assert "PMC-OA alone, no contexts" in line
    assert train_command.beside_paper(1, 580_014, 256) is None
    assert "PMC-OA" not in train_command.beside_paper(1, 10_000, 256)
    assert "469,441 in its Table 2, 3,668 steps" in train_command.beside_paper(2, 152_603, 128)


def test_missing_data_says_what_was_released(tmp_path, toy):
    command = [sys.executable, ROOT / "train.py", "--stage", 1, "--device", "cpu"]
    command += ["--llm", toy / "llama", "--vision", toy / "clip", "--out", tmp_path / "out"]
    done = subprocess.run(
        [str(word) for word in command], capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == 2
    assert len(done.stderr.strip().splitlines()) == 1
    assert "263,175 of the paper's 580,014" in done.stderr
    assert "data_prep.py build" in done.stderr
