"""What joint training, fine-tuning and evaluation share: outputs, losses, batch-norm statistics, weights."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from nncf_mpq_plugin.batches import split_batch
from nncf_mpq_plugin.errors import InputError
from nncf_mpq_plugin.placement import QuantizedModel
from nncf_mpq_plugin.quantizer import MultiBitQuantizer, quantizers_of

LossFunction = Callable[[Any, Any], Tensor]
Progress = Callable[[int, int, Mapping[str, float]], None]
"""Called after each step with (steps done, steps in all, latest numbers)."""


def main_output(output: Any) -> Tensor:
    """
    :param output: a tensor, a tuple or list that begins with one, or a mapping with ``logits`` or ``out`` (or one
        tensor only).
    :return: the tensor that losses and accuracy are computed on.
    :raises InputError: for anything else.
    """
    if isinstance(output, Tensor):
        return output
    if isinstance(output, list | tuple) and output and isinstance(output[0], Tensor):
        return output[0]
    if isinstance(output, Mapping):
        for key in ("logits", "out"):
            if isinstance(output.get(key), Tensor):
                return output[key]
        tensors = [value for value in output.values() if isinstance(value, Tensor)]
        if len(tensors) == 1:
            return tensors[0]
    logits = getattr(output, "logits", None)
    if isinstance(logits, Tensor):
        return logits
    msg = (
        f"The model returned {type(output).__name__}, in which no single output tensor could be found. Pass your own "
        "loss_fn, or wrap the model to return its logits."
    )
    raise InputError(msg)


def observe(model: nn.Module, quantizers: Iterable[MultiBitQuantizer], batches: Iterable[Tensor]) -> None:
    """
    Let quantizers see the values of a model that they leave as they are; each has to finish observing afterwards.

    :param batches: inputs.
    """
    for quantizer in quantizers:
        quantizer.start_observing()
    device = device_of(model)
    with torch.no_grad():
        for batch in batches:
            model(batch.to(device))


def cross_entropy(label_smoothing: float = 0.0) -> LossFunction:
    """:return: (output, target) -> mean cross entropy; targets are class indices ``[B]`` or probabilities."""

    def loss(output: Any, target: Any) -> Tensor:
        output = main_output(output)
        if target is None:
            msg = "The data loader gives no targets: pass (input, target) pairs, or set label_free."
            raise InputError(msg)
        classes = output.shape[1] if output.dim() > 1 else 0
        if (
            not target.is_floating_point()
            and target.numel()
            and not 0 <= int(target.min()) <= int(target.max()) < classes
        ):
            msg = (
                f"Targets range from {int(target.min())} to {int(target.max())}, but the model has {classes} outputs. "
                "Check the data's class numbers and the model's last layer."
            )
            raise InputError(msg)
        return F.cross_entropy(output, target, label_smoothing=label_smoothing)

    return loss


def output_distance(output: Any, reference: Any) -> Tensor:
    """
    Distance of outputs to those of a reference model: the loss of distillation and of training without labels.

    :param output: logits ``[B, C]`` or any other output.
    :param reference: the reference's, detached.
    :return: mean over samples of the cross entropy to the reference's class probabilities less its entropy
        (Kullback-Leibler divergence) for ``[B, C]``, otherwise the mean squared difference over the reference's
        variance.
    """
    output, reference = main_output(output), main_output(reference).detach()
    if output.dim() == 2 and output.shape[1] > 1:
        return F.kl_div(F.log_softmax(output, 1), F.log_softmax(reference, 1), reduction="batchmean", log_target=True)
    return F.mse_loss(output, reference) / reference.var(correction=0).clamp_min(1e-12)


@dataclass(frozen=True)
class Evaluation:
    """
    :param loss: mean over samples.
    :param accuracy: share of samples whose largest output is the target; None without class targets.
    :param samples: how many.
    """

    loss: float
    accuracy: float | None
    samples: int


def evaluate(
    model: nn.Module, loader: Iterable, device: torch.device | str | None = None, *, loss_fn: LossFunction | None = None
) -> Evaluation:
    """
    Loss and top-1 accuracy in evaluation mode; the model's mode is as before afterwards.

    :param loader: yields (input, target).
    :param device: default: where the model's parameters are.
    :param loss_fn: default: cross entropy.
    :raises InputError: if the loader is empty or gives no targets.
    """
    device = device_of(model) if device is None else torch.device(device)
    loss_fn = loss_fn or cross_entropy()
    loss = torch.zeros((), dtype=torch.float64, device=device)
    hits = torch.zeros((), dtype=torch.int64, device=device)
    samples = classified = 0
    with torch.no_grad(), evaluation_mode(model):
        for batch in loader:
            inputs, target = to_device(split_batch(batch), device)
            output = model(inputs)
            count = len(inputs)
            loss += loss_fn(output, target).double() * count
            samples += count
            logits = main_output(output)
            if (
                isinstance(target, Tensor)
                and target.dim() == 1
                and not target.is_floating_point()
                and logits.dim() == 2
            ):
                hits += (logits.argmax(1) == target).sum()
                classified += count
    if not samples:
        msg = "The data loader is empty: there is nothing to evaluate."
        raise InputError(msg)
    return Evaluation(loss.item() / samples, hits.item() / classified if classified else None, samples)


def device_of(model: nn.Module) -> torch.device:
    """:return: where the model's first parameter is; the CPU for a model without any."""
    return next((parameter.device for parameter in model.parameters()), torch.device("cpu"))


