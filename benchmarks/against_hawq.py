"""
HAWQ and learned importance in NNCF 2.19: time of the precision initialisation, and whose policy is better by whose
measure. Needs the environment of ``make test-legacy``, from which it is run as often as there are networks and methods
to measure; the last command prints the table:

    export NNCF_TORCH_LEGACY_TRACING=1
    .venv-legacy/bin/python benchmarks/against_hawq.py measured.json resnet18 hawq
    .venv-legacy/bin/python benchmarks/against_hawq.py measured.json resnet18 learned_importance
    .venv-legacy/bin/python benchmarks/against_hawq.py measured.json

Both start from one network, trained for a few steps on images made up at 64x64, and get the same data, candidate bits
(2, 4, 8, every layer searched) and compression_ratio (INT8 over mixed complexity). The time is that of
``create_compressed_model`` less the same without precision initialisation, by the clock and of the processor (all
threads together; this one hardly depends on what else runs). HAWQ runs ``--iterations`` of its default
200 with the tolerance that would end it early switched off; the time of its Hessian traces is proportional to them and
is extrapolated, the rest is as measured.
"""

from __future__ import annotations

import argparse
import copy
import re
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from unittest import mock

import nncf.torch
import numpy as np
import torch
import torchvision
from nncf import NNCFConfig
from nncf.torch.quantization.precision_init.hawq_init import HAWQPrecisionInitializer
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from nncf_mpq_plugin.adapters import nncf2
from nncf_mpq_plugin.adapters.nncf2_limits import int8_ratio
from nncf_mpq_plugin.types import ImportanceTable, LayerBits, Policy, read_json, write_json

BITS = [2, 4, 8]
SIZE, CLASSES, SAMPLES, BATCH = 64, 10, 100, 25  # 100 data points are HAWQ's default
TRAINED_EPOCHS = 4
ITERATIONS = 200  # HAWQ's default
HAWQ, LEARNED = "hawq", nncf2.TYPE


def images() -> DataLoader:
    """:return: images whose class is a pattern in noise."""
    generator = torch.Generator().manual_seed(1)
    patterns = torch.randn(CLASSES, 3, SIZE, SIZE, generator=generator)
    targets = torch.randint(CLASSES, (SAMPLES,), generator=generator)
    inputs = patterns[targets] + torch.randn(SAMPLES, 3, SIZE, SIZE, generator=generator)
    return DataLoader(TensorDataset(inputs, targets), batch_size=BATCH)


def trained(network: str, loader: DataLoader) -> nn.Module:
    """:return: a network of torchvision after a few steps."""
    torch.manual_seed(0)
    model = getattr(torchvision.models, network)(num_classes=CLASSES)
    optimizer = torch.optim.SGD(model.parameters(), 0.02, momentum=0.9)
    for _ in range(TRAINED_EPOCHS):
        for inputs, target in loader:
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(inputs), target).backward()
            optimizer.step()
    return model


def now() -> np.ndarray:
    """:return: seconds by the clock and of the processor."""
    return np.array([time.perf_counter(), time.process_time()])


def compress(model: nn.Module, loader: DataLoader, precision: Mapping[str, Any], folder: Path) -> tuple[Any, list]:
    """:return: NNCF's controller and the seconds of ``create_compressed_model``."""
    initializer = {
        "range": {"num_init_samples": SAMPLES},
        "batchnorm_adaptation": {"num_bn_adaptation_samples": 0},
        **({"precision": dict(precision)} if precision else {}),
    }
    config = NNCFConfig.from_dict(
        {
            "input_info": {"sample_size": [1, 3, SIZE, SIZE]},
            "target_device": "TRIAL",
            "log_dir": str(folder),
            "compression": {"algorithm": "quantization", "initializer": initializer},
        }
    )
    nncf.torch.register_default_init_args(config, loader, criterion=nn.CrossEntropyLoss())
    begin = now()
    controller, _ = nncf.torch.create_compressed_model(copy.deepcopy(model), config, dump_graphs=False)
    return controller, (now() - begin).tolist()


def measure_hawq(model: nn.Module, loader: DataLoader, ratio: float, iterations: int, folder: Path) -> dict[str, Any]:
    """:return: seconds, seconds of the traces, bits by layer, and trace x perturbation by layer and bits."""
    found: dict[str, Any] = {"iterations": iterations}
    traces_of, noise_of = HAWQPrecisionInitializer._calc_traces, HAWQPrecisionInitializer.calc_quantization_noise
    traces: list[Any] = []

    def timed_traces(self: Any, *args: Any) -> Any:
        begin = now()
        traces.append(traces_of(self, *args))
        found["trace_seconds"] = (now() - begin).tolist()
        return traces[-1]

    def recorded_noise(self: Any, sequences: Any, order: Any) -> Any:
        perturbations, observers = noise_of(self, sequences, order)
        names = [layer_name(key.target_node_name) for key in self._weight_quantizations_by_execution_order]
        costs = {}
        for index in range(len(names)):
            layer = order.get_execution_index_by_traces_index(index)
            trace, noise = traces[-1].get_by_trace_index(index), perturbations.get_all()[layer]
            costs[names[layer]] = {str(config.num_bits): float(trace * value) for config, value in noise.items()}
        found["costs"] = costs
        return perturbations, observers

    precision = {
        "type": HAWQ,
        "bits": BITS,
        "num_data_points": SAMPLES,
        "iter_number": iterations,
        "tolerance": 1e-12,
        "compression_ratio": ratio,
    }
    with (
        mock.patch.object(HAWQPrecisionInitializer, "_calc_traces", timed_traces),
        mock.patch.object(HAWQPrecisionInitializer, "calc_quantization_noise", recorded_noise),
    ):
        controller, found["seconds"] = compress(model, loader, precision, folder)
    found["bits"] = {name: [bits.weight, bits.activation] for name, bits in bits_of(controller).items()}
    return found


