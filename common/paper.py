"""Tables 1 and 2 of the paper (arXiv 2310.17956) as data, and lengths like those of its texts.

The tables give of each kind of text a count, a sum, quartiles and a maximum. lengths_like() gives
whole numbers that have all of these, so that a plan, a synthetic set and a check of `stats` start
from the same texts.
"""

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

CASE_REPORT = "PMC-CaseReport"
OA = "PMC-OA"
PMC_VQA = "PMC-VQA"
TOTAL = "total"


@dataclass(frozen=True)
class Texts:
    """Texts of one kind in one set, lengths in tokens: a cell of a table, its lines together."""

    n: int
    tokens: int  # in all, as the table rounds it
    median: int
    q1: int
    q3: int
    most: int
    # further (share of texts, length that they do not pass), below the largest; the first one is
    # the shortest text: our guess, since the paper gives no minimum. The others follow from the
    # tables' column of totals
    more: tuple[tuple[float, float], ...]

    @property
    def knots(self) -> list[tuple[float, float]]:
        """(share, length), all that is known below the maximum."""
        quartiles = [(0.25, self.q1), (0.5, self.median), (0.75, self.q3)]
        return sorted([*self.more, *quartiles])


@dataclass(frozen=True)
class Totals:
    """A line of a table's last column: one kind of text in both sets."""

    tokens: int
    median: int
    q1: int
    q3: int
    most: int


@dataclass(frozen=True)
class Table:
    """A table of the paper. pairs: {set: rows}; texts: {(set, kind): Texts}; totals: {kind:
    Totals}. Kinds are a letter: C context, I inline text or caption, Q question, A answer."""

    pairs: dict[str, int]
    texts: dict[tuple[str, str], Texts]
    totals: dict[str, Totals]

    @property
    def n_pairs(self) -> int:
        return sum(self.pairs.values())


# What the totals say of each set, w being its share of the texts:
#   I: 47 is Q1 of both sets. With 41 and 59 as its quartiles, 0.344 of the inline texts have 47
#      tokens at most; w = 0.546. So of the captions (0.25 - 0.546 * 0.344) / 0.454 = 0.137 have.
#      132 is Q3: 0.526 of the captions have as many at most, so of the inline texts
#      (0.75 - 0.454 * 0.526) / 0.546 = 0.936 have
#   Q: 16 is Q1 of both though 15 is that of PMC-VQA: fewer than 0.25 of both have 15 at most, so
#      16 tokens are common in PMC-CaseReport. 25 is Q3: fewer than 0.75 have 24 at most; w = 0.675
#   A: 12 is Q1: 0.597 of PMC-VQA have 12 at most, so of PMC-CaseReport
#      (0.25 - 0.325 * 0.597) / 0.675 = 0.083 have. 22 is the median: 0.329 of PMC-CaseReport have
#      22 at most, so of PMC-VQA (0.5 - 0.675 * 0.329) / 0.325 = 0.855 have. 34 is Q3: 0.669 of
#      PMC-CaseReport have 34 at most, so of PMC-VQA (0.75 - 0.675 * 0.669) / 0.325 = 0.919 have
# The text of section 3.2 says 45 where Table 1 has 41 for Q1 of inline texts: 41 is taken.
TABLE_1 = Table(
    pairs={CASE_REPORT: 316_838, OA: 263_176},
    texts={
        (CASE_REPORT, "C"): Texts(
            n=316_838,
            tokens=167_000_000,
            median=435,
            q1=211,
            q3=757,
            most=2576,
            more=((0, 16),),
        ),
        (CASE_REPORT, "I"): Texts(
            n=316_838,
            tokens=21_000_000,
            median=59,
            q1=41,
            q3=83,
            most=1551,
            more=((0, 12), (0.936, 132)),
        ),
        (OA, "I"): Texts(
            n=263_176,
            tokens=42_000_000,
            median=125,
            q1=68,
            q3=210,
            most=1417,
            more=((0, 12), (0.137, 47)),
        ),
    },
    totals={
        "C": Totals(tokens=167_000_000, median=435, q1=211, q3=757, most=2576),
        "I": Totals(tokens=63_000_000, median=75, q1=47, q3=132, most=1551),
    },
)
TABLE_2 = Table(
    pairs={CASE_REPORT: 316_838, PMC_VQA: 152_603},
    texts={
        (CASE_REPORT, "Q"): Texts(
            n=316_838,
            tokens=7_000_000,
            median=21,
            q1=16,
            q3=26,
            most=4040,
            more=((0, 5), (0.2, 15.5)),
        ),
        (CASE_REPORT, "A"): Texts(
            n=316_838,
            tokens=10_000_000,
            median=27,
            q1=20,
            q3=38,
            most=451,
            more=((0, 4), (0.083, 12)),
        ),
        (PMC_VQA, "Q"): Texts(
            n=152_603,
            tokens=3_000_000,
            median=18,
            q1=15,
            q3=22,
            most=335,
            more=((0, 5), (0.88, 24.5)),
        ),
        (PMC_VQA, "A"): Texts(
            n=152_603,
            tokens=3_000_000,
            median=10,
            q1=6,
            q3=16,
            most=732,
            more=((0, 2), (0.855, 22), (0.919, 34)),
        ),
    },
    totals={
        "Q": Totals(tokens=10_000_000, median=20, q1=16, q3=25, most=4040),
        "A": Totals(tokens=13_000_000, median=22, q1=12, q3=34, most=732),
    },
)
TABLES = {1: TABLE_1, 2: TABLE_2}
# ChiMed-VL-Alignment.jsonl as it was released, by its authors' word: PMC-OA alone, no contexts
RELEASED_ALIGNMENT = 263_175


