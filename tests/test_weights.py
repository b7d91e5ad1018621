"""A checkpoint is loaded whole or refused with the name of the culprit; no weight is ever left at
random in silence.
"""

import json
import shutil

import pytest
import torch
from conftest import ROWS, edit_json, hf_ids, hf_llama, make_qilin, pictures
from safetensors.torch import load_file, save_file
from transformers import LlavaForConditionalGeneration

import qilin_min as q
from model_io.export import save_qilin
from model_io.load import load_qilin

NORM = "model.layers.1.input_layernorm.weight"


@pytest.fixture
def llama(llama_folder, tmp_path):
    return shutil.copytree(llama_folder, tmp_path / "llama")


@pytest.fixture
def clip(clip_folder, tmp_path):
    return shutil.copytree(clip_folder, tmp_path / "clip")


def edit_weights(folder, change):
    file = folder / "model.safetensors"
    tensors = {name: t.clone() for name, t in load_file(file).items()}
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


def test_missing_tensor(llama, clip):
    edit_weights(llama, lambda t: t.pop(NORM))
    with pytest.raises(ValueError, match=f"missing {NORM}"):
        load_qilin(llm=llama, vision=clip)


@pytest.mark.parametrize(
    "name",
    ["model.layers.0.self_attn.q_proj.bias", "model.layers.7.mlp.up_proj.weight", "adapter.weight"],
)
def test_extra_tensor(name, llama, clip):
    edit_weights(llama, lambda t: t.update({name: torch.zeros(4)}))
    with pytest.raises(ValueError, match=f"no place for: {name}"):
        load_qilin(llm=llama, vision=clip)


def test_wrong_shape(llama, clip):
    edit_weights(llama, lambda t: t.update({NORM: torch.zeros(63)}))
    with pytest.raises(ValueError, match=rf"{NORM} is \(63,\) in the file, \(64,\) by the config"):
        load_qilin(llm=llama, vision=clip)


def test_a_config_of_other_sizes(llama, clip):
    edit_json(llama / "config.json", intermediate_size=128)
    with pytest.raises(ValueError, match="mlp"):
        load_qilin(llm=llama, vision=clip)
    edit_json(llama / "config.json", intermediate_size=96, num_hidden_layers=3)
    with pytest.raises(ValueError, match="missing model.layers.2."):
        load_qilin(llm=llama, vision=clip)
    edit_json(llama / "config.json", num_hidden_layers=1)
    with pytest.raises(ValueError, match="no place for: model.layers.1."):
        load_qilin(llm=llama, vision=clip)


def test_missing_shard(clip, tmp_path):
    hf_llama().save_pretrained(tmp_path / "shards", max_shard_size="100KB")
    load_qilin(llm=tmp_path / "shards", vision=clip)
    lost = sorted((tmp_path / "shards").glob("model-*.safetensors"))[1]
    lost.unlink()
    with pytest.raises(FileNotFoundError, match=lost.name):
        load_qilin(llm=tmp_path / "shards", vision=clip)


def test_truncated_files(llama, clip):
    file = llama / "model.safetensors"
    whole = file.read_bytes()
    for content in (whole[:-100], whole[:50], b"", b"version https://git-lfs.github.com/spec/v1\n"):
        file.write_bytes(content)
        with pytest.raises(ValueError, match="model.safetensors"):
            load_qilin(llm=llama, vision=clip)


@pytest.mark.parametrize("content", ["", "{", "\x80"])
def test_damaged_config(content, llama, clip):
    (llama / "config.json").write_bytes(content.encode("latin-1"))
    with pytest.raises(ValueError, match="config.json"):
        load_qilin(llm=llama, vision=clip)


