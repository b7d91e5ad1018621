"""Linear layers changed: weights in 8 or 4 bits, low-rank adapters beside them."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F

from common.files import one_line
from model_io.lowbit_kernels import (
    block_rows,
    can_be_blocked,
    can_be_tiled,
    compiled,
    fit_int4,
    fit_int8,
    from_blocks,
    from_tiles,
    gpu_seconds,
    is_on_gpu,
    multiply_blocks,
    multiply_int8,
    multiply_tiles,
    pack_int4,
    row_times_int4,
    row_times_int8,
    scales_and_zeros,
    to_blocks,
    to_tiles,
    unpack_int4,
)
from qilin_min import Entry, Qilin, is_finite

# --- 1. the layer ---------------------------------------------------------------------------------

# numbers of 4 bits that share a scale and a zero
INT4_GROUP = 32
# rows that are quantised at a time, so that what is made of them fits in a CPU's cache
SLICE = 256


class QuantizedLinear(nn.Module):
    """A bias-free nn.Linear with its weight in 8 or 4 bits a number, widened to the activations'
    dtype when it multiplies.

    weight int8 (out, in * bits / 8), at 4 bits two numbers a byte. At 8 bits a weight is number *
    scale, one scale a row, in `dtype`; at 4 bits number * scale + zero, one of each for every
    INT4_GROUP inputs, in bfloat16: scale and zero (out, in / group).
    Decoding waits for memory, so that one token a row is multiplied with the numbers as they are
    where torch has a kernel for it: on a CPU with activations in bfloat16; on CUDA by the fastest
    of WAYS, once choose_ways() was called. Everything else is widened, which saves memory only.
    """

    scale: torch.Tensor
    # bfloat16 (out, in / group), at 4 bits
    zero: torch.Tensor
    # bfloat16 (in / group, out, 2), of a weight in tiles or blocks
    scales_and_zeros: torch.Tensor
    # given by add_lora, else not there
    lora_A: nn.Parameter
    lora_B: nn.Parameter
    lora_scale: float

    def __init__(
        self, in_features: int, out_features: int, bits: int, dtype: torch.dtype = torch.float32
    ):
        super().__init__()
        if in_features * bits % 8:
            raise ValueError(
                f"int4 packs two numbers a byte, but a layer has {in_features} inputs: use int8"
            )
        self.shape = (out_features, in_features)
        self.bits = bits
        self.group = in_features if bits == 8 else math.gcd(in_features, INT4_GROUP)
        packed = torch.empty(out_features, in_features * bits // 8, dtype=torch.int8)
        self.weight = nn.Parameter(packed, requires_grad=False)
        # made from the weights anew, in no checkpoint
        n_groups = in_features // self.group
        scale = torch.empty(out_features, n_groups, dtype=dtype if bits == 8 else torch.bfloat16)
        self.register_buffer("scale", scale, persistent=False)
        if bits == 4:
            self.register_buffer("zero", torch.empty_like(scale), persistent=False)
        # number of rows -> the fastest of WAYS for it; None: everything is widened on a GPU
        self.chosen: dict[int, str] | None = None

    def quantize_(self, weight: torch.Tensor) -> None:
        """Take over a float weight (out, in), SLICE rows at a time."""
        for start in range(0, len(weight), SLICE):
            rows = slice(start, start + SLICE)
            some = weight[rows].to(self.weight.device).float()
            if self.bits == 8:
                numbers, scale = fit_int8(some)
                self.weight[rows] = numbers
            else:
                numbers, scale, zero = fit_int4(some, self.group)
                self.weight[rows] = pack_int4(numbers)
                self.zero[rows] = zero
            self.scale[rows] = scale

    def take_over(self, entry: Entry) -> bool:
        """Take over what is in these bits already: a tensor of model_io.int4_files. False: it is
        not. ValueError where its scales are no finite numbers."""
        stored: Any = entry.stored
        if self.bits != 4 or not hasattr(stored, "packed"):
            return False
        weight, scale, zero = stored.packed()
        if not (is_finite(scale) and is_finite(zero)):
            raise ValueError(f"{entry.file}: the scales of {entry.name} hold values not finite")
        self.weight.copy_(weight)
        self.scale.copy_(scale)
        self.zero.copy_(zero)
        return True

    def int4_bytes(self) -> torch.Tensor:
        """The numbers, two a byte, however they lie: int8 (out, in / 2)."""
        if self.is_tiled or self.is_blocked:
            return pack_int4(self._numbers())
        return self.weight

    @property
    def is_tiled(self) -> bool:
        return self.weight.dtype == torch.int32

    @property
    def is_blocked(self) -> bool:
        return self.weight.dtype == torch.uint8

    def make_tiled(self) -> None:
        """Keep the weight as tiles for torch's 4-bit kernel in place of its bytes: as many."""
        if not self.is_tiled:
            self._hold(to_tiles(self.weight))  # (out / 8, in / 128, 32, 4)

    def make_blocked(self) -> None:
        """Likewise as blocks, for its kernel for this CPU."""
        if not self.is_blocked:
            self._hold(to_blocks(self.weight))  # (out, in / 2)

    def _hold(self, packed: torch.Tensor) -> None:
        """Keep tiles or blocks as the weight, scales and zeros in their kernel's order."""
        self.weight = nn.Parameter(packed, requires_grad=False)
        scales = scales_and_zeros(self.scale, self.zero)  # (in / group, out, 2)
        self.register_buffer("scales_and_zeros", scales, persistent=False)
        # the same numbers, held once
        self.scale = scales[..., 0].T  # (out, in / group)
        self.zero = scales[..., 1].T  # (out, in / group)
        if self.chosen is not None:
            # some read bytes
            self.chosen.clear()

    def _numbers(self) -> torch.Tensor:
        """int8 (out, in), however they lie."""
        if self.bits == 8:
            return self.weight
        if self.is_tiled:
            return from_tiles(self.weight)
        if self.is_blocked:
            n_rows = block_rows()
            assert n_rows is not None, "blocks were made on another CPU"
            return from_blocks(self.weight, n_rows)
        return unpack_int4(self.weight)

    def dequantize(self, dtype: torch.dtype) -> torch.Tensor:
        """The weight as floats (out, in), as close as its bits allow."""
        groups = (
            self._numbers().to(dtype).unflatten(1, (-1, self.group))
        )  # (out, in / group, group)
        # scaled before the sum, which would leave float16's range
        groups.mul_(self.scale.to(dtype)[..., None])
        if self.bits == 4:
            groups.add_(self.zero.to(dtype)[..., None])
        return groups.flatten(1)  # (out, in)

    def way_of(self, x: torch.Tensor) -> str:
        """The row of WAYS that multiplies one token a row, x (B, in)."""
        if is_on_gpu(x):
            if self.chosen is None:
                return "widened"
            if len(x) not in self.chosen:
                choose_way(self, x)
            return self.chosen[len(x)]
        # not measured: the ways differ in the last digits, and an answer must not depend on how
        # busy this machine is
        for name in CPU_WAYS:
            if x.device.type == "cpu" and WAYS[name].may_take(self, x):
                return name
        return "widened"

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        is_decoding = x.shape[-2] == 1 and not torch.is_grad_enabled()
        if not is_decoding:
            return QuantizedProduct.apply(x, self)
        rows = x.reshape(-1, x.shape[-1])  # (B, in)
        y = WAYS[self.way_of(rows)].multiply(rows, self)  # (B, out)
        return y.reshape(*x.shape[:-1], -1)  # (B, 1, out)


