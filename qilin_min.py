"""qilin-min: Qilin-Med-VL (arXiv 2310.17956) from scratch in PyTorch: CLIP ViT -> projector -> LLaMA-2, and what carries data in and out.

Read from top to bottom. Sections 2 to 4, some 310 lines, are the model; the rest carries data in and out of it:

    1. constants and configuration        config.json of a checkpoint -> QilinConfig
    2. LLaMA-2 decoder                    RMSNorm, RoPE, attention (GQA, KV cache), SwiGLU
    3. CLIP vision tower                  pixels -> features of the last block but one
    4. Qilin                              picture features among the words; loss; logits
    5. files and errors                   what every script shares
    6. tokens                             a conversation -> input_ids and labels
    7. pixels                             a picture file -> (3, 336, 336)
    8. weights in                         any folder -> every tensor accounted for -> the model
    9. weights out                        the model -> a folder that transformers and vLLM load
   10. generation                         prompts -> answers, token by token
   11. command line                       the options that choose a model

Shapes:  B batch, T tokens (each picture already expanded to its N positions), M pictures in the batch, N patches a picture
(576 = 24 x 24), C text width, Cv vision width, H heads, D head size, V vocabulary, L layers.
Module attributes are the names in published checkpoints, so that loading is nearly the identity.
"""

import errno
import math
import os
import re
import shutil
import warnings
import zipfile
from dataclasses import dataclass, field, fields
from pathlib import Path

import numpy as np
import sentencepiece
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image, ImageOps
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch.utils.checkpoint import checkpoint

from common.files import (
    check_replaceable,
    model_folder,
    one_line,
    read_json,
    replace_folder,
    write_json,
    write_text,
)

# --- 1. constants and configuration ---------------------------------------------------------------------------------
# in: config.json in the spelling of any release; out: QilinConfig, whose field names are those of config.json

IMAGE_TOKEN = "<image>"    # in a conversation: here stands a picture
IMAGE_TOKEN_INDEX = -200   # in input_ids: one patch of a picture; out of range on purpose, it must never reach embed_tokens
IGNORE_INDEX = -100        # in labels: this position teaches nothing


@dataclass
class TextConfig:
    """Sizes of the LLaMA decoder. Defaults are those of transformers' LlamaConfig, since a config.json may omit what equals them."""

    vocab_size: int = 32000
    hidden_size: int = 4096
    intermediate_size: int = 11008
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int = 0         # 0: as many as num_attention_heads; fewer is grouped-query attention
    head_dim: int = 0                    # 0: hidden_size / num_attention_heads
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    max_position_embeddings: int = 2048
    tie_word_embeddings: bool = False    # True: the output head is embed_tokens
    bos_token_id: int = 1
    eos_token_id: int = 2                # a list in some config.json: the first is here,
    more_end_ids: tuple = ()             # the others here, and the tokenizer's where it differs; any of them ends an answer

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
    image_size: int = 224                # pixels, height and width
    patch_size: int = 32
    layer_norm_eps: float = 1e-5
    hidden_act: str = "quick_gelu"
    select_layer: int = -2               # config.json: vision_feature_layer or mm_vision_select_layer


@dataclass
class QilinConfig:
    text: TextConfig = field(default_factory=TextConfig)
    vision: VisionConfig = field(default_factory=VisionConfig)
    projector_type: str = "linear"       # "linear" (paper) | "mlp2x_gelu" (released weights)
    n_token_ids: int = 0                 # ids below this are the tokenizer's and may be generated
    image_mode: str = "pad"              # how a picture becomes square: preprocess_image's mode

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
            raise ValueError(f"{where}: {key} = {raw[key]!r} is not implemented here (only {', '.join(map(repr, allowed))})")
    found = {f.name: raw[f.name] for f in fields(cls) if raw.get(f.name) is not None}
    for name, value in found.items():
        kind = type(getattr(cls, name))
        is_number, most = kind in (int, float), 1000 if name == "num_hidden_layers" else 1e9
        if not isinstance(value, (float, int) if kind is float else kind) or (is_number and (isinstance(value, bool) or not 0 <= value < most or (value == 0 and "_id" not in name))):
            raise ValueError(f"{where}: {name} = {value!r} is not {'a positive number' if is_number else f'a {kind.__name__}'}")
    config = cls(**found)
    if config.hidden_size % config.num_attention_heads and "head_dim" not in found:
        raise ValueError(f"{where}: hidden_size {config.hidden_size} cannot be cut into {config.num_attention_heads} heads")
    return config


def text_config(raw, where):
    """TextConfig from the dict of a LLaMA config.json. ValueError names what we do not implement (RoPE scaling, other model types)."""
    if not isinstance(raw, dict) or not all(isinstance(raw.get(key) or {}, dict) for key in ("rope_parameters", "rope_scaling")):
        raise ValueError(f"{where}: not an object with the sizes of a language model")
    rope = raw.get("rope_parameters") or {}              # transformers 5 nests what older files spell rope_theta, rope_scaling
    scaling = raw.get("rope_scaling") or {}
    for kind in [d[key] for d in (rope, scaling) for key in ("rope_type", "type") if d.get(key) not in (None, "default")]:
        raise ValueError(f"{where}: RoPE scaling of type {kind!r} is not implemented; answers would be silently wrong")
    raw = dict(raw, **({"rope_theta": rope["rope_theta"]} if "rope_theta" in rope else {}))
    first, *more = raw["eos_token_id"] if isinstance(raw.get("eos_token_id"), list) and raw["eos_token_id"] else [raw.get("eos_token_id")]
    if not all(type(i) is int and i >= 0 for i in more):
        raise ValueError(f"{where}: eos_token_id = {raw['eos_token_id']!r} is no list of ids")
    raw = dict(raw, eos_token_id=first, more_end_ids=tuple(more))
    fixed = {"model_type": ["llama", "llava", "llava_llama"], "hidden_act": ["silu"], "attention_bias": [False], "mlp_bias": [False]}
    config = _fields_from(TextConfig, raw, where, fixed)
    if config.num_attention_heads % config.num_key_value_heads or config.head_dim % 2:
        raise ValueError(f"{where}: {config.num_attention_heads} heads of {config.head_dim} cannot share {config.num_key_value_heads} key-value heads, or cannot be rotated in pairs")
    return config


def vision_config(raw, where):
    """VisionConfig from the dict of a CLIP config.json, with or without the text tower's half."""
    fixed = {"model_type": ["clip_vision_model", "clip"], "hidden_act": ["quick_gelu", "gelu"], "num_channels": [3]}
    config = _fields_from(VisionConfig, raw.get("vision_config", raw), where, fixed)
    if config.patch_size > config.image_size:
        raise ValueError(f"{where}: patch_size {config.patch_size} is more than image_size {config.image_size}")
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
    inv_freq = 1.0 / theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32, device=position_ids.device) / head_dim)  # (D/2,)
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
        self.k[layer][rows, :, position_ids] = k.transpose(1, 2)  # two indices around a slice select (B, T, H_kv, D)
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
        self.q_proj = nn.Linear(config.hidden_size, config.num_attention_heads * config.head_dim, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, config.num_key_value_heads * config.head_dim, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, config.num_key_value_heads * config.head_dim, bias=False)
        self.o_proj = nn.Linear(config.num_attention_heads * config.head_dim, config.hidden_size, bias=False)

    def forward(self, x, rope, cache=None, position_ids=None, mask=None):
        B, T, _ = x.shape
        q, k, v = (proj(x).view(B, T, -1, self.head_dim).transpose(1, 2) for proj in (self.q_proj, self.k_proj, self.v_proj))  # (B, H or H_kv, T, D)
        q, k = apply_rotary_pos_emb(q, *rope), apply_rotary_pos_emb(k, *rope)
        if cache is not None:
            k, v = cache.update(self.layer, k, v, position_ids)  # (B, H_kv, n_positions, D)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=self.is_grouped)  # (B, H, T, D)
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
        self.layers = nn.ModuleList(LlamaDecoderLayer(config, i) for i in range(config.num_hidden_layers))
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
                position_ids = (cache.lengths[:, None] + position_ids).clamp(max=cache.max_length - 1)  # (B, T): a row that has ended may be full
                mask = torch.arange(cache.n_positions, device=x.device) <= position_ids[:, None, :, None]  # (B, 1, T, n_positions)
        rope = tuple(t.to(x.dtype) for t in rotary_cos_sin(position_ids, self.config.head_dim, self.config.rope_theta))  # only the finished cos and sin are rounded
        for i, layer in enumerate(self.layers):
            if i < self.n_checkpointed and torch.is_grad_enabled() and cache is None:
                x = checkpoint(layer, x, rope, use_reentrant=False, preserve_rng_state=False)  # nothing here draws
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
        self.patch_embedding = nn.Conv2d(3, config.hidden_size, config.patch_size, stride=config.patch_size, bias=False)
        self.position_embedding = build_embedding(n_positions, config.hidden_size)

    def forward(self, pixel_values):
        x = self.patch_embedding(pixel_values.to(self.patch_embedding.weight.dtype))  # (M, Cv, h, w)
        x = x.flatten(2).transpose(1, 2)  # (M, N, Cv)
        cls = self.class_embedding.expand(x.shape[0], 1, -1)  # (M, 1, Cv)
        return torch.cat((cls, x), dim=1) + self.position_embedding.weight  # (M, N + 1, Cv)


