"""Promise: the chat template of an export renders, for every shape of conversation, the prompt that
serve.py asks the model with and training taught it, in transformers 4.57 and 5; what no prompt of
ours can hold is refused by name.
"""

import json
import os
import random
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT
from jinja2.exceptions import TemplateError
from PIL import Image
from test_fast_tokenizer import SHANGHAI, UNIGRAM, exported_with, merged, trained
from transformers import AutoProcessor

from model_io.tokens import Tokenizer, encode_conversation, encode_prompt
from qilin_min import IMAGE_TOKEN_INDEX
from serving.requests import read_messages

N_IMAGE = 16
WORDS = (
    "肺部",
    " ",
    "\n",
    "有没有结节？",
    "What",
    "  is",
    " 3.5cm ",
    "：",
    "😀",
    "右肺上叶",
    ":",
    "\t",
)
KINDS = {
    "as LLaMA": {},
    "no dummy prefix": dict(add_dummy_prefix=False),
    "blanks trimmed": dict(remove_extra_whitespaces=True),
    "unigram": UNIGRAM,
    "no tokenizer.json": None,
}


def exported(tmp_path, options):
    """An export with a small tokenizer."""
    path = trained(tmp_path, **(options or {}))
    if options is None:
        path = merged(path, SHANGHAI, tmp_path)
    out = exported_with(path, tmp_path)
    assert (out / "tokenizer.json").exists() == (options is not None)
    return out


@pytest.fixture(scope="module", params=KINDS)
def folder(request, tmp_path_factory):
    return exported(tmp_path_factory.mktemp("export"), KINDS[request.param])


def some_text(chance):
    text = "".join(chance.choices(WORDS, k=chance.randint(1, 5)))
    return text if text.strip() else text + "x"


def user_content(chance):
    """One text, or texts and pictures in any order."""
    if chance.random() < 0.25:
        return some_text(chance)
    parts = [{"type": "text", "text": some_text(chance)} for _ in range(chance.randint(0, 2))]
    parts += [{"type": "image"} for _ in range(chance.randint(0, 2))]
    if parts and chance.random() < 0.2:
        parts.append({"type": "text", "text": chance.choice(("", " ", "\n"))})
    chance.shuffle(parts)
    has_content = any(part.get("text", "x").strip() for part in parts)
    return parts if has_content else [{"type": "image"}]


def random_messages(chance, ends_with_answer):
    messages = []
    for _ in range(chance.choice((0, 0, 1, 2))):
        role = chance.choice(("system", "developer"))
        messages.append({"role": role, "content": chance.choice((some_text(chance), " ", ""))})
    for turn in range(chance.randint(1, 3)):
        if turn:
            messages.append({"role": "assistant", "content": some_text(chance)})
        messages.append({"role": "user", "content": user_content(chance)})
    if ends_with_answer:
        answer = some_text(chance)
        content = chance.choice((answer, [{"type": "text", "text": answer}]))
        messages.append({"role": "assistant", "content": content})
    return messages


def as_openai(messages):
    """The same messages with pictures as serve.py takes them."""
    picture = {"type": "image_url", "image_url": {"url": "data:,"}}
    out = []
    for message in messages:
        content = message["content"]
        if not isinstance(content, str):
            content = [picture if part["type"] == "image" else part for part in content]
        out.append({"role": message["role"], "content": content})
    return out


def our_ids(messages, tokenizer):
    """What serve.py would ask, or, of messages that end with an answer, training would teach; a
    picture as one id, the first past the tokenizer's."""
    last = messages[-1]
    is_answered = last["role"] == "assistant"
    asked = read_messages(as_openai(messages[:-1] if is_answered else messages))
    if is_answered:
        content = last["content"]
        text = content if isinstance(content, str) else content[0]["text"]
        conversation = [*asked.conversation, {"from": "gpt", "value": text}]
        ids, _ = encode_conversation(
            conversation, tokenizer, 1, max_length=10**6, n_images=asked.n_images
        )
    else:
        ids = encode_prompt(asked.conversation, tokenizer, 1, n_images=asked.n_images)
    return [tokenizer.vocab_size if i == IMAGE_TOKEN_INDEX else i for i in ids]


def questions(n):
    chance = random.Random(7)
    asked = []
    for i in range(n):
        messages = random_messages(chance, ends_with_answer=i % 3 == 0)
        asked.append({"messages": messages, "add_generation_prompt": i % 3 != 0})
    return asked


def test_any_conversation_in_transformers_5(folder):
    processor = AutoProcessor.from_pretrained(folder, backend="pil")
    tokenizer = Tokenizer(folder)
    n_images = 0
    for question in questions(300):
        text = processor.apply_chat_template(**prompt_arguments(question))
        ids = processor.tokenizer(text, add_special_tokens=False)["input_ids"]
        assert ids == our_ids(question["messages"], tokenizer), question
        n_images += ids.count(tokenizer.vocab_size)
    assert n_images > 100


def prompt_arguments(question):
    return {
        "conversation": question["messages"],
        "add_generation_prompt": question["add_generation_prompt"],
    }


