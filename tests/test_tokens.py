"""Ids are those of tokenising the whole released prompt string piece by piece; labels are the
answers and their </s>, nothing else.
"""

import re

import pytest

from model_io.tokens import Tokenizer, encode_conversation, encode_prompt

N = 576
SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)


def dialog(*texts):
    return [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(texts)]


def released_string(conversation):
    text = SYSTEM + " "
    for turn in conversation:
        value = turn["value"]
        if n := value.count("<image>"):
            value = ("<image>\n" * n + value.replace("<image>", "").strip()).strip()
        text += f"USER: {value} " if turn["from"] == "human" else f"ASSISTANT: {value}</s>"
    return text


def legacy_ids(sp, string):
    """What the slow tokenizer gave: each text between control ids encoded on its own, BOS once in
    front.
    """
    ids = [1]
    for piece in re.split("(<image>|</s>)", string):
        ids += (
            [-200] * N
            if piece == "<image>"
            else [2]
            if piece == "</s>"
            else sp.encode(piece)
            if piece
            else []
        )
    return ids


DIALOGS = {
    "one turn": dialog("<image>\nWhat is shown?", "A chest X-ray with a small nodule."),
    "several turns": dialog(
        "<image>\nWhat is shown?", "A CT slice.", "Which organ?", "The liver.", "Sure?", "Yes."
    ),
    "two pictures": dialog("<image>\n<image>\nCompare the two.", "The second is brighter."),
    "a picture in a later turn": dialog("Hello", "Hello!", "<image>\nAnd this?", "An MRI."),
    "picture at the end": dialog("What is shown?\n<image>", "A CT slice."),
    "picture in the middle": dialog("Look <image> here", "Yes."),
    "picture alone": dialog("<image>", "A CT slice."),
    "picture alone, later": dialog("Hello", "Hi.", "<image>\n", "A CT slice."),
    "text only": dialog("What causes anaemia?", "Often a lack of iron."),
    "Chinese": dialog(
        "<image>\n肺部有没有异常?",
        "右肺上叶见一枚磨玻璃结节,直径约5毫米。",
        "需要手术吗?",
        "建议三个月后复查。",
    ),
    "leading blanks": dialog("  two blanks", "  two blanks as well", " one", " one."),
    "trailing blanks": dialog("question  ", "answer  ", "again ", "yes "),
    "newlines": dialog("<image>\nList\n\nthem", "1. heart\n2. lung\n", "\nmore", "\nliver"),
    "emoji and bytes": dialog("<image>\n😀?", "𠮷野家 👍 \u0628 龘"),
    "digits and marks": dialog("<image>\n3.5cm×2cm?", ": : 12%"),
}


@pytest.mark.parametrize("kind", DIALOGS)
def test_ids_equal_the_released_string(kind, tokenizer):
    ids, labels = encode_conversation(DIALOGS[kind], tokenizer, N, max_length=4096)
    assert len(ids) == len(labels)
    assert ids == legacy_ids(tokenizer.sp, released_string(DIALOGS[kind]))


@pytest.mark.parametrize("kind", DIALOGS)
def test_labels_are_the_answers(kind, tokenizer):
    ids, labels = encode_conversation(DIALOGS[kind], tokenizer, N, max_length=4096)
    assert all(b in (a, -100) for a, b in zip(ids, labels, strict=True))
    spans = [[]]
    for label in labels:
        if label == -100 and spans[-1]:
            spans.append([])
        elif label != -100:
            spans[-1].append(label)
    spans = [s for s in spans if s]
    assert all(s[-1] == 2 and s.count(2) == 1 for s in spans)
    assert [tokenizer.sp.decode(s[:-1]) for s in spans] == [
        t["value"] for t in DIALOGS[kind] if t["from"] == "gpt"
    ]


