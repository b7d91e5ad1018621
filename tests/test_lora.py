"""Promise: --lora trains the adapters that peft trains, on a float or an int8 base, leaves every
other weight alone, and comes out merged.
"""

import copy
import json
import os

import numpy as np
import pytest
import torch
from conftest import ROWS, hf_llama, make_qilin, run, words
from peft import LoraConfig, get_peft_model

import qilin_min as q
from model_io.export import full_tensors
from model_io.load import load_qilin
from model_io.lowbit import QuantizedLinear, add_lora
from model_io.pixels import preprocess_image, row_pictures
from model_io.tokens import Tokenizer, encode_conversation
from model_io.weights import init_fresh

RANK, ALPHA = 3, 5.0
LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@pytest.fixture(scope="module")
def pair():
    """(ours, peft's) on the same LLaMA with the same random adapters."""
    llama = hf_llama(num_key_value_heads=2)
    ours = make_qilin(text=dict(num_key_value_heads=2, rms_norm_eps=llama.config.rms_norm_eps))
    ours.load_state_dict({**ours.state_dict(), **llama.state_dict()})
    theirs = get_peft_model(
        llama, LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=LINEARS, lora_dropout=0.0)
    )
    add_lora(ours, RANK, ALPHA)
    generator = torch.Generator().manual_seed(0)
    for name, p in theirs.named_parameters():
        if "lora_" in name:
            p.data = torch.randn(p.shape, generator=generator) * 0.1
            ours.get_parameter(
                name.removeprefix("base_model.model.").replace(".default.weight", "")
            ).data = p.data.clone()
    return ours, theirs


def test_logits_and_gradients_are_pefts(pair, report):
    ours, theirs = pair
    ids = torch.tensor([[1] + words(40, 7), [1] + words(40, 8)])
    for name, p in ours.named_parameters():
        p.requires_grad_(q.part_of(name) == "lora")
    want = theirs(input_ids=ids, labels=ids)
    report("lora: logits", (ours(ids) - want.logits).abs().max().detach(), 1e-4)
    want.loss.backward()
    ours(ids, labels=ids).backward()
    worst = max(
        float(
            (
                ours.get_parameter(
                    name.removeprefix("base_model.model.").replace(".default.weight", "")
                ).grad
                - p.grad
            ).norm()
            / p.grad.norm()
        )
        for name, p in theirs.named_parameters()
        if "lora_" in name
    )
    report("lora: gradients of all adapters (relative)", worst, 1e-4)
    assert sum(p.requires_grad for p in ours.parameters()) == 2 * 7 * 2


def test_merged_weights_are_pefts(pair, report):
    ours, theirs = pair
    merged = dict(full_tensors(ours))
    want = copy.deepcopy(theirs).merge_and_unload().state_dict()
    assert not any("lora" in name for name in merged)
    report(
        "lora: merged weights",
        max(float((merged[name] - tensor).abs().max()) for name, tensor in want.items()),
        1e-6,
    )


def test_adapters_start_as_no_change():
    """B is zero, and A is drawn as peft's kaiming_uniform(a=sqrt(5)): uniform within 1 / sqrt(in),
    the same for the same seed.
    """
    models = [make_qilin() for _ in range(2)]
    ids = torch.tensor([ROWS[0]])
    want = models[0](ids)
    for model in models:
        add_lora(model, 8, 16.0)
        init_fresh(model, seed=1, projector=False)
    a = models[0].model.layers[0].mlp.down_proj.lora_A
    assert torch.equal(models[0](ids), want) and torch.equal(
        a, models[1].model.layers[0].mlp.down_proj.lora_A
    )
    bound = 96**-0.5
    assert a.abs().max() <= bound and a.std().item() == pytest.approx(
        bound / 3**0.5, rel=0.1
    )  # a uniform's standard deviation


@pytest.mark.parametrize("bits", [8, 4])
def test_gradients_through_a_quantised_base(report, bits):
    """Equal to those of an nn.Linear whose weight is what the bits stand for; the widened weight is
    not kept between forward and backward.
    """
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(5, 128, generator=generator, requires_grad=True)
    layer = QuantizedLinear(128, 48, bits)
    layer.quantize_(torch.randn(48, 128, generator=generator))
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.shape) or t, lambda t: t):
        y = layer(x)
    y.square().sum().backward()
    x2 = x.detach().clone().requires_grad_()
    torch.nn.functional.linear(x2, layer.dequantize(torch.float32)).square().sum().backward()
    report(f"lora: gradient through int{bits}", (x.grad - x2.grad).abs().max(), 1e-4)
    assert (48, 128) not in kept


