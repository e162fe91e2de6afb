"""
Every policy whose objective may lie below a target, as two lists of halves.

Partial policies are extended group by group, from the first group on in one list and from the last one back in the
other, always the shorter list (Horowitz and Sahni, "Computing partitions with applications to the knapsack problem",
1974). A partial policy is dropped if a bound on what it can still become exceeds the target, if the budgets cannot hold
any more, or if another of its list is no worse in objective and in every budget (Nemhauser and Ullmann, "Discrete
dynamic programming and capital allocation", 1969).

Objectives are rounded to a grid of 2^-50 of the spread that is left, so that their sums are exact integers and ties are
ties. Lists are kept in lexicographic order, and of two that are equal in objective the earlier one counts as the
better: what comes out at the end is the first of all best policies.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from nncf_mpq_plugin.allocation.bounds import Choice, Problem, Relaxation
from nncf_mpq_plugin.allocation.join import best_pair
from nncf_mpq_plugin.allocation.states import States, TooManyStatesError, extended, nothing, options, undominated

MOST_STATES = 60_000
GRID_BITS = 50


@dataclass(frozen=True)
class Block:
    """
    What a group may choose.

    :param layers: indices of the group's layers.
    :param options: joint choices of its layers, in lexicographic order: activation bits first, then the weight bits.
    :param weight: ``[options, layers]``.
    :param activation: ``[options]``.
    """

    layers: np.ndarray
    options: States
    weight: np.ndarray
    activation: np.ndarray


@dataclass(frozen=True)
class Open:
    """
    The choices that a policy at or below a target may contain.

    :param mask: ``[layers, W, A]``.
    :param above: as :meth:`Problem.above`, at the best multipliers. ``[layers, W, A]``.
    :param offsets: likewise. ``[groups, A]``.
    :param radius: a policy at the target lies that far above the bound.
    :param base: smallest objective of each layer. ``[layers]``.
    :param unit: objective of one step of the grid.
    :param grid: each choice's objective above the base, in steps. ``[layers, W, A]``.
    """

    mask: np.ndarray
    above: np.ndarray
    offsets: np.ndarray
    radius: float
    base: np.ndarray
    unit: float
    grid: np.ndarray


@dataclass(frozen=True)
class Cuts:
    """
    What a partial policy has to satisfy: the budgets, and the bounds by several multipliers.

    :param multipliers: ``[D, budgets]``.
    :param unit: objective of one step of the grid.
    :param limits: target + multipliers x what the budgets have for the blocks. ``[D]``.
    :param values: the smallest values of the blocks, summed up to each. ``[blocks + 1, D]``.
    :param left: what the budgets have for the blocks. ``[budgets]``.
    :param uses: the smallest uses of the blocks, summed up to each. ``[blocks + 1, budgets]``.
    """

    multipliers: np.ndarray
    unit: float
    limits: np.ndarray
    values: np.ndarray
    left: np.ndarray
    uses: np.ndarray

    def keep(self, states: States, begin: int, end: int) -> np.ndarray:
        """:return: mask of the states over blocks ``begin`` to ``end`` that a policy below the target may contain."""
        use_of_others = self.uses[-1] - self.uses[end] + self.uses[begin]
        value_of_others = self.values[-1] - self.values[end] + self.values[begin]
        kept: np.ndarray = (states.use <= (self.left - use_of_others)[:, None]).all(0)
        values = self.multipliers @ states.use + states.cost * self.unit
        return kept & (values <= (self.limits - value_of_others)[:, None]).all(0)


def best_below(problem: Problem, relaxation: Relaxation, target: float, hope: float) -> tuple[Choice | None, int]:
    """
    Find the best policy within the budgets.

    :param target: every policy whose objective is at most this is considered.
    :param hope: policies whose objective lies between ``target`` and this are taken where they turn up.
    :return: the best policy found; of equal ones the first in lexicographic order. It is the optimum if its objective
        is at most ``target``. None if none turned up; then there is none at most ``target``. Beside it the length of
        the longest list, which says how hard that was.
    :raises TooManyStatesError: if there are too many partial policies.
    """
    target += relaxation.tolerance
    multipliers, bounds = relaxation.around(target - relaxation.bound)
    multipliers = np.vstack([relaxation.multipliers, multipliers])
    open_ = _open(problem, multipliers, np.append(relaxation.bound, bounds), target)
    if open_ is None:
        return None, 0
    weight, activation, blocks = _blocks(problem, open_)
    if not all(len(block.options) for block in blocks):
        return None, 0
    rest = np.setdiff1d(np.arange(len(problem.costs)), [layer for block in blocks for layer in block.layers])
    at = rest, weight[rest], activation[rest]
    left = problem.bounds - problem.resources[:, *at].sum(1)
    settled = float(open_.base.sum()) + float(open_.grid[at].sum()) * open_.unit
    cuts = _cuts(multipliers[1:], blocks, open_.unit, target - settled, left)
    first, second = [nothing(len(left))], [nothing(len(left))]
    begin, end = 0, len(blocks)
    while begin < end:
        if len(first[-1]) <= len(second[-1]):
            states = extended(first[-1], blocks[begin].options, open_.radius, after=True)
            begin += 1
            states, grown = states.taking(cuts.keep(states, 0, begin)), first
        else:
            end -= 1
            states = extended(second[-1], blocks[end].options, open_.radius, after=False)
            states, grown = states.taking(cuts.keep(states, end, len(blocks))), second
        grown.append(states.taking(undominated(states)))
        if not len(grown[-1]):
            return None, 0
        if len(grown[-1]) > MOST_STATES:
            raise TooManyStatesError
    largest = max(len(states) for states in (*first, *second))
    room = hope + relaxation.tolerance - relaxation.bound
    pair = best_pair(first[-1], second[-1], left, relaxation.multipliers, room)
    if pair is None:
        return None, largest
    for lists, order, state in ((first, blocks[:begin][::-1], pair[1]), (second, blocks[begin:], pair[2])):
        for states, block in zip(lists[:0:-1], order, strict=True):
            taken = int(states.option[state])
            weight[block.layers], activation[block.layers] = block.weight[taken], block.activation[taken]
            state = int(states.before[state])
    return (weight, activation), largest


def _open(problem: Problem, multipliers: np.ndarray, bounds: np.ndarray, target: float) -> Open | None:
    """:return: None if a layer has no choice."""
    above, offsets = problem.above(multipliers)
    radii = (target - bounds)[:, None, None, None]
    mask = (above + offsets[:, problem.groups, None, :] <= radii).all(0)
    if not mask.any((1, 2)).all():
        return None
    base = np.where(mask, problem.costs, np.inf).min((1, 2))
    excess = np.where(mask, problem.costs, base[:, None, None]) - base[:, None, None]
    spread = float(excess.max((1, 2)).sum())
    unit = 2.0 ** (int(np.frexp(spread)[1]) - GRID_BITS)
    grid = np.rint(excess / unit).astype(np.int64)
    return Open(mask, above[0], offsets[0], target - float(bounds[0]), base, unit, grid)


def _blocks(problem: Problem, open_: Open) -> tuple[np.ndarray, np.ndarray, list[Block]]:
    """:return: weight and activation indices of layers with a single choice, and the blocks of all other groups."""
    in_order = open_.mask.transpose(0, 2, 1).reshape(len(open_.mask), -1)
    activation, weight = np.divmod(in_order.argmax(1), open_.mask.shape[1])
    alone = np.bincount(problem.groups)[problem.groups] == 1
    members: dict[int, list[int]] = {}
    for layer in np.flatnonzero((in_order.sum(1) > 1) | ~alone).tolist():
        members.setdefault(int(problem.groups[layer]), []).append(layer)
    return weight, activation, [_block(problem, open_, group, layers) for group, layers in members.items()]


def _block(problem: Problem, open_: Open, group: int, layers: Sequence[int]) -> Block:
    """:return: the joint choices of a group, activation by activation, layer by layer."""
    if len(layers) == 1:
        layer = layers[0]
        a, w = np.nonzero(open_.mask[layer].T)
        above = open_.above[layer, w, a] + open_.offsets[group, a]
        return Block(
            np.array(layers), options(above, open_.grid[layer, w, a], problem.resources[:, layer, w, a]), w[:, None], a
        )
    found: list[States] = []
    weights, activations = [np.zeros((0, len(layers)), dtype=int)], [np.zeros(0, dtype=int)]
    for index in np.flatnonzero(open_.mask[layers].any(1).all(0)).tolist():
        states = nothing(len(problem.bounds), float(open_.offsets[group, index]))
        chosen = np.zeros((1, 0), dtype=int)
        for layer in layers:
            w = np.flatnonzero(open_.mask[layer, :, index])
            at = layer, w, index
            added = options(open_.above[at], open_.grid[at], problem.resources[:, *at])
            states = extended(states, added, open_.radius, after=True)
            states = states.taking(undominated(states))
            chosen = np.column_stack([chosen[states.before], w[states.option]])
        found.append(states)
        weights.append(chosen)
        activations.append(np.full(len(states), index))
    above, cost = (np.concatenate([getattr(s, name) for s in found] or [[]]) for name in ("above", "cost"))
    use = np.concatenate([s.use for s in found] or [np.zeros((len(problem.bounds), 0))], 1)
    joint = options(above, cost.astype(np.int64), use.astype(np.int64))
    return Block(np.array(layers), joint, np.concatenate(weights), np.concatenate(activations))


def _cuts(multipliers: np.ndarray, blocks: Sequence[Block], unit: float, target: float, left: np.ndarray) -> Cuts:
    values = np.zeros((len(blocks) + 1, len(multipliers)))
    uses = np.zeros((len(blocks) + 1, len(left)), np.int64)
    for index, block in enumerate(blocks):
        value = multipliers @ block.options.use + block.options.cost * unit
        values[index + 1] = values[index] + value.min(1)
        uses[index + 1] = uses[index] + block.options.use.min(1)
    return Cuts(multipliers, unit, target + multipliers @ left, values, left, uses)
