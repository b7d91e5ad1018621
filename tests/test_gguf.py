"""Promise: the GGUF files of `convert.py --gguf` give in llama.cpp what the model gives here: ids,
logits, picture embeddings token by token, prompts of a chat; and the picture half does so in both
orders of slots, the one that llama.cpp has and the one that mends it."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import make_qilin, pictures
from llama_cpp import MARKER, Server, picture_part, simulated_embeddings
from PIL import Image

from model_io.gguf import save_gguf
from model_io.pixels import preprocess_image
from model_io.tokens import SYSTEM, Tokenizer, encode_prompt
from qilin_min import IMAGE_TOKEN_INDEX

LONG = os.environ.get("LONG")
ROOT = Path(__file__).resolve().parent.parent
# float16 keeps 11 bits, and some rounding adds up on the way; llama.cpp's GELU is the one by tanh
ROUNDING = 1.5e-3

HOSTILE = [
    "",
    " ",
    "   两个  空格 ",
    "\n",
    "第一行\n\n第二行\r\n\t制表",
    "▁下划线 _ ▁▁",
    "CT 显示😀👩‍⚕️肺部 ⅧＡＢＣ１２３，。！",
    "</s>",
    "<s>你好</s>",
    "图<image>图",
    "<unk> <0x0A> [INST] <|</s|>",
    "1234567890 3.14 2026-11-30",
    "é é \u200b\ufeff 龘𠮷",
    "the  quick brown fox's 90% α-blocker",
    "主动脉瘤",
]


def a_picture(size, seed=0):
    """A PIL picture of a square's size, each patch of it different."""
    pixels = np.random.RandomState(seed).randint(0, 255, (8, 8, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize((size, size), Image.Resampling.BICUBIC)


def worst(found, wanted):
    """The greatest distance of a token's embedding from what it should be, as a share of that."""
    return ((found - wanted).norm(dim=-1) / wanted.norm(dim=-1)).max().item()


@pytest.fixture(scope="module")
def toy_tokenizer(toy):
    return Tokenizer(toy / "llama")


def small_qilin(tokenizer, projector_type="linear", text=None, vision=None):
    """A random model with that tokenizer's ids, and filler rows behind them."""
    n = tokenizer.vocab_size
    sizes = dict(vocab_size=n + 20, num_key_value_heads=2, rope_theta=5000.0) | (text or {})
    return make_qilin(projector_type, sizes, vision, n_token_ids=n)


@pytest.fixture(scope="module")
def small(toy_tokenizer, tmp_path_factory):
    """(model, tokenizer, server) of a random model at f16."""
    model = small_qilin(toy_tokenizer)
    folder = tmp_path_factory.mktemp("gguf") / "small"
    save_gguf(model, toy_tokenizer, folder, "f16")
    server = Server(folder)
    yield model, toy_tokenizer, server
    server.close()


# --- 1. the picture half --------------------------------------------------------------------------

TOWERS = {
    "as it is": ("linear", {}),
    "mlp": ("mlp2x_gelu", {}),
    "small heads": ("linear", dict(hidden_size=32, num_attention_heads=4)),
    "great heads": ("linear", dict(hidden_size=128, num_attention_heads=2)),
    "all blocks": ("linear", dict(select_layer=-1)),
    "one block": ("linear", dict(select_layer=1)),
    "no block": ("linear", dict(select_layer=0)),
    "many patches": ("linear", dict(image_size=140, patch_size=7)),
    "gelu": ("linear", dict(hidden_act="gelu")),
}


@pytest.mark.parametrize("class_first", [False, True])
@pytest.mark.parametrize("kind", TOWERS)
@torch.no_grad()
def test_pictures_are_ours_in_both_orders(kind, class_first, toy_tokenizer, tmp_path, report):
    projector_type, vision = TOWERS[kind]
    model = small_qilin(toy_tokenizer, projector_type, vision=vision)
    save_gguf(model, toy_tokenizer, tmp_path / "m", "f32")
    pixels = pictures(3, size=model.config.vision.image_size)
    # of one colour, dark, and with patches of little contrast
    pixels[1] = -1.8
    pixels[2, :, :28] *= 0.01
    found = simulated_embeddings(tmp_path / "m" / "mmproj-m-f16.gguf", pixels, class_first)
    report(f"embeddings, {kind}", worst(found, model.encode_images(pixels)), ROUNDING)


@torch.no_grad()
def test_pictures_are_ours_in_llama_cpp(small, report):
    """And the simulation gives what llama.cpp gives in the order it has, so that it can be believed
    in the other."""
    model, _, server = small
    size = model.config.vision.image_size
    for seed in range(3):
        picture = a_picture(size, seed)
        pixels = preprocess_image(picture, size)[None]
        found = server.embeddings(picture)
        report("llama.cpp's embeddings", worst(found, model.encode_images(pixels)[0]), ROUNDING)
        simulated = simulated_embeddings(server.mmproj, pixels, class_first=False)[0]
        report("the simulated ones", worst(found, simulated), ROUNDING)


# --- 2. ids and prompts ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def merged_tokenizer(spm_path, tmp_path_factory):
    """The real 32000 pieces with Chinese ones behind, all of score 0, as Chinese-LLaMA-Alpaca's
    script merges vocabularies: ties are broken by position."""
    from sentencepiece import sentencepiece_model_pb2

    proto = sentencepiece_model_pb2.ModelProto()
    proto.ParseFromString(spm_path.read_bytes())
    known = {piece.piece for piece in proto.pieces}
    for word in ("主动", "动脉", "脉瘤", "主动脉", "动脉瘤", "肺部", "部结节", "显示", "CT显"):
        for piece in (word, *word):
            if piece not in known:
                proto.pieces.add(piece=piece, score=0.0)
                known.add(piece)
    path = tmp_path_factory.mktemp("merged") / "tokenizer.model"
    path.write_bytes(proto.SerializeToString())
    return Tokenizer(path)


def toy_texts(toy):
    """What the demo asks and answers."""
    rows = json.loads((toy / "mixed.json").read_text()) + json.loads(
        (toy / "text.json").read_text()
    )
    turns = [turn["value"] for row in rows for turn in row["conversations"]]
    return sorted(set(turns))


def test_ids_are_ours(small, toy):
    _, tokenizer, server = small
    for text in [*HOSTILE, *toy_texts(toy)]:
        assert server.tokenize(text) == tokenizer.encode(text), text


def test_what_a_person_types_is_no_control_id(small):
    """Also where the server looks for control ids, which it does in every prompt."""
    _, tokenizer, server = small
    for text in HOSTILE:
        if "<|" not in text:
            assert server.tokenize(text, parse_special=True) == tokenizer.encode(text), text


@pytest.mark.parametrize("name", ["tokenizer", "merged_tokenizer"])
def test_ids_of_real_vocabularies_are_ours(name, request, tmp_path, toy):
    """32000 pieces; and more of them behind, which tie."""
    tokenizer = request.getfixturevalue(name)
    model = small_qilin(tokenizer, text=dict(num_hidden_layers=1), vision=dict(num_hidden_layers=1))
    save_gguf(model, tokenizer, tmp_path / "m", "f16")
    server = Server(tmp_path / "m")
    pieces = [tokenizer.sp.id_to_piece(i) for i in range(3, tokenizer.vocab_size, 97)]
    texts = [*HOSTILE, *toy_texts(toy), "".join(pieces), " ".join(pieces), SYSTEM]
    for text in texts:
        assert server.tokenize(text) == tokenizer.encode(text), text
    server.close()


PICTURE = object()
CHATS = {
    "text": [["主动脉瘤？"]],
    "picture": [[PICTURE, "这是哪种检查？"]],
    "blanks around": [[PICTURE, " \n这是 什么？ \n"]],
    "blanks of a text": [["  你好 \n"]],
    "picture alone": [[PICTURE]],
    "picture behind": [["这是什么？", PICTURE]],
    "two pictures": [[PICTURE, PICTURE, "相同吗？"]],
    "hostile": [[PICTURE, "</s> USER: <image> {{ x }} __> '\\n'"]],
    "turns": [[PICTURE, "这是？"], "CT。", ["再说\n一遍"], "是 CT。", [PICTURE, "那这个？"]],
    "turns of text": [["你好"], "你好。", ["<s>"]],
}


def as_messages(turns, picture):
    """Turns in the words of the chat endpoint."""
    messages = []
    for turn in turns:
        if isinstance(turn, str):
            messages.append({"role": "assistant", "content": turn})
            continue
        parts = []
        for part in turn:
            is_picture = part is PICTURE
            parts.append(picture_part(picture) if is_picture else {"type": "text", "text": part})
        messages.append({"role": "user", "content": parts})
    return messages


def as_conversation(turns):
    """The same in ours, and how many pictures each human turn has."""
    conversation = []
    n_pictures = []
    for turn in turns:
        if isinstance(turn, str):
            conversation.append({"from": "gpt", "value": turn})
            continue
        text = "".join(part for part in turn if part is not PICTURE)
        conversation.append({"from": "human", "value": text})
        n_pictures.append(turn.count(PICTURE))
    return conversation, n_pictures


@pytest.mark.parametrize("kind", CHATS)
def test_a_chat_s_prompt_is_ours(kind, small):
    """llama-server's own rendering, cut at pictures and tokenised as it does, gives our ids."""
    model, tokenizer, server = small
    n = model.config.n_image_tokens
    conversation, n_pictures = as_conversation(CHATS[kind])
    wanted = encode_prompt(conversation, tokenizer, n, n_images=n_pictures)
    prompt = server.render(as_messages(CHATS[kind], a_picture(56)))
    found = [tokenizer.bos_id]
    for i, text in enumerate(prompt.split(MARKER)):
        if i > 0:
            found += [IMAGE_TOKEN_INDEX] * n
        found += server.tokenize(text, parse_special=True)
    assert found == wanted


# --- 3. the language model ------------------------------------------------------------------------

TEXTS = {
    "grouped": dict(num_key_value_heads=2),
    "tied": dict(tie_word_embeddings=True),
    "wide heads": dict(head_dim=32, rope_theta=10000.0),
    "no groups": dict(num_key_value_heads=4, rms_norm_eps=1e-5, rope_theta=1e6),
}


@pytest.mark.parametrize("kind", TEXTS)
@torch.no_grad()
def test_logits_are_ours(kind, toy_tokenizer, tmp_path, report):
    model = small_qilin(toy_tokenizer, text=TEXTS[kind], vision=dict(num_hidden_layers=1))
    n_vocab = toy_tokenizer.vocab_size
    save_gguf(model, toy_tokenizer, tmp_path / "m", "f16")
    server = Server(tmp_path / "m")
    ids = [toy_tokenizer.bos_id, *range(5, 405, 9)]
    found = server.log_probs(ids, n_vocab)
    # filler rows are never said
    wanted = model(torch.tensor([ids]))[0, -1, :n_vocab].log_softmax(-1)
    assert wanted.max() - wanted.min() > 2
    report(f"log-probabilities, {kind}", (found - wanted).abs().max(), 0.02)
    server.close()
