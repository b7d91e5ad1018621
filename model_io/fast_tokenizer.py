"""tokenizer.model -> tokenizer.json, and whether the second gives the ids of the first.

sentencepiece joins, of all neighbours that make a piece, those with the best score, and of equal
scores the leftmost. tokenizer.json ranks pairs, no two alike. The two agree where no scores tie, as
in a vocabulary that was trained whole; where pieces were added afterwards, as public merge scripts
do (every added piece has score 0), they agree only where some order of the tied pairs always
happens to take the leftmost. A unigram model's scores are added up by both, in float32 and in
float64. So nobody is told to trust it: what was made is read and compared.
"""

import math
import re
from collections import defaultdict
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from itertools import islice, pairwise

from sentencepiece import SentencePieceProcessor

from model_io.pieces import PieceKind, PieceModel, PieceModelKind, read_pieces
from qilin_min import IMAGE_TOKEN

# --- 1. merges: which two pieces make a third -----------------------------------------------------

# (left, right), whose joint text is a piece as well
Merge = tuple[str, str]


def _vocabulary(model: PieceModel) -> dict[str, int]:
    return {piece.text: i for i, piece in enumerate(model.pieces)}


def _merges_by_score(model: PieceModel) -> dict[float, list[Merge]]:
    """{score: what makes pieces of this score}, the best score first, each by ids."""
    vocabulary = _vocabulary(model)
    found = defaultdict(list)
    for i in model.ids_of(PieceKind.NORMAL, PieceKind.UNUSED):
        text = model.pieces[i].text
        for k in range(1, len(text)):
            left = text[:k]
            right = text[k:]
            if left in vocabulary and right in vocabulary:
                found[model.pieces[i].score].append((left, right))
    for merges in found.values():
        merges.sort(key=lambda merge: (vocabulary[merge[0]], vocabulary[merge[1]]))
    return dict(sorted(found.items(), reverse=True))


class Joining:
    """How both kinds of tokenizer join: of all neighbours that make a piece those of the lowest
    rank, and of equal ranks the leftmost."""

    def __init__(self, rank: dict[Merge, int]):
        self.rank = rank

    def ranks(self, symbols: list[str]) -> list[float]:
        """Of each two neighbours."""
        return [self.rank.get(pair, math.inf) for pair in pairwise(symbols)]

    def join(self, symbols: list[str]) -> list[str]:
        """Changes `symbols`, the characters of a text or what was made of them, and returns it."""
        rank = self.rank
        ranks = self.ranks(symbols)
        while ranks:
            best = min(ranks)
            if best == math.inf:
                break
            i = ranks.index(best)
            join_at(symbols, i)
            # only the neighbours of what was joined have other pairs now
            del ranks[i]
            if i > 0:
                ranks[i - 1] = rank.get((symbols[i - 1], symbols[i]), math.inf)
            if i < len(ranks):
                ranks[i] = rank.get((symbols[i], symbols[i + 1]), math.inf)
        return symbols

    def contests(self, symbols: list[str]) -> Iterator[tuple[Merge, Merge]]:
        """(which merge won, which lost a symbol to it) of equal ranks, where it makes a difference,
        while `symbols` are joined."""
        while len(symbols) > 1:
            ranks = self.ranks(symbols)
            best = min(ranks)
            if best == math.inf:
                return
            i = ranks.index(best)
            taken = join_at(list(symbols), i)
            if ranks[i + 1 : i + 2] == [best]:
                won = (symbols[i], symbols[i + 1])
                lost = (symbols[i + 1], symbols[i + 2])
                other = join_at(list(symbols), i + 1)
                if won != lost and self.join(other) != self.join(list(taken)):
                    yield won, lost
            symbols = taken


def join_at(symbols: list[str], i: int) -> list[str]:
    """`symbols`, in which the two at i have become one."""
    symbols[i : i + 2] = [symbols[i] + symbols[i + 1]]
    return symbols


