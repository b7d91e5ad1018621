"""Promise: `build` turns raw or translated files into what train.py reads, with every row counted
once, and the same bytes for any number of workers."""

import csv
import json
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT
from PIL import Image
from raw_sets import make_raw, picture, prep, write_table

from chimed.groups import Teams, connected, held_out
from chimed.pictures import COMPOSITE_SIDE, join_pictures
from chimed.prompts import CAPTION, CONTEXT, VQA
from chimed.sources import read_row
from common.rows import Records
from model_io.pixels import row_pictures
from qilin_min import IMAGE_TOKEN


def build(*options, check=0):
    return prep(
        "build", *options, *(() if "--workers" in options else ("--workers", 1)), code=check
    )


def every_set(raw):
    return (
        "--pmc-oa",
        raw / "pmc_oa.jsonl",
        "--pmc-casereport",
        raw / "case.csv",
        "--pmc-vqa",
        raw / "train_2.csv",
        "--images",
        raw / "images",
    )


def manifest(out):
    return json.loads((out / "manifest.json").read_text())


def dialogs(path):
    return list(Records(path)) if Path(path).is_file() else []


@pytest.fixture
def raw(tmp_path):
    return make_raw(tmp_path / "raw")


def test_the_papers_subsets(raw, tmp_path):
    """Each case report row is one dialog of each subset, PMC-OA's rows with one caption one
    composite, PMC-VQA's letters the choice's words; all of it fit to train on."""
    out = tmp_path / "out"
    build(*every_set(raw), "--out", out)
    alignment, instruction = dialogs(out / "alignment.json"), dialogs(out / "instruction.json")
    assert len(alignment) == 6 + 12 and len(instruction) == 12 + 12
    for row in alignment + instruction:
        assert set(row) == {"id", "image", "conversations"} and [
            turn["from"] for turn in row["conversations"]
        ] == ["human", "gpt"]
        assert (
            row["conversations"][0]["value"].startswith(f"{IMAGE_TOKEN}\n")
            and row["conversations"][0]["value"].count(IMAGE_TOKEN) == 1
        )
        assert len(row_pictures(row, out / "images")) == 1
    cases = {row["id"]: row for row in alignment if row["id"].startswith("pmc-casereport")}
    records = Records(raw / "case.csv")
    for row_id, row in cases.items():
        number, kind = re.fullmatch(r"pmc-casereport-(\d+)-(context|inline)", row_id).groups()
        question, answer = (turn["value"] for turn in row["conversations"])
        assert answer == records[int(number)][kind] and question.removeprefix(
            f"{IMAGE_TOKEN}\n"
        ) in (CONTEXT if kind == "context" else CAPTION)
    assert {row_id.rsplit("-", 1)[1] for row_id in cases} == {"context", "inline"}
    answers = {row["id"]: row["conversations"][1]["value"] for row in instruction}
    assert [answers[f"pmc-vqa-{i}"] for i in range(4)] == ["Kidney", "Liver", "Spleen", "Heart"]
    assert answers["pmc-casereport-0"] == "A tear of the medial meniscus."
    names = {row["image"] for row in alignment if row["id"].startswith("pmc-oa")}
    assert (
        sum(name.startswith("composites/") for name in names) == 4
    )  # of 6 articles, 2 have one picture, 2 two, 2 three
    for sets in manifest(out)["counts"].values():
        for n in sets.values():
            assert n["rows"] == n["kept"] + n["joined"] + n["merged"] + sum(n["dropped"].values())
    counts = manifest(out)["counts"]
    assert counts["alignment"]["pmc-oa"] == {
        "rows": 12,
        "kept": 6,
        "joined": 6,
        "merged": 0,
        "dialogs": 6,
        "untranslated": 6,
        "dropped": {},
    }


def test_same_bytes_for_any_number_of_workers(raw, tmp_path):
    for name, workers in (("a", 1), ("b", 3), ("a", 2)):  # the last time onto a finished one
        build(
            *every_set(raw), "--out", tmp_path / name, "--workers", workers, "--val-fraction", 0.3
        )
    files = [
        {
            str(path.relative_to(tmp_path / name)): path.read_bytes()
            for path in sorted((tmp_path / name).rglob("*"))
            if path.is_file()
        }
        for name in "ab"
    ]
    assert files[0].keys() == files[1].keys() and all(
        files[0][name] == files[1][name] for name in files[0]
    )
    build(*every_set(raw), "--out", tmp_path / "c", "--seed", 1)
    assert (tmp_path / "c/alignment.json").read_bytes() != (
        tmp_path / "a/alignment.json"
    ).read_bytes()


