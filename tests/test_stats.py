"""Promise: `stats` counts built files with the chosen tokenizer, exactly, as the paper's Tables 1
and 2 do (a case report with both its texts, whichever is trained), and draws its figures."""

import json
import re
from collections import Counter
from pathlib import Path

import matplotlib
import numpy as np
import pytest
from PIL import Image
from raw_sets import OA, make_raw, prep

from chimed import stats
from chimed.case_reports import NoCaseReports, find_case_reports
from chimed.prompts import MODALITIES, VQA
from chimed.sources import own_question
from chimed.stats import find_font, has_chinese, modality_of, quantile
from common.rows import Records
from model_io.tokens import Tokenizer


def test_quantiles_are_exact():
    """As numpy.quantile of all numbers, from counts alone."""
    rng = np.random.default_rng(0)
    for n in (1, 2, 3, 10, 999, 5000):
        numbers = rng.integers(0, 300, n)
        for p in (0, 0.25, 0.5, 0.75, 0.995, 1):
            assert quantile(Counter(numbers.tolist()), p) == pytest.approx(
                np.quantile(numbers, p), abs=1e-9
            )


def test_the_papers_tables(tmp_path, toy):
    """Every figure counted again here, plainly."""
    raw = make_raw(tmp_path / "raw", n=9)
    out = tmp_path / "built"
    prep(
        "build",
        "--pmc-oa",
        raw / "pmc_oa.jsonl",
        "--pmc-casereport",
        raw / "case.csv",
        "--pmc-vqa",
        raw / "train_2.csv",
        "--images",
        raw / "images",
        "--out",
        out,
        "--alignment-text",
        "both",
    )
    done = prep(
        "stats",
        "--alignment",
        out / "alignment.json",
        "--instruction",
        out / "instruction.json",
        "--tokenizer",
        toy / "llama",
        "--out",
        tmp_path / "stats",
        "--no-figures",
    )
    report, tokenizer = (
        json.loads((tmp_path / "stats/stats.json").read_text()),
        Tokenizer(toy / "llama"),
    )
    texts = {}
    numbers = set()
    for row in Records(out / "alignment.json"):
        numbers.add(row["id"].rsplit("-", 1)[0])
        source = "PMC-OA" if row["id"].startswith("pmc-oa") else "PMC-CaseReport"
        texts.setdefault(("alignment", source, "C" if "context" in row["id"] else "I"), []).append(
            row["conversations"][1]["value"]
        )
    for row in Records(out / "instruction.json"):
        source = "PMC-VQA" if row["id"].startswith("pmc-vqa") else "PMC-CaseReport"
        question = row["conversations"][0]["value"]
        inner = [
            q
            for t in VQA
            for q in [
                question.removeprefix("<image>\n")
                .removeprefix(t.split("{question}")[0])
                .removesuffix(t.split("{question}")[1] or "\0")
            ]
            if q.startswith("What") and q.endswith("?")
        ]
        texts.setdefault(("instruction", source, "Q"), []).append(inner[0])
        texts.setdefault(("instruction", source, "A"), []).append(row["conversations"][1]["value"])
    for (subset, source, kind), values in texts.items():
        lengths = [len(tokenizer.encode(text)) for text in values]
        entry = report[subset][source][kind]
        assert (entry["texts"], entry["tokens"], entry["max"]) == (
            len(lengths),
            sum(lengths),
            max(lengths),
        )
        assert [entry["q1"], entry["median"], entry["q3"]] == np.quantile(
            lengths, [0.25, 0.5, 0.75]
        ).tolist()
    both = [
        len(tokenizer.encode(text))
        for (subset, _, kind), values in texts.items()
        if (subset, kind) == ("alignment", "I")
        for text in values
    ]
    assert report["alignment"]["total"]["I"]["median"] == np.median(both)
    # a case report with two dialogs is one pair
    assert report["alignment"]["total"]["pairs"] == len(numbers) == 27
    assert len(Records(out / "alignment.json")) == 45
    assert "C" not in report["alignment"]["PMC-OA"]
    table = (tmp_path / "stats/stats.md").read_text()
    assert (
        "| | PMC-CaseReport | PMC-OA | total |" in table
        and "| image-text pairs | 18 | 9 | 27 |" in table
        and "| C tokens | " in table
        and table.strip() in done.stdout
    )
    entry = report["instruction"]["PMC-VQA"]["Q"]
    assert f"{entry['median']:g} ({entry['q1']:g}, {entry['q3']:g})" in table


