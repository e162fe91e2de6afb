"""Policies to compare with, under the same budget: what learned importance has to beat."""

from __future__ import annotations

import random as random_module
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from nncf_mpq_plugin.costs import Limit, limits_of
from nncf_mpq_plugin.errors import InfeasibleBudgetError
from nncf_mpq_plugin.types import Budget, ImportanceTable, LayerBits, Policy


def _policy(table: ImportanceTable, bits: Mapping[str, LayerBits], method: str) -> Policy:
    return Policy(bits, {layer.cost.name: layer.bits for layer in table.fixed_layers}, {"method": method})


def fits(table: ImportanceTable, limits: tuple[Limit, ...], bits: Mapping[str, LayerBits]) -> bool:
    """:return: whether bit widths of the searchable layers keep every limit."""
    costs = [layer.cost for layer in table.layers]
    return all(
        sum(limit.cost(cost, bits[cost.name].weight, bits[cost.name].activation) for cost in costs) <= limit.bound
        for limit in limits
    )


def uniform(table: ImportanceTable, budget: Budget) -> Policy:
    """
    One weight and one activation bit width for all searchable layers: of the pairs within the budget the one with the
    largest product, and of those the most even one with more activation bits.

    :raises InfeasibleBudgetError: if no pair is within the budget.
    """
    limits = limits_of(table, budget)
    pairs = [(w, a) for w in table.bits for a in table.bits]
    for w, a in sorted(pairs, key=lambda pair: (-pair[0] * pair[1], abs(pair[0] - pair[1]), pair[0])):
        bits = {layer.cost.name: LayerBits(w, a) for layer in table.layers}
        if fits(table, limits, bits):
            return _policy(table, bits, "uniform")
    msg = "No uniform policy meets the budget; only mixed ones can."
    raise InfeasibleBudgetError(msg, limits[0].name, limits[0].requested)


def random(table: ImportanceTable, budget: Budget, seed: int = 0) -> Policy:
    """
    A random policy that no single step up keeps within the budget: from the lowest bits, tensors in random order are
    raised one bit width at a time as long as some can be.

    :raises InfeasibleBudgetError: if not even the lowest bits are within the budget.
    """
    limits = limits_of(table, budget)
    generator = random_module.Random(seed)
    groups = list(dict.fromkeys(layer.cost.activation_group for layer in table.layers))
    weight = {layer.cost.name: 0 for layer in table.layers}
    activation = dict.fromkeys(groups, 0)

    def bits() -> dict[str, LayerBits]:
        return {
            layer.cost.name: LayerBits(
                table.bits[weight[layer.cost.name]], table.bits[activation[layer.cost.activation_group]]
            )
            for layer in table.layers
        }

    if not fits(table, limits, bits()):
        msg = "No policy meets the budget: the lowest bits everywhere exceed it."
        raise InfeasibleBudgetError(msg, limits[0].name, limits[0].requested)
    tensors = [(weight, name) for name in weight] + [(activation, group) for group in activation]
    while tensors:
        index = generator.randrange(len(tensors))
        where, name = tensors[index]
        where[name] += 1
        if where[name] >= len(table.bits) or not fits(table, limits, bits()):
            where[name] -= 1
            tensors.pop(index)
    return _policy(table, bits(), f"random({seed})")


def reversed_importance(table: ImportanceTable) -> ImportanceTable:
    """
    The paper's ablation: layers swap their importances by rank, the most important gets the least important's.

    :return: a table to search with as usual.
    """
    order = {
        tensor: sorted(range(len(table.layers)), key=lambda i: sum(getattr(table.layers[i], tensor).values()))
        for tensor in ("weight", "activation")
    }
    swapped: dict[int, dict[str, Any]] = {index: {} for index in range(len(table.layers))}
    for tensor, ranks in order.items():
        for low, high in zip(ranks, reversed(ranks), strict=True):
            swapped[low][tensor] = getattr(table.layers[high], tensor)
    layers = tuple(replace(layer, **swapped[index]) for index, layer in enumerate(table.layers))
    return replace(table, layers=layers, source=f"{table.source} (reversed)")
