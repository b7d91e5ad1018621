"""Promise: answers that were given elsewhere stand beside those of folders and endpoints, each
under its own question or not at all; Figure 4 of the paper comes in its form from any mixture.
"""

import json
import re

import pytest
from PIL import Image
from test_compare import Server, write_questions
from test_compare import ask as compare

QUESTIONS = [
    (["a.png"], "图中有什么异常？", "左肺结节。"),
    (["b.png"], "病灶在哪里？", "右肾。"),
    (["a.png", "b.png"], "两张图相同吗？", "不同。"),
    (["c.png"], "病灶在哪里？", "肝。"),
]
ANSWERS = ["结节影。", "左肾。", "相同。", "肝右叶。"]


@pytest.fixture
def world(tmp_path):
    """questions.json: id-0 to id-3, of which two ask the same of other pictures."""
    (tmp_path / "images").mkdir()
    for name in "abc":
        Image.new("RGB", (40, 30), "gray").save(tmp_path / f"images/{name}.png")
    write_questions(tmp_path / "questions.json", QUESTIONS)
    return tmp_path


def write_lines(path, rows, start=""):
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    path.write_text(start + lines, encoding="utf-8")
    return path


def shown(world, name="Elsewhere"):
    """What compare.md has for a system, question by question."""
    text = (world / "out/compare.md").read_text(encoding="utf-8")
    # the first row of the name says where its answers are from
    return re.findall(rf"^\| {name} \| (.*) \|$", text, re.MULTILINE)[1:]


