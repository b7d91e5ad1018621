"""Rows that belong together: one article on one side of a split, one picture's questions in one dialog."""

import numpy as np

from common.text import text_key

MAX_TURNS = 10  # questions in one merged dialog: of the paper's lengths that is some 600 tokens beside the picture's 576


class Teams:
    """Rows that become one dialog. keys: uint64 a row, equal within a team, 0: alone; limit: members at most. The first row leads."""

    def __init__(self, keys, limit=None):
        order = np.argsort(keys, kind="stable")
        order = order[keys[order] != 0]
        new = np.diff(keys[order], prepend=np.uint64(0)) != 0  # where a team begins in `order`
        if limit and len(order):
            place = np.arange(len(order)) - np.maximum.accumulate(
                np.where(new, np.arange(len(order)), 0)
            )
            new |= place % limit == 0
        self.follows = np.zeros(len(keys), dtype=bool)
        self.follows[order[~new]] = True
        begins = np.append(np.flatnonzero(new), len(order))
        by_leader = np.argsort(order[begins[:-1]])
        self.order, self.leaders, self.begins, self.ends = (
            order,
            order[begins[:-1]][by_leader],
            begins[:-1][by_leader],
            begins[1:][by_leader],
        )

    def of(self, row):
        """The row numbers of the team that `row` leads, itself first."""
        k = np.searchsorted(self.leaders, row)
        if k == len(self.leaders) or self.leaders[k] != row:
            return [row]
        return [int(r) for r in self.order[self.begins[k] : self.ends[k]]]


def connected(ties, counts):
    """Which rows belong together because they share a key, directly or through others: a number a row, and the keys by that number.

    ties: uint64 keys of all rows, one after another; counts: how many each row has, at least one."""
    keys, tie = np.unique(ties, return_inverse=True)
    begins = np.cumsum(counts) - counts
    left, right, parent = tie, tie[np.repeat(begins, counts)], np.arange(len(keys))
    while not np.array_equal(parent[left], parent[right]):
        low = np.minimum(parent[left], parent[right])
        np.minimum.at(parent, parent[left], low)
        np.minimum.at(parent, parent[right], low)
        while not np.array_equal(parent, parent[parent]):
            parent = parent[parent]
    return parent[tie[begins]], keys


def held_out(component, keys, fraction, seed):
    """bool a row: whole components, in an order drawn from the seed, taken while they fit into `fraction` of the rows; at least one."""
    roots, inverse, sizes = np.unique(component, return_inverse=True, return_counts=True)
    if fraction and len(roots) < 2:
        raise ValueError(
            "--val-fraction: all rows share an article or a picture, so none can be held out"
        )
    taken, left = np.zeros(len(roots), dtype=bool), round(fraction * len(component))
    for r in (
        sorted(range(len(roots)), key=lambda r: text_key(str(seed), str(keys[roots[r]])))
        if fraction
        else ()
    ):
        if sizes[r] <= left:
            taken[r], left = True, left - sizes[r]
    if fraction and not taken.any():
        taken[np.argmin(sizes)] = True
    return taken[inverse]
