"""
Convolutions whose weight gradient is one matrix product, where oneDNN's is slow.

For each sample oneDNN's kernels go over the whole gradient of a weight. Where that is larger than a core's cache and a
sample has few outputs, as in the last stage of a residual network for small images, this costs more than the
arithmetic; one matrix product over all samples goes over the gradient once. With 9 outputs and AVX512 it is slower.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

LARGE = 4_000_000  # bytes of a weight
FEW = 4  # outputs of a channel, for one sample

Pair = tuple[int, int]


def conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Pair = 1,
    padding: int | Pair | str = 0,
    dilation: int | Pair = 1,
    groups: int = 1,
) -> Tensor:
    """``torch.conv2d``, its arguments and output; the weight's gradient as this module has it where that pays."""
    large = weight.requires_grad and weight.numel() * weight.element_size() >= LARGE
    pairs = isinstance(stride, tuple) and isinstance(padding, tuple) and len(stride) == len(padding) == 2
    plain = pairs and dilation == (1, 1) and groups == 1 and x.dim() == 4 and weight.is_floating_point()
    if large and plain and x.device.type == "cpu" and not torch.is_autocast_enabled("cpu"):
        output: Tensor = _Convolution.apply(x, weight, bias, stride, padding)
        return output
    return torch.conv2d(x, weight, bias, stride, padding, dilation, groups)


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, stride: Pair, padding: Pair) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.stride, ctx.padding = stride, padding
        return torch.conv2d(x, weight, bias, stride, padding)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        few = g.shape[2] * g.shape[3] <= FEW
        wanted = [ctx.needs_input_grad[0], not few, ctx.needs_input_grad[2]]
        options = (g.shape[1:2], ctx.stride, ctx.padding, (1, 1), False, (0, 0), 1)
        gradients = list(torch.ops.aten.convolution_backward(g, x, weight, *options, wanted))
        if few:
            gradients[1] = weight_gradient(x, g, weight.shape, ctx.stride, ctx.padding)
        return (*gradients, None, None)


def weight_gradient(x: Tensor, g: Tensor, shape: torch.Size, stride: Pair, padding: Pair) -> Tensor:
    """
    :param x: input of a convolution, samples x channels x height x width.
    :param g: gradient of its output.
    :param shape: of its weight.
    :return: the weight's gradient.
    """
    windows = nn.functional.pad(x, (padding[1], padding[1], padding[0], padding[0]))
    for dim, (kernel, step) in enumerate(zip(shape[2:], stride, strict=True), start=2):
        windows = windows.unfold(dim, kernel, step)  # in the end samples x channels x output x output x kernel x kernel
    columns = windows.permute(2, 3, 0, 1, 4, 5).flatten(3).flatten(0, 2)
    return (g.permute(2, 3, 0, 1).flatten(0, 2).t() @ columns).view(shape)
