"""
The best policy within the budgets (LIMPQ, equation 3).

Minimise the sum over layers of ``activation importance + alpha x weight importance`` under the budgets.
:mod:`nncf_mpq_plugin.allocation.bounds` first removes the choices that no optimal policy contains, which leaves a
fraction of the program; :mod:`nncf_mpq_plugin.allocation.enumeration` solves that exactly, python-mip with CBC where it
cannot. What comes out is checked against every budget in integers.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from nncf_mpq_plugin.allocation.bounds import Problem
from nncf_mpq_plugin.allocation.constraints import BitsConstraint, check_constraints
from nncf_mpq_plugin.allocation.program import OPTIMALITY_GAP, solve
from nncf_mpq_plugin.costs import FLOAT_BITS, LatencyTable, Limit, limits_of, total_bitops, weight_bits
from nncf_mpq_plugin.errors import InfeasibleBudgetError, InputError, MPQError
from nncf_mpq_plugin.outliers import Correction, put_in_order
from nncf_mpq_plugin.types import Budget, ImportanceTable, LayerBits, Policy


@dataclass(frozen=True)
class Solution:
    """
    A proven optimum.

    :param policy: bit widths; its summary is this report.
    :param status: ``optimal``.
    :param objective: sum of the importances.
    :param bitops: BitOps of the searchable layers.
    :param weight_bits: bits of all weights, fixed layers included.
    :param compression_ratio: 32 bits over the average weight bits, fixed layers included.
    :param seconds: time to build and solve.
    :param corrections: importances out of order and what became of them.
    :param budgets: budget name -> ``requested`` and ``achieved``.
    """

    policy: Policy
    status: str
    objective: float
    bitops: int
    weight_bits: int
    compression_ratio: float
    seconds: float
    corrections: tuple[Correction, ...]
    budgets: Mapping[str, Mapping[str, float]]

    def to_json(self) -> dict[str, Any]:
        """:return: the report and the policy as one JSON-serialisable object."""
        return self.policy.to_json()


@dataclass(frozen=True)
class Prepared:
    """
    What is searched: the program with the values it was made of.

    :param table: importances after the rule for those out of order; with ``weight_only``, activations at 32 bits.
    :param corrections: importances out of order.
    :param limits: budgets as integer limits.
    :param constraints: limits on single layers.
    :param alpha: weight of the weight importances.
    :param problem: the same as arrays; its second axis is ``table.bits``, its third ``activation_bits``.
    :param activation_bits: candidate activation bit widths.
    """

    table: ImportanceTable
    corrections: tuple[Correction, ...]
    limits: tuple[Limit, ...]
    constraints: tuple[BitsConstraint, ...]
    alpha: float
    problem: Problem
    activation_bits: tuple[int, ...]


def search(
    table: ImportanceTable,
    budget: Budget,
    *,
    alpha: float | None = None,
    out_of_order: str = "ban",
    constraints: Sequence[BitsConstraint] = (),
    weight_only: bool = False,
    latency: LatencyTable | None = None,
    gap: float = OPTIMALITY_GAP,
) -> Solution:
    """
    Find the best policy within the budgets.

    :param table: importances.
    :param budget: limits; all hold together.
    :param alpha: weight of the weight importances (LIMPQ, equation 3); default: the table's ``default_alpha``.
    :param out_of_order: what to do with importances that rise with the bits, see :mod:`nncf_mpq_plugin.outliers`.
    :param constraints: limits on single layers.
    :param weight_only: leave activations in floating point (32 bits, which is what BitOps count) at no importance.
    :param latency: measured times, for ``budget.latency_ratio``.
    :param gap: relative gap to the optimum at which CBC may stop, where it is needed.
    :return: an optimal policy, checked against every budget in integer arithmetic. Among policies of equal objective
        the first found is returned; every step is deterministic, so it is the same on every run.
    :raises InfeasibleBudgetError: naming the budget, the nearest value possible and the constraints that cause it.
    :raises InputError: for an unknown rule, a pattern that fits no layer, or a latency budget without a table.
    """
    start = time.perf_counter()
    prepared = prepare(
        table,
        budget,
        alpha=alpha,
        out_of_order=out_of_order,
        constraints=constraints,
        weight_only=weight_only,
        latency=latency,
    )
    return solution_of(prepared, solve_prepared(prepared, gap), start)


def prepare(
    table: ImportanceTable,
    budget: Budget,
    *,
    alpha: float | None = None,
    out_of_order: str = "ban",
    constraints: Sequence[BitsConstraint] = (),
    weight_only: bool = False,
    latency: LatencyTable | None = None,
) -> Prepared:
    """:return: the program for arguments as :func:`search` takes them, which also says what it raises."""
    alpha = table.default_alpha if alpha is None else alpha
    if not (np.isfinite(alpha) and alpha >= 0):
        msg = f"alpha: must be a finite number of at least 0, got {alpha}."
        raise InputError(msg)
    names = [layer.cost.name for layer in table.layers]
    check_constraints(names, constraints)
    ordered, corrections = put_in_order(table, out_of_order)
    activation_bits = table.bits
    if weight_only:
        activation_bits = (FLOAT_BITS,)
        corrections = tuple(correction for correction in corrections if correction.tensor == "weight")
        layers = tuple(replace(layer, activation={FLOAT_BITS: 0.0}) for layer in ordered.layers)
        ordered = replace(ordered, layers=layers)
        constraints = [constraint for constraint in constraints if constraint.tensor != "activation"]
        constraints = [replace(constraint, tensor="weight") for constraint in constraints]
    limits = limits_of(table, budget, latency)
    problem = _problem(ordered, activation_bits, limits, alpha, constraints)
    return Prepared(ordered, corrections, limits, tuple(constraints), alpha, problem, activation_bits)


def solve_prepared(prepared: Prepared, gap: float = OPTIMALITY_GAP) -> dict[str, LayerBits]:
    """
    :return: bit widths of an optimal policy.
    :raises InfeasibleBudgetError: as :func:`search`.
    """
    problem, limits = prepared.problem, prepared.limits
    for index, limit in enumerate(limits):
        smallest = _smallest(problem, index)
        if smallest > limit.bound:
            causes = _causes(prepared, index, smallest, alone=True)
            raise _infeasible(limit, smallest, causes, "")
    chosen = solve(problem, gap)
    if chosen is None:
        index = len(limits) - 1
        smallest_together = smallest_within(problem, index)
        if smallest_together is None:  # the other budgets alone contradict each other
            rest = replace(prepared, limits=limits[:index], problem=_without(problem, index))
            return solve_prepared(rest, gap)
        others = ", ".join(f"{limit.name} = {limit.requested:g}" for limit in limits[:index])
        causes = _causes(prepared, index, smallest_together, alone=False)
        raise _infeasible(limits[index], smallest_together, causes, f" together with {others}")
    weight, activation = chosen
    return {
        layer.cost.name: LayerBits(prepared.table.bits[w], prepared.activation_bits[a])
        for layer, w, a in zip(prepared.table.layers, weight, activation, strict=True)
    }


def solution_of(prepared: Prepared, bits: Mapping[str, LayerBits], start: float) -> Solution:
    """
    Check a policy and report on it.

    :param start: ``time.perf_counter()`` at the beginning.
    :raises MPQError: if it exceeds a budget, which would be a defect.
    """
    table, limits = prepared.table, prepared.limits
    achieved = achieved_by(table, limits, bits)
    for limit in limits:
        if achieved[limit.name] > limit.bound:
            msg = f"The solver's policy exceeds the budget {limit.name}; this is a defect, please report it."
            raise MPQError(msg)
    costs = [layer.cost for layer in table.layers]
    fixed = {layer.cost.name: layer.bits for layer in table.fixed_layers}
    every = [*costs, *(layer.cost for layer in table.fixed_layers)]
    together = {**bits, **fixed}
    all_bits = sum(weight_bits(cost, together[cost.name].weight, 0) for cost in every)
    report: dict[str, Any] = {
        "status": "optimal",
        "objective": objective_of(table, bits, prepared.alpha),
        "bitops": total_bitops(costs, bits),
        "weight_bits": all_bits,
        "compression_ratio": FLOAT_BITS * sum(cost.weights for cost in every) / all_bits,
        "seconds": time.perf_counter() - start,
        "budgets": {
            limit.name: {"requested": limit.requested, "achieved": limit.achieved(achieved[limit.name])}
            for limit in limits
        },
    }
    listed = [vars(correction) for correction in prepared.corrections]
    policy = Policy(dict(bits), fixed, {**report, "alpha": prepared.alpha, "corrections": listed})
    return Solution(policy=policy, corrections=prepared.corrections, **report)


def objective_of(table: ImportanceTable, bits: Mapping[str, LayerBits], alpha: float) -> float:
    """:return: sum of activation importance + alpha x weight importance at the bit widths of a policy."""
    return sum(
        layer.activation[bits[layer.cost.name].activation] + alpha * layer.weight[bits[layer.cost.name].weight]
        for layer in table.layers
    )


def achieved_by(table: ImportanceTable, limits: Sequence[Limit], bits: Mapping[str, LayerBits]) -> dict[str, int]:
    """:return: budget name -> integer sum over the searchable layers."""
    costs = [layer.cost for layer in table.layers]
    return {
        limit.name: sum(limit.cost(cost, bits[cost.name].weight, bits[cost.name].activation) for cost in costs)
        for limit in limits
    }


def smallest_within(problem: Problem, index: int) -> float | None:
    """:return: the smallest sum of one budget among policies that keep the others, None if there are none."""
    banned = np.isinf(problem.costs)
    costs = np.where(banned, np.inf, problem.resources[index] / max(problem.bounds[index], 1.0))
    if len(problem.bounds) == 1:
        return _smallest(problem, index)
    chosen = solve(replace(_without(problem, index), costs=costs))
    return None if chosen is None else float(problem.of(problem.resources[index], *chosen))


def _smallest(problem: Problem, index: int) -> float:
    banned = np.isinf(problem.costs)
    smallest, _, _ = problem.cheapest(np.where(banned, np.inf, problem.resources[index]))
    return smallest


def _without(problem: Problem, index: int) -> Problem:
    rest = np.arange(len(problem.bounds)) != index
    return replace(problem, resources=problem.resources[rest], bounds=problem.bounds[rest])


def _problem(
    table: ImportanceTable,
    activation_bits: Sequence[int],
    limits: Sequence[Limit],
    alpha: float,
    constraints: Sequence[BitsConstraint],
) -> Problem:
    layers = [layer.cost for layer in table.layers]

    def values(name: str, tensor: str, importance: Mapping[int, float], bits: Sequence[int]) -> list[float]:
        ours = [constraint for constraint in constraints if constraint.concerns(name, tensor)]
        return [importance.get(b, np.inf) if all(c.allows(b) for c in ours) else np.inf for b in bits]

    weight = np.array([values(layer.cost.name, "weight", layer.weight, table.bits) for layer in table.layers])
    activation = np.array(
        [values(layer.cost.name, "activation", layer.activation, activation_bits) for layer in table.layers]
    )
    weighted = np.where(np.isinf(weight), np.inf, alpha * np.where(np.isinf(weight), 0, weight))
    costs = activation[:, None, :] + weighted[:, :, None]
    resources = np.array(
        [
            [[[limit.cost(layer, w, a) for a in activation_bits] for w in table.bits] for layer in layers]
            for limit in limits
        ],
        dtype=np.float64,
    )
    indices = {group: index for index, group in enumerate(dict.fromkeys(layer.activation_group for layer in layers))}
    groups = np.array([indices[layer.activation_group] for layer in layers])
    shared = np.zeros((len(indices), len(activation_bits)))
    np.add.at(shared, groups, np.where(np.isinf(activation), np.inf, 0))
    costs = costs + shared[groups][:, None, :]  # a bit width that one layer of a group may not have, none may
    for layer, choices in zip(layers, costs, strict=True):
        if np.isinf(choices).all():
            ours = [str(c) for c in constraints if any(c.concerns(layer.name, t) for t in ("weight", "activation"))]
            causes = f"the constraints {', '.join(ours)}" if ours else "the constraints"
            msg = (
                f"Layer {layer.name!r}: no bit width is left by {causes}, those of its activation group and the rule "
                f"for importances out of order; the table has {list(table.bits)}. Loosen a minimum, maximum or pin."
            )
            raise InfeasibleBudgetError(msg, "constraints")
    return Problem(costs, resources, np.array([float(limit.bound) for limit in limits]), groups)


def _causes(prepared: Prepared, index: int, smallest: float, alone: bool) -> list[BitsConstraint]:
    """:return: the constraints without which a smaller value of a budget would be possible."""
    causes = []
    for constraint in prepared.constraints:
        rest = [other for other in prepared.constraints if other is not constraint]
        freed = _problem(prepared.table, prepared.activation_bits, prepared.limits, prepared.alpha, rest)
        possible = _smallest(freed, index) if alone else smallest_within(freed, index)
        if possible is not None and possible < smallest:
            causes.append(constraint)
    return causes


def _infeasible(limit: Limit, smallest: float, causes: Sequence[BitsConstraint], beside: str) -> InfeasibleBudgetError:
    nearest = limit.achieved(round(smallest))
    because = f" Constraints that cause it: {'; '.join(map(str, causes))}." if causes else ""
    msg = (
        f"No policy meets the budget {limit.name} = {limit.requested:g}{beside}: the nearest that exists is "
        f"{nearest:.6g}.{because} Ask for that, loosen the constraints, add lower bit widths, or fix fewer layers at "
        "high ones."
    )
    return InfeasibleBudgetError(msg, limit.name, limit.requested, nearest)
