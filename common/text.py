"""What a text is: cleaned, Chinese or not, practical to learn from or not."""

import hashlib
import html
import re
import unicodedata

from common.rows import BadRow
from qilin_min import IMAGE_TOKEN

CJK = re.compile(r"[\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]")
LATIN = re.compile(r"[A-Za-z]")
WORD = re.compile(
    r"(?<![A-Za-z])[A-Za-z][a-z]{2,}(?![A-Za-z])"
)  # an ordinary word: CT, HER2 and pH are none
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\ufeff]")

# what follows a question when its choices are kept, in training and in evaluation alike
CHOICES = [
    "请从下列选项中选出正确答案。",
    "请选择一个正确的选项。",
    "以下哪一项正确？",
    "请在下面的选项中作出选择。",
]


def clean_text(value):
    """A text without markup entities, control characters, half surrogates, runs of blanks or <image>. BadRow when it is no text."""
    if value is None or value != value:  # nan, as pandas writes a gap
        return ""
    if isinstance(value, bool) or not isinstance(value, (str, int, float)):
        raise BadRow("a field is not text")
    text = CONTROL.sub(" ", html.unescape(str(value)).encode("utf-8", "ignore").decode("utf-8"))
    while IMAGE_TOKEN in text:  # in a text it would stand for a picture that is not there
        text = text.replace(IMAGE_TOKEN, "")
    return unicodedata.normalize("NFC", " ".join(text.split()))


def chinese_share(text):
    """Chinese characters among Chinese and Latin letters, 0 to 1; 1 for a text with neither."""
    n_cjk, n_latin = len(CJK.findall(text)), len(LATIN.findall(text))
    return n_cjk / (n_cjk + n_latin) if n_cjk + n_latin else 1.0


def is_untranslated(text):
    """True for a text of ordinary Latin words with little Chinese; names like MRI or HER2 alone need no translation."""
    return (bool(WORD.search(text)) or len(re.findall("[A-Za-z]{4,}", text)) > 3) and chinese_share(
        text
    ) < 0.3  # four long words, though in capitals


def text_length(text):
    """Length in Chinese characters, a Latin word or a number counting two."""
    return len(CJK.findall(text)) + 2 * len(re.findall(r"[A-Za-z0-9][A-Za-z0-9.\-]*", text))


LINK = re.compile(
    r"(?:https?://|www\.|doi:)\S+|(?<![A-Za-z0-9._+-])[A-Za-z0-9._+-]++@[A-Za-z0-9.-]+"
)
SEQUENCE = re.compile(r"[A-Z*-]{40,}")
MAX_CHARACTERS = 40_000  # of one text; the longest context of the paper has 2,576 tokens


def impractical(text):
    """Why a text cannot sensibly be translated or learnt, or None: the paper drops such rows (section 3.3) without giving rules; these are ours."""
    if len(text) > MAX_CHARACTERS:
        return "impractical: longer than 40000 characters"
    letters = len(CJK.findall(text)) + len(LATIN.findall(text))
    if not letters:
        return "impractical: no letters"
    if sum(map(len, LINK.findall(text))) * 2 > len(text):
        return "impractical: mostly links"
    if sum(map(len, SEQUENCE.findall(text))) * 2 > len(text):
        return "impractical: a sequence"
    if letters * 2 < len(text.replace(" ", "")) and len(text) > 20:
        return "impractical: mostly symbols"
    return None


def text_key(*parts):
    """A 64-bit key of some texts, never 0: equal texts, equal key."""
    return (
        int.from_bytes(
            hashlib.blake2b(
                "\x1f".join(parts).encode("utf-8", "surrogatepass"), digest_size=8
            ).digest(),
            "big",
        )
        or 1
    )
