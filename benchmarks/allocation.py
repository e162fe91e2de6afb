"""
Bit-width search against other exact solvers, side by side in one process, on ResNet-50 and on synthetic tables.

``python benchmarks/allocation.py TABLE [TABLE ...]``: the tables are ResNet-50's importance tables. Each solver gets
the same arrays and builds and solves its own program, in turn, budget by budget; ``nncf-mpq`` runs its public
``search``, from the table and the budget to the checked policy. ``pip install .[bench]`` brings PuLP and SciPy.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import mip
import numpy as np
import pulp
from rich.console import Console
from rich.table import Table
from scipy import optimize, sparse

from nncf_mpq_plugin.allocation import pareto, search
from nncf_mpq_plugin.allocation.bounds import Problem
from nncf_mpq_plugin.allocation.search import prepare
from nncf_mpq_plugin.types import AverageBits, Budget, ImportanceTable, LayerCost, LayerImportance

OURS = "nncf-mpq"
ALPHA = 2.0
SECONDS = 60.0
console = Console(width=120)


@dataclass(frozen=True)
class Run:
    """One solver on one budget: build and solve time, and the objective of what it returns (None: none in time)."""

    seconds: float
    objective: float | None


def budgets() -> Iterator[Budget]:
    """42 budgets from tight to loose: BitOps alone, weight size alone, and both together."""
    for bits in (2.25, 2.5, 2.75, 3, 3.25, 3.5, 4, 4.5, 5):
        yield Budget(average_bits=AverageBits(bits, bits))
    for ratio in (0.08, 0.12, 0.18, 0.25, 0.35):
        yield Budget(bitops_ratio=ratio)
    for ratio in (6.0, 8.0, 10.0, 12.0):
        yield Budget(compression_ratio=ratio)
    for weight, activation in ((2, 4), (3, 3), (3, 4), (4, 4), (3, 5), (4, 5)):
        for ratio in (9.0, 10.5, 11.5, 12.2):
            yield Budget(average_bits=AverageBits(weight, activation), compression_ratio=ratio)


def ours(table: ImportanceTable, budget: Budget, problem: Problem) -> float | None:
    """:return: objective of the public search."""
    return search(table, budget, alpha=ALPHA).objective


def plain_mip(table: ImportanceTable, budget: Budget, problem: Problem) -> float | None:
    """One binary per layer and pair of bits, through python-mip's CBC with its default gaps."""
    model = mip.Model(solver_name=mip.CBC)
    model.verbose = 0
    layers, choices = _choices(problem)
    variables = [model.add_var(var_type=mip.BINARY) for _ in choices]
    costs = problem.costs[tuple(choices.T)]
    model.objective = mip.minimize(mip.xsum(float(c) * x for c, x in zip(costs, variables, strict=True)))
    for layer in range(layers):
        model += mip.xsum(variables[i] for i in np.flatnonzero(choices[:, 0] == layer)) == 1
    for resource, bound in zip(problem.resources, problem.bounds.tolist(), strict=True):
        used = resource[tuple(choices.T)]
        model += mip.xsum(float(u) * x for u, x in zip(used, variables, strict=True)) <= bound
    model.optimize(max_seconds=SECONDS)
    if not model.num_solutions:
        return None
    return _objective(problem, choices, np.array([x.x for x in variables]))


def plain_pulp(table: ImportanceTable, budget: Budget, problem: Problem) -> float | None:
    """The same program through PuLP and the CBC that it brings, as the published search script does it."""
    model = pulp.LpProblem("bits", pulp.LpMinimize)
    layers, choices = _choices(problem)
    variables = [pulp.LpVariable(f"x{i}", cat=pulp.LpBinary) for i in range(len(choices))]
    costs = problem.costs[tuple(choices.T)]
    model += pulp.lpSum(float(c) * x for c, x in zip(costs, variables, strict=True))
    for layer in range(layers):
        model += pulp.lpSum(variables[i] for i in np.flatnonzero(choices[:, 0] == layer)) == 1
    for resource, bound in zip(problem.resources, problem.bounds.tolist(), strict=True):
        used = resource[tuple(choices.T)]
        model += pulp.lpSum(float(u) * x for u, x in zip(used, variables, strict=True)) <= bound
    model.solve(pulp.PULP_CBC_CMD(msg=False, timeLimit=SECONDS))
    if model.sol_status not in (pulp.LpSolutionOptimal, pulp.LpSolutionIntegerFeasible):
        return None
    return _objective(problem, choices, np.array([x.value() for x in variables]))


