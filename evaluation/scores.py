"""An answer against the truth: scores of open answers, letters read from choices."""

import re
import sys
import unicodedata
from collections import Counter

from common.text import CJK


def normalise(text):
    """What exact match compares: full-width forms and case unified, blanks and the closing stop dropped."""
    return "".join(unicodedata.normalize("NFKC", text).casefold().split()).rstrip(".。")


def words(text):
    """What F1, BLEU and ROUGE count: a Chinese character, a Latin word, a number; case and punctuation dropped."""
    return re.findall(
        rf"{CJK.pattern}|[^\W_]+?(?={CJK.pattern}|[\W_]|$)",
        unicodedata.normalize("NFKC", text).casefold(),
    )


def token_f1(answer, truth):
    """Harmonic mean of precision and recall of the words, each counted as often as it occurs (SQuAD, arXiv 1606.05250)."""
    a, t = Counter(words(answer)), Counter(words(truth))
    common = (a & t).total()
    return 2 * common / (a.total() + t.total()) if common else float(not a and not t)


class Words:
    """For rouge-score, whose own tokenizer knows Latin letters only."""

    tokenize = staticmethod(words)


def text_metrics():
    """{name: function of (answer, truth) -> row of numbers}, and how rows are put together: BLEU adds up what n-grams agree, the others are averaged."""
    try:
        from rouge_score.rouge_scorer import RougeScorer
        from sacrebleu.metrics import BLEU
    except ImportError:
        print("BLEU and ROUGE-L are left out: pip install sacrebleu rouge-score", file=sys.stderr)
        return None
    rouge = RougeScorer(["rougeL"], tokenizer=Words())
    bleu = BLEU(tokenize="none", effective_order=True)

    def rouge_l(answer, truth):
        return rouge.score(truth, answer)["rougeL"].fmeasure

    def ngrams(answer, truth):
        """(10,): length of answer and truth, n-grams that agree and n-grams, n = 1 to 4."""
        s = bleu.sentence_score(" ".join(words(answer)), [" ".join(words(truth))])
        return [s.sys_len, s.ref_len, *s.counts, *s.totals]

    def corpus_bleu(total, order):
        return (
            BLEU.compute_bleu(
                total[2 : 2 + order].tolist(),
                total[6 : 6 + order].tolist(),
                int(total[0]),
                int(total[1]),
                smooth_method="exp",
                max_ngram_order=order,
            ).score
            / 100
        )

    return rouge_l, ngrams, corpus_bleu


ALONE = r"(?![A-Za-z0-9])(?!\s*[、,/&和或及]\s*[A-D](?![A-Za-z\u4e00-\u9fff]))"  # a letter that begins no word and is not one of two
NAMED = re.compile(
    r"(?:the |my |so |我|本题|正确|最佳|应该?|因此|所以|correct |right |best )*(?:answer|option|choice|答案|选项|选择|选)(?: is|应?[是为])?[\s:(\[*\"'“]*([A-D])"
    + ALONE,
    re.IGNORECASE,
)
ALONE_IN_FRONT = re.compile(
    r"[\s(\[*\"'“]*([A-D])(?=\s*(?:$|[.:)\]、,。;*\"'”\n])|\s+(?:is|because|since)\b)" + ALONE,
    re.IGNORECASE,
)


def read_choice(text, choices):
    """The letter that a generated answer means, or "" when it cannot be told: an option's text, a letter in front, or the one option that occurs in it."""
    text = unicodedata.normalize("NFKC", text).strip()
    for letter, option in choices.items():
        if normalise(text) == normalise(option):
            return letter
    match = NAMED.match(text) or ALONE_IN_FRONT.match(text)
    if match and match[1].upper() in choices and (match[1].isupper() or len(text) <= 3):
        return match[1].upper()
    plain, inside = " ".join(text.casefold().split()), []
    for letter, option in choices.items():
        option = " ".join(unicodedata.normalize("NFKC", option).casefold().split()).rstrip(".。")
        if re.search(
            rf"(?<![a-z0-9]){re.escape(option)}(?![a-z0-9])"
            if option.isascii()
            else re.escape(option),
            plain,
        ):  # no is not in abnormal, nor CT in fracture
            inside.append((letter, option))
    inside = [
        letter
        for letter, option in inside
        if not any(option != other and option in other for _, other in inside)
    ]
    return inside[0] if len(inside) == 1 else ""


def judge(question, said):
    """Scores of one answer by name, as numbers."""
    scores = {
        "exact match": float(normalise(said["answer"]) == normalise(question.truth)),
        "token F1": token_f1(said["answer"], question.truth),
    }
    if question.choices:
        letters, pairs = list(question.choices), said["likelihood"][1:]
        scores["choice by likelihood"] = float(
            letters[max(range(len(letters)), key=lambda i: pairs[i][0] / pairs[i][1])]
            == question.letter
        )
        scores["choice by likelihood, summed"] = float(
            letters[max(range(len(letters)), key=lambda i: pairs[i][0])] == question.letter
        )
        scores["choice by answer"] = float(
            read_choice(said["choice_answer"], question.choices) == question.letter
        )
    return scores