def body_of(texts: Texts, shares: np.ndarray) -> np.ndarray:
    """Lengths that these shares of the texts do not pass, float64, none beyond the last knot:
    between two knots the logarithm of the length grows evenly with the share."""
    at = [share for share, _ in texts.knots]
    logs = [math.log(length) for _, length in texts.knots]
    return np.exp(np.interp(shares, at, logs))


def tail_of(texts: Texts, beyond: np.ndarray, bend: float) -> np.ndarray:
    """Lengths beyond the last knot, float64. beyond: the logarithm of the share that is longer, 0
    at the knot and 1 for the longest text.

    The logarithm of the length grows with it to the maximum, as sizes of texts do, bent down by
    `bend` where that is positive: the larger it is, the fewer texts are long.
    """
    start = math.log(texts.knots[-1][1])
    bent = np.expm1(bend * beyond) / math.expm1(bend)
    return np.exp(start + (math.log(texts.most) - start) * bent)


@lru_cache
def sorted_lengths(texts: Texts) -> np.ndarray:
    """int64 (texts.n,): lengths with the count, sum, quartiles and maximum of a cell, the shortest
    first."""
    last = texts.knots[-1][0]
    shares = np.linspace(0, 1, texts.n)
    n_body = int(np.searchsorted(shares, last, side="right"))
    body = np.rint(body_of(texts, shares[:n_body]))
    longer = np.clip((1 - shares[n_body:]) / (1 - last), 1 / texts.n, 1)
    beyond = np.log(longer) / math.log(1 / texts.n)

    tail = np.zeros_like(beyond)
    low = -50.0
    high = 50.0
    # halved until the sum is that of the table; never 0, where the bend has no value
    for _ in range(50):
        bend = (low + high) / 2 or 1e-6
        tail = np.rint(tail_of(texts, beyond, bend))
        if body.sum() + tail.sum() > texts.tokens:
            low = bend
        else:
            high = bend
    return np.concatenate([body, tail]).astype(np.int64)


def lengths_like(texts: Texts, n: int, rng: np.random.Generator) -> np.ndarray:
    """int64 (n,): lengths like those of a cell, in an order drawn from rng.

    n = texts.n: the table's own sum, quartiles and maximum. Another n: the sorted lengths in n
    equal parts, each by its mean; the mean and quartiles stay, while the maximum is that of a part.
    """
    whole = sorted_lengths(texts)
    sums = np.concatenate([[0], np.cumsum(whole)])
    edges = np.linspace(0, texts.n, n + 1)
    # rounded as sums, so that no rounding is left over
    sums_so_far = np.interp(edges, np.arange(texts.n + 1), sums) * (n / texts.n)
    lengths = np.diff(np.rint(sums_so_far)).astype(np.int64)
    return rng.permutation(lengths)
