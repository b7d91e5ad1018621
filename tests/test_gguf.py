"""Promise: the GGUF files of `convert.py --gguf` give in llama.cpp what the model gives here: ids,
logits, picture embeddings token by token, prompts of a chat; and the picture half does so in both
orders of slots, the one that llama.cpp has and the one that mends it."""

import io
import json
import os
import shutil
import sys
import urllib.error

import gguf
import numpy as np
import pytest
import sentencepiece
import torch
from conftest import in_process, make_qilin, pictures
from llama_cpp import MARKER, Server, picture_part, simulated_embeddings
from PIL import Image

import convert
from model_io.export import save_qilin
from model_io.gguf import GGUF_KINDS, save_gguf
from model_io.gguf_vocabulary import check_vocabulary
from model_io.pixels import preprocess_image
from model_io.tokens import SYSTEM, Tokenizer, encode_prompt
from qilin_min import IMAGE_TOKEN_INDEX

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


def small_qilin(tokenizer, projector_type="linear", text=None, vision=None, seed=3):
    """A random model with that tokenizer's ids, and filler rows behind them."""
    n = tokenizer.vocab_size
    sizes = dict(vocab_size=n + 20, num_key_value_heads=2, rope_theta=5000.0) | (text or {})
    return make_qilin(projector_type, sizes, vision, n_token_ids=n, seed=seed)


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


def round_matrices(model):
    """To float16, as the file has them: what random blocks make of that rounding is not ours."""
    for module in (model.vision_tower, model.mm_projector):
        for name, param in module.named_parameters():
            if param.ndim > 1 and "position" not in name:
                param.copy_(param.half())


@pytest.mark.parametrize("class_first", [False, True])
@pytest.mark.parametrize("kind", TOWERS)
@torch.no_grad()
def test_pictures_are_ours_in_both_orders(kind, class_first, toy_tokenizer, tmp_path, report):
    projector_type, vision = TOWERS[kind]
    model = small_qilin(toy_tokenizer, projector_type, vision=vision)
    round_matrices(model)
    save_gguf(model, toy_tokenizer, tmp_path / "m", "f32")
    pixels = pictures(3, size=model.config.vision.image_size)
    # of one colour, dark, and with patches of little contrast
    pixels[1] = -1.8
    pixels[2, :, :28] *= 0.01
    found = simulated_embeddings(tmp_path / "m" / "mmproj-m-f16.gguf", pixels, class_first)
    report(f"embeddings, {kind}", worst(found, model.encode_images(pixels)), ROUNDING)


@pytest.mark.parametrize("class_first", [False, True])
@torch.no_grad()
def test_products_in_float16_are_enough(class_first, toy_tokenizer, tmp_path, report):
    """As in llama.cpp's program for Metal, which rounds all that is multiplied, float32 too."""
    model = small_qilin(toy_tokenizer, vision=TOWERS["many patches"][1])
    save_gguf(model, toy_tokenizer, tmp_path / "m", "f16")
    pixels = pictures(2, size=model.config.vision.image_size)
    mmproj = tmp_path / "m" / "mmproj-m-f16.gguf"
    found = simulated_embeddings(mmproj, pixels, class_first, rounds_products=True)
    report("embeddings, products in f16", worst(found, model.encode_images(pixels)), ROUNDING)


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


def trained_tokenizer(folder, **change):
    """Of a few words."""
    words = "肺部 CT 显示 结节 abc 123 主动脉瘤 未见 异常"
    kinds = dict(
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
    )
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([words] * 50),
        model_writer=model,
        vocab_size=300,
        hard_vocab_limit=False,
        minloglevel=3,
        **kinds | change,
    )
    path = folder / "tokenizer.model"
    path.write_bytes(model.getvalue())
    return Tokenizer(path)


def test_a_vocabulary_without_a_blank_in_front_is_ours(tmp_path):
    tokenizer = trained_tokenizer(tmp_path, add_dummy_prefix=False)
    model = small_qilin(tokenizer, vision=dict(num_hidden_layers=1))
    save_gguf(model, tokenizer, tmp_path / "m", "f16")
    server = Server(tmp_path / "m")
    assert tokenizer.encode("肺部")[0] != tokenizer.encode(" 肺部")[0]
    for text in HOSTILE:
        assert server.tokenize(text) == tokenizer.encode(text), text
    n = model.config.n_image_tokens
    conversation, n_pictures = as_conversation(CHATS["turns"])
    prompt = server.render(as_messages(CHATS["turns"], a_picture(56)))
    wanted = encode_prompt(conversation, tokenizer, n, n_images=n_pictures)
    assert ids_of_prompt(server, prompt, tokenizer, n) == wanted
    server.close()


