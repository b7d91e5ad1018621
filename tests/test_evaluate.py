"""Promise: evaluate.py reads each published test set, scores as the references do, goes on where it
was stopped, and its report follows from its predictions."""

import csv
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, in_process, make_qilin
from PIL import Image
from sacrebleu.metrics import BLEU
from transformers import LlavaForConditionalGeneration

import evaluate as e
import qilin_min as q
from common.intervals import bootstrap
from evaluation import scores
from evaluation.answers import Answered, Likelihood, Said
from evaluation.asking import ask_batch, with_options
from evaluation.report import constant_answers, table_of
from evaluation.scores import read_choice, text_metrics, token_f1
from evaluation.testsets import Question, read_testset
from model_io.beginnings import Beginnings
from model_io.export import save_qilin
from model_io.tokens import encode_prompt

CHOICES = {"A": "肾脏", "B": "肝脏", "C": "左肾", "D": "Heart"}


def call(*options, code=0):
    done = in_process(e.main, *options)
    assert done.returncode == code and "Traceback" not in done.stderr, done.stderr[-3000:]
    return done


def table(path, columns, rows, encoding="utf-8"):
    with open(path, "w", newline="", encoding=encoding) as file:
        csv.writer(file).writerows([columns, *rows])


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    """Small files in the exact upstream schemas, and their pictures."""
    folder = tmp_path_factory.mktemp("sets")
    (folder / "images/xmlab1").mkdir(parents=True)
    rng = np.random.default_rng(0)
    for name in ("a.jpg", "b.jpg", "synpic1.jpg", "xmlab1/source.jpg"):
        Image.fromarray(rng.integers(0, 255, (50, 60, 3), dtype=np.uint8)).save(
            folder / "images" / name
        )
    options = [f" {letter}: {text} " for letter, text in CHOICES.items()]
    table(
        folder / "test_2.csv",
        [
            "index",
            "Figure_path",
            "Caption",
            "Question",
            "Choice A",
            "Choice B",
            "Choice C",
            "Choice D",
            "Answer",
            "split",
        ],
        [
            [
                i,
                "ab"[i % 2] + ".jpg",
                "图注",
                f"第{i}幅图显示的是什么器官？",
                *options,
                "ABCD"[i % 4],
                "test",
            ]
            for i in range(7)
        ],
        "utf-8-sig",
    )
    table(
        folder / "test.csv",
        [
            "Figure_path",
            "Question",
            "Answer",
            "Choice A",
            "Choice B",
            "Choice C",
            "Choice D",
            "Answer_label",
        ],
        [
            [
                "a.jpg",
                "What organ is this?",
                "Liver",
                " A:Kidney ",
                " B:Liver ",
                " C:Spleen",
                " D:Heart ",
                "B",
            ]
        ],
    )
    slake = dict(
        img_id=1,
        img_name="xmlab1/source.jpg",
        location="Abdomen",
        modality="MRI",
        base_type="vqa",
        triple=["vhead", "_", "_"],
    )
    (folder / "slake.json").write_text(
        json.dumps(
            [
                dict(
                    slake,
                    question="What modality is used?",
                    answer="MRI",
                    q_lang="en",
                    answer_type="OPEN",
                    content_type="Modality",
                    qid=0,
                ),
                dict(
                    slake,
                    question="图中有肝脏吗？",
                    answer="有",
                    q_lang="zh",
                    answer_type="CLOSED",
                    content_type="Organ",
                    qid=1,
                ),
            ]
        )
    )
    rad = dict(image_name="synpic1.jpg", image_organ="HEAD", question_type="PRES")
    (folder / "rad.json").write_text(
        json.dumps(
            [
                dict(
                    rad,
                    qid=1,
                    question="Is there a mass?",
                    answer="No",
                    answer_type="CLOSED ",
                    phrase_type="test_freeform",
                ),
                dict(
                    rad,
                    qid=2,
                    question="How many?",
                    answer=2,
                    answer_type="OPEN",
                    phrase_type="test_para",
                ),
                dict(
                    rad,
                    qid=3,
                    question="Where?",
                    answer="left",
                    answer_type="OPEN",
                    phrase_type="freeform",
                ),
            ]
        )
    )
    (folder / "own.jsonl").write_text(
        "\n".join(
            json.dumps(row)
            for row in (
                dict(image=["a.jpg", "b.jpg"], question="两张图一样吗？", answer="不一样"),
                dict(image="", question="什么是<image>肺结节？</s>", answer="肺内的小结节"),
            )
        )
    )
    return folder


