"""Promise: on a GPU, one token a row is multiplied with int8 and int4 numbers as they are, by the
fastest kernel that torch has there, and gives what the widened weight gives.

Here without one: torch's 4-bit kernel for CUDA is stood in for by its own source followed thread by
thread, time by a table.
"""

import pytest
import torch
from conftest import ROWS, make_qilin, pictures
from torch._subclasses.fake_tensor import FakeTensorMode

import qilin_min as q
from model_io import lowbit, lowbit_kernels
from model_io.lowbit import QuantizedLinear, add_lora, choose_ways, linear_layers


def quantised_layer(n_in, n_out, bits, dtype=torch.float32):
    linear = QuantizedLinear(n_in, n_out, bits).to(dtype)
    linear.quantize_(torch.randn(n_out, n_in, generator=torch.Generator().manual_seed(0)))
    return linear


def kernels_tiles(data, inner):
    """torch, aten/src/ATen/native/cuda/int4mm.cu, matrix_to_m16n8k16_Bint4_layout: what thread t
    writes at [n tile][k tile][t][pair]."""
    n, n_bytes = data.shape
    tiles = torch.zeros(n // 8, 2 * n_bytes // (16 * inner), 32, inner // 2, dtype=torch.int64)
    t = torch.arange(32)
    for n_tile, k_tile, pair in torch.cartesian_prod(
        *(torch.arange(size) for size in (*tiles.shape[:2], inner // 2))
    ).tolist():
        base = (k_tile * inner + 2 * pair) * 8
        places = [base + t % 4 + more for more in (0, 4, 8, 12)]
        v = [data[n_tile * 8 + t // 4, place].long() for place in places]
        word = torch.zeros(32, dtype=torch.int64)
        for i in range(4):
            word |= (v[i] & 15) << (16 + 4 * i)
            word |= (v[i] >> 4) << (4 * i)
        tiles[n_tile, k_tile, :, pair] = word
    return tiles.to(torch.int32)


def kernels_product(x, tiles, group, scales):
    """_weight_int4pack_mm: (number - 8) * scale + zero in bfloat16, summed in float32."""
    assert x.dtype == scales.dtype == torch.bfloat16 and tiles.dtype == torch.int32
    assert scales.is_contiguous() and x.is_contiguous()
    numbers = lowbit_kernels.from_tiles(tiles).bfloat16().unflatten(1, (-1, group))
    weight = numbers * scales[..., 0].T[..., None] + scales[..., 1].T[..., None]
    return (x.float() @ weight.flatten(1).float().T).bfloat16()


@pytest.fixture
def gpu(monkeypatch):
    """The CPU passes for a GPU. -> seconds of each way, which a test may change."""
    seconds = {"widened": 4.0, "int8": 3.0, "tiles": 2.0, "compiled": 1.0}

    def gpu_seconds(call, device):
        name = next(name for name, way in lowbit.WAYS.items() if way.multiply is call.func)
        call()
        return seconds[name]

    monkeypatch.setattr(lowbit, "gpu_seconds", gpu_seconds)
    monkeypatch.setattr(lowbit, "is_on_gpu", lambda tensor: True)
    monkeypatch.setattr(lowbit, "CHOICES", {})
    # what is compiled is the same function
    monkeypatch.setattr(lowbit, "compiled", lambda product: product)
    monkeypatch.setattr(torch, "_convert_weight_to_int4pack", kernels_tiles)
    monkeypatch.setattr(torch, "_weight_int4pack_mm", kernels_product)
    return seconds


def test_numbers_come_back_from_tiles():
    numbers = torch.randint(-8, 8, (24, 384), generator=torch.Generator().manual_seed(0))
    packed = lowbit_kernels.pack_int4(numbers.to(torch.int8))
    assert torch.equal(lowbit_kernels.unpack_int4(packed), numbers.to(torch.int8))
    tiles = kernels_tiles(lowbit_kernels.kernel_bytes(packed), 8)
    assert tiles.nbytes == packed.nbytes
    assert torch.equal(lowbit_kernels.from_tiles(tiles), numbers.to(torch.int8))


@torch.no_grad()
def test_numbers_scales_and_zeros_are_the_kernels(report):
    """torch's kernel for CPUs takes the same numbers from 0 to 15, scales and zeros."""
    linear = quantised_layer(256, 64, 4, torch.bfloat16)
    data = lowbit_kernels.kernel_bytes(linear.weight)
    # the upper half is the even input
    numbers = torch.stack((data >> 4, data & 15), dim=-1).flatten(1).to(torch.int32)
    packed = torch._convert_weight_to_int4pack_for_cpu(numbers, 1)
    scales = lowbit_kernels.scales_and_zeros(linear.scale, linear.zero)
    x = torch.randn(3, 256, generator=torch.Generator().manual_seed(1)).bfloat16()
    got = torch._weight_int4pack_mm_for_cpu(x, packed, linear.group, scales).float()
    want = x.float() @ linear.dequantize(torch.float32).T
    report("int4 by torch's kernel (relative)", (got - want).norm() / want.norm(), 2**-8)


@pytest.mark.parametrize(("n_in", "n_out"), [(5120, 5120), (5120, 13824), (13824, 5120)])
def test_torch_takes_the_shapes_of_13b(n_in, n_out):
    """What torch's own shape rules say of the calls: no memory, no GPU."""
    assert lowbit_kernels.can_be_tiled(n_out, n_in, 32)
    with FakeTensorMode():
        data = torch.empty(n_out, n_in // 2, dtype=torch.int8)
        tiles = lowbit_kernels.to_tiles(data)
        assert tiles.shape == (n_out // 8, n_in // 128, 32, 4) and tiles.dtype == torch.int32
        scale = torch.empty(n_out, n_in // 32, dtype=torch.bfloat16)
        scales = lowbit_kernels.scales_and_zeros(scale, scale)
        assert scales.shape == (n_in // 32, n_out, 2) and scales.is_contiguous()
        x = torch.empty(8, n_in, dtype=torch.bfloat16)
        assert lowbit_kernels.multiply_tiles(x, tiles, 32, scales).shape == (8, n_out)
        assert lowbit_kernels.from_tiles(tiles).shape == (n_out, n_in)


@pytest.mark.parametrize("way", lowbit.WAYS)
@pytest.mark.parametrize("bits", [8, 4])
@torch.no_grad()
def test_each_way_gives_the_widened_product(bits, way, gpu, report):
    linear = quantised_layer(256, 64, bits, torch.bfloat16)
    x = torch.randn(1, 256, generator=torch.Generator().manual_seed(1)).bfloat16()
    want = x.float() @ linear.dequantize(torch.float32).T
    if not lowbit.WAYS[way].may_take(linear, x):
        pytest.skip("not of these bits")
    if lowbit.WAYS[way].needs_tiles:
        linear.make_tiled()
    got = lowbit.WAYS[way].multiply(x, linear).float()
    report(f"int{bits}, {way} (relative)", (got - want).norm() / want.norm(), 2**-7)


@pytest.mark.parametrize(("bits", "want"), [(8, "compiled"), (4, "compiled"), (4, "tiles")])
def test_the_fastest_way_is_taken(bits, want, gpu):
    gpu[want] = 0.5
    linear = quantised_layer(256, 64, bits, torch.bfloat16)
    linear.chosen = {}
    x = torch.randn(2, 1, 256).bfloat16()
    with torch.no_grad():
        linear(x[:1])
        assert linear.chosen == {1: want} and linear.is_tiled == (want == "tiles")
        linear(x)
    # of two rows only what reads the weight once for both
    assert linear.chosen[2] == {8: "int8", 4: "tiles"}[bits]


def test_a_way_that_torch_refuses_is_left_out_and_said(gpu, monkeypatch):
    def refuse(product):
        raise RuntimeError("Failed to find\nC compiler")

    monkeypatch.setattr(lowbit, "compiled", refuse)
    linear = quantised_layer(256, 64, 8, torch.bfloat16)
    choice = lowbit.measure_ways(linear, torch.ones(1, 256).bfloat16())
    assert choice.name == "int8" and "compiled" not in choice.seconds
    assert "compiled: Failed to find C compiler" in lowbit.said(choice)


@pytest.mark.parametrize(("bits", "fastest"), [(8, "compiled"), (4, "compiled"), (4, "tiles")])
def test_a_model_answers_and_learns_as_when_widened(bits, fastest, gpu, report):
    """Tiles take the place of the bytes: no second copy, and prefill and LoRA go on from them."""
    gpu[fastest] = 0.5
    text = dict(hidden_size=128, intermediate_size=256, num_hidden_layers=2)
    plain = make_qilin(text=text).to(torch.bfloat16)
    models = []
    for _ in range(2):
        model = make_qilin(text=text).to(torch.bfloat16)
        lowbit.quantize_linears(model, bits)
        for (_, _, linear), (_, _, source) in zip(
            linear_layers(model), linear_layers(plain), strict=True
        ):
            linear.to(torch.bfloat16).quantize_(source.weight.detach())
        add_lora(model, rank=4, alpha=8)
        for _, _, linear in linear_layers(model):
            torch.nn.init.normal_(
                linear.lora_A, std=0.1, generator=torch.Generator().manual_seed(1)
            )
            torch.nn.init.normal_(
                linear.lora_B, std=0.1, generator=torch.Generator().manual_seed(2)
            )
        models.append(model.to(torch.bfloat16))
    widened, model = models

    def n_bytes(linear):
        storages = {t.untyped_storage() for t in (*linear.parameters(), *linear.buffers())}
        return sum(storage.nbytes() for storage in storages)

    before = [n_bytes(linear) for _, _, linear in linear_layers(model)]
    line = choose_ways(model)
    assert f"128 to 256 by {fastest}" in line, line
    assert all(linear.chosen == {1: fastest} for _, _, linear in linear_layers(model))
    after = [n_bytes(linear) for _, _, linear in linear_layers(model)]
    assert sum(after) == sum(before)

    caches = []
    logits = []
    with torch.no_grad():
        for one in models:
            cache = q.KVCache(2, 64)
            one(torch.tensor(ROWS[:1]), cache=cache, lengths=torch.tensor([len(ROWS[0])]))
            logits.append(one.decode(torch.tensor([5]), cache, torch.tensor([1])))
            caches.append(cache)
    off = (logits[1] - logits[0]).norm() / logits[0].norm()
    report(f"logits of one token, int{bits} by {fastest} (relative)", off, 3e-2)

    gradients = []
    for one in models:
        ids = q.pad_rows(ROWS, 0)
        one(ids, pictures(3), ids.clamp(min=0)).backward()
        gradients.append([linear.lora_A.grad for _, _, linear in linear_layers(one)])
    # widened from tiles, the same numbers
    assert all(map(torch.equal, *gradients))
