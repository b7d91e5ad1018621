"""Promise: of translations the checks find what a doctor must not find, by name, and let good ones
pass.

translation_pairs.jsonl: 325 pairs, written for this test without sight of the rules, each with
spoilt versions of its Chinese. The second 120 were measured before any rule had been adapted to
them: 7 good ones stopped, 234 of 255 spoilt ones found.
"""

import json
import time
from collections import Counter

import pytest
from conftest import ROOT

from chimed.quality import quality, read_glossary, reason_name
from chimed.translate import read_answer
from common.text import impractical

FOUND = {
    "numbers": 0.95,
    "units": 0.9,
    "laterality": 0.92,
    "negation": 0.8,
    "Chinese share": 0.99,
    "length ratio": 0.99,
    "refusal": 0.97,
    "leftover": 0.93,
    "repeated text": 0.99,
}  # share that must be found


@pytest.fixture(scope="module")
def pairs():
    return [
        json.loads(line) for line in open(ROOT / "tests/translation_pairs.jsonl", encoding="utf-8")
    ]


def names(english, chinese, glossary=()):
    return {
        reason_name(reason)
        for reason in quality({"caption": english}, {"caption": chinese}, glossary)
    }


def test_good_translations_pass(pairs):
    stopped = [
        (pair["english"], pair["chinese"], names(pair["english"], pair["chinese"]))
        for pair in pairs
        if names(pair["english"], pair["chinese"])
    ]
    print(f"quality: {len(stopped)} of {len(pairs)} good translations stopped")
    assert len(stopped) <= 0.02 * len(pairs), stopped


def test_spoilt_ones_are_found_by_name(pairs):
    n, found = Counter(), Counter()
    for pair in pairs:
        for reason, chinese in pair["wrong"].items():
            n[reason] += 1
            found[reason] += reason in names(pair["english"], chinese)
    print("quality:", ", ".join(f"{reason} {found[reason]} of {n[reason]}" for reason in n))
    assert set(n) == set(FOUND)
    for reason, share in FOUND.items():
        assert found[reason] >= share * n[reason], reason


@pytest.mark.parametrize(
    "english, chinese, reason",
    [
        ("A 3.5 x 2 cm mass.", "一3.5 x 2厘米肿块。", None),
        ("A 3.5 x 2 cm mass.", "一3.5 x 2毫米肿块。", "units"),
        ("A 3.5 x 2 cm mass.", "一3.5 x 3厘米肿块。", "numbers"),
        ("About 10,000 cells", "约1万个细胞", None),
        ("About 10,000 cells", "约1千个细胞", "numbers"),
        ("In the 1990s", "20世纪90年代", None),
        ("A two-month history", "病史两个月", None),
        ("A two-month history", "病史3个月", "numbers"),
        ("Stage III disease", "III期", None),
        ("Stage III disease", "Ⅲ期", None),
        ("Stage III disease", "3期", None),
        ("Stage III disease", "II期", "numbers"),
        ("March 2015", "2015年3月", None),
        ("Figure 2A shows it", "如图2B所示", "numbers"),
        ("5% glucose", "百分之五葡萄糖", None),
        ("5% glucose", "5克葡萄糖", "units"),
        ("2 mg/kg twice daily", "2毫克/公斤，每日两次", None),
        ("2 mg/kg twice daily", "2克/公斤，每日两次", "units"),
        ("The left lung", "左肺", None),
        ("The left lung", "右肺", "laterality"),
        ("Both lungs", "双肺", None),
        ("Bilateral effusion", "双侧积液", None),
        ("Bilateral effusion", "左侧积液", "laterality"),
        ("About 5 cm", "5厘米左右", None),
        ("Levofloxacin was given", "给予左氧氟沙星", None),
        ("It was left untreated", "未予治疗", None),
        ("RV dilatation", "右心室扩大", None),
        ("left upper and right lower lobe", "右上叶及左下叶", "laterality"),
        ("No fever", "无发热", None),
        ("No fever", "发热", "negation"),
        ("Fever", "未见发热", "negation"),
        ("HER2 negative", "HER2阳性", "negation"),
        ("Immunohistochemistry of the tumor", "肿瘤免疫组化", None),
        ("Heterogeneous enhancement", "不均匀强化", None),
        ("MRI", "MRI", None),
        ("HER2", "HER2", None),
        ("Liver", "Liver", "Chinese share"),
        ("Liver", "", "empty"),
        ("A chest CT image of the patient", "\u62b1\u6b49,我无法翻译", "refusal"),
        (
            "A chest CT image of the patient",
            "作为一个AI语言模型，译文是患者的胸部CT图像",
            "leftover",
        ),
        ("A chest CT image of the patient", "胸部CT,胸部CT,胸部CT,胸部CT,胸部CT,", "repeated text"),
    ],
)
def test_rules_one_by_one(english, chinese, reason):
    found = names(english, chinese)
    assert found == set() if reason is None else reason in found, found


