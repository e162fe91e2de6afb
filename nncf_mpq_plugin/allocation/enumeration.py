"""
Every policy whose objective may lie below a target, as two lists of halves.

Partial policies are extended group by group, always in the shorter of two lists (Horowitz and Sahni, "Computing
partitions with applications to the knapsack problem", 1974). One begins with the groups whose choices differ most in
what they use of the budgets, the other with those that differ least: bounds assume that the groups still to come can be
mixed at will, which is nearly true of small ones only, so that deciding the large ones first keeps the first list
short. A partial policy is dropped if a bound on what it can still become exceeds the target, if the budgets cannot hold
any more, or if another of its list is no worse in objective and in every budget (Nemhauser and Ullmann, "Discrete
dynamic programming and capital allocation", 1969).

Objectives are rounded to a grid of 2^-50 of the spread that is left, so that their sums are exact integers and ties are
ties. Of two partial policies that are equal in objective the first in lexicographic order counts as the better: what
comes out at the end is the first of all best policies.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from nncf_mpq_plugin.allocation.bounds import Choice, Problem, Relaxation
from nncf_mpq_plugin.allocation.join import best_pair
from nncf_mpq_plugin.allocation.states import Digits, States, TooManyStatesError, extended, nothing, undominated

GRID_BITS = 50
MOST_JOINED = 8
AT_ONCE = 16
WORTHWHILE = 0.1


@dataclass(frozen=True)
class Block:
    """
    What a group may choose.

    :param layers: indices of the group's layers.
    :param options: joint choices of its layers, in lexicographic order (activation bits first, then the weight bits);
        their keys are those of all blocks.
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
    :param values: the smallest values of the parts, summed up to each. ``[parts + 1, D]``.
    :param left: what the budgets have for the blocks. ``[budgets]``.
    :param uses: the smallest uses of the parts, summed up to each. ``[parts + 1, budgets]``.
    """

    multipliers: np.ndarray
    unit: float
    limits: np.ndarray
    values: np.ndarray
    left: np.ndarray
    uses: np.ndarray

    def keep(self, states: States, begin: int, end: int) -> np.ndarray:
        """:return: indices of the states over parts ``begin`` to ``end`` that a policy below the target may contain."""
        use_of_others = self.uses[-1] - self.uses[end] + self.uses[begin]
        value_of_others = self.values[-1] - self.values[end] + self.values[begin]
        room = self.limits - value_of_others
        kept = np.flatnonzero((states.use <= (self.left - use_of_others)[:, None]).all(0))
        for part in range(0, len(self.multipliers), AT_ONCE):
            some = slice(part, part + AT_ONCE)
            values = self.multipliers[some] @ states.use[:, kept] + states.cost[kept] * self.unit
            kept = kept[(values <= room[some, None]).all(0)]
        return kept


def best_below(
    problem: Problem, relaxation: Relaxation, target: float, hope: float, most_states: int
) -> tuple[Choice | None, int]:
    """
    Find the best policy within the budgets.

    :param target: every policy whose objective is at most this is considered.
    :param hope: policies whose objective lies between ``target`` and this are taken where they turn up.
    :param most_states: how long a list of partial policies may become.
    :return: the best policy found; of equal ones the first in lexicographic order. It is the optimum if its objective
        is at most ``target``. None if none turned up; then there is none at most ``target``. Beside it the length of
        the longest list, which says how hard that was.
    :raises TooManyStatesError: if there are too many partial policies.
    """
    target += relaxation.tolerance
    multipliers, bounds = relaxation.near(target - relaxation.bound)
    multipliers = np.vstack([relaxation.multipliers, multipliers])
    open_ = _open(problem, multipliers, np.append(relaxation.bound, bounds), target)
    if open_ is None:
        return None, 0
    weight, activation, blocks, digits = _blocks(problem, open_)
    if not all(len(block.options) for block in blocks):
        return None, 0
    rest = np.setdiff1d(np.arange(len(problem.costs)), [layer for block in blocks for layer in block.layers])
    at = rest, weight[rest], activation[rest]
    left = problem.bounds - problem.resources[:, *at].sum(1)
    settled = float(open_.base.sum()) + float(open_.grid[at].sum()) * open_.unit
    parts = _parts(blocks, open_.radius, relaxation.multipliers)
    if not all(len(part) for part in parts):
        return None, 0
    cuts = _cuts(relaxation.others, parts, open_.unit, target - settled, left)
    words = len(blocks[0].options.key) if blocks else 1
    first, second = (_List(nothing(len(left), words), most_states) for _ in range(2))
    begin, end = 0, len(parts)
    while begin < end:
        if len(first.states) <= len(second.states):
            states = extended(first.states, parts[begin], open_.radius)
            begin += 1
            first.become(states.taking(cuts.keep(states, 0, begin)))
        else:
            end -= 1
            states = extended(second.states, parts[end], open_.radius)
            second.become(states.taking(cuts.keep(states, end, len(parts))))
        if not (len(first.states) and len(second.states)):
            return None, 0
    longest = max(first.longest, second.longest)
    room = hope + relaxation.tolerance - relaxation.bound
    pair = best_pair(first.states, second.states, left, relaxation.multipliers, room)
    if pair is None:
        return None, longest
    key = np.array(pair[1:])
    for index, block in enumerate(blocks):
        taken = int(digits.option(index, key))
        weight[block.layers], activation[block.layers] = block.weight[taken], block.activation[taken]
    return (weight, activation), longest


class _List:
    """One of the two lists; superfluous states are looked for as long as that pays."""

    def __init__(self, states: States, most: int):
        self.states = states
        self.most = most
        self.longest = len(states)
        self._look_at = 0

    def become(self, states: States) -> None:
        """:raises TooManyStatesError: if the list grows too long."""
        if len(states) >= self._look_at:
            kept = undominated(states)
            if kept.sum() > (1 - WORTHWHILE) * len(states) and len(states) > MOST_JOINED:
                self._look_at = 2 * len(states)
            states = states.taking(kept)
        if len(states) > self.most:
            raise TooManyStatesError
        self.states, self.longest = states, max(self.longest, len(states))


def _parts(blocks: Sequence[Block], radius: float, multipliers: np.ndarray) -> list[States]:
    """:return: the blocks' options, those that differ most in their use first; several blocks' joined while few."""
    lumps = [float((multipliers * np.ptp(block.options.use, axis=1)).max()) for block in blocks]
    parts: list[States] = []
    for index in np.argsort(-np.array(lumps), kind="stable").tolist():
        options = blocks[index].options
        if parts and len(parts[-1]) * len(options) <= MOST_JOINED:
            parts[-1] = extended(parts[-1], options, radius)
        else:
            parts.append(options)
    return parts


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


def _blocks(problem: Problem, open_: Open) -> tuple[np.ndarray, np.ndarray, list[Block], Digits]:
    """:return: weight and activation indices of layers with a single choice; blocks of other groups; their keys."""
    in_order = open_.mask.transpose(0, 2, 1).reshape(len(open_.mask), -1)
    activation, weight = np.divmod(in_order.argmax(1), open_.mask.shape[1])
    alone = np.bincount(problem.groups)[problem.groups] == 1
    members: dict[int, list[int]] = {}
    for layer in np.flatnonzero((in_order.sum(1) > 1) | ~alone).tolist():
        members.setdefault(int(problem.groups[layer]), []).append(layer)
    blocks = [_block(problem, open_, group, layers) for group, layers in members.items()]
    digits = Digits([len(block.options) for block in blocks])
    for index, block in enumerate(blocks):
        options = replace(block.options, key=digits.keys(index, len(block.options)))
        blocks[index] = replace(block, options=options)
    return weight, activation, blocks, digits


def _block(problem: Problem, open_: Open, group: int, layers: Sequence[int]) -> Block:
    """:return: the joint choices of a group, activation by activation, layer by layer."""
    if len(layers) == 1:
        layer = layers[0]
        a, w = np.nonzero(open_.mask[layer].T)
        above = open_.above[layer, w, a] + open_.offsets[group, a]
        single = States(above, open_.grid[layer, w, a], problem.resources[:, layer, w, a], np.zeros((0, len(a))))
        return Block(np.array(layers), single, w[:, None], a)
    digits = Digits([problem.costs.shape[1]] * len(layers))
    found: list[States] = []
    activations: list[np.ndarray] = [np.zeros(0, dtype=int)]
    for index in np.flatnonzero(open_.mask[layers].any(1).all(0)).tolist():
        states = nothing(len(problem.bounds), digits.words, float(open_.offsets[group, index]))
        for position, layer in enumerate(layers):
            w = np.flatnonzero(open_.mask[layer, :, index])
            at = layer, w, index
            keys = digits.keys(position, problem.costs.shape[1])[:, w]
            added = States(open_.above[at], open_.grid[at], problem.resources[:, *at], keys)
            states = extended(states, added, open_.radius)
            states = states.taking(undominated(states))
        found.append(states.taking(np.lexsort(states.key[::-1])))
        activations.append(np.full(len(states), index))
    empty = nothing(len(problem.bounds), digits.words).taking(np.zeros(0, dtype=int))
    joint = States(
        *(np.concatenate([getattr(s, name) for s in (empty, *found)], -1) for name in ("above", "cost", "use", "key"))
    )
    weights = np.stack([digits.option(position, joint.key) for position in range(len(layers))], 1)
    return Block(np.array(layers), joint, weights, np.concatenate(activations))


def _cuts(multipliers: np.ndarray, parts: Sequence[States], unit: float, target: float, left: np.ndarray) -> Cuts:
    values = np.zeros((len(parts) + 1, len(multipliers)))
    uses = np.zeros((len(parts) + 1, len(left)), np.int64)
    for index, part in enumerate(parts):
        value = multipliers @ part.use + part.cost * unit
        values[index + 1] = values[index] + value.min(1)
        uses[index + 1] = uses[index] + part.use.min(1)
    return Cuts(multipliers, unit, target + multipliers @ left, values, left, uses)
