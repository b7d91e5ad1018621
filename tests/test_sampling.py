"""What sample_next_token draws from is what transformers' logits processors leave, in their order:
penalty, temperature, top k, top p.
"""

import pytest
import torch
from transformers import (
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

import qilin_min as q

B, V = 3, 50


def reference(logits, prompts, temperature, top_p, top_k, penalty):
    steps = [RepetitionPenaltyLogitsProcessor(penalty)] if penalty != 1 else []
    steps += [TemperatureLogitsWarper(temperature)]
    steps += [TopKLogitsWarper(top_k)] if top_k else []
    steps += [TopPLogitsWarper(top_p)] if top_p < 1 else []
    for step in steps:
        logits = step(prompts, logits)
    return logits.softmax(-1)


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.5])
@pytest.mark.parametrize("top_p", [1.0, 0.8, 0.05])
@pytest.mark.parametrize("top_k", [0, 1, 7, 500])
@pytest.mark.parametrize("penalty", [1.0, 1.4, 0.7])
def test_probabilities_equal_transformers(temperature, top_p, top_k, penalty, monkeypatch):
    generator = torch.Generator().manual_seed(0)
    logits, prompts = (
        torch.randn(B, V, generator=generator) * 3,
        torch.randint(0, V, (B, 12), generator=generator),
    )
    seen = torch.zeros(B, V, dtype=torch.bool).scatter(1, prompts, True)
    drawn_from = []
    draw = torch.multinomial
    monkeypatch.setattr(
        torch,
        "multinomial",
        lambda probs, *a, **k: drawn_from.append(probs) or draw(probs, *a, **k),
    )
    ids = q.sample_next_token(logits, seen, temperature, top_p, top_k, penalty)
    want = reference(logits, prompts, temperature, top_p, top_k, penalty)
    torch.testing.assert_close(drawn_from[0], want, rtol=1e-5, atol=1e-6)
    assert (want.gather(1, ids[:, None]) > 0).all()


def test_temperature_zero_is_the_likeliest_and_a_seed_repeats():
    logits = torch.randn(B, V, generator=torch.Generator().manual_seed(0))
    assert torch.equal(q.sample_next_token(logits, None), logits.argmax(-1))
    seen = torch.zeros(B, V, dtype=torch.bool)
    draws = [
        q.sample_next_token(logits, seen, 1.0, generator=torch.Generator().manual_seed(s)).tolist()
        for s in (1, 1, 2, 3, 4)
    ]
    assert draws[0] == draws[1] and len(set(map(tuple, draws))) > 2
