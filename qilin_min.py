"""qilin-min: Qilin-Med-VL (arXiv 2310.17956) from scratch in PyTorch: CLIP ViT -> projector -> LLaMA-2, and what carries data in and out.

Read from top to bottom. Sections 2 to 4, some 310 lines, are the model; the rest carries data in and out of it:

    1. constants and configuration        config.json of a checkpoint -> QilinConfig
    2. LLaMA-2 decoder                    RMSNorm, RoPE, attention (GQA, KV cache), SwiGLU
    3. CLIP vision tower                  pixels -> features of the last block but one
    4. Qilin                              picture features among the words; loss; logits
    5. weights                            files of any layout -> every tensor accounted for -> the model
    6. generation                         prompts -> answers, token by token

Shapes:  B batch, T tokens (each picture already expanded to its N positions), M pictures in the batch, N patches a picture
(576 = 24 x 24), C text width, Cv vision width, H heads, D head size, V vocabulary, L layers.
Module attributes are the names in published checkpoints, so that loading is nearly the identity.
"""

import math
import re
import zipfile
from dataclasses import dataclass, field, fields
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors import safe_open
from torch.utils.checkpoint import checkpoint

from common.files import one_line, read_json

# --- 1. constants and configuration ---------------------------------------------------------------------------------
# in: config.json in the spelling of any release; out: QilinConfig, whose field names are those of config.json

IMAGE_TOKEN = "<image>"  # in a conversation: here stands a picture
IMAGE_TOKEN_INDEX = (
    -200
)  # in input_ids: one patch of a picture; out of range on purpose, it must never reach embed_tokens
IGNORE_INDEX = -100  # in labels: this position teaches nothing


@dataclass
class TextConfig:
    """Sizes of the LLaMA decoder. Defaults are those of transformers' LlamaConfig, since a config.json may omit what equals them."""

    vocab_size: int = 32000
    hidden_size: int = 4096
    intermediate_size: int = 11008
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int = (
        0  # 0: as many as num_attention_heads; fewer is grouped-query attention
    )
    head_dim: int = 0  # 0: hidden_size / num_attention_heads
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    max_position_embeddings: int = 2048
    tie_word_embeddings: bool = False  # True: the output head is embed_tokens
    bos_token_id: int = 1
    eos_token_id: int = 2  # a list in some config.json: the first is here,
    more_end_ids: tuple = ()  # the others here, and the tokenizer's where it differs; any of them ends an answer

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
    select_layer: int = -2  # config.json: vision_feature_layer or mm_vision_select_layer


@dataclass
class QilinConfig:
    text: TextConfig = field(default_factory=TextConfig)
    vision: VisionConfig = field(default_factory=VisionConfig)
    projector_type: str = "linear"  # "linear" (paper) | "mlp2x_gelu" (released weights)
    n_token_ids: int = 0  # ids below this are the tokenizer's and may be generated
    image_mode: str = "pad"  # how a picture becomes square: preprocess_image's mode

    @property
    def end_ids(self):
        return [self.text.eos_token_id, *self.text.more_end_ids]

    @property
    def n_image_tokens(self):
        return (self.vision.image_size // self.vision.patch_size) ** 2


def _fields_from(cls, raw, where, fixed):
    """An instance of dataclass `cls` from a config.json dict; `fixed` lists the only values we implement for what we do not read."""
    if not isinstance(raw, dict):
        raise ValueError(f"{where}: not an object with the sizes of a model")
    for key, allowed in fixed.items():
        if raw.get(key) not in (None, *allowed):
            raise ValueError(
                f"{where}: {key} = {raw[key]!r} is not implemented here (only {', '.join(map(repr, allowed))})"
            )
    found = {f.name: raw[f.name] for f in fields(cls) if raw.get(f.name) is not None}
    for name, value in found.items():
        kind = type(getattr(cls, name))
        is_number, most = kind in (int, float), 1000 if name == "num_hidden_layers" else 1e9
        if not isinstance(value, (float, int) if kind is float else kind) or (
            is_number
            and (
                isinstance(value, bool)
                or not 0 <= value < most
                or (value == 0 and "_id" not in name)
            )
        ):
            raise ValueError(
                f"{where}: {name} = {value!r} is not {'a positive number' if is_number else f'a {kind.__name__}'}"
            )
    config = cls(**found)
    if config.hidden_size % config.num_attention_heads and "head_dim" not in found:
        raise ValueError(
            f"{where}: hidden_size {config.hidden_size} cannot be cut into {config.num_attention_heads} heads"
        )
    return config


def text_config(raw, where):
    """TextConfig from the dict of a LLaMA config.json. ValueError names what we do not implement (RoPE scaling, other model types)."""
    if not isinstance(raw, dict) or not all(
        isinstance(raw.get(key) or {}, dict) for key in ("rope_parameters", "rope_scaling")
    ):
        raise ValueError(f"{where}: not an object with the sizes of a language model")
    rope = (
        raw.get("rope_parameters") or {}
    )  # transformers 5 nests what older files spell rope_theta, rope_scaling
    scaling = raw.get("rope_scaling") or {}
    for kind in [
        d[key]
        for d in (rope, scaling)
        for key in ("rope_type", "type")
        if d.get(key) not in (None, "default")
    ]:
        raise ValueError(
            f"{where}: RoPE scaling of type {kind!r} is not implemented; answers would be silently wrong"
        )
    raw = dict(raw, **({"rope_theta": rope["rope_theta"]} if "rope_theta" in rope else {}))
    first, *more = (
        raw["eos_token_id"]
        if isinstance(raw.get("eos_token_id"), list) and raw["eos_token_id"]
        else [raw.get("eos_token_id")]
    )
    if not all(type(i) is int and i >= 0 for i in more):
        raise ValueError(f"{where}: eos_token_id = {raw['eos_token_id']!r} is no list of ids")
    raw = dict(raw, eos_token_id=first, more_end_ids=tuple(more))
    fixed = {
        "model_type": ["llama", "llava", "llava_llama"],
        "hidden_act": ["silu"],
        "attention_bias": [False],
        "mlp_bias": [False],
    }
    config = _fields_from(TextConfig, raw, where, fixed)
    if config.num_attention_heads % config.num_key_value_heads or config.head_dim % 2:
        raise ValueError(
            f"{where}: {config.num_attention_heads} heads of {config.head_dim} cannot share {config.num_key_value_heads} key-value heads, or cannot be rotated in pairs"
        )
    return config


def vision_config(raw, where):
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


# --- 2. LLaMA-2 decoder ---------------------------------------------------------------------------------------------
# in: embeddings (B, T, C); out: hidden states (B, T, C). Source: arXiv 2307.09288; the layout of weights is Hugging Face's


class RMSNorm(nn.Module):
    """x / rms(x) * weight, the mean of squares taken in float32."""

    def __init__(self, size, eps):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x):
        x32 = x.float()
        x32 = x32 * torch.rsqrt(x32.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * x32.to(x.dtype)


def rotary_cos_sin(position_ids, head_dim, theta):
    """cos and sin of RoPE's angles, float32 (B, 1, T, D), for int64 positions (B, T).

    A function and not a buffer: a buffer would be cast with the weights (the released code rounds inv_freq to bf16)
    and is garbage after meta-device construction. Source: RoFormer, arXiv 2104.09864, section 3.4.2, half-rotation layout.
    """
    inv_freq = 1.0 / theta ** (
        torch.arange(0, head_dim, 2, dtype=torch.float32, device=position_ids.device) / head_dim
    )  # (D/2,)
    angles = position_ids[:, None, :, None].float() * inv_freq  # (B, 1, T, D/2)
    angles = torch.cat((angles, angles), dim=-1)  # (B, 1, T, D)
    return angles.cos(), angles.sin()


def apply_rotary_pos_emb(x, cos, sin):
    """x (B, H, T, D) rotated by its position: element i is paired with element i + D/2."""
    x1, x2 = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-x2, x1), dim=-1) * sin


