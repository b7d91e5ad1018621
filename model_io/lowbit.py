"""Linear layers changed: weights in 8 or 4 bits, low-rank adapters beside them."""

import math
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F

from qilin_min import Qilin


class QuantizedLinear(nn.Module):
    """A bias-free nn.Linear with its weight in 8 or 4 bits a number, widened to the activations'
    dtype when it multiplies.

    weight int8 (out, in * bits / 8), at 4 bits two numbers a byte; scale (out, in / group) in the
    model's dtype: one a row at 8 bits, one for every 64 inputs at 4. Symmetric, rounded to nearest:
    a weight moves by at most half its scale. On a CPU, one token a row is multiplied with the 8-bit
    numbers as they are, activations in bfloat16: decoding waits for memory, of which this reads a
    quarter. Elsewhere it saves memory only.
    """

    scale: torch.Tensor
    # given by add_lora, else not there
    lora_A: nn.Parameter
    lora_B: nn.Parameter
    lora_scale: float

    def __init__(self, in_features: int, out_features: int, bits: int):
        super().__init__()
        if in_features * bits % 8:
            raise ValueError(
                f"int4 packs two numbers a byte, but a layer has {in_features} inputs: use int8"
            )
        self.shape = (out_features, in_features)
        self.bits = bits
        self.group = in_features if bits == 8 else math.gcd(in_features, 64)
        packed = torch.empty(out_features, in_features * bits // 8, dtype=torch.int8)
        self.weight = nn.Parameter(packed, requires_grad=False)
        # made from the weights anew, in no checkpoint
        scale = torch.empty(out_features, in_features // self.group)
        self.register_buffer("scale", scale, persistent=False)

    def quantize_(self, weight: torch.Tensor) -> None:
        """Take over a float weight (out, in)."""
        largest = 2 ** (self.bits - 1) - 1
        weight = weight.to(self.weight.device).float()
        groups = weight.unflatten(1, (-1, self.group))  # (out, in / group, group)
        self.scale.copy_(groups.abs().amax(-1).clamp_min(1e-12) / largest)
        steps = groups / self.scale.float()[..., None]
        steps.round_().clamp_(-largest, largest)
        numbers = steps.to(torch.int8).flatten(1)  # (out, in)
        if self.bits == 4:
            low = numbers[:, ::2] & 15
            high = numbers[:, 1::2] << 4
            numbers = low | high  # (out, in / 2)
        self.weight.copy_(numbers)

    def dequantize(self, dtype: torch.dtype) -> torch.Tensor:
        """The weight as floats (out, in), as close as its bits allow."""
        numbers = self.weight
        if self.bits == 4:
            # shifts of int8 keep the sign
            low = numbers << 4 >> 4
            high = numbers >> 4
            numbers = torch.stack((low, high), dim=-1).flatten(1)  # (out, in)
        groups = numbers.to(dtype).unflatten(1, (-1, self.group))  # (out, in / group, group)
        # scaled before the sum, which would leave float16's range
        return (groups * self.scale[..., None]).flatten(1)  # (out, in)

    def has_kernel_for(self, x: torch.Tensor) -> bool:
        """True when multiply_int8 may take x (…, T, in): one token a row, on a CPU, no gradient."""
        is_decoding = x.shape[-2] == 1 and not torch.is_grad_enabled()
        # torch's kernel reads 32 inputs at a time, past the end of a row that holds no multiple of
        # them
        fits = x.device.type == "cpu" and x.shape[-1] % 32 == 0
        return self.bits == 8 and is_decoding and fits

    def multiply_int8(self, x: torch.Tensor) -> torch.Tensor:
        """x W^T, (…, 1, in) -> (…, 1, out), from the 8-bit numbers as they are.

        torch has no public name for this kernel; its own quantiser calls it by the same one.
        """
        rows = x.reshape(-1, x.shape[-1]).bfloat16()  # (B, in)
        scale = self.scale.flatten().bfloat16()  # (out,)
        multiply = torch._weight_int8pack_mm  # pyright: ignore[reportPrivateImportUsage]
        y = multiply(rows, self.weight, scale)  # (B, out)
        return y.to(x.dtype).reshape(*x.shape[:-1], -1)  # (B, 1, out)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.has_kernel_for(x):
            return self.multiply_int8(x)
        return QuantizedProduct.apply(x, self)


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
        setattr(half, name, QuantizedLinear(linear.in_features, linear.out_features, bits))


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