def to_device(value: Any, device: torch.device) -> Any:
    """:return: ``value`` with every tensor in it (lists, tuples and dicts are searched) on ``device``."""
    if isinstance(value, Tensor):
        return value.to(device, non_blocking=True)
    if isinstance(value, list | tuple):
        return type(value)(to_device(item, device) for item in value)
    if isinstance(value, dict):
        return {key: to_device(item, device) for key, item in value.items()}
    return value


@contextlib.contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Evaluation mode inside, and every module's own mode again afterwards."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


@contextlib.contextmanager
def quantizers_off(model: nn.Module) -> Iterator[None]:
    """Floating point inside: every quantizer passes its input through."""
    states = {quantizer: quantizer.enabled for quantizer in quantizers_of(model)}
    for quantizer in states:
        quantizer.enabled = False
    try:
        yield
    finally:
        for quantizer, enabled in states.items():
            quantizer.enabled = enabled


def floating_point_copy(model: nn.Module) -> nn.Module:
    """:return: a frozen copy in evaluation mode with its quantizers off, to serve as a teacher."""
    twin = copy.deepcopy(model).eval().requires_grad_(False)
    for quantizer in quantizers_of(twin):
        quantizer.enabled = False
    return twin


def named_quantizers(quantized: QuantizedModel) -> dict[str, MultiBitQuantizer]:
    """:return: ``<layer>.weight``, ``<group>.activation`` and ``<hook>.stored`` -> quantizer, each quantizer once."""
    named = {f"{layer}.weight": quantizer for layer, quantizer in quantized.weight_quantizers.items()}
    named |= {f"{group}.activation": quantizer for group, quantizer in quantized.activation_quantizers.items()}
    named |= {f"{hook}.stored": quantizer for hook, quantizer in quantized.stored_quantizers.items()}
    seen: set[int] = set()
    return {name: q for name, q in named.items() if not (id(q) in seen or seen.add(id(q)))}  # type: ignore[func-returns-value]


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    """:return: copies of all parameters and buffers but those of quantizers, by name."""
    own = {id(tensor) for quantizer in quantizers_of(model) for tensor in quantizer.parameters()}
    named = [*model.named_parameters(), *model.named_buffers()]
    return {name: tensor.detach().clone() for name, tensor in named if id(tensor) not in own}


def set_weights(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """:param weights: what :func:`weights_of` gave; copied into the model, quantizers stay as they are."""
    named = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    with torch.no_grad():
        for name, value in weights.items():
            named[name].copy_(value)


def batch_norms(model: nn.Module) -> list[_BatchNorm]:
    """:return: the batch norm modules that keep running statistics."""
    return [m for m in model.modules() if isinstance(m, _BatchNorm) and m.running_mean is not None]


def freeze_batch_norm(model: nn.Module) -> None:
    """Let every batch norm use its running statistics and keep them, until the next ``train()``."""
    for module in batch_norms(model):
        module.eval()


class BatchNormStatistics:
    """
    Running statistics of every batch norm module, one set per key (a bit width, say), swapped in and out.

    Modules and parameters stay the same objects; only the buffers are exchanged. Sets start as copies of the model's.

    :param keys: names of the sets; the first one is the model's own buffers.
    """

    BUFFERS = ("running_mean", "running_var", "num_batches_tracked")

    def __init__(self, model: nn.Module, keys: Sequence[Hashable]):
        self._modules = batch_norms(model)
        own = [{name: getattr(module, name) for name in self.BUFFERS} for module in self._modules]
        self._sets = {
            key: own if index == 0 else [{n: b.clone() if b is not None else None for n, b in m.items()} for m in own]
            for index, key in enumerate(keys)
        }

    def use(self, key: Hashable) -> None:
        """Make the set of ``key`` the one that the modules read and update."""
        for module, buffers in zip(self._modules, self._sets[key], strict=True):
            for name, buffer in buffers.items():
                module._buffers[name] = buffer

    def tensors(self) -> dict[str, Tensor]:
        """:return: every statistic by name, for saving and, by copying into them, for restoring."""
        return {
            f"{key}/{index}/{name}": buffer
            for key, modules in self._sets.items()
            for index, buffers in enumerate(modules)
            for name, buffer in buffers.items()
            if buffer is not None
        }


def reestimate_batch_norm(
    model: nn.Module, inputs: Iterable[Tensor], modules: Sequence[_BatchNorm] | None = None
) -> None:
    """
    Replace running statistics by the averages over some batches at the bit widths in force.

    A batch norm that no batch comes to keeps its statistics, and all do when something is raised on the way.

    :param inputs: batches ``[B, ...]``; a few hundred samples in all are enough to rank policies.
    :param modules: whose statistics; default: :func:`batch_norms`.
    """
    modules = batch_norms(model) if modules is None else modules
    if not modules:
        return
    before = [(module.momentum, {name: b.clone() for name, b in module.named_buffers()}) for module in modules]
    complete, seen = False, 0
    with torch.no_grad(), evaluation_mode(model):
        for module in modules:
            module.reset_running_stats()
            module.training = True
        try:
            for batch in inputs:
                seen += len(batch)
                for module in modules:
                    module.momentum = len(batch) / seen
                model(batch)
            complete = True
        finally:
            for module, (momentum, buffers) in zip(modules, before, strict=True):
                module.momentum = momentum
                if not complete or module.num_batches_tracked == 0:
                    for name, buffer in module.named_buffers():
                        buffer.copy_(buffers[name])
