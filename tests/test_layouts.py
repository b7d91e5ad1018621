"""Every published layout loads from the names inside it and gives the logits of transformers' LLaVA
with the same weights.
"""

import json
import re

import pytest
import torch
from conftest import ROW_PICTURES, ROWS, edit_json, hf_clip, hf_ids, make_qilin, pictures
from safetensors.torch import load_file, save_file
from transformers import LlavaForConditionalGeneration

import qilin_min as q
from model_io.export import save_qilin
from model_io.load import load_qilin

TEXT = dict(num_key_value_heads=4)
VISION = dict(
    hidden_size=128, intermediate_size=80, num_attention_heads=2
)  # heads of 64: what a tower without config is taken to have

# the original LLaVA nests the tower twice
NESTED_TOWER = "model.vision_tower.vision_tower.vision_model"


@pytest.fixture(scope="module", params=["linear", "mlp2x_gelu"])
def reference(request, tmp_path_factory):
    """(folder of a llava-hf export, its tensors, logits of transformers for each of ROWS, projector
    type).
    """
    folder = tmp_path_factory.mktemp("reference") / "out"
    save_qilin(make_qilin(request.param, TEXT, VISION, n_token_ids=320), None, folder)
    hf, x = (
        LlavaForConditionalGeneration.from_pretrained(folder, attn_implementation="eager").eval(),
        pictures(3),
    )
    with torch.no_grad():
        logits = [
            hf(
                input_ids=hf_ids(torch.tensor([row]), hf),
                pixel_values=x[ROW_PICTURES[i]] if i else None,
            ).logits[0, :, :320]
            for i, row in enumerate(ROWS)
        ]
    return folder, load_file(folder / "model.safetensors"), logits, request.param


@torch.no_grad()
def difference(model, logits):
    batch = model(q.pad_rows(ROWS, 0), pictures(3))[..., :320]
    return max((batch[i, : len(row)] - logits[i]).abs().max() for i, row in enumerate(ROWS))


def original(tensors, projector_type, tower):
    """Names of the released code: LLaMA's own, model.mm_projector, the tower nested twice; stale
    inv_freq among them.
    """
    out = {}
    for name, tensor in tensors.items():
        name = name.removeprefix("language_model.")
        name = name.replace(
            "vision_tower.vision_model.", "model.vision_tower.vision_tower.vision_model."
        )
        if projector_type == "linear":
            name = name.replace("multi_modal_projector.linear_1.", "model.mm_projector.")
            if "linear_2" in name:
                continue
        name = name.replace("multi_modal_projector.linear_1.", "model.mm_projector.0.").replace(
            "multi_modal_projector.linear_2.", "model.mm_projector.2."
        )
        if tower or "vision_tower" not in name:
            out[name] = tensor
    return (
        out
        | {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.ones(8) for i in range(2)}
        | ({f"{NESTED_TOWER}.embeddings.position_ids": torch.arange(17)[None]} if tower else {})
    )


def write_original(folder, reference, tower, tower_name, shards=1):
    source, tensors, _, projector_type = reference
    folder.mkdir(parents=True)
    raw = json.loads((source / "config.json").read_text())
    config = {k: v for k, v in raw["text_config"].items() if k not in ("architectures", "head_dim")}
    config.update(
        model_type="llava",
        architectures=["LlavaLlamaForCausalLM"],
        mm_vision_tower=tower_name,
        mm_hidden_size=128,
        mm_vision_select_layer=-2,
        use_mm_proj=True,
        mm_use_im_start_end=False,
        mm_use_im_patch_token=False,
        pretraining_tp=1,
        rope_scaling=None,
    )
    if projector_type != "linear":  # old linear ones say nothing of it
        config.update(
            mm_projector_type=projector_type,
            mm_vision_select_feature="patch",
            image_aspect_ratio="pad",
        )
    (folder / "config.json").write_text(json.dumps(config))
    tensors = list(original(tensors, projector_type, tower).items())
    files = {
        f"pytorch_model-{i + 1:05d}-of-{shards:05d}.bin"
        if shards > 1
        else "pytorch_model.bin": dict(tensors[i::shards])
        for i in range(shards)
    }
    for file, part in files.items():
        torch.save(part, folder / file)
    if shards > 1:
        (folder / "pytorch_model.bin.index.json").write_text(
            json.dumps(
                {"metadata": {}, "weight_map": {n: f for f, part in files.items() for n in part}}
            )
        )
    return folder


