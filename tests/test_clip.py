"""The vision tower gives the features of transformers' CLIP: the output of the last block but one,
without the class token.
"""

import pytest
import torch
from conftest import hf_clip, hf_clip_config, pictures, randomise
from safetensors.torch import load_file, save_file
from transformers import CLIPConfig, CLIPModel, CLIPTextConfig

from model_io.load import load_qilin


@torch.no_grad()
def difference(hf_tower, model):
    x = pictures(3)
    want = hf_tower(x, output_hidden_states=True).hidden_states[-2][:, 1:]
    assert want.std() > 0.1
    got = model.vision_tower(x)
    assert got.shape == want.shape and got.dtype == torch.float32
    return (got - want).abs().max()


@pytest.mark.parametrize("act", ["quick_gelu", "gelu"])
@pytest.mark.parametrize("prefix", ["", "vision_model."])
def test_features_equal_clip(act, prefix, llama_folder, tmp_path, report):
    tower = hf_clip(hidden_act=act)
    tower.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = {
        prefix + name.removeprefix("vision_model."): t for name, t in load_file(file).items()
    }  # older releases hold the level, transformers 5 not
    save_file(tensors, file, metadata={"format": "pt"})
    report(
        f"clip features ({act}, names {prefix or 'bare'})",
        difference(tower, load_qilin(llm=llama_folder, vision=tmp_path)),
        1e-4,
    )


def test_features_of_whole_clip_in_shards(llama_folder, tmp_path, report):
    text = CLIPTextConfig(
        vocab_size=50,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=16,
    )
    clip = randomise(
        CLIPModel(
            CLIPConfig(
                text_config=text.to_dict(),
                vision_config=hf_clip_config().to_dict(),
                projection_dim=24,
            )
        )
    )
    clip.save_pretrained(tmp_path, max_shard_size="100KB")
    assert (tmp_path / "model.safetensors.index.json").is_file()
    report(
        "clip features (CLIPModel with text tower, shards)",
        difference(clip.vision_model, load_qilin(llm=llama_folder, vision=tmp_path)),
        1e-4,
    )


@torch.no_grad()
def test_last_block_is_not_computed(llama_folder, clip_folder):
    model = load_qilin(llm=llama_folder, vision=clip_folder)
    x = pictures(2)
    before = model.vision_tower(x)
    for param in [
        *model.vision_tower.encoder.layers[-1].parameters(),
        *model.vision_tower.post_layernorm.parameters(),
    ]:
        param.fill_(torch.nan)
    assert torch.equal(model.vision_tower(x), before)
    next(model.vision_tower.encoder.layers[-2].parameters()).fill_(torch.nan)
    assert model.vision_tower(x).isnan().any()
