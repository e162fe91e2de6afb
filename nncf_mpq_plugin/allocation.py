"""
One integer linear program picks the bit widths of all layers (LIMPQ, equation 3).

Minimise the sum over layers of ``activation importance + alpha x weight importance`` under the budgets. A binary
variable stands for each pair of weight and activation bits of a layer; layers of one activation group share the
activation bits. :mod:`nncf_mpq_plugin.bounds` first removes the choices that no optimal policy contains, which leaves
a fraction of the program. :mod:`nncf_mpq_plugin.enumeration` solves that exactly if it is small enough, python-mip with
CBC otherwise.
"""

from __future__ import annotations

import fnmatch
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import mip
import numpy as np

from nncf_mpq_plugin.bounds import Problem, reduce
from nncf_mpq_plugin.costs import Limit, limits_of, total_bitops, weight_bits
from nncf_mpq_plugin.enumeration import enumerate_best
from nncf_mpq_plugin.errors import InfeasibleBudgetError, InputError, MPQError
from nncf_mpq_plugin.outliers import Correction, put_in_order
from nncf_mpq_plugin.types import Budget, ImportanceTable, LayerBits, LayerCost, Policy

TENSORS = ("weight", "activation", "both")


@dataclass(frozen=True)
class BitsConstraint:
    """
    Limits on the bit widths of layers whose name fits a pattern (``*`` and ``?``).

    :param layers: the pattern.
    :param tensor: ``weight``, ``activation`` or ``both``.
    :param minimum: smallest bit width allowed.
    :param maximum: largest bit width allowed.
    :param pinned: the one bit width allowed.
    """

    layers: str
    tensor: str = "both"
    minimum: int | None = None
    maximum: int | None = None
    pinned: int | None = None

    def allows(self, bits: int) -> bool:
        """:return: whether a layer that fits may have this bit width."""
        if self.pinned is not None:
            return bits == self.pinned
        return (self.minimum is None or bits >= self.minimum) and (self.maximum is None or bits <= self.maximum)


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


def search(
    table: ImportanceTable,
    budget: Budget,
    *,
    alpha: float = 2.0,
    out_of_order: str = "ban",
    constraints: Sequence[BitsConstraint] = (),
    gap: float = 1e-9,
) -> Solution:
    """
    Find the best policy within the budgets.

    :param table: importances.
    :param budget: limits; all hold together.
    :param alpha: weight of the weight importances (LIMPQ, equation 3; the published search uses 2 on ResNet-50).
    :param out_of_order: what to do with importances that rise with the bits, see :mod:`nncf_mpq_plugin.outliers`.
    :param constraints: limits on single layers.
    :param gap: relative gap to the optimum at which the solver may stop.
    :return: an optimal policy, checked against every budget in integer arithmetic. Among policies of equal objective
        the first found is returned; every step is deterministic, so it is the same on every run.
    :raises InfeasibleBudgetError: naming the budget and the smallest value possible.
    :raises InputError: for an unknown rule, a pattern that fits no layer, or a latency budget without a table.
    """
    start = time.perf_counter()
    if not (np.isfinite(alpha) and alpha >= 0):
        msg = f"alpha: must be a finite number of at least 0, got {alpha}."
        raise InputError(msg)
    ordered, corrections = put_in_order(table, out_of_order)
    limits = limits_of(table, budget)
    problem = _problem(ordered, limits, alpha, constraints)
    _check_feasible(problem, limits, constraints)
    chosen = _solve(problem, limits, gap)
    layers = [layer.cost for layer in table.layers]
    bits = {layer.name: LayerBits(table.bits[w], table.bits[a]) for layer, (w, a) in zip(layers, chosen, strict=True)}
    seconds = time.perf_counter() - start
    return _solution(ordered, limits, bits, alpha, corrections, seconds)


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


