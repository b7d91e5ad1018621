"""An answer against the truth: scores of open answers, letters read from choices."""

import re
import sys
import unicodedata
from collections import Counter
from collections.abc import Sequence

import numpy as np

from common.text import CJK
from evaluation.answers import Said
from evaluation.testsets import Question

EXACT_MATCH = "exact match"
TOKEN_F1 = "token F1"
BY_LIKELIHOOD = "choice by likelihood"
BY_SUMMED_LIKELIHOOD = "choice by likelihood, summed"
BY_ANSWER = "choice by answer"

# --- 1. open answers ------------------------------------------------------------------------------


def normalise(text: str) -> str:
    """What exact match compares: full-width forms and case unified, blanks and the closing stop
    dropped."""
    folded = unicodedata.normalize("NFKC", text).casefold()
    return "".join(folded.split()).rstrip(".。")


def words(text: str) -> list[str]:
    """What F1, BLEU and ROUGE count: a Chinese character, a Latin word, a number; case and
    punctuation dropped."""
    character = CJK.pattern
    latin_or_number = rf"[^\W_]+?(?={CJK.pattern}|[\W_]|$)"
    folded = unicodedata.normalize("NFKC", text).casefold()
    return re.findall(f"{character}|{latin_or_number}", folded)


def exact_match(answer: str, truth: str) -> float:
    return float(normalise(answer) == normalise(truth))


def token_f1(answer: str, truth: str) -> float:
    """Harmonic mean of precision and recall of the words, each counted as often as it occurs
    (SQuAD, arXiv 1606.05250)."""
    said = Counter(words(answer))
    true = Counter(words(truth))
    n_common = (said & true).total()
    if n_common:
        return 2 * n_common / (said.total() + true.total())
    return float(not said and not true)


class RougeTokenizer:
    """For rouge-score, whose own tokenizer knows Latin letters only."""

    tokenize = staticmethod(words)


class TextMetrics:
    """ROUGE-L by rouge-score and BLEU by sacrebleu, both of our words. ImportError where one is not
    installed.

    BLEU of a whole set adds up what n-grams agree, row by row; ROUGE-L is averaged.
    """

    def __init__(self):
        from rouge_score.rouge_scorer import RougeScorer
        from sacrebleu.metrics import BLEU  # pyright: ignore[reportPrivateImportUsage]

        self.rouge = RougeScorer(["rougeL"], tokenizer=RougeTokenizer())
        self.bleu = BLEU(tokenize="none", effective_order=True)

    def rouge_l(self, answer: str, truth: str) -> float:
        return self.rouge.score(truth, answer)["rougeL"].fmeasure

    def ngrams(self, answer: str, truth: str) -> list[float]:
        """(10,): length of answer and truth, n-grams that agree and n-grams, n = 1 to 4."""
        said = " ".join(words(answer))
        true = " ".join(words(truth))
        counted = self.bleu.sentence_score(said, [true])
        return [counted.sys_len, counted.ref_len, *counted.counts, *counted.totals]

    def corpus_bleu(self, total: np.ndarray, order: int) -> float:
        """BLEU of n-grams up to `order`, from the sum of the rows that ngrams() gives."""
        score = self.bleu.compute_bleu(
            correct=total[2 : 2 + order].tolist(),
            total=total[6 : 6 + order].tolist(),
            sys_len=int(total[0]),
            ref_len=int(total[1]),
            smooth_method="exp",
            max_ngram_order=order,
        )
        return score.score / 100


def text_metrics() -> TextMetrics | None:
    """The TextMetrics, or None, said once, where what they need is not installed."""
    try:
        return TextMetrics()
    except ImportError:
        print("BLEU and ROUGE-L are left out: pip install sacrebleu rouge-score", file=sys.stderr)
        return None


# --- 2. choices -----------------------------------------------------------------------------------