def read(sets, name, **options):
    return read_testset(sets / name, sets / "images", **options)


def test_each_set_is_read(sets):
    kind, found, _ = read(sets, "test_2.csv")
    assert (
        kind == "PMC-VQA"
        and len(found) == 7
        and found[5].choices == CHOICES
        and found[5].letter == "B"
        and found[5].truth == "肝脏"
        and found[5].language == "Chinese"
        and found[5].pictures[0].name == "b.jpg"
    )
    kind, (one,), _ = read(sets, "test.csv")
    assert (
        kind == "PMC-VQA"
        and one.choices == dict(zip("ABCD", ("Kidney", "Liver", "Spleen", "Heart"), strict=True))
        and one.letter == "B"
        and one.truth == "Liver"
        and one.language == "English"
    )
    kind, found, _ = read(sets, "slake.json")
    assert (
        kind == "SLAKE"
        and [x.language for x in found] == ["English", "Chinese"]
        and found[1].kinds
        == {"answer type": "CLOSED", "content": "Organ", "modality": "MRI", "organ": "Abdomen"}
    )
    kind, found, left_out = read(sets, "rad.json")
    assert (
        kind == "VQA-RAD"
        and [x.truth for x in found] == ["No", "2"]
        and left_out == {"not marked as test": 1}
        and found[0].kinds["answer type"] == "CLOSED"
    )
    kind, found, _ = read(sets, "own.jsonl")
    assert kind == "own" and [len(x.pictures) for x in found] == [2, 0] and found[1].n_images == 0


def test_a_bad_row_stops_by_name_or_is_counted(sets, tmp_path):
    rows = [
        dict(image="a.jpg", question="问题", answer="答案"),
        dict(image="gone.jpg", question="问题", answer="答案"),
        dict(image="../sets.png", question="问题", answer="答案"),
        dict(image="a.jpg", question="", answer="答案"),
    ]
    (tmp_path / "own.json").write_text(json.dumps(rows))
    with pytest.raises(ValueError, match="own.json: row 1: picture missing"):
        read_testset(tmp_path / "own.json", sets / "images")
    _, found, left_out = read_testset(tmp_path / "own.json", sets / "images", skip_bad=True)
    assert len(found) == 1 and left_out.total() == 3
    table(
        tmp_path / "odd.csv",
        ["Figure_path", "Question", "Answer", "Choice A", "Choice B"],
        [["a.jpg", "问题", "E", "A:肾脏", "B:肝脏"]],
    )
    with pytest.raises(ValueError, match="none of the options"):
        read_testset(tmp_path / "odd.csv", sets / "images")
    (tmp_path / "x.json").write_text('[{"foo": 1}]')
    with pytest.raises(ValueError, match="of no known test set"):
        read_testset(tmp_path / "x.json", sets / "images")


def test_open_scores_are_those_of_the_libraries():
    """BLEU put together from single rows equals sacrebleu's corpus score, ROUGE-L is LCS by hand,
    F1 is SQuAD's by hand; Chinese by characters."""
    answers, truths = (
        ["左肺下叶可见结节。", "CT 3 mm", "", "the Liver is large and red"],
        ["左肺下叶有一个结节", "ct 5 mm", "无", "Liver is red and large"],
    )
    metrics = text_metrics()
    assert scores.words("左肺CT, 3mm结节。") == ["左", "肺", "ct", "3mm", "结", "节"]
    split = [[" ".join(scores.words(t)) for t in texts] for texts in (answers, truths)]
    total = np.sum([metrics.ngrams(a, t) for a, t in zip(answers, truths, strict=True)], 0)
    for order in (1, 4):
        want = BLEU(tokenize="none", max_ngram_order=order).corpus_score(split[0], [split[1]]).score
        assert 5 < want < 95 and abs(100 * metrics.corpus_bleu(total, order) - want) < 1e-9
    assert metrics.rouge_l(answers[0], truths[0]) == pytest.approx(
        2 * 6 / (8 + 9)
    )  # 左肺下叶结节 is common, of 8 and 9 characters
    assert (
        token_f1("the liver the", "liver the red") == pytest.approx(2 * 2 / 6)
        and token_f1("肝", "肾") == 0
        and token_f1("。", "") == 1
    )


