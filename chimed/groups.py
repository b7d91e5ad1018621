"""Rows that belong together: one article on one side of a split, one picture's questions in one
dialog."""

import numpy as np

from common.text import text_key

# questions in one merged dialog: of the paper's lengths that is some 600 tokens beside the
# picture's 576
MAX_TURNS = 10


class Teams:
    """Rows that become one dialog. keys: uint64 a row, equal within a team, 0: alone; limit:
    members at most. The first row leads."""

    def __init__(self, keys: np.ndarray, limit: int | None = None):
        order = np.argsort(keys, kind="stable")
        order = order[keys[order] != 0]
        # where a team begins in `order`
        is_first = np.diff(keys[order], prepend=np.uint64(0)) != 0
        if limit and len(order):
            position = np.arange(len(order))
            begin = np.maximum.accumulate(np.where(is_first, position, 0))
            # a team of more than `limit` is cut into several
            is_first |= (position - begin) % limit == 0

        # bool a row: another row leads it
        self.follows = np.zeros(len(keys), dtype=bool)
        self.follows[order[~is_first]] = True

        # rows, team by team, and of each team its leader and its part of `order`, by leader
        bounds = np.append(np.flatnonzero(is_first), len(order))
        begins = bounds[:-1]
        ends = bounds[1:]
        leaders = order[begins]
        by_leader = np.argsort(leaders)
        self.order = order
        self.leaders = leaders[by_leader]
        self.begins = begins[by_leader]
        self.ends = ends[by_leader]

    def of(self, row: int) -> list[int]:
        """The row numbers of the team that `row` leads, itself first."""
        k = np.searchsorted(self.leaders, row)
        if k == len(self.leaders) or self.leaders[k] != row:
            return [row]
        members = self.order[self.begins[k] : self.ends[k]]
        return [int(member) for member in members]


def connected(ties: np.ndarray, counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Which rows belong together because they share a key, directly or through others: a number a
    row, and the keys by that number.

    ties: uint64 keys of all rows, one after another; counts: how many each row has, at least one.
    """
    keys, tie = np.unique(ties, return_inverse=True)
    begins = np.cumsum(counts) - counts
    first_tie = tie[begins]
    # an edge from each key of a row to the row's first one
    left = tie
    right = np.repeat(first_tie, counts)
    # each key's parent is the lowest one that it is known to be connected with
    parent = np.arange(len(keys))
    while not np.array_equal(parent[left], parent[right]):
        low = np.minimum(parent[left], parent[right])
        np.minimum.at(parent, parent[left], low)
        np.minimum.at(parent, parent[right], low)
        while not np.array_equal(parent, parent[parent]):
            parent = parent[parent]
    return parent[first_tie], keys


def held_out(component: np.ndarray, keys: np.ndarray, fraction: float, seed: int) -> np.ndarray:
    """bool a row: whole components, in an order drawn from the seed, taken while they fit into
    `fraction` of the rows; at least one.

    component, keys: of connected(). ValueError where all rows are one component.
    """
    roots, inverse, sizes = np.unique(component, return_inverse=True, return_counts=True)
    taken = np.zeros(len(roots), dtype=bool)
    if not fraction:
        return taken[inverse]
    if len(roots) < 2:
        raise ValueError(
            "--val-fraction: all rows share an article or a picture, so none can be held out"
        )
    left = round(fraction * len(component))
    drawn = sorted(range(len(roots)), key=lambda r: text_key(str(seed), str(keys[roots[r]])))
    for r in drawn:
        if sizes[r] <= left:
            taken[r] = True
            left -= sizes[r]
    if not taken.any():
        taken[np.argmin(sizes)] = True
    return taken[inverse]
