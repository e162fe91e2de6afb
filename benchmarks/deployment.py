"""
Does the deployed model compute what was trained, at INT8 speed, in as few bytes as its bits?

Each network is trained shortly on a small task (ten patterns under noise, 64x64), gets a random policy over
{2, 3, 4, 5, 6, 8} bits ("A8": of weights, activations at 8 bits; "W4": weights at 4 bits, activations in floating
point), is fine-tuned at these bits and exported. Four steps, each of which leaves ``STEP.json`` in the network's folder
under ``--output`` and is left out where that exists:

* ``train``;
* ``contract``: agreement with torch of the IR and of the ONNX file in OpenVINO and in ONNX Runtime, with the machine's
  own instruction set and, in a process of its own, with ``ONEDNN_MAX_CPU_ISA=AVX2``;
* ``files``: of the models that it is timed beside;
* ``cost``: latency against FP32, INT8 (NNCF's post-training quantization) and a naive export, share of INT8 kernels,
  size against the sum of weights x bits, load time and memory; convolutional networks at 224x224.

    python benchmarks/deployment.py [NETWORK ...] [--only STEP] [--run RUN] [--output DIR] [--seconds 3] [--threads 2]

prints the tables of everything that is there. ``vit_b_16`` and what is named after it are not trained: they are here
for speed and size. ``--run`` adds the result of a finished run, e.g. the demo's.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torchvision
from torch import Tensor, nn

from nncf_mpq_plugin import deploy
from nncf_mpq_plugin.adapters import nncf3
from nncf_mpq_plugin.checkpoint import load_state, model_tensors, restore_tensors, save_state
from nncf_mpq_plugin.deploy import measurement
from nncf_mpq_plugin.finetune import FinetuneConfig, finetune, reduce_to_policy
from nncf_mpq_plugin.floating import FloatConfig, train_float
from nncf_mpq_plugin.types import LayerBits, Policy, read_json, write_json

BITS = (2, 3, 4, 5, 6, 8)
STEPS = ("train", "contract", "files", "cost")
CLASSES, BATCH, TRAIN, VERIFY = 10, 32, 384, 256
ISA = {"ONEDNN_MAX_CPU_ISA": "AVX2"}
BYTES = 4  # of a weight scale, a bias and a parameter that is not quantized


@dataclass(frozen=True)
class Network:
    """
    :param build: takes ``num_classes``.
    :param size: edge of the images that it is trained and compared on.
    :param timed: edge of the images that it is timed on.
    :param epochs: of the training in floating point; fine-tuning takes half as many.
    :param rate: learning rate of the former; a fifth of it in fine-tuning.
    :param samples: compared with torch.
    :param calibration: samples that ranges come from.
    :param target: ``deploy.target``.
    :param weight: bits of all searched weights; None for random ones.
    :param activation: of all searched activations, likewise; 32 leaves them in floating point.
    """

    build: Callable[..., nn.Module]
    size: int = 64
    timed: int = 224
    epochs: int = 6
    rate: float = 0.05
    samples: int = VERIFY
    calibration: int = 128
    target: str = "openvino"
    weight: int | None = None
    activation: int | None = None


small_vit = partial(
    torchvision.models.VisionTransformer,
    image_size=64,
    patch_size=8,
    num_layers=6,
    num_heads=4,
    hidden_dim=192,
    mlp_dim=768,
)


def squeezenet(num_classes: int) -> nn.Module:
    """SqueezeNet with outputs that are above zero at first: as torchvision begins, its last ReLU cuts them all off."""
    model = torchvision.models.squeezenet1_1(num_classes=num_classes, dropout=0.0)
    last = model.classifier[1]
    nn.init.kaiming_uniform_(last.weight)
    nn.init.ones_(last.bias)
    return model


untrained = partial(Network, torchvision.models.vit_b_16, size=224, epochs=0, samples=16, calibration=8)
NETWORKS: Mapping[str, Network] = {
    "resnet18": Network(torchvision.models.resnet18),
    "resnet18 (ORT)": Network(torchvision.models.resnet18, target="onnxruntime"),
    "mobilenet_v2": Network(torchvision.models.mobilenet_v2),
    "mobilenet_v2 (A8)": Network(torchvision.models.mobilenet_v2, activation=8),
    "squeezenet1_1": Network(squeezenet, epochs=40, rate=0.001),
    "densenet121": Network(torchvision.models.densenet121),
    "vit": Network(small_vit, timed=64, rate=0.01),
    "vit_b_16": untrained(),
    "vit_b_16 (W4)": untrained(weight=4, activation=32),
}


def build(name: str) -> nn.Module:
    torch.manual_seed(0)
    return NETWORKS[name].build(num_classes=CLASSES).eval()


def examples(name: str, count: int, seed: int) -> list[tuple[Tensor, Tensor]]:
    """Batches of ten fixed random patterns, shifted and under noise."""
    size = NETWORKS[name].size
    patterns = torch.randn(CLASSES, 3, size, size, generator=torch.Generator().manual_seed(0))
    patterns = nn.functional.avg_pool2d(patterns, 5, 1, 2) * 3
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(CLASSES, (count,), generator=generator)
    shifts = torch.randint(-4, 5, (count, 2), generator=generator).tolist()
    images = torch.stack(
        [patterns[label].roll(shift, (1, 2)) for label, shift in zip(labels.tolist(), shifts, strict=True)]
    )
    images += 0.7 * torch.randn(images.shape, generator=generator)
    return list(zip(images.split(BATCH), labels.split(BATCH), strict=True))


def chosen_policy(name: str, quantized: nncf3.NNCFQuantizedModel, seed: int) -> Policy:
    network, choose = NETWORKS[name], random.Random(seed).choice
    groups = {group: network.activation or choose(BITS) for group in quantized.searchable_groups}
    return Policy(
        {
            layer.cost.name: LayerBits(network.weight or choose(BITS), groups[layer.cost.activation_group])
            for layer in quantized.searchable
        }
    )


def average_bits(policy: Policy) -> list[float]:
    """:return: of weights and of activations, over the searched layers."""
    layers = policy.layers.values()
    return [sum(b.weight for b in layers) / len(layers), sum(b.activation for b in layers) / len(layers)]


def accuracy(model: nn.Module, data: Sequence[tuple[Tensor, Tensor]]) -> float:
    with torch.no_grad():
        return sum(int((model(x).argmax(1) == y).sum()) for x, y in data) / sum(len(y) for _, y in data)


def placed(name: str, floating: nn.Module) -> nncf3.NNCFQuantizedModel:
    calibration = [x for x, _ in examples(name, NETWORKS[name].calibration, 1)]
    target = NETWORKS[name].target
    return nncf3.place(floating, calibration[0][:1], calibration, bits=BITS, target=target)


def train(name: str, seed: int, folder: Path) -> dict[str, Any]:
    network = NETWORKS[name]
    floating = build(name)
    data = examples(name, TRAIN if network.epochs else network.calibration, 1)
    if network.epochs:
        train_float(floating, data, FloatConfig(epochs=network.epochs, learning_rate=network.rate))
    save_state(folder / "float.safetensors", model_tensors(floating), {})
    quantized = placed(name, floating)
    policy = chosen_policy(name, quantized, seed)
    config = FinetuneConfig(epochs=network.epochs // 2, learning_rate=network.rate / 5)
    if network.epochs:
        finetune(quantized, policy, data, config)
    else:
        reduce_to_policy(quantized, policy, [data[0][0]])
    save_state(folder / "quantized.safetensors", model_tensors(quantized.model), {})
    quantized.policy().save(folder / "policy.json")
    return {"policy_seed": seed}


def trained(name: str, folder: Path) -> tuple[nn.Module, nncf3.NNCFQuantizedModel]:
    """:return: the floating-point network and the fine-tuned one that :func:`train` left."""
    floating = build(name)
    restore_tensors(floating, load_state(folder / "float.safetensors")[0])
    quantized = placed(name, floating)
    policy = Policy.load(folder / "policy.json")
    reduce_to_policy(quantized, policy, [x for x, _ in examples(name, 1, 1)])
    restore_tensors(quantized.model, load_state(folder / "quantized.safetensors")[0])
    quantized.model.eval()
    return floating, quantized


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


def contract(name: str, folder: Path) -> dict[str, Any]:
    floating, quantized = trained(name, folder / "trained")
    frozen, data = nncf3.freeze(quantized), examples(name, NETWORKS[name].samples, 2)
    nncf3.save_model(folder / "model", frozen)
    deploy.export(frozen, data[0][0][:1], folder / "deploy")
    report = verified(name, frozen, folder)
    command = [sys.executable, __file__, "--verify", name, str(folder)]
    subprocess.run(command, env={**os.environ, **ISA}, check=True, stdout=subprocess.DEVNULL)
    return {
        "network": name,
        "average_bits": average_bits(quantized.policy()),
        "accuracy": {"floating": accuracy(floating, data), "mixed": accuracy(frozen, data)},
        "native": report,
        "avx2": read_json(folder / "avx2.json"),
        "size": {
            "weights": (folder / "deploy" / "model.bin").stat().st_size,
            "smallest": smallest_bytes(floating, quantized),
        },
    }


def verified(name: str, frozen: nn.Module, folder: Path) -> dict[str, Any]:
    network = NETWORKS[name]
    samples = [x for x, _ in examples(name, network.samples, 2)]
    return deploy.verify(frozen, folder / "deploy", samples, target=network.target).to_json()


def verify_again(name: str, folder: Path) -> None:
    """In a process with another instruction set."""
    frozen = nncf3.load_model(folder / "model", build(name))
    write_json(folder / "avx2.json", verified(name, frozen, folder))


def sample_inputs(name: str) -> list[Tensor]:
    """:return: one batch, of the size that is timed."""
    batch, _ = examples(name, min(BATCH, NETWORKS[name].calibration), 1)[0]
    return [nn.functional.interpolate(batch, NETWORKS[name].timed)]


def prepare(name: str, folder: Path) -> dict[str, Any]:
    """The exported files and those that they are compared with, for the timed size."""
    floating, inputs = build(name), sample_inputs(name)
    restore_tensors(floating, load_state(folder / "trained" / "float.safetensors")[0])
    frozen = nncf3.load_model(folder / "model", build(name))
    deploy.export(frozen, inputs[0][:1], folder / "timed")
    baselines, left_out = measurement.make_baselines(floating, frozen, inputs, folder / "timed")
    return {"baselines": {model: str(path) for model, path in baselines.items()}, "left_out": left_out}


def cost(name: str, folder: Path, seconds: float, threads: int) -> dict[str, Any]:
    files = read_json(folder / "files.json")
    baselines = {model: Path(path) for model, path in files["baselines"].items()}
    policy = Policy.load(folder / "trained" / "policy.json").all_layers
    bits = {layer: (b.weight, b.activation) for layer, b in policy.items()}
    sample, left_out = sample_inputs(name)[0][:1], files["left_out"]
    report = measurement.measure(folder / "timed", baselines, sample, bits, left_out, seconds=seconds, threads=threads)
    return report.to_json()


def run_step(step: str, name: str, folder: Path, options: argparse.Namespace) -> None:
    """Make what a step leaves, unless it is there."""
    if (folder / f"{step}.json").exists():
        return
    made = {
        "train": lambda: train(name, options.policy_seed, folder / "trained"),
        "contract": lambda: contract(name, folder),
        "files": lambda: prepare(name, folder),
        "cost": lambda: cost(name, folder, options.seconds, options.threads),
    }[step]()
    write_json(folder / f"{step}.json", made)


def of_run(run: Path, folder: Path, options: argparse.Namespace) -> None:
    """Contract and cost of a finished run, by the commands that a user has."""

    def command(*arguments: str, **environment: str) -> dict[str, Any]:
        full = [sys.executable, "-m", "nncf_mpq_plugin", *arguments, "--json"]
        done = subprocess.run(full, env={**os.environ, **environment}, capture_output=True, text=True)
        value: dict[str, Any] = json.loads(done.stdout)
        return value.get("report", value)

    if options.only in (None, "contract") and not (folder / "contract.json").exists():
        summary = read_json(run / "summary.json")
        results = summary["results"]
        found = {
            "network": run.name,
            "average_bits": average_bits(Policy.load(run / "policy.json")),
            "accuracy": {name: results[name]["accuracy"] for name in ("float", "mixed")},
            "native": command("verify", str(run)),
            "avx2": command("verify", str(run), **ISA),
            "size": None,
        }
        write_json(folder / "contract.json", found)
    if options.only in (None, "cost") and not (folder / "cost.json").exists():
        seconds, threads = str(options.seconds), str(options.threads)
        made = command("benchmark", str(run), "--seconds", seconds, "--threads", threads)
        write_json(folder / "cost.json", made)


def percent(value: float) -> str:
    return f"{100 * value:.4g}%"


def agreement_row(result: Mapping[str, Any]) -> dict[str, str]:
    def runtimes(report: Mapping[str, Any], suffix: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
        for runtime in report["runtimes"]:
            yield runtime["name"].removeprefix("OpenVINO ") + suffix, runtime

    reports = (result["native"], ""), (result["avx2"], ", AVX2")
    columns = {"torch's own float64": result["native"]["torch_float64"]}
    columns |= {name: found for report, suffix in reports for name, found in runtimes(report, suffix)}
    required = [runtime for runtime in columns.values() if runtime["required"]]
    bits = " / ".join(f"{value:.1f}" for value in result["average_bits"])
    accuracies = " / ".join(f"{value:.0%}" for value in result["accuracy"].values() if value is not None)
    return {
        "network": result["network"],
        "W / A bits": bits,
        "accuracy, FP32 / mixed": accuracies,
        **{name: f"{percent(c['agreeing'])} ({percent(c['mean_difference'])})" for name, c in columns.items()},
        "top-1 the same": percent(min(runtime["top1"] for runtime in required)),
        "contract": "kept" if all(report["ok"] for report, _ in reports) else "broken",
    }


def models_of(report: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    return {model["name"]: model for model in report["models"]}


def latency_row(name: str, report: Mapping[str, Any]) -> dict[str, str]:
    models = models_of(report)
    times = {model: measurement.Latency(**figures["latency"]) for model, figures in models.items()}
    naive, mixed, int8 = times.get(measurement.NAIVE), times[measurement.MIXED], times[measurement.INT8]
    default = [measurement.Latency(**models[m]["default_latency"]) for m in (measurement.MIXED, measurement.INT8)]
    return {
        "network": name,
        "input": "x".join(map(str, report["shape"][1:])),
        **{f"{model}, ms": f"{time.median:.2f}" for model, time in times.items()},
        "mixed / INT8": f"{mixed.relative_to(int8):.2f}",
        "the same, default properties": f"{default[0].relative_to(default[1]):.2f}",
        "naive / mixed": f"{naive.relative_to(mixed):.2f}" if naive else "-",
        "ORT / mixed": f"{times[measurement.ONNX_RUNTIME].relative_to(mixed):.2f}",
        "8-bit kernels": percent(models[measurement.MIXED]["integer_share"]),
    }


def size_row(name: str, size: Mapping[str, float] | None, report: Mapping[str, Any]) -> dict[str, str]:
    models = models_of(report)
    mixed, int8 = models[measurement.MIXED], models[measurement.INT8]
    pair = [model["footprint"] for model in (mixed, int8)]
    return {
        "network": name,
        "weights of the IR, kB": f"{(size['weights'] if size else mixed['weight_bytes']) / 1e3:.0f}",
        "of the smallest": f"{size['weights'] / size['smallest']:.3f}" if size else "-",
        "ONNX, kB": f"{models[measurement.ONNX_RUNTIME]['file_bytes'] / 1e3:.0f}",
        "INT8, kB": f"{int8['weight_bytes'] / 1e3:.0f}",
        "FP32, kB": f"{models[measurement.FP32]['weight_bytes'] / 1e3:.0f}",
        "load, ms, mixed / INT8": " / ".join(f"{1e3 * item['load_seconds']:.0f}" for item in pair),
        "memory, MB, mixed / INT8": " / ".join(f"{item['memory_bytes'] / 1e6:.0f}" for item in pair),
    }


def print_table(title: str, rows: Sequence[Mapping[str, str]]) -> None:
    """As Markdown; a row without one of the columns has a dash there."""
    if not rows:
        return
    headings = list(dict.fromkeys(heading for row in rows for heading in row))
    print(f"\n{title}\n")
    print(f"| {' | '.join(headings)} |")
    print(f"|{'---|' * len(headings)}")
    for row in rows:
        print(f"| {' | '.join(row.get(heading, '-') for heading in headings)} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("networks", nargs="*", metavar="NETWORK", help=f"default: {', '.join(NETWORKS)}")
    parser.add_argument("--only", choices=STEPS, metavar="STEP", help=f"one of {', '.join(STEPS)}; default: all")
    parser.add_argument("--run", type=Path, action="append", default=[], help="a finished run's folder")
    parser.add_argument("--output", type=Path, default=Path("runs/deployment"), metavar="DIR", help="where files go")
    parser.add_argument("--policy-seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=3.0, help="measuring time of each model")
    parser.add_argument("--threads", type=int, default=2)
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
    for name in options.networks or ([] if options.run else NETWORKS):
        for step in STEPS if options.only is None else (options.only,):
            print(f"{name}: {step}", file=sys.stderr)
            run_step(step, name, options.output / name, options)
    for run in options.run:
        of_run(run, options.output / run.name, options)
    print_tables([options.output / name for name in (*NETWORKS, *(run.name for run in options.run))])


def print_tables(folders: Sequence[Path]) -> None:
    def made(step: str) -> dict[str, dict[str, Any]]:
        return {f.name: read_json(f / f"{step}.json") for f in folders if (f / f"{step}.json").exists()}

    contracts, costs = made("contract"), made("cost")
    title = "Samples that agree with torch (mean difference), of the output's standard deviation"
    print_table(title, [agreement_row(result) for result in contracts.values()])
    print_table("One inference, median", [latency_row(name, report) for name, report in costs.items()])
    sizes = {name: contracts[name]["size"] if name in contracts else None for name in costs}
    print_table("Size, load time and memory", [size_row(name, sizes[name], costs[name]) for name in costs])
    for machine in dict.fromkeys(
        f"{r['cpu']} ({', '.join(r['capabilities'])}), {r['threads']} threads" for r in costs.values()
    ):
        print(f"\n{machine}")


if __name__ == "__main__":
    main()