PICTURE = object()
CHATS = {
    "text": [["主动脉瘤？"]],
    "picture": [[PICTURE, "这是哪种检查？"]],
    "blanks around": [[PICTURE, " \n这是 什么？ \n"]],
    "blanks of a text": [["  你好 \n"]],
    "picture alone": [[PICTURE]],
    "texts around": [["这是", PICTURE, "什么？", "答。"]],
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
        text = "\n".join(part for part in turn if part is not PICTURE)
        conversation.append({"from": "human", "value": text})
        n_pictures.append(turn.count(PICTURE))
    return conversation, n_pictures


def ids_of_prompt(server, prompt, tokenizer, n_image_tokens):
    """A prompt's ids: cut at pictures and tokenised as llama-server does."""
    found = [tokenizer.bos_id]
    for i, text in enumerate(prompt.split(MARKER)):
        if i > 0:
            found += [IMAGE_TOKEN_INDEX] * n_image_tokens
        found += server.tokenize(text, parse_special=True)
    return found


@pytest.mark.parametrize("kind", CHATS)
def test_a_chat_s_prompt_is_ours(kind, small):
    """llama-server's own rendering gives our ids."""
    model, tokenizer, server = small
    n = model.config.n_image_tokens
    conversation, n_pictures = as_conversation(CHATS[kind])
    wanted = encode_prompt(conversation, tokenizer, n, n_images=n_pictures)
    prompt = server.render(as_messages(CHATS[kind], a_picture(56)))
    assert ids_of_prompt(server, prompt, tokenizer, n) == wanted


def test_a_system_message_stands_above_the_question(small):
    """As in serve.py, since what trained the model had our own sentence."""
    model, tokenizer, server = small
    n = model.config.n_image_tokens
    messages = [{"role": "system", "content": "用中文回答。"}]
    messages += as_messages([[PICTURE, "这是？"]], a_picture(56))
    conversation = [{"from": "human", "value": "用中文回答。\n这是？"}]
    wanted = encode_prompt(conversation, tokenizer, n, n_images=1)
    assert ids_of_prompt(server, server.render(messages), tokenizer, n) == wanted


@pytest.mark.parametrize(
    "messages",
    [
        [{"role": "user", "content": " "}],
        [{"role": "user", "content": "<|</s>|>"}],
        [{"role": "user", "content": "一"}, {"role": "user", "content": "二"}],
    ],
)
def test_what_no_prompt_can_hold_is_refused(messages, small):
    with pytest.raises(urllib.error.HTTPError):
        small[2].render(messages)


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


# --- 4. kinds of weights --------------------------------------------------------------------------

# how far numbers may lie from what they were, as a share of the tensor's spread
KEPT = {"f32": 0, "f16": 5e-4, "bf16": 4e-3, "q8_0": 6e-3, "q4_0": 0.1}


@pytest.mark.parametrize("kind", GGUF_KINDS)
def test_each_kind_keeps_the_numbers(kind, toy_tokenizer, tmp_path, report):
    """As the package's own reader finds them, and as many bytes as the kind says; 80 numbers a row
    are no blocks of 32."""
    vision = dict(num_hidden_layers=1)
    model = small_qilin(toy_tokenizer, text=dict(intermediate_size=80), vision=vision)
    remarks = save_gguf(model, toy_tokenizer, tmp_path / "m", kind)
    tensors = {t.name: t for t in gguf.GGUFReader(tmp_path / "m" / f"m-{kind}.gguf").tensors}
    # embeddings, norm, head; 9 a layer
    assert len(tensors) == 3 + 9 * 2
    assert tensors["output_norm.weight"].tensor_type.name == "F32"
    assert tensors["blk.0.attn_v.weight"].tensor_type.name == kind.upper()
    head = "Q8_0" if kind == "q4_0" else kind.upper()
    assert tensors["output.weight"].tensor_type.name == head
    is_blocks = kind.startswith("q")
    down = "F16" if is_blocks else kind.upper()
    assert tensors["blk.0.ffn_down.weight"].tensor_type.name == down
    assert ("multiple of 32" in "".join(remarks)) == is_blocks

    names = {
        "blk.1.attn_v.weight": "model.layers.1.self_attn.v_proj.weight",
        "blk.0.ffn_gate.weight": "model.layers.0.mlp.gate_proj.weight",
        "blk.0.ffn_down.weight": "model.layers.0.mlp.down_proj.weight",
        "output_norm.weight": "model.norm.weight",
    }
    for theirs, ours in names.items():
        tensor = tensors[theirs]
        found = gguf.dequantize(tensor.data, tensor.tensor_type)
        wanted = model.get_parameter(ours).detach().numpy()
        error = np.sqrt(np.mean((found - wanted) ** 2)) / wanted.std()
        report(f"{kind} of {theirs}", error, KEPT[kind])


@torch.no_grad()
@pytest.mark.parametrize("kind, least", [("bf16", 0.999), ("q8_0", 0.998), ("q4_0", 0.9)])
def test_llama_cpp_runs_each_kind(kind, least, toy_tokenizer, tmp_path):
    """Beside the logits of f16, which are compared above: a wrong type would give other words."""
    model = small_qilin(toy_tokenizer, vision=dict(num_hidden_layers=1))
    n_vocab = toy_tokenizer.vocab_size
    save_gguf(model, toy_tokenizer, tmp_path / "m", kind)
    server = Server(tmp_path / "m")
    ids = [toy_tokenizer.bos_id, *range(5, 405, 9)]
    found = server.log_probs(ids, n_vocab)
    wanted = model(torch.tensor([ids]))[0, -1, :n_vocab].log_softmax(-1)
    assert np.corrcoef(found, wanted)[0, 1] > least
    server.close()


def test_an_answer_ends_where_it_does_here(toy_tokenizer, tmp_path):
    model = small_qilin(toy_tokenizer, vision=dict(num_hidden_layers=1))
    n = toy_tokenizer.vocab_size
    # the last is none of the tokenizer's, and is never said
    model.config.text.more_end_ids = (300, 301, n + 3)
    save_gguf(model, toy_tokenizer, tmp_path / "m", "f16")
    server = Server(tmp_path / "m")
    for i, why in ((toy_tokenizer.eos_id, "eos"), (300, "eos"), (301, "eos"), (302, "limit")):
        reply = server.complete("你好", n_predict=3, logit_bias=[[i, 1000]])
        assert reply["stop_type"] == why, i
    server.close()
    model.config.text.more_end_ids = (300, 301, 302)
    with pytest.raises(ValueError, match="places for 3 ids"):
        save_gguf(model, toy_tokenizer, tmp_path / "more", "f16")


# --- 5. the command -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model_folder(toy_tokenizer, tmp_path_factory):
    """A llava-hf folder of a small random model."""
    folder = tmp_path_factory.mktemp("hf") / "model"
    save_qilin(small_qilin(toy_tokenizer), toy_tokenizer, folder)
    return folder


def test_the_command_writes_a_folder_and_replaces_only_its_own(model_folder, tmp_path):
    out = tmp_path / "qilin"
    done = in_process(convert.main, model_folder, out, "--gguf", "q8_0", code=0)
    files = ["Modelfile", "mmproj-qilin-f16.gguf", "qilin-q8_0.gguf"]
    assert sorted(file.name for file in out.iterdir()) == files
    assert "qilin-q8_0.gguf" in done.stdout and "mmproj-qilin-f16.gguf" in done.stdout
    first = {file.name: file.read_bytes() for file in out.iterdir()}
    in_process(convert.main, model_folder, out, "--gguf", "q8_0", code=0)
    # equal weights, equal bytes
    assert {file.name: file.read_bytes() for file in out.iterdir()} == first
    in_process(convert.main, model_folder, out, "--gguf", "f16", code=0)
    # kinds of one model lie side by side
    assert (out / "qilin-f16.gguf").exists()
    assert (out / "qilin-q8_0.gguf").read_bytes() == first["qilin-q8_0.gguf"]

    named = (out / "Modelfile").read_text()
    assert "FROM ./qilin-f16.gguf\nFROM ./mmproj-qilin-f16.gguf\n" in named
    assert SYSTEM in named and 'PARAMETER stop "<|</s>|>"' in named


def refused(words, source, out, *options):
    """The command ends in one line that says so, and nothing is written."""
    before = sorted(out.parent.rglob("*"))
    done = in_process(convert.main, source, out, "--gguf", *options)
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    assert words in done.stderr
    assert sorted(out.parent.rglob("*")) == before


def test_kinds_of_another_model_and_what_others_wrote_stay(model_folder, toy_tokenizer, tmp_path):
    out = tmp_path / "out" / "qilin"
    in_process(convert.main, model_folder, out, "--gguf", "q8_0", code=0)
    other = tmp_path / "other"
    save_qilin(small_qilin(toy_tokenizer, seed=9), toy_tokenizer, other)
    refused("of another model", other, out, "f16")
    # in place of its own kind it may come
    in_process(convert.main, other, out, "--gguf", "q8_0", code=0)
    (out / "notes.txt").write_text("mine")
    refused("holds something else", model_folder, out, "q8_0")
    beside = out.with_name("m.partial")
    beside.mkdir()
    (beside / "notes.txt").write_text("mine")
    refused("by way of it", model_folder, out.with_name("m"), "q8_0")


def test_what_cannot_be_written_is_one_line(model_folder, tmp_path, monkeypatch):
    out = tmp_path / "out" / "m"
    out.parent.mkdir()
    other = tmp_path / "out" / "other"
    other.mkdir()
    (other / "config.json").write_text("{}")
    refused("holds something else", model_folder, other, "f16")
    refused("--dtype", model_folder, out, "f16", "--dtype", "float16")
    bare = tmp_path / "bare"
    shutil.copytree(model_folder, bare)
    for file in bare.glob("*tokenizer*"):
        file.unlink()
    refused("no tokenizer", bare, out, "f16")
    monkeypatch.setitem(sys.modules, "gguf", None)
    refused("pip install gguf==0.19.0", model_folder, out, "f16")


def test_a_model_of_cropped_pictures_says_that_llama_cpp_pads(toy_tokenizer, tmp_path):
    model = small_qilin(toy_tokenizer, vision=dict(num_hidden_layers=1))
    assert save_gguf(model, toy_tokenizer, tmp_path / "padded", "f16") == []
    model.config.image_mode = "crop"
    (line,) = save_gguf(model, toy_tokenizer, tmp_path / "cropped", "f16")
    assert "llama.cpp pads them" in line


def test_a_number_too_large_for_f16_is_named(toy_tokenizer, model_folder, tmp_path):
    model = small_qilin(toy_tokenizer)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 4] = 1e5
    with pytest.raises(ValueError, match=r"blk\.1\.ffn_up\.weight .* not finite in f16"):
        save_gguf(model, toy_tokenizer, tmp_path / "m", "f16")
    assert not list(tmp_path.iterdir())
    save_gguf(model, toy_tokenizer, tmp_path / "m", "bf16")


