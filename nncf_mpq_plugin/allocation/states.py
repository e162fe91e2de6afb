"""Lists of partial policies, in lexicographic order, and which of them another one of the list makes superfluous."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

MOST_PRODUCTS = 6_000_000
SMALL = 48
CELLS = 200
NONE = np.iinfo(np.int64).max
MIXERS = np.array([0x9E3779B97F4A7C15 - 2**64, 0x517CC1B727220A95, 0x6A09E667F3BCC909, 0x3C6EF372FE94F82B])


class TooManyStatesError(Exception):
    """The lists would grow too long."""


@dataclass(frozen=True)
class States:
    """
    Partial policies over the same groups.

    :param above: how far each one's choices lie above the smallest values of their groups. ``[S]``.
    :param cost: objective in steps of a grid, above a common base. ``[S]``.
    :param use: of the budgets, integers. ``[budgets, S]``.
    :param before: index of the state that each one extends. ``[S]``.
    :param option: index of the option that it adds. ``[S]``.
    """

    above: np.ndarray
    cost: np.ndarray
    use: np.ndarray
    before: np.ndarray
    option: np.ndarray

    def __len__(self) -> int:
        return len(self.above)

    def taking(self, kept: np.ndarray) -> States:
        """:return: the states of a mask or of indices."""
        return States(self.above[kept], self.cost[kept], self.use[:, kept], self.before[kept], self.option[kept])


def options(above: np.ndarray, cost: np.ndarray, use: np.ndarray) -> States:
    """:return: states that extend nothing."""
    index = np.arange(len(above))
    return States(above, cost, use, np.zeros_like(index), index)


def nothing(budgets: int, above: float = 0.0) -> States:
    """:return: the one partial policy over no groups."""
    return options(np.array([above]), np.zeros(1, np.int64), np.zeros((budgets, 1), np.int64))


def extended(states: States, added: States, radius: float, *, after: bool) -> States:
    """
    All pairs of a state and an option.

    :param radius: pairs further above the smallest values are left out.
    :param after: whether the option's group comes after those of the states, which decides on the order.
    :raises TooManyStatesError: if there are too many.
    """
    if len(states) * len(added) > MOST_PRODUCTS:
        raise TooManyStatesError
    first, second = (states, added) if after else (added, states)
    sums = first.above[:, None] + second.above
    rows, columns = np.nonzero(sums <= radius)
    before, option = (rows, columns) if after else (columns, rows)
    return States(
        sums[rows, columns],
        states.cost[before] + added.cost[option],
        states.use[:, before] + added.use[:, option],
        before,
        option,
    )


def undominated(states: States) -> np.ndarray:
    """
    Leave out states that an earlier one equals or any one beats in objective, while using no more of any budget.

    With two budgets and more a few that could be left out are kept: a state is compared with those of lower cells of a
    grid only, and with those of the same use.

    :return: mask ``[S]``.
    """
    count = len(states)
    order = np.argsort(states.cost, kind="stable")
    rank = np.empty(count, np.int64)
    rank[order] = np.arange(count)  # no two are equal; the earlier one of equal objectives is the better
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
    mixed = (ordered * MIXERS[: len(use), None]).sum(0)  # wraps around; equal use gives equal numbers
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
