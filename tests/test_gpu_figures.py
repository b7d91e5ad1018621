"""Promise: what tests/gpu.sh expects of a GPU is arithmetic that a reader can follow, and what a
profile is made of is put under the right names."""

import dataclasses
import os
import time
import warnings
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from gpu import expected, kernels, memory, rig, speed
from gpu.table import Context
from torch.autograd import DeviceType
from torch.utils._python_dispatch import TorchDispatchMode

import qilin_min as q
from training.costs import GIB, count_sizes

LONG = os.environ.get("LONG")
# 13B by hand: q k v o and gate up down; with two norms a block; embeddings, head and last norm
LINEAR = 4 * 5120**2 + 3 * 5120 * 13824
BLOCK = LINEAR + 2 * 5120
EMBED = 2 * 32000 * 5120 + 5120
PROJECTOR = 1024 * 5120 + 5120
TRAINED = 40 * BLOCK + EMBED + PROJECTOR
# one operation or byte a second, so that seconds are counts
UNIT = expected.Rates(peak=1.0, gemm=1.0, bandwidth=1.0, links=1.0)


def sizes_of_13b():
    return expected.sizes_of("13B", trains=2)


# --- memory ---------------------------------------------------------------------------------------


def test_the_five_shapes_of_eight_take_what_the_plan_says(monkeypatch):
    """And what a review found for norms of several kernels, which keep float32 copies."""
    shapes = expected.shapes_of_eight(is_dry=False)
    peaks = [shape.peak(8, e=2) / GIB for shape in shapes]
    assert np.abs(np.array(peaks) - (48.9, 51.6, 31.6, 38.3, 46.0)).max() < 0.06

    counted = expected.sizes_of
    monkeypatch.setattr(
        expected, "sizes_of", lambda *words: dataclasses.replace(counted(*words), is_fused=False)
    )
    peaks = [shape.peak(8, e=2) / GIB for shape in shapes]
    assert np.abs(np.array(peaks) - (53.2, 51.7, 32.0, 42.9, 50.3)).max() < 0.06


def test_bytes_of_13b_by_hand():
    """Stage 2, 16 x 704, every block recomputing: the peak is where backward ends."""
    shape = expected.shapes_of_eight(is_dry=False)[2]
    assert (shape.rows, shape.tokens, shape.n_checkpointed) == (16, 704, 40)
    slots = 16 * 704
    sizes = sizes_of_13b()
    assert sizes.n_trained == TRAINED
    # float32: weights and both of Adam's moments, and the tower whole in bf16
    standing = 12 * TRAINED / 8 + 2 * sizes.tower
    # the root and two blocks whole in bf16; one block's gradients in bf16 and float32
    gathered = 2 * (EMBED + PROJECTOR + 2 * BLOCK) + 6 * BLOCK
    # the first block at work, a token: its input; two norms (input, output), q k v and the output,
    # log-sum-exp, four of the MLP's width
    inside = 2 * 5120 + 2 * (2 + 2) * 5120 + 2 * 4 * 5120 + 4 * 40 + 2 * 4 * 13824
    working = 2 * (3 * 13824 + 2 * 5120)
    # all gradients in float32
    peak = standing + gathered + slots * (inside + working) + 4 * TRAINED / 8
    assert shape.peak(8, e=2) == pytest.approx(peak, rel=1e-9)
    assert peak / GIB == pytest.approx(31.6, abs=0.05)


@pytest.mark.parametrize(
    "gib, model", [(139, "7B"), (79.1, "3B"), (47, "1B"), (39.4, "1B"), (23.5, "0.3B"), (8, "0.3B")]
)
def test_the_model_that_fills_a_gpu(gib, model):
    assert expected.largest_model(gib * GIB) == model


def test_the_model_that_a_machine_can_train():
    """3.1 billion parameters want 50 GB of disk and 37 GB of the host's memory."""
    assert speed.model_for(80 * GIB, disk=80e9, host=64e9) == "3B"
    assert speed.model_for(80 * GIB, disk=40e9, host=64e9) == "1B"
    assert speed.model_for(80 * GIB, disk=80e9, host=32e9) == "1B"
    assert speed.model_for(80 * GIB, disk=1e9, host=1e9) == "0.3B"


