"""The best policy at each of many values of one budget: the whole trade-off from one importance table."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from nncf_mpq_plugin.allocation.search import (
    Solution,
    achieved_by,
    prepare,
    search,
    smallest_within,
    solve_prepared,
)
from nncf_mpq_plugin.costs import LatencyTable, Limit
from nncf_mpq_plugin.errors import InfeasibleBudgetError, InputError
from nncf_mpq_plugin.types import BUDGETS, SCHEMA_VERSION, Budget, ImportanceTable, write_json


@dataclass(frozen=True)
class Sweep:
    """
    :param vary: the budget that was varied.
    :param points: optima, the tightest budget first.
    """

    vary: str
    points: tuple[Solution, ...]

    def to_json(self) -> dict[str, Any]:
        """:return: a JSON-serialisable object with every policy."""
        points = [point.to_json() for point in self.points]
        return {"schema_version": SCHEMA_VERSION, "vary": self.vary, "points": points}

    def save(self, path: str | Path) -> None:
        """Write the sweep as JSON; the file appears only whole."""
        write_json(path, self.to_json())


def pareto(
    table: ImportanceTable,
    vary: str = "bitops_ratio",
    budget: Budget | None = None,
    *,
    points: int = 100,
    latency: LatencyTable | None = None,
    **options: Any,
) -> Sweep:
    """
    Solve at evenly spaced values of a budget, from the smallest possible to the largest that still makes a difference.

    :param vary: name of the budget, one of ``types.BUDGETS``.
    :param budget: other budgets, kept at every point.
    :param points: how many.
    :param options: as :func:`nncf_mpq_plugin.allocation.search.search`.
    :return: one optimum a point.
    :raises InfeasibleBudgetError: if the other budgets cannot be met.
    :raises InputError: for an unknown budget or fewer than 2 points, and as :func:`search`.
    """
    return Sweep(vary, tuple(pareto_points(table, vary, budget, points=points, latency=latency, **options)))


def pareto_points(
    table: ImportanceTable,
    vary: str = "bitops_ratio",
    budget: Budget | None = None,
    *,
    points: int = 100,
    latency: LatencyTable | None = None,
    **options: Any,
) -> Iterator[Solution]:
    """As :func:`pareto`, one point at a time."""
    if vary not in BUDGETS:
        msg = f"vary: unknown budget {vary!r}; known are {', '.join(BUDGETS)}."
        raise InputError(msg)
    if points < 2:
        msg = f"points: at least 2 are needed, got {points}."
        raise InputError(msg)
    others = replace(budget or Budget(), **{vary: None})
    limit, low, high = _range(table, vary, others, latency, options)
    for bound in np.linspace(low, high, points):
        value = limit.achieved(int(bound))
        yield search(table, _with(others, vary, value), latency=latency, **options)


def _with(budget: Budget, name: str, value: float) -> Budget:
    changed: dict[str, Any] = {name: value}
    return replace(budget, **changed)


def _range(
    table: ImportanceTable, vary: str, others: Budget, latency: LatencyTable | None, options: dict[str, Any]
) -> tuple[Limit, float, float]:
    """:return: the budget as a limit, and its smallest sum possible and that of the best policy without it."""
    settings = {key: value for key, value in options.items() if key != "gap"}
    loose = 1e-6 if vary == "compression_ratio" else 1e30
    prepared = prepare(table, _with(others, vary, loose), latency=latency, **settings)
    names = [limit.name for limit in prepared.limits]
    index = names.index(vary)
    best = solve_prepared(prepared)  # says which of the other budgets cannot be met
    low = smallest_within(prepared.problem, index)
    if low is None:
        msg = "The other budgets cannot be met."
        raise InfeasibleBudgetError(msg)
    return prepared.limits[index], low, float(achieved_by(prepared.table, prepared.limits, best)[vary])


def draw(sweep: Sweep, path: str | Path) -> None:
    """
    Draw objective over budget.

    :param path: the image file; its suffix gives the format.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    achieved = [point.budgets[sweep.vary]["achieved"] for point in sweep.points]
    axes.plot(achieved, [point.objective for point in sweep.points], marker=".", linewidth=1)
    axes.set_xlabel(sweep.vary.replace("_", " "))
    axes.set_ylabel("objective (lower is better)")
    axes.grid(alpha=0.3)
    figure.savefig(path)