class KVCache:
    """Keys and values of all positions seen, so that a new token costs one position.

    k, v (L, B, H_kv, T_max, D), allocated at the first update in that tensor's dtype. lengths int64 (B,): real tokens held, row by row, so that
    rows of different lengths sit in one batch without left padding: a row's next token overwrites the padding behind its last.
    n_positions: an upper bound of lengths, a Python int (no device sync).
    """

    def __init__(self, n_layers, max_length):
        self.n_layers, self.max_length = n_layers, max_length
        self.k = self.v = self.lengths = None
        self.n_positions = 0

    def update(self, layer, k, v, position_ids):
        """Store k, v (B, H_kv, T, D) at position_ids (B, T); -> all keys and values so far (B, H_kv, n_positions, D)."""
        if self.k is None:
            shape = (self.n_layers, k.shape[0], k.shape[1], self.max_length, k.shape[3])
            self.k, self.v = k.new_zeros(shape), v.new_zeros(shape)
        rows = torch.arange(k.shape[0], device=k.device)[:, None]  # (B, 1)
        self.k[layer][rows, :, position_ids] = k.transpose(
            1, 2
        )  # two indices around a slice select (B, T, H_kv, D)
        self.v[layer][rows, :, position_ids] = v.transpose(1, 2)
        return self.k[layer][:, :, : self.n_positions], self.v[layer][:, :, : self.n_positions]

    def truncate(self, lengths):
        """Forget all but the first lengths int64 (B,) tokens of each row: what comes next overwrites the rest."""
        self.lengths, self.n_positions = lengths, int(lengths.max())


class LlamaAttention(nn.Module):
    def __init__(self, config, layer):
        super().__init__()
        self.layer, self.head_dim = layer, config.head_dim
        self.is_grouped = config.num_key_value_heads != config.num_attention_heads
        self.q_proj = nn.Linear(
            config.hidden_size, config.num_attention_heads * config.head_dim, bias=False
        )
        self.k_proj = nn.Linear(
            config.hidden_size, config.num_key_value_heads * config.head_dim, bias=False
        )
        self.v_proj = nn.Linear(
            config.hidden_size, config.num_key_value_heads * config.head_dim, bias=False
        )
        self.o_proj = nn.Linear(
            config.num_attention_heads * config.head_dim, config.hidden_size, bias=False
        )

    def forward(self, x, rope, cache=None, position_ids=None, mask=None):
        B, T, _ = x.shape
        q, k, v = (
            proj(x).view(B, T, -1, self.head_dim).transpose(1, 2)
            for proj in (self.q_proj, self.k_proj, self.v_proj)
        )  # (B, H or H_kv, T, D)
        q, k = apply_rotary_pos_emb(q, *rope), apply_rotary_pos_emb(k, *rope)
        if cache is not None:
            k, v = cache.update(self.layer, k, v, position_ids)  # (B, H_kv, n_positions, D)
        y = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=self.is_grouped
        )  # (B, H, T, D)
        return self.o_proj(y.transpose(1, 2).reshape(B, T, -1))  # (B, T, C)


class LlamaMLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class LlamaDecoderLayer(nn.Module):
    def __init__(self, config, layer):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = LlamaAttention(config, layer)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = LlamaMLP(config)

    def forward(self, x, rope, cache=None, position_ids=None, mask=None):
        x = x + self.self_attn(self.input_layernorm(x), rope, cache, position_ids, mask)
        return x + self.mlp(self.post_attention_layernorm(x))


def build_embedding(n, size):
    """nn.Embedding, its rows drawn uniform with nn.Embedding's own variance of 1: the normal draw alone makes torch import for a second on the meta device."""
    return nn.Embedding(n, size, _weight=torch.empty(n, size).uniform_(-(3**0.5), 3**0.5))


class LlamaModel(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.embed_tokens = build_embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(
            LlamaDecoderLayer(config, i) for i in range(config.num_hidden_layers)
        )
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.n_checkpointed = 0  # how many layers, from the first, recompute their inside in backward instead of keeping it

    def forward(self, x, cache=None):
        """x float (B, T, C) -> normed hidden states (B, T, C).

        Attention is causal and rows are padded on the right, so that no real token ever sees padding and no mask is needed
        (the flash kernel takes is_causal alone). With a cache that holds earlier tokens, a mask bool (B, 1, T, n_positions) replaces it.
        """
        B, T, _ = x.shape
        position_ids = torch.arange(T, device=x.device)[None]  # (1, T)
        mask = None
        if cache is not None:
            cache.n_positions = min(cache.n_positions + T, cache.max_length)
            if cache.lengths is None:  # the first pass
                cache.lengths = torch.zeros(B, dtype=torch.int64, device=x.device)
            else:
                position_ids = (cache.lengths[:, None] + position_ids).clamp(
                    max=cache.max_length - 1
                )  # (B, T): a row that has ended may be full
                mask = (
                    torch.arange(cache.n_positions, device=x.device)
                    <= position_ids[:, None, :, None]
                )  # (B, 1, T, n_positions)
        rope = tuple(
            t.to(x.dtype)
            for t in rotary_cos_sin(position_ids, self.config.head_dim, self.config.rope_theta)
        )  # only the finished cos and sin are rounded
        for i, layer in enumerate(self.layers):
            if i < self.n_checkpointed and torch.is_grad_enabled() and cache is None:
                x = checkpoint(
                    layer, x, rope, use_reentrant=False, preserve_rng_state=False
                )  # nothing here draws
            else:
                x = layer(x, rope, cache, position_ids, mask)
        return self.norm(x)


# --- 3. CLIP vision tower -------------------------------------------------------------------------------------------
# in: pixels (M, 3, H, W); out: features (M, N, Cv). Source: arXiv 2103.00020; attribute names as in the files, the misspelt one too


class CLIPVisionEmbeddings(nn.Module):
    def __init__(self, config):
        super().__init__()
        n_positions = (config.image_size // config.patch_size) ** 2 + 1
        self.class_embedding = nn.Parameter(torch.zeros(config.hidden_size))
        self.patch_embedding = nn.Conv2d(
            3, config.hidden_size, config.patch_size, stride=config.patch_size, bias=False
        )
        self.position_embedding = build_embedding(n_positions, config.hidden_size)

    def forward(self, pixel_values):
        x = self.patch_embedding(
            pixel_values.to(self.patch_embedding.weight.dtype)
        )  # (M, Cv, h, w)
        x = x.flatten(2).transpose(1, 2)  # (M, N, Cv)
        cls = self.class_embedding.expand(x.shape[0], 1, -1)  # (M, 1, Cv)
        return torch.cat((cls, x), dim=1) + self.position_embedding.weight  # (M, N + 1, Cv)


class CLIPAttention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.n_heads = config.num_attention_heads
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (
            nn.Linear(config.hidden_size, config.hidden_size) for _ in range(4)
        )

    def forward(self, x):
        M, T, Cv = x.shape
        q, k, v = (
            proj(x).view(M, T, self.n_heads, -1).transpose(1, 2)
            for proj in (self.q_proj, self.k_proj, self.v_proj)
        )  # (M, H, T, D)
        y = F.scaled_dot_product_attention(q, k, v)  # (M, H, T, D)
        return self.out_proj(y.transpose(1, 2).reshape(M, T, Cv))  # (M, T, Cv)


class CLIPMLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.is_quick = config.hidden_act == "quick_gelu"
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x):
        x = self.fc1(x)
        return self.fc2(x * torch.sigmoid(1.702 * x) if self.is_quick else F.gelu(x))


class CLIPEncoderLayer(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.layer_norm1 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.self_attn = CLIPAttention(config)
        self.layer_norm2 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = CLIPMLP(config)

    def forward(self, x):
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp(self.layer_norm2(x))


class CLIPEncoder(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.layers = nn.ModuleList(
            CLIPEncoderLayer(config) for _ in range(config.num_hidden_layers)
        )


class CLIPVisionTower(nn.Module):
    """CLIP's image half. Layers past select_layer and post_layernorm are held, since an export must hold them, but never computed."""

    def __init__(self, config):
        super().__init__()
        self.embeddings = CLIPVisionEmbeddings(config)
        self.pre_layrnorm = nn.LayerNorm(
            config.hidden_size, eps=config.layer_norm_eps
        )  # sic: the name in every checkpoint
        self.encoder = CLIPEncoder(config)
        self.post_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        # hidden_states[i] is the output of block i (0: of the embeddings); -2 of 24 blocks means blocks 1 to 23
        self.n_computed = (
            config.select_layer
            if config.select_layer >= 0
            else config.num_hidden_layers + 1 + config.select_layer
        )

    def forward(self, pixel_values):
        """pixel_values float (M, 3, H, W) normalised -> features (M, N, Cv): the class token is dropped."""
        x = self.pre_layrnorm(self.embeddings(pixel_values))  # (M, N + 1, Cv)
        for layer in self.encoder.layers[: self.n_computed]:
            x = layer(x)
        return x[:, 1:]  # (M, N, Cv)


# --- 4. Qilin -------------------------------------------------------------------------------------------------------
# in: input_ids (B, T) with IMAGE_TOKEN_INDEX at picture positions, pixels (M, 3, H, W); out: logits (B, T, V) or the loss

LOSS_CHUNK = (
    1024  # labelled positions whose logits exist at one time: 1024 x 55296 x 4 bytes = 216 MiB
)


def build_projector(projector_type, vision_size, text_size):
    """The adapter of paper section 4.1: one linear layer, or the released weights' Linear, exact GELU, Linear."""
    if projector_type == "linear":
        return nn.Linear(vision_size, text_size)
    if projector_type == "mlp2x_gelu":
        return nn.Sequential(
            nn.Linear(vision_size, text_size), nn.GELU(), nn.Linear(text_size, text_size)
        )
    raise ValueError(f"projector_type {projector_type!r} is unknown: linear or mlp2x_gelu")


def splice_image_embeds(token_embeds, image_embeds, image_mask):
    """Token embeddings with every picture position replaced by its patch embedding, in one step.

    token_embeds (B, T, C), image_embeds (M, N, C) in reading order, image_mask bool (B, T) -> (B, T, C).
    ValueError when image_mask marks other than M * N positions: one picture too many would shift all that follow.
    Source: LLaVA, arXiv 2304.08485, section 4.1.
    """
    n_places, n_patches = int(image_mask.sum()), image_embeds.shape[0] * image_embeds.shape[1]
    if n_places != n_patches:
        raise ValueError(
            f"input_ids hold {n_places} picture positions, but the pictures give {image_embeds.shape[0]} x {image_embeds.shape[1]} patches"
        )
    return token_embeds.masked_scatter(
        image_mask[..., None], image_embeds.to(token_embeds.dtype)
    )  # (B, T, C)


class Qilin(nn.Module):
    """vision_tower -> mm_projector -> model (LLaMA) -> lm_head. The tower is never trained (paper, section 4.2)."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.vision_tower = CLIPVisionTower(config.vision)
        self.mm_projector = build_projector(
            config.projector_type, config.vision.hidden_size, config.text.hidden_size
        )
        self.model = LlamaModel(config.text)
        self.lm_head = (
            None
            if config.text.tie_word_embeddings
            else nn.Linear(config.text.hidden_size, config.text.vocab_size, bias=False)
        )

    def encode_images(self, pixel_values):
        """pixel_values (M, 3, H, W) -> picture embeddings (M, N, C)."""
        with torch.no_grad():
            image_features = self.vision_tower(pixel_values)  # (M, N, Cv)
        weight = next(self.mm_projector.parameters())
        return self.mm_projector(image_features.to(weight.dtype))  # (M, N, C)

    def logits(self, hidden):
        head = self.model.embed_tokens if self.lm_head is None else self.lm_head
        return F.linear(hidden, head.weight).float()  # (..., V)

    def forward(
        self, input_ids, pixel_values=None, labels=None, reduction="mean", cache=None, lengths=None
    ):
        """Logits, or with labels the loss.

        input_ids int64 (B, T), each picture as n_image_tokens positions of IMAGE_TOKEN_INDEX; rows padded on the right with id 0.
        pixel_values float (M, 3, H, W): the batch's pictures in reading order, any number a row; None when there are none.
        labels int64 (B, T), not shifted -> scalar float32: cross entropy, "mean" or "sum" over the positions whose next label counts
        (no such position: 0, still connected to the graph). Without labels -> logits float32 (B, T, V).
        cache: a KVCache, with lengths int64 (B,) = real tokens of each row in this call -> logits float32 (B, V) at each row's last real token.
        ValueError when picture positions and pictures do not agree.
        """
        image_mask = input_ids == IMAGE_TOKEN_INDEX  # (B, T)
        x = self.model.embed_tokens(input_ids.masked_fill(image_mask, 0))  # (B, T, C)
        if pixel_values is not None and len(pixel_values):
            x = splice_image_embeds(x, self.encode_images(pixel_values), image_mask)
        else:
            if image_mask.any():
                raise ValueError(
                    f"input_ids hold {int(image_mask.sum())} picture positions, but there are no pictures"
                )
            if self.training:  # under FSDP every rank must run backward through the same layers down to the projector, picture or not
                weight = next(self.mm_projector.parameters())
                x = x + 0.0 * self.mm_projector(
                    weight.new_zeros(1, self.config.vision.hidden_size)
                ).to(x.dtype)  # (B, T, C)
        hidden = self.model(x, cache)  # (B, T, C)
        if cache is not None:
            cache.lengths = cache.lengths + lengths
            last = torch.arange(len(lengths), device=hidden.device), lengths - 1
            return self.logits(hidden[last])  # (B, V)
        if labels is None:
            return self.logits(hidden)  # (B, T, V)
        if reduction not in ("mean", "sum"):
            raise ValueError(f"reduction {reduction!r} is unknown: mean or sum")
        return self.loss(hidden, labels, reduction)

    def loss(self, hidden, labels, reduction):
        """Cross entropy in float32 of hidden (B, T, C) against labels (B, T); logits exist only where a label does, LOSS_CHUNK at a time."""
        targets = labels[:, 1:]
        counts = targets != IGNORE_INDEX  # (B, T - 1)
        hidden, targets = hidden[:, :-1][counts], targets[counts]  # (n, C), (n,)
        total = hidden.float().sum() * 0.0  # keeps the graph when this rank has no label at all
        for h, t in zip(hidden.split(LOSS_CHUNK), targets.split(LOSS_CHUNK)):
            # checkpoint: backward computes a chunk's logits again instead of keeping them
            total = total + checkpoint(
                lambda h, t: F.cross_entropy(self.logits(h), t, reduction="sum"),
                h,
                t,
                use_reentrant=False,
                preserve_rng_state=False,
            )
        return total if reduction == "sum" else total / max(len(targets), 1)


# --- 5. weights -----------------------------------------------------------------------------------------------------
# in: folders or files of any published layout; out: a model whose every parameter came from a named tensor

PARTS = ("llm", "vision_tower", "mm_projector")
DTYPES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "I64": "int64",
}  # safetensors' spelling of torch's
EMBED = "model.embed_tokens.weight"
RENAMES = (  # names in files -> names here: patterns and what takes their place, tried one after the other
    (r"^base_model\.model\.", ""),  # peft's addition
    (
        r"^(model\.)?vision_tower\.(vision_tower\.)?(vision_model\.)?",
        "vision_tower.",
    ),  # llava-hf of any age; original LLaVA nests it twice
    (
        r"^(vision_model\.)?(?=(embeddings|encoder|pre_layrnorm|post_layernorm)\.)",
        "vision_tower.",
    ),  # CLIP, older and as transformers 5 saves it
    (r"^(model\.)?multi_modal_projector\.linear_1\.", "mm_projector.0."),  # llava-hf
    (r"^(model\.)?multi_modal_projector\.linear_2\.", "mm_projector.2."),
    (r"^model\.mm_projector\.", "mm_projector."),  # original LLaVA and the Qilin release
    (
        r"^(language_model\.model|model\.language_model)\.",
        "model.",
    ),  # llava-hf up to 4.51, and since
    (r"^language_model\.(?=lm_head\.)", ""),
)
IGNORABLE = re.compile(  # what a checkpoint may hold that no model here needs
    r"rotary_emb\.inv_freq$"  # computed, not stored, since transformers 4.32
    r"|embeddings\.position_ids$"  # 0, 1, 2, … in old CLIP files
    r"|^text_model\.|^(text|visual)_projection\.weight$|^logit_scale$"
)  # CLIP's text half


def our_name(name):
    """The name here of a tensor of a file; None when it has the form of none."""
    for pattern, ours in RENAMES:
        name = re.sub(pattern, ours, name)
    return (
        name if name.startswith(("vision_tower.", "mm_projector.", "model.", "lm_head.")) else None
    )


def part_of(name):
    """The one of PARTS that a parameter (named as here) belongs to; "lora" for an adapter, which no file holds."""
    part = "lora" if name.endswith((".lora_A", ".lora_B")) else name.split(".")[0]
    return part if part in (*PARTS, "lora") else "llm"


def open_weights(file):
    """[(name, tensor or slice of one)] of a .safetensors file, or of a .bin without pickled code; nothing is read before it is asked for."""
    try:
        if file.suffix == ".safetensors":
            opened = safe_open(file, framework="pt")
            return [(name, opened.get_slice(name)) for name in opened.keys()]
        # weights_only: no code runs; mmap, which the oldest format cannot: pages come as they are read
        tensors = torch.load(
            file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file)
        )
        if not isinstance(tensors, dict) or not all(
            isinstance(n, str) and isinstance(t, torch.Tensor) and t.layout == torch.strided
            for n, t in tensors.items()
        ):
            raise ValueError("not a dict from names to tensors")
        return list(tensors.items())
    except (
        Exception
    ) as error:  # the readers raise many kinds for a damaged file, and each means this
        raise ValueError(f"{file}: cannot be read as weights ({one_line(error)[:200]})") from None


class WeightFiles:
    """The tensors of a checkpoint, by our names, read slice by slice when asked for.

    path: a folder (one file, or shards with an index), or a file. tensors: our name -> (file, name in it, tensor or slice).
    ignored: names on the short list of what no model needs. unknown: names of no form that we know.
    """

    def __init__(self, path):
        self.path, self.tensors, self.unknown, self.ignored = Path(path), {}, [], []
        for file in self._files():
            for name, tensor in open_weights(file):
                ours = our_name(name)
                if IGNORABLE.search(name):
                    self.ignored.append(name)
                elif ours is None:
                    self.unknown.append(name)
                elif ours in self.tensors:
                    raise ValueError(
                        f"{file}: {name} is also in {self.tensors[ours][0].name} (as {self.tensors[ours][1]})"
                    )
                else:
                    self.tensors[ours] = (file, name, tensor)

    def _files(self):
        if self.path.is_file():
            return [self.path]
        if not self.path.is_dir():
            raise FileNotFoundError(f"no such folder or file: {self.path}")
        for index in ("model.safetensors.index.json", "pytorch_model.bin.index.json"):
            if (self.path / index).is_file():
                raw = read_json(self.path / index)
                names = raw.get("weight_map") if isinstance(raw, dict) else None
                if (
                    not isinstance(names, dict)
                    or not names
                    or any(not isinstance(n, str) or n != Path(n).name for n in names.values())
                ):
                    raise ValueError(
                        f"{self.path / index}: no weight_map from tensors to files beside it"
                    )
                files = [self.path / name for name in sorted(set(names.values()))]
                missing = [f.name for f in files if not f.is_file()]
                if missing:
                    raise FileNotFoundError(
                        f"{self.path / index} names {missing[0]}, which is not there ({len(missing)} of {len(files)} files are missing)"
                    )
                return files
        for name in (
            "model.safetensors",
            "pytorch_model.bin",
            "projector.safetensors",
            "mm_projector.bin",
        ):
            if (self.path / name).is_file():
                return [self.path / name]
        raise FileNotFoundError(
            f"no weights in {self.path}: neither model.safetensors nor pytorch_model.bin, nor an index of shards"
        )

    def shape(self, name):
        tensor = self.tensors[name][2]
        return tuple(tensor.shape if isinstance(tensor, torch.Tensor) else tensor.get_shape())

    def dtype(self, name):
        tensor = self.tensors[name][2]
        return (
            str(tensor.dtype)[6:]
            if isinstance(tensor, torch.Tensor)
            else DTYPES.get(tensor.get_dtype(), tensor.get_dtype())
        )

    def rows(self, name, start=0, stop=None):
        """Rows start:stop of a tensor, in the file's dtype, nothing else being read."""
        return self.tensors[name][2][start:stop]


def named_list(names):
    """Up to ten names, and how many more."""
    names = sorted(names)
    return ", ".join(names[:10]) + (f" and {len(names) - 10} more" if len(names) > 10 else "")


def local_rows(param):
    """(start, stop): the rows of a parameter that this rank holds. Sharded on dim 0 as torch.chunk cuts, so the last ranks may hold fewer or none."""
    if not hasattr(param, "device_mesh"):
        return 0, param.shape[0]
    mesh = param.device_mesh
    size, rank = (
        mesh.size(mesh.ndim - 1),
        mesh.get_local_rank(mesh.ndim - 1),
    )  # the last dimension shards, one before it replicates
    chunk = -(-param.shape[0] // size)
    return min(rank * chunk, param.shape[0]), min((rank + 1) * chunk, param.shape[0])


@torch.no_grad()
def init_uniform(params, fan_in, generator):
    """torch's own init of nn.Linear, uniform within 1 / sqrt(fan_in), from a generator: the same on every rank, sharded or not."""
    for param in params:
        start, stop = local_rows(param)
        full = torch.empty(param.shape).uniform_(-1, 1, generator=generator) / math.sqrt(fan_in)
        (param.to_local() if hasattr(param, "to_local") else param).copy_(full[start:stop])


@torch.no_grad()
def init_fresh(model, seed=0, projector=True):
    """What no file holds, from a seed: the projector where asked for, and LoRA's A; its B is zero, so that adapters start as no change (as peft's)."""
    generator = torch.Generator().manual_seed(seed)
    for layer in model.mm_projector.modules() if projector else ():
        if isinstance(layer, nn.Linear):
            init_uniform((layer.weight, layer.bias), layer.in_features, generator)
    for layer in model.model.modules():
        if hasattr(layer, "lora_A"):
            init_uniform([layer.lora_A], layer.lora_A.shape[1], generator)
            nn.init.zeros_(layer.lora_B)


def account(model, sources, fresh=False):
    """({parameter: (WeightFiles, name there)}, one line that accounts for all tensors) of a model, on the meta device or not.

    sources: [(WeightFiles, parts)]; of each file the parts named are taken, the tensors of other parts are skipped and counted.
    ValueError when a tensor is missing, has another shape, or is left over: names up to ten and how many more.
    """
    where = ", ".join(str(files.path) for files, _ in sources)
    is_linear, is_tied = (
        model.config.projector_type == "linear",
        model.config.text.tie_word_embeddings,
    )
    shapes = {
        name: tuple(p.shape)
        for name, p in model.named_parameters()
        if part_of(name) != "lora" and not (fresh and part_of(name) == "mm_projector")
    }
    quantized = {
        f"{name}.weight": m for name, m in model.named_modules() if hasattr(m, "quantize_")
    }
    found, skipped = {}, 0
    for files, parts in sources:
        if files.unknown:
            raise ValueError(
                f"{files.path}: tensors that this model has no place for: {named_list(files.unknown)}"
            )
        for name in files.tensors:
            if part_of(name) not in parts:
                skipped += 1
            elif is_tied and name == "lm_head.weight" and EMBED in files.tensors:
                rows = files.shape(EMBED)[0]
                if files.shape(name) != files.shape(EMBED) or not all(
                    torch.equal(
                        files.rows(name, i, i + 4096).float(),
                        files.rows(EMBED, i, i + 4096).float(),
                    )
                    for i in range(0, rows, 4096)
                ):
                    raise ValueError(
                        f"{files.path}: tie_word_embeddings is true, but lm_head.weight is not embed_tokens.weight"
                    )
                files.ignored.append(name)
            elif (
                is_tied and name == "lm_head.weight"
            ):  # the one copy was saved under the head's name
                found[EMBED] = files, name
            elif (
                is_linear and name.startswith("mm_projector.2.")
            ):  # llava-hf has no linear projector: ours goes out as linear_1, and an identity as linear_2
                want = (
                    torch.eye(model.config.text.hidden_size)
                    if name.endswith("weight")
                    else torch.zeros(model.config.text.hidden_size)
                )
                if files.shape(name) != want.shape or not torch.equal(
                    files.rows(name).float(), want
                ):
                    raise ValueError(
                        f"{files.path}: {name} is no identity, so this is not a linear projector"
                    )
            else:
                found[name.replace("mm_projector.0.", "mm_projector.") if is_linear else name] = (
                    files,
                    name,
                )
    for problem, names in (
        ("missing", shapes.keys() - found.keys()),
        ("tensors that this model has no place for:", found.keys() - shapes.keys()),
    ):
        if names:
            raise ValueError(f"{where}: {problem} {named_list(names)}")
    for name, (files, key) in found.items():
        want = quantized[name].shape if name in quantized else shapes[name]
        if files.shape(key) != want:
            raise ValueError(
                f"{files.path}: {name} is {files.shape(key)} in the file, {want} by the config"
            )
    return found, (
        f"{len(found)} tensors loaded, {skipped} skipped (part given elsewhere), {sum(len(files.ignored) for files, _ in sources)} ignorable, "
        f"none missing, none left over{', fresh projector' * fresh}"
    )


def is_finite(tensor):
    return all(
        extreme.isfinite() for extreme in torch.aminmax(tensor)
    )  # one pass, nothing allocated; aminmax passes nan on


@torch.no_grad()
def check_finite(model, dtype=None):
    """ValueError that names the parameters holding inf or nan, or that would in `dtype`."""
    if names := [
        name
        for name, p in model.named_parameters()
        if p.is_floating_point() and not is_finite(p.to(dtype or p.dtype))
    ]:
        raise ValueError(
            f"values that are not finite in {named_list(names)}: the weights are damaged{f', or too large for {dtype}' if dtype else ''}"
        )


@torch.no_grad()
def load_weights(model, sources, device, fresh=False, seed=0):
    """Give a model on the meta device (sharded or not, any dtype) memory on `device` and fill every parameter from the files;
    -> the line of account(), whose errors come before any memory is taken. ValueError as well when a tensor holds no finite floats.

    fresh: the projector is in no file and comes from init_fresh with `seed`, as LoRA adapters do.
    """
    found, line = account(model, sources, fresh)
    quantized = {
        f"{name}.weight": m for name, m in model.named_modules() if hasattr(m, "quantize_")
    }
    # what to_empty does; a plain tensor without its empty_like, which makes torch import for half a second
    model._apply(
        lambda t: (
            torch.empty_like(t, device=device)
            if hasattr(t, "to_local")
            else torch.empty(t.shape, dtype=t.dtype, device=device)
        )
    )
    for name, (files, key) in found.items():
        param = model.get_parameter(name)
        start, stop = local_rows(param) if name not in quantized else (0, None)
        if stop == start:
            continue
        rows = files.rows(key, start, stop)
        # of a large tensor a sample is looked at, since what is mapped need not be read yet; generate() and convert.py find the rest
        if not rows.is_floating_point() or not is_finite(
            rows.flatten()[:: 1 + rows.numel() // 4096]
            if rows.numel() > 65536 and rows.is_contiguous()
            else rows
        ):
            raise ValueError(
                f"{files.tensors[key][0]}: {files.tensors[key][1]} holds {'values that are not finite' if rows.is_floating_point() else str(rows.dtype)}"
            )
        if name in quantized:
            quantized[name].quantize_(rows)
        elif (
            (rows.dtype, rows.device) == (param.dtype, param.device)
            and rows.is_contiguous()
            and not hasattr(param, "to_local")
        ):
            param.data = rows  # no copy: the parameter is the file, mapped into memory; writing to it changes pages of our own
        else:
            (param.to_local() if hasattr(param, "to_local") else param).copy_(rows)
    init_fresh(model, seed, projector=fresh)
    return line


HF_PREFIXES = (  # ours -> the older llava-hf names, which every transformers reads
    ("vision_tower.", "vision_tower.vision_model."),
    ("model.", "language_model.model."),
    ("lm_head.", "language_model.lm_head."),
    ("mm_projector.0.", "multi_modal_projector.linear_1."),
    ("mm_projector.2.", "multi_modal_projector.linear_2."),
    ("mm_projector.", "multi_modal_projector.linear_1."),
)


def hf_name(name):
    """The llava-hf name of one of our parameters."""
    return next(theirs + name[len(ours) :] for ours, theirs in HF_PREFIXES if name.startswith(ours))


# --- 6. generation ---------------------------------------------------------------------------------------------------
# in: prompts of different lengths; out: one new id a row a step, until every row has said its end id


def pad_rows(rows, value):
    """int64 (B, T) from lists of int of different lengths, padded on the right with `value`."""
    length = max(map(len, rows))
    return torch.tensor(
        [row + [value] * (length - len(row)) for row in rows], dtype=torch.int64
    )  # (B, T)


def sample_next_token(
    logits, seen, temperature=0.0, top_p=1.0, top_k=0, repetition_penalty=1.0, generator=None
):
    """int64 (B,) from logits float32 (B, V). temperature 0: the likeliest. seen bool (B, V): ids that repetition_penalty makes less likely
    (divides positive logits, multiplies negative ones: CTRL, arXiv 1909.05858). top_k, then top_p, cut the tail before drawing."""
    if repetition_penalty != 1.0:
        logits = torch.where(
            seen,
            torch.where(logits > 0, logits / repetition_penalty, logits * repetition_penalty),
            logits,
        )
    if temperature < 1e-4:  # logits divided by less leave the range of float32
        return logits.argmax(-1)
    logits = logits / temperature
    if top_k:
        logits = logits.masked_fill(
            logits < logits.topk(min(top_k, logits.shape[-1])).values[:, -1:], -torch.inf
        )
    if top_p < 1.0:
        ranked, order = logits.sort(descending=True)
        probs = ranked.softmax(-1)
        ranked = ranked.masked_fill(
            probs.cumsum(-1) - probs >= top_p, -torch.inf
        )  # keeps the one that reaches top_p
        logits = torch.full_like(logits, -torch.inf).scatter(1, order, ranked)
    return torch.multinomial(logits.softmax(-1), 1, generator=generator)[:, 0]


@torch.no_grad()
def generate(
    model,
    input_ids,
    pixel_values=None,
    *,
    max_new_tokens,
    temperature=0.0,
    top_p=1.0,
    top_k=0,
    repetition_penalty=1.0,
    seed=None,
    stop=all,
    cache=None,
):
    """Yield one list of B new ids a step for B prompts (lists of int, from encode_prompt) and their pictures (M, 3, H, W).

    A row's end id is yielded, after that None. Rows of different lengths answer as each would alone. Ids past the tokenizer never come.
    stop: asked before each step with one bool a row (has it ended?); on a sharded model it must agree over ranks, since each step is a
    collective. A row ends as well after max_new_tokens or at the model's last position. ValueError when a prompt is empty or already fills the positions.
    cache: a KVCache of an earlier call that holds the beginning of each prompt, which is then not computed again; pictures are those of the rest.
    """
    device = next(model.parameters()).device
    limit, longest = model.config.text.max_position_embeddings, max(map(len, input_ids))
    if longest >= limit:
        raise ValueError(
            f"the prompt has {longest} tokens, the model's positions end at {limit}: ask a shorter question"
        )
    if cache is None:
        cache = KVCache(model.config.text.num_hidden_layers, min(longest + max_new_tokens, limit))
    limit = min(limit, max(cache.max_length, longest))
    held = [0] * len(input_ids) if cache.lengths is None else cache.lengths.tolist()
    rest = [row[n:] for row, n in zip(input_ids, held)]
    if not all(rest) or longest > cache.max_length:
        raise ValueError(
            "a prompt is empty, or the cache holds all of it, or it is longer than the cache"
        )
    lengths = torch.tensor([len(row) for row in rest], device=device)
    ids = pad_rows(rest, 0).to(device)
    seen = torch.zeros(
        len(input_ids), model.config.text.vocab_size, dtype=torch.bool, device=device
    )
    for row, prompt in zip(seen, input_ids):
        row[[i for i in set(prompt) if i >= 0]] = True
    generator = None if seed is None else torch.Generator(device).manual_seed(seed)
    pixel_values = None if pixel_values is None else pixel_values.to(device)
    ended = [False] * len(input_ids)
    logits = model(ids, pixel_values, cache=cache, lengths=lengths)  # prefill: (B, V)
    for step in range(max_new_tokens):
        if step == 0 and not is_finite(logits):
            check_finite(model)
            raise ValueError(
                "the model's logits are not finite, though its weights are: try another dtype"
            )
        logits[:, model.config.n_token_ids :] = -torch.inf
        ids = sample_next_token(
            logits, seen, temperature, top_p, top_k, repetition_penalty, generator
        )  # (B,)
        seen[torch.arange(len(ids), device=device), ids] = True
        new = [None if end else i for end, i in zip(ended, ids.tolist())]
        yield new
        ended = [
            end or i in model.config.end_ids or len(row) + step + 1 >= limit
            for end, i, row in zip(ended, new, input_ids)
        ]
        if stop(ended) or step == max_new_tokens - 1:
            return
        logits = model(
            ids[:, None],
            cache=cache,
            lengths=torch.tensor([int(not end) for end in ended], device=device),
        )  # one token a row: (B, V)


def answer_ids(model, input_ids, pixel_values=None, **options):
    """The whole answers, end ids left out: a list of int for each prompt. Options as for generate()."""
    answers = [[] for _ in input_ids]
    for new in generate(model, input_ids, pixel_values, **options):
        for answer, i in zip(answers, new):
            if i is not None and i not in model.config.end_ids:
                answer.append(i)
    return answers
