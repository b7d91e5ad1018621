"""One token a row is multiplied in the way that this CPU does fastest, and each way is x W^T."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import qilin_min
from qilin_min import KVCache, Qilin, QilinConfig, TextConfig, VisionConfig


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def draw(n_rows: int, n_in: int, n_out: int) -> tuple[torch.Tensor, torch.Tensor, np.ndarray]:
    """x (B, 1, in), a weight (out, in), and their product by numpy in float64."""
    generator = torch.Generator().manual_seed(n_rows + n_in + n_out)
    x = torch.randn(n_rows, 1, n_in, generator=generator)
    weight = torch.randn(n_out, n_in, generator=generator)
    return x, weight, x.double().numpy() @ weight.double().numpy().T


# 33: two threads cannot share its rows evenly
@pytest.mark.parametrize("n_out", [64, 33])
@pytest.mark.parametrize("n_rows", [1, 8])
@pytest.mark.parametrize("way", ["linear_in_pieces", "linear_without_onednn"])
def test_each_way_is_the_product(two_threads, way, n_rows, n_out):
    x, weight, want = draw(n_rows, 96, n_out)
    got = getattr(qilin_min, way)(x, weight)
    assert got.shape == want.shape
    np.testing.assert_allclose(got.numpy(), want, atol=2e-5)
    assert torch.backends.mkldnn.enabled


@pytest.mark.parametrize("seconds, is_other", [(0.5, True), (0.9, False), (1.5, False)])
def test_another_way_is_taken_when_it_is_well_ahead(monkeypatch, seconds, is_other):
    """By a clock that each product moves on: F.linear by 1, the other by `seconds`."""
    clock = [0.0]

    def usual(x, weight):
        clock[0] += 1.0

    def other(x, weight):
        clock[0] += seconds

    monkeypatch.setattr(qilin_min.time, "perf_counter", lambda: clock[0])
    monkeypatch.setattr(qilin_min.F, "linear", usual)
    monkeypatch.setattr(qilin_min, "linear_in_pieces", other)
    measure = qilin_min.decoding_product.__wrapped__
    assert measure(torch.float32, True, 2) is (other if is_other else usual)
    # nothing to share out
    assert measure(torch.float32, True, 1) is usual


def test_answers_go_on_as_the_whole_prompt_reads(two_threads, monkeypatch):
    """Token by token through the pieces, the logits are those of one pass by F.linear."""
    torch.manual_seed(0)
    text = TextConfig(
        vocab_size=96,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    vision = VisionConfig(64, 128, 2, 4, image_size=28, patch_size=14)
    model = Qilin(QilinConfig(text, vision, n_token_ids=96)).eval()
    ids = torch.randint(3, 96, (2, 12))
    with torch.no_grad():
        whole = model(ids)  # (B, T, V)
    products = []

    def take_pieces(dtype, is_one_row, n_threads):
        products.append((dtype, is_one_row, n_threads))
        return qilin_min.linear_in_pieces

    monkeypatch.setattr(qilin_min, "decoding_product", take_pieces)
    cache = KVCache(2, 12)
    one = torch.ones(2, dtype=torch.int64)
    with torch.no_grad():
        model(ids[:, :4], cache=cache, lengths=4 * one)
        for i in range(4, 12):
            logits = model.decode(ids[:, i], cache, one)
            torch.testing.assert_close(logits, whole[:, i], atol=1e-5, rtol=1e-5)
    assert set(products) == {(torch.float32, False, 2)}


def test_training_and_prefill_are_torchs_own(monkeypatch):
    """What is compared with the originals, bit for bit, is F.linear."""
    monkeypatch.setattr(qilin_min, "decoding_product", lambda *key: pytest.fail("asked"))
    x, weight, _ = draw(3, 32, 32)
    assert torch.equal(qilin_min.linear(x, weight), F.linear(x, weight))
    with torch.no_grad():
        several = x.transpose(0, 1)  # (1, 3, in)
        assert torch.equal(qilin_min.linear(several, weight), F.linear(several, weight))
