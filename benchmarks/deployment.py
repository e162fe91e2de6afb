"""
Does the deployed model compute what was trained, at INT8 speed, in as few bytes as its bits?

Each network is trained shortly on a small task (ten patterns under noise, 64x64), gets a random policy over
{2, 3, 4, 5, 6, 8} bits, is fine-tuned at these bits and exported. Printed are:

* the contract: agreement with torch of the IR and of the ONNX file in OpenVINO and in ONNX Runtime, with the machine's
  own instruction set and, in a process of its own, with ``ONEDNN_MAX_CPU_ISA=AVX2``;
* latency against INT8 (NNCF's post-training quantization) and a naive export, share of INT8 kernels, size against the
  sum of weights x bits, load time and memory. Convolutional networks are timed at 224x224.

    python benchmarks/deployment.py [NETWORK ...] [--run RUN] [--seconds 3] [--threads 2] [--json FILE]

``--run`` adds the result of a finished run, e.g. the demo's.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torchvision
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from nncf_mpq_plugin import deploy
from nncf_mpq_plugin.adapters import nncf3
from nncf_mpq_plugin.finetune import FinetuneConfig, finetune
from nncf_mpq_plugin.floating import FloatConfig, train_float
from nncf_mpq_plugin.types import LayerBits, Policy, read_json, write_json

BITS = (2, 3, 4, 5, 6, 8)
SIZE, LATENCY_SIZE, CLASSES, BATCH, TRAIN, VERIFY = 64, 224, 10, 32, 384, 256
ISA = {"ONEDNN_MAX_CPU_ISA": "AVX2"}
BYTES = 4  # of a weight scale, a bias and a parameter that is not quantized

vit = partial(
    torchvision.models.VisionTransformer,
    image_size=SIZE,
    patch_size=8,
    num_layers=6,
    num_heads=4,
    hidden_dim=192,
    mlp_dim=768,
)
NETWORKS: Mapping[str, Callable[..., nn.Module]] = {
    "resnet18": torchvision.models.resnet18,
    "mobilenet_v2": torchvision.models.mobilenet_v2,
    "squeezenet1_1": torchvision.models.squeezenet1_1,
    "densenet121": torchvision.models.densenet121,
    "vit": vit,
}
ADAM = {"vit", "squeezenet1_1"}  # networks without batch norm


def build(name: str) -> nn.Module:
    torch.manual_seed(0)
    return NETWORKS[name](num_classes=CLASSES).eval()


def examples(count: int, seed: int) -> list[tuple[Tensor, Tensor]]:
    """Batches of ten fixed random patterns, shifted and under noise."""
    patterns = torch.randn(CLASSES, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0))
    patterns = nn.functional.avg_pool2d(patterns, 5, 1, 2) * 3
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(CLASSES, (count,), generator=generator)
    shifts = torch.randint(-4, 5, (count, 2), generator=generator).tolist()
    images = torch.stack(
        [patterns[label].roll(shift, (1, 2)) for label, shift in zip(labels.tolist(), shifts, strict=True)]
    )
    images += 0.7 * torch.randn(images.shape, generator=generator)
    return list(zip(images.split(BATCH), labels.split(BATCH), strict=True))


def random_policy(quantized: nncf3.NNCFQuantizedModel, seed: int) -> dict[str, LayerBits]:
    choose = random.Random(seed).choice
    groups = {group: choose(BITS) for group in quantized.searchable_groups}
    return {
        layer.cost.name: LayerBits(choose(BITS), groups[layer.cost.activation_group]) for layer in quantized.searchable
    }


def accuracy(model: nn.Module, data: Sequence[tuple[Tensor, Tensor]]) -> float:
    with torch.no_grad():
        return sum(int((model(x).argmax(1) == y).sum()) for x, y in data) / sum(len(y) for _, y in data)


def trained(name: str, seed: int, epochs: int) -> tuple[nn.Module, nn.Module, nncf3.NNCFQuantizedModel, list[float]]:
    """:return: the floating-point network, the frozen one, the quantized one, and the accuracies of the first two."""
    train, validation = examples(TRAIN, 1), examples(VERIFY, 2)
    floating = build(name)
    rate = 0.01 if name in ADAM else 0.05
    train_float(floating, train, FloatConfig(epochs=epochs, learning_rate=rate))
    floating.eval()
    calibration = [x for x, _ in train[:4]]
    quantized = nncf3.place(floating, calibration[0][:1], calibration, bits=BITS)
    policy = Policy(random_policy(quantized, seed))
    finetune(quantized, policy, train, FinetuneConfig(epochs=max(1, epochs // 2), learning_rate=rate / 5))
    frozen = nncf3.freeze(quantized)
    return floating, frozen, quantized, [accuracy(floating, validation), accuracy(frozen, validation)]


def smallest_bytes(floating: nn.Module, quantized: nncf3.NNCFQuantizedModel) -> float:
    """Weights at their bits, a scale and a bias for each output channel, all other parameters as floats."""
    policy = quantized.policy().all_layers
    weights = sum(layer.cost.weights * policy[layer.cost.name].weight / 8 for layer in quantized.layers)
    channels = sum(floating.get_parameter(site.weight).shape[0] for site in quantized.sites.values())
    covered = {name for site in quantized.sites.values() for name in (site.weight, site.bias)}
    norms = tuple(f"{site.batch_norm}." for site in quantized.sites.values() if site.batch_norm)
    others = [
        parameter.numel()
        for name, parameter in floating.named_parameters()
        if name not in covered and not name.startswith(norms or ("\0",))
    ]
    return weights + 2 * BYTES * channels + BYTES * sum(others)


def measure(name: str, seed: int, epochs: int, seconds: float, threads: int, folder: Path) -> dict[str, Any]:
    floating, frozen, quantized, accuracies = trained(name, seed, epochs)
    samples = torch.cat([x for x, _ in examples(VERIFY, 2)])
    nncf3.save_model(folder / "model", frozen)
    save_file({"samples": samples}, folder / "samples.safetensors")
    deploy.export(frozen, samples[:1], folder)
    report = deploy.verify(frozen, folder, samples.split(BATCH)).to_json()
    command = [sys.executable, __file__, "--verify", name, str(folder)]
    subprocess.run(command, env={**os.environ, **ISA}, check=True, stdout=subprocess.DEVNULL)
    policy = quantized.policy()
    size = (folder / "model.bin").stat().st_size
    timed, calibration = folder, [x for x, _ in examples(BATCH * 2, 1)]
    if name != "vit":
        timed, calibration = folder / "timed", [nn.functional.interpolate(x, LATENCY_SIZE) for x in calibration]
        deploy.export(frozen, calibration[0][:1], timed)
    bits = {layer: (b.weight, b.activation) for layer, b in policy.all_layers.items()}
    costs = deploy.benchmark(floating, frozen, timed, calibration, bits, seconds=seconds, threads=threads)
    count = len(policy.layers)
    return {
        "network": name,
        "policy_seed": seed,
        "average_bits": [
            sum(b.weight for b in policy.layers.values()) / count,
            sum(b.activation for b in policy.layers.values()) / count,
        ],
        "accuracy": dict(zip(("floating", "mixed"), accuracies, strict=True)),
        "contract": report,
        "contract_avx2": read_json(folder / "verify_avx2.json"),
        "size": {"weights": size, "smallest": smallest_bytes(floating, quantized)},
        "benchmark": costs.to_json(),
    }


def measure_run(run: Path, seconds: float, threads: int) -> dict[str, Any]:
    """The same for a finished run, by the commands that a user has."""

    def command(*arguments: str, **environment: str) -> dict[str, Any]:
        full = [sys.executable, "-m", "nncf_mpq_plugin", *arguments, "--json"]
        done = subprocess.run(full, env={**os.environ, **environment}, capture_output=True, text=True)
        value: dict[str, Any] = json.loads(done.stdout)
        return value.get("report", value)

    own, avx2 = command("verify", str(run)), command("verify", str(run), **ISA)
    costs = command("benchmark", str(run), "--seconds", str(seconds), "--threads", str(threads))
    layers = Policy.load(run / "policy.json").layers.values()
    summary = read_json(run / "summary.json")
    return {
        "network": run.name,
        "average_bits": [
            sum(b.weight for b in layers) / len(layers),
            sum(b.activation for b in layers) / len(layers),
        ],
        "accuracy": {name: summary["results"][name]["accuracy"] for name in ("float", "mixed")},
        "contract": own,
        "contract_avx2": avx2,
        "size": None,
        "benchmark": costs,
    }


def verify_again(name: str, folder: Path) -> None:
    """In a process with another instruction set."""
    frozen = nncf3.load_model(folder / "model", build(name))
    samples = load_file(folder / "samples.safetensors")["samples"]
    write_json(folder / "verify_avx2.json", deploy.verify(frozen, folder, samples.split(BATCH)).to_json())


def contract_table(results: Sequence[Mapping[str, Any]]) -> Table:
    table = Table(title="Samples that agree with torch (mean difference, of the output's standard deviation)")
    table.add_column("network", no_wrap=True)
    for heading in ("W / A bits", "accuracy\nFP32 / mixed", "torch's own\nfloat64"):
        table.add_column(heading, justify="right")
    for heading in ("IR", "ONNX in\nOpenVINO", "ONNX\nRuntime", "IR, AVX2", "IR, default\nproperties", "contract"):
        table.add_column(heading, justify="right")
    for result in results:
        own, avx2 = result["contract"], result["contract_avx2"]
        found = {runtime["name"]: runtime for runtime in own["runtimes"]}
        narrow = {runtime["name"]: runtime for runtime in avx2["runtimes"]}
        columns = [
            own["torch_float64"],
            *(found[name] for name in ("OpenVINO IR", "OpenVINO ONNX", "ONNX Runtime")),
            narrow["OpenVINO IR"],
            found.get("OpenVINO IR, default properties"),
        ]
        shares = [f"{c['agreeing']:.1%} ({c['mean_difference']:.3%})" if c else "-" for c in columns]
        weight, activation = result["average_bits"]
        table.add_row(
            result["network"],
            f"{weight:.1f} / {activation:.1f}",
            " / ".join(f"{value:.0%}" for value in result["accuracy"].values()),
            *shares,
            "kept" if own["ok"] and avx2["ok"] else "broken",
        )
    return table


def cost_table(results: Sequence[Mapping[str, Any]]) -> Table:
    table = Table(title="One inference, median")
    table.add_column("network", no_wrap=True)
    for heading in (
        *("input", "FP32\nms", "INT8\nms", "naive\nms", "mixed\nms", "mixed /\nINT8", "naive /\nmixed"),
        *(
            "INT8\nkernels",
            "weights\nkB",
            "of the\nsmallest",
            "INT8\nkB",
            "load ms\nmixed / INT8",
            "memory MB\nmixed / INT8",
        ),
    ):
        table.add_column(heading, justify="right")
    for result in results:
        models = {model["name"]: model for model in result["benchmark"]["models"]}
        time = {name: model["latency"]["median"] for name, model in models.items()}
        mixed, int8, size = models["mixed"], models["INT8"], result["size"]
        load = [1000 * model["footprint"]["load_seconds"] for model in (mixed, int8)]
        memory = [model["footprint"]["memory_bytes"] / 1e6 for model in (mixed, int8)]
        table.add_row(
            result["network"],
            "x".join(map(str, result["benchmark"]["shape"][1:])),
            f"{time['FP32']:.2f}",
            f"{time['INT8']:.2f}",
            f"{time['naive']:.2f}" if "naive" in time else "-",
            f"{time['mixed']:.2f}",
            f"{time['mixed'] / time['INT8']:.2f}",
            f"{time['naive'] / time['mixed']:.2f}" if "naive" in time else "-",
            f"{mixed['integer_share']:.0%}",
            f"{(size['weights'] if size else mixed['weight_bytes']) / 1e3:.0f}",
            f"{size['weights'] / size['smallest']:.3f}" if size else "-",
            f"{int8['weight_bytes'] / 1e3:.0f}",
            f"{load[0]:.0f} / {load[1]:.0f}",
            f"{memory[0]:.0f} / {memory[1]:.0f}",
        )
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("networks", nargs="*", metavar="NETWORK", help=f"default: {' '.join(NETWORKS)}")
    parser.add_argument("--run", type=Path, action="append", default=[], help="a finished run's folder")
    parser.add_argument("--epochs", type=int, default=6, help="of the training in floating point")
    parser.add_argument("--policy-seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=3.0, help="measuring time of each model")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures to this file")
    parser.add_argument("--verify", nargs=2, metavar=("NETWORK", "FOLDER"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    unknown = sorted(set(options.networks) - set(NETWORKS))
    if unknown:
        parser.error(f"unknown network {unknown[0]!r}; known are {', '.join(NETWORKS)}")
    warnings.simplefilter("ignore")
    torch.set_num_threads(options.threads)
    if options.verify:
        verify_again(options.verify[0], Path(options.verify[1]))
        return
    console, results = Console(), []
    for name in options.networks or ([] if options.run else NETWORKS):
        with tempfile.TemporaryDirectory() as folder:
            console.log(name)
            results.append(
                measure(name, options.policy_seed, options.epochs, options.seconds, options.threads, Path(folder))
            )
            if options.json:
                write_json(options.json, {"results": results})
    for run in options.run:
        console.log(str(run))
        results.append(measure_run(run, options.seconds, options.threads))
    if options.json:
        write_json(options.json, {"results": results})
    console = Console(width=200)
    machine = results[0]["benchmark"]
    console.print(contract_table(results))
    console.print(cost_table(results))
    console.print(f"{machine['cpu']} ({', '.join(machine['capabilities'])}), {machine['threads']} threads")


if __name__ == "__main__":
    main()
