"""
What can be said about the integer program before it is solved: a lower bound, a good policy, and so which choices can
be left out.

With multipliers ``m >= 0`` for the budgets, ``L(m) = sum of each layer's smallest (importance + m x cost) - m x bound``
is at most the objective of every policy within the budgets. A choice that raises ``L(m)`` above the objective of a
policy already known is in no better policy (reduced-cost fixing; Fisher, "The Lagrangian relaxation method for solving
integer programming problems", 1981). The known policy comes from the relaxation and is improved by exchanging one or
two choices at a time.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

STEPS = 200
EXCHANGES = 200
CANDIDATES = 700


@dataclass(frozen=True)
class Problem:
    """
    The program as arrays over layers x weight bits x activation bits.

    :param costs: importance of each choice; infinite where it is not allowed. ``[layers, W, A]``.
    :param resources: each budget's cost of each choice (integers). ``[budgets, layers, W, A]``.
    :param bounds: ``[budgets]``.
    :param groups: index of each layer's activation group. ``[layers]``.
    """

    costs: np.ndarray
    resources: np.ndarray
    bounds: np.ndarray
    groups: np.ndarray

    def of(self, values: np.ndarray, weight: np.ndarray, activation: np.ndarray) -> np.ndarray:
        """:return: the sum of ``values`` ``[..., layers, W, A]`` over the layers' choices. ``[...]``."""
        return values[..., np.arange(len(weight)), weight, activation].sum(-1)

    def feasible(self, weight: np.ndarray, activation: np.ndarray) -> bool:
        """:return: whether a policy keeps every budget."""
        return bool((self.of(self.resources, weight, activation) <= self.bounds).all())

    def group_totals(self, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """:return: best value of each layer at each activation index, and their sums over groups."""
        by_activation = values.min(1)
        totals = np.zeros((self.groups.max() + 1, values.shape[2]))
        np.add.at(totals, self.groups, by_activation)
        return by_activation, totals

    def cheapest(self, values: np.ndarray) -> tuple[float, np.ndarray, np.ndarray]:
        """:return: the smallest sum of ``values``, groups respected, with weight and activation indices by layer."""
        _, totals = self.group_totals(values)
        activation = totals.argmin(1)[self.groups]
        weight = values[np.arange(len(values)), :, activation].argmin(1)
        return float(totals.min(1).sum()), weight, activation


Choice = tuple[np.ndarray, np.ndarray]


def reduce(problem: Problem) -> tuple[np.ndarray, np.ndarray, Choice | None]:
    """
    Find the choices that an optimal policy may contain.

    :return: a mask ``[layers, W, A]``; the multipliers of the budgets, each scaled to a bound of 1; and the best policy
        known as weight and activation indices, None if none is. Every policy better than the known one lies within the
        mask, and so does the known one.
    """
    scaled = problem.resources / problem.bounds.clip(1)[:, None, None, None]
    allowed = np.isfinite(problem.costs)
    multipliers = np.zeros(len(problem.bounds))
    upper: float = np.inf
    incumbent: Choice | None = None
    for round_ in range(3):
        bound, multipliers, found = _raise_bound(problem, scaled, multipliers, upper)
        if found is not None and float(problem.of(problem.costs, *found)) < upper:
            incumbent = found
        if incumbent is None:
            return allowed, multipliers, None
        values = problem.costs + np.tensordot(multipliers, scaled, 1)
        incumbent = _exchange(problem, values, incumbent)
        better = float(problem.of(problem.costs, *incumbent))
        if round_ and better >= upper * (1 - 1e-9):
            break
        upper = better
    assert incumbent is not None
    upper = float(problem.of(problem.costs, *incumbent))
    values = problem.costs + np.tensordot(multipliers, scaled, 1)
    by_activation, totals = problem.group_totals(values)
    with np.errstate(invalid="ignore"):  # choices that are not allowed: infinite less infinite
        others = totals[problem.groups] - totals.min(1)[problem.groups][:, None] - by_activation
        forced = bound + others[:, None, :] + values
    mask = allowed & ~(forced > upper + 1e-9 * max(1.0, abs(upper)))
    mask[np.arange(len(mask)), incumbent[0], incumbent[1]] = True
    return mask, multipliers, incumbent


def _raise_bound(
    problem: Problem, scaled: np.ndarray, multipliers: np.ndarray, upper: float
) -> tuple[float, np.ndarray, Choice | None]:
    """Subgradient ascent (Polyak steps). :return: bound, its multipliers, best feasible policy on the way."""
    best, best_multipliers, found = -np.inf, multipliers, None
    spread = float(np.ptp(problem.costs[np.isfinite(problem.costs)])) * len(problem.costs) or 1.0
    damping = 1.0
    for _ in range(STEPS):
        total, weight, activation = problem.cheapest(problem.costs + np.tensordot(multipliers, scaled, 1))
        bound = total - float(multipliers.sum())
        used = problem.of(problem.resources, weight, activation)
        if (used <= problem.bounds).all():
            cost = float(problem.of(problem.costs, weight, activation))
            if found is None or cost < upper:
                upper, found = min(cost, upper), (weight, activation)
        if bound > best:
            best, best_multipliers = bound, multipliers
        slope = used / problem.bounds.clip(1) - 1
        norm = float(slope @ slope)
        if norm == 0:
            break
        target = (upper if np.isfinite(upper) else best + spread) - bound
        multipliers = np.maximum(0, multipliers + damping * max(target, 1e-12) / norm * slope)
        damping *= 0.97
    return best, best_multipliers, found


def _exchange(problem: Problem, values: np.ndarray, start: Choice) -> Choice:
    """Change one or two choices at a time as long as that lowers the objective within the budgets."""
    weight, activation = start[0].copy(), start[1].copy()
    sizes = np.bincount(problem.groups)
    rows = np.arange(len(weight))
    alone = np.flatnonzero(sizes[problem.groups] == 1)
    for _ in range(EXCHANGES):
        now = (weight, activation)
        change = problem.costs - problem.costs[rows, weight, activation][:, None, None]
        use = problem.resources - problem.resources[:, rows, weight, activation][:, :, None, None]
        merit = values - values[rows, weight, activation][:, None, None]
        options = np.isfinite(merit)
        same_activation = np.arange(values.shape[2])[None, None, :] == activation[:, None, None]
        options &= same_activation | np.isin(rows, alone)[:, None, None]
        options[rows, weight, activation] = False
        layer, w, a = np.nonzero(options)
        nearest = np.argsort(merit[layer, w, a], kind="stable")[:CANDIDATES]
        layer, w, a = layer[nearest], w[nearest], a[nearest]
        gain, load = change[layer, w, a], use[:, layer, w, a]
        slack = problem.bounds - problem.of(problem.resources, *now)
        gains = gain[:, None] + gain[None, :]
        fits = (problem.groups[layer][:, None] != problem.groups[layer][None, :]) & (gains < 0)
        for resource in range(len(slack)):
            fits &= load[resource][:, None] + load[resource][None, :] <= slack[resource]
        single = np.where((load <= slack[:, None]).all(0), gain, np.inf)
        best_single = float(single.min()) if single.size else np.inf
        pairs = np.where(fits, gains, np.inf)
        best_pair = float(pairs.min()) if pairs.size else np.inf
        if min(best_single, best_pair) >= -1e-12 * max(1.0, abs(float(problem.of(problem.costs, *now)))):
            break
        taken = (
            [int(single.argmin())] if best_single <= best_pair else list(np.unravel_index(pairs.argmin(), pairs.shape))
        )
        for index in taken:
            weight[layer[index]], activation[layer[index]] = w[index], a[index]
    return weight, activation
