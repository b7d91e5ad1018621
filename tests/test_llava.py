"""A folder that save_qilin writes is, to transformers, a LLaVA with the same logits, answers,
prompt ids and pixels; to us, the same bits.
"""

import json

import numpy as np
import pytest
import torch
from conftest import IMG, ROW_PICTURES, ROWS, edit_json, hf_ids, make_qilin, pictures, words
from PIL import Image
from transformers import AutoProcessor, LlavaForConditionalGeneration

import qilin_min as q
from model_io.export import save_qilin
from model_io.load import load_qilin
from model_io.pixels import preprocess_image
from model_io.tokens import SYSTEM, Tokenizer, encode_prompt


def saved(tmp_path, projector_type, tokenizer=None, **changes):
    model = make_qilin(projector_type, **changes)
    save_qilin(model, tokenizer, tmp_path / "out")
    return model, tmp_path / "out"


def load_hf(folder):
    hf, info = LlavaForConditionalGeneration.from_pretrained(
        folder, output_loading_info=True, attn_implementation="eager"
    )
    assert not any(info.values()), info
    return hf.eval()


@pytest.mark.parametrize("projector_type", ["linear", "mlp2x_gelu"])
@torch.no_grad()
def test_logits_equal_llava(projector_type, tmp_path, report):
    model, folder = saved(tmp_path, projector_type)
    hf, ids, x = load_hf(folder), q.pad_rows(ROWS, 0), pictures(3)
    V = model.config.text.vocab_size
    batch, worst = model(ids, x), 0.0
    for i, row in enumerate(ROWS):
        own = torch.tensor([row])
        alone = model(own, x[ROW_PICTURES[i]])[0]
        want = hf(input_ids=hf_ids(own, hf), pixel_values=x[ROW_PICTURES[i]] if i else None).logits[
            0, :, :V
        ]
        worst = max(worst, (alone - want).abs().max(), (batch[i, : len(row)] - want).abs().max())
    assert batch.std() > 0.1
    report(f"llava logits ({projector_type})", worst, 1e-4)
    mask = (torch.arange(ids.shape[1]) < torch.tensor([len(r) for r in ROWS])[:, None]).long()
    want = hf(input_ids=hf_ids(ids, hf), pixel_values=x, attention_mask=mask).logits[..., :V]
    report(
        f"llava logits in a batch ({projector_type})",
        ((batch - want).abs() * mask[..., None]).max(),
        1e-4,
    )


@torch.no_grad()
def test_pictures_and_places_must_agree():
    model = make_qilin()
    for ids, x in (
        (ROWS[1], pictures(2)),
        (ROWS[2], pictures(1)),
        (ROWS[0], pictures(1)),
        (ROWS[1], None),
        (ROWS[1], pictures(0)),
        ([1] + IMG[:-1] + [5], pictures(1)),
    ):
        with pytest.raises(ValueError, match="picture positions"):
            model(torch.tensor([ids]), x)


@pytest.mark.parametrize("projector_type", ["linear", "mlp2x_gelu"])
@pytest.mark.parametrize("tie", [False, True])
def test_reload_is_bit_exact(projector_type, tie, tmp_path, monkeypatch):
    monkeypatch.setattr("model_io.export.SHARD_BYTES", 60_000)
    model, folder = saved(tmp_path, projector_type, text=dict(tie_word_embeddings=tie))
    assert len(list(folder.glob("model-*.safetensors"))) > 2
    again = load_qilin(folder)
    assert again.config.projector_type == projector_type and again.config.n_token_ids == 300
    ours, theirs = dict(model.named_parameters()), dict(again.named_parameters())
    assert ours.keys() == theirs.keys()
    for name, param in ours.items():
        assert torch.equal(theirs[name][: len(param)], param), name
    load_hf(folder)  # the shards as well


@pytest.mark.parametrize("projector_type", ["linear", "mlp2x_gelu"])
def test_greedy_answers_equal_transformers(projector_type, tmp_path):
    _, folder = saved(tmp_path, projector_type)
    model, hf, x = load_qilin(folder), load_hf(folder), pictures(3)
    together = q.answer_ids(model, ROWS, x, max_new_tokens=24)
    for i, row in enumerate(ROWS):
        picture = x[ROW_PICTURES[i]] if i else None
        alone = q.answer_ids(model, [row], picture, max_new_tokens=24)[0]
        ids = hf_ids(torch.tensor([row]), hf)
        with_picture = {"pixel_values": picture} if i else {}
        want = hf.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            **with_picture,
            do_sample=False,
            max_new_tokens=24,
        )
        want = want[0, len(row) :].tolist()
        assert alone == [t for t in want if t != 2]
        assert together[i] == alone
    assert len({tuple(a) for a in together}) == 3 and all(len(set(a)) > 1 for a in together)


@torch.no_grad()
def test_ids_past_the_tokenizer_are_never_said():
    model = make_qilin()
    model.lm_head.weight[300:] *= 20  # would win nearly always
    assert (model(torch.tensor([ROWS[0]])).argmax(-1) >= 300).any()
    for options in (
        {},
        dict(temperature=1.5, seed=0),
        dict(temperature=1.0, top_k=5, top_p=0.9, repetition_penalty=1.3, seed=1),
    ):
        answers = q.answer_ids(model, ROWS, pictures(3), max_new_tokens=20, **options)
        assert all(0 <= i < 300 for answer in answers for i in answer)


