"""
Which settings of joint training choose better bits? Fine-tuned accuracy by setting, each one change from the default.

    python benchmarks/joint_settings.py --output results            # what is in results already is not repeated
    python benchmarks/joint_settings.py --output results --table    # only the tables of what is there

For each setting one joint training, importance `fisher` at its default alpha, the program's policy within the budget,
and a fine-tuning from the floating-point weights and the trained scales. A default is to be chosen on the validation
digits; the test digits are for reporting. Seconds are CPU time of one thread.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import cluttered_digits
from importance import importance, policy_of
from policy_accuracy import (
    BITS,
    JOINT,
    Results,
    Trained,
    accuracy,
    arguments,
    begun_table,
    budget_of,
    fine_tuned,
    floating,
    placed,
    report,
    trained,
)
from rich.table import Table

from nncf_mpq_plugin.joint import JointConfig, train_jointly
from nncf_mpq_plugin.training import weights_of
from nncf_mpq_plugin.types import ImportanceTable, write_json

METHOD = "fisher, alpha 0.25"


@dataclass(frozen=True)
class Setting:
    """
    :param joint: joint training.
    :param bits: bit widths of its passes; the search chooses among ``BITS`` whatever they are.
    """

    joint: JointConfig
    bits: tuple[int, ...] = BITS


DEFAULT = "default"
SETTINGS: Mapping[str, Setting] = {
    DEFAULT: Setting(JOINT),
    "batch norm shared": Setting(replace(JOINT, batch_norm="shared")),
    "batch norm frozen": Setting(replace(JOINT, batch_norm="frozen")),
    "distillation 0.5": Setting(replace(JOINT, distillation=0.5)),
    "weights not trained": Setting(replace(JOINT, train_weights=False)),
    "scales' rate x 0.1": Setting(replace(JOINT, scale_learning_rate=0.1 * JOINT.learning_rate)),
    "scale_bit_decay 0.316": Setting(replace(JOINT, scale_bit_decay=0.316)),
    "8 bits among the passes": Setting(JOINT, (*BITS, 8)),
}


def measurements(
    names: Sequence[str], seeds: Sequence[int], budgets: Sequence[str], settings: Sequence[str], runs: int, output: Path
) -> Iterator[str]:
    """
    Measure what ``output`` lacks, settings innermost: every setting sees the same seeds, wherever it is stopped.

    :param budgets: as "2.5 bits".
    :param runs: fine-tunings with data in different orders.
    :return: one line for each measurement.
    """
    data = cluttered_digits.load()
    for name in names:
        for seed in seeds:
            for setting in settings:
                paths = {
                    (budget, run): output / f"{name}-{seed}" / f"{budget}, run {run}, {setting}.json"
                    for budget in budgets
                    for run in range(runs)
                }
                missing = {key: path for key, path in paths.items() if not path.exists()}
                if missing:
                    net = trained_as(setting, name, seed, data, output)
                for (budget, run), path in missing.items():
                    result = measure(net, budget, run)
                    write_json(path, result)
                    yield (
                        f"{name}, seed {seed}, {budget}, run {run}, {setting}: validation {result['validation']:.4f}, "
                        f"test {result['test']:.4f}"
                    )


def trained_as(setting: str, name: str, seed: int, data: cluttered_digits.Digits, output: Path) -> Trained:
    """:return: the network after one of the ``SETTINGS``, its importance measured."""
    if setting == DEFAULT:
        return trained(name, seed, data, output)
    wanted, folder = SETTINGS[setting], output / f"{name}-{seed}"
    model, state = floating(name, seed, data, folder)
    quantized = placed(model, seed, data, wanted.bits)
    original, begin = weights_of(quantized.model), time.process_time()
    train_jointly(quantized, data.train, replace(wanted.joint, seed=seed))
    seconds = {"joint training": time.process_time() - begin}
    net = Trained(name, seed, quantized, original, data, folder, state["test"], seconds)
    net.tables["fisher"] = among(BITS, importance(net, "fisher")[0])
    return net


def among(bits: tuple[int, ...], table: ImportanceTable) -> ImportanceTable:
    """:return: the table with ``bits`` as the only candidates."""
    layers = (
        replace(layer, weight={b: layer.weight[b] for b in bits}, activation={b: layer.activation[b] for b in bits})
        for layer in table.layers
    )
    return replace(table, bits=bits, layers=tuple(layers))


def measure(net: Trained, budget: str, run: int) -> dict[str, Any]:
    """Choose a policy, fine-tune it and evaluate it."""
    policy, _ = policy_of(METHOD, net, budget_of(budget, net))
    model, took = fine_tuned(net, policy, run)
    return {
        "policy": policy.to_json(),
        "seconds": {**net.seconds, "fine-tuning": took},
        "validation": accuracy(model, net.data, "validation"),
        "test": accuracy(model, net.data, "test"),
    }


def table_of(name: str, budget: str, results: Results) -> Table:
    """:return: one row a setting: accuracy on validation digits by seed (mean over runs), its mean, on test digits."""
    headings = ("mean", "less default", "test", "runs", "joint s")
    table, seeds = begun_table(name, budget, results, headings)
    for setting in (setting for setting in SETTINGS if setting in results):
        means = _means(results[setting], "validation")
        differences = [
            means[seed] - base for seed, base in _means(results.get(DEFAULT, {}), "validation").items() if seed in means
        ]
        every = [result for runs in results[setting].values() for result in runs]
        cells = [f"{means[seed]:.2f}" if seed in means else "-" for seed in seeds]
        cells.append(f"{statistics.mean(means.values()):.2f}")
        cells.append(f"{statistics.mean(differences):+.2f}" if differences else "-")
        cells.append(f"{statistics.mean(_means(results[setting], 'test').values()):.2f}")
        cells.append(str(len(every)))
        table.add_row(setting, *cells, f"{statistics.mean(r['seconds']['joint training'] for r in every):.0f}")
    return table


def _means(by_seed: Mapping[int, Sequence[Mapping[str, Any]]], part: str) -> dict[int, float]:
    return {seed: 100 * statistics.mean(result[part] for result in runs) for seed, runs in by_seed.items()}


def main() -> None:
    """Command line."""
    parser = arguments(__doc__, list(SETTINGS), runs=1)
    parser.add_argument("--bits", nargs="+", type=float, default=[2.5])
    options = parser.parse_args()
    budgets = [f"{level:g} bits" for level in options.bits]
    wanted = options.networks, options.seeds, budgets, options.methods, options.runs
    report(options, budgets, measurements(*wanted, options.output), lambda *found: [table_of(*found)])


if __name__ == "__main__":
    main()