@pytest.mark.parametrize(
    "text, letter",
    [
        ("B", "B"),
        ("b.", "B"),
        (" (C) 左肾", "C"),
        ("答案是B。", "B"),
        ("答案:D", "D"),
        ("The answer is B.", "B"),
        ("正确答案为A", "A"),
        ("B、肝脏", "B"),
        ("选C", "C"),
        ("肝脏。", "B"),
        ("heart", "D"),
        ("图中是肝脏", "B"),
        ("是左肾", "C"),
        ("A large heart", "D"),
        ("肾脏或肝脏", ""),
        ("不知道", ""),
        ("", ""),
        ("E", ""),
        ("Both", ""),
        ("A和B", ""),
        ("A、B", ""),
        ("选A或B", ""),
        ("A, B", ""),
        ("B，因为位置在右侧", "B"),
        ("答案：B，因为", "B"),
        ("B\n解释", "B"),
        ("B is correct", "B"),
        ("The answer is B, because", "B"),
        ("我选B", "B"),
    ],
)
def test_a_generated_choice_is_read(text, letter):
    assert read_choice(text, CHOICES) == letter


@pytest.mark.parametrize(
    "options, text, letter",
    [
        (["CT", "MRI", "X线", "B超"], "B超检查", "D"),
        (["CT", "MRI", "X线", "B超"], "B超", "D"),
        (["血糖升高", "C反应蛋白升高", "正常", "贫血"], "C反应蛋白升高明显", "B"),
        (["MRI", "CT", "X-ray", "Ultrasound"], "It shows a fracture.", ""),
        (["MRI", "CT", "X-ray", "Ultrasound"], "This is a CT.", "B"),
        (["Yes", "No"], "abnormal", ""),
        (["Yes", "No"], "Not sure", ""),
        (["Yes", "No"], "No, it is not.", "B"),
        (["1", "2", "3", "4"], "15", ""),
        (["1", "2", "3", "4"], "2个", "B"),
        (["Left lung", "Left lung base"], "the left lung base", "B"),
    ],
)
def test_an_option_inside_an_answer_is_a_word_of_it(options, text, letter):
    assert read_choice(text, dict(zip("ABCD", options, strict=False))) == letter


def test_intervals_are_those_of_arithmetic():
    """For independent questions the interval is the binomial's; questions that always agree in
    groups of 4 make it twice as wide."""
    rng = np.random.default_rng(1)
    values = (rng.random(400) < 0.3).astype(float)

    def mean(totals, n):
        return totals[0] / n

    low, high = bootstrap(values[:, None], np.ones(400), mean)
    p = values.mean()
    half = 1.96 * math.sqrt(p * (1 - p) / 400)
    assert low < p < high and abs((high - low) / (2 * half) - 1) < 0.1
    grouped = values[:100]
    low4, high4 = bootstrap(4 * grouped[:, None], np.full(100, 4), mean)
    assert abs((high4 - low4) / (high - low) - 2) < 0.35


def tiny(tmp_path, tokenizer):
    model = make_qilin(text=dict(vocab_size=32064, max_position_embeddings=300), n_token_ids=32000)
    save_qilin(model, tokenizer, tmp_path / "model")
    return model


@torch.no_grad()
def test_likelihoods_equal_transformers(tmp_path, tokenizer, report):
    """Of the truth and of each option, in a padded batch on one cache: the sum of log-softmax of
    transformers' LLaVA over each whole sequence alone."""
    model = tiny(tmp_path, tokenizer)
    hf = LlavaForConditionalGeneration.from_pretrained(
        tmp_path / "model", attn_implementation="eager"
    ).eval()

    def human(text):
        return [{"from": "human", "value": text}]

    batch = [
        Question(0, human("图中是什么器官？"), "肝脏", [Path("a")], 1, choices=CHOICES, letter="B"),
        Question(1, human("请回答问题"), "没有异常", [], 0),
        Question(
            2,
            human("两张图？"),
            "不同",
            [Path("a"), Path("b")],
            2,
            choices={"A": "不同", "B": "完全一样"},
            letter="A",
        ),
    ]
    x = torch.randn(3, 3, 56, 56, generator=torch.Generator().manual_seed(0))
    said = ask_batch(Beginnings(model), tokenizer, batch, x, 6)
    worst = 0
    parts = (slice(0, 1), slice(0, 0), slice(1, 3))
    for question, row, part in zip(batch, said, parts, strict=True):
        prompt = encode_prompt(question.conversation, tokenizer, 16, n_images=question.n_images)
        likelihoods = [row.truth, *row.options]
        assert len(likelihoods) == 1 + len(question.choices)
        texts = [question.truth, *question.choices.values()]
        for likelihood, text in zip(likelihoods, texts, strict=True):
            answer = tokenizer.encode(text) + [2]
            ids = torch.tensor([prompt + answer])
            logits = hf(
                input_ids=ids.masked_fill(ids == q.IMAGE_TOKEN_INDEX, hf.config.image_token_id),
                pixel_values=x[part] if question.n_images else None,
            ).logits[0, len(prompt) - 1 : -1, :32064]
            assert likelihood.n_tokens == len(answer)
            worst = max(
                worst,
                abs(
                    likelihood.total
                    - float(logits.log_softmax(-1).gather(1, torch.tensor(answer)[:, None]).sum())
                ),
            )
        alone = q.answer_ids(
            model, [prompt], x[part] if question.n_images else None, max_new_tokens=6
        )[0]
        assert row.answer == tokenizer.decode(alone)
        if question.choices:
            prompt = encode_prompt(
                human(with_options(question)), tokenizer, 16, n_images=question.n_images
            )
            assert row.choice_answer == tokenizer.decode(
                q.answer_ids(model, [prompt], x[part], max_new_tokens=6)[0]
            )
    report("log-likelihood of an answer", worst, 1e-3)


