"""Parts of a step alone, at their true sizes: attention's kernels, and a decoder block of 13B, from
which the paper's stage 2 on eight GPUs is reckoned."""

import statistics
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile

from gpu.expected import (
    ATTENTION_SHARE,
    REACHED,
    BlockSeconds,
    PaperStage,
    Rates,
    block_seconds,
    config_of,
    paper_stage,
    rates_of,
    sizes_of,
)
from gpu.kernels import ATTENTION, OPERATORS, kernels_of, part_of_kernel, short_name
from gpu.memory import whose_rates
from gpu.rig import compute_dtype
from gpu.table import Context, Row
from gpu.timing import wait_for
from qilin_min import LlamaDecoderLayer, rotary_cos_sin
from training.costs import GIB


def seconds_of(function: Callable[[], object], device: torch.device) -> float:
    wait_for(device)
    tic = time.perf_counter()
    function()
    wait_for(device)
    return time.perf_counter() - tic


def repeat(n: int, work: Callable[[], object]) -> None:
    """n times, nothing of it kept."""
    for _ in range(n):
        work()


# --- 1. attention ---------------------------------------------------------------------------------


def attend(q: Tensor, k: Tensor, v: Tensor) -> None:
    """Forward and backward, causal, (B, H, T, D)."""
    F.scaled_dot_product_attention(q, k, v, is_causal=True).sum().backward()


@torch.no_grad()
def answer(q: Tensor, k: Tensor, v: Tensor) -> None:
    """Forward alone, of one row: what a question goes through before its first word."""
    F.scaled_dot_product_attention(q[:1], k[:1], v[:1], is_causal=True)


@torch.no_grad()
def next_word(q: Tensor, k: Tensor, v: Tensor) -> None:
    """Forward of one token that sees all keys, as a cache that grows gives them, with its mask."""
    mask = torch.ones(1, 1, 1, k.shape[2], dtype=torch.bool, device=k.device)
    F.scaled_dot_product_attention(q[:1, :, -1:], k[:1], v[:1], attn_mask=mask)


# what is asked of attention, in words
WORKS = {
    "4 rows, both ways": attend,
    "a first answer, forward": answer,
    "its next word, over one key more": next_word,
}
# backends that make no plans; flash takes no mask
WITHOUT_CUDNN = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


def queries(context: Context, tokens: int) -> list[Tensor]:
    """q, k, v of four rows of 13B's heads, or of a few small ones."""
    shape = (4, 2, tokens, 16) if context.is_dry else (4, 40, tokens, 128)
    dtype = compute_dtype(context.device)
    made = [torch.randn(shape, device=context.device, dtype=dtype) for _ in range(3)]
    return [one.requires_grad_() for one in made]


def attending_kernels(context: Context, tokens: int) -> list[str]:
    """Names of what torch chooses by itself."""
    is_cuda = context.device.type == "cuda"
    qkv = queries(context, tokens)
    attend(*qkv)
    activities = [ProfilerActivity.CPU]
    if is_cuda:
        activities.append(ProfilerActivity.CUDA)
    with profile(activities=activities) as seen:
        attend(*qkv)
        wait_for(context.device)
    if is_cuda:
        kernels = [name for name, _, _ in kernels_of(seen.events())]
        attending = [name for name in kernels if part_of_kernel(name) == ATTENTION]
    else:
        operators = [event.name for event in seen.events() if event.name.startswith("aten::_")]
        attending = [name for name in operators if part_of_kernel(name, OPERATORS) == ATTENTION]
    return sorted({short_name(name) for name in attending})


def attention(context: Context) -> list[Row]:
    """Which kernel torch chooses, what it takes, and what the first call of a new length costs:
    each batch of training and each question has another one, and so has each word of an answer
    that is not captured as a graph. cuDNN makes a plan for each: 23 to 37 ms, others have seen."""
    names = attending_kernels(context, tokens=40 if context.is_dry else 690)
    is_flash = any("flash" in name or "cudnn" in name for name in names)
    found = [
        Row(
            "attention: what torch chooses for 13B's heads",
            "cuDNN on Hopper and Blackwell, flash elsewhere (read in torch's source)",
            ", ".join(names) or "the profiler saw no kernel here",
            is_flash if names and not context.is_dry else None,
        )
    ]
    ways: dict[str, Callable[[], AbstractContextManager]] = {
        "as torch chooses": nullcontext,
        "without cuDNN": lambda: sdpa_kernel(WITHOUT_CUDNN),
        "cuDNN alone": lambda: sdpa_kernel(SDPBackend.CUDNN_ATTENTION),
    }
    for i, (way, chosen) in enumerate(ways.items()):
        # lengths that no other way has prepared for
        lengths = [700 + 24 * k + i for k in range(8)]
        if context.is_dry:
            lengths = [40 + i, 48 + i]
        for what in WORKS:
            found.append(attention_row(context, way, chosen, what, lengths))
    return found