def built_of(raw, out, *options):
    """A build of the captions and case reports of a folder of make_raw, texts alone."""
    files = ["--pmc-oa", raw / "pmc_oa.jsonl", "--pmc-casereport", raw / "case.csv"]
    prep("build", *files, "--skip-pictures", "--out", out, *options)
    return out / "alignment.json"


def stats_of(toy, alignment, out, *options, code=0):
    """(what stats printed, its stats.json)"""
    done = prep(
        "stats",
        "--alignment",
        alignment,
        "--tokenizer",
        toy / "llama",
        "--out",
        out,
        "--no-figures",
        *options,
        code=code,
    )
    report = out / "stats.json"
    return done, json.loads(report.read_text()) if report.is_file() else {}


def lengths_of_column(raw, column, tokenizer):
    return [len(tokenizer.encode(row[column])) for row in Records(raw / "case.csv")]


@pytest.mark.parametrize("texts", ["draw", "inline", "context", "both"])
def test_a_case_report_counts_with_both_its_texts(tmp_path, toy, texts):
    """Table 1: whichever of its texts is trained, a pair a row, C and I as the raw table has them;
    beside it what is trained."""
    raw = make_raw(tmp_path / "raw", n=9)
    alignment = built_of(raw, tmp_path / "built", "--alignment-text", texts)
    done, report = stats_of(toy, alignment, tmp_path / "stats")
    tokenizer = Tokenizer(toy / "llama")
    column = report["alignment"]["PMC-CaseReport"]
    assert column["pairs"] == 18
    for kind, name in (("C", "context"), ("I", "inline")):
        lengths = lengths_of_column(raw, name, tokenizer)
        assert column[kind]["texts"] == 18
        assert column[kind]["tokens"] == sum(lengths)
        assert column[kind]["max"] == max(lengths)
        assert column[kind]["median"] == np.median(lengths)
    # trained: the dialogs that there are
    spoken = {"C": [], "I": []}
    for row in Records(alignment):
        kind = "C" if row["id"].endswith("-context") else "I"
        spoken[kind].append(len(tokenizer.encode(row["conversations"][1]["value"])))
    for kind, lengths in spoken.items():
        trained = report["alignment_trained"].get(kind, {"texts": 0, "tokens": 0})
        assert (trained["texts"], trained["tokens"]) == (len(lengths), sum(lengths))
    n_dialogs = sum(map(len, spoken.values()))
    assert f"Trained in stage 1: {n_dialogs} dialogs" in done.stdout
    # the paper's own table stands beside ours
    assert "| C tokens | 167 M | - | 167 M |" in done.stdout
    assert "| max I tokens | 1,551 | 1,417 | 1,551 |" in done.stdout
    assert (
        "| median (Q1, Q3) I tokens | 59 (41, 83) | 125 (68, 210) | 75 (47, 132) |" in done.stdout
    )


