"""A model's picture half -> the tensors of an mmproj file, right for every llama.cpp.

llama.cpp lays a picture out as [patch 0 … patch N-1, class], adds row i of the position table to
slot i, and drops slot 0 at the end: each patch gets its neighbour's position, patch 0 is lost and
the class token answers in its place (its issue 25814). Mended (pull request 25844) it is CLIP's
[class, patch 0 …]. One file is exact for both orders, because two blocks in front of CLIP's own
find out which it is and put things right. They are CLIP blocks like any other; their weights are
not learnt but written down here.

The stream gets E more channels for some more heads, so that the head size, and with it the scale of
attention, stays. Each extra channel carries the mean of CLIP's own, so that the mean LayerNorm
takes is CLIP's; on top of it pairs of extra channels carry +s and -s, small numbers s of ours that
no mean sees (Scalars). What they add to LayerNorm's variance is a constant, taken off its eps.

    embeddings   CLIP's picture and positions; beside them a WEIGHT so heavy that the norm which
                 follows divides every slot by the same number, and the codes of the slot
    first norm   only shrinks everything by SMALL
    block 0      attention: every slot learns from the class token whether that sits first or last.
                 MLP: a table with an entry a slot, which speaks only where the class token sits
                 last: the position of the next slot for that of this one, and "fetch the slot
                 before me" for "fetch me". WEIGHT goes
    block 1      its norm is the first real one: what it sees is CLIP's picture plus position.
                 All heads fetch the slot that is asked for, and CLIP's pre_layrnorm is their
                 output, GREAT times its size; what was there before is next to nothing beside it
    block 2 …    CLIP's, which norms make blind to GREAT

Some of llama.cpp's programs (Metal's) round all that enters a product of matrices to float16, also
what is float32 in the file: the sizes below keep weights and activations within its reach.

Source: arXiv 2103.00020 for CLIP; llama.cpp's tools/mtmd/models/llava.cpp for the order of slots.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn as nn
from torch import Tensor

from model_io.pixels import CLIP_MEAN, CLIP_STD
from qilin_min import CLIPEncoderLayer, CLIPVisionTower, Qilin, VisionConfig

# how large the stream is before block 1, where CLIP's is 1, and after it: the one stays under the
# other. Both in one would leave float16
SMALL = 2.0**-8
GREAT = 2.0**6
# WEIGHT is that many times the longest picture-plus-position
HEAVY = 128.0
# differences of scores that leave exp() nothing
SURE = 48.0
# an entry of the table in block 0 is two hidden numbers, which read SPEAKS and STEP more where it
# speaks: gelu leaves both as they are, and what each is rounded by falls out of their difference
SPEAKS = 12.0
STEP = 2.0**-4

Tensors = dict[str, Tensor]


@dataclass
class Scalars:
    """The numbers of ours in the stream: which pair of extra channels holds each."""

    n_codes: int
    weight: int = 0
    # the same in every slot
    one: int = 1
    # of the class token alone
    is_class: int = 2
    # +1 in slot 0, -1 in the last
    place: int = 3
    # what block 0 finds out: +1 the class token is first, -1 last
    order: int = 4

    @property
    def own(self) -> range:
        """The code of the slot."""
        return range(5, 5 + self.n_codes)

    @property
    def wanted(self) -> range:
        """The code of the slot whose content this slot is to hold."""
        return range(5 + self.n_codes, 5 + 2 * self.n_codes)


@dataclass
class Widened:
    """CLIP's sizes with the extra channels, and the sizes of our numbers."""

    vision: VisionConfig
    # D and D' of the module's text: CLIP's channels, all channels
    width: int
    n_channels: int
    n_heads: int
    head_size: int
    n_slots: int
    scalars: Scalars
    # float64 (n_slots, n_codes): of length 1
    codes: Tensor
    # 1 less the greatest product of two slots' codes
    margin: float
    # sizes of WEIGHT, of codes and ONE, and of the other numbers
    heavy: float
    code_size: float
    mark_size: float
    # the length of picture plus position, at most
    longest: float

    @property
    def eps(self) -> float:
        """LayerNorm's eps in the file: block 1 sees everything SMALL, and half of CLIP's eps there
        is the energy of our numbers."""
        return SMALL**2 * self.width * self.vision.layer_norm_eps / (2 * self.n_channels)

    @property
    def flat_sigma(self) -> float:
        """What a norm divides by while WEIGHT is there, SMALL taken out."""
        return self.heavy * math.sqrt(2 / self.n_channels)

    def plus(self, scalar: int) -> int:
        """The channel of a number's +s; -s is in the next."""
        return self.width + 2 * scalar


