"""Models and data loaders that something is wrong, or unusual, with; a config names them."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset


class Net(nn.Module):
    """Stem, two convolutions and a classifier for ``[N, 1, 8, 8]``, 10 classes; no batch norm."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 4, 3, padding=1)
        self.conv1 = nn.Conv2d(4, 4, 3, padding=1)
        self.conv2 = nn.Conv2d(4, 4, 3, padding=1)
        self.classifier = nn.Linear(4, 10)

    def features(self, x: Tensor) -> Tensor:
        return self.conv2(self.conv1(self.stem(x).relu()).relu()).relu().mean((2, 3))

    def forward(self, x: Tensor) -> object:
        return self.classifier(self.features(x))


class ReturnsDict(Net):
    def forward(self, x: Tensor) -> object:
        return {"out": super().forward(x)}


class ReturnsTuple(Net):
    def forward(self, x: Tensor) -> object:
        return super().forward(x), x


class WithoutLayers(nn.Module):
    """Nothing that could be quantized, though it has a parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(10))

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1)[:, :10] * self.scale


class Dynamic(Net):
    """Control flow that depends on the data: another layer for a bright corner."""

    def forward(self, x: Tensor) -> object:
        x = self.stem(x).relu()
        x = (self.conv1(x) if float(x[0, 0, 0, 0]) > 0.1 else self.conv2(x)).relu()
        return self.classifier(x.mean((2, 3)))


class DynamicLoop(Net):
    """A layer repeated as often as the data says."""

    def forward(self, x: Tensor) -> object:
        x = self.stem(x).relu()
        for _ in range(1 + int(x.sum().abs() * 1000) % 3):
            x = self.conv1(x).relu()
        return self.classifier(self.conv2(x).relu().mean((2, 3)))


class TiedWeights(Net):
    def __init__(self) -> None:
        super().__init__()
        self.conv2.weight = self.conv1.weight


class TiedLayer(Net):
    def features(self, x: Tensor) -> Tensor:
        return self.conv1(self.conv1(self.stem(x).relu()).relu()).relu().mean((2, 3))


class OddNames(nn.Module):
    """Layers whose names are no row of numbers and hold what NNCF's hook names use as separators."""

    NAMES = ("0", "7", "3", "conv__1", "a:b", "a/b", "post_hooks")

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleDict({name: nn.Conv2d(1 if name == "0" else 4, 4, 3, padding=1) for name in self.NAMES})
        self.classifier = nn.Linear(4, 10)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers.values():
            x = layer(x).relu()
        return self.classifier(x.mean((2, 3)))


class Gaps(nn.Module):
    """A sequence with gaps in its numbering, as pruned models have."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential()
        for name, inputs in (("0", 1), ("4", 4), ("17", 4), ("9", 4)):
            self.layers.add_module(name, nn.Conv2d(inputs, 4, 3, padding=1))
            self.layers.add_module(f"relu{name}", nn.ReLU())
        self.classifier = nn.Linear(4, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.layers(x).mean((2, 3)))


class Frozen(Net):
    def __init__(self) -> None:
        super().__init__()
        self.conv1.requires_grad_(False)


def loaders(problem: str = "") -> tuple[DataLoader, DataLoader]:
    """:return: 64 training and 32 validation samples with something wrong with them."""
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(96, 1, 8, 8, generator=generator)
    targets = torch.arange(96) % 10
    train, validation = slice(0, 64), slice(64, 96)
    if problem == "empty":
        validation = slice(0, 0)
    if problem == "shape":
        inputs = torch.randn(96, 3, 8, 8)
    if problem == "label":
        targets[0] = 10
    if problem == "late label":
        targets[60] = 10
    if problem == "late NaN":
        inputs[60] = float("nan")
    parts = [TensorDataset(inputs[part], targets[part]) for part in (train, validation)]
    if problem == "late shape":
        samples = [(torch.zeros(3 if index == 60 else 1, 8, 8), 0) for index in range(64)]
        return DataLoader(samples, 1), DataLoader(parts[1], 16)  # type: ignore[arg-type]
    return DataLoader(parts[0], 16), DataLoader(parts[1], 16)
