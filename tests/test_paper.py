"""Promise: lengths drawn like the paper's give back its Tables 1 and 2, cell by cell, the totals of
both sets among them."""

import numpy as np
import pytest

from common.paper import TABLES, lengths_like, sorted_lengths

RNG = np.random.default_rng(0)
CELLS = {}
for number, table in TABLES.items():
    for (source, kind), texts in table.texts.items():
        CELLS[f"table {number}, {source}, {kind}"] = texts


def quartiles(lengths):
    return np.quantile(lengths, [0.25, 0.5, 0.75])


@pytest.mark.parametrize("name", CELLS)
def test_a_cell(name):
    """The sum within a tenth of a percent, all else exact."""
    texts = CELLS[name]
    lengths = lengths_like(texts, texts.n, RNG)
    assert len(lengths) == texts.n
    assert lengths.sum() == pytest.approx(texts.tokens, rel=0.001)
    assert lengths.max() == texts.most
    assert quartiles(lengths).tolist() == [texts.q1, texts.median, texts.q3]


@pytest.mark.parametrize("number", TABLES)
def test_the_totals_of_both_sets(number):
    table = TABLES[number]
    for kind, totals in table.totals.items():
        of_sets = [texts for (_, its), texts in table.texts.items() if its == kind]
        lengths = np.concatenate([sorted_lengths(texts) for texts in of_sets])
        assert lengths.sum() == pytest.approx(totals.tokens, rel=0.001)
        assert lengths.max() == totals.most
        assert quartiles(lengths).tolist() == [totals.q1, totals.median, totals.q3]


def test_the_sums_are_those_that_the_paper_prints():
    """167 M contexts of 316,838 case reports are 527 tokens each, 21 M inline texts 66."""
    for texts, mean in (
        (CELLS["table 1, PMC-CaseReport, C"], 527),
        (CELLS["table 1, PMC-CaseReport, I"], 66),
    ):
        assert round(sorted_lengths(texts).mean()) == mean
    assert TABLES[1].n_pairs == 580_014
    assert TABLES[2].n_pairs == 469_441


@pytest.mark.parametrize("name", CELLS)
@pytest.mark.parametrize("n", [1, 7, 1000, 400_000])
def test_any_number_of_texts(name, n):
    """Fewer or more of them: as many as asked for, mean and quartiles those of the cell."""
    texts = CELLS[name]
    lengths = lengths_like(texts, n, RNG)
    assert len(lengths) == n
    assert lengths.min() >= 1
    assert lengths.mean() == pytest.approx(texts.tokens / texts.n, abs=0.51 / n + 0.01)
    if n >= 1000:
        assert np.abs(quartiles(lengths) - [texts.q1, texts.median, texts.q3]).max() <= 1


def test_the_order_is_drawn():
    """The same generator gives the same order, another one another."""
    texts = CELLS["table 2, PMC-VQA, A"]
    first, again, other = [
        lengths_like(texts, 500, np.random.default_rng(seed)) for seed in (1, 1, 2)
    ]
    assert first.tolist() == again.tolist() != other.tolist()
    assert sorted(first) == sorted(other)
    assert first.tolist() != sorted(first)


def test_knots_ascend():
    for name, texts in CELLS.items():
        shares, lengths = zip(*texts.knots, strict=True)
        assert list(shares) == sorted(set(shares)), name
        assert list(lengths) == sorted(set(lengths)), name
