"""Pareto curves of a run: what the objective would be at other budgets, and where the run's policies lie."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from nncf_mpq_plugin.allocation import achieved_by, objective_of, pareto, prepare
from nncf_mpq_plugin.errors import InfeasibleBudgetError
from nncf_mpq_plugin.report.contents import Contents
from nncf_mpq_plugin.types import Budget, Policy

POINTS = 24
BITOPS, SIZE = "bitops_ratio", "compression_ratio"


@dataclass(frozen=True)
class Point:
    """
    :param value: of the budget that varies.
    :param objective: sum of the importances, lower is better.
    """

    value: float
    objective: float


@dataclass(frozen=True)
class Curve:
    """
    :param vary: the budget that varies: ``bitops_ratio`` or ``compression_ratio``.
    :param others: budgets of the run that are kept at every point.
    :param points: optima.
    :param policies: ``mixed`` and ``uniform`` -> where they lie; a policy with a choice that was banned has no place.
    """

    vary: str
    others: Budget
    points: tuple[Point, ...]
    policies: Mapping[str, Point]


def curves(contents: Contents) -> list[Curve]:
    """:return: one curve for each kind of budget (BitOps, weight size) that the run has."""
    budget = contents.folder.config.budget
    average = budget.average_bits
    whole = average is not None and None not in (average.weight, average.activation)
    without_latency = replace(budget, latency_ratio=None)
    result = []
    if whole or budget.bitops or budget.bitops_ratio:
        others = replace(without_latency, bitops=None, bitops_ratio=None)
        result.append(_curve(contents, BITOPS, replace(others, average_bits=None) if whole else others))
    if (average and not whole and average.weight) or budget.compression_ratio or budget.model_size_bytes:
        others = replace(without_latency, compression_ratio=None, model_size_bytes=None)
        result.append(_curve(contents, SIZE, others if whole else replace(others, average_bits=None)))
    return [curve for curve in result if curve is not None]


def _curve(contents: Contents, vary: str, others: Budget) -> Curve | None:
    config, table = contents.folder.config, contents.table
    alpha = contents.policy.summary.get("alpha", config.alpha)
    rule = config.out_of_order
    try:
        sweep = pareto(table, vary, others, points=POINTS, alpha=alpha, out_of_order=rule)
    except InfeasibleBudgetError:  # the other budgets have been changed since
        return None
    points = tuple(Point(point.budgets[vary]["achieved"], point.objective) for point in sweep.points)
    loose = Budget(bitops_ratio=1.0) if vary == BITOPS else Budget(compression_ratio=1e-6)
    ordered = prepare(table, loose, alpha=alpha, out_of_order=rule)

    def place(policy: Policy) -> Point:
        limit = ordered.limits[0]
        value = limit.achieved(achieved_by(ordered.table, ordered.limits, policy.layers)[vary])
        return Point(value, objective_of(ordered.table, policy.layers, ordered.alpha))

    found = {"mixed": contents.policy, **({"uniform": contents.uniform} if contents.uniform else {})}
    known = {layer.cost.name: layer for layer in ordered.table.layers}
    places = {
        name: place(policy)
        for name, policy in found.items()
        if all(
            bits.weight in known[layer].weight and bits.activation in known[layer].activation
            for layer, bits in policy.layers.items()
        )
    }
    return Curve(vary, others, points, places)
