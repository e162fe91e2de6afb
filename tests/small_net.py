"""A small hand-built network with quantizers, as an adapter would hand it over."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from nncf_mpq_plugin.placement import PlacedLayer, QuantizedModel
from nncf_mpq_plugin.quantizer import MultiBitQuantizer, quantizers_of
from nncf_mpq_plugin.types import LayerBits, LayerCost

CLASSES = 4


class SmallNet(nn.Module):
    """Stem, depthwise pair with a residual around it, two layers that read one tensor, classifier."""

    def __init__(self, bits: tuple[int, ...] = (2, 3, 4), width: int = 8, dropout: float = 0.0):
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, padding=1, bias=False)
        self.bn0 = nn.BatchNorm2d(width)
        self.depthwise = nn.Conv2d(width, width, 3, padding=1, groups=width, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.pointwise = nn.Conv2d(width, width, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.left = nn.Conv2d(width, width, 3, stride=2, bias=False)
        self.right = nn.Conv2d(width, width, 3, stride=2)
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(width, CLASSES)
        eight, candidates = (8,), bits
        self.q_input = MultiBitQuantizer(eight, signed=True)
        self.q_depthwise = MultiBitQuantizer(candidates, signed=False)
        self.q_pointwise = MultiBitQuantizer(candidates, signed=False)
        self.q_stored = MultiBitQuantizer(eight, signed=False)
        self.q_pair = MultiBitQuantizer(candidates, signed=False)
        self.q_pair.behind = self.q_stored
        self.q_head = MultiBitQuantizer(eight, signed=False)
        self.w = nn.ModuleDict(
            {
                name: MultiBitQuantizer(eight if name in ("stem", "head") else candidates, signed=True, weight=True)
                for name in ("stem", "depthwise", "pointwise", "left", "right", "head")
            }
        )

    def _conv(self, layer: nn.Conv2d, x: Tensor, name: str) -> Tensor:
        return layer._conv_forward(x, self.w[name](layer.weight), layer.bias)

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn0(self._conv(self.stem, self.q_input(x), "stem")).relu()
        y = self.bn1(self._conv(self.depthwise, self.q_depthwise(x), "depthwise")).relu()
        y = self.bn2(self._conv(self.pointwise, self.q_pointwise(y), "pointwise"))
        x = self.q_stored((x + y).relu())
        x = self.q_pair(x)
        x = self._conv(self.left, x, "left").relu() + self._conv(self.right, x, "right").relu()
        x = self.dropout(self.q_head(x.mean((2, 3))))
        return nn.functional.linear(x, self.w["head"](self.head.weight), self.head.bias)


def small_model(seed: int = 0, **options: object) -> QuantizedModel:
    """:return: the network with scales initialised by statistics."""
    torch.manual_seed(seed)
    model = SmallNet(**options)  # type: ignore[arg-type]
    groups = {"stem": "stem", "depthwise": "depthwise", "pointwise": "pointwise", "left": "left", "right": "left"}
    groups["head"] = "head"
    layers = tuple(
        PlacedLayer(
            LayerCost(name, 1000, model.get_parameter(f"{name}.weight").numel(), group),
            LayerBits(8, 8) if name in ("stem", "head") else None,
        )
        for name, group in groups.items()
    )
    quantized = QuantizedModel(
        model,
        layers,
        dict(model.w.items()),  # type: ignore[arg-type]
        {
            "stem": model.q_input,
            "depthwise": model.q_depthwise,
            "pointwise": model.q_pointwise,
            "left": model.q_pair,
            "head": model.q_head,
        },
        {"stored": model.q_stored},
        positive=(model.bn0.weight, model.bn1.weight, model.bn2.weight),
    )
    for quantizer in quantizers_of(model):
        quantizer.start_observing()
    model.train()
    with torch.no_grad():
        for inputs, _ in data():
            model(inputs)
    for quantizer in quantizers_of(model):
        quantizer.finish_observing()
    model.eval()
    return quantized


def data(samples: int = 48, batch: int = 16, seed: int = 1) -> DataLoader:
    """:return: noisy images whose class is the brightest quarter."""
    generator = torch.Generator().manual_seed(seed)
    targets = torch.randint(CLASSES, (samples,), generator=generator)
    images = torch.randn(samples, 3, 8, 8, generator=generator)
    for image, target in zip(images, targets.tolist(), strict=True):
        row, column = divmod(target, 2)
        image[:, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4] += 1.5
    return DataLoader(TensorDataset(images, targets), batch_size=batch)
