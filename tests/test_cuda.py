"""Promise: what a CPU cannot show holds on a GPU: NCCL, bf16, the same answers, the plan's memory.
Skips without CUDA; `train.py --smoke` is the longer proof."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT, ROWS, make_qilin, pictures, run

import qilin_min as q
from model_io.graphs import capture_decoding
from model_io.lowbit import choose_ways, linear_layers, quantize_linears
from training.costs import GIB, count_sizes, step_memory

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


def test_answers_on_cuda_are_those_on_the_cpu(report):
    model = make_qilin()
    pixels, prompts = pictures(3), ROWS
    want = q.answer_ids(model, prompts, pixels, max_new_tokens=12)
    ids = q.pad_rows(prompts, 0)
    logits = model(ids, pixels)
    model.cuda()
    report(
        "cuda: float32 logits and the CPU's",
        (model(ids.cuda(), pixels.cuda()).cpu() - logits).abs().max(),
        1e-2,
    )  # TF32 is off by default
    assert q.answer_ids(model, prompts, pixels, max_new_tokens=12) == want


def test_captured_answers_are_those_of_single_launches():
    model = make_qilin().cuda()
    want = q.answer_ids(model, ROWS, pictures(3), max_new_tokens=40)
    capture_decoding(model)
    assert q.answer_ids(model, ROWS, pictures(3), max_new_tokens=40) == want
    assert model.decode.trouble is None


@pytest.mark.parametrize("bits", [8, 4])
def test_low_bits_answer_as_when_widened(bits):
    model = make_qilin(text=dict(hidden_size=128, intermediate_size=256)).cuda().bfloat16()
    weights = [linear.weight.detach() for _, _, linear in linear_layers(model)]
    quantize_linears(model, bits)
    for (_, _, linear), weight in zip(linear_layers(model), weights, strict=True):
        linear.cuda().bfloat16().quantize_(weight)
    x = torch.randn(1, 1, 128, device="cuda").bfloat16()
    first = model.model.layers[0].mlp.gate_proj
    with torch.no_grad():
        want = first(x)
        print(choose_ways(model))
        off = (first(x) - want).norm() / want.norm()
    assert off < 0.02


def test_training_in_bf16_follows_float32(toy, tmp_path, report):
    """All GPUs against one CPU process: losses of the first steps; with --deterministic stop and
    resume bit for bit."""
    n = min(torch.cuda.device_count(), 4)
    options = "--batch-size", 8, "--deterministic"
    losses, _ = run(toy, tmp_path / "gpu", *options, "--save-every", 1, "--keep", 9, ranks=n)
    env = dict(os.environ, CUDA_VISIBLE_DEVICES="", OMP_NUM_THREADS="1")
    words = [sys.executable, ROOT / "train.py", "--stage", 2]
    words += ["--llm", toy / "llama", "--vision", toy / "clip", "--projector", "fresh"]
    words += ["--images", toy / "images", "--data", toy / "mixed.json", "--out", tmp_path / "cpu"]
    words += ["--lr", "2e-3", "--batch-size", 8]
    subprocess.run(list(map(str, words)), check=True, env=env, capture_output=True)
    want = np.array(
        [r["loss"] for r in map(json.loads, open(tmp_path / "cpu/log.jsonl")) if "seconds" in r]
    )
    report("cuda: losses in bf16 and in float32 (relative)", np.abs(losses / want - 1).max(), 0.05)
    again, _ = run(
        toy,
        tmp_path / "again",
        *options,
        "--resume",
        tmp_path / "gpu/checkpoints/step-1",
        ranks=n,
    )
    assert np.array_equal(again, losses[1:])


def test_peak_memory_is_the_plans(report):
    """One GPU, 0.3 billion parameters: torch's allocator beside the formula, within 15 %."""
    text = dict(
        vocab_size=32000,
        hidden_size=1024,
        intermediate_size=2752,
        num_hidden_layers=16,
        num_attention_heads=8,
    )
    vision = (64, 128, 2, 2, 56, 14)
    code = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})

import torch

import qilin_min as q
from train import shard_model
from training.ranks import setup_distributed

_, _, device = setup_distributed()
config = q.QilinConfig(q.TextConfig(**{text!r}), q.VisionConfig(*{vision!r}))
with torch.device("meta"):
    model = q.Qilin(config)
model = shard_model(model, device, ("mm_projector", "llm"), torch.bfloat16)
model._apply(lambda t: torch.empty_like(t, device=device))
with torch.no_grad():
    for param in model.parameters():
        local = param.to_local() if hasattr(param, "to_local") else param
        local.normal_(0, 0.02)
trained = [param for param in model.parameters() if param.requires_grad]
optimizer = torch.optim.AdamW(trained, fused=True)
model.train()
model.model.n_checkpointed = 4
ids = torch.ones(4, 512, dtype=torch.int64, device=device)
for step in range(2):
    model(ids, None, ids, reduction="mean").backward()
    optimizer.step()
    optimizer.zero_grad()
print(torch.cuda.max_memory_allocated())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    config = q.QilinConfig(q.TextConfig(**text), q.VisionConfig(*vision))
    sizes = count_sizes(config, ("mm_projector", "llm"))
    want = step_memory(sizes, 1, 4 * 512, 4, n_labels=4 * 511).peak
    got = int(done.stdout.split()[-1])
    report(
        f"cuda: plan {want / GIB:.2f} GiB, allocator {got / GIB:.2f} (relative)",
        abs(want / got - 1),
        0.15,
    )


def test_smoke(tmp_path):
    done = subprocess.run(
        [sys.executable, ROOT / "train.py", "--smoke"], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0 and "no CUDA" not in done.stdout, done.stdout[-3000:]