class QuantizedProduct(torch.autograd.Function):
    """x W^T of a QuantizedLinear. Backward widens the weight again: kept from the forward, the
    widened weights would stand whole in memory."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, linear: QuantizedLinear) -> torch.Tensor:
        ctx.linear = linear
        return F.linear(x, linear.dequantize(x.dtype))

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        return grad @ ctx.linear.dequantize(grad.dtype), None


# --- 2. ways to multiply one token a row ----------------------------------------------------------


def multiply_widened(x: torch.Tensor, linear: QuantizedLinear) -> torch.Tensor:
    """x W^T, (B, in) -> (B, out): the weight is written to memory as floats, and read again."""
    return F.linear(x, linear.dequantize(x.dtype))


def multiply_as_int8(x: torch.Tensor, linear: QuantizedLinear) -> torch.Tensor:
    return multiply_int8(x, linear.weight, linear.scale)


def multiply_as_tiles(x: torch.Tensor, linear: QuantizedLinear) -> torch.Tensor:
    return multiply_tiles(x, linear.weight, linear.group, linear.scales_and_zeros)


def multiply_as_blocks(x: torch.Tensor, linear: QuantizedLinear) -> torch.Tensor:
    linear.make_blocked()
    return multiply_blocks(x, linear.weight, linear.group, linear.scales_and_zeros)


def multiply_compiled(x: torch.Tensor, linear: QuantizedLinear) -> torch.Tensor:
    if linear.bits == 8:
        return compiled(row_times_int8)(x, linear.weight, linear.scale)
    return compiled(row_times_int4)(x, linear.weight, linear.scale, linear.zero)


def can_multiply_int8(linear: QuantizedLinear, x: torch.Tensor) -> bool:
    """On a CPU torch's kernel reads 32 inputs at a time, past the end of a row that holds no
    multiple of them. On a GPU activations are not rounded for it that were not before."""
    fits = linear.shape[1] % 32 == 0
    is_rounded = not is_on_gpu(x) or x.dtype == torch.bfloat16
    return linear.bits == 8 and fits and is_rounded


def can_multiply_tiles(linear: QuantizedLinear, x: torch.Tensor) -> bool:
    """On AMD's GPUs, which torch calls cuda too, tiles lie otherwise."""
    fits = can_be_tiled(*linear.shape, linear.group)
    is_nvidia = is_on_gpu(x) and torch.version.hip is None
    return linear.bits == 4 and fits and is_nvidia and x.dtype == torch.bfloat16


