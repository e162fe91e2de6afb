"""
Does importance choose better bits? Fine-tuned accuracy of policies at the same BitOps, by where the choice came from.

    python benchmarks/importance.py --output results            # everything; what is in results already is not repeated
    python benchmarks/importance.py --output results --table    # only the table of what is there

One floating-point and one joint training for each network and seed serve all methods; every policy is fine-tuned from
the floating-point weights with one schedule. Nothing here looks at test data but the last line of each measurement.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cluttered_digits
import torch
from rich.console import Console
from rich.table import Table

from nncf_mpq_plugin import comparison
from nncf_mpq_plugin.adapters.nncf3 import place
from nncf_mpq_plugin.allocation import prepare, search
from nncf_mpq_plugin.batches import Batches
from nncf_mpq_plugin.checkpoint import load_state, model_tensors, restore_tensors, save_state
from nncf_mpq_plugin.finetune import FinetuneConfig, finetune
from nncf_mpq_plugin.floating import FloatConfig, train_float
from nncf_mpq_plugin.importance import importance_from_scales
from nncf_mpq_plugin.joint import JointConfig, train_jointly
from nncf_mpq_plugin.networks import digits_mobilenet, digits_resnet
from nncf_mpq_plugin.placement import QuantizedModel
from nncf_mpq_plugin.refine import JointLoss, refine
from nncf_mpq_plugin.sensitivity import fisher_importance, loss_change_importance
from nncf_mpq_plugin.training import evaluate, set_weights, weights_of
from nncf_mpq_plugin.types import AverageBits, Budget, ImportanceTable, Policy

NETWORKS: Mapping[str, Callable[[], torch.nn.Module]] = {
    "depthwise": lambda: digits_mobilenet(width=12, stem_stride=2),
    "residual": lambda: digits_resnet(width=8, blocks=3),
}
BITS = (2, 3, 4, 5, 6)
SAMPLES = 512
JOINT = JointConfig(epochs=1, data_fraction=0.9)
FINE_TUNING = FinetuneConfig(epochs=2, learning_rate=0.02)
METHODS = (
    *("uniform", "scale, alpha 2", "scale, alpha 1", "scale, alpha 0.5", "fisher, alpha 1", "fisher, alpha 0.5"),
    *("fisher, refined", "loss change, alpha 1", "loss change, alpha 0.5"),
    *("reversed", "shuffled", "inverse size", "random 0", "random 1"),
)


@dataclass
class Trained:
    """
    One network of one seed, trained in floating point and jointly.

    :param quantized: the jointly trained model.
    :param original: its floating-point weights.
    :param seconds: what each step took.
    """

    quantized: QuantizedModel
    original: dict[str, torch.Tensor]
    data: cluttered_digits.Digits
    accuracy: float
    seconds: dict[str, float]
    tables: dict[str, ImportanceTable]


def trained(network: str, seed: int, data: cluttered_digits.Digits, folder: Path) -> Trained:
    """:return: from ``folder`` where it is there."""
    seconds: dict[str, float] = {}
    torch.manual_seed(seed)
    model, path = NETWORKS[network](), folder / "float.safetensors"
    if path.exists():
        tensors, seconds["float"] = load_state(path)
        restore_tensors(model, tensors)
        model.eval()
    else:
        begin = time.perf_counter()
        train_float(model, data.train, FloatConfig(epochs=16, learning_rate=0.1, label_smoothing=0.1, seed=seed))
        seconds["float"] = time.perf_counter() - begin
        save_state(path, model_tensors(model), seconds["float"])
    calibration = [inputs for inputs, _ in Batches(data.train, seed=seed).take(256)]
    quantized = place(model, calibration[0][:1], calibration, bits=BITS)
    original, path = weights_of(quantized.model), folder / "joint.safetensors"
    if path.exists():
        tensors, seconds["joint training"] = load_state(path)
        restore_tensors(quantized.model, tensors)
    else:
        begin = time.perf_counter()
        train_jointly(quantized, data.train, JointConfig(**{**vars(JOINT), "seed": seed}))
        seconds["joint training"] = time.perf_counter() - begin
        save_state(path, model_tensors(quantized.model), seconds["joint training"])
    accuracy = evaluate(model, data.test).accuracy
    assert accuracy is not None
    return Trained(quantized, original, data, accuracy, seconds, {})


def importance(net: Trained, source: str, seed: int) -> tuple[ImportanceTable, float]:
    """:return: the table of a source, and the seconds that it took."""
    if source not in net.tables:
        begin = time.perf_counter()
        batches = Batches(net.data.train, seed=seed).take(SAMPLES)
        if source == "scale":
            net.tables[source] = importance_from_scales(net.quantized)
        elif source == "fisher":
            net.tables[source] = fisher_importance(net.quantized, batches)
        else:
            net.tables[source] = loss_change_importance(net.quantized, batches)
        net.seconds[source] = time.perf_counter() - begin
    return net.tables[source], net.seconds[source]


def joint_loss(net: Trained, seed: int) -> JointLoss:
    """:return: the measure that refinement uses, on training digits that joint training did not see."""
    seen = Batches(net.data.train, seed=seed, fraction=JOINT.data_fraction)
    rest = Batches(net.data.train, seed=seed, fraction=JOINT.data_fraction, held_back=True)
    return JointLoss(copy.deepcopy(net.quantized), [inputs for inputs, _ in seen.take(SAMPLES)], rest.take(SAMPLES))


def policy_of(method: str, net: Trained, budget: Budget, seed: int) -> tuple[Policy, float]:
    """:return: a method's policy, and the seconds that it took beyond joint training."""
    kind, _, detail = method.partition(", ")
    source = {"scale": "scale", "loss change": "loss change"}.get(kind, "fisher")
    table, seconds = importance(net, source, seed)
    begin = time.perf_counter()
    if kind == "uniform":
        policy = comparison.uniform(table, budget)
    elif kind.startswith("random"):
        policy = comparison.random(table, budget, seed=100 * seed + int(kind.split()[1]))
    elif detail == "refined":
        alphas = {
            f"scale, alpha {alpha}": search(importance(net, "scale", seed)[0], budget, alpha=alpha).policy.layers
            for alpha in (0.5, 1, 2)
        }
        refinement = refine(prepare(table, budget), joint_loss(net, seed), candidates=alphas, evaluations=60)
        policy = refinement.solution.policy
    else:
        change = {"reversed": "reversed", "shuffled": "shuffled", "inverse size": "inverse_size"}.get(kind)
        alpha = float(detail.split()[1]) if detail else None
        if change is None:
            policy = search(table, budget, alpha=alpha).policy
        elif change == "reversed":
            policy = search(comparison.reversed_importance(table), budget).policy
        else:
            policy = comparison.policy_by_name(change, table, budget, seed=seed)
    return policy, seconds + time.perf_counter() - begin


