"""The loss and the gradients of both stages are transformers' for the same LLaVA, whatever is
checkpointed or cut into chunks.
"""

import pytest
import torch
from conftest import ROWS, hf_ids, make_qilin, pictures
from transformers import LlavaForConditionalGeneration

import qilin_min as q
from model_io.export import save_qilin
from model_io.load import load_qilin

STAGES = {1: ("mm_projector",), 2: ("mm_projector", "llm")}


def batch():
    ids, labels = q.pad_rows(ROWS, 0), q.pad_rows(ROWS, q.IGNORE_INDEX)
    labels[labels == q.IMAGE_TOKEN_INDEX] = q.IGNORE_INDEX
    labels[:, :4] = q.IGNORE_INDEX
    labels[2, 24:30] = q.IGNORE_INDEX  # an ignored stretch between two labelled ones
    return ids, pictures(3), labels


def gradients(model, stage, reduction="mean"):
    for name, param in model.named_parameters():
        param.requires_grad_(q.part_of(name) in STAGES[stage])
        param.grad = None
    loss = model.train()(*batch(), reduction=reduction)
    loss.backward()
    return loss.detach(), {
        name: p.grad for name, p in model.named_parameters() if p.grad is not None
    }


def hf_gradients(hf, stage, projector_type):
    """Loss and gradients of transformers under our names, written by hand here."""
    ids, x, labels = batch()
    mask = (torch.arange(ids.shape[1]) < torch.tensor([len(r) for r in ROWS])[:, None]).long()
    loss = hf(input_ids=hf_ids(ids, hf), pixel_values=x, labels=labels, attention_mask=mask).loss
    loss.backward()
    first = "mm_projector" if projector_type == "linear" else "mm_projector.0"
    renames = (
        ("model.multi_modal_projector.linear_1", first),
        ("model.multi_modal_projector.linear_2", "mm_projector.2"),
        ("model.language_model.", "model."),
    )
    found = {}
    for name, param in hf.named_parameters():
        for theirs, ours in renames:
            name = name.replace(theirs, ours)
        if "vision_tower" not in name and not (
            projector_type == "linear" and "mm_projector.2" in name
        ):
            if stage == 2 or "mm_projector" in name:
                found[name] = param.grad
    return loss.detach(), found


@pytest.mark.parametrize("projector_type", ["linear", "mlp2x_gelu"])
@pytest.mark.parametrize("stage", [1, 2])
def test_gradients_equal_llava(projector_type, stage, tmp_path, report):
    save_qilin(make_qilin(projector_type), None, tmp_path / "out")
    model = load_qilin(tmp_path / "out")
    loss, ours = gradients(model, stage)
    want_loss, theirs = hf_gradients(
        LlavaForConditionalGeneration.from_pretrained(
            tmp_path / "out", attn_implementation="eager"
        ),
        stage,
        projector_type,
    )
    assert ours.keys() == theirs.keys()
    assert loss.dtype == torch.float32
    report(f"loss (stage {stage}, {projector_type})", (loss - want_loss).abs(), 1e-4)
    worst = max(((ours[n] - g).norm() / g.norm()).item() for n, g in theirs.items())
    assert all(g.norm() > 0 for g in theirs.values())
    report(
        f"gradients, relative (stage {stage}, {projector_type}, {len(ours)} tensors)", worst, 1e-3
    )


@pytest.mark.parametrize("stage", [1, 2])
def test_checkpointing_changes_nothing(stage):
    model = make_qilin()
    loss, plain = gradients(model, stage)
    for model.model.n_checkpointed in (1, 2):
        again, recomputed = gradients(model, stage)
        assert torch.equal(loss, again) and plain.keys() == recomputed.keys()
        assert all(torch.equal(plain[n], recomputed[n]) for n in plain)


def test_loss_by_hand():
    model = make_qilin()
    ids, x, labels = batch()
    log_probs = model(ids, x).double().log_softmax(-1)
    picked = [
        -log_probs[b, t - 1, labels[b, t]]
        for b in range(3)
        for t in range(1, labels.shape[1])
        if labels[b, t] != q.IGNORE_INDEX
    ]
    total = torch.stack(picked).sum()
    torch.testing.assert_close(
        model(ids, x, labels, reduction="sum").double(), total, rtol=1e-5, atol=0
    )
    torch.testing.assert_close(
        model(ids, x, labels).double(), total / len(picked), rtol=1e-5, atol=0
    )


def test_loss_is_float32_in_bfloat16():
    ids, x, labels = batch()
    model = make_qilin()
    want = model(ids, x, labels)
    got = model.bfloat16()(ids, x, labels)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, want, rtol=0.05, atol=0)


def test_chunks_change_nothing_and_unlabelled_positions_have_no_logits(monkeypatch):
    model = make_qilin()
    loss, whole = gradients(model, 2, "sum")
    n_labels = int((batch()[2][:, 1:] != q.IGNORE_INDEX).sum())
    shapes, logits = [], q.Qilin.logits
    monkeypatch.setattr(
        q.Qilin, "logits", lambda self, h: shapes.append(tuple(h.shape)) or logits(self, h)
    )
    monkeypatch.setattr(q, "LOSS_CHUNK", 7)
    ids, x, labels = batch()
    model(ids, x, labels)
    assert (
        sum(n for n, _ in shapes) == n_labels
        and max(n for n, _ in shapes) == 7
        and n_labels < labels.numel()
    )
    again, parts = gradients(model, 2, "sum")
    torch.testing.assert_close(again, loss, rtol=1e-6, atol=0)
    for name in whole:
        assert (whole[name] - parts[name]).norm() <= 1e-5 * whole[name].norm(), name


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("with_pictures", [True, False])
def test_no_label_gives_zero_with_a_graph(reduction, with_pictures):
    model = make_qilin().train()
    ids = q.pad_rows(ROWS if with_pictures else ROWS[:1], 0)
    loss = model(
        ids,
        pictures(3) if with_pictures else None,
        torch.full_like(ids, q.IGNORE_INDEX),
        reduction=reduction,
    )
    assert loss.item() == 0.0 and loss.dtype == torch.float32
    loss.backward()
    assert all(p.grad is not None and not p.grad.any() for p in model.mm_projector.parameters())


def test_text_only_batch_reaches_the_projector_with_a_zero_gradient():
    model = make_qilin().train()
    ids = q.pad_rows(ROWS[:1], 0)
    model(ids, None, ids).backward()
    assert all(p.grad is not None and not p.grad.any() for p in model.mm_projector.parameters())
    assert all(p.grad.any() for p in model.model.layers.parameters())


def test_the_tower_has_no_gradient():
    model = make_qilin().train()
    model(*batch()).backward()
    assert all(p.grad is None for p in model.vision_tower.parameters())
