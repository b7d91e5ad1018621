"""Products with weights in 8 or 4 bits, of plain tensors: how numbers are packed, and the kernels
that torch has for a few rows.

Shapes: B rows, `out` and `in` of a linear layer. Numbers are int8 (out, in): at 8 bits -127 to 127,
each times its row's scale; at 4 bits -8 to 7, each times its group's scale and its zero added, two
in a byte, the even input in its lower half. scale and zero (out, in / group).
"""

import functools
import itertools
from collections.abc import Callable

import torch
from torch import Tensor

# --- 1. numbers -----------------------------------------------------------------------------------


def fit_int8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """float32 (out, in) -> numbers int8 (out, in) and scale (out, 1): symmetric, to nearest."""
    scale = weight.abs().amax(-1, keepdim=True).clamp_min(1e-12) / 127
    return (weight / scale).round_().clamp_(-127, 127).to(torch.int8), scale


# how far a group's ends are drawn in, tried in all pairs: one weight far out makes the steps of the
# other 31 wide, and cut off it may cost less. On SmolLM2-135M's weights (groups of 32, steps drawn
# anew) perplexity 22.05 without, 20.48 with; llama.cpp's q4_0 22.86; float32 17.46
SHRINKS = (1.0, 0.95, 0.9, 0.85)


