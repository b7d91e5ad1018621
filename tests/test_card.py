"""Promise: the card of an export tells base models, projector, data, template, versions and
licences as far as they are known, in the hub's own fields where it has one, with nothing invented
and no path in it.
"""

import json
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, edit_json, in_process, make_qilin
from huggingface_hub import ModelCard
from test_fast_tokenizer import SHANGHAI, merged, trained

import convert
import train
from model_io.card import Base, Origin, base_of
from model_io.export import save_qilin
from model_io.load import load_qilin
from model_io.tokens import Tokenizer


@pytest.fixture
def parts(tmp_path, toy):
    """A language model that its folder says the name and licence of, a tower that does not, and a
    projector, each in a folder of its own."""
    llama = tmp_path / "Llama2-Chinese-13b-Chat"
    clip = tmp_path / "clip-vit"
    llama.mkdir()
    clip.mkdir()
    for source, folder in ((toy / "llama", llama), (toy / "clip", clip)):
        for file in source.iterdir():
            (folder / file.name).write_bytes(file.read_bytes())
    edit_json(llama / "config.json", _name_or_path="FlagAlpha/Llama2-Chinese-13b-Chat")
    edit_json(clip / "config.json", _name_or_path="/home/someone/clip-vit")
    (llama / "README.md").write_text('---\nlanguage: zh\nlicense: "llama2"\n---\nlicense: mit\n')
    model = load_qilin(llm=llama, vision=clip)
    save_qilin(model, None, tmp_path / "stage1/final")
    train_projector(model, tmp_path / "stage1/final")
    return SimpleNamespace(
        llama=llama, clip=clip, projector=tmp_path / "stage1/final/p.safetensors"
    )


def train_projector(model, folder):
    tensors = {
        "model." + name: param.detach()
        for name, param in model.named_parameters()
        if name.startswith("mm_projector.")
    }
    train.save_tensors(tensors, folder / "p.safetensors")


def convert_parts(parts, out):
    words = (out, "--llm", parts.llama, "--vision", parts.clip, "--projector", parts.projector)
    in_process(convert.main, *words, code=0)
    return (out / "README.md").read_text(encoding="utf-8")


def test_a_conversion_names_its_parts(parts, tmp_path):
    text = convert_parts(parts, tmp_path / "one")
    head = ModelCard(text).data.to_dict()
    assert head["base_model"] == ["FlagAlpha/Llama2-Chinese-13b-Chat", "clip-vit"]
    assert head["license"] == "llama2"
    assert head["pipeline_tag"] == "image-text-to-text"
    assert "- Projector: p.safetensors of stage1" in text
    assert "FlagAlpha/Llama2-Chinese-13b-Chat: llama2" in text
    assert torch.__version__.split("+")[0] in text
    assert "Data:" not in text and "template:" not in text
    assert str(tmp_path) not in text and "someone" not in text
    assert convert_parts(parts, tmp_path / "elsewhere") == text


def test_a_run_names_its_data_and_template(parts):
    settings = SimpleNamespace(
        stage=2,
        model=None,
        llm=str(parts.llama),
        base=None,
        vision=str(parts.clip),
        projector="fresh",
        data=["data/chimed/instruction.json", "more.jsonl"],
        template="v1",
    )
    origin = train.origin_of(settings)
    assert origin == Origin(
        how="a language model and a projector tuned in stage 2",
        bases=(Base("FlagAlpha/Llama2-Chinese-13b-Chat", "llama2"), Base("clip-vit", None)),
        projector=None,
        data=("instruction.json", "more.jsonl"),
        template="v1",
    )


def card_of(origin, tmp_path, tokenizer=None):
    n = tokenizer.vocab_size if tokenizer else 300
    sizes = dict(vocab_size=n, hidden_size=16, intermediate_size=16, num_attention_heads=2)
    save_qilin(make_qilin(text=sizes, n_token_ids=n), tokenizer, tmp_path / "out", origin=origin)
    return (tmp_path / "out/README.md").read_text(encoding="utf-8")


def test_what_is_not_known_is_not_said(tmp_path):
    text = card_of(None, tmp_path)
    head = ModelCard(text).data.to_dict()
    assert head.keys() == {"language", "pipeline_tag", "library_name"}
    for word in ("Base models", "Data:", "template:", "Licences named there", "None", "{"):
        assert word not in text.partition("```")[0], word


def test_names_that_are_no_plain_words(tmp_path):
    odd = Base('a: "b" {c} #d 模型', None)
    text = card_of(Origin(bases=(odd,), data=("甲 {乙}.json",)), tmp_path)
    assert ModelCard(text).data.base_model == [odd.name] and "甲 {乙}.json" in text


def test_a_result_is_called_by_its_run(tmp_path):
    """out/stage2, not final; and its licence goes on."""
    final = tmp_path / "stage2/final"
    final.mkdir(parents=True)
    (final / "README.md").write_text("---\nlicense: llama2\n---\n")
    (final / "config.json").write_text(json.dumps({"_name_or_path": "someone/other"}))
    for path in (final, tmp_path / "stage2", final / "config.json"):
        assert base_of(path) == Base("stage2", "llama2")


def test_damaged_neighbours_stop_nothing(tmp_path):
    (tmp_path / "config.json").write_text("{")
    (tmp_path / "README.md").write_bytes(b"\xff\xfe")
    assert base_of(tmp_path) == Base(tmp_path.name, None)


def test_a_folder_without_tokenizer_json_tells_how_to_open_it(tmp_path):
    tokenizer = Tokenizer(merged(trained(tmp_path), SHANGHAI, tmp_path))
    text = card_of(None, tmp_path, tokenizer)
    assert "No tokenizer.json" in text and "BertGenerationTokenizer" in text and "`<s>`" in text


def test_no_template_holds_a_path():
    for file in (ROOT / "model_io").glob("model_card*.md"):
        assert "/work" not in file.read_text(encoding="utf-8")
