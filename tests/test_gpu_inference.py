"""Promise: what tests/gpu.sh says of decoding is counted as a reader would count it, and its goals
are the issue's."""

import pytest
import torch
from gpu import expected, inference
from gpu.table import Context

# 13B by hand: q k v o and gate up down
LINEAR = 4 * 5120**2 + 3 * 5120 * 13824
# rows of those: each has a scale at 8 bits
ROWS = 4 * 5120 + 2 * 13824 + 5120
NORMS = 2 * 5120


@pytest.mark.parametrize(
    ("kind", "block"),
    [
        ("bf16", 2 * LINEAR),
        ("int8", LINEAR + 2 * ROWS),
        ("int4", LINEAR / 2 + 2 * 2 * LINEAR / 32),
    ],
)
def test_bytes_of_a_token_by_hand(kind, block):
    model = inference.empty_model(expected.config_of("13B"), kind, torch.bfloat16)
    head = 2 * 32000 * 5120
    # keys and values of 40 heads of 128 in 40 blocks
    cache = 8 * 700 * 2 * 40 * 40 * 128 * 2
    want = 40 * (block + 2 * NORMS) + head + cache
    assert inference.token_bytes(model, rows=8, n_positions=700) == want


def test_a_tensor_that_two_share_counts_once():
    module = torch.nn.Linear(4, 4, bias=False)
    module.register_buffer("same", module.weight.detach()[:2].T)
    assert inference.n_bytes(module) == 64


@pytest.mark.parametrize(
    ("kind", "tokens_per_second", "holds"),
    [("bf16", 80, True), ("bf16", 70, False)]
    + [("int8", 151, True), ("int8", 149, False), ("int4", 101, True), ("int4", 99, False)],
)
def test_goals(kind, tokens_per_second, holds, monkeypatch):
    """Of a GPU whose bandwidth is enough for 100 tokens a second, on which bf16 wrote as many."""
    monkeypatch.setattr(inference, "token_bytes", lambda model, rows, n_positions: 10**9)
    figures = {"bandwidth_gb_s": 100, "inference: bf16, captured, 1: tokens/s": 100}
    context = Context(None, torch.device("cuda"), is_dry=False, is_quick=False, figures=figures)
    model = inference.empty_model(expected.TINY, kind, torch.bfloat16)
    sizes = inference.Sizes("tiny", text=8, rows=2, n_timed=3)
    timed = inference.Timed(prefill=1.0, step=1 / tokens_per_second, ids=[[1]])
    row = inference.speed_row(context, model, kind, "captured", 1, timed, sizes)
    assert row.holds is holds, row
    row = inference.speed_row(context, model, kind, "one by one", 1, timed, sizes)
    assert row.holds is None
