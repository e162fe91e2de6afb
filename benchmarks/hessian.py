"""
HAWQ-V2's importance, to compare with: mean Hessian trace of a tensor times its squared quantization error.

Dong et al., "HAWQ-V2: Hessian Aware trace-Weighted Quantization of Neural Networks", NeurIPS 2020, section 3:
``Tr(H) / n * ||Q(x) - x||^2`` for every weight tensor, and, with the Hessian by a sample's activations, for every
activation tensor. Traces are Hutchinson's estimates ``v H v`` with random signs ``v``, for all weights or all
activations in one product, of the floating-point model's loss. Q has the steps with the least squared error; nothing is
jointly trained.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor

from nncf_mpq_plugin.finetune import with_fine_tuned_granularity
from nncf_mpq_plugin.importance import fixed_layers_of
from nncf_mpq_plugin.placement import QuantizedModel
from nncf_mpq_plugin.quantizer import MultiBitQuantizer
from nncf_mpq_plugin.training import evaluation_mode, quantizers_off, set_weights
from nncf_mpq_plugin.types import ImportanceTable, LayerImportance

Samples = Sequence[tuple[Tensor, Tensor]]


def hessian_importance(
    quantized: QuantizedModel, original: dict[str, Tensor], batches: Samples, iterations: int, seed: int = 0
) -> ImportanceTable:
    """
    :param quantized: any model of the network with quantizers; it is left as it is.
    :param original: its floating-point weights.
    :param batches: (inputs, classes) that traces and activations' errors are averaged over.
    :param iterations: random vectors for each batch.
    :return: a table to search with alpha 1; negative traces count as 0. The activations of a group count once, in equal
        parts over its layers.
    """
    floating = copy.deepcopy(quantized)
    set_weights(floating.model, original)
    model = with_fine_tuned_granularity(floating, [inputs for inputs, _ in batches], initialization="statistics")
    weights = {layer.cost.name: model.weight_quantizers[layer.cost.name] for layer in model.searchable}
    activations = {group: model.activation_quantizers[group] for group in model.searchable_groups}
    weight_costs, activation_costs = (
        metric(model, quantizers, batches, iterations, seed) for quantizers in (weights, activations)
    )
    groups = [layer.cost.activation_group for layer in model.searchable]
    layers = tuple(
        LayerImportance(
            layer.cost,
            weight_costs[layer.cost.name],
            {
                bits: value / groups.count(layer.cost.activation_group)
                for bits, value in activation_costs[layer.cost.activation_group].items()
            },
        )
        for layer in model.searchable
    )
    return ImportanceTable(
        model.bits, layers, fixed_layers_of(model), unit="loss", source=f"HAWQ-V2, {iterations} vectors a batch"
    )


def metric(
    quantized: QuantizedModel, searched: dict[str, MultiBitQuantizer], batches: Samples, iterations: int, seed: int
) -> dict[str, dict[int, float]]:
    """
    :param searched: tensor -> its quantizer; either weights or activations, whose estimates disturb each other.
    :return: tensor -> bit width -> trace of the mean loss's Hessian over the number of elements, times squared error;
        for activations the Hessian is a sample's, and both are means over samples.
    """
    generator = torch.Generator().manual_seed(seed)
    samples = sum(len(inputs) for inputs, _ in batches)
    traces = dict.fromkeys(searched, 0.0)
    errors = {name: dict.fromkeys(quantized.bits, 0.0) for name in searched}
    with evaluation_mode(quantized.model):
        for inputs, target in batches:
            with quantizers_off(quantized.model), kept(searched) as tensors:
                loss = F.cross_entropy(quantized.model(inputs), target, reduction="sum")
            values = [tensors[name] for name in searched]
            gradients = torch.autograd.grad(loss, values, create_graph=True)
            for _ in range(iterations):
                signs = [torch.randint(0, 2, value.shape, generator=generator) * 2.0 - 1 for value in values]
                products = torch.autograd.grad(gradients, values, signs, retain_graph=True)
                for name, sign, product in zip(searched, signs, products, strict=True):
                    count = product.numel() / (1 if searched[name].weight else len(inputs))
                    traces[name] += (sign * product).sum().item() / (iterations * samples * count)
            for name, value in tensors.items():
                share = len(inputs) / samples if searched[name].weight else 1 / samples
                for bits in quantized.bits:
                    errors[name][bits] += share * squared_error(searched[name], value.detach(), bits)
    return {
        name: {bits: max(0.0, traces[name]) * error for bits, error in by_bits.items()}
        for name, by_bits in errors.items()
    }


@contextmanager
def kept(searched: dict[str, MultiBitQuantizer]) -> Iterator[dict[str, Tensor]]:
    """:return: filled in the next forward pass: tensor -> its values, as the layers behind its quantizer see them."""
    values: dict[str, Tensor] = {}
    handles = []
    for name, quantizer in searched.items():

        def keep(module: MultiBitQuantizer, inputs: tuple[Tensor], output: Tensor, name: str = name) -> Tensor:
            values[name] = output.clone()
            if not values[name].requires_grad:
                values[name].requires_grad_()
            return values[name]

        handles.append(quantizer.register_forward_hook(keep))
    try:
        yield values
    finally:
        for handle in handles:
            handle.remove()


def squared_error(quantizer: MultiBitQuantizer, value: Tensor, bits: int) -> float:
    """:return: squared error of a tensor at a bit width."""
    quantizer.select(bits)
    with torch.no_grad():
        return (quantizer(value) - value).square().sum().item()
