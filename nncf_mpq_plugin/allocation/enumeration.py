"""
Exact search over the choices that the bound leaves open, for one budget.

Partial policies are extended group by group. One is dropped if its bound exceeds the best policy known, if the budgets
cannot hold any more, or if another is no worse in objective and in every budget (the list method for knapsack problems;
Nemhauser and Ullmann, "Discrete dynamic programming and capital allocation", 1969). Where the importances of many
layers are nearly alike this takes milliseconds and branch and bound minutes.
"""

from __future__ import annotations

import itertools

import numpy as np

from nncf_mpq_plugin.allocation.bounds import Choice, Problem

MOST_STATES = 200_000
MOST_OPTIONS = 5_000


def enumerate_best(problem: Problem, mask: np.ndarray, multipliers: np.ndarray, upper: float) -> Choice | None:
    """
    The best policy within a mask.

    :param mask: choices that are left. ``[layers, W, A]``.
    :param multipliers: of the budgets, each scaled to a bound of 1; only the speed depends on them.
    :param upper: objective of a policy known; it has to be within the mask.
    :return: weight and activation indices, or None where there are several budgets (dominance in two dimensions keeps
        too much: measured slower than the program) or too many partial policies.
    """
    if len(problem.bounds) != 1:
        return None
    scale = problem.bounds.clip(1)
    blocks = []
    for group in range(int(problem.groups.max()) + 1):
        members = np.flatnonzero(problem.groups == group)
        options = _options(mask, members)
        if options is None:
            return None
        rows = members[None, :]
        cost = problem.costs[rows, options[:, :, 0], options[:, :, 1]].sum(1)
        use = problem.resources[:, rows, options[:, :, 0], options[:, :, 1]].sum(2)
        blocks.append((members, options, cost, use, cost + multipliers @ (use / scale[:, None])))
    blocks.sort(key=lambda block: len(block[2]))
    rest_value = np.cumsum([0.0, *(block[4].min() for block in reversed(blocks))])[::-1]
    rest_use = np.cumsum([np.zeros(len(scale)), *(block[3].min(1) for block in reversed(blocks))], axis=0)[::-1]
    allowed = upper + 1e-9 * max(1.0, abs(upper)) + float(multipliers.sum())
    costs, uses, values = np.zeros(1), np.zeros((len(scale), 1)), np.zeros(1)
    steps: list[tuple[np.ndarray, np.ndarray]] = []
    for position, (_, _, cost, use, value) in enumerate(blocks):
        if len(costs) * len(cost) > 20 * MOST_STATES:
            return None
        parent, option = np.divmod(np.arange(len(costs) * len(cost)), len(cost))
        new_values = values[parent] + value[option]
        new_uses = uses[:, parent] + use[:, option]
        keep = (new_values + rest_value[position + 1] <= allowed) & (
            new_uses + rest_use[position + 1][:, None] <= problem.bounds[:, None]
        ).all(0)
        parent, option, new_values, new_uses = parent[keep], option[keep], new_values[keep], new_uses[:, keep]
        new_costs = costs[parent] + cost[option]
        keep = _undominated(new_costs, new_uses[0])
        if len(keep) > MOST_STATES:
            return None
        costs, uses, values = new_costs[keep], new_uses[:, keep], new_values[keep]
        steps.append((parent[keep], option[keep]))
    if not len(costs):
        return None
    weight = np.zeros(len(problem.groups), dtype=int)
    activation = np.zeros(len(problem.groups), dtype=int)
    state = int(costs.argmin())
    for (members, options, *_), (parents, taken) in zip(reversed(blocks), reversed(steps), strict=True):
        chosen = options[taken[state]]
        weight[members], activation[members] = chosen[:, 0], chosen[:, 1]
        state = int(parents[state])
    return weight, activation


def _options(mask: np.ndarray, members: np.ndarray) -> np.ndarray | None:
    """:return: joint choices of a group's layers ``[options, layers, (w, a)]``, or None where there are too many."""
    options: list[list[tuple[int, int]]] = []
    for activation in range(mask.shape[2]):
        weights = [np.flatnonzero(mask[layer, :, activation]) for layer in members]
        if np.prod([float(len(choices)) for choices in weights]) + len(options) > MOST_OPTIONS:
            return None
        options.extend([(int(w), activation) for w in combination] for combination in itertools.product(*weights))
    return np.array(options) if options else None


def _undominated(costs: np.ndarray, use: np.ndarray) -> np.ndarray:
    """:return: indices of the states that no other beats in objective and budget."""
    order = np.lexsort((costs, use))
    best_before = np.minimum.accumulate(np.concatenate([[np.inf], costs[order][:-1]]))
    return order[costs[order] < best_before]
