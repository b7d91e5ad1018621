"""Promise: `check` finds every row that training could not use or should not see, names why, and
with --fix writes the others byte for byte."""

import json

import pytest
from PIL import Image
from raw_sets import picture, prep

from common.rows import Records


def check(*options, code=None):
    return prep("check", *options, *(() if "--workers" in options else ("--workers", 1)), code=code)


def row(row_id="r", image="a.png", question="<image>\n这是什么？", answer="CT图像", **more):
    made = {
        "id": row_id,
        "image": image,
        "conversations": [{"from": "human", "value": question}, {"from": "gpt", "value": answer}],
        **more,
    }
    return made if image is not None else {k: v for k, v in made.items() if k != "image"}


@pytest.fixture
def images(tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    for name in "abc":
        picture(folder / f"{name}.png")
    picture(tmp_path / "outside.png")
    (folder / "link.png").symlink_to(tmp_path / "outside.png")
    (folder / "inside.png").symlink_to(folder / "a.png")
    (folder / "cut.png").write_bytes((folder / "a.png").read_bytes()[:60])
    (folder / "text.png").write_text("<html>404</html>")
    (folder / "empty.png").write_bytes(b"")
    (folder / "folder.png").mkdir()
    Image.new("1", (12000, 12000)).save(folder / "bomb.png")  # 144 megapixels in a few kB
    return folder


CASES = [  # the row, its problems
    (row("ok"), []),
    (row("ok2", "inside.png"), []),
    (row("text only", None, "你好"), []),
    (row("two", ["a.png", "b.png"], "<image><image>\n比较两图"), []),
    (row("missing", "none.png"), ["picture missing"]),
    (row("folder", "folder.png"), ["picture missing"]),
    (row("cut", "cut.png"), ["picture does not decode"]),
    (row("text", "text.png"), ["picture does not decode"]),
    (row("empty", "empty.png"), ["picture does not decode"]),
    (row("bomb", "bomb.png"), ["picture is a decompression bomb"]),
    (row("dots", "../outside.png"), ["picture outside the image folder"]),
    (row("link", "link.png"), ["picture outside the image folder"]),
    (row("absolute", "/etc/hostname"), ["picture outside the image folder"]),
    (row("nul", "a\0.png"), ["picture missing"]),
    (row("count", "a.png", "这是什么？", "MRI图像"), ["<image> and pictures do not agree"]),
    (row("count2", None), ["<image> and pictures do not agree"]),
    (row("number", 5), ["image is no name"]),
    (row("answer", answer="  "), ["answer is empty"]),
    (row("marker", answer="见<image>"), ["<image> in an answer"]),
    (row("long", answer="很" * 30000), ["text longer than 20000 characters"]),
    ({"id": "none", "image": "a.png"}, ["no dialog"]),
    (
        {"id": "roles", "image": "a.png", "conversations": [{"from": "gpt", "value": "<image>"}]},
        ["no dialog"],
    ),
    (
        {
            "id": "odd",
            "image": "a.png",
            "conversations": row()["conversations"] + [{"from": "human", "value": "还有呢？"}],
        },
        ["last question has no answer"],
    ),
    (["a list"], ["row is no object"]),
    (row("ok", "b.png"), ["duplicate id"]),
    (row("again"), ["duplicate content"]),
    (row(["id"], "c.png"), ["id is no name"]),
]


@pytest.mark.parametrize("suffix, workers", [(".json", 1), (".jsonl", 2)])
def test_every_problem_by_name(tmp_path, images, suffix, workers):
    rows = [json.dumps(r, ensure_ascii=False) for r, _ in CASES]
    file = tmp_path / f"data{suffix}"
    if suffix == ".json":
        rows = [r for r, (value, _) in zip(rows, CASES, strict=True) if isinstance(value, dict)]
    file.write_text(
        "[" + ",\n".join(rows) + "]" if suffix == ".json" else "\n".join(rows) + "\n{cut off\n",
        encoding="utf-8",
    )
    done = check(
        file, "--images", images, "--workers", workers, "--fix", tmp_path / f"clean{suffix}", code=1
    )
    found = {
        line["row"]: line["problems"]
        for line in map(json.loads, open(f"{file}.bad.jsonl", encoding="utf-8"))
    }
    expected = [
        problems for value, problems in CASES if suffix == ".jsonl" or isinstance(value, dict)
    ] + ([["not JSON"]] if suffix == ".jsonl" else [])
    assert {i: p for i, p in enumerate(expected) if p} == found
    for problem in {p for wrong in expected for p in wrong}:
        assert f"{problem}: {sum(problem in wrong for wrong in expected)}" in done.stdout
    kept = [json.loads(r) for r, p in zip(rows, expected, strict=False) if not p]
    assert list(Records(tmp_path / f"clean{suffix}")) == kept
    done = check(tmp_path / f"clean{suffix}", "--images", images, code=0)
    assert (
        f"{len(kept)} fit to train on" in done.stdout
        and not (tmp_path / f"clean{suffix}.bad.jsonl").exists()
    )


def test_lengths_in_tokens(tmp_path, images, toy):
    rows = [row("short"), row("long", "b.png", answer="病灶位于左上区域，" * 40)]
    (tmp_path / "data.json").write_text(json.dumps(rows, ensure_ascii=False), encoding="utf-8")
    done = check(
        tmp_path / "data.json",
        "--images",
        images,
        "--tokenizer",
        toy / "llama",
        "--max-length",
        200,
        "--n-image-tokens",
        16,
        code=1,
    )
    assert "longer than 200 tokens: 1" in done.stdout


def test_bad_usage_is_one_line(tmp_path, images):
    (tmp_path / "cut.json").write_text('[{"id": 1')
    (tmp_path / "good.json").write_text(json.dumps([row()]))
    for options, words in (
        (["none.json", "--images", images], "no such data file"),
        ([tmp_path / "cut.json", "--images", images], "not a JSON file"),
        ([tmp_path / "good.json", "--images", tmp_path / "none"], "no such image folder"),
        (
            [tmp_path / "good.json", "--images", images, "--fix", tmp_path / "good.json"],
            "three different files",
        ),
        (
            [tmp_path / "good.json", "--images", images, "--bad", tmp_path / "good.json"],
            "three different files",
        ),
    ):
        done = check(*options, code=2)
        assert words in done.stderr and len(done.stderr.strip().splitlines()) == 1
