"""
Does importance choose better bits? Fine-tuned accuracy of policies at the same BitOps, by where the choice came from.

    python benchmarks/importance.py --output results            # everything; what is in results already is not repeated
    python benchmarks/importance.py --output results --table    # only the tables of what is there
"""

from __future__ import annotations

import time

from policy_accuracy import FINE_TUNING, SAMPLES, Trained, arguments, remarks, run, table_of

from nncf_mpq_plugin import comparison
from nncf_mpq_plugin.allocation import prepare, search
from nncf_mpq_plugin.batches import Batches
from nncf_mpq_plugin.importance import importance_from_scales
from nncf_mpq_plugin.refine import refine
from nncf_mpq_plugin.sensitivity import fisher_importance, loss_change_importance
from nncf_mpq_plugin.types import Budget, ImportanceTable, Policy

EVALUATIONS = 24  # of policies in the joint model, for a refinement
METHODS = (
    "uniform",
    *(f"scale, alpha {alpha:g}" for alpha in (2, 1, 0.5)),
    *(f"fisher, alpha {alpha:g}" for alpha in (0.25, 0.125, 0.0625, 0.5, 1)),
    *("fisher, refined", "fisher per layer, alpha 0.5", "loss change, alpha 0.5"),
    *("reversed", "shuffled", "inverse size", "random 0", "random 1"),
)


def importance(net: Trained, source: str) -> tuple[ImportanceTable, float]:
    """:return: the table of a source, and the seconds that it took."""
    if source not in net.tables:
        begin = time.process_time()
        batches = Batches(net.data.train, seed=net.seed).take(SAMPLES)
        if source == "scale":
            net.tables[source] = importance_from_scales(net.quantized)
        elif source == "fisher per layer":
            net.tables[source] = fisher_importance(net.quantized, batches)
        elif source == "fisher":
            net.tables[source] = fisher_importance(net.as_fine_tuned(), batches)
        else:
            net.tables[source] = loss_change_importance(net.as_fine_tuned(), batches)
        net.seconds[source] = time.process_time() - begin
    return net.tables[source], net.seconds[source]


def policy_of(method: str, net: Trained, budget: Budget) -> tuple[Policy, float]:
    """:return: a method's policy, and the seconds that it took beyond joint training."""
    kind, _, detail = method.partition(", ")
    source = kind if kind in ("scale", "loss change", "fisher per layer") else "fisher"
    table, seconds = importance(net, source)
    begin = time.process_time()
    if kind == "uniform":
        return comparison.uniform(table, budget), 0.0
    if kind.startswith("random"):
        return comparison.random(table, budget, seed=100 * net.seed + int(kind.split()[1])), 0.0
    if detail == "refined":
        alphas = {
            f"scale, alpha {alpha}": search(importance(net, "scale")[0], budget, alpha=alpha).policy.layers
            for alpha in (0.5, 1, 2)
        }
        refinement = refine(prepare(table, budget), net.joint_loss(), candidates=alphas, evaluations=EVALUATIONS)
        policy = refinement.solution.policy
    elif kind == "reversed":
        policy = search(comparison.reversed_importance(table), budget).policy
    elif kind in ("shuffled", "inverse size"):
        policy = comparison.policy_by_name(kind.replace(" ", "_"), table, budget, seed=net.seed)
    else:
        policy = search(table, budget, alpha=float(detail.split()[1])).policy
    return policy, seconds + time.process_time() - begin


def main() -> None:
    """Command line."""
    parser = arguments(__doc__, METHODS, runs=2)
    parser.add_argument("--bits", nargs="+", type=float, default=[3, 2.5])
    parser.add_argument("--epochs", type=int, default=FINE_TUNING.epochs, help="of fine-tuning")
    options = parser.parse_args()
    schedule = "" if options.epochs == FINE_TUNING.epochs else f", {options.epochs} epochs"
    budgets = [f"{level:g} bits{schedule}" for level in options.bits]
    run(options, budgets, policy_of, lambda *found: [table_of(*found), *remarks(found[-1])])


if __name__ == "__main__":
    main()
