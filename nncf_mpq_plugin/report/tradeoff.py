"""Pareto curves of a run: what the objective would be at other budgets, and where the run's policies lie."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from nncf_mpq_plugin.allocation import BitsConstraint, achieved_by, objective_of, pareto, prepare
from nncf_mpq_plugin.costs import LatencyTable
from nncf_mpq_plugin.errors import InfeasibleBudgetError
from nncf_mpq_plugin.report.contents import Contents
from nncf_mpq_plugin.types import Budget

POINTS = 24
VARIED = {
    "bitops_ratio": ("bitops", "bitops_ratio"),
    "compression_ratio": ("compression_ratio", "model_size_bytes"),
    "latency_ratio": ("latency_ratio",),
}
"""What a curve goes over -> the budgets that it takes the place of."""


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
    :param vary: the budget that varies, a key of :data:`VARIED`.
    :param others: budgets of the run that are kept at every point.
    :param points: optima.
    :param policies: ``mixed`` and ``uniform`` -> where they lie; a policy with a choice that was banned has no place.
    """

    vary: str
    others: Budget
    points: tuple[Point, ...]
    policies: Mapping[str, Point]


def curves(contents: Contents) -> list[Curve]:
    """:return: one curve for each kind of budget (BitOps, size of the weights, latency) that the run has."""
    budget = contents.folder.config.budget
    average = budget.average_bits
    of_average = ""
    if average is not None and average.weight is not None:
        of_average = "compression_ratio" if average.activation is None else "bitops_ratio"
    found = []
    for vary, names in VARIED.items():
        if of_average == vary or any(getattr(budget, name) is not None for name in names):
            without: dict[str, Any] = dict.fromkeys(names)
            if of_average == vary:
                without["average_bits"] = None
            found.append(_curve(contents, vary, replace(budget, **without)))
    return [curve for curve in found if curve is not None]


def _curve(contents: Contents, vary: str, others: Budget) -> Curve | None:
    config, table = contents.folder.config, contents.table
    options: dict[str, Any] = {
        "alpha": contents.policy.summary.get("alpha", config.alpha),
        "out_of_order": config.out_of_order,
        "latency": None if config.latency_table is None else LatencyTable.load(config.latency_table),
    }
    constraints = tuple(BitsConstraint(**limits) for limits in config.constraints)
    try:
        sweep = pareto(table, vary, others, points=POINTS, constraints=constraints, **options)
    except InfeasibleBudgetError:  # the other budgets have been changed since
        return None
    points = tuple(Point(point.budgets[vary]["achieved"], point.objective) for point in sweep.points)
    limits: dict[str, Any] = {vary: 1.0}
    free = prepare(table, Budget(**limits), **options)
    found = {"mixed": contents.policy, **({"uniform": contents.uniform} if contents.uniform else {})}
    known = {layer.cost.name: layer for layer in free.table.layers}
    places = {}
    for name, policy in found.items():
        bits = policy.layers
        if all(bits[n].weight in layer.weight and bits[n].activation in layer.activation for n, layer in known.items()):
            value = free.limits[0].achieved(achieved_by(free.table, free.limits, bits)[vary])
            places[name] = Point(value, objective_of(free.table, bits, free.alpha))
    return Curve(vary, others, points, places)