def write_clip(folder, reference):
    source, tensors, *_ = reference
    folder.mkdir(parents=True)
    raw = json.loads((source / "config.json").read_text())["vision_config"]
    (folder / "config.json").write_text(json.dumps(raw))
    save_file(
        {
            n.removeprefix("vision_tower."): t
            for n, t in tensors.items()
            if n.startswith("vision_tower.")
        },
        folder / "model.safetensors",
    )
    return folder


@pytest.mark.parametrize("shards", [1, 3])
def test_original_with_its_tower_inside(shards, reference, tmp_path, report):
    folder = write_original(
        tmp_path / "qilin", reference, True, "/nowhere/clip-vit-large-patch14-336", shards
    )
    model = load_qilin(folder)
    assert model.config.projector_type == reference[3] and model.config.vision.image_size == 56
    report(
        f"original LLaVA with tower, {reference[3]}, {shards} .bin",
        difference(model, reference[2]),
        1e-4,
    )


@pytest.mark.parametrize(
    "place",
    ["ckpt/clip-336", "clip-336", "work/clip-336", "work/weights/clip-336", "work/some/clip-336"],
)
def test_original_that_names_its_tower(place, reference, tmp_path, report, monkeypatch):
    """Tried beside the checkpoint, from the working directory, in weights/; --vision overrides it;
    nowhere is an error.
    """
    name = (
        "some/clip-336"
        if "some" in place
        else "openai/clip-336"
        if "weights" in place or "ckpt" in place
        else "clip-336"
    )
    folder = write_original(tmp_path / "ckpt", reference, False, name)
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    with pytest.raises(ValueError, match="clip-336.*--vision"):
        load_qilin(folder)
    clip = write_clip(tmp_path / place, reference)
    report(
        f"original LLaVA that names its tower ({place}, {reference[3]})",
        difference(load_qilin(folder), reference[2]),
        1e-4,
    )
    elsewhere = clip.rename(tmp_path / "elsewhere")
    report(
        f"original LLaVA with --vision ({reference[3]})",
        difference(load_qilin(folder, vision=elsewhere), reference[2]),
        1e-4,
    )


@pytest.mark.parametrize("width, name", [(96, "x"), (1280, "x"), (128, "laion/CLIP-ViT-L-14")])
def test_a_tower_of_which_only_shapes_are_known(width, name, tmp_path, reference):
    """Its heads and activation are OpenAI's, or to be told by its config.json."""
    vision = dict(VISION, hidden_size=width, num_hidden_layers=1, hidden_act="gelu")
    vision["num_attention_heads"] = 8
    export = tmp_path / "export"
    save_qilin(make_qilin(reference[3], TEXT, vision, n_token_ids=320), None, export)
    tensors = load_file(export / "model.safetensors")
    other = (export, tensors, None, reference[3])
    folder = write_original(tmp_path / "ckpt", other, True, name)
    edit_json(folder / "config.json", mm_vision_select_layer=-1)
    with pytest.raises(ValueError, match="own config.json"):
        load_qilin(folder)
    raw = json.loads((export / "config.json").read_text())["vision_config"]
    (folder / name).mkdir(parents=True)
    (folder / name / "config.json").write_text(json.dumps(raw))
    model = load_qilin(folder)
    assert model.config.vision.num_attention_heads == 8
    assert model.config.vision.hidden_act == "gelu"


def test_a_given_tower_overrides_the_one_inside(reference, tmp_path):
    folder = write_original(tmp_path / "ckpt", reference, True, "nowhere")
    hf_clip(hidden_size=128, num_attention_heads=2, seed=9).save_pretrained(tmp_path / "other")
    model = load_qilin(folder, vision=tmp_path / "other")
    other = load_file(tmp_path / "other/model.safetensors")
    assert torch.equal(
        model.vision_tower.embeddings.class_embedding,
        next(t for n, t in other.items() if n.endswith("class_embedding")),
    )


