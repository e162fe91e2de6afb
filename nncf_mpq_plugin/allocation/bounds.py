"""
A lower bound on the objective of every policy within the budgets, by Lagrangian relaxation.

With multipliers ``m >= 0`` for the budgets, ``L(m) = sum of each layer's smallest (importance + m x cost) - m x bound``
is at most the objective of every policy within the budgets, and a choice whose value lies ``r`` above its layer's
smallest is only in policies of at least ``L(m) + r`` (Fisher, "The Lagrangian relaxation method for solving integer
programming problems", 1981). The best multipliers come from Dantzig and Wolfe's decomposition: a simplex method with
one row a budget and one more, whose columns are whole policies. It takes one to two dozen steps.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

MOST_STEPS = 500
TOLERANCE = 1e-11
STEPS = 0.5 ** np.arange(1, 11)
NEAR = (0.1, 3.0)
Choice = tuple[np.ndarray, np.ndarray]
"""A policy: the index of each layer's weight bits, and of its activation bits."""


@dataclass(frozen=True)
class Problem:
    """
    The program as arrays over layers x weight bits x activation bits.

    :param costs: importance of each choice; infinite where it is not allowed. ``[layers, W, A]``.
    :param resources: each budget's cost of each choice, as integers. ``[budgets, layers, W, A]``.
    :param bounds: as integers. ``[budgets]``.
    :param groups: index of each layer's activation group, in the order of their first layers. ``[layers]``.
    """

    costs: np.ndarray
    resources: np.ndarray
    bounds: np.ndarray
    groups: np.ndarray

    @cached_property
    def loads(self) -> np.ndarray:
        """``resources`` in floating point, for values that need not be exact."""
        return self.resources.astype(np.float64)

    def of(self, values: np.ndarray, weight: np.ndarray, activation: np.ndarray) -> np.ndarray:
        """:return: the sum of ``values`` ``[..., layers, W, A]`` over the layers' choices. ``[...]``."""
        return values[..., np.arange(len(weight)), weight, activation].sum(-1)

    def feasible(self, weight: np.ndarray, activation: np.ndarray) -> bool:
        """:return: whether a policy keeps every budget."""
        return bool((self.of(self.resources, weight, activation) <= self.bounds).all())

    def group_totals(self, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """
        :param values: ``[..., layers, W, A]``.
        :return: best value of each layer at each activation index ``[..., layers, A]``, and the sums of these over the
            layers of each group ``[..., groups, A]``.
        """
        by_activation = values.min(-2)
        count = int(self.groups.max()) + 1
        if count == len(self.groups):
            return by_activation, by_activation
        totals = np.zeros((*values.shape[:-3], count, values.shape[-1]))
        np.add.at(np.moveaxis(totals, -2, 0), self.groups, np.moveaxis(by_activation, -2, 0))
        return by_activation, totals

    def above(self, multipliers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """
        :param multipliers: ``[D, budgets]``.
        :return: how far each choice's value (importance + multipliers x cost) lies above the best of its layer at the
            same activation bits ``[D, layers, W, A]``, and how far each group's best at given activation bits lies
            above the group's best ``[D, groups, A]``; infinite for choices that are not allowed.
        """
        values = self.costs + np.tensordot(multipliers, self.loads, 1)
        by_activation, totals = self.group_totals(values)
        with np.errstate(invalid="ignore"):  # infinite less infinite
            above = np.where(np.isinf(values), np.inf, values - by_activation[..., None, :])
        return above, totals - totals.min(-1, keepdims=True)

    def cheapest(self, values: np.ndarray) -> tuple[float, np.ndarray, np.ndarray]:
        """:return: the smallest sum of ``values``, groups respected, with weight and activation indices by layer."""
        _, totals = self.group_totals(values)
        activation = totals.argmin(1)[self.groups]
        weight = values[np.arange(len(values)), :, activation].argmin(1)
        return float(totals.min(1).sum()), weight, activation

    def binding(self) -> Problem:
        """:return: the problem without the budgets that no policy can exceed."""
        most = np.where(np.isfinite(self.costs), self.resources, 0).max((2, 3)).sum(1)
        return replace(self, resources=self.resources[most > self.bounds], bounds=self.bounds[most > self.bounds])

    def objective(self, choice: Choice) -> float:
        """:return: the sum of a policy's importances, correctly rounded."""
        return math.fsum(self.costs[np.arange(len(self.costs)), *choice])

    def rank(self, choice: Choice) -> tuple[int, ...]:
        """:return: what policies of equal objective are ordered by: bits by group, activation first; lower is first."""
        weight, activation = (indices.tolist() for indices in choice)
        by_group: dict[int, list[int]] = {}
        for layer, group in enumerate(self.groups.tolist()):
            by_group.setdefault(group, [activation[layer]]).append(weight[layer])
        return tuple(bits for group in by_group.values() for bits in group)

    def undominated(self) -> Problem:
        """
        :return: the problem without the choices that cannot be in the first of the best policies: another choice of the
            same layer uses no more of any budget and has a lower objective, or the same objective and lower bits. In a
            group of several layers the other one has to have the same activation bits.
        """
        layers, weights, activations = self.costs.shape
        shape = (layers, activations * weights)  # activation bits first: the order of the tie rule
        costs = self.costs.transpose(0, 2, 1).reshape(shape)
        resources = self.resources.transpose(0, 1, 3, 2).reshape(-1, *shape)
        index = np.arange(shape[1])
        better = costs[:, :, None] < costs[:, None, :]
        better |= (costs[:, :, None] == costs[:, None, :]) & (index[:, None] < index[None, :])
        for use in resources:
            better &= use[:, :, None] <= use[:, None, :]
        alone = np.bincount(self.groups)[self.groups] == 1
        comparable = alone[:, None, None] | (index[:, None] // weights == index[None, :] // weights)
        beaten = (better & comparable).any(1).reshape(layers, activations, weights).transpose(0, 2, 1)
        return replace(self, costs=np.where(beaten, np.inf, self.costs))


@dataclass(frozen=True)
class Relaxation:
    """
    Lagrangian bounds.

    :param bound: the best one; no policy within the budgets has a lower objective.
    :param multipliers: its multipliers: objective for one unit of each budget. ``[budgets]``.
    :param others: multipliers around the best, in several directions and steps. ``[D, budgets]``.
    :param other_bounds: theirs. ``[D]``.
    :param tolerance: what rounding may add to a bound.
    """

    bound: float
    multipliers: np.ndarray
    others: np.ndarray
    other_bounds: np.ndarray
    tolerance: float

    def near(self, distance: float) -> tuple[np.ndarray, np.ndarray]:
        """:return: the other multipliers whose bounds are weaker by something like a distance; and these bounds."""
        loss = self.bound - self.other_bounds
        taken = (loss >= NEAR[0] * distance) & (loss <= NEAR[1] * distance)
        return self.others[taken], self.other_bounds[taken]


def lagrangian(problem: Problem, multipliers: np.ndarray) -> tuple[float, np.ndarray, np.ndarray]:
    """:return: ``L(multipliers)`` and the policy that attains it."""
    values = problem.costs + np.tensordot(multipliers, problem.loads, 1)
    total, weight, activation = problem.cheapest(values)
    return total - float(multipliers @ problem.bounds), weight, activation


def relax(problem: Problem) -> Relaxation:
    """:return: the best bound and some around it."""
    bound, multipliers = _best(problem)
    axes = np.eye(len(multipliers))[multipliers > 0] * multipliers[multipliers > 0][:, None]
    directions = [*axes, *-axes]
    for index, one in enumerate(axes):
        for two in axes[:index]:
            directions += [one + two, one - two, two - one, -one - two]
    along = np.reshape(directions, (-1, 1, len(multipliers))) * STEPS[:, None]
    others = multipliers + along.reshape(-1, len(multipliers))
    totals = [_totals(problem, part) for part in np.array_split(others, 1 + len(others) // 64)]
    bounds = np.concatenate(totals) - others @ problem.bounds
    tolerance = TOLERANCE * (abs(bound) + float(multipliers @ problem.bounds))
    return Relaxation(bound, multipliers, others, bounds, tolerance)


def _totals(problem: Problem, multipliers: np.ndarray) -> np.ndarray:
    """:return: the smallest sum of values at each of several multipliers. ``[D]``."""
    _, totals = problem.group_totals(problem.costs + np.tensordot(multipliers, problem.loads, 1))
    return totals.min(-1).sum(-1)


def _best(problem: Problem) -> tuple[float, np.ndarray]:
    """
    Find the multipliers with the largest bound.

    The master program mixes policies so that the budgets hold on average; a budget may be exceeded at a price that no
    sensible multiplier reaches, so that there is always a first solution. Where the steps run out, or rounding stops
    them, the bound is valid all the same, only weaker.
    """
    count = len(problem.bounds)
    scale = problem.bounds.astype(np.float64)
    bound, weight, activation = lagrangian(problem, np.zeros(count))
    best = bound, np.zeros(count)
    used = problem.of(problem.resources, weight, activation) / scale
    if (used <= 1).all():
        return best
    finite = problem.costs[np.isfinite(problem.costs)]
    price = 1.0 + 1e3 * len(problem.costs) * float(np.ptp(finite))
    basis, costs = np.zeros((count + 1, count + 1)), np.zeros(count + 1)
    basis[:, count] = [*used, 1.0]
    costs[count] = bound
    basis[range(count), range(count)] = np.where(used <= 1, 1.0, -1.0)
    costs[:count] = np.where(used <= 1, 0.0, price)
    for _ in range(MOST_STEPS):
        inverse = np.linalg.inv(basis)
        prices, amounts = costs @ inverse, inverse.sum(1)
        multipliers, objective = -prices[:count], float(costs @ amounts)
        low, high = int(multipliers.argmin()), int(multipliers.argmax())
        column = np.zeros(count + 1)
        if multipliers[low] < -1e-9:
            column[low], cost = 1.0, 0.0
        elif multipliers[high] > price * (1 + 1e-9):
            column[high], cost = -1.0, price
        else:
            multipliers = multipliers.clip(0) / scale
            bound, weight, activation = lagrangian(problem, multipliers)
            if bound > best[0]:
                best = bound, multipliers
            if objective - bound <= 1e-13 * max(1.0, abs(objective)):
                break
            cost = float(problem.of(problem.costs, weight, activation))
            column[:] = [*(problem.of(problem.resources, weight, activation) / scale), 1.0]
        direction = inverse @ column
        rising = direction > 1e-12
        if not rising.any():
            break
        leaves = int(np.where(rising, amounts / np.where(rising, direction, 1.0), np.inf).argmin())
        basis[:, leaves], costs[leaves] = column, cost
    return best
