"""Promise: `stats` counts what is in the built files with the chosen tokenizer, exactly, in the
form of the paper's Tables 1 and 2, and draws its figures."""

import json
from collections import Counter
from pathlib import Path

import matplotlib
import numpy as np
import pytest
from PIL import Image
from raw_sets import OA, make_raw, prep

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
    for row in Records(out / "alignment.json"):
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
    assert report["alignment"]["total"]["I"]["median"] == np.median(both) and report["alignment"][
        "total"
    ]["pairs"] == len(Records(out / "alignment.json"))
    assert "C" not in report["alignment"]["PMC-OA"]
    table = (tmp_path / "stats/stats.md").read_text()
    assert (
        "| | PMC-CaseReport | PMC-OA | total |" in table
        and "| image-text pairs | 36 | 9 | 45 |" in table
        and "| C tokens | " in table
        and table.strip() in done.stdout
    )
    entry = report["instruction"]["PMC-VQA"]["Q"]
    assert f"{entry['median']:g} ({entry['q1']:g}, {entry['q3']:g})" in table


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