def _solution(
    table: ImportanceTable,
    limits: Sequence[Limit],
    bits: Mapping[str, LayerBits],
    alpha: float,
    corrections: tuple[Correction, ...],
    seconds: float,
) -> Solution:
    costs = [layer.cost for layer in table.layers]
    achieved = achieved_by(table, limits, bits)
    for limit in limits:
        if achieved[limit.name] > limit.bound:
            msg = f"The solver's policy exceeds the budget {limit.name}; this is a defect, please report it."
            raise MPQError(msg)
    fixed = {layer.cost.name: layer.bits for layer in table.fixed_layers}
    every = [*costs, *(layer.cost for layer in table.fixed_layers)]
    together = {**bits, **fixed}
    all_bits = sum(weight_bits(cost, together[cost.name].weight, 0) for cost in every)
    report: dict[str, Any] = {
        "status": "optimal",
        "objective": objective_of(table, bits, alpha),
        "bitops": total_bitops(costs, bits),
        "weight_bits": all_bits,
        "compression_ratio": 32 * sum(cost.weights for cost in every) / all_bits,
        "seconds": seconds,
        "budgets": {
            limit.name: {"requested": limit.requested, "achieved": limit.achieved(achieved[limit.name])}
            for limit in limits
        },
    }
    listed = [vars(correction) for correction in corrections]
    policy = Policy(bits, fixed, {**report, "alpha": alpha, "corrections": listed})
    return Solution(policy=policy, corrections=corrections, **report)


def _problem(
    table: ImportanceTable, limits: Sequence[Limit], alpha: float, constraints: Sequence[BitsConstraint]
) -> Problem:
    layers = [layer.cost for layer in table.layers]
    _check_constraints(layers, constraints)

    def allowed(name: str, tensor: str, bits: int) -> bool:
        return all(
            constraint.allows(bits)
            for constraint in constraints
            if constraint.tensor in (tensor, "both") and fnmatch.fnmatchcase(name, constraint.layers)
        )

    def values(name: str, tensor: str, importance: Mapping[int, float]) -> list[float]:
        return [importance.get(b, np.inf) if allowed(name, tensor, b) else np.inf for b in table.bits]

    weight = np.array([values(layer.cost.name, "weight", layer.weight) for layer in table.layers])
    activation = np.array([values(layer.cost.name, "activation", layer.activation) for layer in table.layers])
    costs = (
        activation[:, None, :]
        + (alpha * np.where(np.isinf(weight), 0, weight) + np.where(np.isinf(weight), np.inf, 0))[:, :, None]
    )
    resources = np.array(
        [[[[limit.cost(layer, w, a) for a in table.bits] for w in table.bits] for layer in layers] for limit in limits],
        dtype=np.float64,
    )
    names = list(dict.fromkeys(layer.activation_group for layer in layers))
    groups = np.array([names.index(layer.activation_group) for layer in layers])
    shared = np.zeros((len(names), len(table.bits)))
    np.add.at(shared, groups, np.where(np.isinf(activation), np.inf, 0))
    costs = costs + shared[groups][:, None, :]  # a bit width that one layer of a group may not have, none may
    for layer, choices in zip(layers, costs, strict=True):
        if np.isinf(choices).all():
            msg = (
                f"Layer {layer.name!r}: no bit width is left by the constraints (and the rule for importances out of "
                f"order); the table has {list(table.bits)}. Loosen its minimum, maximum or pin."
            )
            raise InfeasibleBudgetError(msg, "constraints")
    return Problem(costs, resources, np.array([float(limit.bound) for limit in limits]), groups)


def _check_constraints(layers: Sequence[LayerCost], constraints: Sequence[BitsConstraint]) -> None:
    names = [layer.name for layer in layers]
    for constraint in constraints:
        if constraint.tensor not in TENSORS:
            msg = (
                f"constraint {constraint.layers!r}: unknown tensor {constraint.tensor!r}; known: {', '.join(TENSORS)}."
            )
            raise InputError(msg)
        if not fnmatch.filter(names, constraint.layers):
            msg = f"constraint {constraint.layers!r} fits no searchable layer, e.g. {', '.join(names[:5])}."
            raise InputError(msg)


def _check_feasible(problem: Problem, limits: Sequence[Limit], constraints: Sequence[BitsConstraint]) -> None:
    banned = np.isinf(problem.costs)
    for index, limit in enumerate(limits):
        smallest, _, _ = problem.cheapest(np.where(banned, np.inf, problem.resources[index]))
        if smallest > problem.bounds[index]:
            raise _infeasible(limit, smallest, constraints, "")


def _infeasible(limit: Limit, smallest: float, constraints: Sequence[BitsConstraint], beside: str) -> MPQError:
    nearest = limit.achieved(round(smallest))
    pins = ", ".join(repr(constraint.layers) for constraint in constraints)
    because = f" The constraints on {pins} count among the causes." if pins else ""
    msg = (
        f"No policy meets the budget {limit.name} = {limit.requested:g}{beside}: the nearest that exists is "
        f"{nearest:.6g}.{because} Ask for that, add lower bit widths, or fix fewer layers at high ones."
    )
    return InfeasibleBudgetError(msg, limit.name, limit.requested, nearest)