def ranked_merges(model: PieceModel) -> list[Merge]:
    """The merges of tokenizer.json: the best score first, and of equal scores such that the
    leftmost wins in all texts of _contested_texts, where there is such an order: 上海 and 海上 have
    none, since 上海上 and 海上海 want opposite ones."""
    groups = _merges_by_score(model)
    group_of = {}
    for i, merges in enumerate(groups.values()):
        group_of.update(dict.fromkeys(merges, i))
    joining = Joining(group_of)
    orders = [TopologicalSorter(dict.fromkeys(merges, ())) for merges in groups.values()]
    for text in _contested_texts(groups):
        for won, lost in joining.contests(list(text)):
            orders[group_of[won]].add(lost, won)
    ranked = []
    for order, merges in zip(orders, groups.values(), strict=True):
        try:
            ranked += order.static_order()
        except CycleError:
            ranked += merges
    return ranked


# of texts in which a piece could be joined to the left or to the right
MAX_CONTESTED = 100_000


def _overlaps(groups: dict[float, list[Merge]]) -> Iterator[str]:
    """Texts "xyz" where xy and yz are pieces of equal score; at most 4 x and 4 z for each y."""
    for merges in groups.values():
        before = defaultdict(list)
        behind = defaultdict(list)
        for left, right in merges:
            before[right].append(left)
            behind[left].append(right)
        for middle in before:
            for left in before[middle][:4]:
                for right in behind[middle][:4]:
                    yield left + middle + right


def _contested_texts(groups: dict[float, list[Merge]]) -> Iterator[str]:
    """What pieces of equal score could cut in two ways: overlaps, and runs of one character."""
    for merges in groups.values():
        for left, right in merges:
            if left == right and len(left) == 1:
                yield "".join([left] * 40)
    yield from islice(_overlaps(groups), MAX_CONTESTED)


# --- 2. the file ----------------------------------------------------------------------------------


def _added_token(i, content, is_special=True):
    """One that is found in a text before anything is merged: a special one before the text is
    normalised, which ends it there and starts another, any other one after that."""
    return {
        "id": i,
        "content": content,
        "single_word": False,
        "lstrip": False,
        "rstrip": False,
        "normalized": not is_special,
        "special": is_special,
    }


def special_tokens(model: PieceModel) -> list[dict]:
    """The control tokens and the picture's, which is the first id past the pieces."""
    ids = sorted({model.unk_id, model.bos_id, model.eos_id})
    added = [_added_token(i, model.pieces[i].text) for i in ids]
    return [*added, _added_token(len(model.pieces), IMAGE_TOKEN)]


def _added_tokens(model: PieceModel) -> list[dict]:
    """Special tokens, and the pieces that a person defined, which nothing joins or cuts."""
    defined = model.ids_of(PieceKind.USER_DEFINED)
    symbols = [_added_token(i, model.pieces[i].text, is_special=False) for i in defined]
    return sorted(special_tokens(model) + symbols, key=lambda token: token["id"])


def _post_processor(bos, bos_id):
    """What puts the begin id in front."""
    begin = {"SpecialToken": {"id": bos, "type_id": 0}}
    first = {"Sequence": {"id": "A", "type_id": 0}}
    second = {"Sequence": {"id": "B", "type_id": 1}}
    return {
        "type": "TemplateProcessing",
        "special_tokens": {bos: {"id": bos, "ids": [bos_id], "tokens": [bos]}},
        "single": [begin, first],
        "pair": [begin, first, second],
    }


def _replace(pattern, content):
    return {"type": "Replace", "pattern": pattern, "content": content}


def _normalizer(model: PieceModel) -> dict:
    """What is done to each text between control tokens. The blank in front comes from Prepend, once
    a text."""
    steps = []
    if model.is_trimmed:
        steps.append(_replace({"Regex": r"\A +"}, ""))
        steps.append(_replace({"Regex": r"[ ▁]+\z"}, ""))
        steps.append(_replace({"Regex": r" {2,}"}, " "))
    if model.has_dummy_prefix:
        steps.append({"type": "Prepend", "prepend": "▁"})
    steps.append(_replace({"String": " "}, "▁"))
    return {"type": "Sequence", "normalizers": steps}


