"""
Fine-tuned accuracy of policies within one budget: what the benchmarks that compare ways to choose bits share.

One floating-point and one joint training for each network and seed serve every method; each policy is fine-tuned from
the floating-point weights with one schedule, and equal policies once. Each result is a JSON file and is not repeated.
Test digits are looked at by the last line of each measurement and by nothing else. Seconds are CPU time of one thread.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import cluttered_digits
import torch
from rich.console import Console
from rich.table import Table
from scipy.stats import spearmanr
from torch import Tensor

from nncf_mpq_plugin.adapters.nncf3 import place
from nncf_mpq_plugin.batches import Batches
from nncf_mpq_plugin.checkpoint import load_state, model_tensors, restore_tensors, save_state
from nncf_mpq_plugin.finetune import FinetuneConfig, finetune, with_fine_tuned_granularity
from nncf_mpq_plugin.floating import FloatConfig, train_float
from nncf_mpq_plugin.joint import JointConfig, train_jointly
from nncf_mpq_plugin.networks import digits_mobilenet, digits_resnet
from nncf_mpq_plugin.placement import QuantizedModel
from nncf_mpq_plugin.refine import JointLoss
from nncf_mpq_plugin.training import set_weights, weights_of
from nncf_mpq_plugin.types import AverageBits, Budget, ImportanceTable, Policy, write_json

BITS = (2, 3, 4, 5, 6)
SAMPLES = 256  # that importance is measured on
LOSS_SAMPLES = 512  # that batch norm is re-estimated on, and as many that the loss in the joint model is measured on


@dataclass(frozen=True)
class Network:
    """
    :param make: builds it with random weights.
    :param float_epochs: of floating-point training.
    """

    make: Callable[[], torch.nn.Module]
    float_epochs: int


NETWORKS: Mapping[str, Network] = {
    "depthwise": Network(lambda: digits_mobilenet(width=8, stem_stride=2, blocks=3), 12),
    "residual": Network(lambda: digits_resnet(width=8, stem_stride=2, blocks=3), 12),
}
JOINT = JointConfig(epochs=1, data_fraction=0.9)
FINE_TUNING = FinetuneConfig(epochs=1, learning_rate=0.02)


@dataclass
class Trained:
    """
    One network of one seed, trained in floating point and jointly.

    :param quantized: the jointly trained model.
    :param original: its floating-point weights.
    :param data: its digits.
    :param folder: where its results are.
    :param accuracy: of the floating-point model on test digits.
    :param seconds: what each step took.
    :param tables: importances measured so far, by source.
    """

    name: str
    seed: int
    quantized: QuantizedModel
    original: dict[str, Tensor]
    data: cluttered_digits.Digits
    folder: Path
    accuracy: float
    seconds: dict[str, float]
    tables: dict[str, ImportanceTable] = field(default_factory=dict)

    def as_fine_tuned(self) -> QuantizedModel:
        """:return: the jointly trained model with the weight scales of fine-tuning, one per channel."""
        inputs = Batches(self.data.train, seed=self.seed).take(1)[0][0]
        return with_fine_tuned_granularity(self.quantized, [inputs])

    def joint_loss(self) -> JointLoss:
        """:return: the measure that refinement uses, on training digits that joint training did not see."""
        seen = Batches(self.data.train, seed=self.seed, fraction=JOINT.data_fraction)
        rest = Batches(self.data.train, seed=self.seed, fraction=JOINT.data_fraction, held_back=True)
        return JointLoss(self.as_fine_tuned(), [x for x, _ in seen.take(LOSS_SAMPLES)], rest.take(LOSS_SAMPLES))


PolicyOf = Callable[[str, Trained, Budget], tuple[Policy, float]]
"""(method, network, budget) -> the method's policy and the seconds that it took beyond joint training."""


def floating(
    name: str, seed: int, data: cluttered_digits.Digits, folder: Path
) -> tuple[torch.nn.Module, dict[str, Any]]:
    """:return: the floating-point network, from ``folder`` where it is there, and its ``seconds`` and ``test``."""
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(seed)
    model, path = NETWORKS[name].make(), folder / "float.safetensors"
    if path.exists():
        tensors, state = load_state(path)
        restore_tensors(model, tensors)
        return model.eval(), state
    begin = time.process_time()
    epochs = NETWORKS[name].float_epochs
    train_float(model, data.train, FloatConfig(epochs, learning_rate=0.1, label_smoothing=0.1, seed=seed))
    model.eval()
    state = {"seconds": time.process_time() - begin, "test": accuracy(model, data, "test")}
    save_state(path, model_tensors(model), state)
    return model, state


def placed(
    model: torch.nn.Module, seed: int, data: cluttered_digits.Digits, bits: Sequence[int] = BITS
) -> QuantizedModel:
    """:return: the floating-point network with quantizers of all ``bits``."""
    calibration = [inputs for inputs, _ in Batches(data.train, seed=seed).take(256)]
    return place(model, calibration[0][:1], calibration, bits=bits)


