"""The scores of a run as a table, a report, JSON."""

import itertools
import math
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from common.files import write_json, write_text
from common.intervals import bootstrap
from evaluation.answers import Answered
from evaluation.quantised import QuantisedChange
from evaluation.scores import (
    BY_ANSWER,
    BY_LIKELIHOOD,
    BY_SUMMED_LIKELIHOOD,
    EXACT_MATCH,
    TOKEN_F1,
    TextMetrics,
    exact_match,
    judge,
    normalise,
    read_choice,
    text_metrics,
    token_f1,
    words,
)
from evaluation.testsets import Question

CHOICE_SCORES = (BY_LIKELIHOOD, BY_SUMMED_LIKELIHOOD, BY_ANSWER)
OPEN_SCORES = (EXACT_MATCH, TOKEN_F1)
PERPLEXITY = "perplexity of the truth"

# combine(totals (K,), number of questions) -> the score
Combine = Callable[[np.ndarray, float], float]

# --- 1. tables ------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Estimate:
    """A score and its 95 % interval; None where there is but one picture, of which nothing is
    known."""

    value: float
    low: float | None
    high: float | None


@dataclass(frozen=True, slots=True)
class Score:
    """A row of a table: n questions, with the picture, with the picture withheld, and what the best
    constant answer gets, where there is one."""

    n: int
    seen: Estimate
    withheld: Estimate
    constant: float | None

    def to_json(self) -> dict[str, Any]:
        score = {
            "n": self.n,
            "value": self.seen.value,
            "low": self.seen.low,
            "high": self.seen.high,
            "withheld": self.withheld.value,
            "withheld_low": self.withheld.low,
            "withheld_high": self.withheld.high,
        }
        if self.constant is not None:
            score["constant"] = self.constant
        return score


def mean_of(totals: np.ndarray, n: float) -> float:
    return totals[0] / n


def perplexity_of(totals: np.ndarray, n: float) -> float:
    """Of totals (2,): the sum of log-probabilities and the number of tokens."""
    return math.exp(min(700, -totals[0] / totals[1]))


def estimate(numbers: np.ndarray, clusters: np.ndarray, combine: Combine) -> Estimate:
    """A score and its interval over pictures: numbers (n, K) of the questions, clusters (n,) which
    picture each is about."""
    n_clusters = int(clusters.max()) + 1
    sums = np.zeros((n_clusters, numbers.shape[1]))
    np.add.at(sums, clusters, numbers)
    counts = np.bincount(clusters, minlength=n_clusters)
    value = float(combine(numbers.sum(0), len(numbers)))
    low, high = bootstrap(sums[counts > 0], counts[counts > 0], combine)
    return Estimate(value, low, high)


def number_pictures(questions: list[Question]) -> np.ndarray:
    """(n,): a number for the first picture of each question, the same for the same picture; a
    question without one has its own."""
    numbers = {}
    clusters = []
    for i, question in enumerate(questions):
        name = str(question.pictures[0]) if question.pictures else f"row {i}"
        clusters.append(numbers.setdefault(name, len(numbers)))
    return np.array(clusters)


def score_of(
    seen: np.ndarray,
    withheld: np.ndarray,
    constant: np.ndarray | None,
    clusters: np.ndarray,
    combine: Combine,
) -> Score:
    """A row of a table, from numbers (n, K) of its questions on each side."""
    n = len(seen)
    best = None
    if constant is not None:
        best = float(combine(constant.sum(0), n))
    return Score(
        n,
        estimate(seen, clusters, combine),
        estimate(withheld, clusters, combine),
        best,
    )