def longest_embedding(tower: CLIPVisionTower) -> float:
    """The length that the embedding of a patch of any picture, or of the class token, can reach."""
    kernel = tower.embeddings.patch_embedding.weight.detach().float().flatten(1)  # (Cv, 3 p p)
    brightest = 0.0
    for mean, std in zip(CLIP_MEAN, CLIP_STD, strict=True):
        brightest += (max(mean, 1 - mean) / std) ** 2
    pixels = math.sqrt(brightest * kernel.shape[1] / 3)
    patch = torch.linalg.matrix_norm(kernel, ord=2).item() * pixels
    positions = tower.embeddings.position_embedding.weight.detach().float()  # (N + 1, Cv)
    class_token = tower.embeddings.class_embedding.detach().float().norm().item()
    return max(patch, class_token) + positions.norm(dim=1).max().item()


def slot_codes(n_slots: int, n_codes: int) -> Tensor:
    """float64 (n_slots, n_codes), rows of length 1 and far apart: points on n_codes / 2 circles,
    each gone round at another speed."""
    n_circles = n_codes // 2
    slots = torch.arange(n_slots, dtype=torch.float64)
    speeds = [round(n_slots ** (k / n_circles)) for k in range(n_circles)]
    angles = [2 * math.pi * speed * slots / n_slots for speed in speeds]
    circles = [torch.stack((angle.cos(), angle.sin()), dim=1) for angle in angles]
    return torch.cat(circles, dim=1) / math.sqrt(n_circles)


