"""Promise: the chat answers as if each dialog had been read whole, without computing a picture
twice; stop texts, kept caches and heatmaps are what they say.
"""

import os
import pty
import select
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from conftest import ROOT, ROWS, make_qilin, pictures
from PIL import Image
from transformers import LlavaForConditionalGeneration

import qilin_min as q
import sample
from model_io.export import save_qilin
from model_io.tokens import StreamedAnswer, encode_conversation, encode_prompt


@pytest.fixture(scope="module")
def model(spm_path):
    return make_qilin(text=dict(vocab_size=32064, max_position_embeddings=400), n_token_ids=32000)


def whole(model, tokenizer, ids, x, n):
    """The answer to a prompt read from its first token."""
    return [
        i for (i,) in q.generate(model, [ids], x, max_new_tokens=n) if i not in model.config.end_ids
    ]


def test_each_turn_is_answered_as_if_all_were_read_anew(model, tokenizer, monkeypatch):
    x, n_towers, computed = pictures(2), 0, []
    encode, forward = model.encode_images, model.model.forward

    def counted(pixels):
        nonlocal n_towers
        n_towers += len(pixels)
        return encode(pixels)

    monkeypatch.setattr(model, "encode_images", counted)
    monkeypatch.setattr(
        model.model,
        "forward",
        lambda x, cache=None: computed.append(x.shape[1]) or forward(x, cache),
    )
    chat, ids = sample.Chat(model, tokenizer, x), []
    for turn, question in enumerate(("图中有什么？", "<image>在哪里？</s>", "多大？")):
        text = "".join(chat.ask(question, max_new_tokens=6))
        ids = (
            ids + [2] + tokenizer.encode(f"USER: {question} ASSISTANT:")
            if turn
            else encode_prompt([{"from": "human", "value": question}], tokenizer, 16, n_images=2)
        )
        assert (
            text == tokenizer.decode(chat.answer.ids)
            and n_towers == 2
            and (not turn or max(computed) < 40)
        )
        monkeypatch.setattr(model, "encode_images", encode)
        want = whole(model, tokenizer, ids, x, 6)
        monkeypatch.setattr(model, "encode_images", counted)
        assert chat.answer.ids == want
        ids += want
        computed.clear()
    chat.reset()  # what was said goes, the pictures' keys and values stay
    assert (
        "".join(chat.ask("图中有什么？", max_new_tokens=6))
        == tokenizer.decode(whole_first := chat.answer.ids)
        and n_towers == 2
    )
    monkeypatch.setattr(model, "encode_images", encode)
    assert whole_first == whole(
        model,
        tokenizer,
        encode_prompt([{"from": "human", "value": "图中有什么？"}], tokenizer, 16, n_images=2),
        x,
        6,
    )


def test_prompts_of_a_dialog_are_those_of_training(model, tokenizer):
    """Turns put together in the chat give, id by id, what encode_conversation trains on."""
    dialog = [
        {"from": "human", "value": "<image>\n图中有什么？"},
        {"from": "gpt", "value": "左肺结节。"},
        {"from": "human", "value": "多大？"},
        {"from": "gpt", "value": "3毫米。"},
    ]
    trained, _ = encode_conversation(dialog, tokenizer, 16)
    chat = sample.Chat(model, tokenizer, pictures(1))
    list(chat.ask("图中有什么？", max_new_tokens=1))
    first = encode_prompt(dialog[:1], tokenizer, 16)
    chat.said = first + tokenizer.encode("左肺结节。")
    list(chat.ask("多大？", max_new_tokens=1))
    n = len(trained) - len(tokenizer.encode("3毫米。")) - 1
    assert trained[: len(first)] == first and chat.held[:n] == trained[:n]


def test_an_interrupted_answer_stays_as_far_as_it_came(model, tokenizer):
    chat = sample.Chat(model, tokenizer, pictures(1))
    texts = chat.ask("图中有什么？", max_new_tokens=9)
    while not "".join(t for _, t in zip(range(2), texts, strict=False)):
        pass
    texts.close()  # what Ctrl-C does to it
    said = chat.said
    assert said and len(chat.held) <= len(said)
    list(chat.ask("多大？", max_new_tokens=4))
    prompt = said + [2] + tokenizer.encode("USER: 多大？ ASSISTANT:")
    assert chat.answer.ids == whole(model, tokenizer, prompt, pictures(1), 4)
    with pytest.raises(ValueError, match="/reset"):
        list(chat.ask("长" * 400, max_new_tokens=4))
    before = list(chat.said)
    with pytest.raises(ValueError, match="Unicode"):
        list(chat.ask("\ud800", max_new_tokens=4))
    assert chat.said == before


