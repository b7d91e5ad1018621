"""qilin-min: Qilin-Med-VL (arXiv 2310.17956) from scratch in PyTorch: CLIP, projector, LLaMA-2.

Read from top to bottom. It needs torch and safetensors, nothing of ours, and goes from a llava-hf
folder and lists of ids to logits and answers; model_io/ carries texts, pictures and every other
layout in and out of it. Sections 2 to 4 are the model:

    1. constants and configuration        config.json of a checkpoint -> TextConfig, VisionConfig
    2. LLaMA-2 decoder                    RMSNorm, RoPE, KV cache, attention (GQA), SwiGLU
    3. CLIP vision tower                  pixels -> features of the last block but one
    4. projector and Qilin                picture features among the words; loss; logits
    5. weights                            files -> every tensor accounted for -> the model
    6. generation                         prompts -> answers, token by token

    model = load_llava_hf("out/stage2/final")
    for ids in generate(model, [[1, 29871, 30675]], max_new_tokens=20):
        print(ids)

Shapes:  B batch, T tokens (each picture already expanded to its N positions), M pictures in the
batch, N patches a picture (576 = 24 x 24), C text width, Cv vision width, H heads, D head size,
V vocabulary, L layers.
Module attributes are the names in published checkpoints, so that loading is nearly the identity.
"""

import functools
import json
import math
import re
import time
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors import safe_open
from torch import Tensor
from torch.utils.checkpoint import checkpoint

# --- 1. constants and configuration ---------------------------------------------------------------
# in: config.json in the spelling of any release
# out: TextConfig and VisionConfig, whose field names are those of config.json

# in a conversation: here stands a picture
IMAGE_TOKEN = "<image>"
# in input_ids: one patch of a picture; out of range on purpose, it must never reach embed_tokens
IMAGE_TOKEN_INDEX = -200
# in labels: this position teaches nothing
IGNORE_INDEX = -100


@dataclass
class TextConfig:
    """Sizes of the LLaMA decoder.

    Defaults are those of transformers' LlamaConfig, since a config.json may omit what equals them.
    """

    vocab_size: int = 32000
    hidden_size: int = 4096
    intermediate_size: int = 11008
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    # 0: as many as num_attention_heads; fewer is grouped-query attention
    num_key_value_heads: int = 0
    # 0: hidden_size / num_attention_heads
    head_dim: int = 0
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    max_position_embeddings: int = 2048
    # True: the output head is embed_tokens
    tie_word_embeddings: bool = False
    bos_token_id: int = 1
    # a list in some config.json: the first is here, the others in more_end_ids, and the tokenizer's
    # where it differs; any of them ends an answer
    eos_token_id: int = 2
    more_end_ids: tuple[int, ...] = ()

    def __post_init__(self):
        self.num_key_value_heads = self.num_key_value_heads or self.num_attention_heads
        self.head_dim = self.head_dim or self.hidden_size // self.num_attention_heads


@dataclass
class VisionConfig:
    """Sizes of the CLIP tower. Defaults are those of transformers' CLIPVisionConfig."""

    hidden_size: int = 768
    intermediate_size: int = 3072
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    image_size: int = 224  # pixels, height and width
    patch_size: int = 32
    layer_norm_eps: float = 1e-5
    hidden_act: str = "quick_gelu"
    # config.json: vision_feature_layer or mm_vision_select_layer
    select_layer: int = -2


