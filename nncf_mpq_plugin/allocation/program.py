"""
The integer linear program (LIMPQ, equation 3), solved to a proven optimum.

A binary variable stands for each pair of weight and activation bits of a layer that the bound left open; layers of one
activation group share the activation bits. The enumeration solves nearly all programs; python-mip with CBC solves those
whose lists would grow too long.
"""

from __future__ import annotations

import mip
import numpy as np

from nncf_mpq_plugin.allocation.bounds import Choice, Problem, reduce
from nncf_mpq_plugin.allocation.enumeration import enumerate_best
from nncf_mpq_plugin.errors import MPQError

OPTIMALITY_GAP = 1e-9


def solve(problem: Problem, gap: float = OPTIMALITY_GAP) -> Choice | None:
    """
    :param gap: relative gap to the optimum at which CBC may stop.
    :return: weight and activation indices of an optimal policy, None if no policy keeps the budgets.
    :raises MPQError: if CBC stops without a proof.
    """
    open_choices, multipliers, incumbent = reduce(problem)
    if incumbent is not None:
        upper = float(problem.of(problem.costs, *incumbent))
        best = enumerate_best(problem, open_choices, multipliers, upper)
        if best is not None:
            return best
    return solve_by_cbc(problem, open_choices, incumbent, gap)


def solve_by_cbc(
    problem: Problem, open_choices: np.ndarray, incumbent: Choice | None = None, gap: float = OPTIMALITY_GAP
) -> Choice | None:
    """
    Branch and cut over the choices of a mask.

    :param open_choices: ``[layers, W, A]``.
    :param incumbent: a policy to start from.
    :return: as :func:`solve`.
    """
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
    for bound, resource in zip(problem.bounds, problem.resources, strict=True):
        factor = 1000.0 / max(bound, 1.0)
        used = mip.xsum(float(resource[layer, w, a]) * factor * var for layer, (w, a), var in flat)
        model += used <= bound * factor
    model.objective = mip.minimize(mip.xsum(float(problem.costs[n, w, a]) * scale * v for n, (w, a), v in flat))
    if incumbent is not None:
        pairs = [(int(w), int(a)) for w, a in zip(*incumbent, strict=True)]
        model.start = [(choices[n][pair], 1.0) for n, pair in enumerate(pairs) if pair in choices[n]]
    while True:
        status = model.optimize()
        if status == mip.OptimizationStatus.INFEASIBLE:
            return None
        if status != mip.OptimizationStatus.OPTIMAL:
            msg = f"The solver stopped with status {status.name} before it proved an optimum; this should not happen."
            raise MPQError(msg)
        result = [max(pairs, key=lambda pair, pairs=pairs: pairs[pair].x) for pairs in choices]  # type: ignore[misc]
        weight, activation = np.array(result).T
        if problem.feasible(weight, activation):
            return weight, activation
        # over a budget by less than the solver's tolerance: exclude this policy and ask again
        model += mip.xsum(choices[n][pair] for n, pair in enumerate(result)) <= len(result) - 1