def test_the_report_follows_from_the_predictions(sets, toy_model, tmp_path):
    done = call(
        sets / "test_2.csv",
        "--images",
        sets / "images",
        "--model",
        toy_model,
        "--out",
        tmp_path,
        "--max-new-tokens",
        5,
        "--batch-size",
        3,
    )
    report, rows = (
        json.loads((tmp_path / "report.json").read_text()),
        [json.loads(line) for line in open(tmp_path / "predictions.jsonl")],
    )
    assert (
        report["n"] == len(rows) == 7
        and report["pictures"] == 2
        and report["languages"] == {"Chinese": 7}
        and report["headline"] == "choice by likelihood"
    )
    for column, side in (("value", "seen"), ("withheld", "blind")):
        pick = [
            max(
                "ABCD",
                key=lambda letter, side=side, r=r: (
                    r[side]["likelihood"][1 + "ABCD".index(letter)][0]
                    / r[side]["likelihood"][1 + "ABCD".index(letter)][1]
                ),
            )
            for r in rows
        ]
        cell = report["scores"]["choice by likelihood"]
        assert cell[column] == sum(p == r["letter"] for p, r in zip(pick, rows, strict=True)) / 7
        nll = [r[side]["likelihood"][0] for r in rows]
        assert report["scores"]["perplexity of the truth"][column] == pytest.approx(
            math.exp(-sum(a for a, _ in nll) / sum(n for _, n in nll))
        )
    assert (
        report["scores"]["choice by answer"]["constant"] == 2 / 7
        and report["accuracy"] == report["scores"]["choice by likelihood"]["value"]
    )
    text = (tmp_path / "report.md").read_text()
    assert (
        text.strip() == done.stdout.strip()
        and "test_2.csv: 7 questions about 2 pictures" in text
        and "7 in Chinese" in text
        and "BLEU-1" in text
        and "ROUGE-L" in text
    )


def test_kinds_are_reported(sets, toy_model, tmp_path):
    for name, label, value in (
        ("slake.json", "modality", "MRI"),
        ("rad.json", "answer type", "CLOSED"),
    ):
        out = tmp_path / name
        call(
            sets / name,
            "--images",
            sets / "images",
            "--model",
            toy_model,
            "--out",
            out,
            "--max-new-tokens",
            3,
        )
        report = json.loads((out / "report.json").read_text())
        assert (
            report["by"][label][value]["n"] >= 1
            and report["headline"] == "exact match"
            and (name != "slake.json" or set(report["by"]["language"]) == {"English", "Chinese"})
        )
    assert "Left out: 1 not marked as test" in (tmp_path / "rad.json/report.md").read_text()


def test_sub_commands_are_in_the_help_and_a_file_of_such_a_name_is_a_file(tmp_path, monkeypatch):
    help_text = call("--help").stdout
    for name in ("compare", "rank"):
        assert re.search(rf"^ +{name} +\w", help_text, re.MULTILINE)
        assert f"evaluate.py {name}" in call(name, "--help").stdout
    monkeypatch.chdir(tmp_path)
    words = ["--images", ".", "--out", "out"]
    assert "no such data file" in call("./compare", *words, code=2).stderr
    (tmp_path / "compare").write_text("[]")
    assert "a data file ends in" in call("./compare", *words, code=2).stderr