@dataclass
class QilinConfig:
    """Both halves, and what is between them."""

    text: TextConfig = field(default_factory=TextConfig)
    vision: VisionConfig = field(default_factory=VisionConfig)
    # a row of PROJECTORS: "linear" (paper) | "mlp2x_gelu" (released weights)
    projector_type: str = "linear"
    # ids below this are the tokenizer's and may be generated
    n_token_ids: int = 0
    # how a picture becomes square: preprocess_image's mode
    image_mode: str = "pad"

    @property
    def end_ids(self) -> list[int]:
        return [self.text.eos_token_id, *self.text.more_end_ids]

    @property
    def n_image_tokens(self) -> int:
        return (self.vision.image_size // self.vision.patch_size) ** 2


def is_allowed(name: str, value: Any, kind: type) -> bool:
    """Whether a value of config.json may stand in a field `name` of this kind."""
    if kind not in (int, float):
        return isinstance(value, kind)
    kinds = (float, int) if kind is float else (int,)
    # True and False are ints to Python, but no sizes
    if not isinstance(value, kinds) or isinstance(value, bool):
        return False
    # only ids count from 0
    if value == 0:
        return "_id" in name
    # more layers than any model has would be built before a file is looked at
    most = 1000 if name == "num_hidden_layers" else 1e9
    return 0 < value < most


def _fields_from(cls, raw: dict, where: Path, fixed: dict[str, list]):
    """An instance of dataclass `cls` from a config.json dict.

    fixed: of what we do not read, the only values that we implement.
    """
    if not isinstance(raw, dict):
        raise ValueError(f"{where}: not an object with the sizes of a model")
    for key, allowed in fixed.items():
        if raw.get(key) not in (None, *allowed):
            choices = ", ".join(map(repr, allowed))
            raise ValueError(
                f"{where}: {key} = {raw[key]!r} is not implemented here (only {choices})"
            )
    found = {f.name: raw[f.name] for f in fields(cls) if raw.get(f.name) is not None}
    for name, value in found.items():
        kind = type(getattr(cls, name))
        if not is_allowed(name, value, kind):
            wanted = "a positive number" if kind in (int, float) else f"a {kind.__name__}"
            raise ValueError(f"{where}: {name} = {value!r} is not {wanted}")
    config = cls(**found)
    if config.hidden_size % config.num_attention_heads and "head_dim" not in found:
        raise ValueError(
            f"{where}: hidden_size {config.hidden_size} cannot be cut into "
            f"{config.num_attention_heads} heads"
        )
    return config


def _rope_theta(raw: dict, where: Path) -> Any:
    """The base of RoPE's angles, in whatever spelling; None where config.json says nothing of it.

    ValueError unless positions are rotated as in LLaMA-2, without any scaling, and the spellings
    agree: transformers 4 reads rope_theta, 5 first what is nested.
    """
    # transformers 5 nests what older files spell rope_theta, rope_scaling
    parameters = raw.get("rope_parameters") or {}
    scaling = raw.get("rope_scaling") or {}
    if not isinstance(parameters, dict) or not isinstance(scaling, dict):
        raise ValueError(f"{where}: not an object with the sizes of a language model")
    for rope in (parameters, scaling):
        for kind in (rope.get("rope_type"), rope.get("type")):
            if kind not in (None, "default"):
                raise ValueError(
                    f"{where}: RoPE scaling of type {kind!r} is not implemented; answers would be "
                    "silently wrong"
                )
    theta = (scaling or parameters).get("rope_theta")
    if theta is None:
        theta = raw.get("rope_theta")
    for rope in (raw, parameters, scaling):
        other = rope.get("rope_theta")
        if other not in (None, theta):
            raise ValueError(
                f"{where}: rope_theta is said to be {theta} and {other}, which transformers 4 and "
                "5 decide differently: keep the one that the model was trained with"
            )
        if rope.get("partial_rotary_factor") not in (None, 1):
            raise ValueError(f"{where}: a partial_rotary_factor is not implemented here")
    return theta


def text_config(raw: dict, where: Path) -> TextConfig:
    """TextConfig from the dict of a LLaMA config.json.

    ValueError names what we do not implement (RoPE scaling, other model types).
    """
    if not isinstance(raw, dict):
        raise ValueError(f"{where}: not an object with the sizes of a language model")
    sizes = dict(raw)
    sizes["rope_theta"] = _rope_theta(raw, where)
    ends = raw.get("eos_token_id")
    if isinstance(ends, list) and ends:
        more = ends[1:]
        if not all(type(i) is int and i >= 0 for i in more):
            raise ValueError(f"{where}: eos_token_id = {ends!r} is no list of ids")
        sizes["eos_token_id"] = ends[0]
        sizes["more_end_ids"] = tuple(more)
    else:
        sizes["more_end_ids"] = ()
    fixed = {
        "model_type": ["llama", "llava", "llava_llama"],
        "hidden_act": ["silu"],
        "attention_bias": [False],
        "mlp_bias": [False],
    }
    config = _fields_from(TextConfig, sizes, where, fixed)
    if config.num_attention_heads % config.num_key_value_heads or config.head_dim % 2:
        raise ValueError(
            f"{where}: {config.num_attention_heads} heads of {config.head_dim} cannot share "
            f"{config.num_key_value_heads} key-value heads, or cannot be rotated in pairs"
        )
    return config


def vision_config(raw: dict, where: Path) -> VisionConfig:
    """VisionConfig from the dict of a CLIP config.json, with or without the text tower's half."""
    fixed = {
        "model_type": ["clip_vision_model", "clip"],
        "hidden_act": ["quick_gelu", "gelu"],
        "num_channels": [3],
    }
    config = _fields_from(VisionConfig, raw.get("vision_config", raw), where, fixed)
    if config.patch_size > config.image_size:
        raise ValueError(
            f"{where}: patch_size {config.patch_size} is more than image_size {config.image_size}"
        )
    return config


# --- 2. LLaMA-2 decoder ---------------------------------------------------------------------------
# in: embeddings (B, T, C); out: hidden states (B, T, C)
# Source: arXiv 2307.09288; the layout of weights is Hugging Face's


def is_decoding_on_cpu(x: Tensor) -> bool:
    """Whether x (B, T, in) is one token a row, no gradient is wanted, and a CPU computes."""
    is_one_token = x.ndim == 3 and x.shape[1] == 1
    return is_one_token and x.device.type == "cpu" and not torch.is_grad_enabled()


def linear_in_pieces(x: Tensor, weight: Tensor) -> Tensor:
    """x W^T of one token a row, (B, 1, in) -> (B, 1, out): a piece of the weight for each thread.

    On some CPUs torch's product of few rows runs on one thread, however many there are; a batch of
    products is spread over all of them.
    """
    out_features, in_features = weight.shape
    n_pieces = math.gcd(out_features, torch.get_num_threads())
    pieces = weight.view(n_pieces, out_features // n_pieces, in_features)
    columns = x[:, 0].T.expand(n_pieces, -1, -1)  # (n_pieces, in, B)
    y = torch.bmm(pieces, columns)  # (n_pieces, out / n_pieces, B)
    return y.flatten(0, 1).T[:, None]  # (B, 1, out)


def linear_without_onednn(x: Tensor, weight: Tensor) -> Tensor:
    """x W^T by torch's own product: on some CPUs ahead of oneDNN's for one row of bfloat16."""
    onednn = torch.backends.mkldnn
    was_enabled = onednn.enabled
    # around this product alone: off for a whole pass, others would lose
    onednn.enabled = False
    try:
        return F.linear(x, weight)
    finally:
        onednn.enabled = was_enabled


@functools.cache
def decoding_product(
    dtype: torch.dtype, is_one_row: bool, n_threads: int
) -> Callable[[Tensor, Tensor], Tensor]:
    """What multiplies one token a row fastest on this CPU: F.linear, unless another is well ahead.

    Measured once, in some 50 ms. The ways differ in a sum's last digits, so that no small gain
    decides, which would be another one at the next start.
    """
    if dtype == torch.bfloat16:
        other = linear_without_onednn
    elif dtype == torch.float32 and n_threads > 1:
        other = linear_in_pieces
    else:
        return F.linear
    x = torch.ones(1 if is_one_row else 8, 1, 2048, dtype=dtype)
    weight = torch.ones(2048, 2048, dtype=dtype)
    seconds: dict[Callable, list[float]] = {F.linear: [], other: []}
    for _ in range(9):
        for product, times in seconds.items():
            start = time.perf_counter()
            product(x, weight)
            times.append(time.perf_counter() - start)
    # the median of three quiet ones: what else runs here can only add
    usual, rival = (sorted(times)[1] for times in seconds.values())
    return other if rival < 0.8 * usual else F.linear


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """x W^T: x (..., in), weight (out, in) -> (..., out)."""
    if is_decoding_on_cpu(x) and x.dtype == weight.dtype:
        product = decoding_product(x.dtype, len(x) == 1, torch.get_num_threads())
        return product(x, weight)
    return F.linear(x, weight)


class Linear(nn.Linear):
    """nn.Linear without a bias, as all of LLaMA's are, multiplied by linear()."""

    def __init__(self, in_features: int, out_features: int):
        super().__init__(in_features, out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight)


class RMSNorm(nn.Module):
    """x / rms(x) * weight, in float32 and rounded once at the end.

    One kernel on CUDA that keeps x and 1 / rms(x) for backward; on a CPU torch computes it in
    parts. Source: arXiv 1910.07467.
    """

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


def rotary_cos_sin(position_ids: Tensor, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """cos and sin of RoPE's angles, float32 (B, 1, T, D), for int64 positions (B, T).

    A function and not a buffer: a buffer would be cast with the weights (the released code rounds
    inv_freq to bf16) and is garbage after meta-device construction.
    Source: RoFormer, arXiv 2104.09864, section 3.4.2, half-rotation layout.
    """
    pairs = torch.arange(0, head_dim, 2, dtype=torch.float32, device=position_ids.device)
    inv_freq = 1.0 / theta ** (pairs / head_dim)  # (D/2,)
    angles = position_ids[:, None, :, None].float() * inv_freq  # (B, 1, T, D/2)
    angles = torch.cat((angles, angles), dim=-1)  # (B, 1, T, D)
    return angles.cos(), angles.sin()


def apply_rotary_pos_emb(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x (B, H, T, D) rotated by its position: element i is paired with element i + D/2."""
    x1, x2 = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-x2, x1), dim=-1) * sin


class KVCache:
    """Keys and values of all positions seen, so that a new token costs one position.

    k, v (L, B, H_kv, T_max, D), allocated at the first update in that tensor's dtype.
    lengths int64 (B,): real tokens held, row by row, so that rows of different lengths sit in one
    batch without left padding: a row's next token overwrites the padding behind its last.
    n_positions: an upper bound of lengths, a Python int (no device sync); so many are attended to.
    The three tensors are only ever written in place: a step captured as a CUDA graph keeps them.
    """

    def __init__(self, n_layers: int, max_length: int):
        self.n_layers = n_layers
        self.max_length = max_length
        self.k: Tensor | None = None
        self.v: Tensor | None = None
        self.lengths: Tensor | None = None
        self.n_positions = 0

    def update(
        self, layer: int, k: Tensor, v: Tensor, position_ids: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Store k, v (B, H_kv, T, D) at position_ids (B, T).

        -> all keys and values so far (B, H_kv, n_positions, D).
        """
        if self.k is None or self.v is None:
            shape = (self.n_layers, k.shape[0], k.shape[1], self.max_length, k.shape[3])
            self.k = k.new_zeros(shape)
            self.v = v.new_zeros(shape)
        if len(k) == 1:
            # the same for one row, for which it is the faster
            self.k[layer].index_copy_(2, position_ids[0], k)
            self.v[layer].index_copy_(2, position_ids[0], v)
            return self.k[layer][:, :, : self.n_positions], self.v[layer][:, :, : self.n_positions]
        rows = torch.arange(k.shape[0], device=k.device)[:, None]  # (B, 1)
        # two indices around a slice select (B, T, H_kv, D)
        self.k[layer][rows, :, position_ids] = k.transpose(1, 2)
        self.v[layer][rows, :, position_ids] = v.transpose(1, 2)
        return self.k[layer][:, :, : self.n_positions], self.v[layer][:, :, : self.n_positions]

    def add(self, lengths: Tensor) -> None:
        """Count lengths int64 (B,) more tokens as real; what was stored behind them is padding."""
        assert self.lengths is not None, "nothing is stored yet"
        self.lengths.add_(lengths)

    def truncate(self, lengths: Tensor) -> None:
        """Forget all but the first lengths int64 (B,) tokens of each row.

        What comes next overwrites the rest.
        """
        assert self.lengths is not None, "nothing is stored yet"
        self.lengths.copy_(lengths)
        self.n_positions = int(lengths.max())


class LlamaAttention(nn.Module):
    def __init__(self, config: TextConfig, layer: int):
        super().__init__()
        self.layer = layer
        self.head_dim = config.head_dim
        self.is_grouped = config.num_key_value_heads != config.num_attention_heads
        q_size = config.num_attention_heads * config.head_dim
        kv_size = config.num_key_value_heads * config.head_dim
        self.q_proj = Linear(config.hidden_size, q_size)
        self.k_proj = Linear(config.hidden_size, kv_size)
        self.v_proj = Linear(config.hidden_size, kv_size)
        self.o_proj = Linear(q_size, config.hidden_size)

    def forward(
        self,
        x: Tensor,
        rope: tuple[Tensor, Tensor],
        cache: KVCache | None,
        position_ids: Tensor,
        mask: Tensor | None,
    ) -> Tensor:
        B, T, _ = x.shape
        q = self.q_proj(x).view(B, T, -1, self.head_dim).transpose(1, 2)  # (B, H, T, D)
        k = self.k_proj(x).view(B, T, -1, self.head_dim).transpose(1, 2)  # (B, H_kv, T, D)
        v = self.v_proj(x).view(B, T, -1, self.head_dim).transpose(1, 2)  # (B, H_kv, T, D)
        q = apply_rotary_pos_emb(q, *rope)
        k = apply_rotary_pos_emb(k, *rope)
        if cache is not None:
            k, v = cache.update(self.layer, k, v, position_ids)  # (B, H_kv, n_positions, D)
        y = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=self.is_grouped
        )  # (B, H, T, D)
        return self.o_proj(y.transpose(1, 2).reshape(B, T, -1))  # (B, T, C)


class LlamaMLP(nn.Module):
    def __init__(self, config: TextConfig):
        super().__init__()
        self.gate_proj = Linear(config.hidden_size, config.intermediate_size)
        self.up_proj = Linear(config.hidden_size, config.intermediate_size)
        self.down_proj = Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class LlamaDecoderLayer(nn.Module):
    def __init__(self, config: TextConfig, layer: int):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = LlamaAttention(config, layer)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = LlamaMLP(config)

    def forward(
        self,
        x: Tensor,
        rope: tuple[Tensor, Tensor],
        cache: KVCache | None,
        position_ids: Tensor,
        mask: Tensor | None,
    ) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), rope, cache, position_ids, mask)
        return x + self.mlp(self.post_attention_layernorm(x))


def build_embedding(n: int, size: int) -> nn.Embedding:
    """nn.Embedding, its rows drawn uniform with nn.Embedding's own variance of 1.

    The normal draw alone makes torch import for a second on the meta device; the weight is handed
    over by a parameter that torch keeps private.
    """
    return nn.Embedding(n, size, _weight=torch.empty(n, size).uniform_(-(3**0.5), 3**0.5))


class LlamaModel(nn.Module):
    def __init__(self, config: TextConfig):
        super().__init__()
        self.config = config
        self.embed_tokens = build_embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(
            LlamaDecoderLayer(config, i) for i in range(config.num_hidden_layers)
        )
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        # how many layers, from the first, recompute their inside in backward instead of keeping it
        self.n_checkpointed = 0

    def forward(self, x: Tensor, cache: KVCache | None = None) -> Tensor:
        """x float (B, T, C) -> normed hidden states (B, T, C).

        Attention is causal and rows are padded on the right, so that no real token ever sees
        padding and no mask is needed (the flash kernel takes is_causal alone). With a cache that
        holds earlier tokens, a mask (B, 1, T, n_positions) replaces it, which is added to the
        scores: of a bool one, attention would make that anew in every layer.
        """
        B, T, _ = x.shape
        position_ids = torch.arange(T, device=x.device)[None]  # (1, T)
        mask = None
        if cache is not None:
            cache.n_positions = min(cache.n_positions + T, cache.max_length)
            if cache.lengths is None:  # the first pass
                cache.lengths = torch.zeros(B, dtype=torch.int64, device=x.device)
            else:
                position_ids = cache.lengths[:, None] + position_ids  # (B, T)
                # a row that has ended may be full
                position_ids = position_ids.clamp(max=cache.max_length - 1)
                held = torch.arange(cache.n_positions, device=x.device)
                is_later = held > position_ids[:, None, :, None]  # (B, 1, T, n_positions)
                mask = x.new_zeros(is_later.shape).masked_fill(is_later, -torch.inf)
        cos, sin = rotary_cos_sin(position_ids, self.config.head_dim, self.config.rope_theta)
        # only the finished cos and sin are rounded
        rope = (cos.to(x.dtype), sin.to(x.dtype))
        for i, layer in enumerate(self.layers):
            if i < self.n_checkpointed and torch.is_grad_enabled() and cache is None:
                # nothing here draws, so that no state of a generator need be kept
                x = checkpoint(
                    layer,
                    x,
                    rope,
                    cache,
                    position_ids,
                    mask,
                    use_reentrant=False,
                    preserve_rng_state=False,
                )
            else:
                x = layer(x, rope, cache, position_ids, mask)
        return self.norm(x)


# --- 3. CLIP vision tower -------------------------------------------------------------------------
# in: pixels (M, 3, H, W); out: features (M, N, Cv)
# Source: arXiv 2103.00020; attribute names as in the files, the misspelt one too


class CLIPVisionEmbeddings(nn.Module):
    def __init__(self, config: VisionConfig):
        super().__init__()
        size = config.hidden_size
        n_positions = (config.image_size // config.patch_size) ** 2 + 1
        self.class_embedding = nn.Parameter(torch.zeros(size))
        self.patch_embedding = nn.Conv2d(
            3, size, config.patch_size, stride=config.patch_size, bias=False
        )
        self.position_embedding = build_embedding(n_positions, size)

    def forward(self, pixel_values: Tensor) -> Tensor:
        pixel_values = pixel_values.to(self.patch_embedding.weight.dtype)
        x = self.patch_embedding(pixel_values)  # (M, Cv, h, w)
        x = x.flatten(2).transpose(1, 2)  # (M, N, Cv)
        cls = self.class_embedding.expand(x.shape[0], 1, -1)  # (M, 1, Cv)
        return torch.cat((cls, x), dim=1) + self.position_embedding.weight  # (M, N + 1, Cv)


class CLIPAttention(nn.Module):
    def __init__(self, config: VisionConfig):
        super().__init__()
        self.n_heads = config.num_attention_heads
        self.q_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.k_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.v_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.out_proj = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        M, T, Cv = x.shape
        q = self.q_proj(x).view(M, T, self.n_heads, -1).transpose(1, 2)  # (M, H, T, D)
        k = self.k_proj(x).view(M, T, self.n_heads, -1).transpose(1, 2)  # (M, H, T, D)
        v = self.v_proj(x).view(M, T, self.n_heads, -1).transpose(1, 2)  # (M, H, T, D)
        y = F.scaled_dot_product_attention(q, k, v)  # (M, H, T, D)
        return self.out_proj(y.transpose(1, 2).reshape(M, T, Cv))  # (M, T, Cv)


class CLIPMLP(nn.Module):
    def __init__(self, config: VisionConfig):
        super().__init__()
        self.is_quick = config.hidden_act == "quick_gelu"
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        x = self.fc1(x)
        x = x * torch.sigmoid(1.702 * x) if self.is_quick else F.gelu(x)
        return self.fc2(x)


class CLIPEncoderLayer(nn.Module):
    def __init__(self, config: VisionConfig):
        super().__init__()
        self.layer_norm1 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.self_attn = CLIPAttention(config)
        self.layer_norm2 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = CLIPMLP(config)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp(self.layer_norm2(x))


class CLIPEncoder(nn.Module):
    def __init__(self, config: VisionConfig):
        super().__init__()
        self.layers = nn.ModuleList(
            CLIPEncoderLayer(config) for _ in range(config.num_hidden_layers)
        )


class CLIPVisionTower(nn.Module):
    """CLIP's image half.

    Layers past select_layer and post_layernorm are held, since an export must hold them, but never
    computed.
    """

    def __init__(self, config: VisionConfig):
        super().__init__()
        size = config.hidden_size
        self.embeddings = CLIPVisionEmbeddings(config)
        # sic: the name in every checkpoint
        self.pre_layrnorm = nn.LayerNorm(size, eps=config.layer_norm_eps)
        self.encoder = CLIPEncoder(config)
        self.post_layernorm = nn.LayerNorm(size, eps=config.layer_norm_eps)
        # hidden_states[i] is the output of block i (0: of the embeddings);
        # -2 of 24 blocks means blocks 1 to 23
        self.n_computed = config.select_layer
        if config.select_layer < 0:
            self.n_computed = config.num_hidden_layers + 1 + config.select_layer

    def forward(self, pixel_values: Tensor) -> Tensor:
        """pixel_values float (M, 3, H, W) normalised -> features (M, N, Cv).

        The class token is dropped.
        """
        x = self.pre_layrnorm(self.embeddings(pixel_values))  # (M, N + 1, Cv)
        for layer in self.encoder.layers[: self.n_computed]:
            x = layer(x)
        return x[:, 1:]  # (M, N, Cv)


# --- 4. projector and Qilin -----------------------------------------------------------------------
# in: input_ids (B, T) with IMAGE_TOKEN_INDEX at picture positions, pixels (M, 3, H, W)
# out: logits (B, T, V) or the loss


@dataclass(frozen=True)
class HfForm:
    """One way for a projector to lie in a llava-hf folder, whose class computes
    linear_2(activation(linear_1(features))).
    """

    # projector_hidden_act of config.json; None: llava-hf has no word for it, the type's own name
    # stands there, which transformers refuses, and only this project opens the folder
    activation: str | None
    # the type's layers -> their names under multi_modal_projector.
    layers: dict[str, str]
    # a layer that llava-hf has and the type lacks: it goes out, and must come in, with the weight
    # that (vision width, text width) give, and a bias of zeros
    constant_layer: str | None = None
    constant_weight: Callable[[int, int], Tensor] | None = None
    # the weight W (C, Cv) lies as [W, -W, 0] (C, C), for which C must be at least 2 Cv
    is_mirrored: bool = False


def mirroring_weight(vision_size: int, text_size: int) -> Tensor:
    """[I; -I; 0]: x (Cv) -> x, then -x, then zeros (C). For C of at least 2 Cv."""
    weight = torch.zeros(text_size, vision_size)
    weight[:vision_size] = torch.eye(vision_size)
    weight[vision_size : 2 * vision_size] = -torch.eye(vision_size)
    return weight


def identity_weight(vision_size: int, text_size: int) -> Tensor:
    """I: what is C wide already stays as it is."""
    return torch.eye(text_size)


# GELU(x) - GELU(-x) = x, so that a linear layer is also linear_1 = [I; -I; 0], GELU, and
# linear_2 = [W, -W, 0] with the bias: transformers and vLLM run that
MIRRORED = HfForm(
    activation="gelu",
    layers={"": "linear_2"},
    constant_layer="linear_1",
    constant_weight=mirroring_weight,
    is_mirrored=True,
)
# where there is no room for that, and in folders of before: linear_1 = W, linear_2 = I with a
# linear activation, which vLLM refuses
WITH_IDENTITY = HfForm(
    activation="linear",
    layers={"": "linear_1"},
    constant_layer="linear_2",
    constant_weight=identity_weight,
)


@dataclass(frozen=True)
class Projector:
    """A row of PROJECTORS: all in which one adapter between tower and words differs from others."""

    # (vision width, text width) -> the module; its attributes are the names in original LLaVA files
    build: Callable[[int, int], nn.Module]
    # how it lies in llava-hf folders, any of which is read; the first for which there is room is
    # written. Empty: no export can hold it, so that only its projector file may be trained
    hf_forms: tuple[HfForm, ...]


def build_mlp2x_gelu(vision_size: int, text_size: int) -> nn.Module:
    """The released weights' Linear, exact GELU, Linear."""
    return nn.Sequential(
        nn.Linear(vision_size, text_size),
        nn.GELU(),
        nn.Linear(text_size, text_size),
    )


# the adapter of paper section 4.1; a further projector is one row
PROJECTORS = {
    # the paper's: one linear layer, for which llava-hf has no class
    "linear": Projector(build=nn.Linear, hf_forms=(MIRRORED, WITH_IDENTITY)),
    "mlp2x_gelu": Projector(
        build=build_mlp2x_gelu,
        hf_forms=(HfForm(activation="gelu", layers={"0": "linear_1", "2": "linear_2"}),),
    ),
}


def projector_row(projector_type: str) -> Projector:
    """The row of PROJECTORS; ValueError when there is none of this name."""
    if projector_type not in PROJECTORS:
        known = " or ".join(PROJECTORS)
        raise ValueError(f"projector_type {projector_type!r} is unknown: {known}")
    return PROJECTORS[projector_type]


def hf_forms(projector_type: str) -> tuple[HfForm, ...]:
    """The forms of a row of PROJECTORS, or one without names, for what no folder can hold."""
    return projector_row(projector_type).hf_forms or (HfForm(activation=None, layers={}),)


def count_image_positions(input_ids: Tensor) -> int:
    """Picture positions of input_ids (B, T); of ids on a GPU this waits for it."""
    return int((input_ids == IMAGE_TOKEN_INDEX).sum())


def count_labels(labels: Tensor) -> int:
    """Labels of (B, T) that the loss counts: none stands before the first; of labels on a GPU this
    waits for it."""
    return int((labels[:, 1:] != IGNORE_INDEX).sum())


def places_of(mask: Tensor, n: int) -> Tensor:
    """int64 (n,): where the n True of a mask bool (B, T) are, among all B * T places.

    mask.nonzero() would make a GPU's host wait to learn n. RuntimeError where n is not how many
    there are (on a GPU it comes later, and ends the process).
    """
    if mask.device.type == "mps":
        # torch 2.11 has neither of the two below there
        return places_of(mask.cpu(), n).to(mask.device)
    # torch has no public name for it
    check = torch._assert_async  # pyright: ignore[reportPrivateImportUsage]
    check(mask.sum() == n, f"told to expect {n} places, but there are others")
    return torch.nonzero_static(mask.flatten(), size=n)[:, 0]


def splice_image_embeds(
    token_embeds: Tensor, image_embeds: Tensor, image_mask: Tensor, n_places: int | None = None
) -> Tensor:
    """Token embeddings with every picture position replaced by its patch embedding, in one step.

    token_embeds (B, T, C), image_embeds (M, N, C) in reading order, image_mask bool (B, T), of
    which n_places are True (None: counted here) -> (B, T, C).
    ValueError when these are other than M * N positions: one picture too many would shift all that
    follow.
    Source: LLaVA, arXiv 2304.08485, section 4.1.
    """
    M, N, _ = image_embeds.shape
    if n_places is None:
        n_places = int(image_mask.sum())
    if n_places != M * N:
        raise ValueError(
            f"input_ids hold {n_places} picture positions, but the pictures give {M} x {N} patches"
        )
    patches = image_embeds.to(token_embeds.dtype).flatten(0, 1)  # (M * N, C)
    places = places_of(image_mask, n_places)  # (M * N,)
    # not masked_scatter, whose backward waits for the GPU
    x = token_embeds.flatten(0, 1).index_copy(0, places, patches)  # (B * T, C)
    return x.view_as(token_embeds)  # (B, T, C)


# labelled positions whose logits exist at one time: 1024 x 55296 x 4 bytes = 216 MiB
LOSS_CHUNK = 1024


class Qilin(nn.Module):
    """vision_tower -> mm_projector -> model (LLaMA) -> lm_head.

    The tower is never trained (paper, section 4.2).
    """

    def __init__(self, config: QilinConfig):
        super().__init__()
        self.config = config
        size = config.text.hidden_size
        self.vision_tower = CLIPVisionTower(config.vision)
        row = projector_row(config.projector_type)
        self.mm_projector = row.build(config.vision.hidden_size, size)
        self.model = LlamaModel(config.text)
        self.lm_head = None
        if not config.text.tie_word_embeddings:
            self.lm_head = Linear(size, config.text.vocab_size)

    def encode_images(self, pixel_values: Tensor) -> Tensor:
        """pixel_values (M, 3, H, W) -> picture embeddings (M, N, C)."""
        with torch.no_grad():
            image_features = self.vision_tower(pixel_values)  # (M, N, Cv)
        weight = next(self.mm_projector.parameters())
        return self.mm_projector(image_features.to(weight.dtype))  # (M, N, C)

    def embed(
        self,
        input_ids: Tensor,
        pixel_values: Tensor | None,
        n_image_positions: int | None = None,
    ) -> Tensor:
        """input_ids (B, T) and their pictures -> what the decoder reads (B, T, C)."""
        if n_image_positions is None:
            n_image_positions = count_image_positions(input_ids)
        image_mask = input_ids == IMAGE_TOKEN_INDEX  # (B, T)
        x = self.model.embed_tokens(input_ids.masked_fill(image_mask, 0))  # (B, T, C)
        if pixel_values is not None and len(pixel_values):
            image_embeds = self.encode_images(pixel_values)  # (M, N, C)
            return splice_image_embeds(x, image_embeds, image_mask, n_image_positions)
        if n_image_positions:
            raise ValueError(
                f"input_ids hold {n_image_positions} picture positions, but there are no pictures"
            )
        if self.training:
            # under FSDP every rank must run backward through the same layers down to the projector,
            # picture or not
            weight = next(self.mm_projector.parameters())
            nothing = weight.new_zeros(1, self.config.vision.hidden_size)  # (1, Cv)
            x = x + 0.0 * self.mm_projector(nothing).to(x.dtype)  # (B, T, C)
        return x

    def logits(self, hidden: Tensor) -> Tensor:
        head = self.model.embed_tokens if self.lm_head is None else self.lm_head
        return linear(hidden, head.weight).float()  # (..., V)

    def forward(
        self,
        input_ids: Tensor,
        pixel_values: Tensor | None = None,
        labels: Tensor | None = None,
        reduction: str = "mean",
        cache: KVCache | None = None,
        lengths: Tensor | None = None,
        n_image_positions: int | None = None,
        n_labels: int | None = None,
    ) -> Tensor:
        """Logits, or with labels the loss.

        input_ids int64 (B, T), each picture as n_image_tokens positions of IMAGE_TOKEN_INDEX; rows
        padded on the right with id 0.
        pixel_values float (M, 3, H, W): the batch's pictures in reading order, any number a row;
        None when there are none.
        labels int64 (B, T), not shifted -> scalar float32: cross entropy, "mean" or "sum" over the
        positions whose next label counts (no such position: 0, still connected to the graph).
        Without labels -> logits float32 (B, T, V).
        cache: a KVCache, with lengths int64 (B,) = real tokens of each row in this call
        -> logits float32 (B, V) at each row's last real token.
        n_image_positions, n_labels: what count_image_positions() and count_labels() say, from a
        caller who counted before ids and labels went to a GPU; None: counted here, for which the
        GPU is waited for.
        ValueError when picture positions and pictures do not agree.
        """
        x = self.embed(input_ids, pixel_values, n_image_positions)  # (B, T, C)
        hidden = self.model(x, cache)  # (B, T, C)
        if cache is not None:
            assert lengths is not None, "a cache must be told how many tokens of each row are real"
            cache.add(lengths)
            rows = torch.arange(len(lengths), device=hidden.device)
            last = hidden[rows, lengths - 1, None]  # (B, 1, C)
            return self.logits(last)[:, 0]  # (B, V)
        if labels is None:
            return self.logits(hidden)  # (B, T, V)
        if reduction not in ("mean", "sum"):
            raise ValueError(f"reduction {reduction!r} is unknown: mean or sum")
        if n_labels is None:
            n_labels = count_labels(labels)
        return self.loss(hidden, labels, reduction, n_labels)

    def decode(self, ids: Tensor, cache: KVCache, lengths: Tensor) -> Tensor:
        """Logits float32 (B, V) after one more token a row.

        ids int64 (B,); lengths int64 (B,): 1, or 0 for a row that has ended. No shape depends on
        how many tokens the cache holds but through n_positions, and the host waits for nothing, so
        that this step can be captured as a CUDA graph: model_io.graphs takes its place on CUDA.
        """
        return self(ids[:, None], cache=cache, lengths=lengths, n_image_positions=0)

    def loss(self, hidden: Tensor, labels: Tensor, reduction: str, n_labels: int) -> Tensor:
        """Cross entropy in float32 of hidden (B, T, C) against labels (B, T), n_labels of which
        count.

        Logits exist only where a label does, LOSS_CHUNK at a time.
        """
        # of each position the next one's label; the last has none
        targets = F.pad(labels[:, 1:], (0, 1), value=IGNORE_INDEX)  # (B, T)
        places = places_of(targets != IGNORE_INDEX, n_labels)  # (n,)
        hidden = hidden.flatten(0, 1).index_select(0, places)  # (n, C)
        targets = targets.flatten().index_select(0, places)  # (n,)
        # keeps the graph when this rank has no label at all
        total = hidden.float().sum() * 0.0
        chunks = zip(hidden.split(LOSS_CHUNK), targets.split(LOSS_CHUNK), strict=True)
        for some_hidden, some_targets in chunks:
            # checkpoint: backward computes a chunk's logits again instead of keeping them
            total = total + checkpoint(
                self.summed_loss,
                some_hidden,
                some_targets,
                use_reentrant=False,
                preserve_rng_state=False,
            )
        return total if reduction == "sum" else total / max(n_labels, 1)

    def summed_loss(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """Cross entropy of hidden (n, C) against targets (n,), summed."""
        return F.cross_entropy(self.logits(hidden), targets, reduction="sum")


# --- 5. weights -----------------------------------------------------------------------------------
# in: a llava-hf folder, or tensors of any layout under the names of their files
# out: a model whose every parameter came from a named tensor

PARTS = ("llm", "vision_tower", "mm_projector")
EMBED = "model.embed_tokens.weight"
HEAD = "lm_head.weight"

# names in files -> names here: patterns and what takes their place, tried one after the other.
# The layers of a llava-hf projector keep theirs, which are translated by its row of PROJECTORS
RENAMES = (
    # peft's addition
    (r"^base_model\.model\.", ""),
    # llava-hf of any age; original LLaVA nests it twice
    (r"^(model\.)?vision_tower\.(vision_tower\.)?(vision_model\.)?", "vision_tower."),
    # CLIP, older and as transformers 5 saves it
    (r"^(vision_model\.)?(?=(embeddings|encoder|pre_layrnorm|post_layernorm)\.)", "vision_tower."),
    # llava-hf
    (r"^(model\.)?multi_modal_projector\.", "mm_projector."),
    # original LLaVA and the Qilin release
    (r"^model\.mm_projector\.", "mm_projector."),
    # llava-hf up to 4.51, and since
    (r"^(language_model\.model|model\.language_model)\.", "model."),
    (r"^language_model\.(?=lm_head\.)", ""),
)

# what a checkpoint may hold that no model here needs
IGNORABLE = re.compile(
    # computed, not stored, since transformers 4.32
    r"rotary_emb\.inv_freq$"
    # 0, 1, 2, … in old CLIP files
    r"|embeddings\.position_ids$"
    # CLIP's text half
    r"|^text_model\.|^(text|visual)_projection\.weight$|^logit_scale$"
)

# ours -> the older llava-hf names, which every transformers reads
HF_PREFIXES = (
    ("vision_tower.", "vision_tower.vision_model."),
    ("model.", "language_model.model."),
    ("lm_head.", "language_model.lm_head."),
)


def our_name(name: str) -> str | None:
    """The name here of a tensor of a file; None when it has the form of none."""
    for pattern, ours in RENAMES:
        name = re.sub(pattern, ours, name)
    if name.startswith(("vision_tower.", "mm_projector.", "model.", "lm_head.")):
        return name
    return None


def part_of(name: str) -> str:
    """The one of PARTS that a parameter (named as here) belongs to.

    "lora" for an adapter, which no file holds.
    """
    if name.endswith((".lora_A", ".lora_B")):
        return "lora"
    first = name.split(".")[0]
    return first if first in PARTS else "llm"


def split_projector_name(name: str) -> tuple[str, str]:
    """(layer, kind) of a projector's tensor: "mm_projector.0.weight" -> ("0", "weight")."""
    layer, _, kind = name.removeprefix("mm_projector.").rpartition(".")
    return layer, kind


def hf_name(name: str) -> str:
    """The llava-hf name of a parameter of tower or language model."""
    for ours, theirs in HF_PREFIXES:
        if name.startswith(ours):
            return theirs + name.removeprefix(ours)
    raise ValueError(f"{name} has no name in a llava-hf folder")


def named_list(names: Iterable[str]) -> str:
    """Up to ten names, and how many more."""
    names = sorted(names)
    shown = ", ".join(names[:10])
    if len(names) > 10:
        shown += f" and {len(names) - 10} more"
    return shown


# --- 5a. files: tensors by our names, read when asked for


class StoredTensor(Protocol):
    """A tensor in a file, of which rows are read; safetensors' slice is one."""

    def get_shape(self) -> list[int]: ...

    def get_dtype(self) -> str: ...

    def __getitem__(self, rows: slice) -> Tensor: ...


@dataclass
class Entry:
    """Where a tensor lies: the file, its name there, and the handle that reads its rows."""

    file: Path
    name: str
    stored: StoredTensor


# safetensors' spelling of torch's
DTYPES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "I64": "int64",
    "I32": "int32",
    "I8": "int8",
    "U8": "uint8",
    "BOOL": "bool",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
}
# of these the ones whose numbers are the weights, which nothing else scales
FLOATS = ("float64", "float32", "float16", "bfloat16")


# what stands in a clone in the place of a large file, where git-lfs has not fetched it
LFS_POINTER = b"version https://git-lfs.github.com/spec/"


def check_no_pointer(file: Path) -> None:
    """ValueError when a file is a Git LFS pointer to what it should hold."""
    with open(file, "rb") as opened:
        start = opened.read(len(LFS_POINTER))
    if start == LFS_POINTER:
        raise ValueError(
            f"{file} is a Git LFS pointer, not the file itself: run `git lfs pull` in its folder"
        )


def open_safetensors(file: Path) -> dict[str, StoredTensor]:
    """{name: slice} of a .safetensors file; nothing is read before it is asked for."""
    check_no_pointer(file)
    try:
        opened = safe_open(file, framework="pt")
        return {name: opened.get_slice(name) for name in opened.keys()}
    # the reader raises many kinds for a damaged file, and each means this
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"{file}: cannot be read as weights ({reason})") from None


class WeightFiles:
    """The tensors of a checkpoint, by our names, read slice by slice when asked for.

    path: the folder or file that was named, for messages.
    open_file: a file -> {name: tensor there}.
    tensors: our name -> where it lies.
    ignored: names on the short list of what no model needs. unknown: names of no form that we know.
    """

    def __init__(
        self,
        path: Path,
        files: Iterable[Path],
        open_file: Callable[[Path], dict[str, StoredTensor]] = open_safetensors,
    ):
        self.path = path
        self.tensors: dict[str, Entry] = {}
        self.unknown: list[str] = []
        self.ignored: list[str] = []
        for file in files:
            for name, stored in open_file(file).items():
                self._add(Entry(file, name, stored))

    def _add(self, entry: Entry) -> None:
        ours = our_name(entry.name)
        if IGNORABLE.search(entry.name):
            self.ignored.append(entry.name)
        elif ours is None:
            self.unknown.append(entry.name)
        elif ours in self.tensors:
            other = self.tensors[ours]
            raise ValueError(
                f"{entry.file}: {entry.name} is also in {other.file.name} (as {other.name})"
            )
        else:
            self.tensors[ours] = entry

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.tensors[name].stored.get_shape())

    def dtype(self, name: str) -> str:
        """torch's name of it: "float32"."""
        dtype = self.tensors[name].stored.get_dtype()
        return DTYPES.get(dtype, dtype)

    def rows(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        """Rows start:stop of a tensor, in the file's dtype, nothing else being read."""
        return self.tensors[name].stored[start:stop]


def _read_json(file: Path) -> Any:
    check_no_pointer(file)
    try:
        # -sig: some releases carry a byte-order mark
        return json.loads(file.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file}: not a JSON file ({error})") from None


# the sets of weights that a folder may hold, in the order in which transformers takes them
WEIGHT_SETS = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)