def test_a_disk_without_room_is_told_before_anything_is_written(
    toy_tokenizer, model_folder, tmp_path, monkeypatch
):
    room = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: room)
    done = in_process(convert.main, model_folder, tmp_path / "m", "--gguf", "f16", code=1)
    assert "No space left" in done.stderr and not (tmp_path / "m").exists()


def test_what_was_not_written_as_it_should_be_is_seen(toy_tokenizer, tmp_path, monkeypatch):
    """One byte of the last tensor."""
    written = gguf.GGUFWriter.close

    def close(self):
        written(self)
        with open(self.path, "r+b") as file:
            file.seek(-32, os.SEEK_END)
            byte = file.read(1)
            file.seek(-32, os.SEEK_END)
            file.write(bytes([byte[0] ^ 1]))

    monkeypatch.setattr(gguf.GGUFWriter, "close", close)
    with pytest.raises(OSError, match="not what was meant"):
        save_gguf(small_qilin(toy_tokenizer), toy_tokenizer, tmp_path / "m", "f16")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "change, words",
    [
        (dict(model_type="unigram"), "no BPE"),
        (dict(byte_fallback=False), "256 bytes"),
        (dict(normalization_rule_name="nmt_nfkc"), "changes characters"),
        (dict(remove_extra_whitespaces=True), "drops blanks"),
        (dict(user_defined_symbols=["CT"]), "defined by hand"),
        (dict(treat_whitespace_as_suffix=True), "behind words"),
    ],
)
def test_a_vocabulary_that_llama_cpp_reads_otherwise_is_refused(change, words, tmp_path):
    with pytest.raises(ValueError, match=words):
        check_vocabulary(trained_tokenizer(tmp_path, **change))
