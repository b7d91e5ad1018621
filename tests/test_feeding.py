"""Promise: rows are found by byte offset in whatever a JSON writer writes, lengths are those of the
tokens, every sample comes once an epoch, and little is padding.
"""

import json
import random
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT, run
from PIL import Image

from common.rows import Records, find_rows
from model_io.pixels import CLIP_MEAN, CLIP_STD, preprocess_image
from model_io.tokens import Tokenizer, encode_conversation
from training import batches, plan
from training.ranks import setup_distributed


def some_rows(n, seed=0):
    """Rows with whatever text may hold: quotes, backslashes, brackets in strings, escapes, Chinese,
    nested lists.
    """
    rng = random.Random(seed)
    pieces = [
        '"',
        "\\",
        "[",
        "]",
        "{",
        "}",
        ",",
        "\n",
        "肺部CT显示",
        "a",
        "\u2028",
        "😀",
        '\\"',
        ":",
    ]
    text = lambda: "".join(rng.choice(pieces) for _ in range(rng.randrange(12)))  # noqa: E731
    return [
        {
            "id": text(),
            "image": [text() for _ in range(rng.randrange(3))],
            "n": rng.random(),
            "x": [[], {}, {text(): [1, None, {"a": text()}]}],
            "conversations": [{"from": "human", "value": text()}, {"from": "gpt", "value": text()}],
        }
        for _ in range(n)
    ]


@pytest.mark.parametrize(
    "writing",
    [
        {},
        dict(indent=2),
        dict(ensure_ascii=False),
        dict(separators=(",", ":")),
        dict(indent="\t", ensure_ascii=False),
        "jsonl",
        "bom",
        "jsonl bom",
    ],
)
def test_rows_are_those_of_the_json_module(tmp_path, writing):
    rows, name = some_rows(300), "a.jsonl" if "jsonl" in writing else "a.json"
    text = (
        "\r\n".join(json.dumps(r) + " \n" * (i % 3) for i, r in enumerate(rows)) + "\n"
        if name == "a.jsonl"
        else json.dumps(rows, **(writing if isinstance(writing, dict) else {}))
    )
    (tmp_path / name).write_bytes(b"\xef\xbb\xbf" * ("bom" in writing) + text.encode())
    assert list(Records(tmp_path / name)) == rows


@pytest.mark.parametrize(
    "text, words",
    [
        ("", "empty"),
        ("[", "breaks off|no list"),
        ('[{"a": 1}', "row 0"),
        ('[{"a": 1}, {"a": "', "row 0|row 1"),
        ('{"a": 1}', "list of rows"),
        ('[{"a": 1} {"a": 2}]', "row 1"),
        ("[1, {}]", "row 0"),
        ('[{"a": 1}, 5]', "after row 0"),
        ('[{"a": 1}] x', "after row 0"),
        ('[{"a": 1},]', "after row 0"),
        ('"[]"', "no list"),
        ('[{"a": [1}]', "row 0"),
        ('[{"a": [1}]]', None),
        ("\0\0\0", "no list"),
        ("[]", None),
        (" [ ] ", None),
    ],
)
def test_damage_is_named(tmp_path, text, words):
    """Where brackets alone do not tell (a bracket closed by the wrong one), reading the row does.
    An empty list is a list.
    """
    (tmp_path / "a.json").write_text(text)
    if words is None and "a" not in text:
        path = tmp_path / "a.json"
        assert len(Records(path, ranges=find_rows(path))) == 0
        return
    with pytest.raises(ValueError, match=words or "line 1, row 0"):
        list(Records(tmp_path / "a.json"))


