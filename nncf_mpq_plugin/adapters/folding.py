"""What freezing does alike for every NNCF: batch norms become factors and offsets, and steps leave ties aside."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nncf_mpq_plugin.adapters.plan import Op, Position
from nncf_mpq_plugin.adapters.ties import Steps, read_sums, tie_free
from nncf_mpq_plugin.errors import UnsupportedModelError

DIVERGED = "training has diverged. Train with a lower learning rate (fine_tuning.learning_rate, scale_learning_rate)."


@dataclass(frozen=True)
class Activation:
    """
    An activation quantizer as it was trained.

    :param name: the same for every position of one quantizer.
    :param step: its step size.
    :param highest: its largest integer.
    """

    name: str
    step: float
    highest: int


def affine(norm: Any, name: str) -> tuple[Tensor, Tensor]:
    """
    :param name: the batch norm's, for the message.
    :return: factor and offset ``[C]`` of a batch norm in evaluation mode, in float64.
    :raises UnsupportedModelError: if one is infinite or no number.
    """
    factor = norm.weight.double() / (norm.running_var.double() + norm.eps).sqrt()
    offset = norm.bias.double() - norm.running_mean.double() * factor
    if not (torch.isfinite(factor) & torch.isfinite(offset)).all():
        msg = f"The batch norm {name!r} has weights or statistics that are infinite or no numbers: {DIVERGED}"
        raise UnsupportedModelError(msg)
    return factor, offset


def make_identity(norm: Any, bias: Tensor) -> None:
    """
    Make a batch norm one that in evaluation mode only adds.

    :param bias: what it adds, ``[C]``.
    """
    norm.running_mean.zero_()
    norm.running_var.fill_(1.0 - norm.eps)
    norm.weight.fill_(1.0)
    norm.bias.copy_(bias)


def place_steps(
    ops: Sequence[Op],
    activations: Mapping[Position, Activation],
    weights: Mapping[str, Tensor],
    norms: Mapping[str, Any],
) -> tuple[dict[str, Tensor], dict[str, float]]:
    """
    Find steps without ties (:mod:`nncf_mpq_plugin.adapters.ties`), and put batch norms that no layer takes in on their
    lattices.

    :param ops: the model's operations in topological order.
    :param activations: where quantizers stand -> which.
    :param weights: weighted operation -> weight steps ``[out]`` as trained, of those that may move.
    :param norms: operation -> the batch norm's module, of those that no layer takes in; changed in place.
    :return: weighted operation -> weight steps ``[out]``, name of an activation quantizer -> step.
    :raises UnsupportedModelError: if a step is zero, infinite or no number, or a batch norm's number is not finite.
    """
    steps = {quantizer.name: torch.tensor(quantizer.step) for quantizer in activations.values()} | dict(weights)
    for name, step in steps.items():
        if not (torch.isfinite(step) & (step > 0)).all():
            msg = f"The quantizer of {name!r} has a scale that is zero, infinite or no number: {DIVERGED}"
            raise UnsupportedModelError(msg)
    reads = read_sums(ops, {position: quantizer.name for position, quantizer in activations.items()})
    affines = {op: affine(norm, op) for op, norm in norms.items()}
    factors = {op: found for op, found in affines.items() if op in reads.inputs}
    movable = {op: step for op, step in weights.items() if op in reads.inputs}
    movable |= {op: factor.abs() for op, (factor, _) in factors.items()}
    quantizers = {quantizer.name: quantizer for quantizer in activations.values()}
    found = tie_free(
        reads,
        Steps(
            {name: quantizer.step for name, quantizer in quantizers.items()},
            {op: step.detach().cpu().numpy() for op, step in movable.items()},
        ),
        {name: quantizer.highest for name, quantizer in quantizers.items()},
    )
    for op, (factor, offset) in factors.items():
        spacing = torch.from_numpy(found.spacings[op]).to(offset)
        make_identity(norms[op], torch.where(spacing > 0, (offset / spacing).round() * spacing, offset))
        norms[op].weight.copy_(torch.from_numpy(found.weights[op]).to(factor) * factor.sign())
    moved = {op: torch.from_numpy(found.weights[op]).to(step) for op, step in weights.items() if op in movable}
    return {**weights, **moved}, dict(found.quantizers)
