"""Promise: pictures that share one text become one composite, whether or not their article is
known, and what only looks shared joins nobody: each row is joined, kept or dropped, and counted.
"""

import json

import numpy as np
import pytest
import synthetic
from PIL import Image
from raw_sets import prep

FIGURE = "胸部增强CT示右肺上叶分叶状肿块，边缘毛刺，邻近胸膜牵拉。"
OTHER = "腹部超声示肝右叶低回声结节，边界清楚，周边可见血流信号。"


def build(tmp_path, rows, *options):
    """(dialogs, counts of PMC-OA, "joining" of the manifest, what was printed) of some rows."""
    data = tmp_path / "oa.jsonl"
    lines = [
        json.dumps({"image": name, "caption": text}, ensure_ascii=False) for name, text in rows
    ]
    data.write_text("\n".join(lines) + "\n", encoding="utf-8")
    out = tmp_path / "built"
    done = prep("build", "--pmc-oa", data, "--skip-pictures", "--out", out, *options, code=0)
    manifest = json.loads((out / "manifest.json").read_text())
    dialogs = []
    for name in manifest["outputs"]:
        dialogs += json.loads((out / name).read_text())
    return dialogs, manifest["counts"]["alignment"]["pmc-oa"], manifest["joining"], done.stdout


def pairs_of(article, n, text, figure=1):
    """n pictures of one article with one text; "" where the article is not known."""
    start = f"PMC{article}_" if article else "x"
    return [(f"{start}Fig{figure}_{i}_{text[-3:-1]}.jpg", text) for i in range(n)]


@pytest.mark.parametrize("article", [77, ""])
@pytest.mark.parametrize("n", [2, 4])
def test_one_text_one_composite(tmp_path, article, n):
    """With an article and without; the other text stays alone."""
    rows = [*pairs_of(article, n, FIGURE), *pairs_of(article, 1, OTHER, figure=2)]
    dialogs, counts, joining, _ = build(tmp_path, rows)
    assert len(dialogs) == 2
    assert dialogs[0]["image"].startswith("composites/")
    assert dialogs[1]["image"] == rows[-1][0]
    assert counts["joined"] == joining["joined"] == n - 1
    assert joining["too_general"] == 0


def test_a_text_is_the_same_written_a_little_differently(tmp_path):
    rows = [
        ("a.jpg", "Chest CT of a lobulated mass in the right upper lobe with spiculated margins."),
        ("b.jpg", "chest CT of a lobulated  mass in the right upper lobe with spiculated margins"),
        ("c.jpg", "Chest CT of a lobulated mass in the left upper lobe with spiculated margins."),
    ]
    dialogs, counts, _, _ = build(tmp_path, rows)
    assert counts["joined"] == 1
    assert len(dialogs) == 2


@pytest.mark.parametrize(
    "rows, n_general",
    [
        # what many figures are called, of one article too
        (pairs_of(5, 3, "胸部CT扫描图像"), 3),
        (pairs_of("", 3, "Chest CT scan"), 3),
        # a sentence that many patients have, where nobody says whose it is
        (pairs_of("", 3, "胸部CT平扫未见明显异常。"), 3),
        # a long text of more rows than a figure has pictures
        (pairs_of("", 5, FIGURE), 5),
        # two articles, and one that is not known beside one that is
        ([*pairs_of(5, 1, FIGURE), *pairs_of(6, 1, FIGURE)], 0),
        ([*pairs_of(5, 1, FIGURE), *pairs_of("", 1, FIGURE)], 0),
    ],
)
def test_what_only_looks_shared_joins_nobody(tmp_path, rows, n_general):
    """All rows are kept, each for itself; those of a general text are counted and told."""
    dialogs, counts, joining, printed = build(tmp_path, rows)
    assert len(dialogs) == counts["kept"] == len(rows)
    assert [dialog["image"] for dialog in dialogs] == [name for name, _ in rows]
    assert joining == {"joined": 0, "too_general": n_general}
    assert (f"not joined: {n_general} rows" in printed) == bool(n_general)


def test_more_than_four_of_one_article_are_dropped(tmp_path):
    """The paper's rule (section 3.3), where the article says that they are one figure."""
    rows = [*pairs_of(5, 5, FIGURE), *pairs_of(5, 1, OTHER)]
    dialogs, counts, _, _ = build(tmp_path, rows)
    assert len(dialogs) == 1
    assert counts["dropped"] == {"more than 4 pictures": 5}