class CLIPAttention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.n_heads = config.num_attention_heads
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (nn.Linear(config.hidden_size, config.hidden_size) for _ in range(4))

    def forward(self, x):
        M, T, Cv = x.shape
        q, k, v = (proj(x).view(M, T, self.n_heads, -1).transpose(1, 2) for proj in (self.q_proj, self.k_proj, self.v_proj))  # (M, H, T, D)
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
        self.layers = nn.ModuleList(CLIPEncoderLayer(config) for _ in range(config.num_hidden_layers))


class CLIPVisionTower(nn.Module):
    """CLIP's image half. Layers past select_layer and post_layernorm are held, since an export must hold them, but never computed."""

    def __init__(self, config):
        super().__init__()
        self.embeddings = CLIPVisionEmbeddings(config)
        self.pre_layrnorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)  # sic: the name in every checkpoint
        self.encoder = CLIPEncoder(config)
        self.post_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        # hidden_states[i] is the output of block i (0: of the embeddings); -2 of 24 blocks means blocks 1 to 23
        self.n_computed = config.select_layer if config.select_layer >= 0 else config.num_hidden_layers + 1 + config.select_layer

    def forward(self, pixel_values):
        """pixel_values float (M, 3, H, W) normalised -> features (M, N, Cv): the class token is dropped."""
        x = self.pre_layrnorm(self.embeddings(pixel_values))  # (M, N + 1, Cv)
        for layer in self.encoder.layers[: self.n_computed]:
            x = layer(x)
        return x[:, 1:]  # (M, N, Cv)


# --- 4. Qilin -------------------------------------------------------------------------------------------------------
# in: input_ids (B, T) with IMAGE_TOKEN_INDEX at picture positions, pixels (M, 3, H, W); out: logits (B, T, V) or the loss

LOSS_CHUNK = 1024  # labelled positions whose logits exist at one time: 1024 x 55296 x 4 bytes = 216 MiB


def build_projector(projector_type, vision_size, text_size):
    """The adapter of paper section 4.1: one linear layer, or the released weights' Linear, exact GELU, Linear."""
    if projector_type == "linear":
        return nn.Linear(vision_size, text_size)
    if projector_type == "mlp2x_gelu":
        return nn.Sequential(nn.Linear(vision_size, text_size), nn.GELU(), nn.Linear(text_size, text_size))
    raise ValueError(f"projector_type {projector_type!r} is unknown: linear or mlp2x_gelu")


def splice_image_embeds(token_embeds, image_embeds, image_mask):
    """Token embeddings with every picture position replaced by its patch embedding, in one step.

    token_embeds (B, T, C), image_embeds (M, N, C) in reading order, image_mask bool (B, T) -> (B, T, C).
    ValueError when image_mask marks other than M * N positions: one picture too many would shift all that follow.
    Source: LLaVA, arXiv 2304.08485, section 4.1.
    """
    n_places, n_patches = int(image_mask.sum()), image_embeds.shape[0] * image_embeds.shape[1]
    if n_places != n_patches:
        raise ValueError(f"input_ids hold {n_places} picture positions, but the pictures give {image_embeds.shape[0]} x {image_embeds.shape[1]} patches")
    return token_embeds.masked_scatter(image_mask[..., None], image_embeds.to(token_embeds.dtype))  # (B, T, C)


class Qilin(nn.Module):
    """vision_tower -> mm_projector -> model (LLaMA) -> lm_head. The tower is never trained (paper, section 4.2)."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.vision_tower = CLIPVisionTower(config.vision)
        self.mm_projector = build_projector(config.projector_type, config.vision.hidden_size, config.text.hidden_size)
        self.model = LlamaModel(config.text)
        self.lm_head = None if config.text.tie_word_embeddings else nn.Linear(config.text.hidden_size, config.text.vocab_size, bias=False)

    def encode_images(self, pixel_values):
        """pixel_values (M, 3, H, W) -> picture embeddings (M, N, C)."""
        with torch.no_grad():
            image_features = self.vision_tower(pixel_values)  # (M, N, Cv)
        weight = next(self.mm_projector.parameters())
        return self.mm_projector(image_features.to(weight.dtype))  # (M, N, C)

    def logits(self, hidden):
        head = self.model.embed_tokens if self.lm_head is None else self.lm_head
        return F.linear(hidden, head.weight).float()  # (..., V)

    def forward(self, input_ids, pixel_values=None, labels=None, reduction="mean", cache=None, lengths=None):
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
                raise ValueError(f"input_ids hold {int(image_mask.sum())} picture positions, but there are no pictures")
            if self.training:  # under FSDP every rank must run backward through the same layers down to the projector, picture or not
                weight = next(self.mm_projector.parameters())
                x = x + 0.0 * self.mm_projector(weight.new_zeros(1, self.config.vision.hidden_size)).to(x.dtype)  # (B, T, C)
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
            total = total + checkpoint(lambda h, t: F.cross_entropy(self.logits(h), t, reduction="sum"), h, t, use_reentrant=False, preserve_rng_state=False)
        return total if reduction == "sum" else total / max(len(targets), 1)


# --- 5. a row's pictures --------------------------------------------------------------------------------------------


def picture_names(row):
    """The names under a row's "image": one, a list, or none. ValueError unless the text holds as many <image>."""
    names = row.get("image") or []
    names = [names] if isinstance(names, str) else names
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ValueError("'image' is neither a name nor a list of names")
    if len(names) != count_images(row["conversations"]):
        raise ValueError(f"{count_images(row['conversations'])} {IMAGE_TOKEN} in the text, but {len(names)} pictures under 'image'")
    return names


def row_pictures(row, folder):
    """Paths of the pictures of a row. ValueError when one is not there, or lies outside `folder` (by .., an absolute path or a link)."""
    names, root = picture_names(row), os.path.realpath(folder)
    for name in names:
        if "\0" in name or os.path.commonpath((root, os.path.realpath(os.path.join(root, name)))) != root:
            raise ValueError(f"picture {name!r} lies outside the image folder {folder}")
        if not os.path.isfile(os.path.join(root, name)):
            raise ValueError(f"no such picture: {Path(folder) / name}" if os.path.isdir(root) else f"no such image folder: {folder}")
    return [Path(folder) / name for name in names]


def save_tensors(tensors, path):
    """A .safetensors file that others may read as they may its folder: the library alone makes it private to its owner."""
    try:
        save_file(tensors, path, metadata={"format": "pt"})
    except SafetensorError as error:  # a full disk reaches us as a text
        number = re.search(r"os error (\d+)", str(error))
        raise OSError(int(number[1]) if number else errno.EIO, f"could not be written ({one_line(error)})", str(path)) from None
    path.chmod(path.parent.stat().st_mode & 0o666)


# --- 6. tokens ------------------------------------------------------------------------------------------------------
# in: [{"from": "human", "value": "<image>\n…"}, {"from": "gpt", "value": "…"}]; out: input_ids and labels, lists of int of one length

SYSTEM = ("A chat between a curious user and an artificial intelligence assistant. "
          "The assistant gives helpful, detailed, and polite answers to the user's questions.")
TEMPLATES = ("v1", "plain")  # v1: dialogs (paper, both stages; released stage 2). plain: picture, caption (released stage 1)
PICTURE, END = object(), object()  # what stands between two texts of a prompt