def test_each_field_for_itself(tmp_path):
    """Left in the question, right in the answer: each is compared with its own translation."""
    english = {
        "question": "What is seen in the left lung?",
        "answer": "A nodule in the right lung.",
    }
    assert quality(english, {"question": "左肺可见什么？", "answer": "右肺结节。"}) == []
    assert [
        reason.split(",")[0]
        for reason in quality(english, {"question": "右肺可见什么？", "answer": "左肺结节。"})
    ] == ["laterality: question", "laterality: answer"]


def test_the_glossary(tmp_path):
    """Longest term first, either of two words, plural and case; a term inside a longer one is not
    asked for."""
    (tmp_path / "g.csv").write_text(
        "English,Chinese\nventricle,脑室|心室\nleft ventricle,左室\nstent,支架\n", encoding="utf-8"
    )
    glossary = read_glossary(tmp_path / "g.csv")
    assert names("Left ventricle dilated", "左室扩大", glossary) == set() and names(
        "Left ventricle dilated", "左心室扩大", glossary
    ) == {"glossary"}
    assert names("Lateral Ventricles dilated", "侧脑室扩大", glossary) == set() and names(
        "Drug-eluting stents", "药物洗脱支撑物", glossary
    ) == {"glossary"}
    assert names("Consistent findings", "表现一致", glossary) == set()
    for text, words in (
        ("English,Chinese\nstent,stent\u0020\nliver,liver organ\n", "row 2"),
        ("English,Chinese\n,肝\n", "row 1"),
        ("English\nliver\n", "two columns"),
    ):
        (tmp_path / "bad.csv").write_text(text, encoding="utf-8")
        with pytest.raises(ValueError, match=words):
            read_glossary(tmp_path / "bad.csv")


@pytest.mark.parametrize(
    "text, reason",
    [
        ("A CT image.", None),
        ("胸部CT。", None),
        ("3.2 +/- 0.5 (p = 0.03), 4.1 +/- 0.2", "impractical: mostly symbols"),
        ("12 / 15", "impractical: no letters"),
        ("see https://example.org/a/very/long/path", "impractical: mostly links"),
        ("ATGGCCATTGTAATGGGCCGCTGAAAGGGTGCCCGATAG" * 2, "impractical: a sequence"),
        ("a " * 30000, "impractical: longer than 40000 characters"),
        ("HER2", None),
    ],
)
def test_impractical_texts(text, reason):
    assert impractical(text) == reason


def test_answers_of_models():
    """JSON as it comes: fenced, with words around, with line breaks inside; anything else is asked
    for again."""
    english = {"question": "q", "answer": "a"}
    good = {"question": "问", "answer": "答"}
    for text in (
        json.dumps(good),
        f"```json\n{json.dumps(good)}\n```",
        f"好的：\n{json.dumps(good, indent=1)}\n以上。",
        '{"question": "问", "answer": "答", "more": 1}',
    ):
        assert read_answer(text, english) == good
    for text in (
        "",
        "问答",
        "{",
        "[]",
        '{"question": "问"}',
        '{"question": "问", "answer": 5}',
        '{"question": "问", "answer": " "}',
        "{" * 5000,
        "null",
    ):
        with pytest.raises(ValueError):
            read_answer(text, english)


def test_no_text_takes_the_checks_long():
    """40,000 characters of anything: no rule goes through a text for each of its characters again
    (a hospital's odd row must not hold up a run for hours)."""
    for text in (
        "a",
        "1",
        "1,",
        "1.",
        "A",
        "not ",
        "neither ",
        "two ",
        "10",
        "x@",
        "左",
        "无",
        "二十",
        "希望",
        "[{",
        "L4 ",
    ):
        begin = time.process_time()
        quality({"context": text * (40000 // len(text))}, {"context": text * (40000 // len(text))})
        impractical(text * (40000 // len(text)))
        assert time.process_time() - begin < 20