def test_own_rows_and_case_reports_are_not_joined(tmp_path):
    """A hospital's sentence is that of hundreds of patients; a row names its pictures itself."""
    data = tmp_path / "own.jsonl"
    rows = [{"image": f"{i}.png", "caption": FIGURE, "patient": "1"} for i in range(3)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    prep(
        "build",
        "--own",
        data,
        "--group-column",
        "patient",
        "--skip-pictures",
        "--out",
        tmp_path / "b",
        code=0,
    )
    assert len(json.loads((tmp_path / "b/alignment.json").read_text())) == 3


def test_a_composite_without_an_article_is_made(tmp_path):
    """Side by side: two squares of one height."""
    images = tmp_path / "images"
    images.mkdir()
    for name in "ab":
        Image.new("RGB", (30, 30)).save(images / f"{name}.png")
    data = tmp_path / "oa.jsonl"
    rows = [{"image": f"{name}.png", "caption": FIGURE} for name in "ab"]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    prep("build", "--pmc-oa", data, "--images", images, "--out", tmp_path / "b", code=0)
    row = json.loads((tmp_path / "b/alignment.json").read_text())[0]
    with Image.open(tmp_path / "b/images" / row["image"]) as composite:
        assert composite.size == (60, 30)


def random_rows(rng, n_figures):
    """(rows, the truth: the figure of each): figures of 1 to 4 pictures, half of them without an
    article, among rows that share short or frequent captions."""
    texts = synthetic.Texts(int(rng.integers(1000)))
    rows = []
    truth = []
    for figure in range(n_figures):
        n = int(rng.integers(1, 5))
        article = f"PMC{figure // 3}_" if rng.random() < 0.5 else ""
        text = f"{texts.cut(60)}第{figure}例。"
        for part in range(n):
            rows.append((f"{article}{figure}_{part}.jpg", text))
            truth.append(figure)
    general = ["胸部CT平扫", "Figure 1", "CT scan", "术后复查", "双肺未见明显异常。", "图2A"]
    often = [f"{texts.cut(40)}复查。" for _ in range(3)]
    for k in range(n_figures):
        rows.append((f"g{k}.jpg", general[k % len(general)]))
        truth.append(n_figures + 2 * k)
        rows.append((f"o{k}.jpg", often[k % len(often)]))
        truth.append(n_figures + 2 * k + 1)
    order = rng.permutation(len(rows))
    return [rows[i] for i in order], [truth[i] for i in order]


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_set_whose_truth_is_known(tmp_path, seed):
    """All that is joined belongs together, and all that belongs together is joined, in a shuffled
    set of repeated captions; the same for any number of workers."""
    rows, truth = random_rows(np.random.default_rng(seed), 60)
    figure_of = {name: figure for (name, _), figure in zip(rows, truth, strict=True)}
    members = {}
    for name, figure in figure_of.items():
        members.setdefault(figure, []).append(name)
    dialogs, counts, joining, _ = build(tmp_path, rows)
    n_figures = sum(len(names) > 1 for names in members.values())
    n_joined = sum(len(names) - 1 for names in members.values())
    assert counts["joined"] == joining["joined"] == n_joined
    composites = [row for row in dialogs if row["image"].startswith("composites/")]
    assert len(composites) == n_figures > 20
    # the text of a composite is that of one figure, which no single picture has any more
    alone = {row["image"] for row in dialogs} - {row["image"] for row in composites}
    for name in alone:
        assert len(members[figure_of[name]]) == 1, name
    # too short to be learnt at all, or kept for itself
    n_general = sum(name[0] in "go" for name in figure_of)
    n_dropped = sum(counts["dropped"].values())
    assert joining["too_general"] == n_general
    assert counts["kept"] + n_joined + n_dropped == len(rows)

    (tmp_path / "again").mkdir()
    again = build(tmp_path / "again", rows, "--workers", "2")[0]
    assert again == dialogs


def test_a_composite_stays_on_one_side(tmp_path):
    """Rows without an article that share a text, of which one has a picture in common with a third
    row: all three are held out, or none."""
    rows = []
    for i in range(40):
        text = f"{FIGURE[:-1]}，第{i}例。"
        other = f"{OTHER[:-1]}，第{i}例。"
        rows += [(f"{i}a.jpg", text), (f"{i}b.jpg", text), (f"{i}b.jpg", other)]
    data = tmp_path / "oa.jsonl"
    lines = [json.dumps({"image": name, "caption": text}) for name, text in rows]
    data.write_text("\n".join(lines))
    out = tmp_path / "built"
    prep(
        "build",
        "--pmc-oa",
        data,
        "--skip-pictures",
        "--val-fraction",
        0.3,
        "--out",
        out,
        code=0,
    )
    sides = {}
    for name in ("alignment.json", "alignment-val.json"):
        for row in json.loads((out / name).read_text()):
            number = row["conversations"][1]["value"].split("第")[1]
            sides.setdefault(number, set()).add(name)
    assert len(sides) == 40
    assert all(len(names) == 1 for names in sides.values())
    assert len({min(names) for names in sides.values()}) == 2