class Tokenizer:
    """The sentencepiece model of a LLaMA folder. Never adds or recognises control ids in text: `</s>` typed by a person is four plain characters."""

    def __init__(self, path):
        """path: a model's folder, or a file: tokenizer.model, or weights that it lies beside. FileNotFoundError or ValueError names it."""
        path = model_folder(path)
        path = path.parent if path.suffix in (".safetensors", ".bin") else path
        self.path = path if path.is_file() else path / "tokenizer.model"
        if not self.path.is_file():
            raise FileNotFoundError(f"no tokenizer: {self.path} does not exist (it comes with the LLaMA weights)")
        try:
            self.sp = sentencepiece.SentencePieceProcessor(model_file=str(self.path))
        except (RuntimeError, OSError):
            raise ValueError(f"{self.path}: not a sentencepiece model") from None
        self.vocab_size, self.bos_id, self.eos_id = self.sp.vocab_size(), self.sp.bos_id(), self.sp.eos_id()
        if min(self.bos_id, self.eos_id) < 0:
            raise ValueError(f"{self.path}: a tokenizer without ids for begin and end of text")

    def encode(self, text, bos=False):
        try:
            return [self.bos_id] * bos + self.sp.encode(text)
        except RuntimeError:
            raise ValueError(f"not valid Unicode: {text[:40]!r}") from None

    def decode(self, ids):
        return self.sp.decode([i for i in ids if 0 <= i < self.vocab_size])

    def decode_stream(self, ids):
        """Text as it becomes certain, for an iterable of ids: a Chinese character may span several byte tokens and is held back until whole."""
        seen, shown = [], ""
        for i in ids:
            seen.append(i)
            text = self.decode(seen)
            # a cut character shows as up to 3 replacement marks; more than that is no character, and waiting would never end
            stable = text if len(text) - len(text.rstrip("\ufffd")) > 3 else text.rstrip("\ufffd")
            if len(stable) > len(shown):
                yield stable[len(shown):]
                shown = stable
        if seen and len(self.decode(seen)) > len(shown):
            yield self.decode(seen)[len(shown):]