def trained(name: str, seed: int, data: cluttered_digits.Digits, output: Path) -> Trained:
    """:return: from ``output`` where it is there."""
    folder = output / f"{name}-{seed}"
    model, state = floating(name, seed, data, folder)
    seconds = {"float": state["seconds"]}
    quantized = placed(model, seed, data)
    original, path = weights_of(quantized.model), folder / "joint.safetensors"
    if path.exists():
        tensors, seconds["joint training"] = load_state(path)
        restore_tensors(quantized.model, tensors)
    else:
        begin = time.process_time()
        train_jointly(quantized, data.train, replace(JOINT, seed=seed))
        seconds["joint training"] = time.process_time() - begin
        save_state(path, model_tensors(quantized.model), seconds["joint training"])
    quantized.model.eval()
    return Trained(name, seed, quantized, original, data, folder, state["test"], seconds)


def right_answers(model: torch.nn.Module, data: cluttered_digits.Digits, part: str) -> list[int]:
    """:return: for each digit, how many of its renderings the model gets right."""
    with torch.no_grad():
        right = torch.cat([model(inputs).argmax(1) == target for inputs, target in getattr(data, part)])
    return right.reshape(cluttered_digits.RENDERINGS[part], -1).sum(0).tolist()


def accuracy(model: torch.nn.Module, data: cluttered_digits.Digits, part: str) -> float:
    """:return: share of right answers."""
    return statistics.mean(right_answers(model, data, part)) / cluttered_digits.RENDERINGS[part]


def budget_of(name: str, net: Trained) -> Budget:
    """
    :param name: "2.5 bits": the BitOps of uniform 2.5 bits; "size of 3 bits": the bytes of uniform 3-bit weights. What
        is behind a comma is not the budget's, see :func:`schedule_of`.
    """
    level = float(name.partition(", ")[0].split()[-2])
    if not name.startswith("size of "):
        return Budget(average_bits=AverageBits(level, level))
    weights = sum(layer.cost.weights * (layer.fixed.weight if layer.fixed else level) for layer in net.quantized.layers)
    return Budget(model_size_bytes=weights / 8)


def schedule_of(budget: str) -> FinetuneConfig:
    """:return: the fine-tuning at "2.5 bits, 10 epochs"; one epoch where nothing is said."""
    _, _, epochs = budget.partition(", ")
    return replace(FINE_TUNING, epochs=int(epochs.split()[0])) if epochs else FINE_TUNING


def described(budget: str) -> str:
    """:return: a budget's name for people."""
    return f"{budget}, weights alone" if budget.startswith("size of ") else f"BitOps of uniform {budget}"


def measurements(
    names: Sequence[str],
    seeds: Sequence[int],
    budgets: Sequence[str],
    methods: Sequence[str],
    runs: int,
    policy_of: PolicyOf,
    output: Path,
) -> Iterator[str]:
    """
    Measure what ``output`` lacks, seeds innermost: whenever it is stopped, methods are balanced over seeds.

    :param budgets: see :func:`budget_of`.
    :param runs: how often each policy is fine-tuned, with data in different orders.
    :return: one line for each measurement.
    """
    data = cluttered_digits.load()
    nets = {(name, seed): trained(name, seed, data, output) for name in names for seed in seeds}
    for run in range(runs):
        for budget in budgets:
            for method in methods:
                for (name, seed), net in nets.items():
                    path = net.folder / f"{budget}, run {run}, {method}.json"
                    if path.exists():
                        continue
                    result = measure(net, method, budget, run, policy_of)
                    write_json(path, result)
                    yield f"{name}, seed {seed}, {budget}, run {run}, {method}: test {result['test']:.4f}"


def measure(net: Trained, method: str, budget: str, run: int, policy_of: PolicyOf) -> dict[str, Any]:
    """Choose a policy, fine-tune it and evaluate it; a policy that another method chose is not fine-tuned again."""
    policy, search_seconds = policy_of(method, net, budget_of(budget, net))
    chosen = {"search_seconds": search_seconds, "seconds": net.seconds, "policy": policy.to_json()}
    comma, epochs = budget.partition(", ")[1:]
    for path in net.folder.glob(f"* bits{comma}{epochs}, run {run}, *.json"):
        other = json.loads(path.read_text())
        if Policy.from_json(other["policy"]).layers == policy.layers:
            return {**other, **chosen, "same_as": path.stem}
    predicted = net.joint_loss()(policy.layers)
    model, took = fine_tuned(net, policy, run, schedule_of(budget))
    right = right_answers(model, net.data, "test")
    return {
        **chosen,
        "test": statistics.mean(right) / cluttered_digits.RENDERINGS["test"],
        "test_right": right,
        "float": net.accuracy,
        "joint_loss": predicted,
        "fine_tuning_seconds": took,
    }


def fine_tuned(
    net: Trained, policy: Policy, run: int, schedule: FinetuneConfig = FINE_TUNING
) -> tuple[torch.nn.Module, float]:
    """:return: the model, fine-tuned at a policy from its floating-point weights, and the seconds that it took."""
    quantized = copy.deepcopy(net.quantized)
    set_weights(quantized.model, net.original)
    begin = time.process_time()
    finetune(quantized, policy, net.data.train, replace(schedule, seed=1000 * run + net.seed))
    return quantized.model, time.process_time() - begin