def attention_row(
    context: Context,
    way: str,
    chosen: Callable[[], AbstractContextManager],
    what: str,
    lengths: list[int],
) -> Row:
    """Seconds of one of WORKS: of a later call, and of the first of each length."""
    check = f"attention {way}: {what}, {lengths[0]} to {lengths[-1]} tokens"
    first = []
    later = []
    teraflops = []
    try:
        for tokens in lengths:
            qkv = queries(context, tokens)
            calls = []
            with chosen():
                for _ in range(4):
                    calls.append(seconds_of(partial(WORKS[what], *qkv), context.device))
            first.append(calls[0])
            later.append(min(calls[1:]))
            # both ways 3.5 times forward, whose causal half of two products is 2 a number and key
            teraflops.append(3.5 * 2 * tokens * qkv[0].numel() / later[-1] / 1e12)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        # torch's word for a kernel that this device has not
        said = f"not to be had here: {str(error).splitlines()[0][:80]}"
        return Row(check, "-", said, None)
    # the very first call loads what no length pays for
    of_new = 1000 * statistics.median(first[1:])
    of_known = 1000 * statistics.median(later)
    context.figures[f"attention {way}, {what}: ms of a new length, later"] = [of_new, of_known]
    expected = "a new length costs nothing"
    said = f"{of_known:.3g} ms, the first call of a new length {of_new:.3g} ms"
    if WORKS[what] is attend:
        said += f", {statistics.median(teraflops):.3g} TFLOPS"
        reached = ATTENTION_SHARE * rates_of(context.figures, context.is_dry).gemm / 1e12
        expected += f"; about {reached:.3g} TFLOPS ({whose_rates(context.is_dry)})"
    return Row(check, expected, said, None)


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
    once = seconds_of(lambda: repeat(n, forward), context.device)
    both = seconds_of(lambda: repeat(n, forward_and_backward), context.device)
    slots = n * rows * tokens
    return BlockSeconds(forward=once / slots, forward_and_backward=both / slots)


def block_of_13b(context: Context) -> list[Row]:
    """A block at its true size at the paper's lengths, and the hours of stage 2 on 8 such GPUs."""
    model = "tiny" if context.is_dry else "13B"
    rows = 4
    tokens = 64 if context.is_dry else 704
    rates = rates_of(context.figures, context.is_dry)
    # GPUs of 80 GB at least, as the paper had
    memory = max(80e9, (context.figures.get("gpu_gib") or 0) * GIB)
    stage = paper_stage(memory, rates.peak)
    sizes = sizes_of(model, trains=2)
    found = []
    for is_compiled in (False, True):
        way = "compiled" if is_compiled else "eager"
        measured = measure_block(context, model, rows, tokens, is_compiled)
        expected = block_seconds(sizes, rates, tokens, is_compiled)
        found.append(block_row(way, measured, expected, 6 * sizes.linear, context.is_dry))
        if context.is_dry:
            # a tiny block's seconds say nothing of 13B; the way from a block to hours is the same
            measured = block_seconds(stage.sizes, rates, 704, is_compiled)
        found.append(hours_row(way, stage, measured, rates, context.is_dry))
        context.figures[f"block of 13B, {way}: us a token"] = [
            1e6 * measured.forward,
            1e6 * measured.forward_and_backward,
        ]
    return found


def block_row(
    way: str, measured: BlockSeconds, expected: BlockSeconds, work: float, is_dry: bool
) -> Row:
    """work: operations a token of the products, forward and backward."""
    at_most = work / expected.forward_and_backward / 1e12
    reached = work / measured.forward_and_backward / 1e12
    name = "a tiny block" if is_dry else "a block of 13B"
    return Row(
        f"{name}, {way}, forward and backward",
        f"about {REACHED * at_most:.3g}, at most {at_most:.3g} TFLOPS ({whose_rates(is_dry)})",
        f"{reached:.3g} TFLOPS; {1e6 * measured.forward_and_backward:.3g} us a token, "
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
