"""Promise: sample.py, evaluate.py and toy.py do what their help says, and bad input ends in one
line and exit code 2.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import in_process
from PIL import Image

import evaluate
import sample
from model_io.export import save_qilin
from model_io.load import load_qilin
from model_io.tokens import Tokenizer

ROOT = Path(__file__).parent.parent


def call(*words, cwd=ROOT):
    if words[0] in ("sample.py", "evaluate.py") and words[1:] != ("--help",):
        return in_process({"sample.py": sample, "evaluate.py": evaluate}[words[0]].main, *words[1:])
    env = dict(os.environ, OMP_NUM_THREADS="1", PYTHONPATH=str(ROOT))
    return subprocess.run(
        [sys.executable, *map(str, words)], capture_output=True, text=True, cwd=cwd, env=env
    )


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A toy world and an untrained whole model of it."""
    out = tmp_path_factory.mktemp("world") / "toy"
    done = call(
        "-m", "demo.toy", out, "--language", 8, "--alignment", 8, "--instruction", 8, "--heldout", 4
    )
    assert done.returncode == 0, done.stderr
    save_qilin(
        load_qilin(llm=out / "llama", vision=out / "clip"), Tokenizer(out / "llama"), out / "model"
    )
    return out


def test_toy_world_is_the_same_for_the_same_seed(world, tmp_path):
    call(
        "-m",
        "demo.toy",
        tmp_path / "again",
        "--language",
        8,
        "--alignment",
        8,
        "--instruction",
        8,
        "--heldout",
        4,
    )
    files = sorted(
        p.relative_to(tmp_path / "again") for p in (tmp_path / "again").rglob("*") if p.is_file()
    )
    assert len(files) > 20
    for file in files:
        assert (tmp_path / "again" / file).read_bytes() == (world / file).read_bytes(), file


def test_sample_streams_what_generate_says(world):
    """stdout holds the answer alone: greedy, it equals decoding all ids of generate at once, whole
    characters included.
    """
    from model_io.pixels import preprocess_image
    from model_io.tokens import encode_prompt
    from qilin_min import answer_ids

    picture, model, tokenizer = (
        world / "images/heldout-00000.png",
        load_qilin(world / "model"),
        Tokenizer(world / "model"),
    )
    prompt = encode_prompt(
        [{"from": "human", "value": "图中有<image>吗?</s>"}],
        tokenizer,
        model.config.n_image_tokens,
        n_images=1,
    )
    want = tokenizer.decode(
        answer_ids(model, [prompt], preprocess_image(picture, 64)[None], max_new_tokens=12)[0]
    )
    done = call(
        "sample.py",
        picture,
        "图中有<image>吗?</s>",
        "--model",
        world / "model",
        "--max-new-tokens",
        12,
    )
    assert (
        done.returncode == 0 and done.stdout == want + "\n" and "no medical advice" in done.stderr
    )
    several = call(
        "sample.py",
        picture,
        picture,
        "两张图相同吗?",
        "--model",
        world / "model",
        "--max-new-tokens",
        4,
        "--temperature",
        1,
        "--top-p",
        0.9,
        "--seed",
        1,
    )
    text_only = call("sample.py", "你好", "--model", world / "model", "--max-new-tokens", 4)
    parts = call(
        "sample.py",
        picture,
        "你好",
        "--llm",
        world / "llama",
        "--vision",
        world / "clip",
        "--projector",
        "fresh",
        "--max-new-tokens",
        4,
    )
    small = call(
        "sample.py",
        picture,
        "你好",
        "--model",
        world / "model",
        "--max-new-tokens",
        4,
        "--quantize",
        "int8",
    )
    for done in (several, text_only, parts, small):
        assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "words, said",
    [
        (("gone.png", "问题"), "gone.png"),
        (("{broken}", "问题"), "broken.png"),
        (("https://a.b/c.png", "问题"), "URL"),
        (("{picture}", " "), "empty"),
        (("{picture}",), "must be the question"),
        (("nosuch.png", "--temperature", "0"), "nosuch.png"),
        (("{picture}", "问题", "--device", "foo"), "foo"),
        (("{picture}", "问题", "--temperature", "nan"), "--temperature"),
        (("{picture}", "a\udce9"), "Unicode"),
        (("问题", "--llm", "{world}/llama", "--vision", "{world}/clip"), "--projector"),
        (("{picture}", "问题", "--model", "gone"), "gone"),
        (("{picture}", "问题", "--top-p", "0"), "--top-p"),
        (("{picture}", "长" * 3000), "a shorter question"),
        (("{picture}", "问题", "--model", "{world}/clip"), "model_type"),
    ],
)
def test_sample_refuses_in_one_line(world, words, said):
    (world / "broken.png").write_bytes((world / "images/heldout-00000.png").read_bytes()[:200])
    words = [
        w.format(
            picture=world / "images/heldout-00000.png", broken=world / "broken.png", world=world
        )
        for w in words
    ]
    done = call(
        "sample.py",
        *words,
        *([] if {"--model", "--llm"} & set(words) else ["--model", world / "model"]),
    )
    lines = [line for line in done.stderr.splitlines() if line.startswith("sample.py: ")]
    assert (
        done.returncode == 2
        and len(lines) == 1
        and said in lines[0]
        and "Traceback" not in done.stderr
        and done.stdout == ""
    ), done.stderr