Results = dict[str, dict[int, list[dict[str, Any]]]]
Shown = Callable[[str, str, Results], Iterable[Table | str]]


def results_of(name: str, budget: str, output: Path, methods: Sequence[str]) -> Results:
    """:return: method -> seed -> one result for each run."""
    results: Results = {}
    for path in sorted(output.glob(f"{name}-*/{budget}, run *.json")):
        seed, method = int(path.parent.name.rsplit("-", 1)[1]), path.stem.split(", run ")[1].split(", ", 1)[1]
        if method in methods:
            results.setdefault(method, {}).setdefault(seed, []).append(json.loads(path.read_text()))
    return results


def begun_table(name: str, budget: str, results: Results, headings: Sequence[str]) -> tuple[Table, list[int]]:
    """:return: a table without rows (columns: method, seeds, headings), and the seeds."""
    seeds = sorted({seed for by_seed in results.values() for seed in by_seed})
    table = Table(title=f"{name}, {described(budget)}", title_justify="left")
    table.add_column("method")
    for heading in (*(f"seed {seed}" for seed in seeds), *headings):
        table.add_column(heading, justify="right")
    return table, seeds


def table_of(name: str, budget: str, results: Results) -> Table:
    """:return: one row a method: accuracy for each seed (mean over runs), mean over seeds, loss and seconds."""
    headings = ("mean", "runs", "joint loss", "search s", "fine-tuning s")
    table, seeds = begun_table(name, budget, results, headings)
    rows = []
    for method, by_seed in results.items():
        means = {seed: 100 * statistics.mean(result["test"] for result in by_seed[seed]) for seed in by_seed}
        mean, every = statistics.mean(means.values()), [result for runs in by_seed.values() for result in runs]
        others = [statistics.mean(r[key] for r in every) for key in ("joint_loss", "search_seconds")]
        cells = [f"{means[seed]:.2f}" if seed in means else "-" for seed in seeds]
        cells += [f"{mean:.2f}", str(len(every)), f"{others[0]:.3f}", f"{others[1]:.1f}"]
        rows.append((mean, method, [*cells, f"{statistics.mean(r['fine_tuning_seconds'] for r in every):.0f}"]))
    for _, method, cells in sorted(rows, reverse=True):
        table.add_row(method, *cells)
    return table


def remarks(results: Results) -> Iterator[str]:
    """:return: floating point, standard errors, and how well the loss in the joint model orders the policies."""
    seeds = sorted({seed for by_seed in results.values() for seed in by_seed})
    for seed in seeds:
        runs = [result for by_seed in results.values() for result in by_seed.get(seed, [])]
        distinct = {json.dumps(Policy.from_json(r["policy"]).to_json()["policy"]): r for r in runs}.values()
        rank = spearmanr([-r["joint_loss"] for r in distinct], [r["test"] for r in distinct]).statistic
        yield (
            f"seed {seed}: floating point {100 * runs[0]['float']:.2f}; Spearman's correlation of the joint model's "
            f"loss and accuracy over {len(distinct)} policies {rank:.2f}"
        )
    rest = cluttered_digits.RENDERINGS["test"] - 1
    variances = [
        (n / (rest + 1)) * (1 - n / (rest + 1)) / rest
        for by_seed in results.values()
        for runs in by_seed.values()
        for result in runs
        for n in result["test_right"]
    ]
    digits = len(next(iter(next(iter(results.values())).values()))[0]["test_right"])
    error = (statistics.mean(variances) / digits) ** 0.5
    yield f"standard error of an accuracy over renderings of these digits: {100 * error:.2f} points"


def arguments(description: str | None, methods: Sequence[str], runs: int) -> argparse.ArgumentParser:
    """:return: the options that the benchmarks share; ``runs`` is the default of ``--runs``."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder of the results")
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--methods", nargs="+", choices=methods, default=list(methods))
    parser.add_argument("--runs", type=int, default=runs, help="fine-tunings of each policy")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--table", action="store_true", help="print what is there and measure nothing")
    return parser


def run(options: argparse.Namespace, budgets: Sequence[str], policy_of: PolicyOf, shown: Shown) -> None:
    """Measure what is wanted and missing by :func:`measurements`, and print what is there."""
    wanted = options.networks, options.seeds, budgets, options.methods, options.runs
    report(options, budgets, measurements(*wanted, policy_of, options.output), shown)


def report(options: argparse.Namespace, budgets: Sequence[str], lines: Iterable[str], shown: Shown) -> None:
    """
    Print what is measured while it is, and then what is there.

    :param options: of :func:`arguments`.
    :param lines: measures as it is iterated.
    :param shown: (network, budget, results) -> what to print.
    """
    torch.set_num_threads(options.threads)
    console = Console(width=140)
    if not options.table:
        for line in lines:
            console.print(line, highlight=False)
    for network in options.networks:
        for budget in budgets:
            results = results_of(network, budget, options.output, options.methods)
            if results:
                console.print(*shown(network, budget, results), sep="\n", highlight=False)
