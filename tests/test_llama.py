"""The decoder gives the logits of transformers' LLaMA, in one pass, step by step with a KV cache,
and in padded batches.
"""

import pytest
import torch
from conftest import edit_json, hf_llama, words
from transformers.models.llama.modeling_llama import LlamaRMSNorm

import qilin_min as q
from model_io.load import load_qilin

VARIANTS = {
    "MHA": {},
    "GQA": dict(num_key_value_heads=2),
    "MQA": dict(num_key_value_heads=1),
    "tied": dict(tie_word_embeddings=True),
    "theta 1e6, eps 1e-3": dict(
        rope_parameters={"rope_type": "default", "rope_theta": 1e6}, rms_norm_eps=1e-3
    ),
    "head_dim 24": dict(head_dim=24),
}


def load_both(tmp_path, clip_folder, shard="5GB", **changes):
    hf = hf_llama(**changes)
    hf.save_pretrained(tmp_path, max_shard_size=shard)
    return hf, load_qilin(llm=tmp_path, vision=clip_folder)


@pytest.mark.parametrize("kind", VARIANTS)
@torch.no_grad()
def test_logits_equal_llama(kind, tmp_path, clip_folder, report):
    hf, model = load_both(tmp_path, clip_folder, **VARIANTS[kind])
    ids = torch.tensor([[1] + words(40, 1), [1] + words(40, 2)])
    want = hf(ids).logits
    assert want.std() > 0.1
    report(f"llama logits ({kind})", (model(ids) - want).abs().max(), 1e-4)


@torch.no_grad()
def test_old_spelling_of_theta_and_shards(tmp_path, clip_folder, report):
    hf, _ = load_both(
        tmp_path, clip_folder, "100KB", rope_parameters={"rope_type": "default", "rope_theta": 5e5}
    )
    assert (tmp_path / "model.safetensors.index.json").is_file()
    edit_json(tmp_path / "config.json", rope_parameters=None, rope_theta=5e5)
    ids = torch.tensor([[1] + words(40, 1)])
    report(
        "llama logits (flat rope_theta, shards)",
        (load_qilin(llm=tmp_path, vision=clip_folder)(ids) - hf(ids).logits).abs().max(),
        1e-4,
    )


@pytest.mark.parametrize("kind", ["MHA", "GQA"])
@torch.no_grad()
def test_cache_step_by_step(kind, tmp_path, clip_folder, report):
    hf, model = load_both(tmp_path, clip_folder, **VARIANTS[kind])
    ids = torch.tensor([words(20, 1), words(20, 2)])
    want, one = hf(ids).logits, torch.tensor([1, 1])
    cache, worst = q.KVCache(2, 20), 0.0
    for t in range(20):
        worst = max(
            worst, (model(ids[:, t : t + 1], cache=cache, lengths=one) - want[:, t]).abs().max()
        )
    cache = q.KVCache(2, 24)  # a first pass of several tokens, then several at a time
    for start, stop in ((0, 7), (7, 12), (12, 20)):
        last = model(ids[:, start:stop], cache=cache, lengths=one * (stop - start))
        worst = max(worst, (last - want[:, stop - 1]).abs().max())
    report(f"llama KV cache ({kind})", worst, 1e-4)


@pytest.mark.parametrize("kind", ["MHA", "GQA"])
@torch.no_grad()
def test_padded_batch_equals_single_rows(kind, tmp_path, clip_folder, report):
    hf, model = load_both(tmp_path, clip_folder, **VARIANTS[kind])
    rows = [words(n, n) for n in (5, 17, 11)]
    batch, wants = model(q.pad_rows(rows, 0)), [hf(torch.tensor([row])).logits[0] for row in rows]
    report(
        f"llama padded batch ({kind})",
        max((batch[i, : len(row)] - wants[i]).abs().max() for i, row in enumerate(rows)),
        1e-4,
    )

    # with a cache, the rows go on at their own lengths: padding left in it must never be seen
    cache, lengths, next_ids = (
        q.KVCache(2, 25),
        torch.tensor([len(row) for row in rows]),
        words(3, 9),
    )
    first = model(q.pad_rows(rows, 0), cache=cache, lengths=lengths)
    second = model(
        torch.tensor(next_ids)[:, None], cache=cache, lengths=torch.ones(3, dtype=torch.int64)
    )
    want = [
        hf(torch.tensor([row + [i]])).logits[0, -2:] for row, i in zip(rows, next_ids, strict=True)
    ]
    report(
        f"llama padded batch with cache ({kind})",
        max((torch.stack((first[i], second[i])) - want[i]).abs().max() for i in range(3)),
        1e-4,
    )


@torch.no_grad()
def test_the_norm_is_llamas_in_float32_and_nearer_in_bfloat16():
    """Rounded once, where transformers rounds before it multiplies with the weight too."""
    ours = q.RMSNorm(512, eps=1e-5)
    theirs = LlamaRMSNorm(512, eps=1e-5)
    generator = torch.Generator().manual_seed(0)
    x = 3 * torch.randn(200, 512, generator=generator)
    ours.weight.normal_(1.0, 0.2, generator=generator)
    theirs.weight.copy_(ours.weight)
    assert torch.equal(ours(x), theirs(x))

    x = x.bfloat16()
    ours.bfloat16()
    theirs.bfloat16()
    exact = x.double()
    exact *= ours.weight.double() * (exact.square().mean(-1, keepdim=True) + 1e-5).rsqrt()
    off = (ours(x) - exact).norm() / exact.norm()
    theirs_off = (theirs(x) - exact).norm() / exact.norm()
    # half a unit in the last of 8 bits, spread evenly: 2^-9 at most, 2^-9 / sqrt(3) and more on
    # the mean of squares
    assert off < 2**-9 < theirs_off