def test_sample_without_a_model_says_what_to_do(tmp_path):
    Image.fromarray(np.zeros((8, 8), np.uint8)).save(tmp_path / "a.png")
    done = call(ROOT / "sample.py", "a.png", "问题", cwd=tmp_path)
    assert done.returncode == 2 and "out/stage2" in done.stderr and "demo.sh" in done.stderr


def test_evaluate_counts_by_hand(world, tmp_path):
    """accuracy, blind and constant of report.json follow from predictions.jsonl; withheld pictures
    change answers only where a picture was.
    """
    done = call(
        "evaluate.py",
        world / "heldout.json",
        "--images",
        world / "images",
        "--model",
        world / "model",
        "--out",
        tmp_path,
        "--max-new-tokens",
        4,
    )
    assert done.returncode == 0, done.stderr
    report, rows = (
        json.loads((tmp_path / "report.json").read_text()),
        [json.loads(line) for line in open(tmp_path / "predictions.jsonl")],
    )
    assert (
        report["n"] == len(rows) == 20
        and report["pictures"] == 4
        and len(report["by"]["kind"]) == 5
    )
    assert (
        report["accuracy"]
        == sum(r["seen"]["answer"].strip("。 ") == r["truth"].strip("。 ") for r in rows) / 20
    )
    best = 0  # answers right when the commonest truth of each kind is always said
    for kind in {r["kind"] for r in rows}:
        truths = [r["truth"] for r in rows if r["kind"] == kind]
        best += max(truths.count(t) for t in truths)
    assert report["constant"] == best / 20 and "heldout.json: 20 questions" in done.stdout


GOOD = {
    "id": "a",
    "conversations": [{"from": "human", "value": "问"}, {"from": "gpt", "value": "答"}],
}


@pytest.mark.parametrize(
    "text, said",
    [
        ("", "not a JSON file"),
        ("{}", "not a list"),
        ("[1]", "row 0"),
        ('[{"conversations": []}]', "row 0"),
        ("[]", "no rows"),
        (json.dumps([GOOD, dict(GOOD, kind=3)]), "row 1"),
        (json.dumps([dict(GOOD, id="\ud800")]), "row 0"),
        (json.dumps([dict(GOOD, image=3)]), "row 0"),
        (json.dumps([dict(GOOD, image=["x" * 5000])]), "row 0"),
        ("[" * 100000, "not a JSON"),
        (
            json.dumps(
                [
                    {
                        "conversations": [
                            {"from": "human", "value": "长" * 3000},
                            GOOD["conversations"][1],
                        ]
                    }
                ]
            ),
            "row 0",
        ),
        (
            '[{"image": "../x", "conversations": [{"from": "human", "value": "<image>"}, '
            '{"from": "gpt", "value": "a"}]}]',
            "outside",
        ),
    ],
)
def test_evaluate_refuses_in_one_line(world, tmp_path, text, said):
    (tmp_path / "bad.json").write_text(text)
    done = call(
        "evaluate.py",
        tmp_path / "bad.json",
        "--images",
        world / "images",
        "--model",
        world / "model",
        "--out",
        tmp_path / "out",
    )
    assert (
        done.returncode == 2
        and said in done.stderr
        and len([x for x in done.stderr.splitlines() if x.startswith("evaluate.py: ")]) == 1
        and "Traceback" not in done.stderr
        and not (tmp_path / "out").exists()
    )


def test_evaluate_reads_json_lines(world, tmp_path):
    rows = json.loads((world / "heldout.json").read_text())[:3]
    (tmp_path / "rows.jsonl").write_text("\ufeff" + "\r\n".join(map(json.dumps, rows)) + "\n\n")
    words = (
        "--images",
        world / "images",
        "--model",
        world / "model",
        "--out",
        tmp_path / "out",
        "--max-new-tokens",
        4,
    )
    assert call("evaluate.py", tmp_path / "rows.jsonl", *words).returncode == 0
    (tmp_path / "rows.jsonl").write_text(json.dumps(rows[0]) + "\n\n{bad")
    done = call("evaluate.py", tmp_path / "rows.jsonl", *words)
    assert done.returncode == 2 and "rows.jsonl: row 1" in done.stderr


def test_only_its_own_folder_is_replaced(world, tmp_path):
    """toy.py and save_qilin replace what they made, and nothing else."""
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.txt").write_text("years of work")
    done = call(
        "-m",
        "demo.toy",
        tmp_path / "mine",
        "--language",
        2,
        "--alignment",
        2,
        "--instruction",
        2,
        "--heldout",
        2,
    )
    assert (
        done.returncode == 2
        and "mine" in done.stderr
        and (tmp_path / "mine/thesis.txt").read_text() == "years of work"
    )
    model = load_qilin(world / "model")
    with pytest.raises(ValueError, match="mine"):
        save_qilin(model, None, tmp_path / "mine")
    for _ in range(2):
        save_qilin(model, None, tmp_path / "model")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["mine", "model"]


def test_help_teaches_without_traceback():
    for script in (
        ["train.py"],
        ["sample.py"],
        ["evaluate.py"],
        ["-m", "demo.toy"],
        ["-m", "demo.real"],
        ["convert.py"],
    ):
        done = call(*script, "--help")
        assert done.returncode == 0 and "usage" in done.stdout