# a letter that begins no word and is not one of two
ALONE = (
    r"(?![A-Za-z0-9])"
    r"(?!\s*[、,/&和或及]\s*[A-D](?![A-Za-z\u4e00-\u9fff]))"
)
BEFORE_ANSWER = (
    "the ",
    "my ",
    "so ",
    "我",
    "本题",
    "正确",
    "最佳",
    "应该?",
    "因此",
    "所以",
    "correct ",
    "right ",
    "best ",
)
ANSWER = ("answer", "option", "choice", "答案", "选项", "选择", "选")
# "The correct answer is (B)", "正确答案为B"
NAMED = re.compile(
    rf"(?:{'|'.join(BEFORE_ANSWER)})*"
    rf"(?:{'|'.join(ANSWER)})"
    r"(?: is|应?[是为])?"
    r"[\s:(\[*\"'“]*([A-D])" + ALONE,
    re.IGNORECASE,
)
# "B", "(B) left lung", "B is correct"
ALONE_IN_FRONT = re.compile(
    r"[\s(\[*\"'“]*([A-D])"
    r"(?="
    r"\s*(?:$|[.:)\]、,。;*\"'”\n])"
    r"|\s+(?:is|because|since)\b"
    r")" + ALONE,
    re.IGNORECASE,
)


def letter_in_front(text: str, choices: dict[str, str]) -> str:
    """The letter that a text begins with or names as its answer, or ""."""
    match = NAMED.match(text) or ALONE_IN_FRONT.match(text)
    if not match:
        return ""
    letter = match[1]
    if letter.upper() not in choices:
        return ""
    # a small letter is one only where it stands alone, "b.": in front of more it may be a word
    if not letter.isupper() and len(text) > 3:
        return ""
    return letter.upper()


def occurs_in(option: str, text: str) -> bool:
    """Whether an option's text occurs in another, as words of it: no is not in abnormal, nor CT in
    fracture."""
    pattern = re.escape(option)
    if option.isascii():
        pattern = rf"(?<![a-z0-9]){pattern}(?![a-z0-9])"
    return re.search(pattern, text) is not None


def options_inside(text: str, choices: dict[str, str]) -> list[str]:
    """The letters of the options that occur in a text; one that is part of another that occurs does
    not count."""
    plain = " ".join(text.casefold().split())
    found = {}
    for letter, option in choices.items():
        folded = unicodedata.normalize("NFKC", option).casefold()
        option = " ".join(folded.split()).rstrip(".。")
        if occurs_in(option, plain):
            found[letter] = option
    letters = []
    for letter, option in found.items():
        others = [other for other in found.values() if other != option]
        if not any(option in other for other in others):
            letters.append(letter)
    return letters


def read_choice(text: str, choices: dict[str, str]) -> str:
    """The letter that a generated answer means, or "" when it cannot be told: an option's text, a
    letter in front, or the one option that occurs in it.

    What cannot be told is wrong, as MedXpertQA counts it; other scorers guess: MMMU's draws a
    letter, MedEvalKit's takes A.
    """
    text = unicodedata.normalize("NFKC", text).strip()
    for letter, option in choices.items():
        if normalise(text) == normalise(option):
            return letter
    letter = letter_in_front(text, choices)
    if letter:
        return letter
    inside = options_inside(text, choices)
    return inside[0] if len(inside) == 1 else ""


# --- 3. all scores of an answer -------------------------------------------------------------------


def likeliest(choices: dict[str, str], values: Sequence[float]) -> str:
    """The letter of the highest value, the first of several."""
    best = max(range(len(values)), key=values.__getitem__)
    return list(choices)[best]


def judge(question: Question, said: Said) -> dict[str, float]:
    """Scores of one answer by name, as numbers."""
    scores = {
        EXACT_MATCH: exact_match(said.answer, question.truth),
        TOKEN_F1: token_f1(said.answer, question.truth),
    }
    if question.choices:
        by_token = likeliest(question.choices, [option.per_token for option in said.options])
        by_sum = likeliest(question.choices, [option.total for option in said.options])
        by_answer = read_choice(said.choice_answer, question.choices)
        scores[BY_LIKELIHOOD] = float(by_token == question.letter)
        scores[BY_SUMMED_LIKELIHOOD] = float(by_sum == question.letter)
        scores[BY_ANSWER] = float(by_answer == question.letter)
    return scores
