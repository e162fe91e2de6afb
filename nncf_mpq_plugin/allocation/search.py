"""
The best policy within the budgets (LIMPQ, equation 3).

Minimise the sum over layers of ``activation importance + alpha x weight importance`` under the budgets, with
:mod:`nncf_mpq_plugin.allocation.program`. What comes out is checked against every budget in integers.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from nncf_mpq_plugin.allocation.bounds import Choice, Problem
from nncf_mpq_plugin.allocation.constraints import BitsConstraint, check_constraints
from nncf_mpq_plugin.allocation.program import OPTIMALITY_GAP, Optimum, solve
from nncf_mpq_plugin.costs import FLOAT_BITS, LatencyTable, Limit, limits_of, total_bitops, weight_bits
from nncf_mpq_plugin.errors import InfeasibleBudgetError, InputError, MPQError
from nncf_mpq_plugin.outliers import Correction, put_in_order
from nncf_mpq_plugin.types import Budget, ImportanceTable, LayerBits, LayerCost, Policy

LARGEST_SUM = 2**60


@dataclass(frozen=True)
class Solution:
    """
    The best policy.

    :param policy: bit widths; its summary is this report.
    :param status: ``optimal``, or ``feasible`` if the time limit was over before the proof.
    :param gap: proven relative gap to the optimum; 0 where the policy is proven the best, None if not known.
    :param solver: ``enumeration``, or ``cbc`` for what had to be left to it (the tie rule is not kept then), or
        ``given`` for a policy that was not searched here.
    :param objective: sum of the importances.
    :param bitops: BitOps of the searchable layers.
    :param weight_bits: bits of all weights, fixed layers included.
    :param compression_ratio: 32 bits over the average weight bits, fixed layers included.
    :param seconds: time to build and solve.
    :param corrections: importances out of order and what became of them.
    :param budgets: budget name -> ``requested`` and ``achieved``, numbers in the budget's unit, and ``asked`` and
        ``reached``, the same in words.
    """

    policy: Policy
    status: str
    gap: float | None
    solver: str
    objective: float
    bitops: int
    weight_bits: int
    compression_ratio: float
    seconds: float
    corrections: tuple[Correction, ...]
    budgets: Mapping[str, Mapping[str, Any]]

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
    time_limit: float | None = None,
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
    :param gap: relative gap to the optimum at which the search may stop.
    :param time_limit: seconds after which the best policy known is returned, with the gap that is proven.
    :return: an optimal policy, checked against every budget in integer arithmetic. Of policies with the same objective
        it is the first in lexicographic order: activation groups in the order of the table; of a group the activation
        bits, then the weight bits of its layers; lower bits first. Objectives count as the same if they are equal on a
        grid of 2^-50 of the spread of the choices that come into question.
    :raises InfeasibleBudgetError: naming the budget, the nearest value possible and the constraints that cause it.
    :raises InputError: for an unknown rule, a pattern that fits no layer, or a latency budget without a table.
    """
    start = time.perf_counter()
    if not (np.isfinite(gap) and gap >= 0):
        msg = f"gap: must be a finite number of at least 0, got {gap}."
        raise InputError(msg)
    if time_limit is not None and not time_limit > 0:
        msg = f"time_limit: must be above 0 seconds, got {time_limit}."
        raise InputError(msg)
    prepared = prepare(
        table,
        budget,
        alpha=alpha,
        out_of_order=out_of_order,
        constraints=constraints,
        weight_only=weight_only,
        latency=latency,
    )
    optimum = optimum_of(prepared, gap, time_limit)
    return solution_of(prepared, bits_of(prepared, optimum.choice), start, optimum)


def prepare(
    table: ImportanceTable,
    budget: Budget | None,
    *,
    alpha: float | None = None,
    out_of_order: str = "ban",
    constraints: Sequence[BitsConstraint] = (),
    weight_only: bool = False,
    latency: LatencyTable | None = None,
    further_limits: Sequence[Limit] = (),
) -> Prepared:
    """
    :param budget: None where ``further_limits`` are all there are.
    :param further_limits: limits beside the budget's.
    :return: the program for arguments as :func:`search` takes them, which also says what it raises.
    """
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
    limits = (*(limits_of(table, budget, latency) if budget is not None else ()), *further_limits)
    problem = _problem(ordered, activation_bits, limits, alpha, constraints)
    return Prepared(ordered, corrections, limits, tuple(constraints), alpha, problem, activation_bits)


