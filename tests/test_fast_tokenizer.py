"""Promise: a tokenizer.json leaves only where it gives the ids of tokenizer.model, also where
scores tie, and is read here as the tokenizers library reads it; where none can be, the folder says
so and transformers asks sentencepiece.
"""

import io
import json
import random

import pytest
import sentencepiece
import tokenizers
from conftest import in_process, make_qilin
from sentencepiece import sentencepiece_model_pb2
from transformers import AutoProcessor

import convert
from model_io.export import save_qilin
from model_io.fast_tokenizer import (
    HOSTILE,
    FileReading,
    first_difference,
    tokenizer_json,
    trying_texts,
)
from model_io.pieces import PieceKind, PieceModelKind, read_pieces
from model_io.tokenizer_files import fast_tokenizer
from model_io.tokens import Tokenizer

SENTENCES = (
    "右肺上叶见一枚磨玻璃结节，直径约5毫米，边界清楚。",
    "主动脉瘤，升主动脉增宽，建议复查。",
    "A chest X-ray shows a small nodule in the right upper lobe.",
    "肝脏形态正常，未见明显异常密度影，胆囊不大。",
    "  two   blanks    and 3.14 ： ： more，more",
)


def trained(tmp_path, **options):
    """The path of a small sentencepiece model; what is not said is as LLaMA has it."""
    as_llama = dict(
        model_type="bpe",
        vocab_size=420,
        byte_fallback=True,
        character_coverage=1.0,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        hard_vocab_limit=False,
        num_threads=1,
        minloglevel=2,
    )
    written = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(SENTENCES * 4), model_writer=written, **{**as_llama, **options}
    )
    path = tmp_path / "tokenizer.model"
    path.write_bytes(written.getvalue())
    return path


def merged(path, words, tmp_path):
    """A vocabulary as merge_tokenizers.py of Chinese-LLaMA-Alpaca makes it: what is not there yet
    comes behind, with score 0."""
    model = sentencepiece_model_pb2.ModelProto.FromString(path.read_bytes())
    there = {piece.piece for piece in model.pieces}
    for word in words:
        if word not in there:
            model.pieces.add(piece=word, score=0)
            there.add(word)
    (tmp_path / "merged").mkdir(exist_ok=True)
    out = tmp_path / "merged/tokenizer.model"
    out.write_bytes(model.SerializeToString())
    return out


AORTA = ("主动", "动脉", "脉瘤", "动脉瘤", "主动脉", *"主动脉瘤")
SHANGHAI = ("上海", "海上", *"上海")

# with what the names of bytes are made of, or they could not be typed
UNIGRAM = dict(model_type="unigram", vocab_size=430, required_chars="<>0123456789xABCDEF")
MENDED = {
    "as LLaMA": {},
    "no dummy prefix": dict(add_dummy_prefix=False),
    "user-defined, no prefix": dict(
        user_defined_symbols=["<sep>", "结节", "结节，", "(*)"], add_dummy_prefix=False
    ),
    "blanks trimmed": dict(remove_extra_whitespaces=True),
    "no byte fallback": dict(byte_fallback=False),
    "digits split": dict(split_digits=True),
    "pad and unk elsewhere": dict(pad_id=0, bos_id=1, eos_id=2, unk_id=3),
    "unigram": UNIGRAM,
    "unigram, no prefix": dict(**UNIGRAM, add_dummy_prefix=False, remove_extra_whitespaces=True),
    "unigram, no byte fallback": {**UNIGRAM, "byte_fallback": False, "vocab_size": 150},
    "runs of blanks": dict(allow_whitespace_only_pieces=True, split_by_whitespace=False),
}
LEFT_OUT = {
    "words": (dict(model_type="word", use_all_vocab=True), "a word model"),
    "unigram without letters": (dict(model_type="unigram", vocab_size=400), "<0x"),
    "nmt_nfkc": (dict(normalization_rule_name="nmt_nfkc"), "normaliser"),
    "user-defined": (dict(user_defined_symbols=["<sep>"]), "defined by a person"),
    "blanks behind": (dict(treat_whitespace_as_suffix=True), "blanks behind"),
}


def library(content):
    return tokenizers.Tokenizer.from_str(json.dumps(content))


def ids_of(rust, text):
    return rust.encode(text, add_special_tokens=False).ids