def test_missing_folder_config_and_weights(llama, clip, tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        load_qilin(llm=tmp_path / "nowhere", vision=clip)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        load_qilin(llm=llama, vision=clip, projector=tmp_path / "nowhere.safetensors")
    with pytest.raises(ValueError, match="--vision"):
        load_qilin(llm=llama)
    (clip / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="clip"):
        load_qilin(llm=llama, vision=clip)
    (llama / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match="llama"):
        load_qilin(llm=llama, vision=clip)


@pytest.mark.parametrize(
    "change, culprit",
    [
        (dict(rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}), "linear"),
        (dict(rope_parameters=None, rope_scaling={"type": "dynamic", "factor": 2.0}), "dynamic"),
        (
            dict(rope_scaling={"rope_type": "llama3", "factor": 8.0}),
            "llama3",
        ),  # beside default rope_parameters: transformers lets it win
        (dict(model_type="mistral"), "mistral"),
        (dict(hidden_act="gelu"), "gelu"),
        (dict(attention_bias=True), "attention_bias"),
        (dict(mlp_bias=True), "mlp_bias"),
        (dict(num_key_value_heads=3), "3 key-value"),
        (dict(num_hidden_layers=[2]), "num_hidden_layers"),
    ],
)
def test_refused_language_models(change, culprit, llama, clip):
    edit_json(llama / "config.json", **change)
    with pytest.raises(ValueError, match=culprit):
        load_qilin(llm=llama, vision=clip)


@pytest.mark.parametrize(
    "change, culprit",
    [
        (dict(model_type="siglip_vision_model"), "siglip"),
        (dict(hidden_act="relu"), "relu"),
        (dict(num_channels=1), "num_channels"),
    ],
)
def test_refused_towers(change, culprit, llama, clip):
    edit_json(clip / "config.json", **change)
    with pytest.raises(ValueError, match=culprit):
        load_qilin(llm=llama, vision=clip)


def test_what_no_model_needs_is_ignored(llama, clip):
    want = load_qilin(llm=llama, vision=clip).state_dict()
    edit_weights(
        llama,
        lambda t: t.update(
            {
                "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8),
                "model.rotary_emb.inv_freq": torch.ones(8),
            }
        ),
    )
    edit_weights(
        clip,
        lambda t: t.update(
            {
                "vision_model.embeddings.position_ids": torch.arange(17)[None],
                "text_model.final_layer_norm.weight": torch.ones(3),
                "text_projection.weight": torch.ones(3, 3),
                "visual_projection.weight": torch.ones(3, 3),
                "logit_scale": torch.tensor(1.0),
            }
        ),
    )
    again = load_qilin(llm=llama, vision=clip).state_dict()
    assert want.keys() == again.keys() and all(torch.equal(want[n], again[n]) for n in want)


def test_every_tensor_arrives(llama, clip):
    model = load_qilin(llm=llama, vision=clip)
    theirs = load_file(llama / "model.safetensors") | {
        "vision_tower." + n.removeprefix("vision_model."): t
        for n, t in load_file(clip / "model.safetensors").items()
    }
    ours = {n: p for n, p in model.named_parameters() if not n.startswith("mm_projector.")}
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[n], theirs[n]) for n in ours)
    assert (
        not model.training and model.config.n_token_ids == 320
    )  # without a tokenizer, all of the vocabulary


def test_pickled_weights(llama, clip):
    want = load_file(llama / "model.safetensors")
    torch.save(want, llama / "pytorch_model.bin")
    (llama / "model.safetensors").unlink()
    model = load_qilin(llm=llama, vision=clip)
    assert all(torch.equal(dict(model.named_parameters())[n], t) for n, t in want.items())
    (llama / "pytorch_model.bin").write_bytes(
        b"cposix\nsystem\n(S'exit 1'\ntR."
    )  # a pickle that would run a command
    with pytest.raises(ValueError, match="pytorch_model.bin"):
        load_qilin(llm=llama, vision=clip)


@pytest.mark.parametrize(
    "change, culprit",
    [
        (lambda t: t[1].fill_(torch.nan), "not finite"),
        (lambda t: t[-1].fill_(torch.inf), "not finite"),
        (lambda t: None, "int8"),
        (lambda t: None, "bool"),
    ],
)
def test_weights_that_are_no_finite_floats(change, culprit, llama, clip):
    def spoil(tensors):
        change(tensors[NORM])
        if culprit in ("int8", "bool"):
            tensors[NORM] = tensors[NORM].to(getattr(torch, culprit))

    edit_weights(llama, spoil)
    with pytest.raises(ValueError, match=f"{NORM} holds .*{culprit}"):
        load_qilin(llm=llama, vision=clip)


def test_shapes_are_compared_before_memory_is_taken(llama, clip):
    """A config without sizes means 7B, 27 GB in float32, beside files of a few kB."""
    (llama / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="missing model.layers.10"):
        load_qilin(llm=llama, vision=clip)


