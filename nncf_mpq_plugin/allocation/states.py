"""Lists of partial policies, and which of them another one of the list makes superfluous."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

MOST_PRODUCTS = 20_000_000
SMALL = 48
CELLS = 200
WORD_BITS = 62
NONE = np.iinfo(np.int64).max
MIXER = 0x9E3779B97F4A7C15 - 2**64


class TooManyStatesError(Exception):
    """The lists would grow too long."""


@dataclass(frozen=True)
class States:
    """
    Partial policies over the same groups.

    :param above: how far each one's choices lie above the smallest values of their groups. ``[S]``.
    :param cost: objective in steps of a grid, above a common base. ``[S]``.
    :param use: of the budgets, integers. ``[budgets, S]``.
    :param key: what each one chooses, see :class:`Digits`. ``[words, S]``.
    """

    above: np.ndarray
    cost: np.ndarray
    use: np.ndarray
    key: np.ndarray

    def __len__(self) -> int:
        return len(self.above)

    def taking(self, kept: np.ndarray) -> States:
        """:return: the states of a mask or of indices."""
        return States(self.above[kept], self.cost[kept], self.use[:, kept], self.key[:, kept])


class Digits:
    """
    Keys that say which option of each of several sets is chosen.

    A key is a number of several words with one digit a set, the first set's in front. So keys of choices from different
    sets add up to that of both, and of choices from the same sets the smaller key is the first in lexicographic order.
    """

    def __init__(self, counts: Sequence[int]):
        """:param counts: number of options of each set."""
        word, shift = 0, WORD_BITS
        self._places: list[tuple[int, int, int]] = []
        for count in counts:
            width = max(1, (count - 1).bit_length())
            if width > shift:
                word, shift = word + 1, WORD_BITS
            shift -= width
            self._places.append((word, shift, (1 << width) - 1))
        self.words = word + 1

    def keys(self, index: int, count: int) -> np.ndarray:
        """:return: keys of the first options of one set, with none of the others chosen. ``[words, count]``."""
        word, shift, _ = self._places[index]
        result = np.zeros((self.words, count), np.int64)
        result[word] = np.arange(count) << shift
        return result

    def option(self, index: int, key: np.ndarray) -> np.ndarray:
        """
        :param key: ``[words, ...]``.
        :return: which option of one set is chosen. ``[...]``.
        """
        word, shift, mask = self._places[index]
        chosen: np.ndarray = key[word] >> shift & mask
        return chosen


def nothing(budgets: int, words: int, above: float = 0.0) -> States:
    """:return: the one partial policy over no groups."""
    return States(
        np.array([above]), np.zeros(1, np.int64), np.zeros((budgets, 1), np.int64), np.zeros((words, 1), np.int64)
    )


def extended(states: States, added: States, radius: float) -> States:
    """
    All pairs of a state and one over other groups.

    :param radius: pairs further above the smallest values are left out.
    :raises TooManyStatesError: if there are too many.
    """
    if len(states) * len(added) > MOST_PRODUCTS:
        raise TooManyStatesError
    sums = states.above[:, None] + added.above
    rows, columns = np.nonzero(sums <= radius)
    return States(
        sums[rows, columns],
        states.cost[rows] + added.cost[columns],
        states.use[:, rows] + added.use[:, columns],
        states.key[:, rows] + added.key[:, columns],
    )


def undominated(states: States) -> np.ndarray:
    """
    Leave out states that another one, using no more of any budget, beats in objective, or equals and comes before.

    With two budgets and more a few that could be left out are kept: a state is compared with those of lower cells of a
    grid only, and with those of the same use.

    :return: mask ``[S]``.
    """
    count = len(states)
    order = np.argsort(states.cost, kind="stable")
    if (np.diff(states.cost[order]) == 0).any():
        order = np.lexsort((*states.key[::-1], states.cost))
    rank = np.empty(count, np.int64)
    rank[order] = np.arange(count)  # no two are equal; of equal objectives the smaller key is the better
    if len(states.use) == 1:
        order = np.lexsort((rank, states.use[0]))
        return _first_of_falling(rank, order)
    if count < SMALL:
        return np.ones(count, bool)
    kept = _first_of_same(states.use, order)
    kept[kept] = _lower_cells(rank[kept], states.use[:, kept])
    return kept


def _first_of_same(use: np.ndarray, order: np.ndarray) -> np.ndarray:
    """:return: mask of the states that no earlier one of an order has the same use as."""
    ordered = use[:, order]
    mixed = ordered[0].copy()
    for row in ordered[1:]:
        mixed = mixed * MIXER + row  # wraps around; equal use gives equal numbers
    together = np.argsort(mixed, kind="stable")
    repeats = (np.diff(ordered[:, together], axis=1) == 0).all(0)
    kept = np.ones(len(order), bool)
    kept[order[together[1:][repeats]]] = False
    return kept


def _lower_cells(rank: np.ndarray, use: np.ndarray) -> np.ndarray:
    """:return: mask of the states that none of a lower rank beats from cells that are lower in every budget."""
    count, budgets = len(rank), len(use)
    cells = max(4, min(CELLS, int((4 * count) ** (1 / budgets))))
    edges = np.linspace(0, count - 1, cells + 1).astype(int)[1:-1]
    index = tuple(np.searchsorted(np.partition(u, edges)[edges], u, side="right") for u in use)
    best = np.full((cells,) * budgets, NONE)
    np.minimum.at(best, index, rank)
    for axis in range(budgets):
        best = np.minimum.accumulate(best, axis)
    lower = np.full((cells + 1,) * budgets, NONE)
    lower[(slice(1, None),) * budgets] = best
    return rank < lower[index]


def _first_of_falling(rank: np.ndarray, order: np.ndarray) -> np.ndarray:
    """:return: mask of those whose rank is below that of all before them in an order."""
    ranked = rank[order]
    lowest = np.minimum.accumulate(np.concatenate([[len(rank)], ranked[:-1]]))
    kept = np.zeros(len(rank), bool)
    kept[order[ranked < lowest]] = True
    return kept