@pytest.mark.parametrize(
    "options, ranks",
    [
        (("--lora", 4), 2),
        (("--lora", 4, "--quantize", "int8"), 1),
        pytest.param(
            ("--lora", 2, "--quantize", "int4", "--checkpoint-layers", 3),
            2,
            marks=pytest.mark.skipif(not os.environ.get("LONG"), reason="--long"),
        ),
    ],
)
def test_train_py_trains_adapters_and_merges(toy, tmp_path, options, ranks):
    """The loss falls; final/ is a whole model without adapters that loads anywhere; embeddings,
    norms, head and tower are as they were; it answers as the trained model did.
    """
    losses, _ = run(
        toy,
        tmp_path / "out",
        *options,
        "--batch-size",
        8,
        "--epochs",
        4,
        "--lr",
        "1e-2",
        "--val-data",
        toy / "mixed.json",
        ranks=ranks,
    )
    assert losses[-3:].mean() < 0.9 * losses[:3].mean()
    before, after = load_qilin(llm=toy / "llama", vision=toy / "clip"), load_qilin(tmp_path / "out")
    for name, p in before.named_parameters():
        is_same = torch.equal(p, after.get_parameter(name)[: len(p)])
        assert is_same == (
            q.part_of(name) != "mm_projector"
            and ("proj" not in name or q.part_of(name) == "vision_tower")
        ), name
    held_out = [
        r["val_loss"] for r in map(json.loads, open(tmp_path / "out/log.jsonl")) if "val_loss" in r
    ][-1]
    tokenizer, total, n = Tokenizer(toy / "llama"), 0.0, 0
    for row in json.loads((toy / "mixed.json").read_text()):
        ids, labels = encode_conversation(
            row["conversations"], tokenizer, after.config.n_image_tokens
        )
        pixels = [preprocess_image(path, 64) for path in row_pictures(row, toy / "images")]
        with torch.no_grad():
            logits = after(torch.tensor([ids]), torch.stack(pixels) if pixels else None)[
                0, :-1, : tokenizer.vocab_size
            ]  # an export pads the vocabulary
        total += float(
            torch.nn.functional.cross_entropy(logits, torch.tensor(labels[1:]), reduction="sum")
        )
        n += sum(label != q.IGNORE_INDEX for label in labels[1:])
    assert total / n == pytest.approx(held_out, abs=1e-4)
    assert json.loads((tmp_path / "out/run.json").read_text())["parameters"]["trained"] < 200_000


@pytest.mark.skipif(not os.environ.get("LONG"), reason="--long")
def test_one_process_and_two_train_the_same_adapters(toy, tmp_path, report):
    runs = [
        run(toy, tmp_path / str(ranks), "--lora", 4, "--batch-size", 7, ranks=ranks)
        for ranks in (1, 2)
    ]
    report("lora: losses of 2 processes and of 1", np.abs(runs[0][0] - runs[1][0]).max(), 1e-4)
    report(
        "lora: gradient norms of 2 processes and of 1 (relative)",
        np.abs(runs[0][1] / runs[1][1] - 1).max(),
        1e-3,
    )


@pytest.mark.parametrize(
    "options, stage, words",
    [
        (("--lora", 4), 1, "stage 1"),
        (("--quantize", "int8"), 2, "--lora"),
        (("--lora", -1), 2, "--lora"),
    ],
)
def test_what_makes_no_sense_is_one_line(toy, tmp_path, options, stage, words):
    done = run(toy, tmp_path / "out", *options, stage=stage, check=False)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1 and words in done.stderr


def test_stage_1_on_a_quantised_language_model(toy, tmp_path):
    losses, _ = run(
        toy, tmp_path / "out", "--quantize", "int8", "--batch-size", 8, "--epochs", 2, stage=1
    )
    assert (tmp_path / "out/final/projector.safetensors").is_file() and losses[-1] < losses[0]
