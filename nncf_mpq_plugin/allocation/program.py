"""
The integer linear program (LIMPQ, equation 3), solved to a proven optimum.

The Lagrangian bound lies within a few thousandths of the optimum, so few policies can be better than any good one: all
of them are enumerated, first up to a target close to the bound, then up to a higher one, until the best that is found
lies below the target. Lists that grow too long mean that the target was raised too far: a lower one is tried, then
longer lists. Where these do not suffice, the group that makes the budgets lumpiest is split into its choices, each with
a bound of its own. What is still too much after a number of splits is left to python-mip with CBC, over the choices
that the bounds leave open.

CBC is the last resort and not the first because it takes 10 to 50 times as long (benchmarks/allocation.py) and, on
some tables, calls policies optimal that are not: it prunes by a tolerance that the gaps asked of it do not control.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace

import mip
import numpy as np

from nncf_mpq_plugin.allocation.bounds import Choice, Problem, Relaxation, relax
from nncf_mpq_plugin.allocation.enumeration import best_below
from nncf_mpq_plugin.allocation.states import TooManyStatesError
from nncf_mpq_plugin.errors import MPQError

OPTIMALITY_GAP = 1e-9
MOST_SPLITS = 12
FIRST_OPEN = 20
GROWTH = (0.03, 1.0)
NARROW = 0.1
MOST_STATES = (8_000, 100_000)
FILL = 0.6


@dataclass(frozen=True)
class Optimum:
    """
    :param choice: the best policy found.
    :param gap: proven relative gap to the optimum; 0 if it is the optimum.
    :param proven: whether that is as small as was asked for.
    :param solver: ``enumeration`` or ``cbc``; the tie rule is kept by the first only.
    """

    choice: Choice
    gap: float
    solver: str
    proven: bool


class _OutOfTimeError(Exception):
    pass


def solve(problem: Problem, gap: float = OPTIMALITY_GAP, time_limit: float | None = None) -> Optimum | None:
    """
    :param gap: relative gap to the optimum at which the search may stop.
    :param time_limit: seconds after which the best policy known is returned, with its gap.
    :return: the best policy; of those with the same objective the first by :meth:`Problem.rank`. None if no policy
        keeps the budgets.
    :raises MPQError: if the time is over before any policy is found, or CBC stops without a proof.
    """
    search = _Search(gap, None if time_limit is None else time.perf_counter() + time_limit)
    gap_left, in_time = 0.0, True
    try:
        search.run(problem.binding().undominated())
    except _OutOfTimeError:
        if search.best is None:
            msg = f"No policy was found within {time_limit:g} s. Allow more time."
            raise MPQError(msg) from None
        gap_left = max(0.0, search.upper - search.lower) / max(abs(search.upper), 1e-300)
        in_time = False
    if search.best is None:
        return None
    solver = "cbc" if search.used_cbc else "enumeration"
    return Optimum(search.best, max(gap_left, search.gap_left), solver, in_time or gap_left <= gap)


class _Search:
    """Branch and bound; ``best`` and ``upper`` are the best policy so far and its objective."""

    def __init__(self, gap: float, deadline: float | None):
        self.gap = gap if gap > OPTIMALITY_GAP else 0.0
        self.deadline = deadline
        self.best: Choice | None = None
        self.upper = np.inf
        self.lower = -np.inf
        self.gap_left = 0.0
        self.splits = 0
        self.used_cbc = False

    def run(self, problem: Problem, relaxation: Relaxation | None = None) -> None:
        """Look for policies at least as good as the best so far."""
        if not len(problem.bounds):
            self._offer(problem, problem.cheapest(problem.costs)[1:])
            return
        root = relaxation is None
        relaxation = relaxation or relax(problem)
        allowed = np.isfinite(problem.costs)
        most = float(np.where(allowed, problem.costs, 0).max((1, 2)).sum())
        step = max(self._first_step(problem, relaxation), 1e-9 * most, 1e-300)
        radius, reached, size = max(0.0, min(step, self.upper - relaxation.bound)), 0.0, 50
        failed, most_states = np.inf, MOST_STATES[0]
        while relaxation.bound + reached <= min(self.upper, most) + relaxation.tolerance:
            if root:
                self.lower = relaxation.bound + reached
            self._check_time()
            if self.gap and self.upper - relaxation.bound - reached < self.gap * abs(self.upper) < np.inf:
                self.gap_left = max(self.gap_left, self.gap)
                return
            hope = min(self.upper, relaxation.bound + 2 * radius)
            try:
                choice, largest = best_below(problem, relaxation, relaxation.bound + radius, hope, most_states)
            except TooManyStatesError:
                failed = radius
            else:
                if choice is not None:
                    self._offer(problem, choice)
                if self.upper <= relaxation.bound + radius + relaxation.tolerance or radius >= most - relaxation.bound:
                    return
                steepness = np.log(max(largest / size, 1.05)) / (radius - reached)
                growth = np.log(max(2.0, FILL * most_states / max(largest, 1))) / steepness
                growth = float(np.clip(growth, GROWTH[0] * radius, GROWTH[1] * radius))
                size, reached, radius = max(largest, 1), radius, radius + growth
                if self.upper - relaxation.bound < radius + 0.3 * growth:
                    radius = self.upper - relaxation.bound
            if radius < failed:
                continue
            if reached and failed - reached > NARROW * reached:
                radius = (reached + failed) / 2
            elif most_states < MOST_STATES[1]:
                radius, failed, most_states = failed, np.inf, MOST_STATES[1]
            else:
                self._split(problem, relaxation, radius)
                return

    def _first_step(self, problem: Problem, relaxation: Relaxation) -> float:
        """:return: how far above the bound the first target lies: a few dozen choices are open there."""
        above, offsets = problem.above(relaxation.multipliers[None])
        values = (above + offsets[:, problem.groups, None, :]).ravel()
        values = np.sort(values[(values > 0) & np.isfinite(values)])
        return float(values[min(FIRST_OPEN, len(values) - 1)]) if len(values) else 0.0

    def _offer(self, problem: Problem, choice: Choice) -> None:
        objective = problem.objective(choice)
        if objective < self.upper or (
            objective == self.upper and (self.best is None or problem.rank(choice) < problem.rank(self.best))
        ):
            self.best, self.upper = choice, objective

    def _check_time(self) -> None:
        if self.deadline is not None and time.perf_counter() > self.deadline:
            raise _OutOfTimeError

    def _split(self, problem: Problem, relaxation: Relaxation, radius: float) -> None:
        """Solve once for each choice of one group, the most promising first."""
        if self.splits >= MOST_SPLITS:
            self._solve_by_cbc(problem, relaxation)
            return
        self.splits += 1
        parts: list[tuple[float, int, Problem, Relaxation]] = []
        for part in _parts(problem, relaxation, radius, self.upper - relaxation.bound + relaxation.tolerance):
            relaxed = relax(part)
            parts.append((relaxed.bound, len(parts), part, relaxed))
        for bound, _, part, relaxed in sorted(parts, key=lambda item: item[:2]):
            if bound <= self.upper + relaxed.tolerance:
                self.run(part, relaxed)

    def _solve_by_cbc(self, problem: Problem, relaxation: Relaxation) -> None:
        above, offsets = problem.above(relaxation.multipliers[None])
        open_ = (
            above[0] + offsets[0][problem.groups][:, None, :] <= self.upper - relaxation.bound + relaxation.tolerance
        )
        open_ &= np.isfinite(problem.costs)
        left = None if self.deadline is None else self.deadline - time.perf_counter()
        self.used_cbc = True
        choice, finished = solve_by_cbc(problem, open_, self.best, max(self.gap, OPTIMALITY_GAP), left)
        if choice is not None:
            self._offer(problem, choice)
        if not finished:
            raise _OutOfTimeError


def _parts(problem: Problem, relaxation: Relaxation, radius: float, most: float) -> list[Problem]:
    """
    :param most: policies that lie further above the bound do not matter.
    :return: the problem once for each choice of the layer whose competing choices differ most in what they use.
    """
    allowed = np.isfinite(problem.costs)
    above, offsets = problem.above(relaxation.multipliers[None])
    values = above[0] + offsets[0][problem.groups][:, None, :]
    allowed &= values <= most
    competing = values <= radius / 2
    worth = problem.resources * relaxation.multipliers[:, None, None, None]
    spread = np.where(competing, worth, -np.inf).max((2, 3)) - np.where(competing, worth, np.inf).min((2, 3))
    several = allowed.sum((1, 2)) > 1
    layer = int(np.where(several, spread.sum(0), -1.0).argmax())
    parts = []
    for w, a in np.argwhere(allowed[layer]):
        costs = problem.costs.copy()
        costs[layer] = np.inf
        costs[layer, w, a] = problem.costs[layer, w, a]
        costs[problem.groups == problem.groups[layer], :, :a] = np.inf
        costs[problem.groups == problem.groups[layer], :, a + 1 :] = np.inf
        if np.isfinite(costs).any((1, 2)).all():
            parts.append(replace(problem, costs=costs))
    return parts


def solve_by_cbc(
    problem: Problem,
    open_choices: np.ndarray,
    incumbent: Choice | None = None,
    gap: float = OPTIMALITY_GAP,
    time_limit: float | None = None,
) -> tuple[Choice | None, bool]:
    """
    Branch and cut over the choices of a mask.

    :param open_choices: ``[layers, W, A]``.
    :param incumbent: a policy to start from; ignored if it is not within the mask.
    :return: the best policy, None if there is none, and whether that is proven (False if the time was over before).
    :raises MPQError: if CBC stops for another reason.
    """
    finite = problem.costs[open_choices]
    scale = 1.0 / (float(np.abs(finite).max(initial=0.0)) or 1.0)
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
        if not pairs:
            return None, True
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
    for bound, resource in zip(problem.bounds.tolist(), problem.resources, strict=True):
        factor = 1000.0 / max(bound, 1)
        used = mip.xsum(float(resource[layer, w, a]) * factor * var for layer, (w, a), var in flat)
        model += used <= bound * factor
    model.objective = mip.minimize(mip.xsum(float(problem.costs[n, w, a]) * scale * v for n, (w, a), v in flat))
    if incumbent is not None:
        pairs = [(int(w), int(a)) for w, a in zip(*incumbent, strict=True)]
        if all(pair in choices[n] for n, pair in enumerate(pairs)):
            model.start = [(choices[n][pair], 1.0) for n, pair in enumerate(pairs)]
    end = None if time_limit is None else time.perf_counter() + time_limit
    known = (mip.OptimizationStatus.OPTIMAL, mip.OptimizationStatus.FEASIBLE)
    while True:
        limit = mip.INF if end is None else max(end - time.perf_counter(), 1e-3)
        status = model.optimize(max_seconds=limit)
        if status in (mip.OptimizationStatus.INFEASIBLE, mip.OptimizationStatus.NO_SOLUTION_FOUND):
            return None, end is None or time.perf_counter() < end  # CBC does not always tell the two apart
        if status not in known:
            msg = f"The solver stopped with status {status.name} before it proved an optimum; this should not happen."
            raise MPQError(msg)
        result = [max(pairs, key=lambda pair, pairs=pairs: pairs[pair].x) for pairs in choices]  # type: ignore[misc]
        weight, activation = np.array(result).T
        if problem.feasible(weight, activation):
            return (weight, activation), end is None or status == mip.OptimizationStatus.OPTIMAL
        # over a budget by less than the solver's tolerance: exclude this policy and ask again
        model += mip.xsum(choices[n][pair] for n, pair in enumerate(result)) <= len(result) - 1
