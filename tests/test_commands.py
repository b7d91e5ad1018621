"""Promise: sample.py, evaluate.py and toy.py do what their help says, and bad input ends in one line and exit code 2."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from qilin_min import Tokenizer, load_qilin, save_qilin

ROOT = Path(__file__).parent.parent


def call(*words, cwd=ROOT):
    env = dict(os.environ, OMP_NUM_THREADS="1", PYTHONPATH=str(ROOT))
    return subprocess.run([sys.executable, *map(str, words)], capture_output=True, text=True, cwd=cwd, env=env)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A toy world and an untrained whole model of it."""
    out = tmp_path_factory.mktemp("world") / "toy"
    done = call(ROOT / "toy.py", out, "--language", 8, "--alignment", 8, "--instruction", 8, "--heldout", 4)
    assert done.returncode == 0, done.stderr
    save_qilin(load_qilin(llm=out / "llama", vision=out / "clip"), Tokenizer(out / "llama"), out / "model")
    return out


def test_toy_world_is_the_same_for_the_same_seed(world, tmp_path):
    call(ROOT / "toy.py", tmp_path / "again", "--language", 8, "--alignment", 8, "--instruction", 8, "--heldout", 4)
    files = sorted(p.relative_to(tmp_path / "again") for p in (tmp_path / "again").rglob("*") if p.is_file())
    assert len(files) > 20
    for file in files:
        assert (tmp_path / "again" / file).read_bytes() == (world / file).read_bytes(), file


def test_sample_streams_what_generate_says(world):
    """stdout holds the answer alone: greedy, it equals decoding all ids of generate at once, whole characters included."""
    from qilin_min import answer_ids, encode_prompt, preprocess_image
    picture, model, tokenizer = world / "images/heldout-00000.png", load_qilin(world / "model"), Tokenizer(world / "model")
    prompt = encode_prompt([{"from": "human", "value": "图中有<image>吗?</s>"}], tokenizer, model.config.n_image_tokens, n_images=1)
    want = tokenizer.decode(answer_ids(model, [prompt], preprocess_image(picture, 64)[None], max_new_tokens=12)[0])
    done = call("sample.py", picture, "图中有<image>吗?</s>", "--model", world / "model", "--max-new-tokens", 12)
    assert done.returncode == 0 and done.stdout == want + "\n" and "no medical advice" in done.stderr
    several = call("sample.py", picture, picture, "两张图相同吗?", "--model", world / "model", "--max-new-tokens", 4, "--temperature", 1, "--top-p", 0.9, "--seed", 1)
    text_only = call("sample.py", "你好", "--model", world / "model", "--max-new-tokens", 4)
    parts = call("sample.py", picture, "你好", "--llm", world / "llama", "--vision", world / "clip", "--max-new-tokens", 4)
    small = call("sample.py", picture, "你好", "--model", world / "model", "--max-new-tokens", 4, "--quantize", "int8")
    for done in (several, text_only, parts, small):
        assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("words, said", [
    (("gone.png", "问题"), "gone.png"), (("{broken}", "问题"), "broken.png"), (("https://a.b/c.png", "问题"), "URL"), (("{picture}", " "), "empty"),
    (("{picture}",), "must be the question"), (("{picture}", "问题", "--model", "gone"), "gone"), (("{picture}", "问题", "--top-p", "0"), "--top-p"),
    (("{picture}", "长" * 3000), "ask a shorter question"), (("{picture}", "问题", "--model", "{world}/clip"), "tokenizer")])
def test_sample_refuses_in_one_line(world, words, said):
    (world / "broken.png").write_bytes((world / "images/heldout-00000.png").read_bytes()[:200])
    words = [w.format(picture=world / "images/heldout-00000.png", broken=world / "broken.png", world=world) for w in words]
    done = call("sample.py", *words, *([] if "--model" in words else ["--model", world / "model"]))
    lines = [line for line in done.stderr.splitlines() if line.startswith("sample.py: ")]
    assert done.returncode == 2 and len(lines) == 1 and said in lines[0] and "Traceback" not in done.stderr and done.stdout == "", done.stderr


def test_sample_without_a_model_says_what_to_do(tmp_path):
    Image.fromarray(np.zeros((8, 8), np.uint8)).save(tmp_path / "a.png")
    done = call(ROOT / "sample.py", "a.png", "问题", cwd=tmp_path)
    assert done.returncode == 2 and "out/stage2" in done.stderr and "demo.sh" in done.stderr


def test_evaluate_counts_by_hand(world, tmp_path):
    """accuracy, blind and constant of report.json follow from predictions.jsonl; withheld pictures change answers only where a picture was."""
    done = call("evaluate.py", world / "heldout.json", "--images", world / "images", "--model", world / "model", "--out", tmp_path, "--max-new-tokens", 4)
    assert done.returncode == 0, done.stderr
    report, rows = json.loads((tmp_path / "report.json").read_text()), [json.loads(line) for line in open(tmp_path / "predictions.jsonl")]
    assert report["n"] == len(rows) == 20 and report["pictures"] == 4 and len(report["kinds"]) == 5
    assert report["accuracy"] == sum(r["answer"].strip("。 ") == r["truth"].strip("。 ") for r in rows) / 20
    counts = [[r["truth"] for r in rows].count(t) for t in {r["truth"] for r in rows}]
    assert report["constant"] == max(counts) / 20 and "heldout.json: 20 questions" in done.stdout


@pytest.mark.parametrize("text, said", [("", "not a JSON file"), ("{}", "not a list"), ("[1]", "row 0"), ('[{"conversations": []}]', "row 0"),
                                        ('[{"image": "../x", "conversations": [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": "a"}]}]', "outside")])
def test_evaluate_refuses_in_one_line(world, tmp_path, text, said):
    (tmp_path / "bad.json").write_text(text)
    done = call("evaluate.py", tmp_path / "bad.json", "--images", world / "images", "--model", world / "model", "--out", tmp_path / "out")
    assert done.returncode == 2 and said in done.stderr and len(done.stderr.strip().splitlines()) == 1 and not (tmp_path / "out").exists()


def test_help_teaches_without_traceback():
    for script in ("train.py", "sample.py", "evaluate.py", "toy.py", "demo_real.py"):
        done = call(script, "--help")
        assert done.returncode == 0 and "usage" in done.stdout