def assert_all_agree(path, texts):
    """sentencepiece, the tokenizers library and our reading give the same ids of each text."""
    sp = sentencepiece.SentencePieceProcessor(model_file=str(path))
    content = fast_tokenizer(Tokenizer(path)).content
    assert content is not None, fast_tokenizer(Tokenizer(path)).obstacle
    rust = library(content)
    reading = FileReading(content)
    for text in texts:
        assert sp.encode(text) == ids_of(rust, text) == reading.encode(text), text


@pytest.mark.parametrize("kind", MENDED)
def test_what_can_be_said_is_said(kind, tmp_path):
    path = trained(tmp_path, **MENDED[kind])
    sp = sentencepiece.SentencePieceProcessor(model_file=str(path))
    chance = random.Random(1)
    mixed = ["".join(chance.choices("".join(SENTENCES), k=12)) for _ in range(1000)]
    runs = [char * n for char in " aemo.，" for n in range(1, 40)]
    texts = [
        *trying_texts(read_pieces(sp)),
        *mixed,
        *runs,
        "结节，<sep>结节A b<sep>",
        "x<sep> y (*)z",
        " ",
        "",
    ]
    assert len(texts) > 300
    assert_all_agree(path, texts)


@pytest.mark.parametrize("kind", LEFT_OUT)
def test_what_cannot_is_named(kind, tmp_path):
    options, reason = LEFT_OUT[kind]
    made = fast_tokenizer(Tokenizer(trained(tmp_path, **options)))
    assert made.content is None and reason in made.obstacle


def test_why_a_charsmap_cannot_be_said(tmp_path):
    """sentencepiece makes one character of three jamo, the library leaves them."""
    path = trained(tmp_path, normalization_rule_name="nmt_nfkc", add_dummy_prefix=False)
    model = sentencepiece_model_pb2.ModelProto.FromString(path.read_bytes())
    charsmap = model.normalizer_spec.precompiled_charsmap
    sp = sentencepiece.SentencePieceProcessor(model_file=str(path))
    jamo = "\u1112\u1161\u11ab"
    assert sp.normalize(jamo) == "\ud55c"
    assert tokenizers.normalizers.Precompiled(charsmap).normalize_str(jamo) == jamo


def test_the_real_vocabulary(spm_path):
    """32000 pieces; runs of 16 blanks and more were cut otherwise before, since all pieces of
    blanks have one score."""
    sp = sentencepiece.SentencePieceProcessor(model_file=str(spm_path))
    some = list(trying_texts(read_pieces(sp)))[::37]
    runs = [char * n for char in " =-a\n" for n in range(1, 70)]
    assert_all_agree(spm_path, [*some, *runs, *SENTENCES, *HOSTILE])


def test_a_merged_vocabulary_whose_ties_have_an_order(spm_path, tmp_path):
    """主动脉瘤 is where sorting by score and id goes wrong."""
    path = merged(spm_path, AORTA, tmp_path)
    sp = sentencepiece.SentencePieceProcessor(model_file=str(path))
    assert sp.encode("主动脉瘤", out_type=str) == ["▁", "主动脉", "瘤"]
    assert_all_agree(path, [*SENTENCES, *HOSTILE, "脉瘤动脉主动", "动脉瘤主动脉瘤"])


def test_a_merged_vocabulary_whose_ties_have_none(spm_path, tmp_path):
    made = fast_tokenizer(Tokenizer(merged(spm_path, SHANGHAI, tmp_path)))
    assert made.content is None
    assert "海上海" in made.obstacle or "上海上" in made.obstacle


def test_random_merged_vocabularies(tmp_path):
    """Whatever is added, texts of the added characters agree, or there is no tokenizer.json."""
    base = trained(tmp_path, vocab_size=360)
    made = []
    for seed in range(40):
        chance = random.Random(seed)
        alphabet = "脉动主瘤海"[: chance.randint(2, 5)]
        n = chance.randint(1, 8)
        words = ["".join(chance.choices(alphabet, k=chance.randint(2, 4))) for _ in range(n)]
        path = merged(base, [*alphabet, *words], tmp_path)
        made.append(fast_tokenizer(Tokenizer(path)).content is not None)
        if made[-1]:
            texts = ["".join(chance.choices(alphabet, k=9)) for _ in range(300)]
            assert_all_agree(path, texts)
    assert 5 < sum(made) < 40


def shuffled(content):
    content["model"]["merges"].reverse()


def without_prefix(content):
    content["normalizer"]["normalizers"].pop(0)


def without_a_merge(content):
    content["model"]["merges"].pop(17)


