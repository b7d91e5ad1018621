"""What a text is: cleaned, Chinese or not, practical to learn from or not."""

import hashlib
import html
import re
import unicodedata

from common.rows import BadRow
from qilin_min import IMAGE_TOKEN

CJK = re.compile(r"[\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]")
LATIN = re.compile(r"[A-Za-z]")
# an ordinary word: CT, HER2 and pH are none
WORD = re.compile(r"(?<![A-Za-z])[A-Za-z][a-z]{2,}(?![A-Za-z])")
LONG_WORD = re.compile(r"[A-Za-z]{4,}")
WORD_OR_NUMBER = re.compile(r"[A-Za-z0-9][A-Za-z0-9.\-]*")
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\ufeff]")

# of one text; the longest context of the paper has 2,576 tokens
MAX_CHARACTERS = 40_000
LINK = re.compile(
    r"(?:https?://|www\.|doi:)\S+|(?<![A-Za-z0-9._+-])[A-Za-z0-9._+-]++@[A-Za-z0-9.-]+"
)
SEQUENCE = re.compile(r"[A-Z*-]{40,}")

# what follows a question when its choices are kept, in training and in evaluation alike
CHOICES = [
    "请从下列选项中选出正确答案。",
    "请选择一个正确的选项。",
    "以下哪一项正确？",
    "请在下面的选项中作出选择。",
]


def clean_text(value: object) -> str:
    """A text without markup entities, control characters, half surrogates, runs of blanks or
    <image>. BadRow when it is no text."""
    # nan, which alone is not itself: as pandas writes a gap
    if value is None or value != value:
        return ""
    if isinstance(value, bool) or not isinstance(value, (str, int, float)):
        raise BadRow("a field is not text")
    text = html.unescape(str(value))
    text = text.encode("utf-8", "ignore").decode("utf-8")
    text = CONTROL.sub(" ", text)
    # in a text it would stand for a picture that is not there
    while IMAGE_TOKEN in text:
        text = text.replace(IMAGE_TOKEN, "")
    return unicodedata.normalize("NFC", " ".join(text.split()))


def has_half_pair(text: str) -> bool:
    """True for a text with half a surrogate pair, which UTF-8 has no bytes for."""
    return any("\ud800" <= c <= "\udfff" for c in text)


def without_decimals(number: str) -> str:
    """A number without the .0 that pandas gives it."""
    return re.sub(r"\.0$", "", number)


def chinese_share(text: str) -> float:
    """Chinese characters among Chinese and Latin letters, 0 to 1; 1 for a text with neither."""
    n_chinese = len(CJK.findall(text))
    n_latin = len(LATIN.findall(text))
    if n_chinese + n_latin == 0:
        return 1.0
    return n_chinese / (n_chinese + n_latin)


def is_untranslated(text: str) -> bool:
    """True for a text of ordinary Latin words with little Chinese; names like MRI or HER2 alone
    need no translation."""
    # or of four long words, though in capitals
    has_words = bool(WORD.search(text)) or len(LONG_WORD.findall(text)) > 3
    return has_words and chinese_share(text) < 0.3


def text_length(text: str) -> int:
    """Length in Chinese characters, a Latin word or a number counting two."""
    return len(CJK.findall(text)) + 2 * len(WORD_OR_NUMBER.findall(text))


def impractical(text: str) -> str | None:
    """Why a text cannot sensibly be translated or learnt, or None: the paper drops such rows
    (section 3.3) without giving rules; these are ours."""
    if len(text) > MAX_CHARACTERS:
        return "impractical: longer than 40000 characters"
    n_letters = len(CJK.findall(text)) + len(LATIN.findall(text))
    if not n_letters:
        return "impractical: no letters"
    n_in_links = sum(map(len, LINK.findall(text)))
    if n_in_links * 2 > len(text):
        return "impractical: mostly links"
    n_in_sequences = sum(map(len, SEQUENCE.findall(text)))
    if n_in_sequences * 2 > len(text):
        return "impractical: a sequence"
    n_shown = len(text.replace(" ", ""))
    if n_letters * 2 < n_shown and len(text) > 20:
        return "impractical: mostly symbols"
    return None


def text_key(*parts: str) -> int:
    """A 64-bit key of some texts, never 0: equal texts, equal key."""
    raw = "\x1f".join(parts).encode("utf-8", "surrogatepass")
    key = int.from_bytes(hashlib.blake2b(raw, digest_size=8).digest(), "big")
    return key or 1
