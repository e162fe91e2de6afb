"""
Batch norm over the batches of all processes, which makes their training that of one process with the whole batch.

``torch.nn.SyncBatchNorm`` does so on GPUs only, and is another module than the one that NNCF's hooks belong to; so the
operation is replaced here, not the module. It takes one small exchange in each direction (Ioffe and Szegedy, "Batch
Normalization", 2015, section 3: mean and variance of a batch, and the gradients through them).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode


class SynchronizedBatchNorm(TorchFunctionMode):
    """Inside, batch norm in training uses mean and variance over the batches of all processes."""

    def __torch_function__(
        self, func: Callable, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Run the operation as it is, but for batch norm."""
        kwargs = kwargs or {}
        if func is F.batch_norm:
            return _batch_norm(*args, **kwargs)
        if func is torch.batch_norm and not kwargs:  # what NNCF's hooks call in its place
            input, weight, bias, running_mean, running_var, training, momentum, eps, _ = args
            return _batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps)
        return func(*args, **kwargs)


def _batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """As ``torch.nn.functional.batch_norm``, whose parameters these are; every process has as many samples."""
    if not training:
        return F.batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps)
    with torch.no_grad():
        dims = [dim for dim in range(input.dim()) if dim != 1]
        own = torch.stack(torch.var_mean(input, dims, correction=0))
        parts = [torch.empty_like(own) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, own)
        variances, means = torch.stack(parts, 1)
        mean = means.mean(0)
        variance = variances.mean(0) + (means - mean).square().mean(0)
        if running_mean is not None and running_var is not None:
            count = dist.get_world_size() * input.numel() // input.shape[1]
            running_mean.lerp_(mean, momentum)
            running_var.lerp_(variance * (count / max(1, count - 1)), momentum)
    normalized: Tensor = _Normalize.apply(input, weight, bias, mean, variance, eps)
    return normalized


class _Normalize(torch.autograd.Function):
    """``(x - mean) / sqrt(variance + eps) * weight + bias``, where mean and variance are of all processes' x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, *statistics: Any) -> Tensor:
        mean, variance, ctx.eps = statistics
        ctx.save_for_backward(x, weight, mean, variance)
        return F.batch_norm(x, mean, variance, weight, bias, False, 0.0, ctx.eps)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mean, variance = ctx.saved_tensors
        shape = [1, -1] + [1] * (x.dim() - 2)
        dims = [dim for dim in range(x.dim()) if dim != 1]
        inverse = (variance + ctx.eps).rsqrt().reshape(shape)
        normalized = (x - mean.reshape(shape)) * inverse
        sums = torch.stack([grad.sum(dims), (grad * normalized).sum(dims)])
        means = sums.clone()
        dist.all_reduce(means)
        means = (means / (dist.get_world_size() * x.numel() // x.shape[1])).reshape(2, *shape)
        grad_x = (grad - means[0] - normalized * means[1]).mul_(inverse)
        if weight is None:
            return grad_x, None, None, None, None, None
        return grad_x.mul_(weight.reshape(shape)), sums[1], sums[0], None, None, None
