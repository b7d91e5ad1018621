"""A picture is computed once for all that is asked about it, and what is said and scored is the
same as if each question were asked alone."""

from pathlib import Path

import pytest
import torch
from conftest import IMG, make_qilin, pictures

import qilin_min as q
from evaluate import answer_all
from evaluation.answers import Predictions
from evaluation.asking import ask_batch
from evaluation.testsets import Question, by_pictures
from model_io.beginnings import Beginnings
from model_io.tokens import StreamedAnswer

OPTIONS = {"A": "肝脏", "B": "左肺"}


@pytest.fixture
def model():
    return make_qilin(text=dict(vocab_size=32064, max_position_embeddings=512))


@pytest.fixture
def towers(model, monkeypatch):
    """How many pictures each pass of the tower has had."""
    passes = []
    run = model.vision_tower.forward

    def counted(pixels):
        passes.append(len(pixels))
        return run(pixels)

    monkeypatch.setattr(model.vision_tower, "forward", counted)
    return passes


PROMPTS = [
    [1, 5, *IMG, 7, 8],
    # the same picture, asked otherwise
    [1, 5, *IMG, 9],
    # other words before it
    [1, 6, *IMG, 7],
    # none
    [1, 11, 12],
    # two
    [1, 5, *IMG, *IMG, 13],
]
# of the five prompts the pictures, of two that there are
OWN = [0, 0, 0, 0, 1]


def test_logits_and_answers_are_those_of_each_alone(model, towers, report):
    x = pictures(2)[OWN]
    beginnings = Beginnings(model)
    cache = beginnings.cache_for(PROMPTS, x, 6)
    assert towers == [4]
    together = q.answer_ids(model, PROMPTS, cache=cache, max_new_tokens=6)
    rest = Beginnings(model).cache_for(PROMPTS, x, 6)
    n_new = torch.tensor([len(row) for row in q.not_yet_held(PROMPTS, rest)])
    ids = q.pad_rows(q.not_yet_held(PROMPTS, rest), 0)
    with torch.no_grad():
        logits = model(ids, cache=rest, lengths=n_new)
    start = 0
    for i, prompt in enumerate(PROMPTS):
        n = prompt.count(q.IMAGE_TOKEN_INDEX) // len(IMG)
        own = x[start : start + n] if n else None
        start += n
        assert together[i] == q.answer_ids(model, [prompt], own, max_new_tokens=6)[0]
        with torch.no_grad():
            alone = model(torch.tensor([prompt]), own)[0, -1]
        report("logits after a beginning", (logits[i] - alone).abs().max(), 1e-5)


def test_a_picture_is_computed_once(model, towers):
    beginnings = Beginnings(model, n_kept=2)
    one, other, third = pictures(3)[:, None]
    for prompt in PROMPTS[:2] * 2:
        beginnings.cache_for([prompt], one, 6)
    assert towers == [1]
    # the same ids, another picture
    beginnings.cache_for([PROMPTS[0]], other, 6)
    assert towers == [1, 1]
    # the one used longest ago makes room
    beginnings.cache_for([PROMPTS[0]], one, 6)
    beginnings.cache_for([PROMPTS[0]], third, 6)
    assert towers == [1, 1, 1] and len(beginnings.kept) == 2
    beginnings.cache_for([PROMPTS[0]], one, 6)
    assert towers == [1, 1, 1]
    beginnings.cache_for([PROMPTS[0]], other, 6)
    assert towers == [1, 1, 1, 1]


def test_pictures_that_do_not_fit_the_prompts_are_refused(model):
    beginnings = Beginnings(model)
    for pixels in (None, pictures(2)):
        with pytest.raises(ValueError, match="places for 1 pictures"):
            beginnings.cache_for([PROMPTS[0]], pixels, 6)
    with pytest.raises(ValueError, match="positions end at 512"):
        beginnings.cache_for([[1, *IMG] + [5] * 600], pictures(1), 6)
    assert not beginnings.kept


def question(i, text, names, choices):
    return Question(
        i,
        [{"from": "human", "value": text}],
        "肝脏",
        [Path(name) for name in names],
        len(names),
        choices=choices,
        letter="A" if choices else "",
    )


def test_a_batch_says_and_scores_what_each_question_would(model, towers, tokenizer):
    """Open answer, truth, options, answer with options: two questions about one picture, two with
    options; each picture through the tower once."""
    batch = [
        question(0, "这是什么？", ["a"], OPTIONS),
        question(1, "有什么异常？", ["a"], OPTIONS),
        question(2, "在哪里？", ["b"], {}),
    ]
    x = pictures(2)[[0, 0, 1]]
    together = ask_batch(Beginnings(model), tokenizer, batch, x, 6)
    assert sum(towers) == 2
    for one, said, own in zip(batch, together, x, strict=True):
        (alone,) = ask_batch(Beginnings(model), tokenizer, [one], own[None], 6)
        assert (said.answer, said.choice_answer) == (alone.answer, alone.choice_answer)
        pairs = zip([said.truth, *said.options], [alone.truth, *alone.options], strict=True)
        for a, b in pairs:
            # written with four digits
            assert a.n_tokens == b.n_tokens and abs(a.total - b.total) < 1.01e-4


def test_the_grey_is_computed_once_a_run(model, towers, tokenizer, tmp_path, monkeypatch):
    """Six questions about three pictures, one at a time and those of a picture apart: four
    pictures in all."""
    monkeypatch.setattr("evaluate.preprocess_image", lambda path, *_: drawn(path))
    asked = [question(i, f"问题{i}？", ["abc"[i % 3]], OPTIONS) for i in range(6)]
    assert list(by_pictures(dict(enumerate(asked)))) == [0, 3, 1, 4, 2, 5]
    with Predictions(tmp_path / "predictions.jsonl") as predictions:
        answer_all(
            predictions,
            asked,
            model,
            tokenizer,
            file="file",
            batch_size=1,
            max_new_tokens=4,
            skip_bad=False,
        )
    assert len(predictions.answered) == 6 and sum(towers) == 3 + 1


def drawn(path):
    seed = ord(str(path)[0]) if isinstance(path, Path) else 0
    return torch.randn(3, 56, 56, generator=torch.Generator().manual_seed(seed))


def test_a_server_answers_the_same_from_a_kept_picture(model, towers, tokenizer):
    beginnings = Beginnings(model)
    texts = []
    for kept in (None, beginnings, beginnings):
        answer = StreamedAnswer(
            model, tokenizer, PROMPTS[0], pictures(1), beginnings=kept, max_new_tokens=8
        )
        texts.append("".join(answer))
    assert texts[0] == texts[1] == texts[2] and towers == [1, 1]