def _decoder(model: PieceModel) -> dict:
    steps = [
        _replace({"String": "▁"}, " "),
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    if model.has_dummy_prefix:
        steps.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    return {"type": "Sequence", "decoders": steps}


def _bpe(model: PieceModel) -> dict:
    return {
        "type": "BPE",
        "dropout": None,
        "unk_token": model.pieces[model.unk_id].text,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": True,
        "byte_fallback": True,
        "ignore_merges": False,
        "vocab": _vocabulary(model),
        "merges": [list(merge) for merge in ranked_merges(model)],
    }


def _unigram(model: PieceModel) -> dict:
    """The library would find control and byte pieces in a text, too: there they cost more than any
    other way to cut it."""
    never = min(piece.score for piece in model.pieces) - 1000
    found = (PieceKind.NORMAL, PieceKind.USER_DEFINED)
    vocabulary = []
    for piece in model.pieces:
        vocabulary.append([piece.text, piece.score if piece.kind in found else never])
    return {
        "type": "Unigram",
        "unk_id": model.unk_id,
        "vocab": vocabulary,
        "byte_fallback": bool(model.ids_of(PieceKind.BYTE)),
    }


# kind of model -> its part of tokenizer.json
MODEL_FORMS = {PieceModelKind.BPE: _bpe, PieceModelKind.UNIGRAM: _unigram}


def tokenizer_json(model: PieceModel) -> dict:
    """The content of tokenizer.json. ValueError for a kind of model that it has no form for."""
    if model.kind not in MODEL_FORMS:
        raise ValueError(f"a {model.kind.name.lower()} model")
    if model.has_charsmap:
        # the library's Precompiled replaces what it takes for one character: it leaves three jamo
        # as they are, of which sentencepiece makes one
        raise ValueError("a model that replaces characters first (its normaliser is not identity)")
    if model.has_blank_behind:
        raise ValueError("a model that puts blanks behind words")
    if model.has_dummy_prefix and model.ids_of(PieceKind.USER_DEFINED):
        # the library would put the blank in front of each of them as well
        raise ValueError("pieces defined by a person in a model that puts a blank in front")
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": _added_tokens(model),
        "pre_tokenizer": None,
        "normalizer": _normalizer(model),
        "post_processor": _post_processor(model.pieces[model.bos_id].text, model.bos_id),
        "decoder": _decoder(model),
        "model": MODEL_FORMS[model.kind](model),
    }


# --- 3. what the file does to a text, so that it can be compared without the tokenizers library ---


def _pattern(said: dict) -> re.Pattern:
    if "String" in said:
        return re.compile(re.escape(said["String"]))
    # Python spells the end of a text otherwise
    return re.compile(said["Regex"].replace(r"\z", r"\Z"))


class Likeliest:
    """How a unigram model cuts a text: into pieces whose scores have the highest sum."""

    def __init__(self, vocabulary: list[tuple[str, float]]):
        self.scores = dict(vocabulary)
        self.unknown = min(self.scores.values()) - 10  # a character that is no piece
        self.longest = max(map(len, self.scores))

    def cut(self, characters: list[str]) -> list[str]:
        """The pieces of a text; unknown neighbours are one."""
        text = "".join(characters)
        n = len(text)
        best = [0.0] + [-math.inf] * n  # of the text up to there
        start = [0] * (n + 1)  # of the last piece of that
        for i in range(n):
            last = min(i + self.longest, n)
            pieces = {end: text[i:end] for end in range(i + 1, last + 1)}
            scores = {end: self.scores[p] for end, p in pieces.items() if p in self.scores}
            scores.setdefault(i + 1, self.unknown)
            for end, score in scores.items():
                if best[i] + score > best[end]:
                    best[end] = best[i] + score
                    start[end] = i
        return self._pieces(text, start)

    def _pieces(self, text: str, start: list[int]) -> list[str]:
        pieces = []
        end = len(text)
        while end > 0:
            piece = text[start[end] : end]
            is_unknown = piece not in self.scores
            if is_unknown and pieces and pieces[-1] not in self.scores:
                pieces[-1] = piece + pieces[-1]
            else:
                pieces.append(piece)
            end = start[end]
        return pieces[::-1]