def can_multiply_blocks(linear: QuantizedLinear, x: torch.Tensor) -> bool:
    if linear.bits != 4 or x.device.type != "cpu" or is_on_gpu(x):
        return False
    return can_be_blocked(*linear.shape, linear.group)


def can_compile(linear: QuantizedLinear, x: torch.Tensor) -> bool:
    """For one row: what it would read again for a second one is the weight."""
    return len(x) == 1 and not linear.is_tiled and is_on_gpu(x)


@dataclass(frozen=True)
class Way:
    """One way to multiply one token a row by a quantised layer."""

    # whether it may be tried: what torch then refuses here is left out
    may_take: Callable[[QuantizedLinear, torch.Tensor], bool]
    multiply: Callable[[torch.Tensor, QuantizedLinear], torch.Tensor]
    # the weight must lie in tiles
    needs_tiles: bool = False


WAYS = {
    "widened": Way(may_take=lambda linear, x: True, multiply=multiply_widened),
    "int8": Way(may_take=can_multiply_int8, multiply=multiply_as_int8),
    "tiles": Way(may_take=can_multiply_tiles, multiply=multiply_as_tiles, needs_tiles=True),
    "blocks": Way(may_take=can_multiply_blocks, multiply=multiply_as_blocks),
    "compiled": Way(may_take=can_compile, multiply=multiply_compiled),
}
# those that a CPU takes where it may: each is ahead of widening by several times on all seen
CPU_WAYS = ("int8", "blocks")


@dataclass
class Choice:
    """The fastest of WAYS for layers of one shape, and what each took."""

    name: str
    seconds: dict[str, float]
    # of those that torch refused: why
    refused: dict[str, str]


# a shape of layer and input -> what was measured for it
CHOICES: dict[tuple, Choice] = {}


def measure_ways(linear: QuantizedLinear, x: torch.Tensor) -> Choice:
    """Times all of WAYS that may take x (B, in); the layer stays as it is."""
    seconds = {}
    refused = {}
    for name, way in WAYS.items():
        if not way.may_take(linear, x):
            continue
        tried = linear
        try:
            if way.needs_tiles and not linear.is_tiled:
                with torch.device("meta"):
                    tried = QuantizedLinear(linear.shape[1], linear.shape[0], linear.bits)
                tried.weight = linear.weight
                tried.scale = linear.scale
                tried.zero = linear.zero
                tried.make_tiled()
            seconds[name] = gpu_seconds(partial(way.multiply, x, tried), x.device)
        # no compiler, no Triton, a GPU too old for a kernel: each raises its own kind
        except Exception as error:
            refused[name] = one_line(error)[:200]
    return Choice(min(seconds, key=seconds.__getitem__), seconds, refused)