def optimum_of(prepared: Prepared, gap: float = OPTIMALITY_GAP, time_limit: float | None = None) -> Optimum:
    """
    :return: an optimal policy.
    :raises InfeasibleBudgetError: as :func:`search`.
    """
    problem, limits = prepared.problem, prepared.limits
    for index, limit in enumerate(limits):
        smallest = _smallest(problem, index)
        if smallest > limit.bound:
            causes = _causes(prepared, index, smallest, alone=True)
            raise _infeasible(limit, smallest, causes, "")
    found = solve(problem, gap, time_limit)
    if found is None:
        index = len(limits) - 1
        smallest_together = smallest_within(problem, index)
        if smallest_together is None:  # the other budgets alone contradict each other
            rest = replace(prepared, limits=limits[:index], problem=_without(problem, index))
            return optimum_of(rest, gap, time_limit)
        others = ", ".join(f"{limit.name} = {limit.show(limit.requested)}" for limit in limits[:index])
        causes = _causes(prepared, index, smallest_together, alone=False)
        raise _infeasible(limits[index], smallest_together, causes, f" together with {others}")
    return found


def solve_prepared(prepared: Prepared) -> dict[str, LayerBits]:
    """
    :return: bit widths of an optimal policy.
    :raises InfeasibleBudgetError: as :func:`search`.
    """
    return bits_of(prepared, optimum_of(prepared).choice)


def bits_of(prepared: Prepared, choice: Choice) -> dict[str, LayerBits]:
    """:return: bit widths of the searchable layers."""
    return {
        layer.cost.name: LayerBits(prepared.table.bits[w], prepared.activation_bits[a])
        for layer, w, a in zip(prepared.table.layers, *choice, strict=True)
    }