def _solve(problem: Problem, limits: Sequence[Limit], gap: float) -> list[tuple[int, int]]:
    open_choices, multipliers, incumbent = reduce(problem)
    if incumbent is not None:
        upper = float(problem.of(problem.costs, *incumbent))
        best = enumerate_best(problem, open_choices, multipliers, upper)
        if best is not None:
            return [(int(w), int(a)) for w, a in zip(*best, strict=True)]
    scale = 1.0 / (float(np.abs(problem.costs[open_choices]).max()) or 1.0)
    model = mip.Model(solver_name=mip.CBC)
    model.verbose = 0
    model.threads = 1
    model.seed = 1
    model.max_mip_gap = gap
    model.max_mip_gap_abs = 1e-11
    model.integer_tol = 1e-9
    model.infeas_tol = 1e-9
    choices: list[dict[tuple[int, int], mip.Var]] = []
    for layer_choices in open_choices:
        pairs = [(int(w), int(a)) for w, a in zip(*np.nonzero(layer_choices), strict=True)]
        choices.append({pair: model.add_var(var_type=mip.BINARY) for pair in pairs})
        model += mip.xsum(choices[-1].values()) == 1
    first: dict[int, int] = {}
    for layer, group in enumerate(problem.groups):
        leader = first.setdefault(int(group), layer)
        if leader == layer:
            continue
        for a in {a for _, a in choices[leader]} | {a for _, a in choices[layer]}:
            mine = mip.xsum(var for (_, other), var in choices[layer].items() if other == a)
            model += mine == mip.xsum(var for (_, other), var in choices[leader].items() if other == a)
    flat = [(layer, pair, var) for layer, pairs in enumerate(choices) for pair, var in pairs.items()]
    for index in range(len(limits)):
        bound = problem.bounds[index]
        factor = 1000.0 / max(bound, 1.0)
        used = mip.xsum(float(problem.resources[index, layer, w, a]) * factor * v for layer, (w, a), v in flat)
        model += used <= bound * factor
    model.objective = mip.minimize(mip.xsum(float(problem.costs[n, w, a]) * scale * v for n, (w, a), v in flat))
    if incumbent is not None:
        pairs = [(int(w), int(a)) for w, a in zip(*incumbent, strict=True)]
        model.start = [(choices[n][pair], 1.0) for n, pair in enumerate(pairs) if pair in choices[n]]
    while True:
        status = model.optimize()
        if status == mip.OptimizationStatus.INFEASIBLE:
            raise _jointly_infeasible(problem, limits)
        if status != mip.OptimizationStatus.OPTIMAL:
            msg = f"The solver stopped with status {status.name} before it proved an optimum; this should not happen."
            raise MPQError(msg)
        result = [max(pairs, key=lambda pair, pairs=pairs: pairs[pair].x) for pairs in choices]  # type: ignore[misc]
        weight, activation = np.array(result).T
        if problem.feasible(weight, activation):
            return result
        # over a budget by less than the solver's tolerance: exclude this policy and ask again
        model += mip.xsum(choices[n][pair] for n, pair in enumerate(result)) <= len(result) - 1


def _jointly_infeasible(problem: Problem, limits: Sequence[Limit]) -> MPQError:
    """Each budget alone can be met, all together cannot: the smallest value of the first, given the others."""
    if len(limits) < 2:
        msg = "The solver finds no policy although one exists; this is a defect, please report it."
        return MPQError(msg)
    banned = np.isinf(problem.costs)
    relaxed = Problem(
        np.where(banned, np.inf, problem.resources[0] / max(problem.bounds[0], 1.0)),
        problem.resources[1:],
        problem.bounds[1:],
        problem.groups,
    )
    try:
        chosen = np.array(_solve(relaxed, limits[1:], 1e-9))
    except InfeasibleBudgetError as error:
        return error
    smallest = problem.resources[0, np.arange(len(chosen)), chosen[:, 0], chosen[:, 1]].sum()
    others = ", ".join(f"{limit.name} = {limit.requested:g}" for limit in limits[1:])
    return _infeasible(limits[0], smallest, (), f" together with {others}")
