"""convert.py makes of every layout one folder that transformers 4.57 and 5 read as we do, bit for
bit the source's weights, or nothing at all.
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import in_process, make_qilin
from PIL import Image
from safetensors.torch import load_file, save_file
from test_layouts import write_clip, write_original

import convert
import qilin_min as q
from model_io.export import save_qilin
from model_io.load import load_qilin
from model_io.pixels import preprocess_image
from model_io.tokens import Tokenizer, encode_prompt

ROOT = Path(__file__).parent.parent
TEXT = dict(
    vocab_size=32000,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=4,
    max_position_embeddings=512,
)
VISION = dict(hidden_size=128, intermediate_size=80, num_attention_heads=2)


def call(*words):
    # in this process a tokenizer is compared once, not at every export
    return in_process(convert.main, *words)


@pytest.fixture(scope="module", params=["linear", "mlp2x_gelu"])
def world(request, tmp_path_factory, spm_path):
    """(reference as test_layouts has it, folder): an original release with the real tokenizer, and
    parts.
    """
    folder = tmp_path_factory.mktemp("convert")
    save_qilin(
        make_qilin(request.param, TEXT, VISION, n_token_ids=32000),
        Tokenizer(spm_path),
        folder / "ours",
    )
    reference = folder / "ours", load_file(folder / "ours/model.safetensors"), None, request.param
    write_original(folder / "original", reference, True, "gone", shards=2)
    (folder / "original/tokenizer.model").write_bytes(spm_path.read_bytes())
    write_clip(folder / "clip", reference)
    return reference, folder


def same_weights(one, two, n_rows=32000):
    one, two = (load_qilin(path, dtype=torch.float32) for path in (one, two))
    assert one.config.projector_type == two.config.projector_type
    for name, param in one.named_parameters():
        other = two.get_parameter(name)
        rows = n_rows if name in (q.EMBED, "lm_head.weight") else len(param)
        assert torch.equal(param[:rows], other[:rows]), name


def test_round_trip_is_bit_exact(world, tmp_path):
    (_, _, _, projector_type), folder = world
    done = call(folder / "original", tmp_path / "dst")
    assert done.returncode == 0 and projector_type in done.stdout, done.stderr
    same_weights(folder / "original", tmp_path / "dst")
    again = call(tmp_path / "dst", tmp_path / "dst2")
    assert again.returncode == 0, again.stderr
    for file in ("model.safetensors", "config.json", "tokenizer.json"):
        assert (tmp_path / "dst" / file).read_bytes() == (tmp_path / "dst2" / file).read_bytes(), (
            file
        )
    rows = load_file(tmp_path / "dst/model.safetensors")["language_model.model.embed_tokens.weight"]
    assert (
        rows.shape[0] % 64 == 0
        and rows.shape[0] > 32000
        and all(torch.equal(row, rows[0]) for row in rows[32000:])
    )
    assert json.loads((tmp_path / "dst/config.json").read_text())["image_token_index"] == 32000
    card = (tmp_path / "dst/README.md").read_text()
    assert "original" in card and "no medical advice" in card and str(tmp_path) not in card


def test_parts_and_dtypes(world, tmp_path):
    """Parts given beside a source take its place; bf16 on disk stays bf16; what differs goes out as
    float32, exactly.
    """
    (_, tensors, _, projector_type), folder = world
    projector = {
        n.replace(
            "multi_modal_projector.linear_1",
            "model.mm_projector" + ".0" * (projector_type != "linear"),
        ).replace("multi_modal_projector.linear_2", "model.mm_projector.2"): t.bfloat16()
        for n, t in tensors.items()
        if "projector" in n and not (projector_type == "linear" and "linear_2" in n)
    }
    save_file(projector, tmp_path / "p.safetensors")
    done = call(folder / "original", tmp_path / "mixed", "--projector", tmp_path / "p.safetensors")
    assert done.returncode == 0 and "float32" in done.stdout, done.stderr
    out = load_qilin(tmp_path / "mixed")
    assert all(
        torch.equal(p, projector["model." + n].float())
        for n, p in out.named_parameters()
        if n.startswith("mm_projector.")
    )
    done = call(
        tmp_path / "half",
        "--llm",
        folder / "original",
        "--vision",
        folder / "clip",
        "--projector",
        tmp_path / "p.safetensors",
        "--dtype",
        "bfloat16",
    )
    assert done.returncode == 0, done.stderr
    assert {t.dtype for t in load_file(tmp_path / "half/model.safetensors").values()} == {
        torch.bfloat16
    }
    done = call(tmp_path / "half", tmp_path / "half2")
    assert (
        "bfloat16" in done.stdout
        and (tmp_path / "half/model.safetensors").read_bytes()
        == (tmp_path / "half2/model.safetensors").read_bytes()
    )


def test_what_float16_cannot_hold_is_refused(world, tmp_path):
    _, folder = world
    tensors = {
        n: t * 1e6 if n.endswith("layers.1.mlp.up_proj.weight") else t
        for n, t in load_file(folder / "ours/model.safetensors").items()
    }
    (tmp_path / "src").mkdir()
    for name in ("config.json", "tokenizer.model"):
        (tmp_path / "src" / name).write_bytes((folder / "ours" / name).read_bytes())
    save_file(tensors, tmp_path / "src/model.safetensors")
    done = call(tmp_path / "src", tmp_path / "dst", "--dtype", "float16")
    assert (
        done.returncode == 2
        and "layers.1.mlp.up_proj.weight" in done.stderr
        and not (tmp_path / "dst").exists()
    )
    assert call(tmp_path / "src", tmp_path / "dst", "--dtype", "bfloat16").returncode == 0


QUESTIONS = [
    "<image>\n肺部有没有结节？请说明。",
    "<image>\n<image>\nCompare  both 龘 😀.",
    "<image>",
    "没有图片的问题?",
]


def test_transformers_4_reads_it_as_we_do(world, tmp_path, report):
    target = os.environ.get("TRANSFORMERS_4")
    if not target:
        pytest.skip(
            "TRANSFORMERS_4 names no folder with transformers 4.57.6 (tests/run.sh makes one)"
        )
    (_, _, _, projector_type), folder = world
    assert call(folder / "original", tmp_path / "dst").returncode == 0
    (tmp_path / "questions.json").write_text(json.dumps(QUESTIONS))
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (61, 40, 3), dtype=np.uint8))
    image.save(tmp_path / "image.png")
    done = subprocess.run(
        [
            sys.executable,
            ROOT / "tests/tools/transformers4.py",
            tmp_path / "dst",
            tmp_path / "questions.json",
            tmp_path / "image.png",
            tmp_path / "seen.pt",
        ],
        capture_output=True,
        text=True,
        env=dict(os.environ, PYTHONPATH=target, OMP_NUM_THREADS="1"),
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "newly initialized" not in done.stderr and "not used" not in done.stderr
    seen, model, tokenizer = (
        torch.load(tmp_path / "seen.pt", weights_only=True),
        load_qilin(tmp_path / "dst"),
        Tokenizer(tmp_path / "dst"),
    )
    assert not any(seen["info"].values()), seen["info"]
    worst = 0.0
    for question, row in zip(QUESTIONS, seen["rows"], strict=True):
        ids = torch.tensor([encode_prompt([{"from": "human", "value": question}], tokenizer, 16)])
        assert torch.equal(row["ids"], ids[0].masked_fill(ids[0] == q.IMAGE_TOKEN_INDEX, 32000))
        pixels = preprocess_image(tmp_path / "image.png", 56, model.config.image_mode)[None].repeat(
            question.count("<image>"), 1, 1, 1
        )
        assert len(pixels) == 0 or torch.equal(row["pixels"], pixels)
        with torch.no_grad():
            worst = max(
                worst, (model(ids, pixels)[0, :, :32000] - row["logits"][:, :32000]).abs().max()
            )
    report(f"export in transformers 4.57 ({projector_type})", worst, 1e-4)


def test_info(world, tmp_path):
    (_, tensors, _, projector_type), folder = world
    said = call("info", folder / "original").stdout
    n = {
        part: sum(t.numel() for name, t in tensors.items() if key in name)
        for part, key in (("vision_tower", "vision_tower"), ("mm_projector", "projector"))
    }
    assert (
        "original LLaVA" in said
        and "tower inside" in said
        and "in 2 files, 3 ignorable" in said
        and "32000 pieces" in said
        and projector_type in said
        and "none missing" in said
    )
    assert f"{n['vision_tower']:,} parameters" in said and all(
        word in said for word in ("float32", "bfloat16", "int8", "16 tokens a picture")
    )
    assert (
        "up to 4.51" in call("info", folder / "ours").stdout
        and "CLIP" in call("info", folder / "clip").stdout
    )
    done = call("info", tmp_path)
    assert (
        done.returncode == 2
        and str(tmp_path) in done.stderr
        and len(done.stderr.strip().splitlines()) == 1
    )


def truncate(size):
    return lambda file: file.write_bytes(file.read_bytes()[:size])


def spoil_one(tensor):
    tensor = tensor.clone()
    tensor[777, 7] = torch.inf
    return tensor


DAMAGE = {
    "header": lambda f: truncate(20)(f / "model.safetensors"),
    "data": lambda f: truncate(-50)(f / "model.safetensors"),
    "empty": lambda f: truncate(0)(f / "model.safetensors"),
    "config": lambda f: (f / "config.json").write_text(""),
    "tokenizer": lambda f: truncate(1000)(f / "tokenizer.model"),
    "index": lambda f: (
        (f / "model.safetensors").unlink(),
        (f / "model.safetensors.index.json").write_text(
            '{"weight_map": {"a": "gone.safetensors"}}'
        ),
    ),
    "nan": lambda f: save_file(
        {
            n: torch.full_like(t, torch.nan) if "norm" in n else t
            for n, t in load_file(f / "model.safetensors").items()
        },
        f / "model.safetensors",
    ),
    "one nan of a million": lambda f: save_file(
        {
            n: spoil_one(t) if "embed_tokens" in n else t
            for n, t in load_file(f / "model.safetensors").items()
        },
        f / "model.safetensors",
    ),
    "pickled code": lambda f: (
        (f / "model.safetensors").unlink(),
        (f / "pytorch_model.bin").write_bytes(b"cposix\nsystem\n(S'exit 1'\ntR."),
    ),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_one_line_and_no_folder(kind, world, tmp_path):
    _, folder = world
    for file in (folder / "ours").iterdir():
        (tmp_path / "src").mkdir(exist_ok=True)
        (tmp_path / "src" / file.name).write_bytes(file.read_bytes())
    DAMAGE[kind](tmp_path / "src")
    done = call(tmp_path / "src", tmp_path / "dst")
    assert (
        done.returncode == 2
        and len(done.stderr.strip().splitlines()) == 1
        and (
            str(tmp_path / "src") in done.stderr
            or "not finite in model.embed_tokens.weight" in done.stderr
        )
    ), done.stderr
    assert not (tmp_path / "dst").exists()


def test_a_tensor_in_two_shards(world, tmp_path):
    _, folder = world
    file = folder / "original/pytorch_model-00001-of-00002.bin"
    (tmp_path / "src").mkdir()
    for f in (folder / "original").iterdir():
        (tmp_path / "src" / f.name).write_bytes(f.read_bytes())
    part, other = (
        torch.load(file, weights_only=True),
        torch.load(folder / "original/pytorch_model-00002-of-00002.bin", weights_only=True),
    )
    torch.save(
        part | dict([next((n, t) for n, t in other.items() if "inv_freq" not in n)]),
        tmp_path / "src" / file.name,
    )
    done = call(tmp_path / "src", tmp_path / "dst")
    assert done.returncode == 2 and "is also in" in done.stderr and not (tmp_path / "dst").exists()


@pytest.mark.parametrize("delay", [0.0, 0.05, 0.3])
def test_an_interrupted_run_leaves_nothing_and_can_be_repeated(delay, world, tmp_path):
    """Killed while it writes: only DST.partial is there, and the next run needs no cleaning."""
    _, folder = world
    process = subprocess.Popen(
        [sys.executable, ROOT / "convert.py", folder / "original", tmp_path / "dst"],
        stderr=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
    )
    while process.poll() is None and not (tmp_path / "dst.partial").exists():
        time.sleep(0.001)
    time.sleep(delay)
    process.send_signal(signal.SIGKILL)
    killed = process.wait() != 0
    assert killed != (tmp_path / "dst").exists() or not (tmp_path / "dst.partial").exists()
    assert call(folder / "original", tmp_path / "dst").returncode == 0
    assert sorted(p.name for p in tmp_path.iterdir()) == ["dst"]
    same_weights(folder / "original", tmp_path / "dst")


THESIS = {"mine/thesis.txt": "years"}
WEIGHTS = {"mine/config.json": "{}", "mine/model.safetensors": "years"}
# a name that is given, what lies there before, what must be said
TAKEN = [
    ("mine", THESIS, "something else"),
    # config.json is the name of many things
    ("mine", {"mine/config.json": "{}"} | THESIS, "something else"),
    # a language model, whole
    ("mine", WEIGHTS, "something else"),
    # an export to which somebody added
    ("mine", WEIGHTS | {"mine/preprocessor_config.json": "{}"} | THESIS, "something else"),
    ("mine", WEIGHTS | {"mine/preprocessor_config.json": "{}", "mine/a/b": ""}, "something else"),
    # names that are needed meanwhile
    ("new", {"new.partial/thesis.txt": "years"}, "new.partial is there"),
    ("new", {"new.old/thesis.txt": "years"}, "new.old is there"),
    ("new", {"new.partial": "years"}, "new.partial is there"),
    # a file in the way
    ("mine/new", {"mine": "years"}, "mine is no folder that can be written to"),
    ("/", {}, "something else"),
    ("..", {}, "something else"),
]


@pytest.mark.parametrize("name, files, said", TAKEN)
def test_nothing_of_others_gives_way(name, files, said, world, tmp_path):
    _, folder = world
    for file, text in files.items():
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).write_text(text)
    done = call(folder / "original", tmp_path / name)
    assert done.returncode == 2 and said in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    left = {str(f.relative_to(tmp_path)): f.read_text() for f in tmp_path.rglob("*") if f.is_file()}
    assert left == files


def test_an_earlier_export_gives_way(world, tmp_path):
    """As does what an interrupted one left."""
    _, folder = world
    for name in ("shard-0", "README.md", "model-00001-of-00002.safetensors", ".tmpJm5EzY"):
        (tmp_path / "dst.partial").mkdir(exist_ok=True)
        (tmp_path / "dst.partial" / name).write_text("x")
    for _ in range(2):
        assert call(folder / "original", tmp_path / "dst").returncode == 0
    assert [path.name for path in tmp_path.iterdir()] == ["dst"]


@pytest.mark.parametrize(
    "words, said",
    [
        (("gone", "dst"), "gone"),
        (("info",), "info PATH"),
        (("{src}", "{src}"), "source as well"),
        (("{src}", "{mine}"), "something else"),
        (("dst", "--llm", "{src}"), "--vision"),
        (("{src}", "a", "b"), "info PATH"),
    ],
)
def test_bad_words(words, said, world, tmp_path):
    _, folder = world
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.txt").write_text("years")
    done = call(*(w.format(src=folder / "original", mine=tmp_path / "mine") for w in words))
    assert (
        done.returncode == 2
        and said in done.stderr
        and len(done.stderr.strip().splitlines()) == 1
        and (tmp_path / "mine/thesis.txt").exists()
    )