def measure_learned(model: nn.Module, loader: DataLoader, ratio: float, epochs: int, folder: Path) -> dict[str, Any]:
    """:return: seconds, optimizer steps, bits by layer, and the importance table."""
    precision = {
        "type": LEARNED,
        "bits": BITS,
        "fixed_bits": {},
        "joint_training": {"epochs": epochs, "data_fraction": 1.0},
        "importance": {"samples": SAMPLES},
        "compression_ratio": ratio,
        "dump_init_precision_data": True,
    }
    _, seconds = compress(model, loader, precision, folder)
    dumps = folder / "learned_importance_dumps"
    policy = Policy.load(dumps / "policy.json")
    return {
        "seconds": seconds,
        "epochs": epochs,
        "steps": epochs * len(loader),
        "bits": {name: [bits.weight, bits.activation] for name, bits in policy.layers.items()},
        "table": ImportanceTable.load(dumps / "importance.json").to_json(),
    }


def layer_name(node: str) -> str:
    """:return: module name of NNCF's node, e.g. ``layer1.0.conv1``."""
    return ".".join(re.findall(r"\[([^\]]+)\]", node))


def bits_of(controller: Any) -> dict[str, LayerBits]:
    """:return: bits of each weighted layer; activation bits are the largest of the quantizers that it reads."""
    weights = {
        layer_name(str(key)): info.quantizer_module_ref.num_bits for key, info in controller.weight_quantizers.items()
    }
    activations: dict[str, int] = {}
    for group in controller.groups_of_adjacent_quantizers:
        for key, _ in group.weight_quantizers:
            activations[layer_name(str(key))] = max(native.num_bits for _, native in group.activation_quantizers)
    return {name: LayerBits(bits, activations[name]) for name, bits in weights.items()}


def hawqs_metric(costs: Mapping[str, Mapping[str, float]], bits: Mapping[str, LayerBits]) -> float:
    """:return: sum of trace x perturbation, which HAWQ minimises."""
    return sum(by_bits[str(bits[name].weight)] for name, by_bits in costs.items())


def importance(table: ImportanceTable, bits: Mapping[str, LayerBits]) -> float:
    """:return: the program's objective: alpha x weight importance and, once for each group, activation importance."""
    total, seen = 0.0, set()
    for layer in table.layers:
        width = bits[layer.cost.name]
        total += table.default_alpha * layer.weight[width.weight]
        if layer.cost.activation_group not in seen:
            seen.add(layer.cost.activation_group)
            total += layer.activation[width.activation]
    return total


def table_lines(measured: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    """:return: the table, of the networks that were measured with both methods."""
    yield "| network | method | time | CPU time | compression ratio | HAWQ's metric | importance | average bits W / A |"
    yield "|---|---|---|---|---|---|---|---|"
    for network, found in measured.items():
        if not {HAWQ, LEARNED} <= found.keys():
            continue
        hawq, learned = found[HAWQ], found[LEARNED]
        table = ImportanceTable.from_json(learned["table"])
        spent = {name: np.subtract(found[name]["seconds"], found[name]["plain_seconds"]) for name in (HAWQ, LEARNED)}
        whole = spent[HAWQ] + np.array(hawq["trace_seconds"]) * (ITERATIONS / hawq["iterations"] - 1)
        times = (
            (f"`hawq`, {ITERATIONS} iterations, extrapolated from {hawq['iterations']}", whole, hawq),
            (
                f"`{LEARNED}`, {learned['epochs']} epochs ({learned['steps']} steps)",
                spent[LEARNED],
                learned,
            ),
        )
        for name, seconds, method in times:
            bits = {layer: LayerBits(*pair) for layer, pair in method["bits"].items()}
            averages = [
                sum(getattr(width, kind) for width in bits.values()) / len(bits) for kind in ("weight", "activation")
            ]
            yield (
                f"| {network} | {name} | {seconds[0]:.0f} s | {seconds[1]:.0f} s | {int8_ratio(table, bits):.3f} | "
                f"{hawqs_metric(hawq['costs'], bits):.3g} | {importance(table, bits):.3g} | "
                f"{averages[0]:.1f} / {averages[1]:.1f} |"
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("measured", type=Path, help="JSON file that the measurements are added to")
    parser.add_argument("network", nargs="?", help="of torchvision")
    parser.add_argument("method", nargs="?", choices=(HAWQ, LEARNED))
    parser.add_argument("--ratio", type=float, default=1.5, help="HAWQ's compression_ratio (1.5, its default)")
    parser.add_argument("--iterations", type=int, default=4, help="of HAWQ, measured (4)")
    parser.add_argument("--epochs", type=int, default=5, help="of joint training (5)")
    parser.add_argument("--threads", type=int, default=2, help="of torch (2)")
    options = parser.parse_args()
    measured = read_json(options.measured) if options.measured.exists() else {}
    if options.network is not None and options.method is not None:
        torch.set_num_threads(options.threads)
        nncf2.register()
        loader = images()
        model = trained(options.network, loader)
        with tempfile.TemporaryDirectory() as folder:
            compress(model, loader, {}, Path(folder))  # NNCF loads its extension at the first use
            _, plain = compress(model, loader, {}, Path(folder))
            if options.method == HAWQ:
                found = measure_hawq(model, loader, options.ratio, options.iterations, Path(folder))
            else:
                found = measure_learned(model, loader, options.ratio, options.epochs, Path(folder))
        found["plain_seconds"] = plain
        measured.setdefault(options.network, {})[options.method] = found
        write_json(options.measured, measured)
    for line in table_lines(measured):
        print(line)


if __name__ == "__main__":
    main()