def test_raw_rows_that_are_gone_are_said(tmp_path, toy):
    """Moved: named by the option. Changed, or another file: never counted in silence."""
    raw = make_raw(tmp_path / "raw", n=6)
    alignment = built_of(raw, tmp_path / "built", "--alignment-text", "inline")
    whole = stats_of(toy, alignment, tmp_path / "stats")[1]["alignment"]

    moved = tmp_path / "elsewhere.csv"
    (raw / "case.csv").rename(moved)
    done, report = stats_of(toy, alignment, tmp_path / "without")
    assert "case.csv is not there any more" in done.stderr
    assert "--pmc-casereport FILE" in done.stderr
    assert "Case reports count with the texts that are trained alone" in done.stdout
    assert "C" not in report["alignment"]["PMC-CaseReport"]
    assert report["alignment"]["PMC-CaseReport"]["pairs"] == 12

    _, report = stats_of(toy, alignment, tmp_path / "named", "--pmc-casereport", moved)
    assert report["alignment"] == whole

    other = make_raw(tmp_path / "other", n=3) / "case.csv"
    done, _ = stats_of(toy, alignment, tmp_path / "x", "--pmc-casereport", other, code=2)
    assert "not the files that" in done.stderr and len(done.stderr.splitlines()) == 1
    (tmp_path / "built/manifest.json").unlink()
    done, _ = stats_of(toy, alignment, tmp_path / "x", "--pmc-casereport", other, code=2)
    assert "not what the dialogs were built of" in done.stderr

    (raw / "case.csv").write_bytes(moved.read_bytes() + b"PMC1,a,b,c,d,[]\n")
    alignment = built_of(raw, tmp_path / "again", "--alignment-text", "inline")
    (raw / "case.csv").write_bytes(moved.read_bytes())
    done, _ = stats_of(toy, alignment, tmp_path / "changed")
    assert "case.csv has changed since the build" in done.stderr


@pytest.mark.parametrize(
    "manifest",
    [
        [],
        {"inputs": None},
        {"inputs": ["case.csv"]},
        {"inputs": [{"set": "pmc-casereport", "file": "case.csv"}]},
        {"inputs": [{"set": "pmc-casereport", "file": 3, "sha256": "0"}]},
        {"inputs": [], "settings": None},
        {"inputs": [], "settings": {"encoding": 8}},
    ],
)
@pytest.mark.parametrize("given", [[], ["case.csv"]])
def test_a_damaged_manifest_is_named(tmp_path, manifest, given):
    path = tmp_path / "manifest.json"
    path.write_text(json.dumps(manifest), encoding="utf-8")
    with pytest.raises(ValueError, match=re.escape(str(path))) as refused:
        find_case_reports(tmp_path / "alignment.json", given)
    assert not isinstance(refused.value, NoCaseReports)


def test_blocks_do_not_count_a_case_report_twice(tmp_path, toy, monkeypatch):
    """Its two dialogs may lie on either side of where one worker ends and the next begins."""
    raw = make_raw(tmp_path / "raw", n=6)
    alignment = built_of(raw, tmp_path / "built", "--alignment-text", "both")
    tokenizer = Tokenizer(toy / "llama")
    monkeypatch.setattr(stats, "ROWS_COUNTED", 1)
    files, lacking = stats.open_built({"alignment": [str(alignment)]}, [])
    counts, _ = stats.count_files(stats.Counting(files, tokenizer), workers=1)
    assert not lacking
    assert counts["alignment"].pairs["PMC-CaseReport"] == 12
    lengths = counts["alignment"].lengths["PMC-CaseReport", "C"]
    assert lengths.total() == 12


def test_prompts_are_taken_away():
    for template in VQA:
        assert (
            own_question("<image>\n" + template.replace("{question}", "图中有几个病灶？"))
            == "图中有几个病灶？"
        )


@pytest.mark.parametrize(
    "text, modality",
    [
        ("胸部CT显示结节", "CT"),
        ("Contrast-enhanced CT of the chest", "CT"),
        ("PET-CT显示摄取增高", "PET / SPECT"),
        ("T2加权像呈高信号", "MRI"),
        ("brain MRI", "MRI"),
        ("彩色多普勒超声", "超声 ultrasound"),
        ("Chest X-ray, frontal", "X光 X-ray"),
        ("胸部X线片", "X光 X-ray"),
        ("HE染色", "病理 microscopy"),
        ("the effect of the octopus", "unknown"),
        ("结果如图所示", "unknown"),
        ("rectal mass", "unknown"),
        ("术中照片", "照片 photograph"),
        ("Gastroscopy findings", "内镜 endoscopy"),
        ("mri of the knee", "unknown"),
    ],
)
def test_modalities(text, modality):
    assert modality_of(text) == modality and (modality in MODALITIES or modality == "unknown")