def widen(tower: CLIPVisionTower, vision: VisionConfig) -> Widened:
    """How a tower's stream is widened: by whole heads, at least 32 channels."""
    width = vision.hidden_size
    head_size = width // vision.num_attention_heads
    n_more = -(-32 // head_size)
    n_numbers = n_more * head_size // 2
    n_codes = min((n_numbers - 5) // 2, head_size - 1) // 2 * 2
    if n_codes < 2:
        raise ValueError(
            f"a vision tower with heads of {head_size} has no place for what llama.cpp's order of "
            "patches needs"
        )
    n_slots = (vision.image_size // vision.patch_size) ** 2 + 1
    codes = slot_codes(n_slots, n_codes)
    products = codes @ codes.T - 2 * torch.eye(n_slots, dtype=torch.float64)
    # ONE, own and wanted code: half of CLIP's eps, but for a little that the marks take
    code_size = math.sqrt(width * vision.layer_norm_eps / 4 / (3 + 1 / 64))
    longest = longest_embedding(tower)
    return Widened(
        vision=vision,
        width=width,
        n_channels=width + n_more * head_size,
        n_heads=vision.num_attention_heads + n_more,
        head_size=head_size,
        n_slots=n_slots,
        scalars=Scalars(n_codes),
        codes=codes,
        margin=1 - products.max().item(),
        heavy=HEAVY * longest,
        code_size=code_size,
        mark_size=code_size / 8,
        longest=longest,
    )


# --- 1. writing into, and reading from, the wider stream ---


def with_mean(rows: Tensor, wide: Widened) -> Tensor:
    """What writes Cv channels (Cv, …) writes all of them (D', …): the extra ones get the mean."""
    mean = rows.mean(dim=0, keepdim=True)
    n_more = wide.n_channels - wide.width
    return torch.cat((rows, mean.expand(n_more, *rows.shape[1:])))


def with_nothing(weight: Tensor, n_rows: int, n_columns: int) -> Tensor:
    """A matrix in the corner of a greater one, zero elsewhere."""
    greater = weight.new_zeros(n_rows, n_columns)
    greater[: weight.shape[0], : weight.shape[1]] = weight
    return greater


def padded(vector: Tensor, size: int) -> Tensor:
    """A vector with zeros behind it."""
    return torch.cat((vector, vector.new_zeros(size - len(vector))))


def put_scalar(rows: Tensor, scalar: int, value: Tensor | float, wide: Widened) -> None:
    """Add a number to what is written: rows (D', …), value of a row's shape."""
    plus = wide.plus(scalar)
    rows[plus] += value
    rows[plus + 1] -= value


def read_scalar(weight: Tensor, row: int, scalar: int, factor: float, wide: Widened) -> None:
    """Let output `row` of a matrix (…, D') read factor times a number."""
    plus = wide.plus(scalar)
    weight[row, plus] += factor / 2
    weight[row, plus + 1] -= factor / 2


def zero_block(wide: Widened, n_hidden: int) -> Tensors:
    """A block that changes nothing, and sees nothing."""
    size = wide.n_channels
    block: Tensors = {}
    for name in ("ln1", "ln2"):
        block[f"{name}.weight"] = torch.zeros(size)
        block[f"{name}.bias"] = torch.zeros(size)
    for name in ("attn_q", "attn_k", "attn_v", "attn_out"):
        block[f"{name}.weight"] = torch.zeros(size, size)
        block[f"{name}.bias"] = torch.zeros(size)
    block["ffn_up.weight"] = torch.zeros(n_hidden, size)
    block["ffn_up.bias"] = torch.zeros(n_hidden)
    block["ffn_down.weight"] = torch.zeros(size, n_hidden)
    block["ffn_down.bias"] = torch.zeros(size)
    return block


def see_scalars(norm: Tensor, factor: float, wide: Widened) -> None:
    """Let a norm's weight (D',) show all our numbers but WEIGHT, which float16 may not hold."""
    norm[wide.plus(0) :] = factor
    weight = wide.plus(wide.scalars.weight)
    norm[weight : weight + 2] = 0


# --- 2. the embeddings and the first norm ---


def embedding_tensors(tower: CLIPVisionTower, wide: Widened) -> Tensors:
    """CLIP's embeddings beside our numbers, and a norm that only makes all of it small."""
    embeddings = tower.embeddings
    scalars = wide.scalars
    kernel = embeddings.patch_embedding.weight.detach().float()  # (Cv, 3, p, p)
    class_token = with_mean(embeddings.class_embedding.detach().float(), wide)  # (D',)
    put_scalar(class_token, scalars.is_class, wide.mark_size, wide)

    positions = embeddings.position_embedding.weight.detach().float()  # (N + 1, Cv)
    table = with_mean(positions.T, wide)  # (D', N + 1)
    put_scalar(table, scalars.weight, wide.heavy, wide)
    put_scalar(table, scalars.one, wide.code_size, wide)
    place = torch.zeros(wide.n_slots)
    place[0] = wide.mark_size
    place[-1] = -wide.mark_size
    put_scalar(table, scalars.place, place, wide)
    codes = wide.code_size * wide.codes.float()  # (N + 1, n_codes)
    for channels in (scalars.own, scalars.wanted):
        for k, scalar in enumerate(channels):
            put_scalar(table, scalar, codes[:, k], wide)
    return {
        "v.patch_embd.weight": with_mean(kernel, wide),
        "v.class_embd": class_token,
        "v.position_embd.weight": table.T.contiguous(),
        "v.pre_ln.weight": torch.full((wide.n_channels,), SMALL * wide.flat_sigma),
        "v.pre_ln.bias": torch.zeros(wide.n_channels),
    }


# --- 3. the two blocks in front ---


def order_block(tower: CLIPVisionTower, wide: Widened) -> Tensors:
    """Block 0: which order is it; where the class token is last, other positions and wishes."""
    scalars = wide.scalars
    block = zero_block(wide, 2 * wide.n_slots)
    # while WEIGHT is there a norm divides all numbers alike: codes come back of length 1
    for name in ("ln1.weight", "ln2.weight"):
        see_scalars(block[name], wide.flat_sigma / wide.code_size, wide)
    mark = wide.mark_size / wide.code_size

    # every slot asks alike, the class token alone answers: with the place it sits at
    block["attn_q.bias"][0] = SURE * math.sqrt(wide.head_size)
    read_scalar(block["attn_k.weight"], 0, scalars.is_class, 1 / mark, wide)
    read_scalar(block["attn_v.weight"], 0, scalars.place, STEP / mark, wide)
    told = SMALL * wide.mark_size / STEP
    put_scalar(block["attn_out.weight"][:, 0], scalars.order, told, wide)

    # entry j speaks in slot j, and reads SURE less elsewhere or where the class is first
    sharpness = SURE / wide.margin
    up = block["ffn_up.weight"]  # (2 (N + 1), D')
    for j, code in enumerate(wide.codes.tolist()):
        for k, scalar in enumerate(scalars.own):
            read_scalar(up, j, scalar, sharpness * code[k], wide)
        read_scalar(up, j, scalars.order, -SURE / 2 / mark, wide)
    up[wide.n_slots :] = up[: wide.n_slots]
    block["ffn_up.bias"] += SPEAKS - sharpness - SURE / 2
    block["ffn_up.bias"][: wide.n_slots] += STEP

    positions = tower.embeddings.position_embedding.weight.detach().float()  # (N + 1, Cv)
    positions = positions - positions.mean(dim=1, keepdim=True)
    next_for_own = positions.roll(-1, dims=0) - positions  # (N + 1, Cv)
    before_for_own = (wide.codes.roll(1, dims=0) - wide.codes).float()  # (N + 1, n_codes)
    written = torch.zeros(wide.n_channels, wide.n_slots)  # (D', N + 1)
    written[: wide.width] = next_for_own.T
    for k, scalar in enumerate(scalars.wanted):
        put_scalar(written, scalar, wide.code_size * before_for_own[:, k], wide)
    written *= SMALL / STEP
    block["ffn_down.weight"] = torch.cat((written, -written), dim=1)  # (D', 2 (N + 1))
    put_scalar(block["ffn_down.bias"], scalars.weight, -SMALL * wide.heavy, wide)
    return block


def fetch_block(tower: CLIPVisionTower, wide: Widened) -> Tensors:
    """Block 1: CLIP's pre_layrnorm, of the slot that is wanted."""
    scalars = wide.scalars
    width = wide.width
    block = zero_block(wide, 32)
    # a slot's numbers come divided by its own sigma, so scores are sharp enough at the greatest;
    # own x wanted - ONE x ONE is 0 for the right slot and less for all others, whatever sigma is
    most = (wide.longest**2 + width * wide.vision.layer_norm_eps) / wide.n_channels
    sharpness = math.sqrt(SURE * math.sqrt(wide.head_size) * most / wide.margin) / wide.code_size
    see_scalars(block["ln1.weight"], sharpness, wide)
    block["ln1.weight"][:width] = 1
    for head in range(wide.vision.num_attention_heads):
        first = head * wide.head_size
        for k in range(scalars.n_codes):
            row = first + k
            read_scalar(block["attn_q.weight"], row, scalars.wanted[k], 1, wide)
            read_scalar(block["attn_k.weight"], row, scalars.own[k], 1, wide)
        row = first + scalars.n_codes
        read_scalar(block["attn_q.weight"], row, scalars.one, 1, wide)
        read_scalar(block["attn_k.weight"], row, scalars.one, -1, wide)

    block["attn_v.weight"][:width, :width] = torch.eye(width)
    norm = tower.pre_layrnorm
    scale = GREAT * norm.weight.detach().float() * math.sqrt(width / wide.n_channels)
    written = with_mean(torch.diag(scale), wide)  # (D', Cv)
    block["attn_out.weight"] = with_nothing(written, wide.n_channels, wide.n_channels)
    block["attn_out.bias"] = with_mean(GREAT * norm.bias.detach().float(), wide)
    # what CLIP's blocks need for their eps: that of the file is smaller by far
    missing = GREAT**2 * width * wide.vision.layer_norm_eps - wide.n_channels * wide.eps
    put_scalar(block["attn_out.bias"], scalars.weight, math.sqrt(missing / 2), wide)
    return block


# --- 4. CLIP's own blocks, and all of it ---


def clip_block(layer: CLIPEncoderLayer, wide: Widened) -> Tensors:
    """A block of CLIP's, which neither reads the extra channels nor writes more than the mean."""
    size = wide.n_channels
    # sigma is that of more channels, of which the extra ones add next to nothing
    rescale = math.sqrt(wide.width / size)
    attention = layer.self_attn
    block: Tensors = {}
    for name, norm in (("ln1", layer.layer_norm1), ("ln2", layer.layer_norm2)):
        block[f"{name}.weight"] = padded(norm.weight.detach().float() * rescale, size)
        block[f"{name}.bias"] = padded(norm.bias.detach().float(), size)
    inputs = {
        "attn_q": attention.q_proj,
        "attn_k": attention.k_proj,
        "attn_v": attention.v_proj,
    }
    for name, linear in inputs.items():
        block[f"{name}.weight"] = with_nothing(linear.weight.detach().float(), size, size)
        block[f"{name}.bias"] = padded(linear.bias.detach().float(), size)
    first = layer.mlp.fc1
    n_hidden = first.out_features
    block["ffn_up.weight"] = with_nothing(first.weight.detach().float(), n_hidden, size)
    block["ffn_up.bias"] = first.bias.detach().float()
    for name, linear in (("attn_out", attention.out_proj), ("ffn_down", layer.mlp.fc2)):
        written = with_mean(GREAT * linear.weight.detach().float(), wide)  # (D', …)
        n_columns = size if name == "attn_out" else n_hidden
        block[f"{name}.weight"] = with_nothing(written, size, n_columns)
        block[f"{name}.bias"] = with_mean(GREAT * linear.bias.detach().float(), wide)
    return block


def projector_of_one_layer(projector: nn.Module) -> Tensors:
    """One linear layer where llama.cpp always has two and GELU between them:
    GELU(x) - GELU(-x) = x, for its approximation by tanh as well."""
    assert isinstance(projector, nn.Linear)
    weight = projector.weight.detach().float()  # (C, Cv)
    identity = torch.eye(weight.shape[1])
    return {
        "mm.0.weight": torch.cat((identity, -identity)),
        "mm.0.bias": torch.zeros(2 * len(identity)),
        "mm.2.weight": torch.cat((weight, -weight), dim=1),
        "mm.2.bias": projector.bias.detach().float(),
    }


def projector_of_two_layers(projector: nn.Module) -> Tensors:
    """The released weights' two layers as they are."""
    tensors = {f"mm.{name}": param.detach().float() for name, param in projector.named_parameters()}
    assert sorted(tensors) == ["mm.0.bias", "mm.0.weight", "mm.2.bias", "mm.2.weight"]
    return tensors


# projector_type -> its form in llama.cpp, whose LLaVA has Linear, GELU, Linear
GGUF_PROJECTORS = {"linear": projector_of_one_layer, "mlp2x_gelu": projector_of_two_layers}


def check_gguf_projector(projector_type: str) -> None:
    """ValueError when llama.cpp has no form for this projector."""
    if projector_type not in GGUF_PROJECTORS:
        known = " and ".join(GGUF_PROJECTORS)
        raise ValueError(
            f"a model with a projector {projector_type} cannot be written for llama.cpp, which "
            f"holds {known}"
        )


@torch.no_grad()
def mmproj_tensors(model: Qilin, wide: Widened) -> tuple[Tensors, Tensors]:
    """(what must stay float32, what is rounded to float16) of a model's picture half.

    float32: the two blocks in front, the embeddings of places, norms and biases.
    """
    tower = model.vision_tower
    exact = embedding_tensors(tower, wide)
    rounded = {"v.patch_embd.weight": exact.pop("v.patch_embd.weight").half()}
    front = (order_block(tower, wide), fetch_block(tower, wide))
    for i, block in enumerate(front):
        exact |= {f"v.blk.{i}.{name}": tensor for name, tensor in block.items()}

    def add(tensors: Tensors, start: str) -> None:
        for name, tensor in tensors.items():
            if tensor.ndim > 1:
                rounded[start + name] = tensor.half()
            else:
                exact[start + name] = tensor

    for i, layer in enumerate(tower.encoder.layers[: tower.n_computed]):
        assert isinstance(layer, CLIPEncoderLayer)
        add(clip_block(layer, wide), f"v.blk.{i + len(front)}.")
    projector = GGUF_PROJECTORS[model.config.projector_type](model.mm_projector)
    first = projector["mm.0.weight"]  # (n, Cv)
    projector["mm.0.weight"] = with_nothing(first / GREAT, len(first), wide.n_channels)
    add(projector, "")
    return exact, rounded