def measurements(
    networks: list[str], seeds: list[int], levels: list[float], methods: list[str], output: Path
) -> Iterator[str]:
    """Measure what ``output`` lacks; one line for each measurement."""
    data = cluttered_digits.load()
    for seed in seeds:
        for network in networks:
            folder = output / f"{network}-{seed}"
            folder.mkdir(parents=True, exist_ok=True)
            net = None
            for level in levels:
                for method in methods:
                    path = folder / f"{level:g} bits, {method}.json"
                    if path.exists():
                        continue
                    net = net or trained(network, seed, data, folder)
                    result = measure(net, method, level, seed)
                    path.write_text(json.dumps(result, indent=1))
                    yield f"{network}, seed {seed}, {level:g} bits, {method}: test {result['test']:.4f}"


def measure(net: Trained, method: str, level: float, seed: int) -> dict[str, Any]:
    """Choose a policy, fine-tune it and evaluate it."""
    budget = Budget(average_bits=AverageBits(level, level))
    policy, search_seconds = policy_of(method, net, budget, seed)
    predicted = joint_loss(net, seed)(policy.layers)
    quantized = copy.deepcopy(net.quantized)
    set_weights(quantized.model, net.original)
    begin = time.perf_counter()
    finetune(quantized, policy, net.data.train, FinetuneConfig(**{**vars(FINE_TUNING), "seed": seed}))
    took = time.perf_counter() - begin
    return {
        "validation": evaluate(quantized.model, net.data.validation).accuracy,
        "test": evaluate(quantized.model, net.data.test).accuracy,
        "float": net.accuracy,
        "joint_loss": predicted,
        "search_seconds": search_seconds,
        "fine_tuning_seconds": took,
        "seconds": net.seconds,
        "policy": policy.to_json(),
    }


def table_of(network: str, level: float, output: Path) -> Table:
    """:return: one row a method: accuracy for each seed, mean, spread, seconds."""
    results: dict[str, dict[int, dict[str, Any]]] = {}
    for path in sorted(output.glob(f"{network}-*/{level:g} bits, *.json")):
        seed, method = int(path.parent.name.rsplit("-", 1)[1]), path.stem.split(", ", 1)[1]
        results.setdefault(method, {})[seed] = json.loads(path.read_text())
    seeds = sorted({seed for by_seed in results.values() for seed in by_seed})
    table = Table(title=f"{network}, BitOps of uniform {level:g} bits", title_justify="left")
    table.add_column("method")
    for heading in (*(f"seed {seed}" for seed in seeds), "mean", "joint loss", "search s", "fine-tuning s"):
        table.add_column(heading, justify="right")
    rows = []
    for method, by_seed in results.items():
        mean = statistics.mean(result["test"] for result in by_seed.values())
        numbers = [f"{100 * by_seed[seed]['test']:.2f}" if seed in by_seed else "-" for seed in seeds]
        others = [
            statistics.mean(result[key] for result in by_seed.values())
            for key in ("joint_loss", "search_seconds", "fine_tuning_seconds")
        ]
        rows.append(
            (mean, method, [*numbers, f"{100 * mean:.2f}", f"{others[0]:.3f}", *(f"{x:.1f}" for x in others[1:])])
        )
    for _, method, numbers in sorted(rows, reverse=True):
        table.add_row(method, *numbers)
    return table


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder of the results")
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--bits", nargs="+", type=float, default=[3, 2.5])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--table", action="store_true", help="print what is there and measure nothing")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    console = Console(width=140)
    if not options.table:
        for line in measurements(options.networks, options.seeds, options.bits, options.methods, options.output):
            console.print(line, highlight=False)
    for network in options.networks:
        for level in options.bits:
            console.print(table_of(network, level, options.output))


if __name__ == "__main__":
    main()