def test_a_kept_cache_changes_no_answer(model):
    """generate() goes on from a cache that holds any beginning of its prompts, rows of different
    lengths included.
    """
    x = pictures(3)
    want = q.answer_ids(model, ROWS, x, max_new_tokens=8)
    cache = q.KVCache(2, 100)
    q.answer_ids(model, ROWS, x, max_new_tokens=8, cache=cache)
    for back in (1, 3):
        cache.truncate(torch.tensor([len(row) - back for row in ROWS]))
        assert q.answer_ids(model, ROWS, max_new_tokens=8, cache=cache) == want
    with pytest.raises(ValueError, match="cache"):
        q.answer_ids(model, ROWS, max_new_tokens=8, cache=cache)  # it holds more than all of them


@pytest.mark.parametrize(
    "stop, shown, reason",
    [
        (["c"], "ab", "stop"),
        (["bc"], "a", "stop"),
        (["x", "cd"], "ab", "stop"),
        (["de"], "abcd", "length"),
        ([], "abcd", "length"),
        (["abcde"], "abcd", "length"),
        (["d", "b"], "a", "stop"),
    ],
)
def test_stop_texts_are_never_shown(stop, shown, reason):
    """Whole texts are found across tokens; what only begins like one is shown in the end."""
    answer = StreamedAnswer.__new__(StreamedAnswer)
    answer.finish_reason, answer.ids = "length", []
    assert (
        "".join(answer._until_stop(iter("abcd"), stop)) == shown and answer.finish_reason == reason
    )