def judged_scores(
    questions: list[Question], rows: list[Answered], constants: list[str], clusters: np.ndarray
) -> dict[str, Score]:
    """The scores that judge() gives to an answer, averaged over the questions that have them."""
    seen = [judge(question, row.seen) for question, row in zip(questions, rows, strict=True)]
    withheld = [
        judge(question, row.withheld) for question, row in zip(questions, rows, strict=True)
    ]
    scores = {}
    for name in (*CHOICE_SCORES, *OPEN_SCORES):
        which = [i for i, judged in enumerate(seen) if name in judged]
        if not which:
            continue
        scores[name] = score_of(
            np.array([[seen[i][name]] for i in which]),
            np.array([[withheld[i][name]] for i in which]),
            constant_numbers(name, [questions[i] for i in which], [constants[i] for i in which]),
            clusters[which],
            mean_of,
        )
    return scores


def constant_numbers(name: str, questions: list[Question], constants: list[str]) -> np.ndarray:
    """(n, 1): what a score of judge() gives to the constant answers, of choices to the commonest
    letter."""
    if name in CHOICE_SCORES:
        letters = Counter(question.letter for question in questions)
        best = letters.most_common(1)[0][0]
        return np.array([[float(question.letter == best)] for question in questions])
    measure = exact_match if name == EXACT_MATCH else token_f1
    pairs = zip(questions, constants, strict=True)
    return np.array([[measure(constant, question.truth)] for question, constant in pairs])


def text_scores(
    questions: list[Question],
    rows: list[Answered],
    constants: list[str],
    clusters: np.ndarray,
    metrics: TextMetrics,
) -> dict[str, Score]:
    """ROUGE-L and BLEU-1, and BLEU-4 where a truth is long enough for it."""
    truths = [question.truth for question in questions]
    sides = (
        [row.seen.answer for row in rows],
        [row.withheld.answer for row in rows],
        constants,
    )
    rouge = []
    ngrams = []
    for answers in sides:
        pairs = list(zip(answers, truths, strict=True))
        rouge.append(np.array([[metrics.rouge_l(answer, truth)] for answer, truth in pairs]))
        counted = [metrics.ngrams(answer, truth) for answer, truth in pairs]
        ngrams.append(np.array(counted, dtype=float))
    scores = {"ROUGE-L": score_of(rouge[0], rouge[1], rouge[2], clusters, mean_of)}
    is_long = any(len(words(truth)) >= 4 for truth in truths)
    orders = (1, 4) if is_long else (1,)
    for order in orders:
        combine = bleu_of(metrics, order)
        score = score_of(ngrams[0], ngrams[1], ngrams[2], clusters, combine)
        scores[f"BLEU-{order}"] = score
    return scores


def bleu_of(metrics: TextMetrics, order: int) -> Combine:
    """What puts rows of ngrams() together: BLEU of n-grams up to `order`."""

    def combine(totals, _):
        return metrics.corpus_bleu(totals, order)

    return combine


def perplexity_score(rows: list[Answered], clusters: np.ndarray) -> Score:
    seen = [[row.seen.truth.total, row.seen.truth.n_tokens] for row in rows]
    withheld = [[row.withheld.truth.total, row.withheld.truth.n_tokens] for row in rows]
    return score_of(
        np.array(seen, dtype=float),
        np.array(withheld, dtype=float),
        None,
        clusters,
        perplexity_of,
    )


def table_of(
    questions: list[Question],
    rows: list[Answered],
    metrics: TextMetrics | None,
    constants: list[str],
) -> dict[str, Score]:
    """{name: Score} of some questions, `rows` their answers, `constants` what constant_answers
    gives them."""
    clusters = number_pictures(questions)
    table = judged_scores(questions, rows, constants, clusters)
    if metrics:
        table |= text_scores(questions, rows, constants, clusters, metrics)
    table[PERPLEXITY] = perplexity_score(rows, clusters)
    return table


def constant_answers(questions: list[Question], label: str | None) -> list[str]:
    """For each question the commonest truth among those of its language and of its value of `label`
    (None: of its language), as it is most often written."""
    groups = defaultdict(Counter)
    spelt = defaultdict(Counter)
    for question in questions:
        truth = normalise(question.truth)
        groups[group_of(question, label)][truth] += 1
        spelt[truth][question.truth] += 1
    constants = []
    for question in questions:
        commonest = groups[group_of(question, label)].most_common(1)[0][0]
        constants.append(spelt[commonest].most_common(1)[0][0])
    return constants