class FileReading:
    """A tokenizer.json as tokenizer_json writes it, applied to texts without control tokens; the
    tests hold it against the tokenizers library."""

    def __init__(self, content: dict):
        said = content["model"]
        self.vocabulary: dict[str, int]
        if said["type"] == "BPE":
            self.vocabulary = said["vocab"]
            self.unk_id: int = self.vocabulary[said["unk_token"]]
            ranked = [(left, right) for left, right in said["merges"]]
            self.cut = Joining({merge: i for i, merge in enumerate(ranked)}).join
        else:
            self.vocabulary = {text: i for i, (text, _) in enumerate(said["vocab"])}
            self.unk_id = said["unk_id"]
            self.cut = Likeliest([(text, score) for text, score in said["vocab"]]).cut
        self.prefix = ""
        self.replaced: list[tuple[re.Pattern, str]] = []  # before the prefix
        for step in content["normalizer"]["normalizers"]:
            if step["type"] == "Prepend":
                self.prefix = step["prepend"]
            else:
                self.replaced.append((_pattern(step["pattern"]), step["content"]))
        symbols = [token["content"] for token in content["added_tokens"] if not token["special"]]
        # the longest that fits is taken
        symbols.sort(key=len, reverse=True)
        # (?!) is found nowhere
        self.symbols = re.compile("|".join(map(re.escape, symbols)) or "(?!)")

    def encode(self, text: str) -> list[int]:
        """The ids of a text, no begin id in front."""
        for pattern, content in self.replaced:
            text = pattern.sub(content, text)
        if text:
            text = self.prefix + text
        ids = []
        end = 0
        for symbol in self.symbols.finditer(text):
            ids += self._encode_word(text[end : symbol.start()])
            ids.append(self.vocabulary[symbol[0]])
            end = symbol.end()
        return ids + self._encode_word(text[end:])

    def _encode_word(self, word: str) -> list[int]:
        ids = []
        for symbol in self.cut(list(word)):
            found = self._ids_of_symbol(symbol)
            # unknown neighbours count as one
            if found == [self.unk_id] and ids[-1:] == found:
                continue
            ids += found
        return ids

    def _ids_of_symbol(self, symbol: str) -> list[int]:
        if symbol in self.vocabulary:
            return [self.vocabulary[symbol]]
        names = [f"<0x{byte:02X}>" for byte in symbol.encode()]
        if all(name in self.vocabulary for name in names):
            return [self.vocabulary[name] for name in names]
        return [self.unk_id]


# --- 4. texts that tell two tokenizers apart ------------------------------------------------------

HOSTILE = (
    "0123456789 3.14 1,000 ２０２６ ①② 10^-3",
    "line\nline\n\n\nline\r\n\ttab\n",
    "  two   three    \u3000wide\u00a0hard  ",
    "😀👍🏽👨\u200d👩\u200d👧🇨🇳 ✅",
    "ＡＢＣａｂｃ！？（）％ﾊﾟ",
    "e\u0301 é \u1112\u1161\u11ab 한 ﬁ ½ ㎝ Ⅳ",
    "𠮷野家 龘靐齉 \ufeff\u200b\u0628\u05d0",
    "▁ ▁▁ x▁y <0x0A> [INST] ##",
    "主动脉瘤，右肺上叶见一枚磨玻璃结节，直径约5毫米。",
    "A chat between a curious user and an artificial intelligence assistant. USER: ASSISTANT:",
    "aaaaaaa ======== -------- ……………… \x00\x01\x7f",
)


def trying_texts(model: PieceModel) -> Iterator[str]:
    """What ties could cut in two ways; HOSTILE; each piece alone, behind a newline and a blank, and
    beside its neighbour."""
    for text in _contested_texts(_merges_by_score(model)):
        yield text.replace("▁", " ")
    yield from HOSTILE
    kinds = (PieceKind.NORMAL, PieceKind.USER_DEFINED, PieceKind.UNUSED, PieceKind.BYTE)
    words = [model.pieces[i].text.replace("▁", " ") for i in model.ids_of(*kinds)]
    for word, following in zip(words, words[1:] + words[:1], strict=True):
        yield word
        yield f"\n{word} {word}"
        yield word + following


def first_difference(content: dict, sp: SentencePieceProcessor) -> str | None:
    """A text that tokenizer.json cuts otherwise than the model it was made of, or None."""
    reading = FileReading(content)
    texts = trying_texts(read_pieces(sp))
    while True:
        some = list(islice(texts, 10_000))
        if not some:
            return None
        for text, ids in zip(some, sp.encode(some), strict=True):
            if reading.encode(text) != ids:
                return text
