"""Linear layers changed: weights in 8 or 4 bits, low-rank adapters beside them."""

import math

import torch
import torch.nn as nn
import torch.nn.functional as F


class QuantizedLinear(nn.Module):
    """A bias-free nn.Linear with its weight in 8 or 4 bits a number, widened to the activations' dtype when it multiplies.

    weight int8 (out, in * bits / 8), at 4 bits two numbers a byte; scale (out, in / group) in the model's dtype: one a row at 8 bits, one for
    every 64 inputs at 4. Symmetric, rounded to nearest: a weight moves by at most half its scale. On a CPU, one token a row is multiplied with the
    8-bit numbers as they are, activations in bfloat16: decoding waits for memory, of which this reads a quarter. Elsewhere it saves memory only.
    """

    def __init__(self, in_features, out_features, bits):
        super().__init__()
        self.shape, self.bits, self.group = (
            (out_features, in_features),
            bits,
            in_features if bits == 8 else math.gcd(in_features, 64),
        )
        if in_features * bits % 8:
            raise ValueError(
                f"int4 packs two numbers a byte, but a layer has {in_features} inputs: use int8"
            )
        self.weight = nn.Parameter(
            torch.empty(out_features, in_features * bits // 8, dtype=torch.int8),
            requires_grad=False,
        )
        self.register_buffer(
            "scale", torch.empty(out_features, in_features // self.group), persistent=False
        )  # made from the weights anew, in no checkpoint

    def quantize_(self, weight):
        """Take over a float weight (out, in)."""
        largest = 2 ** (self.bits - 1) - 1
        groups = (
            weight.to(self.weight.device).float().unflatten(1, (-1, self.group))
        )  # (out, in / group, group)
        self.scale.copy_(groups.abs().amax(-1).clamp_min(1e-12) / largest)
        x = (
            (groups / self.scale.float()[..., None])
            .round()
            .clamp(-largest, largest)
            .to(torch.int8)
            .flatten(1)
        )  # (out, in)
        self.weight.copy_(x if self.bits == 8 else (x[:, ::2] & 15) | (x[:, 1::2] << 4))

    def dequantize(self, dtype):
        """The weight as floats (out, in), as close as its bits allow."""
        weight = self.weight
        if self.bits == 4:
            weight = torch.stack((weight << 4 >> 4, weight >> 4), dim=-1).flatten(
                1
            )  # (out, in): shifts of int8 keep the sign
        weight = (
            weight.to(dtype).unflatten(1, (-1, self.group)) * self.scale[..., None]
        )  # (out, in / group, group): scaled before the sum, which would leave float16's range
        return weight.flatten(1)

    def forward(self, x):
        # torch's kernel reads 32 inputs at a time, past the end of a row that holds no multiple of them
        if (
            self.bits == 8
            and x.shape[-2] == 1
            and x.device.type == "cpu"
            and x.shape[-1] % 32 == 0
            and not torch.is_grad_enabled()
        ):
            y = torch._weight_int8pack_mm(
                x.reshape(-1, x.shape[-1]).bfloat16(), self.weight, self.scale.flatten().bfloat16()
            )  # (B, out)
            return y.to(x.dtype).reshape(*x.shape[:-1], -1)  # (B, 1, out)
        return QuantizedProduct.apply(x, self)


class QuantizedProduct(torch.autograd.Function):
    """x W^T of a QuantizedLinear. Backward widens the weight again: kept from the forward, the widened weights would stand whole in memory."""

    @staticmethod
    def forward(ctx, x, linear):
        ctx.linear = linear
        return F.linear(x, linear.dequantize(x.dtype))

    @staticmethod
    def backward(ctx, grad):
        return grad @ ctx.linear.dequantize(grad.dtype), None


def quantize_linears(model, bits):
    """Put a QuantizedLinear, still empty, in the place of each linear layer of the decoder blocks; tower, projector, embeddings and head stay as they are."""
    for block in model.model.layers:
        for half in (block.self_attn, block.mlp):
            for name, linear in list(half.named_children()):
                setattr(half, name, QuantizedLinear(linear.in_features, linear.out_features, bits))


def add_lora(model, rank, alpha):
    """Give each linear layer of the decoder blocks low-rank adapters: y + alpha / rank * B (A x). Source: LoRA, arXiv 2106.09685, section 4.1.

    lora_A (rank, in) and lora_B (out, rank) are parameters of the layer itself, quantised or not, so that every other name stays as it is.
    """
    for block in model.model.layers:
        for linear in (*block.self_attn.children(), *block.mlp.children()):
            out_features, in_features = (
                linear.shape if isinstance(linear, QuantizedLinear) else linear.weight.shape
            )
            linear.lora_A, linear.lora_B = (
                nn.Parameter(torch.empty(rank, in_features)),
                nn.Parameter(torch.zeros(out_features, rank)),
            )
            linear.lora_scale = alpha / rank
            linear.register_forward_hook(
                lambda layer, x, y: (
                    y + layer.lora_scale * F.linear(F.linear(x[0], layer.lora_A), layer.lora_B)
                )
            )