def pictures_before(i, n_images):
    """How many pictures stand in front of turn i: n_images is an int (all in front of the first turn) or a list with a number a human turn."""
    if isinstance(n_images, list):
        return n_images[i // 2] if i % 2 == 0 and i // 2 < len(n_images) else 0
    return n_images if i == 0 else 0


def check_conversation(conversation, n_images=None):
    """ValueError unless it is a list of {"from", "value"} turns, human and gpt by turns, human first; n_images as in encode_conversation."""
    if not isinstance(conversation, list) or not conversation:
        raise ValueError("conversations is not a list of turns")
    for i, turn in enumerate(conversation):
        role = ("human", "gpt")[i % 2]
        if not isinstance(turn, dict) or not isinstance(turn.get("value"), str):
            raise ValueError(f"turn {i} is not an object with text under 'value'")
        if turn.get("from") != role:
            raise ValueError(f"turn {i} is from {turn.get('from')!r}, expected {role!r}")
        if not turn["value"].strip() and not pictures_before(i, n_images):  # a picture alone may be a question
            raise ValueError(f"turn {i} is an empty {'question' if role == 'human' else 'answer'}")
        if role == "gpt" and n_images is None and IMAGE_TOKEN in turn["value"]:
            raise ValueError(f"turn {i} is an answer that holds {IMAGE_TOKEN}")


def count_images(conversation):
    """Placeholders in a conversation of a data file: as many pictures belong to it."""
    return sum(turn["value"].count(IMAGE_TOKEN) for turn in conversation)


def build_prompt(conversation, template="v1", n_images=None):
    """The prompt as a list of (part, learn): part is a text, PICTURE or END (</s>); learn says whether the loss counts it.

    Texts are cut only where tokenising the whole released string would cut as well: at pictures, at </s>, and right after "ASSISTANT:".
    A turn's pictures move to its front, each followed by a newline. Source: released code, llava/conversation.py (v1, plain)
    and llava/train/train.py preprocess_multimodal; for n pictures n times what it does for one.
    """
    check_conversation(conversation, n_images)
    if template not in TEMPLATES:
        raise ValueError(f"template {template!r} is unknown: {' or '.join(TEMPLATES)}")
    if template == "plain":
        n = count_images(conversation[:1]) if n_images is None else pictures_before(0, n_images)
        if n == 0 or len(conversation) > 2:
            raise ValueError("template plain wants one turn with a picture and at most one answer")
        return [(PICTURE, False)] * n + [(turn["value"] + "\n", True) for turn in conversation[1:]]
    parts, text = [], SYSTEM + " "
    for i, turn in enumerate(conversation):
        value = turn["value"]
        if turn["from"] == "gpt":
            parts += [(value, True), (END, True)]  # the blank after "ASSISTANT:" is the one that sentencepiece puts in front of every text
            continue
        n = value.count(IMAGE_TOKEN) if n_images is None else pictures_before(i, n_images)
        if n:
            value = (value.replace(IMAGE_TOKEN, "") if n_images is None else value).strip()
            value = "\n" + value if value else ""
        text += "USER: "
        for k in range(n):
            parts += [(text, False), (PICTURE, False)]
            text = "\n" if k < n - 1 else ""
        parts += [(text + value + " ASSISTANT:", False)]
        text = ""
    return parts


def _encode_parts(parts, tokenizer, n_image_tokens):
    ids, labels = [tokenizer.bos_id], [IGNORE_INDEX]
    for part, learn in parts:
        if part is PICTURE:
            piece = [IMAGE_TOKEN_INDEX] * n_image_tokens
        elif part is END:
            piece = [tokenizer.eos_id]
        else:
            piece = tokenizer.encode(part)
        ids += piece
        labels += piece if learn else [IGNORE_INDEX] * len(piece)
    return ids, labels


def encode_conversation(conversation, tokenizer, n_image_tokens, template="v1", max_length=2048, n_images=None):
    """(input_ids, labels) of a dialog for training: lists of int of the same length, at most max_length tokens.

    n_images: None counts the <image> in the text (data files); an int puts that many pictures in front of the first turn, a list as many
    as it says in front of each human turn, and all text is taken literally. Too long: the end is cut, never a picture: where a picture would be cut both lists come back empty.
    ValueError when it is no conversation or ends with a question.
    """
    check_conversation(conversation, n_images)
    if conversation[-1]["from"] != "gpt":
        raise ValueError("the conversation ends with a question: nothing to learn from")
    ids, labels = _encode_parts(build_prompt(conversation, template, n_images), tokenizer, n_image_tokens)
    if IMAGE_TOKEN_INDEX in ids[max_length:]:
        return [], []
    return ids[:max_length], labels[:max_length]


def encode_prompt(conversation, tokenizer, n_image_tokens, template="v1", n_images=None):
    """input_ids of a dialog that ends with a question: they end where the assistant starts to speak, exactly as in training."""
    check_conversation(conversation, n_images)
    if conversation[-1]["from"] != "human":
        raise ValueError("the conversation ends with an answer: nothing to ask")
    return _encode_parts(build_prompt(conversation, template, n_images), tokenizer, n_image_tokens)[0]


# --- 7. pixels ------------------------------------------------------------------------------------------------------
# in: a picture file or PIL image of any kind; out: float32 (3, size, size), normalised for CLIP

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
PAD_COLOR = (122, 116, 104)  # CLIP_MEAN in 0 to 255: becomes almost 0 after normalisation
NORMALISED = (((np.arange(256) * (1 / 255)).astype(np.float32)[None] - np.array(CLIP_MEAN, dtype=np.float32)[:, None])
              / np.array(CLIP_STD, dtype=np.float32)[:, None])  # (3, 256) float32: what each of 256 values becomes, looked up instead of computed for each pixel


def is_dicom(image):
    """True for a file (path, or binary file at its beginning) that begins as DICOM does, or is named .dcm."""
    if not isinstance(image, (str, Path)):
        start = image.read(132)
        image.seek(0)
        return start[128:] == b"DICM"
    with open(image, "rb") as file:
        return file.read(132)[128:] == b"DICM" or Path(image).suffix.lower() in (".dcm", ".dicom")


def open_image(image):
    """A PIL image upright and in RGB, 8 bits a channel, from a path, a binary file or a PIL image. ValueError or FileNotFoundError names the file.

    16-bit grey keeps its high byte: PIL's own conversion clips at 255 and turns a CT slice white. Of several frames the first; DICOM through dicom.py.
    """
    name = getattr(image, "filename", None) or (image if isinstance(image, (str, Path, Image.Image)) else "the picture")
    try:
        with warnings.catch_warnings(action="ignore"):  # of Pillow about harmless damage
            if isinstance(image, Image.Image):
                pass
            elif is_dicom(image):
                from dicom import dicom_image
                image = dicom_image(image)
            else:
                with Image.open(image) as opened:
                    if opened.width * opened.height > Image.MAX_IMAGE_PIXELS:
                        raise ValueError(f"{opened.width} x {opened.height} pixels: taken for a decompression bomb (at most {Image.MAX_IMAGE_PIXELS}: scale it down first)")
                    opened.load()
                    image = opened
            image = ImageOps.exif_transpose(image)
        if image.mode == "F":
            raise ValueError("floating-point pixels have no agreed range: save it with 8 or 16 bits")
        if image.mode.startswith("I"):  # I;16 and its byte orders, and I, which older files of 16 bits open as
            return Image.fromarray((np.asarray(image).astype(np.int64).clip(0, 65535) >> 8).astype(np.uint8)).convert("RGB")
        return image.convert("RGB")
    except FileNotFoundError:
        raise FileNotFoundError(f"no such picture: {name}") from None
    except Exception as error:  # the decoders raise many kinds for a damaged file, and each means this
        raise ValueError(f"{name}: the picture does not decode ({one_line(error)})") from None


def preprocess_image(image, size=336, mode="pad"):
    """float32 (3, size, size) of a picture (path or PIL image). mode "pad": centred on a square of the mean colour, then resized;
    "crop": shorter side to `size`, then the middle (released stage 1; cuts composites of several pictures).

    Bit for bit what transformers' PIL CLIP and LLaVA processors give; rounding as there: sizes truncated, offsets floored.
    """
    image, name = open_image(image), getattr(image, "filename", None) or image
    width, height = image.size
    longest = max(width, height) if mode == "pad" else size * max(width, height) // min(width, height)
    if longest > 16384:  # a line of 100000 x 1 pixels would need a square of 30 GB
        raise ValueError(f"{name}: a picture of {width} x {height} pixels is too long")
    if mode == "pad":
        side = max(width, height)
        square = Image.new("RGB", (side, side), PAD_COLOR)
        square.paste(image, ((side - width) // 2, (side - height) // 2))
        image = square.resize((size, size), Image.Resampling.BICUBIC)
    elif mode == "crop":
        short = min(width, height)
        image = image.resize((size * width // short, size * height // short), Image.Resampling.BICUBIC)
        left, top = (image.width - size) // 2, (image.height - size) // 2
        image = image.crop((left, top, left + size, top + size))
    else:
        raise ValueError(f"mode {mode!r} is unknown: pad or crop")
    channels = np.ascontiguousarray(np.asarray(image).transpose(2, 0, 1))  # (3, H, W) uint8
    return torch.from_numpy(np.stack([NORMALISED[c][channels[c]] for c in range(3)]))  # (3, H, W) float32


# --- 8. weights in --------------------------------------------------------------------------------------------------
# in: folders or files of any published layout; out: a model whose every parameter came from a named tensor

PARTS = ("llm", "vision_tower", "mm_projector")
DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "I64": "int64"}  # safetensors' spelling of torch's
EMBED = "model.embed_tokens.weight"
RENAMES = (  # names in files -> names here: patterns and what takes their place, tried one after the other
    (r"^base_model\.model\.", ""),                                                             # peft's addition
    (r"^(model\.)?vision_tower\.(vision_tower\.)?(vision_model\.)?", "vision_tower."),         # llava-hf of any age; original LLaVA nests it twice
    (r"^(vision_model\.)?(?=(embeddings|encoder|pre_layrnorm|post_layernorm)\.)", "vision_tower."),  # CLIP, older and as transformers 5 saves it
    (r"^(model\.)?multi_modal_projector\.linear_1\.", "mm_projector.0."),                      # llava-hf
    (r"^(model\.)?multi_modal_projector\.linear_2\.", "mm_projector.2."),
    (r"^model\.mm_projector\.", "mm_projector."),                                              # original LLaVA and the Qilin release
    (r"^(language_model\.model|model\.language_model)\.", "model."),                           # llava-hf up to 4.51, and since
    (r"^language_model\.(?=lm_head\.)", ""),
)
IGNORABLE = re.compile(  # what a checkpoint may hold that no model here needs
    r"rotary_emb\.inv_freq$"                     # computed, not stored, since transformers 4.32
    r"|embeddings\.position_ids$"                # 0, 1, 2, … in old CLIP files
    r"|^text_model\.|^(text|visual)_projection\.weight$|^logit_scale$")  # CLIP's text half


def our_name(name):
    """The name here of a tensor of a file; None when it has the form of none."""
    for pattern, ours in RENAMES:
        name = re.sub(pattern, ours, name)
    return name if name.startswith(("vision_tower.", "mm_projector.", "model.", "lm_head.")) else None


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
        tensors = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
        if not isinstance(tensors, dict) or not all(isinstance(n, str) and isinstance(t, torch.Tensor) and t.layout == torch.strided for n, t in tensors.items()):
            raise ValueError("not a dict from names to tensors")
        return list(tensors.items())
    except Exception as error:  # the readers raise many kinds for a damaged file, and each means this
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
                    raise ValueError(f"{file}: {name} is also in {self.tensors[ours][0].name} (as {self.tensors[ours][1]})")
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
                if not isinstance(names, dict) or not names or any(not isinstance(n, str) or n != Path(n).name for n in names.values()):
                    raise ValueError(f"{self.path / index}: no weight_map from tensors to files beside it")
                files = [self.path / name for name in sorted(set(names.values()))]
                missing = [f.name for f in files if not f.is_file()]
                if missing:
                    raise FileNotFoundError(f"{self.path / index} names {missing[0]}, which is not there ({len(missing)} of {len(files)} files are missing)")
                return files
        for name in ("model.safetensors", "pytorch_model.bin", "projector.safetensors", "mm_projector.bin"):
            if (self.path / name).is_file():
                return [self.path / name]
        raise FileNotFoundError(f"no weights in {self.path}: neither model.safetensors nor pytorch_model.bin, nor an index of shards")

    def shape(self, name):
        tensor = self.tensors[name][2]
        return tuple(tensor.shape if isinstance(tensor, torch.Tensor) else tensor.get_shape())

    def dtype(self, name):
        tensor = self.tensors[name][2]
        return str(tensor.dtype)[6:] if isinstance(tensor, torch.Tensor) else DTYPES.get(tensor.get_dtype(), tensor.get_dtype())

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
    size, rank = mesh.size(mesh.ndim - 1), mesh.get_local_rank(mesh.ndim - 1)  # the last dimension shards, one before it replicates
    chunk = -(-param.shape[0] // size)
    return min(rank * chunk, param.shape[0]), min((rank + 1) * chunk, param.shape[0])


class QuantizedLinear(nn.Module):
    """A bias-free nn.Linear with its weight in 8 or 4 bits a number, widened to the activations' dtype when it multiplies.

    weight int8 (out, in * bits / 8), at 4 bits two numbers a byte; scale (out, in / group) in the model's dtype: one a row at 8 bits, one for
    every 64 inputs at 4. Symmetric, rounded to nearest: a weight moves by at most half its scale. On a CPU, one token a row is multiplied with the
    8-bit numbers as they are, activations in bfloat16: decoding waits for memory, of which this reads a quarter. Elsewhere it saves memory only.
    """

    def __init__(self, in_features, out_features, bits):
        super().__init__()
        self.shape, self.bits, self.group = (out_features, in_features), bits, in_features if bits == 8 else math.gcd(in_features, 64)
        if in_features * bits % 8:
            raise ValueError(f"int4 packs two numbers a byte, but a layer has {in_features} inputs: use int8")
        self.weight = nn.Parameter(torch.empty(out_features, in_features * bits // 8, dtype=torch.int8), requires_grad=False)
        self.register_buffer("scale", torch.empty(out_features, in_features // self.group), persistent=False)  # made from the weights anew, in no checkpoint

    def quantize_(self, weight):
        """Take over a float weight (out, in)."""
        largest = 2 ** (self.bits - 1) - 1
        groups = weight.to(self.weight.device).float().unflatten(1, (-1, self.group))  # (out, in / group, group)
        self.scale.copy_(groups.abs().amax(-1).clamp_min(1e-12) / largest)
        x = (groups / self.scale.float()[..., None]).round().clamp(-largest, largest).to(torch.int8).flatten(1)  # (out, in)
        self.weight.copy_(x if self.bits == 8 else (x[:, ::2] & 15) | (x[:, 1::2] << 4))

    def dequantize(self, dtype):
        """The weight as floats (out, in), as close as its bits allow."""
        weight = self.weight
        if self.bits == 4:
            weight = torch.stack((weight << 4 >> 4, weight >> 4), dim=-1).flatten(1)  # (out, in): shifts of int8 keep the sign
        weight = weight.to(dtype).unflatten(1, (-1, self.group)) * self.scale[..., None]  # (out, in / group, group): scaled before the sum, which would leave float16's range
        return weight.flatten(1)

    def forward(self, x):
        # torch's kernel reads 32 inputs at a time, past the end of a row that holds no multiple of them
        if self.bits == 8 and x.shape[-2] == 1 and x.device.type == "cpu" and x.shape[-1] % 32 == 0 and not torch.is_grad_enabled():
            y = torch._weight_int8pack_mm(x.reshape(-1, x.shape[-1]).bfloat16(), self.weight, self.scale.flatten().bfloat16())  # (B, out)
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
            out_features, in_features = linear.shape if isinstance(linear, QuantizedLinear) else linear.weight.shape
            linear.lora_A, linear.lora_B = nn.Parameter(torch.empty(rank, in_features)), nn.Parameter(torch.zeros(out_features, rank))
            linear.lora_scale = alpha / rank
            linear.register_forward_hook(lambda layer, x, y: y + layer.lora_scale * F.linear(F.linear(x[0], layer.lora_A), layer.lora_B))


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
    is_linear, is_tied = model.config.projector_type == "linear", model.config.text.tie_word_embeddings
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters() if part_of(name) != "lora" and not (fresh and part_of(name) == "mm_projector")}
    quantized = {f"{name}.weight": m for name, m in model.named_modules() if hasattr(m, "quantize_")}
    found, skipped = {}, 0
    for files, parts in sources:
        if files.unknown:
            raise ValueError(f"{files.path}: tensors that this model has no place for: {named_list(files.unknown)}")
        for name in files.tensors:
            if part_of(name) not in parts:
                skipped += 1
            elif is_tied and name == "lm_head.weight" and EMBED in files.tensors:
                rows = files.shape(EMBED)[0]
                if files.shape(name) != files.shape(EMBED) or not all(
                        torch.equal(files.rows(name, i, i + 4096).float(), files.rows(EMBED, i, i + 4096).float()) for i in range(0, rows, 4096)):
                    raise ValueError(f"{files.path}: tie_word_embeddings is true, but lm_head.weight is not embed_tokens.weight")
                files.ignored.append(name)
            elif is_tied and name == "lm_head.weight":  # the one copy was saved under the head's name
                found[EMBED] = files, name
            elif is_linear and name.startswith("mm_projector.2."):  # llava-hf has no linear projector: ours goes out as linear_1, and an identity as linear_2
                want = torch.eye(model.config.text.hidden_size) if name.endswith("weight") else torch.zeros(model.config.text.hidden_size)
                if files.shape(name) != want.shape or not torch.equal(files.rows(name).float(), want):
                    raise ValueError(f"{files.path}: {name} is no identity, so this is not a linear projector")
            else:
                found[name.replace("mm_projector.0.", "mm_projector.") if is_linear else name] = files, name
    for problem, names in (("missing", shapes.keys() - found.keys()), ("tensors that this model has no place for:", found.keys() - shapes.keys())):
        if names:
            raise ValueError(f"{where}: {problem} {named_list(names)}")
    for name, (files, key) in found.items():
        want = quantized[name].shape if name in quantized else shapes[name]
        if files.shape(key) != want:
            raise ValueError(f"{files.path}: {name} is {files.shape(key)} in the file, {want} by the config")
    return found, (f"{len(found)} tensors loaded, {skipped} skipped (part given elsewhere), {sum(len(files.ignored) for files, _ in sources)} ignorable, "
                   f"none missing, none left over{', fresh projector' * fresh}")


def is_finite(tensor):
    return all(extreme.isfinite() for extreme in torch.aminmax(tensor))  # one pass, nothing allocated; aminmax passes nan on


@torch.no_grad()
def check_finite(model, dtype=None):
    """ValueError that names the parameters holding inf or nan, or that would in `dtype`."""
    if names := [name for name, p in model.named_parameters() if p.is_floating_point() and not is_finite(p.to(dtype or p.dtype))]:
        raise ValueError(f"values that are not finite in {named_list(names)}: the weights are damaged{f', or too large for {dtype}' if dtype else ''}")


@torch.no_grad()
def load_weights(model, sources, device, fresh=False, seed=0):
    """Give a model on the meta device (sharded or not, any dtype) memory on `device` and fill every parameter from the files;
    -> the line of account(), whose errors come before any memory is taken. ValueError as well when a tensor holds no finite floats.

    fresh: the projector is in no file and comes from init_fresh with `seed`, as LoRA adapters do.
    """
    found, line = account(model, sources, fresh)
    quantized = {f"{name}.weight": m for name, m in model.named_modules() if hasattr(m, "quantize_")}
    # what to_empty does; a plain tensor without its empty_like, which makes torch import for half a second
    model._apply(lambda t: torch.empty_like(t, device=device) if hasattr(t, "to_local") else torch.empty(t.shape, dtype=t.dtype, device=device))
    for name, (files, key) in found.items():
        param = model.get_parameter(name)
        start, stop = local_rows(param) if name not in quantized else (0, None)
        if stop == start:
            continue
        rows = files.rows(key, start, stop)
        # of a large tensor a sample is looked at, since what is mapped need not be read yet; generate() and convert.py find the rest
        if not rows.is_floating_point() or not is_finite(rows.flatten()[:: 1 + rows.numel() // 4096] if rows.numel() > 65536 and rows.is_contiguous() else rows):
            raise ValueError(f"{files.tensors[key][0]}: {files.tensors[key][1]} holds {'values that are not finite' if rows.is_floating_point() else str(rows.dtype)}")
        if name in quantized:
            quantized[name].quantize_(rows)
        elif (rows.dtype, rows.device) == (param.dtype, param.device) and rows.is_contiguous() and not hasattr(param, "to_local"):
            param.data = rows  # no copy: the parameter is the file, mapped into memory; writing to it changes pages of our own
        else:
            (param.to_local() if hasattr(param, "to_local") else param).copy_(rows)
    init_fresh(model, seed, projector=fresh)
    return line


def folder_config(path):
    """(config.json as a dict, its path) of a model's folder, or of the folder that a weight file lies in."""
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"no such folder or file: {path}")
    file = (path if path.is_dir() else path.parent) / "config.json"
    if not file.is_file():
        raise FileNotFoundError(f"no config.json in {file.parent}: it tells the sizes of the model")
    raw = read_json(file)
    if not isinstance(raw, dict):
        raise ValueError(f"{file}: not a JSON object")
    return raw, file


def find_tower(name, model):
    """The folder of the tower that an original LLaVA config names by a path or hub name: beside the checkpoint, from here, or in weights/; or None."""
    folder, last = model if model.is_dir() else model.parent, Path(str(name)).name
    places = (folder / str(name), folder / last, folder.parent / last, Path(str(name)), Path("weights") / last)
    return next((place for place in places if last and (place / "config.json").is_file()), None)


def tower_config(files):
    """VisionConfig by the shapes of a tower whose config.json is nowhere: heads of 64, as in every CLIP."""
    layers = {name.split(".")[3] for name in files.tensors if name.startswith("vision_tower.encoder.layers.")}
    names = ("embeddings.patch_embedding.weight", "embeddings.position_embedding.weight", "encoder.layers.0.mlp.fc1.weight")
    if missing := [name for name in names if "vision_tower." + name not in files.tensors]:
        raise ValueError(f"{files.path}: missing {named_list(missing)} of its vision tower")
    (hidden, _, _, patch), (n_positions, _), (intermediate, _) = (files.shape("vision_tower." + name) for name in names)
    return VisionConfig(hidden, intermediate, len(layers), max(1, hidden // 64), math.isqrt(n_positions - 1) * patch, patch)


def read_checkpoint(model=None, *, llm=None, vision=None, projector=None, projector_type="linear"):
    """(QilinConfig, sources for load_weights, fresh): what the given paths hold together, before any weight is read.

    model: a folder or file of any layout, or a train.py --out folder; llm, vision, projector: parts given beside it, which override.
    fresh: True when no projector was given or found, or projector == "fresh": it is then made by init_fresh.
    """
    raw, where, given = {}, None, {}
    if model is not None:
        model = model_folder(model)
        if (model / "projector.safetensors").exists() and not (model / "config.json").exists():
            raise ValueError(f"{model} holds only a projector (stage 1): give it as --projector, with --llm and --vision")
        raw, where = folder_config(model)
        given = dict.fromkeys(PARTS, model)
    llm, vision, projector = (path if path in (None, "fresh") else model_folder(path) for path in (llm, vision, projector))
    given.update({part: path for part, path in zip(PARTS, (llm, vision, projector)) if path is not None})
    inner = raw.get("text_config", raw)
    if inner is not raw and "tie_word_embeddings" in raw and isinstance(inner, dict):
        inner = dict(inner, tie_word_embeddings=raw["tie_word_embeddings"])  # in llava-hf the outer one counts
    llm_raw, llm_where = folder_config(llm) if llm else (None, None)
    text = text_config(llm_raw.get("text_config", llm_raw), llm_where) if llm else text_config(inner, where) if raw else None
    tower = vision_config(*folder_config(vision)) if vision else vision_config(raw, where) if "vision_config" in raw else None
    files = {model: WeightFiles(model)} if model in given.values() else {}
    if tower is None and model is not None:  # original LLaVA: the tower inside, or named by a path
        place, is_inside = find_tower(raw.get("mm_vision_tower", ""), model), any(part_of(name) == "vision_tower" for name in files[model].tensors)
        if place or is_inside:
            tower = vision_config(*folder_config(place)) if place else tower_config(files[model])
            given["vision_tower"] = model if is_inside else place
        elif "mm_vision_tower" in raw:
            raise ValueError(f"{where} names the vision tower {raw['mm_vision_tower']!r}, which is neither in the checkpoint nor beside it, here or in weights/: give --vision DIR")
    if text is None or tower is None:
        raise ValueError("a model needs a language model and a vision tower: give a whole model, or "
                         + " and ".join(option for option, config in (("--llm DIR", text), ("--vision DIR", tower)) if config is None))
    layer = raw.get("vision_feature_layer", raw.get("mm_vision_select_layer", -2))
    if type(layer) is not int or not -tower.num_hidden_layers - 1 <= layer <= tower.num_hidden_layers:
        raise ValueError(f"{where}: vision_feature_layer = {layer!r} is not a layer of this tower")
    tower.select_layer = layer
    for key, allowed in (("model_type", ("llava", "llava_llama", "llama")), ("vision_feature_select_strategy", ("default",)), ("mm_vision_select_feature", ("patch",)),
                         ("projector_hidden_act", ("gelu", "linear")), ("mm_use_im_start_end", (False,))):
        if raw.get(key) not in (None, *allowed):
            raise ValueError(f"{where}: {key} = {raw[key]!r} is not implemented here (only {' or '.join(map(str, allowed))})")

    files.update({path: WeightFiles(path) for path in dict.fromkeys(given.values()) if path != "fresh" and path not in files})
    sources = [(f, {part for part in given if given[part] == path}) for path, f in files.items()]
    source = files.get(given.get("mm_projector"))
    found = [name for name in source.tensors if part_of(name) == "mm_projector"] if source else []
    if not found and (source if projector else raw.keys() & {"vision_config", "mm_vision_tower"}) and projector != "fresh":
        raise ValueError(f"{source.path}: no projector in it (names mm_projector.* or multi_modal_projector.*)"
                         + ("" if projector else "; --projector FILE gives one, --projector fresh starts one"))
    if found:
        beside = source.path.with_name("config.json") if source.path.is_file() else source.path / "config.json"
        is_linear = "mm_projector.weight" in found or (beside.is_file() and folder_config(source.path)[0].get("projector_hidden_act") == "linear")
        projector_type = "linear" if is_linear else "mlp2x_gelu"
    config = QilinConfig(text, tower, projector_type, text.vocab_size, "crop" if raw.get("image_aspect_ratio") == "crop" else "pad")
    folder = Path(given["llm"]) if Path(given["llm"]).is_dir() else Path(given["llm"]).parent
    if (folder / "tokenizer.model").is_file():
        tokenizer = Tokenizer(folder)
        if tokenizer.vocab_size > text.vocab_size:
            raise ValueError(f"{tokenizer.path} has {tokenizer.vocab_size} pieces, but the model only {text.vocab_size} rows for them")
        config.n_token_ids = tokenizer.vocab_size
        text.more_end_ids = tuple({*text.more_end_ids, tokenizer.eos_id} - {text.eos_token_id})  # the tokenizer's is what training teaches to say
    elif llm is None and type(picture_id := raw.get("image_token_index", raw.get("image_token_id"))) is int and picture_id > 0:
        config.n_token_ids = min(text.vocab_size, picture_id)  # a llava-hf export without tokenizer: the picture token comes right after it
    return config, sources, not found


def load_qilin(model=None, *, llm=None, vision=None, projector=None, projector_type="linear", dtype=torch.float32, device="cpu", quantize=None):
    """A Qilin in eval mode from real weights.

    model: one folder or file of any layout, also a train.py --out folder; or llm + vision folders. projector: a file, or None for the
    one inside `model`, else a fresh one of projector_type ("linear" | "mlp2x_gelu") from a fixed seed. Parts given beside `model` override
    that part. quantize: "int8" or "int4" stores the linear layers of the decoder blocks so, each quantised as it is read; tower, projector,
    embeddings and head stay in dtype. ValueError or FileNotFoundError says which file or tensor is wrong: no weight is ever left at random.
    """
    if quantize not in (None, "int8", "int4"):
        raise ValueError(f"quantize {quantize!r} is unknown: int8 or int4")
    config, sources, fresh = read_checkpoint(model, llm=llm, vision=vision, projector=projector, projector_type=projector_type)
    with torch.device("meta"):
        qilin = Qilin(config)
        if quantize:
            quantize_linears(qilin, int(quantize[3:]))
        qilin = qilin.to(dtype)
    load_weights(qilin, sources, device, fresh)
    return qilin.eval()


# --- 9. weights out -------------------------------------------------------------------------------------------------
# in: a model, sharded or not; out: a llava-hf folder that transformers 4.57 and 5, vLLM and we load

SHARD_BYTES = 5_000_000_000
HF_PREFIXES = (  # ours -> the older llava-hf names, which every transformers reads
    ("vision_tower.", "vision_tower.vision_model."), ("model.", "language_model.model."), ("lm_head.", "language_model.lm_head."),
    ("mm_projector.0.", "multi_modal_projector.linear_1."), ("mm_projector.2.", "multi_modal_projector.linear_2."),
    ("mm_projector.", "multi_modal_projector.linear_1."))


def hf_name(name):
    """The llava-hf name of one of our parameters."""
    return next(theirs + name[len(ours):] for ours, theirs in HF_PREFIXES if name.startswith(ours))


def full_tensors(model, names=None, dtype=None):
    """Yield (name, whole tensor on CPU) one by one; on a sharded model every rank must iterate, and rank 0 alone gets tensors, the others None.
    LoRA adapters are added to their layer's weight; that of a quantised layer is what its bits stood for in training, not what they were rounded from."""
    def whole(param, dtype):
        full = param.detach().to(dtype)  # cast first: half the traffic
        return full.full_tensor() if hasattr(full, "full_tensor") else full

    is_rank0 = not dist.is_initialized() or dist.get_rank() == 0
    for name, param in model.named_parameters():
        if part_of(name) != "lora" and (names is None or name.startswith(names)):
            layer = model.get_submodule(name.rpartition(".")[0])
            if hasattr(layer, "lora_A"):
                base = layer.dequantize(torch.float32) if isinstance(layer, QuantizedLinear) else whole(param, torch.float32)
                full = (base.float() + layer.lora_scale * (whole(layer.lora_B, torch.float32) @ whole(layer.lora_A, torch.float32))).to(dtype or torch.float32)
            else:
                full = whole(param, dtype or param.dtype)
            yield name, full.cpu().contiguous() if is_rank0 else None


def save_qilin(model, tokenizer, path, dtype=None, made_from="weights in memory"):
    """Write `model` as a llava-hf folder: safetensors shards of at most 5 GB, config, tokenizer and processor files.

    tokenizer: a Tokenizer, or None (then no tokenizer files). dtype: of the floats on disk (None: as they are). made_from: for its README.md.
    On a sharded model every rank calls it; tensors are gathered one at a time and rank 0 writes, beside, then renames.
    The picture token is the first id past the tokenizer; rows are padded to a multiple of 64 with copies of <unk>'s.
    A linear projector has no llava-hf class: it is written as linear_1, an identity as linear_2, and a linear activation, which is equal.
    """
    config = model.config
    if any(isinstance(module, QuantizedLinear) and not hasattr(module, "lora_A") for module in model.modules()):
        raise ValueError("a quantised model cannot be saved: load it without quantize")
    check_replaceable(path, "config.json")
    path, partial = Path(path), Path(path).with_name(Path(path).name + ".partial")
    is_rank0 = not dist.is_initialized() or dist.get_rank() == 0
    n_token_ids = tokenizer.vocab_size if tokenizer else config.n_token_ids
    n_rows = max(config.text.vocab_size, -(-(n_token_ids + 1) // 64) * 64)
    if is_rank0:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    shards, sizes, shard, total = [], {}, {}, 0

    def close_shard():
        save_tensors(shard, partial / f"shard-{len(shards)}")
        shards.append(sorted(shard))
        shard.clear()

    for name, full in full_tensors(model, dtype=dtype):
        if not is_rank0:
            continue
        out = {hf_name(name): full}
        if name in (EMBED, "lm_head.weight"):
            out = {hf_name(name): torch.cat((full, full[:1].expand(n_rows - len(full), -1)))}
        elif config.projector_type == "linear" and name.startswith("mm_projector."):
            second = torch.eye(len(full), dtype=full.dtype) if name.endswith("weight") else torch.zeros_like(full)
            out[hf_name(name).replace("linear_1", "linear_2")] = second
        for key, tensor in out.items():
            if shard and sum(t.nbytes for t in shard.values()) + tensor.nbytes > SHARD_BYTES:
                close_shard()
            shard[key], sizes[key], total = tensor, tensor.nbytes, total + tensor.nbytes
    if is_rank0:
        close_shard()
        names = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" if len(shards) > 1 else "model.safetensors" for i in range(len(shards))]
        for i, name in enumerate(names):
            (partial / f"shard-{i}").rename(partial / name)
        if len(shards) > 1:
            weight_map = {key: name for name, keys in zip(names, shards) for key in keys}
            write_json(partial / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))})
        dtype_name = str(dtype or next(model.parameters()).dtype).removeprefix("torch.")
        for file, value in hf_configs(config, n_token_ids, n_rows, dtype_name).items():
            write_json(partial / file, value)
        write_text(partial / "README.md", MODEL_CARD.format(made_from=made_from, n=sum(p.numel() for p in model.parameters()) / 1e9, dtype=dtype_name, projector=config.projector_type))
        if tokenizer:
            save_tokenizer(tokenizer, partial)
        replace_folder(partial, path)
    if dist.is_initialized():
        dist.barrier()


MODEL_CARD = """---
language: [zh, en]
pipeline_tag: image-text-to-text
library_name: transformers
---
# A Qilin-Med-VL model

Made from {made_from} by qilin-min: CLIP ViT, a {projector} projector and a LLaMA-2 decoder, {n:.3g} billion parameters in {dtype}.

Research only. This model gives no medical advice, must not be used to diagnose or treat anyone, and may be wrong in every sentence.
仅供研究。本模型不提供医疗建议，不得用于诊断或治疗，其任何一句话都可能有误。

```python
from transformers import AutoProcessor, LlavaForConditionalGeneration
processor, model = AutoProcessor.from_pretrained("."), LlavaForConditionalGeneration.from_pretrained(".")
messages = [{{"role": "user", "content": [{{"type": "image", "path": "image.png"}}, {{"type": "text", "text": "图中有什么异常？"}}]}}]
inputs = processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt")
print(processor.decode(model.generate(**inputs, max_new_tokens=200)[0], skip_special_tokens=True))
```

or `python sample.py image.png "图中有什么异常？" --model .` with qilin-min, or `vllm serve .` for many users.

Licences: those of the parts hold. LLaMA-2 weights come under the LLaMA 2 Community License, CLIP's under MIT; data and fine-tuned parts under what their
sources say. Method: Qilin-Med-VL, arXiv 2310.17956; LLaVA, arXiv 2304.08485.
"""


def hf_configs(config, n_token_ids, n_rows, dtype_name):
    """The JSON files beside the weights: {file name: content}."""
    text, vision = config.text, config.vision
    text_json = {f.name: getattr(text, f.name) for f in fields(text)}
    ends = config.end_ids if text_json.pop("more_end_ids") else text.eos_token_id
    text_json.update(eos_token_id=ends, model_type="llama", architectures=["LlamaForCausalLM"], vocab_size=n_rows, hidden_act="silu", torch_dtype=dtype_name)
    vision_json = {f.name: getattr(vision, f.name) for f in fields(vision) if f.name != "select_layer"}
    vision_json.update(model_type="clip_vision_model", projection_dim=vision.hidden_size, torch_dtype=dtype_name)
    size, is_pad = {"height": vision.image_size, "width": vision.image_size}, config.image_mode == "pad"
    return {
        "config.json": {
            "architectures": ["LlavaForConditionalGeneration"], "model_type": "llava", "torch_dtype": dtype_name,
            "image_token_index": n_token_ids, "image_seq_length": config.n_image_tokens, "tie_word_embeddings": text.tie_word_embeddings,
            "projector_hidden_act": "linear" if config.projector_type == "linear" else "gelu", "multimodal_projector_bias": True,
            "image_aspect_ratio": config.image_mode, "vision_feature_layer": vision.select_layer, "vision_feature_select_strategy": "default",
            "text_config": text_json, "vision_config": vision_json},
        "generation_config.json": {  # filler rows and the picture token are never said
            "bos_token_id": text.bos_token_id, "eos_token_id": ends, "pad_token_id": 0,
            "suppress_tokens": list(range(n_token_ids, n_rows))},
        "preprocessor_config.json": {
            "image_processor_type": "LlavaImageProcessor", "processor_class": "LlavaProcessor", "do_pad": is_pad, "do_resize": True,
            "size": size if is_pad else {"shortest_edge": vision.image_size}, "resample": 3, "do_center_crop": not is_pad, "crop_size": size, "do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": True,
            "image_mean": CLIP_MEAN, "image_std": CLIP_STD, "do_convert_rgb": True},
        "processor_config.json": {
            "processor_class": "LlavaProcessor", "image_token": IMAGE_TOKEN, "patch_size": vision.patch_size,
            "num_additional_image_tokens": 1, "vision_feature_select_strategy": "default"}}


CHAT_TEMPLATE = (  # build_prompt as a Jinja template: pictures of a turn in front, each with a newline
    "{{ bos_token + '" + SYSTEM.replace("'", "\\'") + " ' }}"
    "{% for message in messages %}{% if message['role'] == 'user' %}{{ 'USER: ' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% set text = message['content'] | selectattr('type', 'equalto', 'text') | map(attribute='text') | join %}"
    "{% for part in message['content'] if part['type'] == 'image' %}{{ '<image>' if loop.last and not text else '<image>\n' }}{% endfor %}"
    "{% for part in message['content'] if part['type'] == 'text' %}{{ part['text'] }}{% endfor %}{% endif %}{{ ' ASSISTANT:' }}"
    "{% else %}{{ ' ' }}{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] if part['type'] == 'text' %}{{ part['text'] }}{% endfor %}{% endif %}{{ eos_token }}{% endif %}{% endfor %}")


def save_tokenizer(tokenizer, folder):
    """tokenizer.model, and tokenizer.json with the same pieces, which every transformers reads alike (given only the first, version 5
    encodes what follows <image> and </s> differently). The blank in front comes from a Prepend normaliser, once per text between control ids."""
    sp = tokenizer.sp
    shutil.copyfile(tokenizer.path, folder / "tokenizer.model")
    vocab = {sp.id_to_piece(i): i for i in range(sp.vocab_size())}
    merges = []
    for piece, i in vocab.items():
        if not (sp.is_byte(i) or sp.is_control(i) or sp.is_unknown(i)):
            pairs = [(piece[:k], piece[k:]) for k in range(1, len(piece)) if piece[:k] in vocab and piece[k:] in vocab]
            merges += [(-sp.get_score(i), vocab[left], vocab[right], left, right) for left, right in pairs]
    added = [{"id": i, "content": content, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
             for i, content in ((0, sp.id_to_piece(0)), (1, sp.id_to_piece(1)), (2, sp.id_to_piece(2)), (sp.vocab_size(), IMAGE_TOKEN))]
    bos, bos_id = sp.id_to_piece(sp.bos_id()), sp.bos_id()
    write_json(folder / "tokenizer.json", {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": added, "pre_tokenizer": None,
        "normalizer": {"type": "Sequence", "normalizers": [
            {"type": "Prepend", "prepend": "▁"}, {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}]},
        "post_processor": {
            "type": "TemplateProcessing", "special_tokens": {bos: {"id": bos, "ids": [bos_id], "tokens": [bos]}},
            "single": [{"SpecialToken": {"id": bos, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [{"SpecialToken": {"id": bos, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}]},
        "decoder": {"type": "Sequence", "decoders": [
            {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}, {"type": "ByteFallback"}, {"type": "Fuse"},
            {"type": "Strip", "content": " ", "start": 1, "stop": 0}]},
        "model": {"type": "BPE", "dropout": None, "unk_token": sp.id_to_piece(0), "continuing_subword_prefix": None, "end_of_word_suffix": None,
                  "fuse_unk": True, "byte_fallback": True, "ignore_merges": False, "vocab": vocab, "merges": [list(m[3:]) for m in sorted(merges)]}})
    write_json(folder / "tokenizer_config.json", {
        "tokenizer_class": "PreTrainedTokenizerFast", "processor_class": "LlavaProcessor", "bos_token": bos, "eos_token": sp.id_to_piece(sp.eos_id()),
        "unk_token": sp.id_to_piece(0), "pad_token": sp.id_to_piece(0), "clean_up_tokenization_spaces": False, "padding_side": "right",
        "image_token": IMAGE_TOKEN, "extra_special_tokens": {"image_token": IMAGE_TOKEN}, "model_max_length": 2048})
    write_json(folder / "special_tokens_map.json", {
        "bos_token": bos, "eos_token": sp.id_to_piece(sp.eos_id()), "unk_token": sp.id_to_piece(0), "pad_token": sp.id_to_piece(0)})
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")


# --- 10. generation --------------------------------------------------------------------------------------------------
# in: prompts of different lengths; out: one new id a row a step, until every row has said its end id


def pad_rows(rows, value):
    """int64 (B, T) from lists of int of different lengths, padded on the right with `value`."""
    length = max(map(len, rows))
    return torch.tensor([row + [value] * (length - len(row)) for row in rows], dtype=torch.int64)  # (B, T)


def sample_next_token(logits, seen, temperature=0.0, top_p=1.0, top_k=0, repetition_penalty=1.0, generator=None):
    """int64 (B,) from logits float32 (B, V). temperature 0: the likeliest. seen bool (B, V): ids that repetition_penalty makes less likely
    (divides positive logits, multiplies negative ones: CTRL, arXiv 1909.05858). top_k, then top_p, cut the tail before drawing."""
    if repetition_penalty != 1.0:
        logits = torch.where(seen, torch.where(logits > 0, logits / repetition_penalty, logits * repetition_penalty), logits)
    if temperature < 1e-4:  # logits divided by less leave the range of float32
        return logits.argmax(-1)
    logits = logits / temperature
    if top_k:
        logits = logits.masked_fill(logits < logits.topk(min(top_k, logits.shape[-1])).values[:, -1:], -torch.inf)
    if top_p < 1.0:
        ranked, order = logits.sort(descending=True)
        probs = ranked.softmax(-1)
        ranked = ranked.masked_fill(probs.cumsum(-1) - probs >= top_p, -torch.inf)  # keeps the one that reaches top_p
        logits = torch.full_like(logits, -torch.inf).scatter(1, order, ranked)
    return torch.multinomial(logits.softmax(-1), 1, generator=generator)[:, 0]


@torch.no_grad()
def generate(model, input_ids, pixel_values=None, *, max_new_tokens, temperature=0.0, top_p=1.0, top_k=0, repetition_penalty=1.0,
             seed=None, stop=all, cache=None):
    """Yield one list of B new ids a step for B prompts (lists of int, from encode_prompt) and their pictures (M, 3, H, W).

    A row's end id is yielded, after that None. Rows of different lengths answer as each would alone. Ids past the tokenizer never come.
    stop: asked before each step with one bool a row (has it ended?); on a sharded model it must agree over ranks, since each step is a
    collective. A row ends as well after max_new_tokens or at the model's last position. ValueError when a prompt is empty or already fills the positions.
    cache: a KVCache of an earlier call that holds the beginning of each prompt, which is then not computed again; pictures are those of the rest.
    """
    device = next(model.parameters()).device
    limit, longest = model.config.text.max_position_embeddings, max(map(len, input_ids))
    if longest >= limit:
        raise ValueError(f"the prompt has {longest} tokens, the model's positions end at {limit}: ask a shorter question")
    if cache is None:
        cache = KVCache(model.config.text.num_hidden_layers, min(longest + max_new_tokens, limit))
    limit = min(limit, max(cache.max_length, longest))
    held = [0] * len(input_ids) if cache.lengths is None else cache.lengths.tolist()
    rest = [row[n:] for row, n in zip(input_ids, held)]
    if not all(rest) or longest > cache.max_length:
        raise ValueError("a prompt is empty, or the cache holds all of it, or it is longer than the cache")
    lengths = torch.tensor([len(row) for row in rest], device=device)
    ids = pad_rows(rest, 0).to(device)
    seen = torch.zeros(len(input_ids), model.config.text.vocab_size, dtype=torch.bool, device=device)
    for row, prompt in zip(seen, input_ids):
        row[[i for i in set(prompt) if i >= 0]] = True
    generator = None if seed is None else torch.Generator(device).manual_seed(seed)
    pixel_values = None if pixel_values is None else pixel_values.to(device)
    ended = [False] * len(input_ids)
    logits = model(ids, pixel_values, cache=cache, lengths=lengths)  # prefill: (B, V)
    for step in range(max_new_tokens):
        if step == 0 and not is_finite(logits):
            check_finite(model)
            raise ValueError("the model's logits are not finite, though its weights are: try another dtype")
        logits[:, model.config.n_token_ids:] = -torch.inf
        ids = sample_next_token(logits, seen, temperature, top_p, top_k, repetition_penalty, generator)  # (B,)
        seen[torch.arange(len(ids), device=device), ids] = True
        new = [None if end else i for end, i in zip(ended, ids.tolist())]
        yield new
        ended = [end or i in model.config.end_ids or len(row) + step + 1 >= limit for end, i, row in zip(ended, new, input_ids)]
        if stop(ended) or step == max_new_tokens - 1:
            return
        logits = model(ids[:, None], cache=cache, lengths=torch.tensor([int(not end) for end in ended], device=device))  # one token a row: (B, V)


def answer_ids(model, input_ids, pixel_values=None, **options):
    """The whole answers, end ids left out: a list of int for each prompt. Options as for generate()."""
    answers = [[] for _ in input_ids]
    for new in generate(model, input_ids, pixel_values, **options):
        for answer, i in zip(answers, new):
            if i is not None and i not in model.config.end_ids:
                answer.append(i)
    return answers


class StreamedAnswer:
    """Iterate for the text of one prompt's answer, piece by piece and in whole characters. Afterwards, also after an interruption:
    ids (list of int without the end id), n_new (with it), finish_reason: "stop" (an end id or a stop text, which is not shown) or "length".

    stop: texts at which the answer ends. Other options as for generate(), one prompt.
    """

    def __init__(self, model, tokenizer, prompt, pixel_values=None, stop=(), **options):
        self.ids, self.n_new, self.finish_reason = [], 0, "length"
        self.interrupted = False  # set it, from any thread, to end the answer at the next token
        self._decode = tokenizer.decode
        self._text = self._until_stop(tokenizer.decode_stream(self._new_ids(model, prompt, pixel_values, options)), stop)

    def __iter__(self):
        return self._text

    def _new_ids(self, model, prompt, pixel_values, options):
        for (i,) in generate(model, [prompt], pixel_values, **options):
            self.n_new += 1
            if i in model.config.end_ids:
                self.finish_reason = "stop"
                return
            if self.interrupted:
                return
            self.ids.append(i)
            yield i

    def _until_stop(self, texts, stop):
        text, n_shown = "", 0  # text: not shown yet
        for piece in texts:
            text += piece
            found = min((at for s in stop if (at := text.find(s)) >= 0), default=-1)
            if found >= 0:
                self.finish_reason = "stop"
                while self.ids and len(self._decode(self.ids)) > n_shown + found:  # a dialog must not go on from what nobody saw
                    self.ids.pop()
                yield text[:found]
                return
            n_held = max((n for s in stop for n in range(1, len(s)) if text.endswith(s[:n])), default=0)  # may become a stop text
            yield text[: len(text) - n_held]
            n_shown += len(text) - n_held
            text = text[len(text) - n_held:]
        yield text


# --- 11. command line -----------------------------------------------------------------------------------------------
# what sample.py, evaluate.py and serve.py ask for alike: which model, where, in which numbers


def add_model_flags(parser):
    group = parser.add_argument_group("model")
    add = group.add_argument
    add("--model", default=None, metavar="DIR", help="folder of a whole model: a train.py --out folder, llava-hf, original LLaVA or Qilin (default out/stage2)")
    add("--llm", default=None, metavar="DIR", help="LLaMA folder, in place of the one in --model")
    add("--vision", default=None, metavar="DIR", help="CLIP folder, likewise")
    add("--projector", default=None, metavar="FILE", help="projector file, likewise")
    add("--device", default=None, help="cuda, mps or cpu (default: the first there is)")
    add("--dtype", default=None, choices=("float32", "bfloat16", "float16"), help="default bfloat16 on cuda (float16 before Ampere), float16 on mps, float32 on cpu")
    add("--quantize", default=None, choices=("int8", "int4"), help="keep the linear layers of the language model's blocks in 8 or 4 bits (tower, projector, embeddings and "
        "head as they are): a quarter or an eighth of float32's memory; int8 also writes faster on a CPU")
    add("--compile", action="store_true", help="torch.compile the language model: faster on CUDA after a slow first answer; needs a C++ compiler")


def model_from_flags(args):
    """(model, tokenizer, device) as add_model_flags' options say. ValueError or FileNotFoundError says what to do."""
    if args.model is None and not (args.llm and args.vision):
        args.model = "out/stage2"
        if not Path(args.model).exists():
            raise FileNotFoundError("no model in out/stage2: train one (bash demo.sh shows how), or give --model DIR")
    if args.model is None and args.projector is None:
        raise ValueError("--llm and --vision need the projector between them: give --projector FILE (or fresh: untrained, its answers mean nothing)")
    device = args.device or ("cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu")
    try:
        torch.ones(1, device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(f"--device {device}: not to be had here ({one_line(error)[:100]})") from None
    kind = torch.device(device).type
    default = {"cuda": "bfloat16" if kind == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False) else "float16", "mps": "float16"}.get(kind, "float32")
    model = load_qilin(args.model, llm=args.llm, vision=args.vision, projector=args.projector, dtype=getattr(torch, args.dtype or default), device=device, quantize=args.quantize)
    if args.compile:
        model.model.compile(dynamic=True)  # in place, so that names stay
    return model, Tokenizer(args.llm or args.model), device