# --- operations and time --------------------------------------------------------------------------


def test_operations_of_13b_by_hand():
    """Stage 2, two micro-batches of 4 x 704, 32 labels a row, a picture each."""
    shape = expected.shapes_of_eight(is_dry=False)[0]
    rows = 8
    products = 6 * 40 * LINEAR * rows * 704
    # the causal half of both products, three times
    attention = 3 * 2 * 40 * 5120 * rows * 704**2
    head = 6 * 32000 * 5120 * rows * 32
    # 23 of 24 layers, forward only, and the projector without its input's gradient
    tower = sizes_of_13b().tower
    pictures = rows * 23 / 24 * (2 * tower * 577 + 4 * 24 * 1024 * 577**2)
    pictures += rows * 576 * 4 * PROJECTOR
    by_hand = products + attention + head + pictures
    assert expected.step_flops(shape, e=2) == pytest.approx(by_hand, rel=1e-9)


def test_seconds_of_a_block_by_hand():
    """Forward: the products' 2 a weight, attention at its share, 26 C and 5 F and norms in bf16."""
    block = expected.block_seconds(sizes_of_13b(), UNIT, tokens=704, is_compiled=False)
    attention = 2 * 704 * 5120 / expected.ATTENTION_SHARE
    forward = 2 * LINEAR + attention + 2 * (4 * 5120 + 20 * 5120 + 6 * 5120 + 5 * 13824)
    backward = 4 * LINEAR + 2.5 * attention
    backward += 2 * (10 * 5120 + 20 * 5120 + 15 * 5120 + 9 * 13824)
    assert block.forward == pytest.approx(forward, rel=1e-9)
    assert block.forward_and_backward == pytest.approx(forward + backward, rel=1e-9)


# the last ones are not there today; they would move a view's numbers into zeros, or the like
MOVING = ("mul", "add", "neg", "cat", "silu", "silu_backward", "sub", "copy_", "sum")
MOVING += ("slice_backward", "select_backward", "new_zeros", "zeros", "clone", "narrow_copy")


class BytesMoved(TorchDispatchMode):
    """Adds up what element-wise operators read and write."""

    def __init__(self):
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func._schema.name.removeprefix("aten::") in MOVING:
            read = [x for x in torch.utils._pytree.tree_leaves(args) if torch.is_tensor(x)]
            # cos and sin are the same for all heads and rows
            read = [x for x in read if x.ndim < 4 or x.shape[1] > 1]
            self.bytes += sum(x.numel() * x.element_size() for x in (*read, out))
        return out


def test_bytes_of_a_blocks_elementwise_operations_are_those_that_torch_runs():
    """Beside a count at each operator of the real block, norms left out: their kernels differ."""
    text = expected.llama(256, 688, 1, 8)
    block = q.LlamaDecoderLayer(text, 0)
    block.input_layernorm = torch.nn.Identity()
    block.post_attention_layernorm = torch.nn.Identity()
    x = torch.randn(4, 128, 256, requires_grad=True)
    positions = torch.arange(128)[None]
    rope = q.rotary_cos_sin(positions, text.head_dim, text.rope_theta)
    with BytesMoved() as forward:
        y = block(x, rope, None, positions, None)
    with BytesMoved() as backward:
        y.backward(torch.ones_like(y))

    config = q.QilinConfig(text, expected.TINY.vision)
    sizes = count_sizes(config, ("mm_projector", "llm"), e=4)
    want_forward, want_backward = expected.elementwise_bytes(sizes, is_compiled=False)
    # two norms: 2 C each forward, 5 C backward
    want_forward = 512 * (want_forward - 4 * 4 * 256)
    want_backward = 512 * (want_backward - 4 * 10 * 256)
    assert forward.bytes == pytest.approx(want_forward, rel=0.01)
    assert backward.bytes == pytest.approx(want_backward, rel=0.01)