def nearest_int4(groups: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    """The numbers, as floats, of the nearest number * scale + zero, scale and zero (out, n, 1)."""
    return ((groups - zero) / scale).round_().clamp_(-8, 7)


def fit_int4(weight: Tensor, group: int) -> tuple[Tensor, Tensor, Tensor]:
    """float32 (out, in) -> numbers int8 (out, in), scale and zero bfloat16 (out, in / group).

    Of each group the least and the largest, drawn in by SHRINKS, become -8 and 7: the pair that
    leaves the smallest sum of squared errors.
    """
    groups = weight.unflatten(1, (-1, group))  # (out, in / group, group)
    low = groups.amin(-1, keepdim=True)
    high = groups.amax(-1, keepdim=True)
    least = torch.full_like(low, torch.inf)
    best_scale = torch.ones_like(low)
    best_zero = torch.zeros_like(low)
    for low_shrink, high_shrink in itertools.product(SHRINKS, SHRINKS):
        scale = ((high * high_shrink - low * low_shrink) / 15).abs().clamp_min(1e-12)
        # rounded first, so that the numbers are the nearest for what is stored
        scale = scale.bfloat16().float()
        zero = (low * low_shrink + 8 * scale).bfloat16().float()
        error = nearest_int4(groups, scale, zero).mul_(scale).add_(zero).sub_(groups)
        error = error.square_().sum(-1, keepdim=True)
        is_better = error < least
        least = torch.where(is_better, error, least)
        best_scale = torch.where(is_better, scale, best_scale)
        best_zero = torch.where(is_better, zero, best_zero)
    numbers = nearest_int4(groups, best_scale, best_zero).to(torch.int8).flatten(1)  # (out, in)
    return numbers, best_scale[..., 0].bfloat16(), best_zero[..., 0].bfloat16()


def pack_int4(numbers: Tensor) -> Tensor:
    """int8 (out, in), -8 to 7 -> two a byte, int8 (out, in / 2)."""
    low = numbers[:, ::2] & 15
    high = numbers[:, 1::2] << 4
    return low | high


def halves(packed: Tensor) -> tuple[Tensor, Tensor]:
    """The lower and the upper four bits of each byte as numbers: shifts of int8 keep the sign."""
    return packed << 4 >> 4, packed >> 4


def unpack_int4(packed: Tensor) -> Tensor:
    """What pack_int4 was given."""
    return torch.stack(halves(packed), dim=-1).flatten(1)  # (out, in)


# --- 2. tiles: how torch's 4-bit kernel for CUDA wants them ---------------------------------------
# in: bytes (out, in / 2); out: int32 (out / 8, in / 128, 32, 4), of the same size
# Source: torch, aten/src/ATen/native/cuda/int4mm.cu, matrix_to_m16n8k16_Bint4_layout

# how many tiles of 16 inputs a thread loads at once: the most that the kernel knows
INNER_TILES = 8


def can_be_tiled(out_features: int, in_features: int, group: int) -> bool:
    """Whether the kernel takes a layer of this shape."""
    is_whole = out_features % 8 == 0 and in_features % (16 * INNER_TILES) == 0
    return is_whole and group in (32, 64, 128, 256)


def kernel_bytes(packed: Tensor) -> Tensor:
    """uint8 (out, in / 2) as the kernel's packing reads them: 8 is added to each number, and the
    even input lies in the upper half."""
    # of four bits that hold a sign, flipping the first adds 8
    shifted = packed.view(torch.uint8) ^ 0x88
    return shifted << 4 | shifted >> 4


def to_tiles(packed: Tensor) -> Tensor:
    """int32 tiles of bytes (out, in / 2) on a GPU."""
    convert = torch._convert_weight_to_int4pack  # pyright: ignore[reportPrivateImportUsage]
    return convert(kernel_bytes(packed).contiguous(), INNER_TILES)


def from_tiles(tiles: Tensor) -> Tensor:
    """The numbers int8 (out, in) that lie in tiles.

    A thread t of 32 holds row t / 4 of eight; of its 16 bytes each four hold two tiles of inputs:
    bit 0 of a byte's place tells the tile, bit 1 whether its inputs are the odd ones, and the half
    of the byte, which eight of the tile's 16 inputs.
    """
    data = tiles.contiguous().view(torch.int8) ^ -0x78
    low, high = halves(data)
    numbers = torch.stack((low, high), dim=-1)  # (out / 8, in / 128, 32, 16, half)
    numbers = numbers.unflatten(3, (INNER_TILES // 2, 2, 2))  # (…, pair, is odd, tile, half)
    numbers = numbers.unflatten(2, (8, 4))  # (out / 8, in / 128, row, t % 4, pair, …)
    # row: out / 8, row; input: in / 128, pair, tile, half, t % 4, is odd
    numbers = numbers.permute(0, 2, 1, 4, 6, 7, 3, 5)
    return numbers.flatten(2).flatten(0, 1)  # (out, in)


def scales_and_zeros(scale: Tensor, zero: Tensor) -> Tensor:
    """bfloat16 (in / group, out, 2), as torch's kernels for CUDA and for CPUs want them."""
    return torch.stack((scale, zero), dim=-1).bfloat16().transpose(0, 1).contiguous()


# --- 2b. blocks: how torch's 4-bit kernel for CPUs wants them -------------------------------------
# in: bytes (out, in / 2); out: uint8 (out, in / 2), in an order that depends on the CPU
# Source: torch, aten/src/ATen/native/cpu/int4mm_kernel.cpp, weight_to_int4pack_kernel

# rows of a block: on a CPU with AVX512, and with AVX2
BLOCK_ROWS = (64, 32)


def to_blocks(packed: Tensor) -> Tensor:
    """uint8 blocks of bytes (out, in / 2) on a CPU, for that CPU."""
    # the kernel wants 0 to 15
    numbers = unpack_int4(packed).to(torch.int32) + 8
    convert = torch._convert_weight_to_int4pack_for_cpu  # pyright: ignore[reportPrivateImportUsage]
    return convert(numbers, 1)


def from_blocks(blocks: Tensor, n_block_rows: int) -> Tensor:
    """The numbers int8 (out, in) that lie in blocks of so many rows.

    A block holds input after input, each as n_block_rows / 2 bytes: row d of its lower half in the
    lower four bits of byte d, row d of its upper half in the upper four.
    """
    n_out, n_bytes = blocks.shape
    data = blocks.view(n_out // n_block_rows, 2 * n_bytes, n_block_rows // 2)
    # flipping the first of four bits takes the 8 away
    data = (data.view(torch.int8) ^ -0x78).transpose(1, 2)  # (block, byte, in)
    return torch.cat(halves(data), dim=1).flatten(0, 1)  # (out, in)


@functools.cache
def block_rows() -> int | None:
    """How many rows a block has on this CPU, found by packing; None where its order is unknown."""
    numbers = torch.arange(128 * 64).mul_(7).remainder_(16).sub_(8).view(128, 64)
    numbers = (numbers ^ torch.arange(128)[:, None] // 16 % 8).to(torch.int8)  # (out, in)
    try:
        blocks = to_blocks(pack_int4(numbers))
    except (RuntimeError, AttributeError):
        return None
    for n_rows in BLOCK_ROWS:
        if torch.equal(from_blocks(blocks, n_rows), numbers):
            return n_rows
    return None


def can_be_blocked(out_features: int, in_features: int, group: int) -> bool:
    """Whether the kernel takes a layer of this shape, and its numbers can be had back."""
    n_rows = block_rows()
    if n_rows is None:
        return False
    return out_features % n_rows == 0 and in_features % 2 == 0 and group in (32, 64, 128, 256)


# --- 3. products of a few rows --------------------------------------------------------------------
# in: x (B, in); out: x W^T (B, out) in x's dtype
# torch has no public names for these kernels; its own quantisers call them by the same ones


def multiply_int8(x: Tensor, numbers: Tensor, scale: Tensor) -> Tensor:
    """From 8-bit numbers as they are, x rounded to bfloat16."""
    multiply = torch._weight_int8pack_mm  # pyright: ignore[reportPrivateImportUsage]
    return multiply(x.bfloat16(), numbers, scale.flatten().bfloat16()).to(x.dtype)


def multiply_tiles(x: Tensor, tiles: Tensor, group: int, scales: Tensor) -> Tensor:
    """From tiles and scales_and_zeros, x bfloat16, on a GPU."""
    multiply = torch._weight_int4pack_mm  # pyright: ignore[reportPrivateImportUsage]
    return multiply(x.contiguous(), tiles, group, scales)


def multiply_blocks(x: Tensor, blocks: Tensor, group: int, scales: Tensor) -> Tensor:
    """From blocks and scales_and_zeros, x rounded to bfloat16, on a CPU."""
    multiply = torch._weight_int4pack_mm_for_cpu  # pyright: ignore[reportPrivateImportUsage]
    return multiply(x.bfloat16().contiguous(), blocks, group, scales).to(x.dtype)


def row_times_int8(x: Tensor, numbers: Tensor, scale: Tensor) -> Tensor:
    """One row x (1, in), summed in float32."""
    y = (numbers.float() * x.float()).sum(-1)  # (out,)
    return (y * scale[:, 0].float()).to(x.dtype)[None]  # (1, out)


def row_times_int4(x: Tensor, packed: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    """One row x (1, in) times numbers in bytes (out, in / 2), summed in float32."""
    low, high = halves(packed)
    even, odd = x.float().unflatten(1, (-1, 2)).unbind(-1)  # (1, in / 2)
    pairs = low.float() * even + high.float() * odd  # (out, in / 2)
    groups = pairs.unflatten(1, (scale.shape[1], -1))  # (out, in / group, group / 2)
    sums = (even + odd).unflatten(1, (scale.shape[1], -1))  # (1, in / group, group / 2)
    # scaled before the sum, so that one pass over the bytes does it all
    terms = groups * scale.float()[..., None] + sums * zero.float()[..., None]
    y = terms.flatten(1).sum(-1)  # (out,)
    return y.to(x.dtype)[None]  # (1, out)


def is_on_gpu(tensor: Tensor) -> bool:
    """Whether the kernels for CUDA can take it."""
    return tensor.device.type == "cuda"


@functools.cache
def compiled(product: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The product as one kernel that reads each byte once, tuned on the GPU for each shape.

    As they stand, these products would write the widened weight to memory and read it again. To be
    called it needs Triton and a C compiler, and the first time some seconds for each shape.
    """
    return torch.compile(product, dynamic=False, options={"coordinate_descent_tuning": True})


# --- 4. which is fastest --------------------------------------------------------------------------

# more than the cache of any GPU: a layer's weight is read from memory, as within a model
FLUSH_BYTES = 256 * 2**20


def gpu_seconds(call: Callable[[], Tensor], device: torch.device, n: int = 10) -> float:
    """Median time of a call on a GPU, its data not in the cache."""
    flush = torch.empty(FLUSH_BYTES, dtype=torch.int8, device=device)
    call()
    events = []
    with torch.cuda.device(device):
        for _ in range(n):
            start = torch.cuda.Event(enable_timing=True)
            end = torch.cuda.Event(enable_timing=True)
            # while the GPU is at this, the host launches what is timed
            flush.zero_()
            start.record()
            call()
            end.record()
            events.append((start, end))
        torch.cuda.synchronize()
    times = sorted(start.elapsed_time(end) for start, end in events)
    return times[n // 2] / 1000