@torch.no_grad()
def test_an_ended_row_says_none_and_the_others_go_on():
    model = make_qilin()
    full = q.answer_ids(model, ROWS[:1], max_new_tokens=12)[0]
    model.config.text.eos_token_id = end = full[4]  # what row 0 says is now the end
    first = full.index(end)
    steps = list(q.generate(model, ROWS, pictures(3), max_new_tokens=12))
    assert [s[0] for s in steps][: first + 1] == full[: first + 1] and all(
        s[0] is None for s in steps[first + 1 :]
    )
    assert (
        q.answer_ids(model, ROWS, pictures(3), max_new_tokens=12)[1]
        == q.answer_ids(model, ROWS[1:2], pictures(3)[:1], max_new_tokens=12)[0]
    )


def test_any_of_several_ids_ends_an_answer(tmp_path, tokenizer):
    """A list in config.json, as LLaMA-3 has it; the export keeps the list."""
    model, folder = saved(tmp_path, "linear")
    full = q.answer_ids(load_qilin(folder), ROWS[:1], max_new_tokens=12)[0]
    edit_json(
        folder / "config.json",
        text_config={
            **json.loads((folder / "config.json").read_text())["text_config"],
            "eos_token_id": [299, full[4]],
        },
    )
    model = load_qilin(folder)
    assert q.answer_ids(model, ROWS[:1], max_new_tokens=12)[0] == full[: full.index(full[4])]
    save_qilin(model, None, tmp_path / "again")
    assert load_qilin(tmp_path / "again").config.end_ids == [299, full[4]]
    load_hf(tmp_path / "again")


@torch.no_grad()
def test_a_row_at_the_last_position_ends_alone():
    """A long neighbour does not shorten a short row's answer: each has all positions."""
    model = make_qilin(text=dict(max_position_embeddings=60))
    rows = [words(56, 1), words(5, 2)]
    together = q.answer_ids(model, rows, max_new_tokens=30)
    assert together == [q.answer_ids(model, [row], max_new_tokens=30)[0] for row in rows]
    assert len(together[0]) <= 4 < len(together[1])


def test_damaged_weights_are_named_when_they_show():
    model = make_qilin()
    model.get_parameter("model.layers.1.mlp.up_proj.weight").data[3, 4] = torch.nan
    with pytest.raises(ValueError, match="not finite in model.layers.1.mlp.up_proj.weight"):
        q.answer_ids(model, ROWS, pictures(3), max_new_tokens=3)


def test_prompt_as_long_as_the_positions():
    model = make_qilin(text=dict(max_position_embeddings=10))
    assert len(q.answer_ids(model, [words(8, 1)], max_new_tokens=9)[0]) <= 2
    with pytest.raises(ValueError, match="empty"):
        q.answer_ids(model, [words(8, 1), []], max_new_tokens=9)
    with pytest.raises(ValueError, match="10"):
        q.answer_ids(model, [words(10, 1)], max_new_tokens=9)


# --- the processor files --------------------------------------------------------------------------

QUESTIONS = [
    "<image>",
    "<image>\nWhat does the scan show?",
    "<image>\n肺部有没有结节?请说明。",
    "<image>\n<image>\nCompare\nboth 龘 😀.",
    "no picture,  two blanks",
]


@pytest.fixture(scope="module")
def processor_and_folder(tmp_path_factory, tokenizer):
    _, folder = saved(
        tmp_path_factory.mktemp("export"),
        "linear",
        tokenizer,
        n_token_ids=32000,
        text=dict(
            vocab_size=32000,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=1,
            num_key_value_heads=4,
        ),
    )
    return AutoProcessor.from_pretrained(folder, backend="pil"), folder


def as_messages(conversation):
    messages = []
    for turn in conversation:
        content = [{"type": "image"}] * turn["value"].count("<image>")
        content.append({"type": "text", "text": turn["value"].replace("<image>", "").strip()})
        messages.append(
            {"role": "user" if turn["from"] == "human" else "assistant", "content": content}
        )
    return messages


@pytest.mark.parametrize("question", QUESTIONS)
@pytest.mark.parametrize("n_turns", [1, 3])
def test_processor_gives_our_ids_and_pixels(question, n_turns, processor_and_folder, tokenizer):
    processor, folder = processor_and_folder
    follow_up = (
        [{"from": "gpt", "value": "右肺上叶可见结节。"}, {"from": "human", "value": "Is it 5 mm?"}]
        if n_turns == 3
        else []
    )
    conversation = [{"from": "human", "value": question}, *follow_up]
    rng = np.random.default_rng(0)
    images = [
        Image.fromarray(rng.integers(0, 256, shape, dtype=np.uint8))
        for shape in ((61, 40, 3), (33, 78))
    ][: question.count("<image>")]

    prompt = processor.apply_chat_template(as_messages(conversation), add_generation_prompt=True)
    blocks = [f"USER: {question} ASSISTANT:"] + (
        ["右肺上叶可见结节。</s>USER: Is it 5 mm? ASSISTANT:"] if follow_up else []
    )
    assert prompt == "<s>" + SYSTEM + " " + " ".join(blocks)

    out = processor(text=prompt.removeprefix("<s>"), images=images or None, return_tensors="pt")
    ids = torch.tensor([encode_prompt(conversation, Tokenizer(folder), 16)])
    assert torch.equal(out["input_ids"], ids.masked_fill(ids == q.IMAGE_TOKEN_INDEX, 32000))
    assert (ids == q.IMAGE_TOKEN_INDEX).sum() == 16 * len(images)
    if images:
        assert torch.equal(
            out["pixel_values"], torch.stack([preprocess_image(image, size=56) for image in images])
        )
    assert ids[0].tolist() == encode_prompt(conversation, tokenizer, 16)
    load_hf(folder)