def test_a_stop_text_is_no_part_of_the_dialog(model, tokenizer):
    """What the model goes on from is what was shown: the tokens of the stop text and after it are
    forgotten.
    """
    chat = sample.Chat(model, tokenizer, pictures(1))
    whole_text = "".join(chat.ask("图中有什么？", max_new_tokens=9))
    stop = whole_text[len(whole_text) // 2 :][:2]
    chat.reset()
    shown = "".join(chat.ask("图中有什么？", max_new_tokens=9, stop=[stop]))
    assert shown == whole_text.partition(stop)[0] and chat.answer.finish_reason == "stop"
    assert (
        len(tokenizer.decode(chat.answer.ids)) <= len(shown)
        and chat.said[-len(chat.answer.ids) :] == chat.answer.ids
    )
    list(chat.ask("多大？", max_new_tokens=4))
    assert chat.answer.ids == whole(
        model, tokenizer, chat.said[: -len(chat.answer.ids)], pictures(1), 4
    )


@torch.no_grad()
def test_attention_equals_transformers(tmp_path, report):
    """Rows of the heatmap's attention are those of transformers' eager softmax, averaged over heads
    and layers, and each sums to 1.
    """
    model = make_qilin()
    save_qilin(model, None, tmp_path / "out")
    hf = LlavaForConditionalGeneration.from_pretrained(
        tmp_path / "out", attn_implementation="eager"
    ).eval()
    prompt, answer, x = ROWS[2], [17, 23, 99, 5], pictures(2)
    ids = torch.tensor([prompt + answer])
    all_layers = hf(
        input_ids=ids.masked_fill(ids == q.IMAGE_TOKEN_INDEX, hf.config.image_token_id),
        pixel_values=x,
        output_attentions=True,
    ).attentions
    for layers in (range(1), range(1, 2), range(2)):
        got = sample.answer_attention(model, prompt + answer, len(prompt), x, layers)
        want = torch.stack([all_layers[i] for i in layers]).mean((0, 2))[0, len(prompt) - 1 : -1]
        report("attention of an answer", (got - want).abs().max(), 1e-5)
        assert got.shape == want.shape == (4, ids.shape[1]) and torch.allclose(
            got.sum(-1), torch.ones(4), atol=1e-5
        )
    assert not any(m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize(
    "size, mode", [((80, 40), "pad"), ((40, 80), "pad"), ((80, 40), "crop"), ((600, 300), "pad")]
)
def test_heat_lies_where_the_patch_was(size, mode):
    """One hot patch of 4 x 4 colours its own place of the picture, through the squaring, and leaves
    the far side as it was.
    """
    image, heat = Image.new("RGB", size, (100, 100, 100)), np.zeros((4, 4), np.float32)
    heat[1, 0] = 1
    pair = np.asarray(sample.draw_heat(image, heat, mode)).astype(int)
    height, width = pair.shape[:2]
    width = (width - 8) // 2
    assert abs(width / height - size[0] / size[1]) < 0.02 and max(width, height) >= 512
    changed = np.abs(pair[:, width + 8 :] - pair[:, :width]).sum(-1) > 90
    side = (max if mode == "pad" else min)(width, height)
    centre = (height - side) / 2 + 1.5 * side / 4, (width - side) / 2 + 0.5 * side / 4
    ys, xs = np.nonzero(changed)
    if len(ys):  # in a padded wide picture row 1 of 4 is partly picture
        assert (
            abs(xs.mean() - max(centre[1], 0)) < side / 5 and abs(ys.mean() - centre[0]) < side / 5
        )
    assert not changed[:, -width // 4 :].any() and (len(ys) or size == (40, 80))


def test_heatmap_of_a_command(toy, toy_model, tmp_path):
    done = subprocess.run(
        [
            sys.executable,
            ROOT / "sample.py",
            *sorted((toy / "images").glob("heldout*"))[:2],
            "两张图相同吗？",
            "--model",
            toy_model,
            "--max-new-tokens",
            "4",
            "--heatmap",
            tmp_path / "heat.png",
            "--heatmap-layers",
            "1-2",
        ],
        capture_output=True,
        text=True,
    )
    assert (
        done.returncode == 0
        and "of the attention went to the picture" in done.stderr
        and "layers 1 to 2" in done.stderr
    ), done.stderr
    assert Image.open(tmp_path / "heat.png").size[1] > 1000 and [
        p.name for p in tmp_path.iterdir()
    ] == ["heat.png"]


def test_a_person_at_a_terminal(toy, toy_model):
    """Through a pseudo-terminal: prompt, answer, Ctrl-C during an answer goes back to the prompt,
    Ctrl-C at the prompt ends with 130.
    """
    picture = next((toy / "images").glob("heldout*"))
    master, slave = pty.openpty()
    process = subprocess.Popen(
        [
            sys.executable,
            str(ROOT / "sample.py"),
            "--chat",
            str(picture),
            "--model",
            str(toy_model),
            "--max-new-tokens",
            "100000",
            "--temperature",
            "5",
            "--seed",
            "1",
        ],
        stdin=slave,
        stdout=slave,
        stderr=subprocess.STDOUT,
        env=dict(os.environ, TERM="dumb"),
        start_new_session=True,
        close_fds=True,
    )
    os.close(slave)
    seen = b""

    def until(text, seconds=60):
        nonlocal seen
        end = time.time() + seconds
        while text not in seen and time.time() < end:
            if select.select([master], [], [], 0.1)[0]:
                seen += os.read(master, 4096)
        assert text in seen, seen.decode(errors="replace")
        seen = seen.partition(text)[2]

    try:
        until(b"> ")
        os.write(master, "病灶在哪里？\n".encode())
        until("？\r\n".encode())  # the echo; what follows is the answer
        if not seen:
            seen += os.read(master, 4096)
        process.send_signal(signal.SIGINT)  # hundreds of tokens are still to come
        until(b"(stopped)")
        until(b"> ")
        os.write(master, b"/image /gone.png\n")
        until(b"no such picture: /gone.png")
        until(b"> ")
        os.write(master, b"/nonsense\n")
        until(b"/reset and /quit")
        until(b"> ")
        time.sleep(
            0.5
        )  # a signal between the prompt and readline's wait is noticed with the next key only
        process.send_signal(signal.SIGINT)
        assert process.wait(20) == 130
    finally:
        process.kill()
        os.close(master)


@pytest.mark.skipif(
    not os.environ.get("LONG") or not shutil.which("c++"),
    reason="a minute of compilation, and a C++ compiler (--long)",
)
def test_compiled_it_says_the_same(toy, toy_model):
    words = [
        sys.executable,
        ROOT / "sample.py",
        next((toy / "images").glob("heldout*")),
        "病灶在哪里？",
        "--model",
        toy_model,
        "--max-new-tokens",
        "8",
    ]
    plain, compiled = (
        subprocess.run([*map(str, words), *more], capture_output=True, text=True)
        for more in ([], ["--compile"])
    )
    assert compiled.returncode == 0 and compiled.stdout == plain.stdout != "\n", compiled.stderr[
        -2000:
    ]