def test_llama_clip_and_projector_bin(reference, tmp_path, report):
    """What stage 1 of the released code leaves: mm_projector.bin beside a language model and a
    tower.
    """
    folder, clip = (
        write_original(tmp_path / "ckpt", reference, False, "x"),
        write_clip(tmp_path / "clip", reference),
    )
    tensors = torch.load(folder / "pytorch_model.bin", weights_only=True)
    torch.save(
        {n: t for n, t in tensors.items() if "mm_projector" in n}, tmp_path / "mm_projector.bin"
    )
    torch.save(
        {n: t for n, t in tensors.items() if "mm_projector" not in n}, folder / "pytorch_model.bin"
    )
    edit_json(folder / "config.json", model_type="llama", mm_vision_tower=None)
    model = load_qilin(llm=folder, vision=clip, projector=tmp_path / "mm_projector.bin")
    report(
        f"LLaMA .bin, CLIP, mm_projector.bin ({reference[3]})",
        difference(model, reference[2]),
        1e-4,
    )


SPELLINGS = {
    "4.52 and later": [
        (r"^vision_tower\.", "model.vision_tower."),
        (r"^multi_modal", "model.multi_modal"),
        (r"^language_model\.model\.", "model.language_model."),
        (r"^language_model\.lm_head", "lm_head"),
    ],
    "transformers 5": [
        (r"^vision_tower\.vision_model\.", "model.vision_tower."),
        (r"^multi_modal", "model.multi_modal"),
        (r"^language_model\.model\.", "model.language_model."),
        (r"^language_model\.lm_head", "lm_head"),
    ],
    "up to 4.51": [],
}


@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_llava_hf(spelling, dtype, reference, tmp_path, report):
    source, tensors, logits, projector_type = reference
    renamed = {}
    for name, tensor in tensors.items():
        for pattern, new in SPELLINGS[spelling]:
            name = re.sub(pattern, new, name)
        renamed[name] = tensor.to(dtype)
    (tmp_path / "config.json").write_text((source / "config.json").read_text())
    save_file(renamed, tmp_path / "model.safetensors", metadata={"format": "pt"})
    if dtype != torch.float32:  # the same rounding for the reference
        hf = LlavaForConditionalGeneration.from_pretrained(
            tmp_path, attn_implementation="eager", dtype=torch.float32
        ).eval()
        with torch.no_grad():
            logits = [
                hf(
                    input_ids=hf_ids(torch.tensor([row]), hf),
                    pixel_values=pictures(3)[ROW_PICTURES[i]] if i else None,
                ).logits[0, :, :320]
                for i, row in enumerate(ROWS)
            ]
    report(
        f"llava-hf, names of {spelling}, {str(dtype)[6:]} on disk, {projector_type}",
        difference(load_qilin(tmp_path), logits),
        1e-4,
    )


def test_as_transformers_5_saves_it(reference, tmp_path, report):
    hf = LlavaForConditionalGeneration.from_pretrained(reference[0])
    hf.save_pretrained(tmp_path, max_shard_size="150KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    report(
        f"llava-hf as this transformers saves it, shards, {reference[3]}",
        difference(load_qilin(tmp_path), reference[2]),
        1e-4,
    )


@pytest.mark.parametrize(
    "change, culprit",
    [
        (dict(mm_use_im_start_end=True), "mm_use_im_start_end"),
        (dict(mm_vision_select_feature="cls_patch"), "cls_patch"),
        (dict(mm_vision_select_layer="-2"), "-2"),
        (dict(rope_scaling={"type": "linear", "factor": 2.0}), "linear"),
    ],
)
def test_originals_that_are_refused(change, culprit, reference, tmp_path):
    folder = write_original(tmp_path / "ckpt", reference, True, "x")
    edit_json(folder / "config.json", **change)
    with pytest.raises(ValueError, match=culprit):
        load_qilin(folder)


def test_a_truncated_position_table(reference, tmp_path):
    """Table and config disagree, with a config; without one the table's size is no square
    picture's.
    """
    folder = write_original(tmp_path / "ckpt", reference, True, "clip")
    file = folder / "pytorch_model.bin"
    tensors = torch.load(file, weights_only=True)
    key = next(n for n in tensors if n.endswith("position_embedding.weight"))
    torch.save(tensors | {key: tensors[key][:-1].clone()}, file)
    with pytest.raises(ValueError, match="position_embedding"):
        load_qilin(folder)
    write_clip(folder / "clip", reference)
    with pytest.raises(ValueError, match="position_embedding"):
        load_qilin(folder)