@pytest.mark.parametrize("kind", DIALOGS)
def test_the_prompt_is_the_beginning_of_training(kind, tokenizer):
    conversation = DIALOGS[kind]
    ids, labels = encode_conversation(conversation, tokenizer, N, max_length=4096)
    for n in range(1, len(conversation), 2):
        prompt = encode_prompt(conversation[:n], tokenizer, N)
        assert (
            ids[: len(prompt)] == prompt
            and labels[len(prompt)] != -100
            and labels[len(prompt) - 1] == -100
        )


def test_after_an_end_the_text_starts_afresh(tokenizer):
    ids = encode_conversation(DIALOGS["several turns"], tokenizer, N)[0]
    after = ids[ids.index(2) + 1 : ids.index(2) + 3]
    assert [tokenizer.sp.id_to_piece(i) for i in after] == [
        "▁US",
        "ER",
    ]  # 3148, 1001 with LLaMA's own model


@pytest.mark.parametrize("caption", ["A CT slice.", "胸部X光片", "two\nlines"])
def test_plain_template(caption, tokenizer):
    conversation = dialog("Describe.\n<image>", caption)
    ids, labels = encode_conversation(conversation, tokenizer, N, template="plain")
    want = tokenizer.sp.encode(caption + "\n")
    assert ids == [1] + [-200] * N + want and labels == [-100] * (N + 1) + want
    assert encode_prompt(conversation[:1], tokenizer, N, template="plain") == [1] + [-200] * N


def test_plain_template_keeps_a_leading_blank(tokenizer):
    ids, _ = encode_conversation(dialog("<image>", " blank first"), tokenizer, N, template="plain")
    assert ids[N + 1 :] == tokenizer.sp.encode(" blank first\n")


def test_typed_control_words_are_plain_text(tokenizer):
    question, answer = "what do <image> and </s> and <s> mean?", "</s> ends"
    ids, labels = encode_conversation(dialog(question, answer), tokenizer, N, n_images=0)
    want = (
        [1]
        + tokenizer.sp.encode(f"{SYSTEM} USER: {question} ASSISTANT:")
        + tokenizer.sp.encode(answer)
        + [2]
    )
    assert ids == want and ids.count(2) == 1 and ids.count(1) == 1
    ids = encode_prompt(dialog(question), tokenizer, N, n_images=2)
    assert ids.count(-200) == 2 * N and not set(ids[1:]) & {0, 1, 2}
    assert ids[-len(want) :][-5:] == want[: want.index(2) - len(tokenizer.sp.encode(answer))][-5:]
    chat = dialog(
        "look", "that is an <image>", "really?"
    )  # what the model said goes back into the prompt as plain text as well
    assert encode_prompt(chat, tokenizer, N, n_images=1).count(-200) == N


def test_a_list_says_before_which_turn_pictures_stand(tokenizer):
    """A list with a number a human turn is the same prompt as placeholders in those turns; an int
    is all of them before the first.
    """
    chat = dialog("first", "one", "second", "two", "third")
    marked = [
        dict(turn, value="<image>" * n + turn["value"])
        for turn, n in zip(chat, (1, 0, 2, 0, 0), strict=True)
    ]
    assert (
        encode_prompt(chat, tokenizer, N, n_images=[1, 2])
        == encode_prompt(chat, tokenizer, N, n_images=[1, 2, 0])
        == encode_prompt(marked, tokenizer, N)
    )
    assert encode_prompt(chat, tokenizer, N, n_images=[2]) == encode_prompt(
        chat, tokenizer, N, n_images=2
    )
    assert (
        encode_prompt(chat, tokenizer, N, n_images=[0, 0, 0])
        == encode_prompt(chat, tokenizer, N, n_images=0)
        == encode_prompt(chat, tokenizer, N)
    )
    typed = dialog("</s>", "an <image>", "<image>?")
    assert encode_prompt(typed, tokenizer, N, n_images=[0, 1]).count(-200) == N
    alone = dialog("hello", "hi", "")
    assert encode_prompt(alone, tokenizer, N, n_images=[0, 1]) == encode_prompt(
        dialog("hello", "hi", "<image>"), tokenizer, N
    )
    for wrong in ([1], [1, 0], 1, 0):
        with pytest.raises(ValueError, match="turn 2 is an empty question"):
            encode_prompt(alone, tokenizer, N, n_images=wrong)