@pytest.mark.parametrize(
    "key, value",
    [
        (key, value)
        for key in (
            "hidden_size",
            "num_attention_heads",
            "num_hidden_layers",
            "vocab_size",
            "rms_norm_eps",
            "max_position_embeddings",
            "rope_theta",
            "head_dim",
        )
        for value in ("64", -1, True, [1], 1e30, float("nan"))
    ]
    + [
        ("hidden_size", 64.5),
        ("tie_word_embeddings", "yes"),
        ("eos_token_id", "2"),
        ("rope_scaling", 3),
        ("head_dim", 15),
    ],
)
def test_config_values_of_the_wrong_kind(key, value, llama, clip):
    edit_json(llama / "config.json", **{"rope_parameters": None, key: value})
    with pytest.raises(ValueError, match="config.json"):
        load_qilin(llm=llama, vision=clip)


@pytest.mark.parametrize(
    "key, value",
    [
        ("patch_size", 0),
        ("patch_size", 57),
        ("num_attention_heads", 3),
        ("image_size", "56"),
        ("layer_norm_eps", -1.0),
    ],
)
def test_tower_values_of_the_wrong_kind(key, value, llama, clip):
    edit_json(clip / "config.json", **{key: value})
    with pytest.raises(ValueError, match="config.json"):
        load_qilin(llm=llama, vision=clip)


@pytest.mark.parametrize("content", ["[]", "null", "3", '"x"'])
def test_a_config_that_is_no_object(content, llama, clip):
    (llama / "config.json").write_text(content)
    with pytest.raises(ValueError, match="config.json"):
        load_qilin(llm=llama, vision=clip)


