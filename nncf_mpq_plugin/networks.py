"""
Two small networks for the demo, tests and benchmarks: residual (shared tensors) and depthwise (hard at low bits).

Both follow the CIFAR forms of their families, see [ResNet] He et al., "Deep Residual Learning for Image Recognition",
CVPR 2016, section 4.2, and [MobileNetV2] Sandler et al., "MobileNetV2: Inverted Residuals and Linear Bottlenecks",
CVPR 2018, section 3.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class ResidualBlock(nn.Module):
    """
    Two 3x3 convolutions and a shortcut, a 1x1 convolution where the shape changes.

    :param inputs: channels of the input.
    :param outputs: channels of the output.
    :param stride: stride of the first convolution.
    """

    def __init__(self, inputs: int, outputs: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.downsample: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.downsample = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        """:param x: ``[N, inputs, H, W]``. :return: ``[N, outputs, H / stride, W / stride]``."""
        y = torch.relu(self.bn1(self.conv1(x)))
        return torch.relu(self.bn2(self.conv2(y)) + self.downsample(x))


class InvertedResidual(nn.Module):
    """
    1x1 expansion, 3x3 depthwise convolution, linear 1x1 projection; a shortcut where the shape stays.

    :param inputs: channels of the input.
    :param outputs: channels of the output.
    :param stride: stride of the depthwise convolution.
    :param expansion: hidden channels / input channels.
    """

    def __init__(self, inputs: int, outputs: int, stride: int, expansion: int):
        super().__init__()
        hidden = inputs * expansion
        self.expand = _convolution(inputs, hidden, 1, nn.ReLU6)
        self.depthwise = _convolution(hidden, hidden, 3, nn.ReLU6, stride=stride, groups=hidden)
        self.project = nn.Sequential(nn.Conv2d(hidden, outputs, 1, bias=False), nn.BatchNorm2d(outputs))
        self.shortcut = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        """:param x: ``[N, inputs, H, W]``. :return: ``[N, outputs, H / stride, W / stride]``."""
        y = self.project(self.depthwise(self.expand(x)))
        return x + y if self.shortcut else y


class Classifier(nn.Module):
    """
    Stem, blocks, average over positions, and a linear layer.

    :param stem: the first layers.
    :param blocks: the blocks.
    :param head: layers before pooling.
    :param features: channels of the pooled map.
    :param num_classes: outputs.
    """

    def __init__(self, stem: nn.Module, blocks: list[nn.Module], head: nn.Module, features: int, num_classes: int):
        super().__init__()
        self.stem = stem
        self.blocks = nn.Sequential(*blocks)
        self.head = head
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Linear(features, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """:param x: ``[N, channels, H, W]``. :return: ``[N, num_classes]``."""
        return self.classifier(torch.flatten(self.pool(self.head(self.blocks(self.stem(x)))), 1))


def _convolution(
    inputs: int, outputs: int, size: int, activation: type[nn.Module], stride: int = 1, groups: int = 1
) -> nn.Sequential:
    convolution = nn.Conv2d(inputs, outputs, size, stride, size // 2, groups=groups, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(outputs), activation())


def digits_resnet(
    num_classes: int = 10, channels: int = 1, width: int = 16, blocks: int = 2, stem_stride: int = 1
) -> nn.Module:
    """
    Residual network with three stages of ``width``, 2 ``width`` and 4 ``width`` channels [ResNet].

    :param num_classes: outputs.
    :param channels: channels of the input; its size is free.
    :param width: channels of the first stage.
    :param blocks: blocks in a stage.
    :param stem_stride: stride of the first convolution.
    :return: a network ``[N, channels, H, W] -> [N, num_classes]`` with random weights.
    """
    layers: list[nn.Module] = []
    inputs = width
    for stage in range(3):
        for block in range(blocks):
            layers.append(ResidualBlock(inputs, width << stage, 2 if stage and not block else 1))
            inputs = width << stage
    stem = _convolution(channels, width, 3, nn.ReLU, stem_stride)
    return Classifier(stem, layers, nn.Identity(), inputs, num_classes)


def digits_mobilenet(
    num_classes: int = 10,
    channels: int = 1,
    width: int = 16,
    expansion: int = 4,
    stem_stride: int = 1,
    blocks: int = 2,
) -> nn.Module:
    """
    Network of inverted residual blocks in three stages [MobileNetV2].

    :param num_classes: outputs.
    :param channels: channels of the input; its size is free.
    :param width: channels of the first stage; the others have 1.5 and 2 times as many.
    :param expansion: hidden channels / input channels of a block.
    :param stem_stride: stride of the first convolution (2 in the original, for larger images).
    :param blocks: blocks in a stage.
    :return: a network ``[N, channels, H, W] -> [N, num_classes]`` with random weights.
    """
    layers: list[nn.Module] = []
    inputs = width
    for stage, outputs in enumerate((width, width * 3 // 2, width * 2)):
        for block in range(blocks):
            layers.append(InvertedResidual(inputs, outputs, 2 if stage and not block else 1, expansion))
            inputs = outputs
    stem = _convolution(channels, width, 3, nn.ReLU6, stem_stride)
    head = _convolution(inputs, inputs * 4, 1, nn.ReLU6)
    return Classifier(stem, layers, head, inputs * 4, num_classes)
