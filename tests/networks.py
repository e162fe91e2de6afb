"""Small networks that the tests share."""

import torch
from torch import Tensor, nn


class Block(nn.Module):
    """A residual block, with a convolution on the shortcut where the shape changes."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU()
        self.shortcut = nn.Conv2d(inputs, outputs, 1, stride) if inputs != outputs else None

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        return self.relu(y + (x if self.shortcut is None else self.shortcut(x)))


class Residual(nn.Module):
    """Stem, an identity block, a downsampling block, pooling, classifier; input ``[N, 3, 16, 16]``, 10 classes."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, 1, 1, bias=False)
        self.bn = nn.BatchNorm2d(8)
        self.relu = nn.ReLU()
        self.block1 = Block(8, 8)
        self.block2 = Block(8, 16, 2)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.block2(self.block1(self.relu(self.bn(self.stem(x)))))
        return self.fc(torch.flatten(self.pool(x), 1))


class Branches(nn.Module):
    """Two convolutions that read one tensor, their concatenation, a depthwise convolution, and two linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, 1, 1)
        self.left = nn.Conv2d(8, 8, 1)
        self.right = nn.Conv2d(8, 8, 3, 1, 1)
        self.depthwise = nn.Conv2d(16, 16, 3, 1, 1, groups=16, bias=False)
        self.bn = nn.BatchNorm2d(16)
        self.hidden = nn.Linear(16, 12)
        self.head = nn.Linear(12, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        x = torch.cat([torch.relu(self.left(x)), torch.relu(self.right(x))], 1)
        x = torch.relu(self.bn(self.depthwise(x)))
        return self.head(torch.relu(self.hidden(x.mean((2, 3)))))


class Inverted(nn.Module):
    """Inverted residuals with ReLU6 and linear bottlenecks, as in MobileNetV2, average and max pooling of windows."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, 1, 1, bias=False)
        self.bn = nn.BatchNorm2d(8)
        self.expand = nn.Conv2d(8, 24, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(24)
        self.depthwise = nn.Conv2d(24, 24, 3, 1, 1, groups=24, bias=False)
        self.bn2 = nn.BatchNorm2d(24)
        self.project = nn.Conv2d(24, 8, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(8)
        self.last = nn.Conv2d(8, 16, 1, bias=False)
        self.bn4 = nn.BatchNorm2d(16)
        self.fc = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.max_pool2d(nn.functional.relu6(self.bn(self.stem(x))), 2)
        y = nn.functional.relu6(self.bn1(self.expand(x)))
        y = nn.functional.relu6(self.bn2(self.depthwise(y)))
        x = x + self.bn3(self.project(y))
        x = nn.functional.relu6(self.bn4(self.last(nn.functional.avg_pool2d(x, 2))))
        return self.fc(nn.functional.adaptive_avg_pool2d(x, 1).flatten(1))


class Dense(nn.Module):
    """Layers that read the concatenation of all before them through a batch norm, as in DenseNet, and a transition."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, 1, 1, bias=False)
        self.norms = nn.ModuleList([nn.BatchNorm2d(8 + 4 * index) for index in range(3)])
        self.convs = nn.ModuleList([nn.Conv2d(8 + 4 * index, 4, 3, 1, 1, bias=False) for index in range(2)])
        self.transition = nn.Conv2d(16, 8, 1, bias=False)
        self.last = nn.BatchNorm2d(8)
        self.fc = nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        features = [self.stem(x)]
        for norm, conv in zip(self.norms, self.convs, strict=False):
            features.append(conv(torch.relu(norm(torch.cat(features, 1)))))
        x = self.transition(torch.relu(self.norms[2](torch.cat(features, 1))))
        x = torch.relu(self.last(nn.functional.avg_pool2d(x, 2, 2)))
        return self.fc(nn.functional.adaptive_avg_pool2d(x, 1).flatten(1))


class Merged(nn.Module):
    """Two branches that end in ReLU and are added."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, 1, 1)
        self.left = nn.Conv2d(8, 16, 3, 1, 1, bias=False)
        self.bn = nn.BatchNorm2d(16)
        self.right = nn.Conv2d(8, 16, 1)
        self.last = nn.Conv2d(16, 16, 3, 2, 1)
        self.fc = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        x = torch.relu(self.bn(self.left(x))) + torch.relu(self.right(x))
        return self.fc(torch.relu(self.last(x)).mean((2, 3)))


class SqueezeExcite(nn.Module):
    """An inverted residual with squeeze-and-excitation (hard sigmoid) and hard swish, as in MobileNetV3."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, 1, 1, bias=False)
        self.bn = nn.BatchNorm2d(8)
        self.expand = nn.Conv2d(8, 24, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(24)
        self.depthwise = nn.Conv2d(24, 24, 3, 1, 1, groups=24, bias=False)
        self.bn2 = nn.BatchNorm2d(24)
        self.squeeze = nn.Conv2d(24, 8, 1)
        self.excite = nn.Conv2d(8, 24, 1)
        self.project = nn.Conv2d(24, 8, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(8)
        self.fc = nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.hardswish(self.bn(self.stem(x)))
        y = nn.functional.hardswish(self.bn1(self.expand(x)))
        y = nn.functional.hardswish(self.bn2(self.depthwise(y)))
        scale = self.excite(torch.relu(self.squeeze(nn.functional.adaptive_avg_pool2d(y, 1))))
        y = self.bn3(self.project(y * nn.functional.hardsigmoid(scale)))
        return self.fc((x + y).mean((2, 3)))


class Attention(nn.Module):
    """Patches, one transformer block with pre-normalisation, mean over the tokens, classifier."""

    def __init__(self, width: int = 32, heads: int = 4) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, 4, 4)
        self.position = nn.Parameter(0.02 * torch.randn(1, 16, width))
        self.norm1 = nn.LayerNorm(width)
        self.attention = nn.MultiheadAttention(width, heads, batch_first=True)
        self.norm2 = nn.LayerNorm(width)
        self.hidden = nn.Linear(width, 2 * width)
        self.out = nn.Linear(2 * width, width)
        self.norm3 = nn.LayerNorm(width)
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2) + self.position
        y = self.norm1(x)
        x = x + self.attention(y, y, y, need_weights=False)[0]
        x = x + self.out(nn.functional.gelu(self.hidden(self.norm2(x))))
        return self.head(self.norm3(x).mean(1))


def prepared(network: type[nn.Module], seed: int = 0) -> nn.Module:
    """:return: a network in evaluation mode with batch norm statistics unlike the defaults, negative weights too."""
    torch.manual_seed(seed)
    model = network().eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.weight, 1, 0.7)
            nn.init.normal_(module.bias, 0, 0.3)
            nn.init.normal_(module.running_mean, 0, 0.2)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    return model