def test_compiled_blocks_move_less_and_recomputing_takes_longer():
    sizes = sizes_of_13b()
    eager = expected.elementwise_bytes(sizes, is_compiled=False)
    compiled = expected.elementwise_bytes(sizes, is_compiled=True)
    assert compiled[0] < eager[0] / 2
    assert compiled[1] < eager[1] / 2

    rates = expected.PAPER_RATES["H100"]
    shapes = expected.shapes_of_eight(is_dry=False)
    spared, _, recomputed = shapes[:3]
    reached = []
    for shape in (spared, recomputed):
        seconds = expected.step_parts(shape, rates, 8, e=2).total
        reached.append(expected.REACHED * expected.step_flops(shape, e=2) / seconds / 1e12)
    # the review computed 340 to 390 for what recomputes
    assert 340 < reached[1] < 390 < reached[0]


def test_hours_of_stage_2_by_hand():
    """256 samples, two steps: what computes is counted while links are fast, what is sent while
    they are not."""
    stage = expected.paper_stage(80e9, peak=312e12, n_samples=256)
    assert len(stage.slots) == 2
    slots = sum(map(sum, stage.slots))
    n_micro = sum(map(len, stage.slots))
    assert 256 / 8 * 600 < slots < 256 / 8 * 2048
    # the last block stays for its backward
    n_gathers = 40 if stage.fit.is_kept else 79
    optimiser = 2 * 40 * TRAINED / 8
    rates = expected.Rates(peak=1.0, gemm=1e9, bandwidth=1e9)

    # a block that takes a second a token: all else is little beside it
    block = expected.BlockSeconds(forward=1 / 3, forward_and_backward=1.0)
    computing = slots * 40 * (1 + stage.fit.recomputed / 3)
    found = stage.hours(block, rates, links=1e20)
    assert found.hours * 3600 == pytest.approx(computing, rel=0.02)
    assert found.waiting == 0

    # nothing to compute: weights in bf16, gradients in float32, 7 of 8 parts of each travel
    sent = n_micro * 7 / 8 * (2 * (n_gathers * BLOCK + EMBED + PROJECTOR) + 4 * TRAINED)
    found = stage.hours(expected.BlockSeconds(0.0, 0.0), rates, links=1.0)
    assert found.hours * 3600 == pytest.approx(sent + optimiser / 1e9, rel=1e-3)
    assert found.waiting > 0.99


@pytest.mark.skipif(not LONG, reason="run by tests/run.sh --long")
def test_what_is_computed_on_paper_is_a_table():
    """Stage 2 of 13B on 8 A100: facts.md reckons 5.4 hours at half of the peak."""
    rows = [line.split(" | ") for line in expected.computed_table().splitlines()]
    assert {len(row) for row in rows} == {4}
    (eager,) = (row[1] for row in rows if row[0].startswith("| stage 2 of 13B on 8 GPUs, eager"))
    assert 4 < float(eager.split()[0]) < 5.4
    assert sum(row[0].startswith("| 13B, rank 0 of 8") for row in rows) == 5


def test_rates_are_those_of_the_machine():
    figures = {"gpu_name": "NVIDIA H100 80GB HBM3", "gemm_bf16_tflops": 650.0}
    rates = expected.rates_of({**figures, "bandwidth_gb_s": 2900.0}, is_dry=False)
    assert (rates.peak, rates.gemm, rates.bandwidth) == (989e12, 650e12, 2900e9)
    # a dry run's CPU is no machine to expect anything of
    cpu = {"gpu_name": "CPU", "gemm_bf16_tflops": 0.02, "bandwidth_gb_s": 15.0}
    assert expected.rates_of(cpu, is_dry=True) == expected.PAPER_RATES["A100"]


# --- profiles -------------------------------------------------------------------------------------

