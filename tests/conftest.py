"""What the tests share: tiny random models of transformers in the published layouts, the real
tokenizer, and the parity lines."""

import contextlib
import importlib.metadata
import io
import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

TESTS = Path(__file__).resolve().parent
ROOT = TESTS.parent

# a run in the background of a shell ignores Ctrl-C, and so would every program that the tests start
signal.signal(signal.SIGINT, signal.default_int_handler)
# before transformers is imported: no test may ask the network
os.environ["HF_HUB_OFFLINE"] = "1"
# oneDNN sees a CPU without bfloat16, so that commands of which no test says a dtype compute in the
# float32 of the references; before torch is imported, and for every program that the tests start
os.environ["ONEDNN_MAX_CPU_ISA"] = "AVX2"
sys.path[:0] = [str(ROOT), str(TESTS / "tools")]

import numpy as np
import pytest
import torch
from transformers import CLIPVisionConfig, CLIPVisionModel, LlamaConfig, LlamaForCausalLM
from transformers.processing_utils import transformers_module

import qilin_min as q
from common.files import run_cli
from model_io.export import save_qilin
from model_io.load import load_qilin
from model_io.tokens import Tokenizer

# mistral-common is installed for one file, without what its import needs
transformers_module.MistralCommonBackend = type("MistralCommonBackend", (), {})
# 56 / 14 squared
N_IMAGE = 16


@pytest.fixture(autouse=True)
def no_process_group_stays():
    """Some commands are run in the tests' own process, which joins a group once a start."""
    yield
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


@pytest.fixture
def report(record_property):
    """report(name, value, limit): keeps a line for the end of the run and asserts that value is not
    above limit."""

    def add(name, value, limit):
        line = f"parity: {name}: max difference {float(value):.1e} (limit {limit:.0e})"
        # travels from a worker of pytest-xdist to where the summary is printed
        record_property("parity", line)
        print(line)
        # also false for nan
        assert float(value) <= limit, line

    return add


def pytest_terminal_summary(terminalreporter):
    for outcome in terminalreporter.stats.values():
        for result in outcome:
            if getattr(result, "when", None) == "call":
                for _, line in result.user_properties:
                    terminalreporter.write_line(line)


@torch.no_grad()
def randomise(model, seed=0):
    """Weights large enough that every operation shows in the output: a fresh init hides a wrong
    norm or a missing bias."""
    generator = torch.Generator().manual_seed(seed)
    for name, param in model.named_parameters():
        noise = torch.randn(param.shape, generator=generator)
        if "norm" in name or "layrnorm" in name:
            centre = 1.0 if name.endswith("weight") else 0.0
            param.copy_(0.2 * noise + centre)
        else:
            spread = 0.12 if param.ndim > 1 else 0.2
            param.copy_(noise * spread)
    return model.eval()


def hf_llama(seed=0, **changes):
    sizes = dict(
        vocab_size=320,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=256,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        attn_implementation="eager",
    )
    return randomise(LlamaForCausalLM(LlamaConfig(**{**sizes, **changes})), seed)


def hf_clip_config(**changes):
    sizes = dict(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=4,
        image_size=56,
        patch_size=14,
        attn_implementation="eager",
    )
    return CLIPVisionConfig(**{**sizes, **changes})


def hf_clip(seed=1, **changes):
    return randomise(CLIPVisionModel(hf_clip_config(**changes)), seed)


def edit_json(path, **changes):
    """Change (or, with None, drop) keys of a JSON file."""
    raw = json.loads(path.read_text())
    raw.update(changes)
    path.write_text(json.dumps({k: v for k, v in raw.items() if v is not None}))


@pytest.fixture(scope="session")
def clip_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clip")
    hf_clip().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def llama_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llama")
    hf_llama().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def spm_path():
    try:
        path = importlib.metadata.distribution("mistral-common").locate_file(
            "mistral_common/data/tokenizer.model.v1"
        )
    except importlib.metadata.PackageNotFoundError:
        pytest.fail("mistral-common is not installed: pip install -r tests/requirements.txt")
    return Path(path)


@pytest.fixture(scope="session")
def tokenizer(spm_path):
    return Tokenizer(spm_path)


def make_qilin(projector_type="mlp2x_gelu", text=None, vision=None, n_token_ids=300, seed=3):
    """A Qilin with random weights; n_token_ids below vocab_size so that ids past the tokenizer
    exist."""
    text_sizes = dict(
        vocab_size=320,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
    )
    vision_sizes = dict(
        hidden_size=48,
        intermediate_size=80,
        num_hidden_layers=3,
        num_attention_heads=4,
        image_size=56,
        patch_size=14,
    )
    config = q.QilinConfig(
        q.TextConfig(**{**text_sizes, **(text or {})}),
        q.VisionConfig(**{**vision_sizes, **(vision or {})}),
        projector_type,
        n_token_ids,
    )
    return randomise(q.Qilin(config), seed)


