"""Random models of transformers in the published layouts, as large as parity needs, and the inputs
for them."""

from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import CLIPVisionConfig, CLIPVisionModel, LlamaConfig, LlamaForCausalLM

from qilin_min import IGNORE_INDEX, IMAGE_TOKEN_INDEX, pad_rows


@dataclass
class Shape:
    """Sizes of a model; each of its layers is like a real one's, there are only fewer."""

    width: int
    ffn: int
    blocks: int
    heads: int
    vocabulary: int
    tower_width: int
    tower_ffn: int
    tower_blocks: int
    tower_heads: int
    image: int
    # tokens of text in the longest row
    text: int

    @property
    def n_image_tokens(self) -> int:
        """Of one picture, in patches of 14 pixels."""
        return (self.image // 14) ** 2


# the paper's tower cut to 4 blocks, heads of 128 as LLaMA's
LARGE = Shape(1024, 2752, 4, 8, 32000, 1024, 4096, 4, 16, 336, 200)
TINY = Shape(64, 96, 2, 4, 320, 64, 96, 3, 4, 56, 20)


@torch.no_grad()
def randomise(model: torch.nn.Module, seed: int) -> None:
    """Weights large enough that every operation shows in the output: a fresh init hides a wrong
    norm or a missing bias."""
    generator = torch.Generator().manual_seed(seed)
    for name, param in model.named_parameters():
        noise = torch.randn(param.shape, generator=generator)
        if "norm" in name or "layrnorm" in name:
            centre = 1.0 if name.endswith("weight") else 0.0
            param.copy_(0.2 * noise + centre)
        elif param.ndim > 1:
            # 1 / sqrt(fan in), whatever the width
            param.copy_(noise * param[0].numel() ** -0.5)
        else:
            param.copy_(0.2 * noise)
    model.eval()


def save_llama(shape: Shape, n_kv_heads: int, folder: Path) -> None:
    """A LLaMA of transformers."""
    config = LlamaConfig(
        vocab_size=shape.vocabulary,
        hidden_size=shape.width,
        intermediate_size=shape.ffn,
        num_hidden_layers=shape.blocks,
        num_attention_heads=shape.heads,
        num_key_value_heads=n_kv_heads,
        max_position_embeddings=4096,
        rms_norm_eps=1e-5,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    model = LlamaForCausalLM(config)
    randomise(model, seed=n_kv_heads)
    model.save_pretrained(folder)


def save_clip(shape: Shape, folder: Path) -> None:
    """A vision tower of transformers."""
    config = CLIPVisionConfig(
        hidden_size=shape.tower_width,
        intermediate_size=shape.tower_ffn,
        num_hidden_layers=shape.tower_blocks,
        num_attention_heads=shape.tower_heads,
        image_size=shape.image,
        patch_size=14,
    )
    model = CLIPVisionModel(config)
    randomise(model, seed=1)
    model.save_pretrained(folder)


def text_ids(n: int, seed: int, vocabulary: int) -> list[int]:
    """n ids of words, no control id among them."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, vocabulary, (n,), generator=generator).tolist()


def pixels(n: int, size: int) -> torch.Tensor:
    """(n, 3, size, size)"""
    return torch.randn(n, 3, size, size, generator=torch.Generator().manual_seed(5))


@dataclass
class Batch:
    """Three rows with 0, 1 and 2 pictures, padded on the right."""

    # (3, T)
    ids: torch.Tensor
    # (3, height, width) each, in reading order
    pixel_values: torch.Tensor
    # (3, T)
    labels: torch.Tensor
    # (3, T), 1 at tokens, 0 at padding
    mask: torch.Tensor

    def on(self, device: torch.device) -> "Batch":
        return Batch(*(tensor.to(device) for tensor in vars(self).values()))


def batch_for(shape: Shape) -> Batch:
    """Labels leave out the pictures, the first tokens, and a stretch in the last row."""
    picture = [IMAGE_TOKEN_INDEX] * shape.n_image_tokens

    def words(n: int, seed: int) -> list[int]:
        return text_ids(n, seed, shape.vocabulary)

    half = shape.text // 2
    rows = [
        [1] + words(shape.text, 1),
        [1] + words(3, 2) + picture + words(half, 3),
        [1] + words(2, 4) + picture + words(4, 5) + picture + words(half, 6),
    ]
    ids = pad_rows(rows, 0)
    labels = pad_rows(rows, IGNORE_INDEX)
    labels[labels == IMAGE_TOKEN_INDEX] = IGNORE_INDEX
    labels[:, :4] = IGNORE_INDEX
    labels[2, -half // 2 :] = IGNORE_INDEX
    n_tokens = torch.tensor([len(row) for row in rows])
    mask = (torch.arange(ids.shape[1]) < n_tokens[:, None]).long()
    return Batch(ids, pixels(3, shape.image), labels, mask)