# as torch.profiler names them on A100 and H100
NAMES = {
    kernels.GEMM: (
        "ampere_bf16_s16816gemm_bf16_128x256_ldg8_f2f_stages_64x3_tn",
        "sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize128x128x64_warpgroupsize1x1x1_execute"
        "_segment_k_off_kernel__5x_cublas",
        "nvjet_hsh_256x128_64x4_2x1_v_bz_coopA_NTN",
        "nvjet_tst_192x192_64x4_1x2_h_bz_coopB_TNN",
        "void cutlass::Kernel2<cutlass_80_wmma_tensorop_bf16_s161616gemm_bf16_16x16_128x2_tn"
        "_align8>(cutlass_80_wmma_tensorop_bf16_s161616gemm_bf16_16x16_128x2_tn_align8::Params)",
        "void cublasLt::splitKreduce_kernel<32, 16, int, float, __nv_bfloat16, float>",
        "triton_tem_fused_mm_0",
        "sm80_xmma_fprop_implicit_gemm_bf16bf16_bf16f32_f32_nhwckrsc_nhwc_tilesize128x128x32",
    ),
    kernels.ATTENTION: (
        "void pytorch_flash::flash_fwd_kernel<Flash_fwd_kernel_traits<128, 128, 64, 4, false, false"
        ", cutlass::bfloat16_t, Flash_kernel_traits<128, 128, 64, 4, cutlass::bfloat16_t> >, false,"
        " true, false, false, false, true, false, false>(pytorch_flash::Flash_fwd_params)",
        "void pytorch_flash::flash_bwd_dq_dk_dv_loop_seqk_parallel_kernel<Flash_bwd_kernel_traits<"
        "128, 64, 128, 8, 2, 4, 2, false, false, cutlass::bfloat16_t>, false, true, false, false>",
        "void pytorch_flash::flash_bwd_dot_do_o_kernel<true, Flash_bwd_kernel_traits<128>>",
        "cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_knob_3_64x128x128_4x1x1",
        "cudnn_generated_fort_native_sdpa_sm90_flash_bprop_wgmma_f16_knob_4_128x64x64_4x1x1",
        "fmha_cutlassF_bf16_aligned_64x128_rf_sm80(PyTorchMemEffAttention::AttentionKernel)",
    ),
    kernels.ELEMENTWISE: (
        "triton_poi_fused_mul_silu_2",
        "triton_red_fused__to_copy_add_mean_mul_pow_rsqrt_0",
        "void at::native::vectorized_elementwise_kernel<4, at::native::CUDAFunctor_add<c10::"
        "BFloat16>, std::array<char*, 3ul> >(int, at::native::CUDAFunctor_add<c10::BFloat16>)",
        "void at::native::elementwise_kernel<128, 4, at::native::gpu_kernel_impl_nocast<at::native"
        "::direct_copy_kernel_cuda(at::TensorIteratorBase&)::{lambda()#3}>>(int)",
        "void at::native::(anonymous namespace)::CatArrayBatchedCopy_vectorized<at::native::(anony"
        "mous namespace)::OpaqueType<2u>, unsigned int, 4, 64, 64, 16, 8>",
        "void at::native::reduce_kernel<512, 1, at::native::ReduceOp<float, at::native::MeanOps>>",
        "void at::native::(anonymous namespace)::vectorized_layer_norm_kernel<c10::BFloat16>",
        "void at::native::(anonymous namespace)::GammaBetaBackwardCUDAKernelTemplate<float, float>",
        "void (anonymous namespace)::softmax_warp_forward<float, float, float, 10, true, false>",
        "void at::native::index_elementwise_kernel<128, 4>",
    ),
    kernels.OPTIMISER: (
        "void at::native::(anonymous namespace)::multi_tensor_apply_kernel<at::native::(anonymous "
        "namespace)::FusedOptimizerTensorListMetadata<4>, at::native::(anonymous namespace)::"
        "FusedAdamMathFunctor<float, 4, (at::native::ADAM_MODE)1, false>>",
        "void at::native::lpnorm_cleanup<float, (at::native::NormType)1, float>",
    ),
    kernels.SHARDING: (
        "ncclDevKernel_ReduceScatter_Sum_f32_RING_LL(ncclDevKernelArgsStorage<4096ul>)",
        "ncclDevKernel_AllGather_RING_LL(ncclDevKernelArgsStorage<4096ul>)",
        "void at::native::(anonymous namespace)::split_with_sizes_copy_out_contiguous_no_cast"
        "_kernel(char**, char**, long*, long*, long*, long, long)",
        "void at::native::(anonymous namespace)::chunk_cat_cuda_kernel<float, c10::BFloat16>",
    ),
    kernels.COPIES: (
        "Memcpy DtoH (Device -> Pinned)",
        "Memcpy HtoD (Pinned -> Device)",
        "Memcpy DtoD (Device -> Device)",
        "Memset (Device)",
    ),
    kernels.OTHER: ("void some_kernel_nobody_knows()",),
}


