"""Networks, data and configs that the tests of NNCF 2.19 share."""

from __future__ import annotations

from typing import Any

import nncf.torch
import torch
from nncf import NNCFConfig
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

SIZE, CLASSES = 16, 4


class Net(nn.Module):
    """Stem, a residual block with in-place activations, two layers that read one tensor, pooling, classifier."""

    def __init__(self, width: int = 8):
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(width)
        self.conv1 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)
        self.left = nn.Conv2d(width, width, 3, stride=2)
        self.right = nn.Conv2d(width, width, 3, stride=2)
        self.relu = nn.ReLU(inplace=True)
        self.head = nn.Linear(width, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.bn(self.stem(x)))
        y = self.relu(self.bn1(self.conv1(x)))
        x = self.relu(x + self.conv2(y))
        x = self.relu(self.left(x)) + self.relu(self.right(x))
        return self.head(x.mean((2, 3)))


class Depthwise(nn.Module):
    """An inverted residual block with ReLU6, average pooling, and a batch norm that no layer takes in."""

    def __init__(self, width: int = 8):
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, padding=1, bias=False)
        self.expand = nn.Conv2d(width, 2 * width, 1, bias=False)
        self.depthwise = nn.Conv2d(2 * width, 2 * width, 3, padding=1, groups=2 * width, bias=False)
        self.project = nn.Conv2d(2 * width, width, 1, bias=False)
        self.norms = nn.ModuleList(nn.BatchNorm2d(size) for size in (width, 2 * width, 2 * width, width, width))
        self.relu6, self.pool = nn.ReLU6(inplace=True), nn.AvgPool2d(2)
        self.after = nn.Conv2d(width, width, 3)
        self.head = nn.Linear(width, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu6(self.norms[0](self.stem(x)))
        y = self.relu6(self.norms[1](self.expand(x)))
        y = self.relu6(self.norms[2](self.depthwise(y)))
        x = self.pool(x + self.norms[3](self.project(y)))
        x = self.after(self.norms[4](x).relu()).relu()
        return self.head(x.mean((2, 3)))


class Transposed(nn.Module):
    """A transposed convolution between two convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, 6, 3)
        self.up = nn.ConvTranspose2d(6, 4, 2, stride=2)
        self.b = nn.Conv2d(4, 4, 3)

    def forward(self, x):
        return self.b(self.up(self.a(x).relu()).relu()).mean((2, 3))


class Concat(nn.Module):
    """Two branches and their concatenation, which a layer reads; on NPU the branches have one quantizer."""

    def __init__(self, width: int = 8):
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, padding=1)
        self.left = nn.Conv2d(width, width, 1)
        self.right = nn.Conv2d(width, width, 3, padding=1)
        self.after = nn.Conv2d(2 * width, width, 3)
        self.head = nn.Linear(width, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu()
        x = torch.cat([self.left(x).relu(), self.right(x).relu()], 1)
        return self.head(self.after(x).relu().mean((2, 3)))


class Repeated(nn.Module):
    """A convolution that is called twice, behind different quantizers."""

    def __init__(self, bias: bool, width: int = 8):
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, padding=1)
        self.twice = nn.Conv2d(width, width, 3, padding=1, bias=bias)
        self.last = nn.Conv2d(width, width, 3)
        self.head = nn.Linear(width, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.twice(self.stem(x).relu()).relu() * 3
        x = self.last(self.twice(x).relu()).relu()
        return self.head(x.mean((2, 3)))


def data(samples: int = 24, size: int = SIZE, classes: int = CLASSES) -> DataLoader:
    """:return: images whose class shows in the mean of a channel."""
    generator = torch.Generator().manual_seed(1)
    targets = torch.randint(classes, (samples,), generator=generator)
    images = torch.randn(samples, 3, size, size, generator=generator)
    images[:, 0] += targets[:, None, None]
    return DataLoader(TensorDataset(images, targets), batch_size=8)


def settled(model: nn.Module, loader: DataLoader) -> nn.Module:
    """:return: the model with the statistics of the data in its batch norms; else a deep one's activations vanish."""
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = None  # the mean over batches
    with torch.no_grad():
        for images, _ in loader:
            model.train()(images)
    for norm in norms:
        norm.momentum = 0.1
    return model


def config(folder: Any, size: int = SIZE, device: str = "TRIAL", extra: Any = None, **precision: Any) -> dict[str, Any]:
    """:return: a config that is trained in a few steps; ``precision`` are keys of ``initializer.precision``."""
    training = {"epochs": 1, "data_fraction": 1.0, "scale_learning_rate": 1e-4}
    if precision.get("type", "learned_importance") == "learned_importance":
        precision = {
            "type": "learned_importance",
            "joint_training": training,
            "importance": {"samples": 16},
            **precision,
        }
    initializer = {"range": {"num_init_samples": 16}, "batchnorm_adaptation": {"num_bn_adaptation_samples": 0}}
    if precision.get("type") != "none":
        initializer["precision"] = precision
    return {
        "input_info": {"sample_size": [1, 3, size, size]},
        "target_device": device,
        "log_dir": str(folder),
        "compression": {"algorithm": "quantization", "initializer": initializer, **(extra or {})},
    }


def compress(model: nn.Module, json: dict[str, Any], loader: Any = None) -> tuple[Any, nn.Module]:
    """:return: NNCF's controller and model."""
    nncf_config = NNCFConfig.from_dict(json)
    size = json["input_info"]["sample_size"][-1]
    nncf.torch.register_default_init_args(nncf_config, loader or data(size=size), criterion=nn.CrossEntropyLoss())
    return nncf.torch.create_compressed_model(model, nncf_config, dump_graphs=False)


def bits_of(controller: Any) -> dict[str, int]:
    """:return: NNCF's name of each quantizer -> bit width."""
    return {str(key): quantizer.num_bits for key, quantizer in controller.all_quantizations.items()}
