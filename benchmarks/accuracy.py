"""
Does learned importance pay? Fine-tuned accuracy of ways to choose bits, at equal BitOps and at equal size.

    python benchmarks/accuracy.py --output results            # everything; what is in results already is not repeated
    python benchmarks/accuracy.py --output results --table    # only the tables of what is there

Budgets: "2.5 bits" is the BitOps of uniform 2.5 bits, "size of 3 bits" the bytes of uniform 3-bit weights. Methods:
learned importance at its defaults, uniform bits, ten random policies that use up the budget, reversed importance
(layers swap their importances by rank), and HAWQ-V2's Hessian traces in the same program (hessian.py).
"""

from __future__ import annotations

import statistics
import time
from typing import Any

import importance
from hessian import hessian_importance
from policy_accuracy import SAMPLES, Results, Trained, arguments, begun_table, run
from rich.table import Table

from nncf_mpq_plugin.allocation import search
from nncf_mpq_plugin.batches import Batches
from nncf_mpq_plugin.types import Budget, Policy

VECTORS = 16  # of Hutchinson's estimate, for each of 4 batches
RANDOM = tuple(f"random {index}" for index in range(10))
METHODS = ("learned", "uniform", "hessian", "reversed", *RANDOM)
BUDGETS = ("4 bits", "3 bits", "2.5 bits", "size of 3 bits")
AS_IN_IMPORTANCE = {"learned": "fisher, alpha 0.25"}


def policy_of(method: str, net: Trained, budget: Budget) -> tuple[Policy, float]:
    """:return: a method's policy, and the seconds that it took beyond joint training."""
    if method != "hessian":
        return importance.policy_of(AS_IN_IMPORTANCE.get(method, method), net, budget)
    begin = time.process_time()
    if method not in net.tables:
        batches = Batches(net.data.train, seed=net.seed).take(SAMPLES)
        net.tables[method] = hessian_importance(net.quantized, net.original, batches, VECTORS, net.seed)
        net.seconds[method] = time.process_time() - begin
        begin = time.process_time()
    policy = search(net.tables[method], budget, alpha=1).policy
    return policy, net.seconds[method] + time.process_time() - begin


def table_of(name: str, budget: str, results: Results) -> Table:
    """:return: one row a method, random policies together: accuracy by seed, its mean and range, and what it cost."""
    headings = ("mean", "lowest", "highest", "policies", "search s")
    table, seeds = begun_table(name, budget, results, headings)
    rows: dict[str, dict[int, list[dict[str, Any]]]] = {}
    for method in METHODS:
        for seed, runs in results.get(method, {}).items():
            rows.setdefault(method.split()[0], {}).setdefault(seed, []).extend(runs)
    means = {
        method: {seed: 100 * statistics.mean(result["test"] for result in runs) for seed, runs in by_seed.items()}
        for method, by_seed in rows.items()
    }
    for method in sorted(rows, key=lambda method: -statistics.mean(means[method].values())):
        every = [result for runs in rows[method].values() for result in runs]
        tests = [100 * result["test"] for result in every]
        numbers = [statistics.mean(means[method].values()), min(tests), max(tests)]
        cells = [f"{means[method][seed]:.2f}" if seed in means[method] else "-" for seed in seeds]
        cells += [*(f"{number:.2f}" for number in numbers), str(len(every)), seconds_of(method, every)]
        table.add_row(method, *cells)
    return table


def seconds_of(method: str, results: list[dict[str, Any]]) -> str:
    """:return: mean CPU seconds from the floating-point model to the policy."""
    if method in ("uniform", "random"):
        return "0"
    joint = statistics.mean(result["seconds"]["joint training"] for result in results)
    own = statistics.mean(result["search_seconds"] for result in results)
    return f"{own:.1f}" if method == "hessian" else f"{joint:.0f} + {own:.1f}"


def main() -> None:
    """Command line."""
    parser = arguments(__doc__, METHODS, runs=1)
    parser.add_argument("--budgets", nargs="+", default=list(BUDGETS))
    options = parser.parse_args()
    run(options, options.budgets, policy_of, lambda *found: [table_of(*found)])


if __name__ == "__main__":
    main()