@pytest.mark.parametrize("part", NAMES)
def test_kernels_are_known_by_their_names(part):
    for name in NAMES[part]:
        assert kernels.part_of_kernel(name) == part, name


def test_a_profile_counts_nothing_twice():
    """Ten seconds: 0 to 4 a product, 3 to 6 a collective beside it, 7 to 8 an addition, 8 to 8.5 a
    copy; the rest is waiting."""
    gemm, collective = NAMES[kernels.GEMM][0], NAMES[kernels.SHARDING][0]
    seen = [(gemm, 0.0, 4.0), (collective, 3.0, 6.0)]
    seen += [(NAMES[kernels.ELEMENTWISE][2], 7.0, 8.0), ("Memcpy DtoD", 8.0, 8.5)]
    found = kernels.profile_of_kernels(seen, seconds=10.0)
    assert found.share(kernels.GEMM) == 0.4
    assert found.share(kernels.SHARDING) == 0.3
    assert found.waiting == pytest.approx(2.5)
    # 4 to 6 and 8 to 8.5
    assert found.exposed == pytest.approx(2.5)
    assert not found.attention and not found.unknown


def test_spans_of_record_function_are_no_kernels():
    def event(name, device_type, is_user_annotation=False):
        span = SimpleNamespace(start=2e6, end=3e6)
        return SimpleNamespace(
            name=name,
            device_type=device_type,
            is_user_annotation=is_user_annotation,
            time_range=span,
        )

    kernel = NAMES[kernels.ATTENTION][0]
    events = [
        event(kernel, DeviceType.CUDA),
        event("FSDP::all_gather", DeviceType.CUDA),
        event("my own", DeviceType.CUDA, is_user_annotation=True),
        event("aten::mm", DeviceType.CPU),
    ]
    found = kernels.kernels_of(events)
    assert found == [(kernel, 2.0, 3.0)]
    profile = kernels.profile_of_kernels(found, 2.0)
    assert profile.attention == ["pytorch_flash::flash_fwd_kernel"]


# --- rows -----------------------------------------------------------------------------------------


def a_result(mfu, n_waits=1):
    """Of a run on an H100: the kernels of flash attention were seen."""
    seen = [(NAMES[kernels.ATTENTION][0], 0.0, 0.1), (NAMES[kernels.GEMM][0], 0.1, 0.9)]
    return {
        "seconds": 1.0,
        "seconds_of_new_lengths": None,
        "flops": mfu * 989e12,
        "tokens": 690.0,
        "n_micro_batches": 2,
        "n_checkpointed": 0,
        "waited_for_data": 0.03,
        "waits": {"train.py:830": n_waits},
        "profile": vars(kernels.profile_of_kernels(seen, 1.0)),
    }


def rows_by_end(figures, way, result):
    context = Context(None, torch.device("cuda"), is_dry=False, is_quick=False, figures=figures)
    rows = speed.rows_of_run(context, "3B", way, batch=16, result=result)
    return {row.check.split(": ")[1]: row.holds for row in rows}


def test_what_a_run_must_hold():
    h100 = {"gpu_name": "NVIDIA H100 80GB HBM3"}
    rows = rows_by_end(h100, "compiled", a_result(0.41))
    assert rows["MFU"] is True
    assert rows["waiting for data"] is False
    assert rows["the host waits for the GPU"] is True
    assert rows["flash attention is used"] is True
    assert rows_by_end(h100, "compiled", a_result(0.39, n_waits=2))["MFU"] is False
    rows = rows_by_end(h100, "eager", a_result(0.39, n_waits=2))
    # the better of two ways is promised, and compiled is judged
    assert rows["MFU"] is None
    assert rows["the host waits for the GPU"] is False
    # an A100 owes more, another GPU nothing
    a100 = {"gpu_name": "NVIDIA A100-SXM4-80GB"}
    assert rows_by_end(a100, "compiled", a_result(0.41))["MFU"] is True
    assert rows_by_end({"gpu_name": "NVIDIA L4"}, "compiled", a_result(0.41))["MFU"] is None