def words(n, seed, n_token_ids=300):
    """n ids of words, no control id among them."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, n_token_ids, (n,), generator=generator).tolist()


def pictures(n, seed=5, size=56):
    return torch.randn(n, 3, size, size, generator=torch.Generator().manual_seed(seed))


IMG = [q.IMAGE_TOKEN_INDEX] * N_IMAGE
# 0, 1, 2 pictures
ROWS = [
    [1] + words(9, 1),
    [1] + words(3, 2) + IMG + words(7, 3),
    [1] + words(2, 4) + IMG + words(4, 5) + IMG + words(6, 6),
]
# of pictures(3)
ROW_PICTURES = [slice(0, 0), slice(0, 1), slice(1, 3)]


def hf_ids(ids, model):
    """Our input_ids in transformers' spelling: the picture token's id at picture positions."""
    return ids.masked_fill(ids == q.IMAGE_TOKEN_INDEX, model.config.image_token_id)


def in_process(main, *words, code=None, env=None):
    """A script's main() as `python SCRIPT words`, in this process, since importing torch takes
    longer than most of these runs: its exit code, stdout and stderr.

    code: the exit code it must have. No endpoint of the environment is seen, unless env names one.
    """
    argv = sys.argv
    environment = dict(os.environ)
    out = io.StringIO()
    err = io.StringIO()
    ended = 0
    try:
        sys.argv = [f"{main.__module__.split('.')[-1]}.py", *map(str, words)]
        for name in environment:
            if name.startswith("OPENAI_"):
                del os.environ[name]
        os.environ.update(env or {})
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                run_cli(main)
            except SystemExit as error:
                ended = error.code or 0
    finally:
        sys.argv = argv
        os.environ.clear()
        os.environ.update(environment)
    assert code is None or ended == code, f"exit code {ended}: {out.getvalue()}{err.getvalue()}"
    return SimpleNamespace(returncode=ended, stdout=out.getvalue(), stderr=err.getvalue())


# --- train.py, run as a user would ----------------------------------------------------------------


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@pytest.fixture(scope="session")
def toy(tmp_path_factory):
    """A toy world of a few dozen pictures."""
    out = tmp_path_factory.mktemp("world") / "toy"
    sizes = ("--language", "24", "--alignment", "24", "--instruction", "24", "--heldout", "4")
    subprocess.run([sys.executable, "-m", "demo.toy", out, *sizes], check=True, cwd=ROOT)
    instruction = json.loads((out / "instruction.json").read_text())
    language = json.loads((out / "language.json").read_text())
    mixed = instruction[:14] + language[:9]
    two = dict(mixed[0], id="two", image=[mixed[0]["image"], mixed[1]["image"]])
    two["conversations"] = [
        dict(two["conversations"][0], value="<image>\n<image>\n" + "两张图相同吗？"),
        {"from": "gpt", "value": "不相同。"},
    ]
    (out / "mixed.json").write_text(json.dumps(mixed + [two], ensure_ascii=False))
    (out / "text.json").write_text(json.dumps(mixed[14:], ensure_ascii=False))
    (out / "one.json").write_text(json.dumps(mixed[:1], ensure_ascii=False))
    return out


def python_on(ranks):
    """How a script is started on some ranks: under torchrun, where there are several."""
    if ranks == 1:
        return [sys.executable]
    torchrun = [sys.executable, "-m", "torch.distributed.run"]
    return [*torchrun, "--nproc_per_node", str(ranks), "--master_port", str(free_port())]


def run(toy, out, *options, ranks=1, stage=2, data="mixed.json", check=True):
    """One train.py run; -> (losses, gradient norms) of its steps, or the finished process with
    check=False."""
    command = [
        *python_on(ranks),
        ROOT / "train.py",
        *("--stage", stage),
        *("--llm", toy / "llama"),
        *("--vision", toy / "clip"),
        *("--projector", "fresh"),
        *("--images", toy / "images"),
        *("--data", toy / data),
        *("--out", out),
        *("--lr", "2e-3"),
        *("--workers", "0"),
        *options,
    ]
    done = subprocess.run(
        list(map(str, command)),
        capture_output=True,
        text=True,
        timeout=240,
        env=dict(os.environ, OMP_NUM_THREADS="1"),
    )
    if not check:
        return done
    assert done.returncode == 0, done.stderr[-3000:]
    with open(Path(out) / "log.jsonl") as file:
        lines = [json.loads(line) for line in file]
    steps = [line for line in lines if "loss" in line]
    losses = np.array([step["loss"] for step in steps])
    norms = np.array([step["grad_norm"] for step in steps])
    return losses, norms


@pytest.fixture(scope="session")
def toy_model(toy, tmp_path_factory):
    """A whole untrained model of the toy world, as a folder that every script loads."""
    out = tmp_path_factory.mktemp("whole") / "model"
    save_qilin(load_qilin(llm=toy / "llama", vision=toy / "clip"), Tokenizer(toy / "llama"), out)
    return out