def weight_sets(folder: Path) -> list[Path]:
    """The sets of weights in a folder, each a file or an index of shards, first what is taken."""
    return [folder / name for name in WEIGHT_SETS if (folder / name).is_file()]


def files_of_set(place: Path) -> list[Path]:
    """The files of a set of weights, there or not: itself, or the shards that an index names."""
    if place.suffix != ".json":
        return [place]
    raw = _read_json(place)
    weight_map = raw.get("weight_map") if isinstance(raw, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{place}: no weight_map from tensors to files beside it")
    for name in weight_map.values():
        if not isinstance(name, str) or name != Path(name).name:
            raise ValueError(f"{place}: no weight_map from tensors to files beside it")
    return [place.with_name(name) for name in sorted(set(weight_map.values()))]


def shards_of(place: Path) -> list[Path]:
    """The files of a set of weights. FileNotFoundError unless all are there."""
    files = files_of_set(place)
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise FileNotFoundError(
            f"{place} names {missing[0]}, which is not there "
            f"({len(missing)} of {len(files)} files are missing)"
        )
    return files


# --- 5b. accounting: every parameter has its tensor, every tensor its parameter


def check_all_known(files: WeightFiles) -> None:
    """ValueError that names the tensors whose names are of no form that we know."""
    if files.unknown:
        names = named_list(files.unknown)
        raise ValueError(f"{files.path}: tensors that this model has no place for: {names}")


def is_same_tensor(files: WeightFiles, one: str, other: str) -> bool:
    """Whether two tensors of a checkpoint are equal, some thousand rows at a time."""
    if files.shape(one) != files.shape(other):
        return False
    for start in range(0, files.shape(one)[0], 4096):
        rows = files.rows(one, start, start + 4096).float()
        if not torch.equal(rows, files.rows(other, start, start + 4096).float()):
            return False
    return True


def is_mirrored(files: WeightFiles) -> bool:
    """Whether the projector of a checkpoint lies in the form MIRRORED.

    linear_1 = [I; -I; 0], linear_2 = [W, -W, 0], both exactly, with a zero bias in linear_1:
    anything else has been trained as two layers.
    """
    first = "mm_projector.linear_1.weight"
    first_bias = "mm_projector.linear_1.bias"
    second = "mm_projector.linear_2.weight"
    second_bias = "mm_projector.linear_2.bias"
    if not files.tensors.keys() >= {first, first_bias, second, second_bias}:
        return False
    is_float = all(files.dtype(name) in FLOATS for name in (first, first_bias, second))
    if not is_float or len(files.shape(first)) != 2:
        return False
    C, Cv = files.shape(first)
    if C < 2 * Cv or files.shape(first_bias) != (C,) or files.shape(second) != (C, C):
        return False
    want = mirroring_weight(Cv, C)  # (C, Cv)
    # nearly always this row tells
    if not torch.equal(files.rows(first, 0, 1).float(), want[:1]):
        return False
    if not torch.equal(files.rows(first).float(), want) or files.rows(first_bias).any():
        return False
    weight = files.rows(second)  # (C, C)
    is_negated = torch.equal(weight[:, Cv : 2 * Cv], -weight[:, :Cv])
    return is_negated and not weight[:, 2 * Cv :].any()


def hf_form_in(files: WeightFiles, projector_type: str) -> HfForm:
    """The form in which a projector of this type lies in `files`."""
    forms = hf_forms(projector_type)
    is_mirror = is_mirrored(files)
    alike = [form for form in forms if form.is_mirrored == is_mirror]
    return (alike or forms)[0]


def check_constant(name: str, files: WeightFiles, config: QilinConfig, form: HfForm) -> None:
    """ValueError unless a tensor of the layer that the type lacks is what its form says."""
    assert form.constant_weight is not None, "a form with such a layer tells its weight"
    want = form.constant_weight(config.vision.hidden_size, config.text.hidden_size)
    if split_projector_name(name)[1] == "bias":
        want = torch.zeros(len(want))
    if files.shape(name) != want.shape or not torch.equal(files.rows(name).float(), want):
        raise ValueError(
            f"{files.path}: {name} is not as a {config.projector_type} projector with "
            f"projector_hidden_act {form.activation} has it, so this is none"
        )


def parameter_for(name: str, files: WeightFiles, config: QilinConfig, form: HfForm) -> str | None:
    """The parameter that a tensor of `files`, whose projector has this form, fills.

    None: it is what the model holds elsewhere, which is checked; ValueError when it is not.
    """
    if name == HEAD and config.text.tie_word_embeddings:
        if EMBED not in files.tensors:
            # the one copy was saved under the head's name
            return EMBED
        if not is_same_tensor(files, HEAD, EMBED):
            raise ValueError(
                f"{files.path}: tie_word_embeddings is true, but lm_head.weight is not "
                "embed_tokens.weight"
            )
        return None
    if part_of(name) == "mm_projector":
        layer, kind = split_projector_name(name)
        if layer == form.constant_layer:
            check_constant(name, files, config, form)
            return None
        for ours, theirs in form.layers.items():
            if layer == theirs:
                return ".".join(filter(None, ("mm_projector", ours, kind)))
    return name


# of a checkpoint's files those parts that are taken from them
Sources = list[tuple[WeightFiles, set[str]]]


@dataclass
class Place:
    """Where a parameter lies: a tensor of some files, or its first columns."""

    files: WeightFiles
    # its name there
    name: str
    # None: all
    n_columns: int | None = None

    @property
    def entry(self) -> Entry:
        return self.files.tensors[self.name]

    def shape(self) -> tuple[int, ...]:
        shape = self.files.shape(self.name)
        if self.n_columns is None:
            return shape
        return (shape[0], self.n_columns)

    def rows(self, start: int = 0, stop: int | None = None) -> Tensor:
        """Rows start:stop of the parameter, in the file's dtype."""
        rows = self.files.rows(self.name, start, stop)
        return rows if self.n_columns is None else rows[:, : self.n_columns]


def place_of(name: str, files: WeightFiles, config: QilinConfig, form: HfForm) -> Place:
    """The Place of a parameter that the tensor `name` of `files` fills."""
    is_projector_weight = part_of(name) == "mm_projector" and name.endswith(".weight")
    if is_projector_weight and form.is_mirrored:
        return Place(files, name, n_columns=config.vision.hidden_size)
    return Place(files, name)


def wanted_shapes(model: nn.Module, fresh: bool) -> dict[str, tuple[int, ...]]:
    """{parameter: its shape in a file} of all parameters that files must hold."""
    shapes = {}
    for name, param in model.named_parameters():
        part = part_of(name)
        if part == "lora" or (fresh and part == "mm_projector"):
            continue
        shapes[name] = tuple(param.shape)
    for name, layer in layers_that_quantise(model).items():
        shapes[name] = layer.shape
    return shapes


def layers_that_quantise(model: nn.Module) -> dict[str, Any]:
    """{parameter: layer} of those layers that take over floats themselves, to keep fewer bits."""
    return {
        f"{name}.weight": layer
        for name, layer in model.named_modules()
        if hasattr(layer, "quantize_")
    }


def account(model: Qilin, sources: Sources, fresh: bool = False) -> tuple[dict[str, Place], str]:
    """(Where each parameter lies, one line that accounts for all tensors), model on meta or not.

    sources: of each file the parts named are taken, the tensors of other parts are skipped and
    counted. fresh: no file holds the projector.
    ValueError when a tensor is missing, has another shape, or is left over: names up to ten and how
    many more.
    """
    found: dict[str, Place] = {}
    n_skipped = 0
    n_ignored = 0
    for files, parts in sources:
        n_ignored += len(files.ignored)
        check_all_known(files)
        form = hf_form_in(files, model.config.projector_type)
        for name in files.tensors:
            if part_of(name) not in parts:
                n_skipped += 1
                continue
            ours = parameter_for(name, files, model.config, form)
            if ours is None:
                # a constant layer is none of the model's tensors, a second copy of the head is
                n_ignored += 1 if name == HEAD else 0
            elif ours in found:
                entry = files.tensors[name]
                other = found[ours].entry
                raise ValueError(
                    f"{entry.file}: {entry.name} is also in {other.file.name} (as {other.name})"
                )
            else:
                found[ours] = place_of(name, files, model.config, form)
    check_places(found, wanted_shapes(model, fresh), sources)
    line = (
        f"{len(found)} tensors loaded, {n_skipped} skipped (part given elsewhere), "
        f"{n_ignored} ignorable, none missing, none left over"
    )
    if fresh:
        line += ", fresh projector"
    return found, line


def check_places(
    found: dict[str, Place], wanted: dict[str, tuple[int, ...]], sources: Sources
) -> None:
    """ValueError unless what was found is what is wanted, in its shape, and floats."""
    where = ", ".join(str(files.path) for files, _ in sources)
    missing = wanted.keys() - found.keys()
    if missing:
        raise ValueError(f"{where}: missing {named_list(missing)}")
    left_over = found.keys() - wanted.keys()
    if left_over:
        names = named_list(left_over)
        raise ValueError(f"{where}: tensors that this model has no place for: {names}")
    for name, place in found.items():
        if place.shape() != wanted[name]:
            raise ValueError(
                f"{place.files.path}: {name} is {place.shape()} in the file, {wanted[name]} by the "
                "config"
            )
        dtype = place.files.dtype(place.name)
        if dtype not in FLOATS:
            raise ValueError(f"{place.entry.file}: {place.entry.name} holds {dtype}")


# --- 5c. filling: a model on the meta device gets memory, each rank its rows


def is_finite(tensor: Tensor) -> bool:
    # one pass, nothing allocated; aminmax passes nan on
    return all(bool(extreme.isfinite()) for extreme in torch.aminmax(tensor))


def flaw_of(rows: Tensor, is_whole: bool) -> str | None:
    """What is wrong with a weight, or with a rank's rows of it, as far as a look tells; None:
    nothing.

    Of a large tensor a sample is looked at, since what is mapped need not be read yet; generate()
    and convert.py find the rest.
    """
    if rows.numel() > 65536 and rows.is_contiguous():
        sample = rows.flatten()[:: 1 + rows.numel() // 4096]
    else:
        sample = rows
    if not is_finite(sample):
        return "values that are not finite"
    # no training ends in a matrix of zeros, but a download does whose file had its size at once;
    # some of its rows may well be zeros, as those that fill a vocabulary up
    if is_whole and rows.ndim > 1 and not sample.any() and not rows.any():
        return "only zeros (an interrupted download?): fetch the file again"
    return None


@torch.no_grad()
def check_finite(model: nn.Module, dtype: torch.dtype | None = None) -> None:
    """ValueError that names the parameters holding inf or nan, or that would in `dtype`."""
    names = []
    for name, param in model.named_parameters():
        if param.is_floating_point() and not is_finite(param.to(dtype or param.dtype)):
            names.append(name)
    if names:
        reason = f", or too large for {dtype}" if dtype else ""
        raise ValueError(
            f"values that are not finite in {named_list(names)}: the weights are damaged{reason}"
        )


def is_sharded(tensor: Any) -> bool:
    """Whether FSDP has cut it into rows, of which each rank holds some."""
    return hasattr(tensor, "to_local")


def local_part(param: Any) -> Tensor:
    """What this rank holds of a parameter, sharded or not."""
    return param.to_local() if is_sharded(param) else param


def local_rows(param: Any) -> tuple[int, int]:
    """(start, stop): the rows of a parameter that this rank holds.

    Sharded on dim 0 as torch.chunk cuts, so the last ranks may hold fewer or none.
    """
    n_rows = param.shape[0]
    if not is_sharded(param):
        return 0, n_rows
    # the last dimension shards, one before it replicates
    mesh = param.device_mesh
    n_ranks = mesh.size(mesh.ndim - 1)
    rank = mesh.get_local_rank(mesh.ndim - 1)
    chunk = -(-n_rows // n_ranks)
    return min(rank * chunk, n_rows), min((rank + 1) * chunk, n_rows)


def give_memory(model: nn.Module, device: str | torch.device) -> None:
    """Memory on `device`, not yet filled, for a model on the meta device."""

    def empty(tensor: Tensor) -> Tensor:
        if is_sharded(tensor):
            return torch.empty_like(tensor, device=device)
        return torch.empty(tensor.shape, dtype=tensor.dtype, device=device)

    # what Module.to_empty does, which would give a plain tensor its empty_like as well: that makes
    # torch import for half a second. _apply is private, but reaches what FSDP holds beside
    model._apply(empty)


def put_rows(rows: Tensor, param: nn.Parameter) -> None:
    """Fill what this rank holds of a parameter."""
    is_as_stored = rows.dtype == param.dtype and rows.device == param.device
    if is_as_stored and rows.is_contiguous() and not is_sharded(param):
        # no copy: the parameter is the file, mapped into memory; writing to it changes pages of our
        # own
        param.data = rows
    else:
        local_part(param).copy_(rows)


@torch.no_grad()
def fill_weights(
    model: Qilin, sources: Sources, device: str | torch.device, fresh: bool = False
) -> str:
    """Give a model on the meta device (sharded or not, any dtype) memory, and fill its parameters.

    -> the line of account(), whose errors come before any memory is taken.
    ValueError as well when a tensor holds no finite floats, and when a matrix is all zeros.
    fresh: no file holds the projector, which the caller fills.
    """
    found, line = account(model, sources, fresh)
    quantised = layers_that_quantise(model)
    give_memory(model, device)
    for name, place in found.items():
        param = model.get_parameter(name)
        entry = place.entry
        if name in quantised and quantised[name].take_over(entry):
            continue
        if name in quantised:
            # whole on every rank, and of another shape than in the file
            rows = place.rows()
        else:
            start, stop = local_rows(param)
            if start == stop:
                continue
            rows = place.rows(start, stop)
        flaw = flaw_of(rows, is_whole=len(rows) == place.shape()[0])
        if flaw is not None:
            raise ValueError(f"{entry.file}: {entry.name} holds {flaw}")
        if name in quantised:
            quantised[name].quantize_(rows)
        else:
            put_rows(rows, param)
    return line


# --- 5d. a llava-hf folder


def folder_config(path: str | Path) -> tuple[dict, Path]:
    """(config.json, its path) of a model's folder, or of the folder that a weight file lies in."""
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"no such folder or file: {path}")
    file = (path if path.is_dir() else path.parent) / "config.json"
    if not file.is_file():
        raise FileNotFoundError(f"no config.json in {file.parent}: it tells the sizes of the model")
    raw = _read_json(file)
    if not isinstance(raw, dict):
        raise ValueError(f"{file}: not a JSON object")
    return raw, file


def check_llava(raw: dict, where: Path) -> None:
    """ValueError unless config.json asks for what is implemented between the two halves."""
    activations = set()
    for kind, row in PROJECTORS.items():
        activations |= {activation_word(kind, form) for form in row.hf_forms}
    implemented = {
        "model_type": ("llava", "llava_llama", "llama"),
        "vision_feature_select_strategy": ("default",),
        "mm_vision_select_feature": ("patch",),
        "projector_hidden_act": sorted(activations),
        "multimodal_projector_bias": (True,),
        "mm_use_im_start_end": (False,),
        "image_aspect_ratio": ("pad", "square", "crop"),
        "mm_patch_merge_type": ("flat",),
        # of later LLaVAs: fewer features a picture; pictures at several sizes
        "mm_resampler_type": ("identity",),
        "s2": (False,),
    }
    for key, allowed in implemented.items():
        if raw.get(key) not in (None, *allowed):
            choices = " or ".join(map(str, allowed))
            raise ValueError(
                f"{where}: {key} = {raw[key]!r} is not implemented here (only {choices})"
            )


def inner_config(raw: dict, where: Path) -> Any:
    """The language model's half of a config.json, or all of it where it is not nested.

    Inside counts, as in transformers. ValueError where its versions differ: a head that is tied
    outside alone is tied to 5, and not to 4.
    """
    inner = raw.get("text_config", raw)
    if not isinstance(inner, dict):
        return inner
    if raw.get("tie_word_embeddings") and not inner.get("tie_word_embeddings"):
        raise ValueError(
            f"{where}: tie_word_embeddings is true, but not inside text_config, which transformers "
            "4 and 5 decide differently: say the same in both places"
        )
    return inner


def feature_layer(raw: dict, where: Path | None, tower: VisionConfig) -> int:
    """Which block of the tower gives the features. ValueError for several, and for none of its."""
    layer = raw.get("vision_feature_layer", raw.get("mm_vision_select_layer", -2))
    if isinstance(layer, list) and len(layer) == 1:
        # transformers joins the features of a list's layers: of one there is nothing to join
        layer = layer[0]
    n_layers = tower.num_hidden_layers
    if type(layer) is not int or not -n_layers - 1 <= layer <= n_layers:
        raise ValueError(f"{where}: vision_feature_layer = {layer!r} is not a layer of this tower")
    return layer


def count_token_ids(raw: dict, vocab_size: int) -> int:
    """How many ids are a tokenizer's, by an export without one: the picture token follows them."""
    picture_id = raw.get("image_token_index", raw.get("image_token_id"))
    if type(picture_id) is int and picture_id > 0:
        return min(vocab_size, picture_id)
    return vocab_size


def square_mode(raw: dict) -> str:
    """How this model's pictures become square by its config.json: QilinConfig.image_mode.

    A LLaVA that does not say pad takes what CLIP's own processor gives, which crops. A language
    model that is to become one pads.
    """
    is_llava = bool(raw.keys() & {"vision_config", "mm_vision_tower"})
    word = raw.get("image_aspect_ratio") or ("square" if is_llava else "pad")
    return "pad" if word == "pad" else "crop"


def activation_word(projector_type: str, form: HfForm) -> str:
    """projector_hidden_act of config.json for a type that lies in this form."""
    return form.activation or projector_type


def projector_misfit(
    projector_type: str, form: HfForm, layers: Collection[str], word: str | None
) -> tuple[int, int, bool]:
    """How badly a projector's layers fit a type that lies in a form: the least is what it is.

    Layers the type has no place for; its own that are not there; another word in config.json (where
    that says nothing, a second layer is taken for a layer, not for an identity).
    """
    with torch.device("meta"):
        parameters = dict(PROJECTORS[projector_type].build(1, 1).named_parameters())
    own = {split_projector_name(name)[0] for name in parameters}
    ours = {theirs: ours for ours, theirs in form.layers.items()}
    filled = {ours.get(layer, layer) for layer in layers if layer != form.constant_layer}
    if word is None:
        is_other = form.constant_layer in layers and not form.is_mirrored
    else:
        is_other = word != activation_word(projector_type, form)
    return len(filled - own), len(own - filled), is_other


def projector_type_of(files: WeightFiles, raw: dict, hint: str | None = None) -> str:
    """The row of PROJECTORS that the projector's tensors in `files` fit best.

    raw: the config.json beside them, or {}. hint: the type to take where they fit several alike.
    ValueError for a mirrored one under an activation that does not undo the mirroring.
    """
    names = [name for name in files.tensors if part_of(name) == "mm_projector"]
    layers = {split_projector_name(name)[0] for name in names}
    word = raw.get("projector_hidden_act")
    is_mirror = is_mirrored(files)
    choices = []
    for kind in PROJECTORS:
        choices += [(kind, form) for form in hf_forms(kind) if form.is_mirrored == is_mirror]

    def misfit(choice: tuple[str, HfForm]) -> tuple[int, int, bool, bool]:
        kind, form = choice
        return *projector_misfit(kind, form, layers, word), kind != hint

    kind, form = min(choices, key=misfit)
    if is_mirror and word not in (None, form.activation):
        raise ValueError(
            f"{files.path}: its linear_1 is made of I and -I, which goes with "
            f"projector_hidden_act {form.activation}, but config.json says {word}"
        )
    return kind


def load_llava_hf(
    path: str | Path,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
) -> Qilin:
    """A Qilin in eval mode from a llava-hf folder: config.json, safetensors in one file or shards.

    ValueError or FileNotFoundError says which file or tensor is wrong. Every other layout, and the
    files of a picture processor beside config.json: model_io.load_qilin.
    """
    folder = Path(path)
    raw, where = folder_config(folder)
    if "text_config" not in raw or "vision_config" not in raw:
        raise ValueError(f"{where}: no text_config and vision_config: load_qilin opens it")
    sets = [place for place in weight_sets(folder) if ".safetensors" in place.name]
    if not sets:
        raise FileNotFoundError(f"{folder}: neither model.safetensors nor an index of shards")
    if len(sets) > 1:
        names = " and ".join(place.name for place in sets)
        raise ValueError(f"{folder}: {names} are two sets of weights: load_qilin says which counts")
    files = WeightFiles(folder, shards_of(sets[0]))

    text = text_config(inner_config(raw, where), where)
    tower = vision_config(raw, where)
    tower.select_layer = feature_layer(raw, where, tower)
    check_llava(raw, where)
    config = QilinConfig(
        text=text,
        vision=tower,
        projector_type=projector_type_of(files, raw),
        n_token_ids=count_token_ids(raw, text.vocab_size),
        image_mode=square_mode(raw),
    )
    with torch.device("meta"):
        model = Qilin(config).to(dtype)
    fill_weights(model, [(files, set(PARTS))], device)
    return model.eval()


# --- 6. generation --------------------------------------------------------------------------------
# in: prompts of different lengths
# out: one new id a row a step, until every row has said its end id


def pad_rows(rows: list[list[int]], value: int) -> Tensor:
    """int64 (B, T) from lists of int of different lengths, padded on the right with `value`."""
    length = max(map(len, rows))
    padded = [row + [value] * (length - len(row)) for row in rows]
    return torch.tensor(padded, dtype=torch.int64)  # (B, T)


def sample_next_token(
    logits: Tensor,
    seen: Tensor | None,
    temperature: float = 0.0,
    top_p: float = 1.0,
    top_k: int = 0,
    repetition_penalty: float = 1.0,
    generator: torch.Generator | None = None,
) -> Tensor:
    """int64 (B,) from logits float32 (B, V). temperature 0: the likeliest.

    seen bool (B, V): ids that repetition_penalty makes less likely (divides positive logits,
    multiplies negative ones: CTRL, arXiv 1909.05858). top_k, then top_p, cut the tail before
    drawing.
    """
    if repetition_penalty != 1.0:
        assert seen is not None, "a penalty needs to know what was said"
        is_positive = logits > 0
        penalised = torch.where(
            is_positive, logits / repetition_penalty, logits * repetition_penalty
        )
        logits = torch.where(seen, penalised, logits)
    # logits divided by less leave the range of float32
    if temperature < 1e-4:
        return logits.argmax(-1)
    logits = logits / temperature
    if top_k:
        largest = logits.topk(min(top_k, logits.shape[-1])).values  # (B, top_k)
        logits = logits.masked_fill(logits < largest[:, -1:], -torch.inf)
    if top_p < 1.0:
        ranked, order = logits.sort(descending=True)
        probs = ranked.softmax(-1)
        # keeps the one that reaches top_p
        ranked = ranked.masked_fill(probs.cumsum(-1) - probs >= top_p, -torch.inf)
        logits = torch.full_like(logits, -torch.inf).scatter(1, order, ranked)
    return torch.multinomial(logits.softmax(-1), 1, generator=generator)[:, 0]


def new_cache(config: TextConfig, prompts: list[list[int]], max_new_tokens: int) -> KVCache:
    """A cache for these prompts and their answers, no longer than the model has positions."""
    longest = max(map(len, prompts))
    return KVCache(
        config.num_hidden_layers, min(longest + max_new_tokens, config.max_position_embeddings)
    )


def check_room(config: TextConfig, prompts: list[list[int]]) -> None:
    """ValueError when a prompt leaves no position for an answer."""
    longest = max(map(len, prompts))
    if longest >= config.max_position_embeddings:
        raise ValueError(
            f"the prompt has {longest} tokens, the model's positions end at "
            f"{config.max_position_embeddings}: ask a shorter question"
        )


def not_yet_held(prompts: list[list[int]], cache: KVCache) -> list[list[int]]:
    """What of each prompt the cache does not hold yet. ValueError when there is nothing left."""
    held = [0] * len(prompts)
    if cache.lengths is not None:
        held = cache.lengths.tolist()
    rest = [prompt[n:] for prompt, n in zip(prompts, held, strict=True)]
    if not all(rest) or max(map(len, prompts)) > cache.max_length:
        raise ValueError(
            "a prompt is empty, or the cache holds all of it, or it is longer than the cache"
        )
    return rest


def mark_seen(prompts: list[list[int]], vocab_size: int, device: torch.device) -> Tensor:
    """bool (B, V): which ids stand in each prompt; picture positions are none."""
    seen = torch.zeros(len(prompts), vocab_size, dtype=torch.bool, device=device)
    for row, prompt in zip(seen, prompts, strict=True):
        ids = [i for i in set(prompt) if i >= 0]
        row[ids] = True
    return seen


def check_logits(logits: Tensor, model: Qilin) -> None:
    """ValueError that says what is not finite, where something is: a drawn token would hide it."""
    if not is_finite(logits):
        check_finite(model)
        raise ValueError(
            "the model's logits are not finite, though its weights are: try another dtype"
        )


def ended_rows(
    ended: list[bool], new: list[int | None], end_ids: list[int], lengths: list[int], limit: int
) -> list[bool]:
    """Of each row: had it ended, does its new id end it, or is it as long as it can be?"""
    return [
        end or i in end_ids or length >= limit
        for end, i, length in zip(ended, new, lengths, strict=True)
    ]


@torch.no_grad()
def generate(
    model: Qilin,
    input_ids: list[list[int]],
    pixel_values: Tensor | None = None,
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_p: float = 1.0,
    top_k: int = 0,
    repetition_penalty: float = 1.0,
    seed: int | None = None,
    stop: Callable[[list[bool]], bool] = all,
    cache: KVCache | None = None,
) -> Iterator[list[int | None]]:
    """Yield one list of B new ids a step for B prompts, lists of int, and pictures (M, 3, H, W).

    A row's end id is yielded, after that None. Rows of different lengths answer as each would
    alone. Ids past the tokenizer never come.
    stop: asked before each step with one bool a row (has it ended?); on a sharded model it must
    agree over ranks, since each step is a collective. A row ends as well after max_new_tokens or at
    the model's last position. ValueError when a prompt is empty or already fills the positions.
    cache: a KVCache of an earlier call that holds the beginning of each prompt, which is then not
    computed again; pictures are those of the rest.
    """
    config = model.config
    device = next(model.parameters()).device
    check_room(config.text, input_ids)
    if cache is None:
        cache = new_cache(config.text, input_ids, max_new_tokens)
    limit = min(config.text.max_position_embeddings, cache.max_length)
    rest = not_yet_held(input_ids, cache)
    lengths = torch.tensor([len(row) for row in rest], device=device)
    ids = pad_rows(rest, 0).to(device)
    seen = mark_seen(input_ids, config.text.vocab_size, device)
    generator = None
    if seed is not None:
        generator = torch.Generator(device).manual_seed(seed)
    if pixel_values is not None:
        pixel_values = pixel_values.to(device)

    logits = model(ids, pixel_values, cache=cache, lengths=lengths)  # prefill: (B, V)
    check_logits(logits, model)
    ended = [False] * len(input_ids)
    going_on = torch.ones_like(lengths)
    for step in range(max_new_tokens):
        logits[:, config.n_token_ids :] = -torch.inf
        ids = sample_next_token(
            logits, seen, temperature, top_p, top_k, repetition_penalty, generator
        )  # (B,)
        seen.scatter_(1, ids[:, None], True)
        new = [None if end else i for end, i in zip(ended, ids.tolist(), strict=True)]
        yield new
        lengths = [len(prompt) + step + 1 for prompt in input_ids]
        had_ended = ended
        ended = ended_rows(had_ended, new, config.end_ids, lengths, limit)
        if stop(ended) or step == max_new_tokens - 1:
            return
        if ended != had_ended:
            going_on = torch.tensor([int(not end) for end in ended], device=device)
        logits = model.decode(ids, cache, going_on)  # one token a row: (B, V)


def answer_ids(
    model: Qilin, input_ids: list[list[int]], pixel_values: Tensor | None = None, **options: Any
) -> list[list[int]]:
    """The whole answers, end ids left out: a list of int for each prompt.

    Options as for generate().
    """
    answers: list[list[int]] = [[] for _ in input_ids]
    for new in generate(model, input_ids, pixel_values, **options):
        for answer, i in zip(answers, new, strict=True):
            if i is not None and i not in model.config.end_ids:
                answer.append(i)
    return answers