def test_too_long_loses_its_end_never_a_picture(tokenizer):
    conversation = dialog("<image>\nWhat?", "word " * 300)
    ids, labels = encode_conversation(conversation, tokenizer, N, max_length=4096)
    for n in (len(ids), len(ids) - 1, 700):
        assert encode_conversation(conversation, tokenizer, N, max_length=n) == (
            ids[:n],
            labels[:n],
        )
    end = len(ids) - ids[::-1].index(-200)  # one past the last picture position
    assert len(encode_conversation(conversation, tokenizer, N, max_length=end)[0]) == end
    assert encode_conversation(conversation, tokenizer, N, max_length=end - 1) == ([], [])
    late = dialog("Hello", "Hi. " * 400, "<image>", "A CT slice.")
    assert encode_conversation(late, tokenizer, N, max_length=1000) == ([], [])


@pytest.mark.parametrize(
    "conversation",
    [
        None,
        [],
        "text",
        {},
        [1],
        [{}],
        [{"from": "human"}],
        [{"from": "human", "value": 3}],
        dialog("a")[::-1] + dialog("b"),
        [{"from": "gpt", "value": "a"}],
        [{"from": "user", "value": "a"}, {"from": "gpt", "value": "b"}],
        dialog("only a question"),
        dialog("a", "b", "c"),
        dialog("a", ""),
        dialog("a", " \n"),
        dialog("a", "see <image>"),
    ],
)
def test_malformed_conversations(conversation, tokenizer):
    with pytest.raises(ValueError):
        encode_conversation(conversation, tokenizer, N)


@pytest.mark.parametrize("wrong", [dict(template="v2"), dict(template="plain")])
def test_wrong_templates(wrong, tokenizer):
    with pytest.raises(ValueError, match="template"):
        encode_conversation(dialog("no picture", "yes"), tokenizer, N, **wrong)


def test_a_prompt_ends_with_a_question(tokenizer):
    with pytest.raises(ValueError):
        encode_prompt(dialog("a", "b"), tokenizer, N)


@pytest.mark.parametrize(
    "text",
    [
        "plain words, twice",
        "肺部可见结节",
        "𠮷野家",
        "龘龘龘靐齉",
        "a😀b👨‍👩‍👧",
        "é\u0301 \u0628",
        "  blanks  ",
        "line\nline\n",
        "𠮷",
    ],
)
def test_a_stream_shows_whole_characters_only(text, tokenizer):
    ids = tokenizer.sp.encode(text)
    parts = list(tokenizer.decode_stream(iter(ids)))
    assert "".join(parts) == tokenizer.decode(ids) == text
    assert not any("\ufffd" in part for part in parts) and all(parts)
    if text in ("𠮷", "龘龘龘靐齉"):
        assert len(ids) > 2 * len(
            text
        )  # several byte tokens a character, or the test proves nothing


def test_a_stream_of_broken_bytes_ends(tokenizer):
    ids = tokenizer.sp.encode("ok 𠮷")[:-1]
    assert "".join(tokenizer.decode_stream(ids)) == tokenizer.decode(ids)
    assert tokenizer.decode([-200, 5000, 99999]) == tokenizer.sp.decode([5000])


def test_bad_tokenizer_files(tmp_path):
    with pytest.raises(FileNotFoundError, match="tokenizer.model"):
        Tokenizer(tmp_path)
    for content in (b"", b"version https://git-lfs.github.com/spec/v1\n"):
        (tmp_path / "tokenizer.model").write_bytes(content)
        with pytest.raises(ValueError, match="tokenizer.model"):
            Tokenizer(tmp_path)
