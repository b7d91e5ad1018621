"""A model loaded in 8 or 4 bits gives the logits of transformers' LLaMA with its weights rounded by
hand, in a quarter or an eighth of the memory.
"""

import gguf
import numpy as np
import pytest
import torch
from conftest import hf_llama, make_qilin, words

import qilin_min as q
from model_io import lowbit_kernels
from model_io.export import save_qilin
from model_io.load import load_qilin
from model_io.lowbit import QuantizedLinear


def rounded(weight):
    """The nearest multiple of a row's max|w| / 127."""
    weight = weight.double()
    step = (weight.abs().amax(-1, keepdim=True) / 127).float().double()
    return ((weight / step).round() * step).float()


def from_bytes(linear):
    """number * scale + zero of each four bits of a layer's bytes, the even input's the lower."""
    data = linear.weight.numpy().view(np.uint8)
    numbers = np.stack((data & 15, data >> 4), axis=-1).reshape(len(data), -1).astype(np.float64)
    numbers = numbers - 16 * (numbers > 7)
    scale, zero = (t.double().numpy().repeat(32, axis=1) for t in (linear.scale, linear.zero))
    return torch.from_numpy(numbers * scale + zero).float()


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
            linear = model.model.layers.get_submodule(name.removesuffix(".weight"))
            param.copy_(rounded(param) if bits == 8 else from_bytes(linear))
    want = hf(ids).logits
    report(f"logits with int{bits} weights", (model(ids) - want).abs().max(), 1e-4)
    assert (
        0.001 < (want - exact).norm() / exact.norm() < (0.05 if bits == 8 else 0.6)
    )  # rounding shows, and is no more than rounding

    def n_bytes(m):
        return sum(t.nbytes for t in [*m.model.layers.parameters(), *m.model.layers.buffers()])

    assert n_bytes(model) < (0.29 if bits == 8 else 0.18) * n_bytes(plain)
    assert torch.equal(model.lm_head.weight, plain.lm_head.weight) and torch.equal(
        model.mm_projector.weight, plain.mm_projector.weight
    )


@torch.no_grad()
def test_no_weight_moves_by_more_than_half_a_step():
    weight = torch.randn(48, 128, generator=torch.Generator().manual_seed(0))
    weight[7] = 0
    linear = QuantizedLinear(128, 48, 8)
    linear.quantize_(weight)
    got = linear(torch.eye(128)).T
    step = linear.scale.repeat_interleave(linear.group, 1)
    assert ((got - weight).abs() <= step * 0.5001).all() and not got[7].any()


@torch.no_grad()
def test_int4_is_nearer_than_llama_cpps():
    """Of what 32 weights become, the squared error is below that of Q4_1, whose format is the same
    but for float16 scales: over all groups, and for a group that is constant."""
    weight = torch.randn(300, 128, generator=torch.Generator().manual_seed(0)) ** 3
    weight[7] = 0
    weight[8] = 0.25
    linear = QuantizedLinear(128, 300, 4)
    linear.quantize_(weight)
    got = linear(torch.eye(128)).T
    torch.testing.assert_close(got, from_bytes(linear))
    kind = gguf.GGMLQuantizationType.Q4_1
    theirs = gguf.quants.dequantize(gguf.quants.quantize(weight.numpy(), kind), kind)
    error = (got - weight).square()
    assert error.sum() < 0.9 * np.square(theirs - weight.numpy()).sum()
    assert error[7:9].max() < 1e-6
    # no number but the nearest, save at the ends, which may have been cut off
    steps = (weight.unflatten(1, (-1, 32)) - linear.zero.float()[..., None]) / (
        linear.scale.float()[..., None]
    )
    numbers = steps.round().clamp(-8, 7) * linear.scale.float()[..., None]
    nearest = (numbers + linear.zero.float()[..., None]).flatten(1)
    torch.testing.assert_close(got, nearest)


@pytest.mark.parametrize("n_out", [64, 192])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_one_token_a_row_is_multiplied_in_4_bits(dtype, n_out, report):
    """Through torch's int4 kernel: the product of what the bytes say, and the same bytes after it,
    in as much memory."""
    linear = QuantizedLinear(96, n_out, 4)
    linear.quantize_(torch.randn(n_out, 96, generator=torch.Generator().manual_seed(0)))
    weight = from_bytes(linear)
    x = torch.randn(3, 1, 96, generator=torch.Generator().manual_seed(1)).to(dtype)
    want = x.float() @ weight.T
    for _ in range(2):
        got = linear(x).float()
        report(f"int4, {dtype} (relative)", (got - want).norm() / want.norm(), 2**-8)
    assert linear.is_blocked and linear.weight.nbytes == n_out * 96 // 2
    torch.testing.assert_close(linear.dequantize(torch.float32), weight)
    torch.testing.assert_close(linear.scale.stride(), linear.zero.stride())


@pytest.mark.parametrize("n_rows", lowbit_kernels.BLOCK_ROWS)
def test_numbers_come_back_from_the_blocks_of_either_cpu(n_rows):
    """torch, aten/src/ATen/native/cpu/int4mm_kernel.cpp: of a block's rows d and d + half, byte d
    of an input holds one in its lower and one in its upper four bits."""
    generator = torch.Generator().manual_seed(0)
    numbers = torch.randint(0, 16, (2 * n_rows, 8), generator=generator)
    half = n_rows // 2
    blocks = torch.zeros(2, 8, half, dtype=torch.uint8)
    for block in range(2):
        for column in range(8):
            for d in range(half):
                low = int(numbers[block * n_rows + d, column])
                high = int(numbers[block * n_rows + half + d, column])
                blocks[block, column, d] = high << 4 | low
    got = lowbit_kernels.from_blocks(blocks.view(2 * n_rows, 4), n_rows)
    assert torch.equal(got, (numbers - 8).to(torch.int8))


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