def test_killed_and_started_again(toy, toy_model, tmp_path):
    """SIGKILL in the middle, half a line behind: the second run asks only what is missing and ends
    with the same predictions and report."""
    options = [
        toy / "heldout.json",
        "--images",
        toy / "images",
        "--model",
        toy_model,
        "--max-new-tokens",
        8,
        "--batch-size",
        1,
    ]
    call(*options, "--out", tmp_path / "whole")
    process = subprocess.Popen(
        list(map(str, [sys.executable, ROOT / "evaluate.py", *options, "--out", tmp_path / "cut"])),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env=dict(os.environ, OMP_NUM_THREADS="1"),
    )
    path = tmp_path / "cut/predictions.jsonl"
    while process.poll() is None and (not path.is_file() or path.read_bytes().count(b"\n") < 3):
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    kept = path.read_bytes().rpartition(b"\n")[0].count(b"\n") + 1
    assert 3 <= kept < 20
    with open(path, "a") as file:
        file.write('{"row": 19, "id"')
    stamp = path.read_bytes().split(b"\n")[:3]
    call(*options, "--out", tmp_path / "cut")
    assert path.read_bytes().split(b"\n")[:3] == stamp  # not asked again
    for name in ("predictions.jsonl", "report.md"):
        assert (tmp_path / "cut" / name).read_text() == (tmp_path / "whole" / name).read_text()
    done = call(*options, "--out", tmp_path / "cut", "--dtype", "bfloat16", code=2)
    assert "--restart" in done.stderr
    call(*options, "--out", tmp_path / "cut", "--n", 4, "--restart")
    assert json.loads((tmp_path / "cut/report.json").read_text())["n"] == 4


def test_a_picture_that_breaks_on_the_way_loses_nothing(sets, toy_model, tmp_path):
    (tmp_path / "images").mkdir()
    for name in ("a.jpg", "b.jpg"):
        (tmp_path / "images" / name).write_bytes((sets / "images" / name).read_bytes())
    (tmp_path / "images/b.jpg").write_bytes(b"")
    options = [
        sets / "test_2.csv",
        "--images",
        tmp_path / "images",
        "--model",
        toy_model,
        "--max-new-tokens",
        3,
        "--batch-size",
        1,
    ]
    done = call(*options, "--out", tmp_path / "out", code=2)
    assert (
        "b.jpg" in done.stderr
        and "--skip-bad" in done.stderr
        # all about a.jpg, which are asked together
        and (tmp_path / "out/predictions.jsonl").read_text().count("\n") == 4
    )
    call(*options, "--out", tmp_path / "skipped", "--skip-bad")
    report = json.loads((tmp_path / "skipped/report.json").read_text())
    assert report["n"] == 4 and sum(report["left_out"].values()) == 3


def test_what_quantising_changes(sets, toy_model, tmp_path):
    """int8 is measured against the same weights unrounded, on the decoding path; perplexity before
    is the one that likelihoods give."""
    call(
        sets / "own.jsonl",
        "--images",
        sets / "images",
        "--model",
        toy_model,
        "--out",
        tmp_path / "8",
        "--quantize",
        "int8",
        "--max-new-tokens",
        3,
    )
    call(
        sets / "own.jsonl",
        "--images",
        sets / "images",
        "--model",
        toy_model,
        "--out",
        tmp_path / "32",
        "--max-new-tokens",
        3,
    )
    eight, plain = (json.loads((tmp_path / n / "report.json").read_text()) for n in ("8", "32"))
    changed = eight["quantised"]
    assert changed["perplexity_before"] == pytest.approx(
        plain["scores"]["perplexity of the truth"]["value"], rel=1e-3
    )
    assert (
        1e-5 < changed["logits_off"] < 0.05
        and 0 <= changed["kl"] < 0.01
        and changed["same_first"] > 0.7
        and changed["n"] == 2
    )
    assert (
        "int8 against float32" in (tmp_path / "8/report.md").read_text()
        and "quantised" not in plain
    )


