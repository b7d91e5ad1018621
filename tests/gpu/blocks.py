"""Parts of a step alone, at their true sizes: attention's kernels, and a decoder block of 13B, from
which the paper's stage 2 on eight GPUs is reckoned."""

import statistics
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile

from gpu.expected import (
    ATTENTION_SHARE,
    REACHED,
    TRAINED,
    BlockSeconds,
    PaperStage,
    Rates,
    block_seconds,
    config_of,
    measured_rates,
    paper_stage,
)
from gpu.kernels import ATTENTION, KERNELS, OPERATORS, part_of_kernel, short_name
from gpu.rig import compute_dtype, wait_for
from gpu.table import Context, Row
from qilin_min import LlamaDecoderLayer, rotary_cos_sin
from training.costs import GIB, count_sizes


def seconds_of(function: Callable[[], object], device: torch.device) -> float:
    wait_for(device)
    tic = time.perf_counter()
    function()
    wait_for(device)
    return time.perf_counter() - tic


# --- 1. attention ---------------------------------------------------------------------------------


def attend(q: Tensor, k: Tensor, v: Tensor) -> None:
    """Forward and backward, causal, (B, H, T, D)."""
    F.scaled_dot_product_attention(q, k, v, is_causal=True).sum().backward()


def queries(context: Context, rows: int, tokens: int) -> list[Tensor]:
    """q, k, v of 13B's heads, or of a few small ones."""
    n_heads = 2 if context.is_dry else 40
    shape = (rows, n_heads, tokens, 16 if context.is_dry else 128)
    made = [
        torch.randn(shape, device=context.device, dtype=compute_dtype(context.device))
        for _ in range(3)
    ]
    return [one.requires_grad_() for one in made]


def attending_kernels(context: Context, rows: int, tokens: int) -> list[str]:
    """Names of what torch chooses by itself."""
    is_cuda = context.device.type == "cuda"
    qkv = queries(context, rows, tokens)
    attend(*qkv)
    activities = [ProfilerActivity.CPU]
    if is_cuda:
        activities.append(ProfilerActivity.CUDA)
    with profile(activities=activities) as seen:
        attend(*qkv)
        wait_for(context.device)
    table = KERNELS if is_cuda else OPERATORS
    wanted = torch.autograd.DeviceType.CUDA if is_cuda else torch.autograd.DeviceType.CPU
    names = set()
    for event in seen.events():
        is_kernel = is_cuda or event.name.startswith("aten::_")
        is_there = event.device_type == wanted and is_kernel
        if is_there and part_of_kernel(event.name, table) == ATTENTION:
            names.add(short_name(event.name))
    return sorted(names)


def attention(context: Context) -> list[Row]:
    """Which kernel torch chooses, what it takes, and what the first call of a new length costs:
    each batch of training and each question has another one."""
    is_cuda = context.device.type == "cuda"
    rows = 4
    lengths = [40, 48] if context.is_dry else [691 + 13 * i for i in range(8)]
    names = attending_kernels(context, rows, lengths[0])
    chosen = "cuDNN" if any("cudnn" in name for name in names) else "flash"
    context.figures["attention_chosen"] = chosen
    found = [
        Row(
            "attention: what torch chooses for 13B's heads",
            "flash or cuDNN; cuDNN would be new for Hopper",
            ", ".join(names),
            any("flash" in name or "cudnn" in name for name in names) if is_cuda else None,
        )
    ]
    ways: dict[str, Callable[[], AbstractContextManager]] = {
        "as torch chooses": nullcontext,
        "flash": lambda: sdpa_kernel(SDPBackend.FLASH_ATTENTION),
        "cuDNN": lambda: sdpa_kernel(SDPBackend.CUDNN_ATTENTION),
    }
    rates = measured_rates(context.figures)
    for way, context_of in ways.items():
        row, figures = attention_row(context, way, context_of, rows, lengths, rates)
        found.append(row)
        context.figures[f"attention, {way}"] = figures
    return found


def attention_row(
    context: Context,
    way: str,
    context_of: Callable[[], AbstractContextManager],
    rows: int,
    lengths: list[int],
    rates: Rates,
) -> tuple[Row, dict[str, float] | None]:
    """(the row, milliseconds of a first call of a length and of a later one) of one kernel."""
    check = f"attention {way}: {rows} rows, {lengths[0]} to {lengths[-1]} tokens, both ways"
    first = []
    later = []
    teraflops = []
    try:
        for tokens in lengths:
            qkv = queries(context, rows, tokens)
            with context_of():
                first.append(seconds_of(lambda qkv=qkv: attend(*qkv), context.device))
                again = [seconds_of(lambda qkv=qkv: attend(*qkv), context.device) for _ in range(3)]
            later.append(min(again))
            # 3.5 times the forward, whose causal half is 2 T^2 a number of q
            work = 3.5 * 2 * tokens * qkv[0].numel()
            teraflops.append(work / later[-1] / 1e12)
    except RuntimeError as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        # torch's word for a kernel that this device has not
        said = f"not to be had here: {str(error).splitlines()[0][:80]}"
        return Row(check, "-", said, None), None
    figures = {
        # what the very first call loads is no cost of a length
        "first_ms": 1000 * statistics.median(first[1:]),
        "later_ms": 1000 * statistics.median(later),
        "tflops": statistics.median(teraflops),
    }
    reached = ATTENTION_SHARE * rates.gemm / 1e12
    row = Row(
        check,
        f"about {reached:.0f} TFLOPS (computed); a new length costs nothing",
        f"{figures['later_ms']:.3g} ms, {figures['tflops']:.3g} TFLOPS; the first call of a new "
        f"length {figures['first_ms']:.3g} ms, the very first {1000 * first[0]:.3g} ms",
        None,
    )
    return row, figures