def highs(table: ImportanceTable, budget: Budget, problem: Problem) -> float | None:
    """The same program through scipy.optimize.milp, which is HiGHS, with its default gap."""
    _, choices = _choices(problem)
    costs = problem.costs[tuple(choices.T)]
    one = sparse.csr_array((np.ones(len(choices)), (choices[:, 0], np.arange(len(choices)))))
    used = problem.resources[:, *choices.T] / problem.bounds[:, None]
    result = optimize.milp(
        costs,
        integrality=np.ones(len(choices)),
        bounds=optimize.Bounds(0, 1),
        constraints=[optimize.LinearConstraint(one, 1, 1), optimize.LinearConstraint(used, -np.inf, 1)],
        options={"time_limit": SECONDS},
    )
    return None if result.x is None else _objective(problem, choices, result.x)


SOLVERS: dict[str, Callable[[ImportanceTable, Budget, Problem], float | None]] = {
    OURS: ours,
    "plain, python-mip (CBC)": plain_mip,
    "plain, PuLP (CBC)": plain_pulp,
    "plain, SciPy (HiGHS)": highs,
}


def _choices(problem: Problem) -> tuple[int, np.ndarray]:
    """:return: number of layers, and every allowed (layer, weight, activation)."""
    if len(np.unique(problem.groups)) != len(problem.groups):
        msg = "The plain formulations know no activation groups."
        raise SystemExit(msg)
    return len(problem.costs), np.argwhere(np.isfinite(problem.costs))


def _objective(problem: Problem, choices: np.ndarray, values: np.ndarray) -> float | None:
    """:return: objective of the policy that a solver's values stand for, None if it breaks a budget in integers."""
    chosen = choices[values > 0.5]
    if len(chosen) != len(problem.costs) or not problem.feasible(chosen[:, 1], chosen[:, 2]):
        return None
    return problem.objective((chosen[:, 1], chosen[:, 2]))


def timed(function: Callable[[], float | None]) -> Run:
    begin = time.perf_counter()
    objective = function()
    return Run(time.perf_counter() - begin, objective)


def compare(tables: dict[str, ImportanceTable], cases: list[tuple[str, Budget]]) -> dict[str, list[Run]]:
    """:return: one run a case of each solver."""
    runs: dict[str, list[Run]] = {name: [] for name in SOLVERS}
    for name, budget in cases:
        problem = prepare(tables[name], budget, alpha=ALPHA).problem
        for solver, function in SOLVERS.items():
            runs[solver].append(timed(lambda f=function, n=name, b=budget, p=problem: f(tables[n], b, p)))
    return runs


def solvers_table(runs: dict[str, list[Run]], title: str) -> Table:
    table = Table("build + solve", title=title, title_justify="left")
    for heading in ("median ms", "90% ms", "worst ms", "times nncf-mpq's\nmedian", "worse\nobjective", "by at most"):
        table.add_column(heading, justify="right")
    base = statistics.median(run.seconds for run in runs[OURS])
    for name, solver in runs.items():
        seconds = sorted(run.seconds for run in solver)
        excess = [
            (run.objective / best.objective - 1) if run.objective is not None else np.inf
            for run, best in zip(solver, runs[OURS], strict=True)
        ]
        worse = [value for value in excess if value > 1e-9]
        lost = sum(np.isinf(worse))
        known = [value for value in worse if np.isfinite(value)]
        table.add_row(
            name,
            *(
                f"{1e3 * value:.1f}"
                for value in (statistics.median(seconds), seconds[int(0.9 * len(seconds))], seconds[-1])
            ),
            f"{statistics.median(seconds) / base:.1f}",
            f"{len(known)}" + (f" (+{lost} none)" if lost else ""),
            f"{max(known):.1e}" if known else "-",
        )
        if min(excess) < -1e-9:
            console.print(f"{name} found a better objective than {OURS}: {min(excess):.2e}", style="red")
    return table