def test_waits_are_counted_where_they_happen():
    with speed.counting_waits() as places:
        for _ in range(2):
            warnings.warn("called a synchronizing CUDA operation", stacklevel=1)
        warnings.warn("something else", stacklevel=1)
    assert list(places.values()) == [2]
    assert list(places)[0].startswith("test_gpu_figures.py:")


# --- what only a GPU reaches, on a torch.cuda that is told of ------------------------------------


def test_the_loop_is_watched_by_its_schedule(monkeypatch, tmp_path):
    """Of 15 steps one is looked at for waits, the last two are profiled, each in its own time."""
    done = []
    kernel = SimpleNamespace(
        name=NAMES[kernels.GEMM][0],
        device_type=DeviceType.CUDA,
        is_user_annotation=False,
        time_range=SimpleNamespace(start=0.0, end=3e6),
    )
    profiler = SimpleNamespace(
        start=lambda: done.append((len(watch.times), "profile")),
        stop=lambda: done.append((len(watch.times), "end")),
        key_averages=lambda: SimpleNamespace(table=lambda **named: "a table"),
        events=lambda: [kernel],
    )
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device=None: None)
    monkeypatch.setattr(
        torch.cuda, "set_sync_debug_mode", lambda mode: done.append((len(watch.times), mode))
    )
    monkeypatch.setattr(speed, "profile", lambda activities: profiler)
    watch = speed.Watch(torch.device("cuda"), speed.Schedule())
    for _ in range(15):
        watch.after_step(None, None, None)
    assert done == [(12, "warn"), (13, "default"), (13, "profile"), (15, "end")]
    watch.profile_seconds = 4.0
    found = watch.profile(tmp_path)
    # of one of two steps
    assert (found.seconds, found.parts[kernels.GEMM], found.waiting) == (2.0, 1.5, 0.5)
    assert (tmp_path / "profile.txt").read_text() == "a table"


def test_time_that_the_loop_waits_for_data_is_seen():
    watch = speed.Watch(torch.device("cpu"), speed.Schedule())

    def slow(batches):
        for batch in batches:
            time.sleep(0.02)
            yield batch

    assert list(watch.timing(slow)([1, 2, 3])) == [1, 2, 3]
    assert 0.06 <= watch.waiting_for_data < 0.6


@pytest.mark.parametrize(
    "there, peak, holds",
    [(80, 1.09, True), (80, 1.11, False), (80, 0.89, False), (80, None, False), (40, 1.0, None)],
)
def test_a_row_of_memory_holds_within_a_tenth(monkeypatch, there, peak, holds):
    """peak: of the plan's figure; None: out of memory. A GPU that is too small promises nothing."""
    shape = expected.shapes_of_eight(is_dry=False)[0]

    def measured(shape, config, device, n_timed):
        if peak is None:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return rig.Measured(peak * shape.peak(8, e=2), reserved=60 * GIB, seconds=1.0)

    monkeypatch.setattr(memory, "measure", measured)
    monkeypatch.setattr(
        torch.cuda,
        "get_device_properties",
        lambda device: SimpleNamespace(total_memory=there * GIB),
    )
    context = Context(None, torch.device("cuda"), is_dry=False, is_quick=False, figures={})
    row, _ = memory.memory_row(context, shape, n_shards=8)
    assert row.holds is holds, row
    assert row.expected == "48.9 GiB, within 10%"


def test_the_peak_is_torchs_since_the_meter_began(monkeypatch):
    """Memory of before is forgotten first; reserved memory is told beside."""
    said = []
    for name, value in (("max_memory_allocated", 3.0), ("max_memory_reserved", 4.0)):
        monkeypatch.setattr(torch.cuda, name, lambda device, value=value: said.append(1) or value)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device=None: None)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: said.append(0))
    with rig.peak_meter(torch.device("cuda")) as peak:
        said.append("inside")
    assert said == [0, "inside", 1, 1]
    assert (peak.bytes, peak.reserved) == (3.0, 4.0)