# --- 2. a block of 13B ----------------------------------------------------------------------------


def measure_block(
    context: Context, model: str, rows: int, tokens: int, is_compiled: bool
) -> BlockSeconds:
    """Of a decoder block, weights and gradients in compute's dtype as FSDP gathers them."""
    config = config_of(model).text
    dtype = compute_dtype(context.device)
    with torch.device(context.device):
        block = LlamaDecoderLayer(config, 0).to(dtype)
        x = torch.randn(rows, tokens, config.hidden_size, dtype=dtype, requires_grad=True)
        positions = torch.arange(tokens)[None]
    cos, sin = rotary_cos_sin(positions, config.head_dim, config.rope_theta)
    rope = (cos.to(dtype), sin.to(dtype))
    if is_compiled:
        # inductor writes C++ for minutes on a CPU
        block.compile(backend="inductor" if context.device.type == "cuda" else "eager")

    def forward() -> Tensor:
        return block(x, rope, None, positions, None)

    def forward_and_backward() -> None:
        forward().backward(torch.ones_like(x))
        block.zero_grad(set_to_none=True)
        x.grad = None

    n = 2 if context.is_dry else 10
    for _ in range(3):
        forward_and_backward()
    once = seconds_of(lambda: [forward() for _ in range(n)], context.device)
    both = seconds_of(lambda: [forward_and_backward() for _ in range(n)], context.device)
    slots = n * rows * tokens
    return BlockSeconds(forward=once / slots, forward_and_backward=both / slots)


def block_of_13b(context: Context) -> list[Row]:
    """A block at its true size at the paper's lengths, and the hours of stage 2 on 8 such GPUs."""
    model = "tiny" if context.is_dry else "13B"
    rows = 4
    tokens = 64 if context.is_dry else 704
    rates = measured_rates(context.figures)
    # GPUs of 80 GB at least, as the paper had
    memory = max(80e9, context.figures.get("gpu_gib", 0) * GIB)
    stage = paper_stage(memory, rates.peak)
    sizes = count_sizes(config_of(model), TRAINED[2])
    found = []
    for is_compiled in (False, True):
        way = "compiled" if is_compiled else "eager"
        measured = measure_block(context, model, rows, tokens, is_compiled)
        expected = block_seconds(sizes, rates, tokens, is_compiled)
        found.append(block_row(way, measured, expected, 6 * sizes.linear))
        if context.is_dry:
            # a tiny block's seconds say nothing of 13B; the way from a block to hours is the same
            measured = block_seconds(stage.sizes, rates, 704, is_compiled)
        found.append(hours_row(way, stage, measured, rates, context.is_dry))
        context.figures[f"block of 13B, {way}: us a token"] = [
            1e6 * measured.forward,
            1e6 * measured.forward_and_backward,
        ]
    return found


def block_row(way: str, measured: BlockSeconds, expected: BlockSeconds, work: float) -> Row:
    """work: operations a token of the products, forward and backward."""
    at_most = work / expected.forward_and_backward / 1e12
    reached = work / measured.forward_and_backward / 1e12
    return Row(
        f"a block of 13B, {way}, forward and backward",
        f"about {REACHED * at_most:.0f}, at most {at_most:.0f} TFLOPS (computed)",
        f"{reached:.4g} TFLOPS; {1e6 * measured.forward_and_backward:.3g} us a token, "
        f"forward {1e6 * measured.forward:.3g}",
        None,
    )


def hours_row(
    way: str, stage: PaperStage, block: BlockSeconds, rates: Rates, is_computed: bool
) -> Row:
    """Stage 2 on 8 GPUs; bandwidth between them as the plan assumes it, and without NVLink."""
    roofline = block_seconds(stage.sizes, rates, 704, way == "compiled")
    bound = stage.hours(roofline, rates)
    fast = stage.hours(block, rates)
    slow = stage.hours(block, rates, links=20e9)
    source = "computed, no block of 13B was run" if is_computed else "from the measured block"
    return Row(
        f"stage 2 of 13B on 8 of these, {way}",
        f"about {bound.hours / REACHED:.1f} h, at least {bound.hours:.1f} h (computed)",
        f"{fast.hours:.1f} h, MFU {fast.mfu:.0%} ({source}); of it waiting for links of "
        f"{rates.links / 1e9:.0f} GB/s {fast.waiting:.1%}; with 20 GB/s {slow.hours:.1f} h, "
        f"as cut for the former",
        None,
    )