def test_a_large_file_takes_no_memory(tmp_path):
    """120 MB of rows: found and read one by one while the process grows by less than 25 MB."""
    row = json.dumps({"id": "x", "conversations": [{"from": "human", "value": "肺" * 5000}]})
    for name, between, ends in (("a.json", ",", "[]"), ("a.jsonl", "\n", "\n\n")):
        with open(tmp_path / name, "w") as file:
            file.write(ends[0].strip() + between.join([row] * (120_000_000 // len(row))) + ends[1])
        code = """
import sys; sys.path.insert(0, sys.argv[1])
from common.rows import Records
def peak():
    lines = open("/proc/self/status")
    return int(next(line for line in lines if line.startswith("VmHWM")).split()[1])
open("/proc/self/clear_refs", "w").write("5")
before = peak()
rows = Records(sys.argv[2])
assert len(rows) == int(sys.argv[3]) and all(rows[i]["id"] == "x" for i in range(0, len(rows), 50))
print((peak() - before) / 1024)"""
        done = subprocess.run(
            [sys.executable, "-c", code, ROOT, tmp_path / name, str(120_000_000 // len(row))],
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        assert float(done.stdout) < 25, done.stdout


@pytest.fixture
def group():
    setup_distributed()
    yield
    torch.distributed.destroy_process_group()


def dialogs(toy, tmp_path, files, max_length=2048):
    return batches.Dialogs(
        files,
        Tokenizer(toy / "llama"),
        16,
        64,
        template="v1",
        max_length=max_length,
        images=toy / "images",
        image_mode="pad",
        strict=False,
        out=tmp_path,
    )


def test_lengths_are_tokens_and_are_kept(toy, tmp_path, group, monkeypatch):
    """Chinese is as long as its tokens. The second start tokenises nothing; another --max-length or
    another byte in the file does; damage to the cache is made good.
    """
    rows = json.loads((toy / "mixed.json").read_text())
    (tmp_path / "a.json").write_text(json.dumps(rows[:9]))
    (tmp_path / "b.jsonl").write_text("\n".join(json.dumps(r) for r in rows[9:]))
    files, tokenizer = [tmp_path / "a.json", tmp_path / "b.jsonl"], Tokenizer(toy / "llama")
    first = dialogs(toy, tmp_path, files)
    want = [encode_conversation(r["conversations"], tokenizer, 16) for r in rows]
    assert (
        first.lengths.tolist() == [len(ids) for ids, _ in want]
        and [first.row(i) for i in range(len(first))] == rows
    )
    assert first.n_labels.tolist() == [sum(x != -100 for x in labels[1:]) for _, labels in want]
    assert (
        first.n_pictures.tolist()
        == [
            len([r["image"]] if isinstance(r.get("image"), str) else r.get("image") or [])
            for r in rows
        ]
        and max(first.n_pictures) == 2
    )
    calls, measure = [], batches.Dialogs.measure
    monkeypatch.setattr(
        batches.Dialogs,
        "measure",
        lambda self, rows, *a: calls.append(rows.path.name) or measure(self, rows, *a),
    )
    assert (dialogs(toy, tmp_path, files).lengths == first.lengths).all() and calls == []
    dialogs(toy, tmp_path, files, max_length=100)
    assert calls == ["a.json", "b.jsonl"]
    for cache in tmp_path.glob("a.json.*.npy"):
        cache.write_bytes(cache.read_bytes()[:100])
    assert (dialogs(toy, tmp_path, files).lengths == first.lengths).all() and calls[2:] == [
        "a.json"
    ]
    (cache,) = (path for path in tmp_path.glob("a.json.*.npy") if path.stat().st_size > 100)
    good = np.load(cache)
    others = good.copy()
    others[0, 2] += 1
    for wrong in (
        good[1:],
        others,
        good[:-1],
        good.astype(np.int32),
        good[:0],
        np.zeros(3),
    ):  # fewer rows, another length, no checksum, other kinds
        np.save(cache, wrong)
        del calls[3:]
        assert (dialogs(toy, tmp_path, files).lengths == first.lengths).all() and calls[3:] == [
            "a.json"
        ]
    del calls[3:]
    (tmp_path / "a.json").write_text(json.dumps(rows[:9]) + " ")
    dialogs(toy, tmp_path, files)
    assert calls[3:] == ["a.json"]


def test_too_long_samples_lose_the_end_of_their_answer(toy, tmp_path, group):
    """Cut at --max-length, pictures whole; without a label left, or without room for its picture, a
    sample is dropped and counted.
    """
    rows = json.loads((toy / "mixed.json").read_text())
    (tmp_path / "a.json").write_text(json.dumps(rows))
    tokenizer = Tokenizer(toy / "llama")
    for limit in (60, 80, 100, 140):
        data = dialogs(toy, tmp_path, [tmp_path / "a.json"], max_length=limit)
        kept = [
            row
            for row in rows
            if any(
                x != -100
                for x in encode_conversation(row["conversations"], tokenizer, 16, max_length=limit)[
                    1
                ][1:]
            )
        ]
        assert [data.row(i)["id"] for i in range(len(data))] == [
            row["id"] for row in kept
        ] and data.n_dropped == len(rows) - len(kept)
        whole = [
            encode_conversation(row["conversations"], tokenizer, 16, max_length=10**6)[0]
            for row in kept
        ]
        assert data.lengths.tolist() == [
            min(len(ids), limit) for ids in whole
        ] and data.n_cut == sum(len(ids) > limit for ids in whole)
        batch = data[list(range(len(data)))]
        for ids, full in zip(batch["input_ids"].tolist(), whole, strict=True):
            assert ids[: min(len(full), limit)] == full[:limit] and full[limit:].count(-200) == 0


def test_a_batch_is_counted_before_the_device_has_it(toy, tmp_path, group):
    """Labels that the loss counts and picture positions, as the model takes them."""
    data = dialogs(toy, tmp_path, [toy / "mixed.json"])
    batch = data[[0, 1, 2, 3, 4, 5]]
    inputs = batches.to_device(batch, torch.device("cpu"))
    n_labels = 0
    for row in batch["labels"].tolist():
        n_labels += sum(label != -100 for label in row[1:])
    n_positions = sum(row.count(-200) for row in batch["input_ids"].tolist())
    assert inputs["n_labels"] == batches.count([batch])["targets"] == n_labels > 0
    assert inputs["n_image_positions"] == n_positions > 0


def test_a_run_sees_every_sample_once(toy, tmp_path):
    """2 ranks with worker processes, two files, two epochs: every label of every sample is counted
    twice.
    """
    run(
        toy,
        tmp_path / "out",
        "--data",
        toy / "mixed.json",
        toy / "text.json",
        "--batch-size",
        7,
        "--epochs",
        2,
        "--workers",
        2,
        ranks=2,
    )
    tokenizer = Tokenizer(toy / "llama")
    labels = sum(
        sum(x != -100 for x in encode_conversation(r["conversations"], tokenizer, 16)[1][1:])
        for f in ("mixed.json", "text.json")
        for r in json.loads((toy / f).read_text())
    )
    assert (
        sum(
            r["n_targets"]
            for r in map(json.loads, open(tmp_path / "out/log.jsonl"))
            if "seconds" in r
        )
        == 2 * labels
    )


@pytest.mark.parametrize("stage, batch_size, most", [(1, 256, 0.05), (2, 128, 0.05)])
def test_padding_is_at_most_5_percent(stage, batch_size, most):
    """On lengths like the paper's, 8 ranks, whole samples of a rank at one time (32, 16): waiting
    for the slowest rank not counted, as in the trial.
    """
    lengths, _ = plan.paper_lengths(stage, 576)
    lengths = np.minimum(lengths, 2048)[::20]
    order = batches.batch_order(lengths, batch_size, 0, 0)
    assert plan.padding_share(lengths, order, 8, batch_size // 8) <= most
    rng = np.random.default_rng(0)
    mixed = [
        rng.permutation(len(lengths))[i : i + batch_size].tolist()
        for i in range(0, len(lengths), batch_size)
    ]
    assert plan.padding_share(lengths, mixed, 8, batch_size // 8) > 0.1 - 0.07 * (stage == 2)


def test_the_order_does_not_depend_on_the_ranks():
    """What the ranks of any number take of a batch is the batch; the first batch holds the longest
    sample.
    """
    lengths = np.random.default_rng(1).integers(10, 500, 333)
    for epoch in (0, 1):
        order = batches.batch_order(lengths, 32, 7, epoch)
        for W in (1, 2, 3, 4, 8):
            taken = [
                sorted(
                    i
                    for rank in range(W)
                    for micro in batches.cut_batch(batch, rank, W, 5)
                    for i in micro
                )
                for batch in order
            ]
            assert taken == [sorted(batch) for batch in order]


def test_looked_up_pixels_are_computed_pixels(tmp_path):
    """All 256 values of each channel, against the arithmetic of transformers' processor (rescale in
    float64, then float32).
    """
    image = Image.fromarray(np.arange(256, dtype=np.uint8).repeat(3).reshape(16, 16, 3))
    got = preprocess_image(image, 16)
    want = (np.asarray(image).astype(np.float64) * (1 / 255)).astype(np.float32)
    want = (want - np.array(CLIP_MEAN, dtype=np.float32)) / np.array(CLIP_STD, dtype=np.float32)
    assert np.array_equal(got.numpy(), want.transpose(2, 0, 1))