@torch.compiler.disable(recursive=True)
def choose_way(linear: QuantizedLinear, x: torch.Tensor) -> Choice:
    """The Choice for this layer and x (B, in), which the layer keeps to; measured the first time
    that such come."""
    key = (linear.bits, linear.shape, linear.is_tiled, len(x), x.dtype, x.device)
    if key not in CHOICES:
        CHOICES[key] = measure_ways(linear, x)
    choice = CHOICES[key]
    if WAYS[choice.name].needs_tiles:
        linear.make_tiled()
    assert linear.chosen is not None, "this layer widens"
    linear.chosen[len(x)] = choice.name
    return choice


def said(choice: Choice) -> str:
    """What was measured, and why something was not."""
    times = [f"{name} {1e6 * seconds:.0f} µs" for name, seconds in choice.seconds.items()]
    times += [f"{name}: {reason}" for name, reason in choice.refused.items()]
    return f"{choice.name} ({', '.join(times)})"


def choose_ways(model: Qilin) -> str | None:
    """From now on one token a row is multiplied the fastest way there is on this GPU; that of one
    row is found now. -> a line that says which, None where no layer is quantised, or on no GPU.
    """
    parts = {}
    with torch.no_grad():
        for _, _, linear in linear_layers(model):
            if isinstance(linear, QuantizedLinear) and is_on_gpu(linear.weight):
                linear.chosen = {}
                n_out, n_in = linear.shape
                x = linear.scale.new_ones(1, n_in)
                parts[f"{n_in} to {n_out}"] = said(choose_way(linear, x))
    if not parts:
        return None
    return "; ".join(f"{shape} by {choice}" for shape, choice in parts.items())


# --- 3. the layers of a model ---------------------------------------------------------------------


def linear_layers(model: Qilin) -> list[tuple[nn.Module, str, Any]]:
    """(the half of a block that holds it, its name there, the layer) of each linear layer of the
    decoder blocks, quantised or not."""
    found = []
    for block in model.model.layers:
        for half in (block.get_submodule("self_attn"), block.get_submodule("mlp")):
            for name, linear in half.named_children():
                found.append((half, name, linear))
    return found


def quantize_linears(model: Qilin, bits: int) -> None:
    """Put a QuantizedLinear, still empty, in the place of each linear layer of the decoder blocks;
    tower, projector, embeddings and head stay as they are."""
    for half, name, linear in linear_layers(model):
        dtype = linear.weight.dtype
        quantised = QuantizedLinear(linear.in_features, linear.out_features, bits, dtype)
        setattr(half, name, quantised)


def add_adapter_output(layer: Any, inputs: tuple, y: torch.Tensor) -> torch.Tensor:
    """A forward hook: y + alpha / rank * B (A x)."""
    low_rank = F.linear(inputs[0], layer.lora_A)  # (…, rank)
    return y + layer.lora_scale * F.linear(low_rank, layer.lora_B)  # (…, out)


def add_lora(model: Qilin, rank: int, alpha: float) -> None:
    """Give each linear layer of the decoder blocks low-rank adapters: y + alpha / rank * B (A x).
    Source: LoRA, arXiv 2106.09685, section 4.1.

    lora_A (rank, in) and lora_B (out, rank) are parameters of the layer itself, quantised or not,
    so that every other name stays as it is.
    """
    for _, _, linear in linear_layers(model):
        is_quantised = isinstance(linear, QuantizedLinear)
        out_features, in_features = linear.shape if is_quantised else linear.weight.shape
        linear.lora_A = nn.Parameter(torch.empty(rank, in_features))
        linear.lora_B = nn.Parameter(torch.zeros(out_features, rank))
        linear.lora_scale = alpha / rank
        linear.register_forward_hook(add_adapter_output)