def group_of(question: Question, label: str | None) -> tuple[str, str | None]:
    kind = None if label is None else question.kinds.get(label)
    return question.language, kind


# --- 2. the report --------------------------------------------------------------------------------


@dataclass
class Report:
    """What report.json holds and report.md says."""

    name: str
    file: str
    set: str
    model: str
    quantize: str | None
    max_new_tokens: int
    n: int
    pictures: int
    languages: Counter[str]
    left_out: Counter[str]
    constant_of: (
        str  # what the constant answer is the commonest of: a label of the set, or "language"
    )
    headline: str  # the score that the breakdowns give
    scores: dict[str, Score]
    by: dict[str, dict[str, Score]]  # {label: {value: the headline's row}}
    unread: int | None  # of the answers to shown options; None where no question has any
    quantised: QuantisedChange | None

    def to_json(self) -> dict[str, Any]:
        best = self.scores[self.headline]
        report = {
            "name": self.name,
            "file": self.file,
            "set": self.set,
            "model": self.model,
            "quantize": self.quantize,
            "max_new_tokens": self.max_new_tokens,
            "n": self.n,
            "pictures": self.pictures,
            "languages": self.languages,
            "left_out": self.left_out,
            "constant_of": self.constant_of,
            "headline": self.headline,
            "accuracy": best.seen.value,
            "blind": best.withheld.value,
            "constant": best.constant,
            "scores": {name: score.to_json() for name, score in self.scores.items()},
            "by": {},
        }
        for label, groups in self.by.items():
            report["by"][label] = {kind: score.to_json() for kind, score in groups.items()}
        if self.unread is not None:
            report["unread"] = self.unread
        if self.quantised:
            report["quantised"] = asdict(self.quantised)
        return report


def is_share(name: str) -> bool:
    """Whether a score is one of 0 to 1, which reads as a percentage."""
    return not name.startswith("perplexity")


def number_text(name: str, value: float) -> str:
    return f"{100 * value:.1f} %" if is_share(name) else f"{value:.3g}"


def estimate_text(name: str, found: Estimate) -> str:
    """A cell of report.md."""
    text = number_text(name, found.value)
    if found.low is None or found.high is None:
        return text
    if is_share(name):
        return f"{text} ({100 * found.low:.1f} to {100 * found.high:.1f})"
    return f"{text} ({found.low:.3g} to {found.high:.3g})"


def score_line(title: str, name: str, score: Score) -> str:
    """A line of a table of report.md: `title`, then the numbers of the score `name`."""
    constant = ""
    if score.constant is not None:
        constant = number_text(name, score.constant)
    seen = estimate_text(name, score.seen)
    withheld = estimate_text(name, score.withheld)
    return f"| {title} | {score.n} | {seen} | {withheld} | {constant} |"


def report_lines(report: Report) -> list[str]:
    """report.md."""
    lines = [
        f"# {report.name}: {report.n} questions about {report.pictures} pictures",
        "",
        setting_line(report),
        "",
        "| score | n | with the picture (95 %) | picture withheld (95 %) | best constant answer |",
        "|---|---|---|---|---|",
    ]
    for name, score in report.scores.items():
        lines.append(score_line(name, name, score))
    lines += ["", constant_line(report)]
    if report.unread is not None:
        n = report.scores[BY_ANSWER].n
        lines += [
            "",
            f"Of the answers to shown options, {report.unread} of {n} name none and count as "
            "wrong.",
        ]
    for label, groups in report.by.items():
        lines += [
            "",
            f"| {label} | n | {report.headline} (95 %) | picture withheld (95 %) "
            "| best constant answer of its kind |",
            "|---|---|---|---|---|",
        ]
        for kind, score in groups.items():
            lines.append(score_line(kind.replace("|", "/"), report.headline, score))
    if report.quantised:
        lines += ["", quantised_line(report.quantised)]
    return lines


