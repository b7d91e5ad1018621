"""Promise: inside a step the host does not wait for the GPU: no operation from the ids of a
micro-batch to the new weights asks what a tensor holds. Fake tensors hold nothing, and raise when
asked."""

import pytest
import torch
from conftest import ROWS, make_qilin, pictures
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
)

import qilin_min as q
from model_io.lowbit import add_lora, quantize_linears
from training.freeze import freeze

STAGE_2 = ("mm_projector", "llm")
TOO_MUCH_ASKED = (DataDependentOutputException, DynamicOutputShapeException)


def a_batch(rows, n_pictures):
    """What the model is given of some rows, counted on the host."""
    ids = q.pad_rows(rows, 0)
    labels = q.pad_rows(rows, q.IGNORE_INDEX)
    labels[labels == q.IMAGE_TOKEN_INDEX] = q.IGNORE_INDEX
    return {
        "input_ids": ids,
        "labels": labels,
        "pixel_values": pictures(n_pictures) if n_pictures else None,
        "n_image_positions": q.count_image_positions(ids),
        "n_labels": q.count_labels(labels),
    }


def one_step(model, inputs):
    """A micro-batch, clipping and AdamW on tensors without values."""
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        for name, value in inputs.items():
            if isinstance(value, torch.Tensor):
                inputs[name] = mode.from_tensor(value)
        model._apply(torch.empty_like)
        trained = [param for param in model.parameters() if param.requires_grad]
        optimizer = torch.optim.AdamW(trained, fused=True)
        model.train()
        model(**inputs, reduction="sum").backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        assert all(param.grad is not None for param in trained)


@pytest.mark.parametrize("n_pictures", [3, 0])
@pytest.mark.parametrize(
    "trained, n_checkpointed, bits",
    [(("mm_projector",), 0, 0), (STAGE_2, 1, 0), (("mm_projector", "lora"), 0, 8)],
)
def test_no_operation_of_a_step_asks_for_a_value(trained, n_checkpointed, bits, n_pictures):
    model = make_qilin()
    if bits:
        quantize_linears(model, bits)
    if "lora" in trained:
        add_lora(model, 2, 4.0)
    freeze(model, trained)
    model.model.n_checkpointed = n_checkpointed
    rows = ROWS if n_pictures else ROWS[:1]
    one_step(model, a_batch(rows, n_pictures))


@pytest.mark.parametrize("name", ["n_image_positions", "n_labels"])
def test_uncounted_it_would(name):
    """So that the test above sees what it should."""
    inputs = a_batch(ROWS, 3)
    inputs[name] = None
    with pytest.raises(TOO_MUCH_ASKED):
        one_step(make_qilin(), inputs)


@pytest.mark.parametrize("off_by", [-1, 1])
@pytest.mark.parametrize("name", ["n_image_positions", "n_labels"])
def test_a_wrong_count_is_not_silent(name, off_by):
    inputs = a_batch(ROWS, 3)
    inputs[name] += off_by
    with pytest.raises((RuntimeError, ValueError), match="expect|picture positions"):
        make_qilin()(**inputs)


def test_counted_or_not_the_loss_is_the_same():
    model = make_qilin()
    inputs = a_batch(ROWS, 3)
    counted = model(**inputs)
    inputs["n_labels"] = None
    inputs["n_image_positions"] = None
    assert torch.equal(model(**inputs), counted)