@pytest.mark.parametrize(
    "weight_map",
    [
        [],
        None,
        {},
        {"a": 3},
        {"a": None},
        {"a": "../llama/model.safetensors"},
        {"a": "/etc/passwd"},
    ],
)
def test_an_index_that_names_no_files_beside_it(weight_map, llama, clip):
    (llama / "model.safetensors").unlink()
    (llama / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(ValueError, match="index.json"):
        load_qilin(llm=llama, vision=clip)


@pytest.mark.parametrize(
    "content",
    [[1], {"a": [1.0]}, {1: torch.ones(2)}, torch.ones(2), {"a": torch.ones(2).to_sparse()}],
)
def test_a_bin_that_is_no_dict_of_tensors(content, llama, clip):
    (llama / "model.safetensors").unlink()
    torch.save(content, llama / "pytorch_model.bin")
    with pytest.raises(ValueError, match="pytorch_model.bin"):
        load_qilin(llm=llama, vision=clip)


def test_tied_head_on_disk(tmp_path, clip):
    """A tied head may lie on disk as well; one that differs is no tied head, whatever the config
    says.
    """
    hf_llama(tie_word_embeddings=True).save_pretrained(tmp_path / "tied")
    embed = load_file(tmp_path / "tied/model.safetensors")["model.embed_tokens.weight"]
    edit_weights(tmp_path / "tied", lambda t: t.update({"lm_head.weight": embed.clone()}))
    assert load_qilin(llm=tmp_path / "tied", vision=clip).lm_head is None
    edit_weights(tmp_path / "tied", lambda t: t["lm_head.weight"][-1].add_(1))
    with pytest.raises(ValueError, match="lm_head.weight is not embed_tokens.weight"):
        load_qilin(llm=tmp_path / "tied", vision=clip)


@pytest.mark.parametrize(
    "change, culprit",
    [
        (dict(vision_feature_select_strategy="full"), "full"),
        (dict(projector_hidden_act="relu"), "relu"),
        (dict(model_type="bert"), "bert"),
        (dict(vision_feature_layer=[-2, -3]), "vision_feature_layer"),
        (dict(vision_feature_layer=9), "vision_feature_layer"),
        (dict(multimodal_projector_bias=False), "multimodal_projector_bias"),
        (dict(text_config=3), "config.json"),
        (dict(vision_config=[]), "config.json"),
    ],
)
def test_refused_whole_models(change, culprit, tmp_path):
    save_qilin(make_qilin(), None, tmp_path / "out")
    edit_json(tmp_path / "out/config.json", **change)
    with pytest.raises(ValueError, match=culprit):
        load_qilin(tmp_path / "out")


def test_a_list_of_one_layer_is_that_layer(tmp_path, report):
    save_qilin(make_qilin(text=dict(num_key_value_heads=4)), None, tmp_path / "out")
    edit_json(tmp_path / "out/config.json", vision_feature_layer=[-3])
    theirs = LlavaForConditionalGeneration.from_pretrained(
        tmp_path / "out", attn_implementation="eager"
    ).eval()
    ids = torch.tensor([ROWS[1]])
    with torch.no_grad():
        want = theirs(input_ids=hf_ids(ids, theirs), pixel_values=pictures(1)).logits
        got = load_qilin(tmp_path / "out")(ids, pictures(1))
    report("features of a list of one layer", (got - want).abs().max(), 1e-4)


def test_files_are_readable_like_their_folder(tmp_path):
    save_qilin(make_qilin(), None, tmp_path / "out")
    for file in (tmp_path / "out").iterdir():
        assert file.stat().st_mode & 0o777 == (tmp_path / "out").stat().st_mode & 0o666, file


def test_dtype_is_the_one_asked_for(llama, clip):
    model = load_qilin(llm=llama, vision=clip, dtype=torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert torch.equal(
        model.model.norm.weight,
        load_file(llama / "model.safetensors")["model.norm.weight"].bfloat16(),
    )


def test_a_vocabulary_smaller_than_the_tokenizer(llama, clip, spm_path):
    shutil.copy(spm_path, llama / "tokenizer.model")
    with pytest.raises(ValueError, match="32000 pieces, but the model only 320"):
        load_qilin(llm=llama, vision=clip)


@pytest.mark.parametrize("projector_type", ["linear", "mlp2x_gelu"])
def test_fresh_projector_is_the_same_each_time(projector_type, llama, clip):
    torch.manual_seed(0)
    one = load_qilin(
        llm=llama, vision=clip, projector_type=projector_type
    ).mm_projector.state_dict()
    torch.manual_seed(1)
    two = load_qilin(
        llm=llama, vision=clip, projector="fresh", projector_type=projector_type
    ).mm_projector.state_dict()
    assert one.keys() == two.keys() and all(torch.equal(one[n], two[n]) for n in one)
    assert all(
        0.06 < t.abs().max() <= 1 / 8 for t in one.values()
    )  # torch's init: uniform within 1 / sqrt(64)
    with pytest.raises(ValueError, match="conv"):
        load_qilin(llm=llama, vision=clip, projector_type="conv")


@pytest.mark.parametrize(
    "prefix", ["model.mm_projector.", "mm_projector.", "base_model.model.model.mm_projector."]
)
@pytest.mark.parametrize(
    "names", [["weight", "bias"], ["0.weight", "0.bias", "2.weight", "2.bias"]]
)
def test_projector_file_tells_its_type(prefix, names, llama, clip, tmp_path):
    tensors = {
        prefix + n: torch.randn(64, 64) if n.endswith("weight") else torch.randn(64) for n in names
    }
    save_file(tensors, tmp_path / "projector.safetensors")
    wrong_guess = "mlp2x_gelu" if len(names) == 2 else "linear"
    model = load_qilin(
        llm=llama,
        vision=clip,
        projector=tmp_path / "projector.safetensors",
        projector_type=wrong_guess,
    )
    assert model.config.projector_type == ("linear" if len(names) == 2 else "mlp2x_gelu")
    assert all(torch.equal(model.mm_projector.state_dict()[n], tensors[prefix + n]) for n in names)
    save_file(dict(list(tensors.items())[:-1]), tmp_path / "projector.safetensors")
    with pytest.raises(ValueError, match=f"missing mm_projector.{names[-1]}"):
        load_qilin(llm=llama, vision=clip, projector=tmp_path / "projector.safetensors")


def test_no_projector_where_one_is_named(llama, clip):
    with pytest.raises(ValueError, match="no projector"):
        load_qilin(llm=llama, vision=clip, projector=llama)


def test_parts_beside_a_model_override_it(llama, clip, tmp_path):
    whole = make_qilin(
        "linear",
        text=dict(num_key_value_heads=4),
        vision=dict(hidden_size=64, intermediate_size=96),
        n_token_ids=320,
    )
    save_qilin(whole, None, tmp_path / "whole")
    model = load_qilin(tmp_path / "whole", llm=llama)
    assert torch.equal(
        model.lm_head.weight, load_file(llama / "model.safetensors")["lm_head.weight"]
    )
    assert torch.equal(model.mm_projector.weight, whole.mm_projector.weight)
    assert torch.equal(
        model.vision_tower.embeddings.class_embedding, whole.vision_tower.embeddings.class_embedding
    )


def test_a_tied_head_may_be_the_only_copy(tmp_path, clip):
    hf_llama(tie_word_embeddings=True).save_pretrained(tmp_path / "tied")
    embed = load_file(tmp_path / "tied/model.safetensors")[q.EMBED]
    edit_weights(tmp_path / "tied", lambda t: t.update({"lm_head.weight": t.pop(q.EMBED)}))
    assert torch.equal(
        load_qilin(llm=tmp_path / "tied", vision=clip).model.embed_tokens.weight, embed
    )


@pytest.mark.parametrize("ends", [[2, [3]], [2, "a"], [2, None], [2, -5], [-1]])
def test_end_ids_that_are_none(ends, llama, clip):
    edit_json(llama / "config.json", eos_token_id=ends)
    with pytest.raises(ValueError, match="eos_token_id"):
        load_qilin(llm=llama, vision=clip)


@pytest.mark.parametrize("projector_type", ["linear", "mlp2x_gelu"])
def test_parts_may_come_out_of_whole_models(projector_type, llama, clip, tmp_path):
    """A projector, a tower or a language model out of an export: a linear one stays linear."""
    whole = make_qilin(
        projector_type,
        vision=dict(hidden_size=64, intermediate_size=96),
        text=dict(num_key_value_heads=4),
        n_token_ids=320,
    )
    save_qilin(whole, None, tmp_path / "whole")
    for path in (tmp_path / "whole", tmp_path / "whole/model.safetensors"):
        model = load_qilin(llm=llama, vision=clip, projector=path)
        assert model.config.projector_type == projector_type
        assert all(
            torch.equal(p, whole.get_parameter(n))
            for n, p in model.named_parameters()
            if n.startswith("mm_projector.")
        )
    model = load_qilin(llm=tmp_path / "whole", vision=tmp_path / "whole")
    assert all(
        torch.equal(p, model.get_parameter(n)[: len(p)])
        for n, p in whole.named_parameters()
        if not n.startswith("mm_projector.")
    )


def test_a_spoilt_linear_export_is_refused(tmp_path):
    save_qilin(make_qilin("linear"), None, tmp_path / "out")
    edit_weights(tmp_path / "out", lambda t: t["multi_modal_projector.linear_2.weight"].mul_(2))
    with pytest.raises(ValueError, match="is not as a linear projector"):
        load_qilin(tmp_path / "out")


@pytest.mark.parametrize(
    "old, new",
    [
        ("vision_tower.vision_model.", "model.vision_tower."),
        ("vision_tower.vision_model.", "model.vision_tower.vision_tower.vision_model."),
        ("vision_tower.vision_model.", "model.vision_tower.vision_model."),
        ("language_model.model.", "model.language_model."),
        ("language_model.lm_head.", "lm_head."),
        ("multi_modal_projector.", "model.multi_modal_projector."),
        ("multi_modal_projector.linear_1.", "model.mm_projector.0."),
        ("language_model.", ""),
    ],
)
def test_every_published_spelling(old, new, tmp_path):
    model = make_qilin("mlp2x_gelu")
    save_qilin(model, None, tmp_path / "out")

    def rename(tensors):
        for name in [n for n in tensors if n.startswith(old)]:
            tensors[new + name[len(old) :]] = tensors.pop(name)

    edit_weights(tmp_path / "out", rename)
    again = dict(load_qilin(tmp_path / "out").named_parameters())
    assert all(torch.equal(again[n][: len(p)], p) for n, p in model.named_parameters())
    assert not [n for n in again if n not in dict(model.named_parameters())]


def test_one_tensor_under_two_names(tmp_path):
    save_qilin(make_qilin(), None, tmp_path / "out")
    edit_weights(
        tmp_path / "out",
        lambda t: t.update({"lm_head.weight": t["language_model.lm_head.weight"].clone()}),
    )
    with pytest.raises(ValueError, match="lm_head.weight"):
        load_qilin(tmp_path / "out")