def setting_line(report: Report) -> str:
    languages = ", ".join(f"{n} in {language}" for language, n in report.languages.items())
    left_out = [f" Left out: {n} {reason}." for reason, n in report.left_out.items()]
    return (
        f"{report.set}, {languages}; model {report.model}; "
        f"answers greedy, at most {report.max_new_tokens} tokens." + "".join(left_out)
    )


def constant_line(report: Report) -> str:
    of_language = ""
    if len(report.languages) > 1 and report.constant_of != "language":
        of_language = " and language"
    return (
        f"The constant answer is the commonest truth of each {report.constant_of}{of_language}; "
        "of choices the commonest letter."
    )


def quantised_line(change: QuantisedChange) -> str:
    return (
        f"{change.bits} against {change.dtype}, on {change.n_tokens} tokens of {change.n} "
        "true answers, decoded one by one: "
        f"perplexity {change.perplexity_before:.4f} -> {change.perplexity_after:.4f}, "
        f"logits off by {change.logits_off:.2%} (root mean square), "
        f"the likeliest word the same for {change.same_first:.1%}, "
        f"KL divergence {change.kl:.2e}."
    )


# --- 3. from answers to the report ----------------------------------------------------------------


def breakdown(
    questions: list[Question], rows: list[Answered], label: str, headline: str
) -> dict[str, Score]:
    """The headline's row for each value of a label, against the constant answer of its kind."""
    constants = constant_answers(questions, label)
    groups = defaultdict(list)
    for i, question in enumerate(questions):
        if label == "language":
            groups[question.language].append(i)
        else:
            groups[question.kinds.get(label, "(none)")].append(i)
    found = {}
    for value, group in sorted(groups.items()):
        table = table_of(
            [questions[i] for i in group],
            [rows[i] for i in group],
            None,
            [constants[i] for i in group],
        )
        if headline in table:
            found[value] = table[headline]
    return found


def headline_of(scores: dict[str, Score], n: int) -> str:
    """The score to look at first: of choices where most questions are such."""
    has_choices = BY_LIKELIHOOD in scores
    if has_choices and 2 * scores[BY_LIKELIHOOD].n > n:
        return BY_LIKELIHOOD
    return EXACT_MATCH


def unread_answers(questions: list[Question], rows: list[Answered]) -> int | None:
    """How many answers to shown options name none; None where no question has options."""
    if not any(question.choices for question in questions):
        return None
    n = 0
    for question, row in zip(questions, rows, strict=True):
        if question.choices and not read_choice(row.seen.choice_answer, question.choices):
            n += 1
    return n


def make_report(
    questions: list[Question],
    rows: list[Answered],
    *,
    file: str,
    kind: str,
    model: str,
    quantize: str | None,
    max_new_tokens: int,
    left_out: Counter[str],
    quantised: QuantisedChange | None,
) -> Report:
    """The Report of the questions that were answered, `rows` their answers."""
    labels = list(dict.fromkeys(itertools.chain.from_iterable(q.kinds for q in questions)))
    first = labels[0] if labels else None
    scores = table_of(questions, rows, text_metrics(), constant_answers(questions, first))
    headline = headline_of(scores, len(questions))
    languages = Counter(question.language for question in questions)
    if len(languages) > 1:
        labels.append("language")
    pictures = set()
    for question in questions:
        pictures.update(question.pictures)
    return Report(
        name=Path(file).name,
        file=file,
        set=kind,
        model=model,
        quantize=quantize,
        max_new_tokens=max_new_tokens,
        n=len(questions),
        pictures=len(pictures),
        languages=languages,
        left_out=left_out,
        constant_of=first or "language",
        headline=headline,
        scores=scores,
        by={label: breakdown(questions, rows, label, headline) for label in labels},
        unread=unread_answers(questions, rows),
        quantised=quantised,
    )


def write_report(out: Path, report: Report) -> None:
    """report.json and report.md in a folder; the latter is printed, too."""
    text = "\n".join(report_lines(report))
    write_json(out / "report.json", report.to_json())
    write_text(out / "report.md", text + "\n")
    print(text)
