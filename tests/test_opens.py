"""Promise: what convert.py info says of who opens a model is what happens: transformers loads the
folder, or refuses it; vLLM knows the activation that it names, or not; --gguf writes, or not."""

import io
import json

import pytest
import sentencepiece
from conftest import in_process, make_qilin
from transformers import LlavaForConditionalGeneration

import convert
import qilin_min as q
from demo.toy import tokenizer_texts, train_tokenizer
from model_io.export import save_qilin
from model_io.tokens import Tokenizer

# of vllm/model_executor/layers/activation.py, what a LLaVA's projector may name
VLLM_ACTIVATIONS = ("gelu", "gelu_fast", "gelu_new", "gelu_pytorch_tanh", "relu", "silu")
MODELS = {
    "linear, wide": ("linear", 64, 32),
    "linear, narrow": ("linear", 64, 48),
    "mlp2x_gelu": ("mlp2x_gelu", 64, 48),
}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pieces")
    train_tokenizer(folder, tokenizer_texts(), 512)
    return Tokenizer(folder)


def replacing_tokenizer(folder):
    """One that replaces characters first (nmt_nfkc, the trainer's default): neither tokenizer.json
    nor llama.cpp has a form for that."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["右肺上叶见结节。", "肝右叶见低密度影。", "A chat."] * 20),
        model_writer=model,
        model_type="bpe",
        vocab_size=300,
        byte_fallback=True,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    (folder / "tokenizer.model").write_bytes(model.getvalue())
    return Tokenizer(folder)


def answers(folder):
    """{program: what info says of it}"""
    lines = in_process(convert.main, "info", folder, code=0).stdout.splitlines()
    start = lines.index("  what convert.py makes of it opens in")
    return {line[4:26].strip(): line[26:] for line in lines[start + 1 : start + 4]}


def written(name, tokenizer, folder):
    """The folder of a model of MODELS."""
    projector_type, width, tower_width = MODELS[name]
    text = {"vocab_size": 576, "hidden_size": width}
    model = make_qilin(
        projector_type, text, {"hidden_size": tower_width}, n_token_ids=tokenizer.vocab_size
    )
    save_qilin(model, tokenizer, folder)
    return folder


@pytest.mark.parametrize("name", MODELS)
def test_it_is_so(name, tokenizer, tmp_path):
    said = answers(written(name, tokenizer, tmp_path / "model"))
    word = json.loads((tmp_path / "model/config.json").read_text())["projector_hidden_act"]
    LlavaForConditionalGeneration.from_pretrained(tmp_path / "model")
    assert said["transformers 4.57, 5"] == "yes"
    if word in VLLM_ACTIVATIONS:
        assert said["vLLM"] == "yes"
    else:
        assert said["vLLM"].startswith("no: ") and "64 and 48" in said["vLLM"]
    in_process(convert.main, tmp_path / "model", tmp_path / "g", "--gguf", "q8_0", code=0)
    assert said["llama.cpp, ollama"] == "yes, by --gguf"


def test_a_tokenizer_that_others_read_otherwise(tmp_path):
    (tmp_path / "sp").mkdir()
    folder = written("mlp2x_gelu", replacing_tokenizer(tmp_path / "sp"), tmp_path / "model")
    said = answers(folder)
    assert not (folder / "tokenizer.json").exists()
    assert "cut by sentencepiece" in said["transformers 4.57, 5"]
    assert said["vLLM"].startswith("not tried")
    done = in_process(convert.main, folder, tmp_path / "g", "--gguf", "f16", code=2)
    assert said["llama.cpp, ollama"].removeprefix("no: ") in done.stderr


def test_without_a_tokenizer(tmp_path):
    save_qilin(make_qilin(), None, tmp_path / "model")
    said = answers(tmp_path / "model")
    assert "without a tokenizer" in said["transformers 4.57, 5"]
    assert said["llama.cpp, ollama"].startswith("no: ")
    in_process(convert.main, tmp_path / "model", tmp_path / "g", "--gguf", "f16", code=2)


def test_a_projector_without_a_word(tokenizer, tmp_path, monkeypatch):
    build = q.PROJECTORS["linear"].build
    form = q.HfForm(activation=None, layers={"": "linear_1"})
    monkeypatch.setitem(q.PROJECTORS, "ours", q.Projector(build, (form,)))
    monkeypatch.setitem(MODELS, "ours", ("ours", 64, 32))
    said = answers(written("ours", tokenizer, tmp_path / "model"))
    with pytest.raises(Exception, match="ours"):
        LlavaForConditionalGeneration.from_pretrained(tmp_path / "model")
    assert said["transformers 4.57, 5"].startswith("no: ")
    assert said["vLLM"].startswith("no: ") and said["llama.cpp, ollama"].startswith("no: ")