def solution_of(
    prepared: Prepared, bits: Mapping[str, LayerBits], start: float, optimum: Optimum | None = None
) -> Solution:
    """
    Check a policy and report on it.

    :param bits: the policy.
    :param start: ``time.perf_counter()`` at the beginning.
    :param optimum: what the solver said about the policy, None for a policy from elsewhere.
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
        "status": "optimal" if optimum is not None and optimum.proven else "feasible",
        "gap": None if optimum is None else optimum.gap,
        "solver": "given" if optimum is None else optimum.solver,
        "objective": objective_of(table, bits, prepared.alpha),
        "bitops": total_bitops(costs, bits),
        "weight_bits": all_bits,
        "compression_ratio": FLOAT_BITS * sum(cost.weights for cost in every) / all_bits,
        "seconds": time.perf_counter() - start,
        "budgets": {
            limit.name: {
                "requested": limit.requested,
                "achieved": limit.achieved(achieved[limit.name]),
                "asked": limit.show(limit.requested),
                "reached": limit.show(limit.achieved(achieved[limit.name])),
            }
            for limit in limits
        },
    }
    listed = [vars(correction) for correction in prepared.corrections]
    policy = Policy(dict(bits), fixed, {**report, "alpha": prepared.alpha, "corrections": listed})
    return Solution(policy=policy, corrections=prepared.corrections, **report)


def objective_of(table: ImportanceTable, bits: Mapping[str, LayerBits], alpha: float) -> float:
    """:return: sum of activation importance + alpha x weight importance at the bit widths of a policy."""
    return math.fsum(
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


def smallest_within(problem: Problem, index: int) -> int | None:
    """:return: the smallest sum of one budget among policies that keep the others, None if there are none."""
    if len(problem.bounds) == 1:
        return _smallest(problem, index)
    costs = np.where(np.isinf(problem.costs), np.inf, problem.resources[index] / max(int(problem.bounds[index]), 1))
    found = solve(replace(_without(problem, index), costs=costs))
    return None if found is None else int(problem.of(problem.resources[index], *found.choice))


def _smallest(problem: Problem, index: int) -> int:
    """:return: the smallest sum of one budget among all policies."""
    costs = np.where(np.isinf(problem.costs), np.inf, problem.resources[index])
    _, weight, activation = problem.cheapest(costs)
    return int(problem.of(problem.resources[index], weight, activation))


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
    indices = {group: index for index, group in enumerate(dict.fromkeys(layer.activation_group for layer in layers))}
    groups = np.array([indices[layer.activation_group] for layer in layers])
    shared = np.zeros((len(indices), len(activation_bits)))
    np.add.at(shared, groups, np.where(np.isinf(activation), np.inf, 0))
    # a bit width that one layer of a group may not have, none may
    costs = (activation + shared[groups])[:, None, :] + weighted[:, :, None]
    for layer, choices in zip(layers, costs, strict=True):
        if np.isinf(choices).all():
            raise _no_choice(table, layer, constraints)
    pairs = [(w, a) for w in table.bits for a in activation_bits]
    used = [[[limit.cost(layer, w, a) for w, a in pairs] for layer in layers] for limit in limits]
    most = [sum(map(max, uses)) for uses in used]
    if max(most) >= LARGEST_SUM:
        msg = f"{limits[most.index(max(most))].name}: the counts of the table add up to {max(most):.3g}, too much."
        raise InputError(msg)
    resources = np.array(used, dtype=np.int64).reshape(len(limits), *costs.shape)
    bounds = np.array([max(0, min(limit.bound, use)) for limit, use in zip(limits, most, strict=True)], dtype=np.int64)
    return Problem(costs, resources, bounds, groups)


def _no_choice(table: ImportanceTable, layer: LayerCost, constraints: Sequence[BitsConstraint]) -> MPQError:
    members = [other.cost.name for other in table.layers if other.cost.activation_group == layer.activation_group]
    causes = [
        str(constraint)
        for constraint in constraints
        if constraint.concerns(layer.name, "weight")
        or any(constraint.concerns(member, "activation") for member in members)
    ]
    by = f"the constraints {'; '.join(causes)}" if causes else "the rule for importances out of order"
    with_others = f" (it shares its activation bits with {', '.join(members)})" if len(members) > 1 else ""
    msg = (
        f"Layer {layer.name!r}{with_others}: no bit width is left by {by}; the table has {list(table.bits)}. "
        "Loosen a minimum, maximum or pin, or keep importances out of order."
    )
    return InfeasibleBudgetError(msg, "constraints")


def _causes(prepared: Prepared, index: int, smallest: int, alone: bool) -> tuple[list[BitsConstraint], float | None]:
    """
    :return: the constraints that raise the smallest value of a budget, and what it would be without any constraint.
    """
    constraints = prepared.constraints
    if not constraints:
        return [], None

    def possible(of: Sequence[BitsConstraint]) -> float:
        problem = _problem(prepared.table, prepared.activation_bits, prepared.limits, prepared.alpha, of)
        if alone:
            return _smallest(problem, index)
        found = smallest_within(problem, index)
        return np.inf if found is None else found

    free = possible(())
    causes = [
        constraint
        for constraint in constraints
        if possible([other for other in constraints if other is not constraint]) < smallest
        or possible([constraint]) > free
    ]
    return causes, free


def _infeasible(
    limit: Limit, smallest: int, causes: tuple[Sequence[BitsConstraint], float | None], beside: str
) -> InfeasibleBudgetError:
    nearest = limit.achieved(smallest)
    constraints, free = causes
    because = ""
    if constraints and free is not None and np.isfinite(free):
        named = "; ".join(map(str, constraints))
        because = f" Constraints that cause it: {named}; without any it is {limit.show(limit.achieved(int(free)))}."
    msg = (
        f"No policy meets the budget {limit.name} = {limit.show(limit.requested)}{beside}: the nearest that exists is "
        f"{limit.show(nearest)}.{because} Ask for that, loosen the constraints, add lower bit widths, or fix fewer "
        "layers at high ones."
    )
    return InfeasibleBudgetError(msg, limit.name, limit.requested, nearest)
