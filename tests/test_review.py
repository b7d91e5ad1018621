"""Promise: `review` shows a doctor a fair sample with picture, English and Chinese on one page that
needs nothing else; --import applies every decision and counts them.
"""

import csv
import io
import json
import re
import shutil
from html.parser import HTMLParser

import pytest
from raw_sets import chinese_of, make_raw, prep

from chimed.review import shares
from common.intervals import wilson
from common.rows import Records


@pytest.fixture
def translated(tmp_path):
    """zh/pmc_oa.jsonl and zh/case.csv of 10 articles, from finished translations."""
    raw = make_raw(tmp_path / "raw", n=10)
    for name, source, fields in (
        ("pmc_oa.jsonl", "--pmc-oa", ["caption"]),
        ("case.csv", "--pmc-casereport", ["context", "question", "answer", "inline"]),
    ):
        rows = [
            {k: row[k].removeprefix("Q: ").removeprefix("A: ") for k in fields}
            for row in Records(raw / name)
        ]
        given = tmp_path / "given.jsonl"
        given.write_text(
            "".join(
                json.dumps({"english": row, "chinese": {k: chinese_of(v) for k, v in row.items()}})
                + "\n"
                for row in rows
            )
        )
        prep("translate", source, raw / name, "--out", tmp_path / "zh", "--translations", given)
    return tmp_path / "zh/pmc_oa.jsonl", tmp_path / "zh/case.csv"


def read_table(path):
    return list(csv.DictReader(io.StringIO(path.read_bytes().decode("utf-8-sig"), newline="")))


def write_filled(path, rows, encoding="utf-8-sig"):
    with open(path, "w", newline="", encoding=encoding) as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


class Page(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.tags, self.pairs = [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))


def test_the_page_and_the_table(translated, tmp_path):
    done = prep(
        "review",
        *translated,
        "--images",
        tmp_path / "raw/images",
        "--n",
        12,
        "--out",
        tmp_path / "review",
    )
    rows = read_table(tmp_path / "review/review.csv")
    samples = {(row["file"], row["key"]) for row in rows}
    assert (
        len(samples) == 12 and "4 of 10" in done.stdout and "8 of 20" in done.stdout
    )  # in proportion: 10 captions, 20 case rows
    assert all(row["chinese"] == chinese_of(row["english"]) for row in rows)
    page = (tmp_path / "review/review.html").read_text(encoding="utf-8")
    tags = Page(page).tags
    sources = [attributes["src"] for tag, attributes in tags if tag == "img"]
    assert len(sources) >= 12 and all(
        source.startswith("data:image/jpeg;base64,") for source in sources
    )
    assert not re.search(r'(?:src|href)="(?!data:)', page) and "http" not in page.replace(
        "http-equiv", ""
    )  # nothing is fetched
    pairs = [attributes for tag, attributes in tags if attributes.get("class") == "pair"]
    assert [(p["data-key"], p["data-field"], p["data-chinese"]) for p in pairs] == [
        (row["key"], row["field"], row["chinese"]) for row in rows
    ]
    radios = [attributes["value"] for tag, attributes in tags if attributes.get("type") == "radio"]
    assert radios == ["accept", "fix", "reject"] * len(rows)
    again = prep("review", *translated, "--n", 12, "--out", tmp_path / "again")
    assert read_table(tmp_path / "again/review.csv") == rows and again.returncode == 0
    prep("review", *translated, "--n", 12, "--seed", 1, "--out", tmp_path / "other")
    assert {
        (row["file"], row["key"]) for row in read_table(tmp_path / "other/review.csv")
    } != samples


@pytest.mark.parametrize(
    "encoding, words",
    [
        ("utf-8-sig", ("accept", "fix", "reject")),
        ("gb18030", ("\u63a5\u53d7", "\u4fee\u6539", "\u62d2\u7edd")),
    ],
)
def test_decisions_come_back(translated, tmp_path, encoding, words):
    """Of 30 rows: 1 rejected, 2 fixed, 1 left open, the others accepted: the files hold just that,
    and the report says 26 of 29 with Wilson's interval.
    """
    prep("review", *translated, "--n", 30, "--out", tmp_path / "review")  # all of them
    rows = read_table(tmp_path / "review/review.csv")
    order = list(dict.fromkeys((row["file"], row["key"]) for row in rows))
    before = {str(path): list(Records(path)) for path in translated}
    for row in rows:
        k = order.index((row["file"], row["key"]))
        row["verdict"] = words[2] if k == 0 else "" if k == 3 else words[0]
        if k in (1, 2) and row["field"] in ("caption", "context"):
            row["verdict"], row["fixed"] = (
                words[1],
                row["chinese"].rstrip("\u3002") + "\uff0c\u5df2\u6539\u3002",
            )
    write_filled(tmp_path / "filled.csv", rows, encoding)
    for _ in range(2):  # the same import twice changes nothing more
        done = prep("review", *translated, "--import", tmp_path / "filled.csv")
    low, high = wilson(26, 29)
    assert f"| all | 29 | 26 (89.7%) | {low:.1%} to {high:.1%} | 2 | 1 | 1 |" in done.stdout
    report = json.loads((tmp_path / "filled.report.json").read_text())["all"]
    assert report["accepted"] == 26 and report["interval"] == [low, high]
    for path in translated:
        column, unique = (
            ("caption", "caption") if path.suffix == ".jsonl" else ("context", "question")
        )
        keys = {
            row["chinese"]: (row["file"], row["key"])
            for row in rows
            if row["file"] == str(path) and row["field"] == unique
        }
        fixed = {(row["file"], row["key"]): row["fixed"] for row in rows if row["fixed"]}
        kept = [record for record in before[str(path)] if keys[record[unique]] != order[0]]
        assert [record[column] for record in Records(path)] == [
            fixed.get(keys[record[unique]], record[column]) for record in kept
        ]