REFUSED = {
    "a control token in a question": ([("user", "a</s>b")], "</s> in a text"),
    "a begin token in an answer": ([("user", "a"), ("assistant", "<s>")], "<s> in a text"),
    "a placeholder beside parts": (
        [("user", [{"type": "text", "text": "a <image>"}])],
        "<image> in a text",
    ),
    "a placeholder in an answer": ([("user", "a"), ("assistant", "<image>")], "only the messages"),
    "a picture of the system's": ([("system", [{"type": "image"}]), ("user", "a")], "only the"),
    "an empty question": ([("user", " \n")], "a message of user is empty"),
    "no parts": ([("user", [])], "a message of user is empty"),
    "an empty answer": ([("user", "a"), ("assistant", "")], "a message of assistant is empty"),
    "an answer first": ([("assistant", "a")], "by turns"),
    "two questions": ([("user", "a"), ("user", "b")], "by turns"),
    "a late system": ([("user", "a"), ("assistant", "b"), ("system", "c")], "by turns"),
    "another role": ([("user", "a"), ("tool", "b")], "by turns"),
    "a video": ([("user", [{"type": "video"}])], "not video"),
    "nothing to ask": ([("user", "a"), ("assistant", "b")], "nothing to ask"),
}


def refused_messages(kind):
    return [{"role": role, "content": content} for role, content in REFUSED[kind][0]]


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    folder = exported(tmp_path_factory.mktemp("plain"), {})
    return folder, AutoProcessor.from_pretrained(folder, backend="pil")


@pytest.mark.parametrize("kind", REFUSED)
def test_what_no_prompt_holds_is_refused(kind, plain):
    _, processor = plain
    with pytest.raises(TemplateError, match=REFUSED[kind][1]):
        processor.apply_chat_template(refused_messages(kind), add_generation_prompt=True)


@pytest.mark.parametrize(
    "value", ["<image>\n肺部？", "肺<image>部", "<image>", "<image><image> a "]
)
def test_placeholders_in_one_text_are_a_data_file_s(value, plain):
    folder, processor = plain
    tokenizer = Tokenizer(folder)
    messages = [{"role": "user", "content": value}]
    text = processor.apply_chat_template(messages, add_generation_prompt=True)
    ids = encode_prompt([{"from": "human", "value": value}], tokenizer, 1)
    want = [tokenizer.vocab_size if i == IMAGE_TOKEN_INDEX else i for i in ids]
    assert processor.tokenizer(text, add_special_tokens=False)["input_ids"] == want


def test_without_a_generation_prompt_it_is_the_beginning(plain):
    """Of the same conversation with the answer."""
    _, processor = plain
    for question in questions(60)[::3]:
        messages = question["messages"]
        whole = processor.apply_chat_template(messages)
        asked = processor.apply_chat_template(messages[:-1], add_generation_prompt=True)
        bare = processor.apply_chat_template(messages[:-1])
        assert whole.startswith(asked) and asked == bare + " ASSISTANT:"


def test_pictures_and_ids_through_the_processor(plain):
    """In one call, as people do; a picture takes its 16 places."""
    folder, processor = plain
    tokenizer = Tokenizer(folder)
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 256, (50, 30, 3), dtype=np.uint8))
    picture = {"type": "image", "image": image}
    messages = [
        {"role": "system", "content": "请用中文回答。"},
        {"role": "user", "content": [{"type": "text", "text": "肺部？"}, picture]},
        {"role": "assistant", "content": "右肺上叶见结节。"},
        {"role": "user", "content": [picture, {"type": "text", "text": "多大？"}]},
    ]
    inputs = processor.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    conversation = [
        {"from": "human", "value": "请用中文回答。\n肺部？"},
        {"from": "gpt", "value": "右肺上叶见结节。"},
        {"from": "human", "value": "多大？"},
    ]
    ids = encode_prompt(conversation, tokenizer, N_IMAGE, n_images=[1, 1])
    want = [tokenizer.vocab_size if i == IMAGE_TOKEN_INDEX else i for i in ids]
    assert inputs["input_ids"][0].tolist() == want
    assert inputs["pixel_values"].shape[0] == 2


@pytest.mark.parametrize("kind", ["as LLaMA", "no tokenizer.json"])
def test_any_conversation_in_transformers_4(kind, tmp_path):
    target = os.environ.get("TRANSFORMERS_4")
    if not target:
        pytest.skip("TRANSFORMERS_4 names no folder with transformers 4.57.6")
    folder = exported(tmp_path, KINDS[kind])
    refused = [{"messages": refused_messages(k), "add_generation_prompt": True} for k in REFUSED]
    asked = questions(120)
    (tmp_path / "asked.json").write_text(json.dumps(refused + asked))
    tool = ROOT / "tests/tools/transformers4_prompts.py"
    done = subprocess.run(
        [sys.executable, tool, folder, tmp_path / "asked.json", tmp_path / "seen.json"],
        capture_output=True,
        text=True,
        env=dict(os.environ, PYTHONPATH=target, OMP_NUM_THREADS="1"),
    )
    assert done.returncode == 0, done.stderr[-3000:]
    seen = json.loads((tmp_path / "seen.json").read_text())
    for name, answer in zip(REFUSED, seen[: len(refused)], strict=True):
        assert REFUSED[name][1] in answer["error"], name
    tokenizer = Tokenizer(folder)
    for question, answer in zip(asked, seen[len(refused) :], strict=True):
        assert answer["ids"] == our_ids(question["messages"], tokenizer), question