def two_ids_swapped(content):
    vocabulary = content["model"]["vocab"]
    one, other = list(vocabulary)[300:302]
    vocabulary[one], vocabulary[other] = vocabulary[other], vocabulary[one]


def blanks_kept(content):
    content["normalizer"]["normalizers"].pop()


@pytest.mark.parametrize(
    "damage",
    [shuffled, without_prefix, without_a_merge, two_ids_swapped, blanks_kept],
    ids=lambda damage: damage.__name__,
)
def test_a_wrong_one_is_seen(damage, tmp_path):
    sp = sentencepiece.SentencePieceProcessor(model_file=str(trained(tmp_path)))
    content = tokenizer_json(read_pieces(sp))
    assert first_difference(content, sp) is None
    damage(content)
    text = first_difference(content, sp)
    assert text is not None
    assert ids_of(library(content), text) != sp.encode(text)


def test_what_the_model_says_of_itself(tmp_path, spm_path):
    """Against the protobuf library's reading of the same bytes."""
    for path in (
        spm_path,
        trained(tmp_path, user_defined_symbols=["<sep>"], model_type="unigram", vocab_size=400),
    ):
        sp = sentencepiece.SentencePieceProcessor(model_file=str(path))
        want = sentencepiece_model_pb2.ModelProto.FromString(path.read_bytes())
        got = read_pieces(sp)
        assert [(p.text, p.score, p.kind) for p in got.pieces] == [
            (p.piece, p.score, p.type) for p in want.pieces
        ]
        assert got.kind == want.trainer_spec.model_type
        assert got.is_trimmed == want.normalizer_spec.remove_extra_whitespaces
        assert got.has_dummy_prefix == want.normalizer_spec.add_dummy_prefix
        assert got.has_charsmap == bool(want.normalizer_spec.precompiled_charsmap)
    assert got.kind is PieceModelKind.UNIGRAM and len(got.ids_of(PieceKind.USER_DEFINED)) == 1


# --- a folder without tokenizer.json --------------------------------------------------------------

TEXTS = ("海上海\n\n  x 龘", "  two", "x ", "A  <image>\n 海上海 </s>USER: <image> x</s>")


def exported_with(path, tmp_path):
    """An export with this tokenizer."""
    tokenizer = Tokenizer(path)
    n = tokenizer.vocab_size
    sizes = dict(vocab_size=n, hidden_size=16, intermediate_size=16, num_attention_heads=2)
    save_qilin(make_qilin(text=sizes, n_token_ids=n), tokenizer, tmp_path / "out")
    return tmp_path / "out"


@pytest.fixture(params=["ties", *LEFT_OUT])
def folder(request, tmp_path):
    """An export without tokenizer.json."""
    if request.param == "ties":
        return exported_with(merged(trained(tmp_path), SHANGHAI, tmp_path), tmp_path)
    options, _ = LEFT_OUT[request.param]
    return exported_with(trained(tmp_path, **options), tmp_path)


def ids_between_control_tokens(folder, text):
    """What encode_prompt does: each text between pictures and ends is encoded on its own."""
    tokenizer = Tokenizer(folder)
    ids = []
    for part in text.replace("<image>", "\0<image>\0").replace("</s>", "\0</s>\0").split("\0"):
        if part == "<image>":
            ids.append(tokenizer.vocab_size)
        elif part == "</s>":
            ids.append(tokenizer.eos_id)
        elif part:
            ids += tokenizer.encode(part)
    return ids


def test_transformers_5_asks_sentencepiece_then(folder):
    assert not (folder / "tokenizer.json").exists()
    tokenizer = AutoProcessor.from_pretrained(folder, backend="pil").tokenizer
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 0)
    assert len(tokenizer) == Tokenizer(folder).vocab_size + 1
    for text in TEXTS:
        want = ids_between_control_tokens(folder, text)
        assert tokenizer(text, add_special_tokens=False)["input_ids"] == want, text
    ids = Tokenizer(folder).encode(TEXTS[0])
    assert tokenizer.sp_model.decode(ids) == Tokenizer(folder).decode(ids)


def test_a_line_says_so(folder, tmp_path):
    done = in_process(convert.main, folder, tmp_path / "again", code=0)
    (line,) = [line for line in done.stderr.splitlines() if "tokenizer.json" in line]
    assert "tokenizer.model" in line
    names = {file.name for file in (tmp_path / "again").iterdir()}
    assert {"tokenizer.model", "spiece.model"} <= names and "tokenizer.json" not in names