@pytest.mark.parametrize(
    "change, words",
    [
        ({"verdict": "maybe"}, "row 2: verdict 'maybe'"),
        ({"verdict": "fix", "fixed": " "}, "row 2: fix without a text"),
        ({"key": "00ff00ff00ff00ff", "verdict": "accept"}, "is no row of"),
        ({"file": "other.csv"}, "is not among the files"),
        ({"field": "colour", "verdict": "accept"}, "no field 'colour'"),
    ],
)
def test_a_bad_table_changes_nothing(translated, tmp_path, change, words):
    prep("review", *translated, "--n", 5, "--out", tmp_path / "review")
    rows = read_table(tmp_path / "review/review.csv")
    rows[0].update(change)
    write_filled(tmp_path / "filled.csv", rows)
    before = [path.read_bytes() for path in translated]
    done = prep("review", *translated, "--import", tmp_path / "filled.csv", code=2)
    assert (
        words in done.stderr
        and len(done.stderr.strip().splitlines()) == 1
        and [path.read_bytes() for path in translated] == before
    )


def test_arithmetic():
    """Wilson's interval of 45 of 50 and of 0 of 10 (Wilson 1927; the textbook's figures), and
    shares by largest remainder.
    """
    assert [round(x, 4) for x in wilson(45, 50)] == [0.7864, 0.9565] and [
        round(x, 4) for x in wilson(0, 10)
    ] == [0.0, 0.2775]
    assert (
        shares([100, 300, 600], 10) == [1, 3, 6]
        and shares([1, 1000], 10) == [1, 9]
        and shares([5, 5], 100) == [5, 5]
        and sum(shares([333, 333, 334], 100)) == 100
    )


def test_a_doctor_reviews_in_a_browser(translated, tmp_path):
    """What is accepted, fixed and rejected on the page is kept over a reload, saved as the table
    that --import reads, and applied.
    """
    playwright = pytest.importorskip("playwright.sync_api")
    prep(
        "review",
        *translated,
        "--images",
        tmp_path / "raw/images",
        "--n",
        4,
        "--out",
        tmp_path / "review",
    )
    with playwright.sync_playwright() as browsers:
        try:
            browser = browsers.chromium.launch(
                executable_path=shutil.which("chromium") or shutil.which("google-chrome"),
                args=["--no-sandbox"],
            )
        except Exception as error:
            pytest.skip(f"no chromium: {str(error)[:80]}")
        page, complaints = browser.new_page(), []
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.goto((tmp_path / "review/review.html").as_uri())
        pairs = page.locator(".pair")
        for k in range(pairs.count()):
            pairs.nth(k).locator("input[value=accept]").check()
        pairs.nth(0).locator("textarea").fill('他说"好"，已改。')  # turns accept into fix by itself
        pairs.nth(1).locator("input[value=reject]").check()
        pairs.nth(1).locator(".note").fill("=1+1, no")
        page.reload()
        assert (
            pairs.nth(0).locator("input[value=fix]").is_checked()
            and page.locator("article.done").count() == 4
        )
        with page.expect_download() as download:
            page.click("#save")
        download.value.save_as(tmp_path / "filled.csv")
        browser.close()
    assert not complaints
    rows = read_table(tmp_path / "filled.csv")
    assert (
        [row["verdict"] for row in rows[:3]] == ["fix", "reject", "accept"]
        and rows[0]["fixed"] == '他说"好"，已改。'
        and rows[1]["note"] == "=1+1, no"
    )
    assert [row["chinese"] for row in rows] == [
        row["chinese"] for row in read_table(tmp_path / "review/review.csv")
    ]
    done = prep("review", *translated, "--import", tmp_path / "filled.csv")
    assert "| all | 4 |" in done.stdout