def test_figures(tmp_path, toy):
    """Histograms, word clouds without a box in place of a character, a sheet with a line for each
    kind of picture."""
    raw = make_raw(tmp_path / "raw", n=9)
    given = [
        {"english": OA[k][0].format(a), "chinese": OA[k][1].format(a)}
        for k in range(3)
        for a in range(20)
    ]
    (tmp_path / "given.jsonl").write_text("".join(json.dumps(row) + "\n" for row in given))
    prep(
        "translate",
        "--pmc-oa",
        raw / "pmc_oa.jsonl",
        "--out",
        tmp_path / "zh",
        "--translations",
        tmp_path / "given.jsonl",
    )
    out = tmp_path / "built"
    prep(
        "build", "--pmc-oa", tmp_path / "zh/pmc_oa.jsonl", "--images", raw / "images", "--out", out
    )
    options = (
        "stats",
        "--alignment",
        out / "alignment.json",
        "--tokenizer",
        toy / "llama",
        "--images",
        out / "images",
        "--out",
        tmp_path / "stats",
    )
    done = prep(*options)
    for name in ("lengths.png", "words-alignment.png", "pictures.png"):
        with Image.open(tmp_path / "stats" / name) as image:
            assert min(image.size) > 100 and str(tmp_path / "stats" / name) in done.stdout
    assert (
        len(np.unique(np.asarray(Image.open(tmp_path / "stats/words-alignment.png").convert("L"))))
        > 10
    )  # words, not an empty sheet
    sheet = np.asarray(Image.open(tmp_path / "stats/pictures.png").convert("RGB"))
    colours = {
        tuple(c)
        for c in np.asarray(Image.open(next((out / "images").glob("*.jpg"))).convert("RGB"))
        .reshape(-1, 3)
        .tolist()
    }
    assert any((np.abs(sheet.astype(int) - colour).max(axis=2) <= 3).any() for colour in colours)
    assert "| CT | 3 |" in done.stdout and "| unknown | " not in done.stdout


def test_fonts(tmp_path, monkeypatch):
    """A font without simplified Chinese is refused by name; where none is found, that is said and
    everything else is made."""
    latin = str(Path(matplotlib.get_data_path()) / "fonts/ttf/DejaVuSans.ttf")
    chinese = find_font(None)
    assert (
        has_chinese(chinese)
        and not has_chinese(latin)
        and not has_chinese(str(tmp_path / "none.ttf"))
    )
    with pytest.raises(ValueError, match="DejaVuSans.ttf: no font file, or one without"):
        find_font(latin)
    monkeypatch.setattr("chimed.stats.FONT_FOLDERS", ())
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert find_font(None) is None


def test_published_files_and_bad_rows(tmp_path, toy):
    rows = [
        {
            "id": i,
            "image": "a.jpg",
            "conversations": [
                {"from": "human", "value": "<image>\n这是什么？"},
                {"from": "gpt", "value": "CT图像。"},
            ]
            * 2,
        }
        for i in range(3)
    ]
    (tmp_path / "chat.jsonl").write_text(
        "".join(json.dumps(row) + "\n" for row in rows) + '{"id": 9}\n'
    )
    done = prep(
        "stats",
        "--instruction",
        tmp_path / "chat.jsonl",
        "--tokenizer",
        toy / "llama",
        "--out",
        tmp_path / "stats",
        "--no-figures",
    )
    assert "| QA pairs | 6 | 6 |" in done.stdout and "1 rows are no dialogs" in done.stderr
    assert (
        "no such data file"
        in prep(
            "stats",
            "--instruction",
            tmp_path / "none.json",
            "--tokenizer",
            toy / "llama",
            "--out",
            tmp_path / "stats",
            code=2,
        ).stderr
    )