def test_withheld_and_intervals_of_a_table():
    """A column follows from its own side of the rows; four questions about a picture that stand and
    fall together make the interval twice as wide; the constant is the commonest truth of a kind."""
    rng = np.random.default_rng(0)
    right = rng.random(100) < 0.5

    def make(i, k, picture):
        return Question(
            f"{i}-{k}",
            [{"from": "human", "value": "问"}],
            "对" if i % 4 else "错",
            [Path(str(picture))],
            1,
            {"kind": "a" if i % 4 else "b"},
        )

    def said(text):
        return Said(text, Likelihood(-1.0, 2))

    rows = [
        Answered(said("对" if i % 4 else "错") if ok else said("无"), said("无"))
        for i, ok in enumerate(right)
    ]
    once = table_of([make(i, 0, i) for i in range(100)], rows, None, ["对"] * 100)["exact match"]
    often = table_of(
        [make(i, k, i) for i in range(100) for k in range(4)],
        [row for row in rows for _ in range(4)],
        None,
        ["对"] * 400,
    )["exact match"]
    apart = table_of(
        [make(i, k, f"{i}-{k}") for i in range(100) for k in range(4)],
        [row for row in rows for _ in range(4)],
        None,
        ["对"] * 400,
    )["exact match"]
    assert (
        once.seen.value == often.seen.value == right.mean()
        and once.withheld.value == 0
        and once.constant == 0.75
        and often.n == 400
    )
    once, often, apart = once.seen, often.seen, apart.seen
    assert (often.low, often.high) == (once.low, once.high)
    assert abs((often.high - often.low) / (apart.high - apart.low) - 2) < 0.3
    questions = [make(i, 0, i) for i in range(100)]
    assert constant_answers(questions, None) == ["对"] * 100  # 75 of 100
    assert constant_answers(questions, "kind") == [
        "对" if i % 4 else "错" for i in range(100)
    ]  # each kind has one truth


def test_a_withheld_picture_changes_what_is_likely(sets, toy_model, tmp_path):
    """Where a question has pictures the grey ones give other likelihoods; where it has none both
    sides are the same."""
    call(
        sets / "own.jsonl",
        "--images",
        sets / "images",
        "--model",
        toy_model,
        "--out",
        tmp_path,
        "--max-new-tokens",
        3,
    )
    two, none = [json.loads(line) for line in open(tmp_path / "predictions.jsonl")]
    assert (
        two["seen"]["likelihood"] != two["blind"]["likelihood"]
        and none["seen"]["likelihood"] == none["blind"]["likelihood"]
    )
    assert "NaN" not in (tmp_path / "report.json").read_text()


def test_answers_are_kept_for_their_own_questions_only(sets, toy_model, tmp_path):
    """A picture that turns up later, another image folder: the kept answers are of other questions,
    and refused. --out inside the model's folder goes on. Too long a question is left out, and
    counted."""
    images, model = tmp_path / "images", tmp_path / "model"
    shutil.copytree(sets / "images", images)
    shutil.copytree(toy_model, model)
    (images / "b.jpg").unlink()
    words = [sets / "test_2.csv", "--model", model, "--max-new-tokens", 2, "--skip-bad"]
    for _ in range(2):
        call(*words, "--images", images, "--out", model / "eval")
    shutil.copy(sets / "images/b.jpg", images / "b.jpg")
    assert (
        "other questions"
        in call(*words, "--images", images, "--out", model / "eval", code=2).stderr
    )
    call(*words, "--images", images, "--out", tmp_path / "all")
    assert (
        "other questions, pictures"
        in call(*words, "--images", sets / "images", "--out", tmp_path / "all", code=2).stderr
    )
    (tmp_path / "long.jsonl").write_text(
        json.dumps(dict(image="a.jpg", question="问题", answer="答案"))
        + "\n"
        + json.dumps(dict(image="a.jpg", question="长" * 9000, answer="答案"))
    )
    words = [tmp_path / "long.jsonl", "--images", images, "--model", model, "--max-new-tokens", 2]
    assert "--skip-bad" in call(*words, "--out", tmp_path / "long", code=2).stderr
    call(*words, "--out", tmp_path / "long", "--skip-bad")
    assert json.loads((tmp_path / "long/report.json").read_text())["left_out"] == {
        "question beyond the model's positions": 1
    }
    (images / "b.jpg").write_bytes(b"")  # int8 beside plain, with a picture that does not decode
    call(
        sets / "test_2.csv",
        "--images",
        images,
        "--model",
        model,
        "--max-new-tokens",
        2,
        "--out",
        tmp_path / "int8",
        "--skip-bad",
        "--quantize",
        "int8",
    )
    assert json.loads((tmp_path / "int8/report.json").read_text())["quantised"]["n"] == 4