def test_prompts_are_drawn_evenly(tmp_path):
    """About twenty of each task, all different; 2,000 rows draw each of them between half and
    twice its share."""
    for templates in (CAPTION, CONTEXT, VQA):
        assert len(set(templates)) == len(templates) == 20
    assert all(template.count("{question}") == 1 for template in VQA)
    (tmp_path / "images").mkdir()
    picture(tmp_path / "images/a.png")
    write_table(
        tmp_path / "own.csv",
        ["image", "caption", "question", "answer"],
        [["a.png", f"胸部平片所见第{i}例", f"问题{i}是什么？", "肺炎"] for i in range(2000)],
    )
    build("--own", tmp_path / "own.csv", "--images", tmp_path / "images", "--out", tmp_path / "out")
    drawn = Counter(
        row["conversations"][0]["value"] for row in dialogs(tmp_path / "out/alignment.json")
    )
    assert len(drawn) == 20 and all(50 <= n <= 200 for n in drawn.values())
    asked = Counter(
        re.sub(r"问题\d+是什么[?\uff1f]", "{question}", row["conversations"][0]["value"])
        for row in dialogs(tmp_path / "out/instruction.json")
    )
    assert len(asked) == 20 and all(50 <= n <= 200 for n in asked.values())


@pytest.mark.parametrize(
    "sizes, direction",
    [
        ([(100, 50), (100, 50)], "stacked"),
        ([(50, 100), (50, 100)], "beside"),
        ([(100, 100), (100, 100)], "beside"),
        ([(300, 100)] * 3, "stacked"),
        ([(100, 100)] * 4, "beside"),
        ([(200, 100), (50, 100), (100, 100)], "either"),
        ([(2000, 1500), (400, 300)], "either"),
        ([(30, 20), (20, 30)], "either"),
    ],
)
def test_composites_are_never_distorted(sizes, direction):
    """Every part keeps its proportions to a pixel, all have one height (or width), and of the two
    layouts it is the less extreme."""
    colors = [(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 0)]
    composite = join_pictures(
        [Image.new("RGB", size, color) for size, color in zip(sizes, colors, strict=False)]
    )
    beside, stacked = sum(w / h for w, h in sizes), sum(h / w for w, h in sizes)
    best = min(max(beside, 1 / beside), max(stacked, 1 / stacked))
    extreme = max(composite.width / composite.height, composite.height / composite.width)
    assert extreme == pytest.approx(best, rel=0.05) and max(composite.size) <= COMPOSITE_SIDE + len(
        sizes
    )
    assert (
        direction == "either"
        or (composite.width > composite.height) == (direction == "beside")
        or composite.width == composite.height
    )
    pixels = np.asarray(composite)
    for (width, height), color in zip(sizes, colors, strict=False):
        ys, xs = np.nonzero((pixels == color).all(axis=2))
        w, h = np.ptp(xs) + 1, np.ptp(ys) + 1
        assert h == composite.height or w == composite.width
        assert abs(w - width * h / height) <= 1 or abs(h - height * w / width) <= 1


