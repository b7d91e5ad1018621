"""A model loaded in 8 or 4 bits gives the logits of transformers' LLaMA with its weights rounded by
hand, in a quarter or an eighth of the memory.
"""

import pytest
import torch
from conftest import hf_llama, make_qilin, words

import qilin_min as q
from model_io.export import save_qilin
from model_io.load import load_qilin
from model_io.lowbit import QuantizedLinear


def rounded(weight, bits, group):
    """The nearest multiple of max|w| / (2^(bits-1) - 1), group by group along a row."""
    groups = weight.double().reshape(len(weight), -1, group)
    step = (groups.abs().amax(-1, keepdim=True) / (2 ** (bits - 1) - 1)).float().double()
    return ((groups / step).round() * step).reshape(weight.shape).float()


@pytest.mark.parametrize("bits", [8, 4])
@torch.no_grad()
def test_logits_equal_llama_with_rounded_weights(bits, tmp_path, clip_folder, report):
    hf = hf_llama(num_key_value_heads=2)
    hf.save_pretrained(tmp_path)
    plain, model = (
        load_qilin(llm=tmp_path, vision=clip_folder, quantize=x) for x in (None, f"int{bits}")
    )
    ids = torch.tensor([[1] + words(40, 1)])
    exact = hf(ids).logits
    for name, param in hf.model.layers.named_parameters():
        if "_proj" in name:
            in_features = param.shape[1]  # 64 and 96: at 4 bits one scale for 64 and 32 inputs
            param.copy_(
                rounded(param, bits, in_features if bits == 8 else {64: 64, 96: 32}[in_features])
            )
    want = hf(ids).logits
    report(f"logits with int{bits} weights", (model(ids) - want).abs().max(), 1e-4)
    assert (
        0.001 < (want - exact).norm() / exact.norm() < (0.05 if bits == 8 else 0.6)
    )  # rounding shows, and is no more than rounding

    def n_bytes(m):
        return sum(t.nbytes for t in [*m.model.layers.parameters(), *m.model.layers.buffers()])

    assert n_bytes(model) < (0.29 if bits == 8 else 0.17) * n_bytes(plain)
    assert torch.equal(model.lm_head.weight, plain.lm_head.weight) and torch.equal(
        model.mm_projector.weight, plain.mm_projector.weight
    )


@pytest.mark.parametrize("bits", [8, 4])
@torch.no_grad()
def test_no_weight_moves_by_more_than_half_a_step(bits):
    weight = torch.randn(48, 128, generator=torch.Generator().manual_seed(0))
    weight[7] = 0
    linear = QuantizedLinear(128, 48, bits)
    linear.quantize_(weight)
    got = linear(torch.eye(128)).T
    step = linear.scale.repeat_interleave(linear.group, 1)
    assert (
        ((got - weight).abs() <= step * 0.5001).all() and not got[7].any() and got.isfinite().all()
    )


def test_wrong_names_and_saving_are_refused(llama_folder, clip_folder, tmp_path):
    with pytest.raises(ValueError, match="int3"):
        load_qilin(llm=llama_folder, vision=clip_folder, quantize="int3")
    with pytest.raises(ValueError, match="quantised"):
        save_qilin(
            load_qilin(llm=llama_folder, vision=clip_folder, quantize="int8"),
            None,
            tmp_path / "out",
        )
    assert not list(tmp_path.iterdir())


def test_answers_are_those_of_generate_in_a_padded_batch(tmp_path):
    """Quantised layers sit under the same cache and padding: a batch answers as its rows do."""
    from conftest import ROW_PICTURES, ROWS, pictures

    save_qilin(make_qilin(), None, tmp_path / "out")
    model, x = load_qilin(tmp_path / "out", quantize="int8"), pictures(3)
    together = q.answer_ids(model, ROWS, x, max_new_tokens=12)
    assert together == [
        q.answer_ids(model, [row], x[part] if i else None, max_new_tokens=12)[0]
        for i, (row, part) in enumerate(zip(ROWS, ROW_PICTURES, strict=True))
    ]


@pytest.mark.parametrize("in_features", [64, 40, 344])
@torch.no_grad()
def test_one_token_a_row_is_multiplied_in_8_bits(in_features):
    """On a CPU through torch's int8 kernel, activations in bfloat16: off by their rounding, 2^-9
    each, and by no more; sizes that the kernel cannot read go the exact way.
    """
    linear = QuantizedLinear(in_features, 24, 8)
    linear.quantize_(torch.randn(24, in_features, generator=torch.Generator().manual_seed(0)))
    x = torch.randn(3, 1, in_features, generator=torch.Generator().manual_seed(1))
    got, exact = (
        linear(x),
        linear(x.expand(3, 2, in_features))[:, :1],
    )  # two tokens a row are widened and multiplied in float32
    off = float((got - exact).norm() / exact.norm())
    assert (1e-5 < off < 2**-8) if in_features == 64 else off < 1e-6
    assert in_features != 64 or torch.equal(
        got[:1], linear(x[:1])
    )  # a row's product does not depend on the others