FORMS = {
    "ids": lambda i: {"id": f"id-{i}", "answer": ANSWERS[i]},
    "other names": lambda i: {"question_id": f"id-{i}", "Response": ANSWERS[i]},
    "questions": lambda i: {
        "question": QUESTIONS[i][1],
        "image": [f"x/{name}" for name in QUESTIONS[i][0]],
        "text": ANSWERS[i],
    },
    "questions with marks": lambda i: {
        "prompt": f"<image>\n{QUESTIONS[i][1]} ",
        "image": ";".join(QUESTIONS[i][0]),
        "output": f" {ANSWERS[i]}\n",
    },
    "our predictions": lambda i: {
        "row": i,
        "id": f"id-{i}",
        "image": QUESTIONS[i][0],
        "question": "<image>\n" * len(QUESTIONS[i][0]) + QUESTIONS[i][1],
        "truth": QUESTIONS[i][2],
        "seen": {"likelihood": [[-1, 2]], "answer": ANSWERS[i]},
        "blind": {"likelihood": [[-1, 2]], "answer": "看不见。"},
    },
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_is_read(world, form):
    """In any order, with a byte-order mark: each answer under its own question."""
    rows = [FORMS[form](i) for i in (2, 0, 3, 1)]
    file = write_lines(world / "answers.jsonl", rows, start="\ufeff")
    compare(world, f"Elsewhere={file}")
    assert shown(world) == ANSWERS


def test_tables_and_keys(world):
    """A table of a spreadsheet; FILE#KEY names the answer's column; a list of JSON."""
    table = world / "answers.csv"
    lines = ["id,Qwen,VisCPM"] + [f"id-{i},{answer},另一个" for i, answer in enumerate(ANSWERS)]
    table.write_text("\r\n".join(lines), encoding="utf-8-sig")
    compare(world, f"Elsewhere={table}#qwen", f"VisCPM={table}#VisCPM")
    assert shown(world) == ANSWERS
    assert shown(world, "VisCPM") == ["另一个"] * 4
    lines = [FORMS["our predictions"](i) for i in range(4)]
    file = write_lines(world / "predictions.jsonl", lines)
    compare(world, f"Elsewhere={file}#blind")
    assert shown(world) == ["看不见。"] * 4


def test_numbers_as_pandas_writes_them(world):
    """1.0 is question 1."""
    rows = json.loads((world / "questions.json").read_text())
    for i, row in enumerate(rows):
        row["id"] = i
    (world / "questions.json").write_text(json.dumps(rows))
    table = world / "answers.csv"
    lines = ["id,answer"] + [f"{i}.0,{answer}" for i, answer in enumerate(ANSWERS)]
    table.write_text("\n".join(lines), encoding="utf-8")
    compare(world, f"Elsewhere={table}")
    assert shown(world) == ANSWERS


def test_a_blind_page_has_no_figure_beside_it(world):
    file = write_lines(world / "answers.jsonl", [FORMS["ids"](i) for i in range(4)])
    systems = [f"One={file}", f"Two={file}"]
    done = compare(world, *systems, code=2, more=("--blind", "--figure"))
    assert "--figure names the systems" in done.stderr
    assert not (world / "out").exists()


def test_an_edited_file_gives_its_new_answer(world):
    """Nothing of an earlier run is kept for it."""
    file = write_lines(world / "answers.jsonl", [FORMS["ids"](i) for i in range(4)])
    compare(world, f"Elsewhere={file}")
    rows = [FORMS["ids"](i) | {"answer": f"新{i}"} for i in range(4)]
    write_lines(file, rows)
    compare(world, f"Elsewhere={file}")
    assert shown(world) == ["新0", "新1", "新2", "新3"]


def test_a_prediction_is_not_taken_for_the_truth_beside_it(world):
    """Many files have the truth under "answer", and the model's own beside it, in either order."""
    rows = [{"id": f"id-{i}", "answer": "真", "pred": ANSWERS[i], "text": "?"} for i in range(4)]
    rows[1] = {"response": ANSWERS[1], "answer": "真", "id": "id-1"}
    file = write_lines(world / "answers.jsonl", rows)
    compare(world, f"Elsewhere={file}")
    assert shown(world) == ANSWERS


def test_a_row_without_its_answer_is_a_question_without_one(world):
    """A null, an empty cell: the others are shown, and the cell says that there is none."""
    rows = [FORMS["ids"](i) for i in range(4)]
    rows[2]["answer"] = None
    file = write_lines(world / "answers.jsonl", rows)
    table = world / "answers.csv"
    table.write_text("id,answer\nid-0,一\nid-1,\nid-2,三\nid-3,四\n", encoding="utf-8")
    compare(world, f"Elsewhere={file}", f"Table={table}#answer", f"Same={table}", code=1)
    cells = shown(world)
    assert cells[:2] + cells[3:] == ANSWERS[:2] + ANSWERS[3:] and "no answer in" in cells[2]
    for name in ("Table", "Same"):
        cells = shown(world, name)
        assert cells[0] == "一" and "no answer in" in cells[1] and cells[2:] == ["三", "四"]


def test_a_gap_of_pandas_is_no_answer(world):
    """json.dumps of a data frame's gap is NaN, which JSON in Python reads as a number."""
    rows = [FORMS["ids"](i) for i in range(4)]
    rows[1]["answer"] = float("nan")
    rows[2]["question"] = float("nan")
    file = write_lines(world / "answers.jsonl", rows)
    compare(world, f"Elsewhere={file}", f"Named={file}#answer", code=1)
    for name in ("Elsewhere", "Named"):
        cells = shown(world, name)
        assert "no answer in" in cells[1] and cells[2:] == ANSWERS[2:]


def test_what_is_missing_or_unclear_is_said(world):
    """No answer, two of them, another question under the id: the cell says so, exit code 1; answers
    of unknown questions are counted."""
    rows = [
        {"id": "id-0", "answer": "一"},
        {"id": "id-0", "answer": "二"},
        {"id": "id-1", "question": "别的问题？", "answer": "三"},
        {"id": "id-3", "answer": "四"},
        {"id": "id-99", "answer": "五"},
    ]
    file = write_lines(world / "answers.jsonl", rows)
    done = compare(world, f"Elsewhere={file}", code=1)
    cells = shown(world)
    assert "2 answers in" in cells[0] and "rows 0, 1" in cells[0]
    assert "row 2 has this id, but another question" in cells[1]
    assert "no answer in" in cells[2]
    assert cells[3] == "四"
    assert "Elsewhere: 1 of 5 answers are of no question" in done.stderr


@pytest.mark.parametrize(
    "content, words",
    [
        ("", ["it has no rows"]),
        ('{"id": "id-0"}', ["row 0", "no answer", "'id'"]),
        ('{"answer": "x", "n": 1}', ["row 0", "neither an id nor a question", "'answer', 'n'"]),
        ('{"id": "id-0", "answer": ["x"]}', ["row 0", "no answer"]),
        ('{"id": "id-0", "answer": "x"}\n{"id": "id', ["answers.jsonl"]),
        ("\x00\x01\x02", ["answers.jsonl"]),
    ],
)
def test_bad_files_are_one_line(world, content, words):
    file = world / "answers.jsonl"
    file.write_text(content)
    done = compare(world, f"Elsewhere={file}", code=2)
    assert len(done.stderr.strip().splitlines()) == 1
    for word in ["Elsewhere", *words]:
        assert word in done.stderr


def test_ids_of_several_questions_need_the_question(world):
    rows = json.loads((world / "questions.json").read_text())
    rows[3]["id"] = "id-1"
    (world / "questions.json").write_text(json.dumps(rows))
    file = write_lines(world / "answers.jsonl", [FORMS["ids"](i) for i in range(3)])
    done = compare(world, f"Elsewhere={file}", code=2)
    assert "row 1: 2 questions of the test set have the id 'id-1'" in done.stderr
    # with question and picture they are told apart
    lines = [FORMS["our predictions"](i) for i in range(4)]
    lines[3]["id"] = "id-1"
    write_lines(file, lines)
    compare(world, f"Elsewhere={file}")
    assert shown(world) == ANSWERS


# --- Figure 4 -------------------------------------------------------------------------------------

ENGLISH = {
    "图中有什么异常？": "What is abnormal?",
    "结节影。": "A nodule.",
    "左肺结节。": "Nodule, left.",
}


def glosses(world):
    file = world / "glosses.csv"
    lines = ["Chinese,English"] + [f'{zh},"{en}"' for zh, en in ENGLISH.items()]
    file.write_text("\n".join(lines), encoding="utf-8")
    return file


def test_figure_4_of_a_mixture(world):
    """An endpoint and two files: every text of every system under its name, English beneath, three
    cases a page, nothing fetched from anywhere."""
    first = write_lines(world / "one.jsonl", [FORMS["ids"](i) for i in range(4)])
    second = write_lines(
        world / "two.jsonl", [{"id": f"id-{i}", "answer": "<b>Mass & more"} for i in range(4)]
    )
    with Server() as endpoint:
        done = compare(
            world,
            f"One={first}",
            f"Two={second}",
            f"Served={endpoint.url}#m",
            more=("--figure", "--glosses", glosses(world)),
        )
    assert "4 cases, 3 a page" in done.stdout
    page = (world / "out/figure4.html").read_text(encoding="utf-8")
    cases = re.findall(r'<section class="(.*?)">(.*?)</section>', page, re.DOTALL)
    assert [place for place, _ in cases] == ["case", "case", "case last", "case"]
    for i, (_, case) in enumerate(cases):
        names = [re.sub("<.*?>", "", name) for name in re.findall(r"<th>(.*?)</th>", case)]
        assert names == ["问题 question", "One", "Two", "Served", "参考答案 ground truth"]
        assert case.count("<img") == len(QUESTIONS[i][0])
        words = re.sub("<.*?>", "", case)
        assert f"CN: {QUESTIONS[i][1]}" in words
        assert f"CN: {ANSWERS[i]}" in words
        assert f"CN: {QUESTIONS[i][2]}" in words
        assert "EN: &lt;b&gt;Mass &amp; more" in words
        assert "see: " in words
    first_case = re.sub("<.*?>", "", cases[0][1])
    for english in ENGLISH.values():
        assert f"EN: {english}" in first_case
    # pictures are inside, and no program
    assert set(re.findall(r'src="(.{10})', page)) == {"data:image"}
    assert "<script" not in page and "http://" not in page.replace(endpoint.url, "")


def test_a_long_answer_is_whole(world):
    answer = "很长的回答，" * 400
    rows = [FORMS["ids"](i) | {"answer": answer} for i in range(4)]
    file = write_lines(world / "answers.jsonl", rows)
    compare(world, f"One={file}", more=("--figure",))
    assert (world / "out/figure4.html").read_text(encoding="utf-8").count(answer) == 4


def test_glosses_that_are_none_are_refused(world):
    file = write_lines(world / "answers.jsonl", [FORMS["ids"](i) for i in range(4)])
    bad = world / "g.csv"
    bad.write_text("zh,en\n好,good\n", encoding="utf-8")
    done = compare(world, f"One={file}", more=("--glosses", bad), code=2)
    assert "no columns chinese and english" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_blind_pages_take_them_too(world):
    """Two files, ranked without names."""
    one = write_lines(world / "one.jsonl", [FORMS["ids"](i) for i in range(4)])
    two = write_lines(world / "two.jsonl", [FORMS["ids"](i) | {"answer": "无"} for i in range(4)])
    compare(world, f"One={one}", f"Two={two}", more=("--blind",))
    page = (world / "out/blind.html").read_text(encoding="utf-8")
    assert page.count('class="answer"') == 8
    assert "One" not in page and "one.jsonl" not in page