def test_bad_rows_are_dropped_by_reason(tmp_path):
    images = tmp_path / "images"
    images.mkdir()
    for name in ("PMC1_F1.jpg", "PMC1_F2.jpg", "PMC1_F3.jpg", "PMC1_F4.jpg", "PMC1_F5.jpg"):
        picture(images / name)
    (images / "PMC1_broken.jpg").write_bytes((images / "PMC1_F1.jpg").read_bytes()[:200])
    (images / "PMC1_empty.jpg").write_bytes(b"")
    picture(tmp_path / "outside.jpg")
    (images / "PMC1_link.jpg").symlink_to(tmp_path / "outside.jpg")
    good = {
        "PMC_id": "PMC1",
        "context": "患者因胸痛就诊。",
        "question": "显示了什么？",
        "answer": "结节",
        "inline": "CT显示结节。",
        "img_ref": "['F1']",
    }
    rows = [
        good,
        {**good, "img_ref": "['F1','F2','F3','F4','F5']"},
        {**good, "img_ref": "['gone']"},
        {**good, "img_ref": "['broken']"},
        {**good, "img_ref": "['empty']"},
        {**good, "img_ref": "['link']"},
        {**good, "img_ref": "['../outside.jpg']"},
        {**good, "img_ref": f"['{tmp_path}/outside.jpg']"},
        {**good, "img_ref": "[]"},
        {**good, "img_ref": "['F1'"},
        {**good, "img_ref": "[__import__('os')]"},
        {**good, "question": "Q: "},
        {**good, "answer": None},
        {**good, "answer": "!!"},
        {**good, "context": "见图1", "inline": "图"},
        {**good, "context": ["a"]},
        {**good, "context": True},
        "text",
        {**good, "img_ref": ["F1", "F2"]},
    ]
    (tmp_path / "case.jsonl").write_text(
        "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows) + "{oops\n\n",
        encoding="utf-8",
    )
    done = build(
        "--pmc-casereport", tmp_path / "case.jsonl", "--images", images, "--out", tmp_path / "out"
    )
    both = {
        "more than 4 pictures": 1,
        "picture missing": 1,
        "picture does not decode": 2,
        "picture outside the image folder": 3,
        "no picture named": 1,
        "list of pictures cannot be read": 2,
        "a field is not text": 2,
        "not an object": 1,
        "not JSON": 1,
    }
    counts = manifest(tmp_path / "out")["counts"]
    assert counts["alignment"]["pmc-casereport"]["dropped"] == {**both, "text too short": 1}
    assert counts["instruction"]["pmc-casereport"]["dropped"] == {
        **both,
        "no question": 1,
        "no answer": 2,
    }
    assert "picture does not decode 2" in done.stdout
    dropped = [json.loads(line) for line in open(tmp_path / "out/dropped.jsonl")]
    assert len(dropped) == 2 * sum(both.values()) + 1 + 3
    assert not (tmp_path / "out/images").joinpath("outside.jpg").exists()


@pytest.mark.parametrize(
    "content, name, words",
    [
        (None, "oa.jsonl", "no such data file"),
        ("", "oa.jsonl", "no rows"),
        ('{"picture": "a.png"}\n', "oa.jsonl", "no 'image' in it"),
        ('[{"image": "a.png", "caption"', "oa.json", "breaks off"),
        ('image,caption\n"a.png,x\n', "oa.csv", "no table near line"),
        ("image,caption\n", "oa.csv", "no rows"),
        ("image;caption\na;b\n", "oa.csv", "no 'image' in it"),
        ("x", "oa.txt", "ends in .csv"),
        ("image,image\na,b\n", "oa.csv", "two columns have one name"),
    ],
)
def test_a_bad_file_is_one_line_and_exit_2(tmp_path, content, name, words):
    (tmp_path / "images").mkdir()
    if content is not None:
        (tmp_path / name).write_text(content)
    done = build(
        "--pmc-oa",
        tmp_path / name,
        "--images",
        tmp_path / "images",
        "--out",
        tmp_path / "out",
        check=2,
    )
    assert (
        words in done.stderr and name in done.stderr and len(done.stderr.strip().splitlines()) == 1
    ), done.stderr
    assert not (tmp_path / "out/alignment.json").exists()


def test_nothing_left_says_why_and_keeps_what_was_there(raw, tmp_path):
    build(*every_set(raw), "--out", tmp_path / "out")
    before = (tmp_path / "out/alignment.json").read_bytes()
    (tmp_path / "empty").mkdir()
    done = build(
        "--pmc-oa",
        raw / "pmc_oa.jsonl",
        "--images",
        tmp_path / "empty",
        "--out",
        tmp_path / "out",
        check=2,
    )
    assert (
        "no row is left of 12: picture missing 12" in done.stderr
        and (tmp_path / "out/alignment.json").read_bytes() == before
    )


def test_pmc_vqa_as_found_in_the_wild(tmp_path):
    """Letters, labels and texts; `Anwser`; a byte-order mark; columns in another order; letters
    before the choices or none."""
    columns = ["Figure_path", "Question", "Answer", "Choice A", "Choice B", "Choice C", "Choice D"]
    cases = [
        (
            columns + ["Answer_label"],
            ["p.jpg", "q?", "Liver", " A: Kidney ", "B:Liver", " C. Spleen", "Heart ", "B"],
            "B",
            "Liver",
        ),
        (
            columns,
            ["p.jpg", "q?", "c", "A: Kidney", "B: Liver", "C: Spleen", "D: Heart"],
            "C",
            "Spleen",
        ),
        (
            columns,
            ["p.jpg", "q?", " B: Liver ", "A: Kidney", "B: Liver", "C: Spleen", "D: Heart"],
            "B",
            "Liver",
        ),
        (
            ["Choice D", "Anwser", *[c for c in columns if c not in ("Answer", "Choice D")]],
            ["D: Heart", "Heart", "p.jpg", "q?", "A: Kidney", "B: Liver", "C: Spleen"],
            "D",
            "Heart",
        ),
        (
            columns,
            [
                "p.jpg",
                "q?",
                "Vitamin A",
                "A: Vitamin A",
                "B: Vitamin B",
                "C: Vitamin C",
                "D: A and B",
            ],
            "A",
            "Vitamin A",
        ),
        (
            columns,
            ["p.jpg", "q?", "Pancreas", "A: Kidney", "B: Liver", "C: Spleen", "D: Heart"],
            "",
            "Pancreas",
        ),
    ]
    for columns, values, letter, answer in cases:
        write_table(tmp_path / "v.csv", columns, [values], bom=True, end="\r\n")
        row = read_row("pmc-vqa", Records(tmp_path / "v.csv")[0])
        assert (row.letter, row.texts["answer"], row.images) == (letter, answer, ["p.jpg"])


def test_choices_can_be_kept(raw, tmp_path):
    build(
        "--pmc-vqa",
        raw / "train_2.csv",
        "--images",
        raw / "images",
        "--out",
        tmp_path / "out",
        "--choices",
    )
    row = dialogs(tmp_path / "out/instruction.json")[1]
    question, answer = (turn["value"] for turn in row["conversations"])
    assert (
        answer == "B. Liver"
        and question.endswith("\nA. Kidney\nB. Liver\nC. Spleen\nD. Heart")
        and "What organ is shown in image 1?" in question
    )


def test_both_texts_of_a_case(raw, tmp_path):
    for choice, n in (("both", 24), ("context", 12), ("inline", 12)):
        build(
            "--pmc-casereport",
            raw / "case.csv",
            "--images",
            raw / "images",
            "--out",
            tmp_path / choice,
            "--alignment-text",
            choice,
        )
        rows = dialogs(tmp_path / choice / "alignment.json")
        assert len(rows) == n and (
            choice == "both" or all(row["id"].endswith(choice) for row in rows)
        )


def test_merged_turns(raw, tmp_path):
    """Two questions a picture: half as many dialogs, every question and answer still there, and
    how many pictures that saves is said."""
    plain, merged = tmp_path / "plain", tmp_path / "merged"
    build("--pmc-vqa", raw / "train_2.csv", "--images", raw / "images", "--out", plain)
    done = build(
        "--pmc-vqa",
        raw / "train_2.csv",
        "--images",
        raw / "images",
        "--out",
        merged,
        "--merge-turns",
    )
    rows = dialogs(merged / "instruction.json")
    assert (
        len(rows) == 6
        and "merged: 6 questions" in done.stdout
        and f"{6 * 576:,} image tokens" in done.stdout
    )
    assert sorted(turn["value"] for row in rows for turn in row["conversations"][1::2]) == sorted(
        row["conversations"][1]["value"] for row in dialogs(plain / "instruction.json")
    )
    for row in rows:
        assert (
            sum(turn["value"].count(IMAGE_TOKEN) for turn in row["conversations"]) == 1
            and len(row["conversations"]) == 4
        )
    assert manifest(merged)["counts"]["instruction"]["pmc-vqa"]["merged"] == 6


def test_a_split_never_leaks(tmp_path):
    """Rows tied by an article or a picture, directly or through others, across sets: on one side.
    10 % of 400 rows are held out."""
    rng = np.random.default_rng(0)
    (tmp_path / "images").mkdir()
    for k in range(300):
        picture(tmp_path / f"images/p{k}.png", (8, 8))
        picture(tmp_path / f"images/PMC{k}_Fig1.jpg", (8, 8))
    rows = [
        [
            f"p{rng.integers(300)}.png;p{rng.integers(300)}.png"
            if i % 4 == 0
            else f"p{rng.integers(300)}.png",
            f"病例{i}的影像表现",
            f"病例{i}有什么异常？",
            "结节",
        ]
        for i in range(150)
    ]
    write_table(tmp_path / "own.csv", ["image", "caption", "question", "answer"], rows)
    (tmp_path / "oa.jsonl").write_text(
        "".join(
            json.dumps(
                {"image": f"PMC{k // 2}_Fig1.jpg", "caption": f"图像{k}显示肺部结节"},
                ensure_ascii=False,
            )
            + "\n"
            for k in range(250)
        )
    )
    done = build(
        "--own",
        tmp_path / "own.csv",
        "--pmc-oa",
        tmp_path / "oa.jsonl",
        "--images",
        tmp_path / "images",
        "--out",
        tmp_path / "out",
        "--val-fraction",
        0.1,
    )
    sides = {
        side: [
            row
            for subset in ("alignment", "instruction")
            for row in dialogs(tmp_path / f"out/{subset}{side}.json")
        ]
        for side in ("", "-val")
    }
    used = {}
    for row_id, names in [(f"own-{i}", row[0].split(";")) for i, row in enumerate(rows)] + [
        (f"pmc-oa-{k}", [f"PMC{k // 2}_Fig1.jpg"]) for k in range(250)
    ]:
        used[row_id] = set(names)
    seen = {
        side: set().union(*(used[re.match(r"(own|pmc-oa)-\d+", row["id"])[0]] for row in rows))
        for side, rows in sides.items()
    }
    assert seen["-val"] and not seen[""] & seen["-val"], done.stdout
    held = {re.match(r"(own|pmc-oa)-\d+", row["id"])[0] for row in sides["-val"]}
    assert 30 <= len(held) <= 40


def test_connected_components_match_a_plain_search():
    rng = np.random.default_rng(1)
    for _ in range(30):
        n = int(rng.integers(1, 60))
        keys = [rng.integers(0, 50, int(rng.integers(1, 4))).tolist() for _ in range(n)]
        component, _ = connected(
            np.array([k for row in keys for k in row], dtype=np.uint64),
            np.array([len(row) for row in keys]),
        )
        groups = []
        for i, row in enumerate(keys):  # merge sets one by one
            touching = [g for g in groups if g[0] & set(row)]
            groups = [g for g in groups if g not in touching] + [
                (set(row).union(*(g[0] for g in touching)), {i}.union(*(g[1] for g in touching)))
            ]
        assert {
            frozenset(np.flatnonzero(component == c).tolist()) for c in np.unique(component)
        } == {frozenset(g[1]) for g in groups}
    taken = held_out(
        *connected(np.arange(1000, dtype=np.uint64), np.ones(1000, dtype=np.int64)), 0.25, 0
    )
    assert taken.sum() == 250


def test_teams():
    teams = Teams(np.array([5, 0, 7, 5, 0, 7, 5, 5], dtype=np.uint64), limit=3)
    assert [teams.of(i) for i in range(8) if not teams.follows[i]] == [
        [0, 3, 6],
        [1],
        [2, 5],
        [4],
        [7],
    ]


def test_ones_own_data(tmp_path):
    """Columns by flags, an encoding, lists of pictures, patients kept together; rows with a
    caption go to stage 1, with a question to stage 2, with both to both."""
    images = tmp_path / "images"
    images.mkdir()
    for name in "abcd":
        picture(images / f"{name}.png")
    rows = [
        ["1", "p1", "a.png;b.png", "图像可见双肺结节影", "", ""],
        ["2", "p1", "c.png", "", "这是什么检查？", "胸部CT"],
        ["3", "p2", "d.png", "右肺上叶可见斑片影", "病变在哪里？", "右肺上叶"],
    ]
    with open(tmp_path / "own.csv", "w", newline="", encoding="gb18030") as file:
        csv.writer(file).writerows([["编号", "病人", "图", "描述", "问", "答"], *rows])
    flags = [
        "--own",
        tmp_path / "own.csv",
        "--images",
        images,
        "--image-column",
        "图",
        "--caption-column",
        "描述",
        "--question-column",
        "问",
        "--answer-column",
        "答",
        "--id-column",
        "编号",
        "--group-column",
        "病人",
    ]
    assert "--encoding gb18030" in build(*flags, "--out", tmp_path / "out", check=2).stderr
    build(*flags, "--encoding", "gb18030", "--out", tmp_path / "out")
    alignment, instruction = (
        dialogs(tmp_path / "out/alignment.json"),
        dialogs(tmp_path / "out/instruction.json"),
    )
    assert [row["id"] for row in alignment] == ["own-1-caption", "own-3-caption"] and alignment[0][
        "image"
    ].startswith("composites/a-")
    assert [(row["id"], row["conversations"][1]["value"]) for row in instruction] == [
        ("own-2", "胸部CT"),
        ("own-3", "右肺上叶"),
    ]
    assert (
        "no '描述 2' in it"
        in build(
            *flags[:7], "描述 2", "--encoding", "gb18030", "--out", tmp_path / "x", check=2
        ).stderr
    )
    (tmp_path / "own.jsonl").write_text(
        json.dumps({"images": ["a.png", "b.png"], "caption": "两幅图像均可见结节"})
        + "\n"
        + json.dumps({"images": "c.png", "question": "是什么？", "answer": 3})
        + "\n"
    )
    build("--own", tmp_path / "own.jsonl", "--images", images, "--out", tmp_path / "out2")
    assert dialogs(tmp_path / "out2/instruction.json")[0]["conversations"][1]["value"] == "3"


def test_groups_and_articles_are_not_split(tmp_path):
    """Patients named by --group-column, articles named by pictures of different names, ./p.png
    and p.png: each on one side only."""
    images = tmp_path / "images"
    images.mkdir()
    for k in range(120):
        picture(images / f"PMC{k // 3}_Fig{k % 3}.jpg", (8, 8))
        picture(images / f"p{k}.png", (8, 8))
    write_table(
        tmp_path / "own.csv",
        ["image", "caption", "patient"],
        [[f"p{k}.png", f"第{k}例影像所见", f"P{k // 4}"] for k in range(120)]
        + [[f"./p{k}.png", f"第{k}例再次所见", f"Q{k}"] for k in range(120)],
    )
    (tmp_path / "oa.jsonl").write_text(
        "".join(
            json.dumps({"image": f"PMC{k // 3}_Fig{k % 3}.jpg", "caption": f"图像{k}显示肺部结节"})
            + "\n"
            for k in range(120)
        )
    )
    build(
        "--own",
        tmp_path / "own.csv",
        "--group-column",
        "patient",
        "--pmc-oa",
        tmp_path / "oa.jsonl",
        "--images",
        images,
        "--out",
        tmp_path / "out",
        "--val-fraction",
        0.3,
    )
    side = {
        row["id"].removesuffix("-caption"): name
        for name in ("alignment", "alignment-val")
        for row in dialogs(tmp_path / f"out/{name}.json")
    }
    assert len(side) == 360 and 60 < sum(name == "alignment-val" for name in side.values()) <= 108
    for k in range(120):
        assert (
            side[f"own-{k}"] == side[f"own-{k - k % 4}"] == side[f"own-{k + 120}"]
            and side[f"pmc-oa-{k}"] == side[f"pmc-oa-{k - k % 3}"]
        )


def test_one_folder_one_build(raw, tmp_path):
    """A second build of a folder that is being written is refused; links inside the picture
    folder are followed; a replaced picture is taken anew, whatever its date."""
    import fcntl

    (tmp_path / "out").mkdir()
    with open(tmp_path / "out/.lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert (
            "being written by another run"
            in build(*every_set(raw), "--out", tmp_path / "out", check=2).stderr
        )
    (raw / "images/PMC1000_Fig1_0.jpg").rename(raw / "images/real.jpg")
    (raw / "images/PMC1000_Fig1_0.jpg").symlink_to("real.jpg")
    build(*every_set(raw), "--out", tmp_path / "out")
    target = tmp_path / "out/images/PMC1000_Fig1_0.jpg"
    assert target.is_file() and not target.is_symlink()
    (raw / "images/PMC1000_Fig1_0.jpg").unlink()
    picture(raw / "images/PMC1000_Fig1_0.jpg", (31, 17))
    os.utime(raw / "images/PMC1000_Fig1_0.jpg", (1, 1))
    build(*every_set(raw), "--out", tmp_path / "out")
    assert Image.open(target).size == (31, 17)


def test_published_files_pass_through(tmp_path):
    """ChiMed-VL-Alignment.jsonl, -Instruction.json and multi-turn -Chat.json as released are
    built into the same dialogs, and train.py reads them as they are."""
    images = tmp_path / "images"
    images.mkdir()
    for name in ("PMC1_a.jpg", "PMC1_b.jpg"):
        picture(images / name)
    turn = lambda who, text: {"from": who, "value": text}  # noqa: E731
    chat = [
        {
            "id": "c1",
            "image": "PMC1_a.jpg",
            "conversations": [
                turn("human", "这是什么？\n<image>"),
                turn("gpt", "CT图像。"),
                turn("human", "有何异常？"),
                turn("gpt", "未见异常。"),
            ],
        },
        {
            "id": 2,
            "conversations": [turn("human", "你好"), turn("gpt", "你好，请问有什么可以帮您？")],
        },
        {
            "id": "bad",
            "image": "PMC1_a.jpg",
            "conversations": [turn("human", "这是什么？"), turn("gpt", "图像。")],
        },
    ]
    (tmp_path / "chat.json").write_text(json.dumps(chat, ensure_ascii=False), encoding="utf-8")
    (tmp_path / "alignment.jsonl").write_text(
        json.dumps(
            {
                "id": "a1",
                "image": "PMC1_b.jpg",
                "conversations": [turn("human", "<image>\n请描述"), turn("gpt", "胸片。")],
            }
        )
        + "\n"
    )
    build(
        "--chimed-instruction",
        tmp_path / "chat.json",
        "--chimed-alignment",
        tmp_path / "alignment.jsonl",
        "--images",
        images,
        "--out",
        tmp_path / "out",
    )
    rows = dialogs(tmp_path / "out/instruction.json")
    assert [row["conversations"] for row in rows] == [
        row["conversations"] for row in chat[:2]
    ] and "image" not in rows[1]
    assert manifest(tmp_path / "out")["counts"]["instruction"]["chimed-instruction"]["dropped"] == {
        "<image> and pictures do not agree": 1
    }
    assert len(dialogs(tmp_path / "out/alignment.json")) == 1


def test_texts_are_cleaned(tmp_path):
    """Entities, control characters, half surrogates and a literal <image>, which would eat the
    next sample's picture."""
    (tmp_path / "images").mkdir()
    picture(tmp_path / "images/PMC1_a.jpg")
    text = "P &lt; 0.05 CT\u0000图像<image>显示&lt;image&gt;结节\ud800与\u2028钙化 &amp; 空洞"
    (tmp_path / "oa.jsonl").write_text(json.dumps({"image": "PMC1_a.jpg", "caption": text}) + "\n")
    build(
        "--pmc-oa",
        tmp_path / "oa.jsonl",
        "--images",
        tmp_path / "images",
        "--out",
        tmp_path / "out",
    )
    assert (
        dialogs(tmp_path / "out/alignment.json")[0]["conversations"][1]["value"]
        == "P < 0.05 CT 图像显示结节与 钙化 & 空洞"
    )


def test_untranslated_rows(raw, tmp_path):
    assert (
        "English that was not translated" in build(*every_set(raw), "--out", tmp_path / "a").stderr
    )
    done = build(*every_set(raw), "--out", tmp_path / "b", "--require-chinese", check=2)
    assert "not Chinese" in done.stderr


def test_a_stopped_build_makes_no_picture_twice(raw, tmp_path):
    out = tmp_path / "out"
    build(*every_set(raw), "--out", out)
    before = {path: path.stat().st_ino for path in (out / "images").rglob("*.jpg")}
    (out / "alignment.json").unlink()
    build(*every_set(raw), "--out", out)
    assert {path: path.stat().st_ino for path in (out / "images").rglob("*.jpg")} == before and (
        out / "alignment.json"
    ).is_file()
    os.utime(raw / "images/PMC2001_FIG0.jpg", (2e9, 2e9))  # a picture that changed is joined again
    build(*every_set(raw), "--out", out)
    assert {path for path, inode in before.items() if path.stat().st_ino != inode} == {
        path for path in before if "PMC2001_FIG0-" in path.name
    }


def test_it_feeds_training(raw, tmp_path, toy):
    """build's folder is what train.py takes: three steps of stage 1 on it."""
    build(*every_set(raw), "--out", tmp_path / "data")
    done = subprocess.run(
        [
            sys.executable,
            ROOT / "train.py",
            "--stage",
            "1",
            "--llm",
            toy / "llama",
            "--vision",
            toy / "clip",
            "--data",
            tmp_path / "data/alignment.json",
            "--images",
            tmp_path / "data/images",
            "--out",
            tmp_path / "run",
            "--batch-size",
            "4",
            "--max-steps",
            "3",
            "--max-length",
            "1024",
            "--workers",
            "0",
        ],
        capture_output=True,
        text=True,
        timeout=200,
        env=dict(os.environ, OMP_NUM_THREADS="1"),
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert (tmp_path / "run/final/projector.safetensors").is_file()
