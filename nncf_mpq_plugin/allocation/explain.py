"""Why a policy is the best: which budget binds, what each next bit would change, and what a pin would cost."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from nncf_mpq_plugin.allocation.constraints import BitsConstraint
from nncf_mpq_plugin.allocation.program import solve
from nncf_mpq_plugin.allocation.search import (
    Prepared,
    Solution,
    achieved_by,
    bits_of,
    optimum_of,
    prepare,
    search,
    solution_of,
)
from nncf_mpq_plugin.types import Budget, ImportanceTable, LayerBits


@dataclass(frozen=True)
class BudgetReport:
    """
    One budget at the optimum.

    :param name: the budget.
    :param requested: what was asked for, in the budget's unit.
    :param achieved: what the policy has, same unit.
    :param asked: ``requested`` in words.
    :param reached: ``achieved`` in words.
    :param unused: share of the budget, over the searchable layers, that the policy leaves.
    :param objective_without: the best objective if this budget were dropped and the others kept.
    :param binding: whether that is better.
    """

    name: str
    requested: float
    achieved: float
    asked: str
    reached: str
    unused: float
    objective_without: float
    binding: bool


@dataclass(frozen=True)
class Step:
    """
    One tensor moved to its next bit width, everything else unchanged.

    :param layers: the layer, or all layers of the activation group.
    :param tensor: ``weight`` or ``activation``.
    :param bits: bit width in the policy.
    :param to: the next one up or down that is allowed.
    :param objective_change: below 0 is a gain.
    :param budget_changes: budget -> change of its achieved value, in its unit.
    :param fits: whether all budgets still hold.
    """

    layers: tuple[str, ...]
    tensor: str
    bits: int
    to: int
    objective_change: float
    budget_changes: Mapping[str, float]
    fits: bool


@dataclass(frozen=True)
class Explanation:
    """
    :param solution: the optimum.
    :param budgets: one report a budget.
    :param steps: every single step up or down.
    """

    solution: Solution
    budgets: tuple[BudgetReport, ...]
    steps: tuple[Step, ...]

    def to_json(self) -> dict[str, Any]:
        """:return: a JSON-serialisable object."""
        return {
            "solution": self.solution.to_json(),
            "budgets": [asdict(report) for report in self.budgets],
            "steps": [{**asdict(step), "layers": list(step.layers)} for step in self.steps],
        }


@dataclass(frozen=True)
class WhatIf:
    """
    :param before: the optimum.
    :param after: the optimum with the pin.
    :param objective_change: what the pin costs (at least 0).
    :param changed: layer -> its bit widths before and after, where they differ.
    """

    before: Solution
    after: Solution
    objective_change: float
    changed: Mapping[str, tuple[LayerBits, LayerBits]]

    def to_json(self) -> dict[str, Any]:
        """:return: a JSON-serialisable object."""
        return {
            "before": self.before.to_json(),
            "after": self.after.to_json(),
            "objective_change": self.objective_change,
            "changed": {
                name: {"before": asdict(before), "after": asdict(after)}
                for name, (before, after) in self.changed.items()
            },
        }


def explain(table: ImportanceTable, budget: Budget, **options: Any) -> Explanation:
    """
    Solve, and tell what holds the solution where it is.

    :param options: as :func:`nncf_mpq_plugin.allocation.search.search`, without ``gap``; it says what is raised, too.
    """
    start = time.perf_counter()
    prepared = prepare(table, budget, **options)
    optimum = optimum_of(prepared)
    solution = solution_of(prepared, bits_of(prepared, optimum.choice), start, optimum)
    sums = achieved_by(prepared.table, prepared.limits, solution.policy.layers)
    reports = []
    for index, limit in enumerate(prepared.limits):
        without = _objective_without(prepared, index)
        reports.append(
            BudgetReport(
                limit.name,
                limit.requested,
                limit.achieved(sums[limit.name]),
                limit.show(limit.requested),
                limit.show(limit.achieved(sums[limit.name])),
                1 - sums[limit.name] / limit.bound,
                without,
                without < solution.objective - 1e-9 * max(1.0, abs(solution.objective)),
            )
        )
    return Explanation(solution, tuple(reports), tuple(_steps(prepared, solution, sums)))


def what_if(table: ImportanceTable, budget: Budget, pin: BitsConstraint, **options: Any) -> WhatIf:
    """
    The best policy if layers were pinned (or limited) elsewhere.

    :param pin: the further constraint.
    :param options: as :func:`nncf_mpq_plugin.allocation.search.search`, which also says what is raised.
    """
    constraints: Sequence[BitsConstraint] = options.pop("constraints", ())
    before = search(table, budget, constraints=constraints, **options)
    after = search(table, budget, constraints=[*constraints, pin], **options)
    changed = {
        name: (bits, after.policy.layers[name])
        for name, bits in before.policy.layers.items()
        if bits != after.policy.layers[name]
    }
    return WhatIf(before, after, after.objective - before.objective, changed)


def _objective_without(prepared: Prepared, index: int) -> float:
    problem = prepared.problem
    rest = np.arange(len(prepared.limits)) != index
    if not rest.any():
        return problem.objective(problem.cheapest(problem.costs)[1:])
    found = solve(replace(problem, resources=problem.resources[rest], bounds=problem.bounds[rest]))
    assert found is not None, "fewer budgets allow more"
    return problem.objective(found.choice)


def _steps(prepared: Prepared, solution: Solution, sums: Mapping[str, int]) -> list[Step]:
    layers, problem = [layer.cost for layer in prepared.table.layers], prepared.problem
    bits = [solution.policy.layers[layer.name] for layer in layers]
    weight = np.array([prepared.table.bits.index(b.weight) for b in bits])
    activation = np.array([prepared.activation_bits.index(b.activation) for b in bits])
    now = float(problem.of(problem.costs, weight, activation))
    steps = []

    def add(rows: np.ndarray, tensor: str, candidates: tuple[int, ...], indices: np.ndarray, direction: int) -> None:
        current = int(indices[rows[0]])
        to = current + direction
        while 0 <= to < len(candidates):
            moved = indices.copy()
            moved[rows] = to
            pair = (moved, activation) if tensor == "weight" else (weight, moved)
            objective = float(problem.of(problem.costs, *pair))
            if np.isfinite(objective):
                used = problem.of(problem.resources, *pair)
                changes = {
                    limit.name: limit.achieved(round(new)) - limit.achieved(sums[limit.name])
                    for limit, new in zip(prepared.limits, used, strict=True)
                }
                names = tuple(layers[row].name for row in rows)
                fits = problem.feasible(*pair)
                steps.append(Step(names, tensor, candidates[current], candidates[to], objective - now, changes, fits))
                return
            to += direction

    for row in range(len(layers)):
        for direction in (-1, 1):
            add(np.array([row]), "weight", prepared.table.bits, weight, direction)
    for group in range(int(problem.groups.max()) + 1):
        for direction in (-1, 1):
            add(np.flatnonzero(problem.groups == group), "activation", prepared.activation_bits, activation, direction)
    return steps