def synthetic(layers: int, seed: int) -> ImportanceTable:
    """Layers of random sizes over three orders of magnitude, importances that fall with the bits at random rates."""
    generator = np.random.default_rng(seed)
    bits = (2, 3, 4, 5, 6)
    entries = []
    for index in range(layers):
        cost = LayerCost(
            f"l{index}", int(10 ** generator.uniform(6, 8.5)), int(10 ** generator.uniform(3.5, 6.5)), f"l{index}"
        )
        curves = []
        for _ in range(2):
            level, rate = generator.lognormal(0, 1), generator.uniform(0.8, 2)
            curves.append({b: float(0.1 * level * 2 ** (-rate * (b - 2))) for b in bits})
        entries.append(LayerImportance(cost, *curves))
    return ImportanceTable(bits, tuple(entries))


def growth(sizes: list[int], seeds: int, one_other: bool) -> Table:
    title = f"nncf-mpq on synthetic tables of 5x5 choices, {seeds} tables a size"
    table = Table("layers", "budgets", title=title, title_justify="left")
    for heading in (
        "median ms",
        "worst ms",
        "left to CBC",
        *(["HiGHS ms\n(first table)", "its objective"] if one_other else []),
    ):
        table.add_column(heading, justify="right")
    kinds = {
        "BitOps": Budget(average_bits=AverageBits(3, 3)),
        "BitOps + weight size, loose": Budget(average_bits=AverageBits(4.5, 5), compression_ratio=7),
        "BitOps + weight size, middle": Budget(average_bits=AverageBits(3, 4), compression_ratio=9.5),
        "BitOps + weight size, tight": Budget(average_bits=AverageBits(2.5, 2.5), compression_ratio=13),
    }
    for layers in sizes:
        for name, budget in kinds.items():
            found = [search(synthetic(layers, seed), budget, alpha=ALPHA) for seed in range(seeds)]
            row = [f"{layers}", name]
            row += [f"{1e3 * f(s.seconds for s in found):.0f}" for f in (statistics.median, max)]
            row.append(str(sum(solution.solver == "cbc" for solution in found)))
            if one_other:
                first = synthetic(layers, 0)
                problem = prepare(first, budget, alpha=ALPHA).problem
                other = timed(lambda t=first, b=budget, p=problem: highs(t, b, p))
                excess = "none" if other.objective is None else f"{other.objective / found[0].objective - 1:+.1e}"
                row += [f"{1e3 * other.seconds:.0f}", excess]
            table.add_row(*row)
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tables", nargs="+", metavar="TABLE", help="importance tables (JSON)")
    parser.add_argument("--seeds", type=int, default=5, metavar="N", help="synthetic tables a size (5)")
    options = parser.parse_args()
    tables = {path: ImportanceTable.load(path) for path in options.tables}
    cases = [(path, budget) for path in tables for budget in budgets()]
    search(tables[options.tables[0]], next(iter(budgets())), alpha=ALPHA)  # imports and caches
    runs = compare(tables, cases)
    console.print(solvers_table(runs, f"{len(tables)} tables x {len(cases) // len(tables)} budgets"))
    begin = time.perf_counter()
    points = pareto(tables[options.tables[0]], "bitops_ratio", Budget(compression_ratio=12.2), alpha=ALPHA).points
    took = time.perf_counter() - begin
    console.print(f"Pareto sweep of {len(points)} points beside a compression ratio of 12.2: {took:.2f} s")
    console.print(growth([50, 200, 500, 1000], options.seeds, one_other=True))


if __name__ == "__main__":
    main()
