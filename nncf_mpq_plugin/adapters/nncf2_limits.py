"""Limits that NNCF 2.19's users know from HAWQ, as limits of the core's search."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from nncf_mpq_plugin.allocation.search import Prepared
from nncf_mpq_plugin.costs import INT8, Limit
from nncf_mpq_plugin.types import ImportanceTable, LayerBits, LayerCost

NAME = "compression_ratio (INT8 over mixed complexity)"


def complexity(layer: LayerCost, weight_bits: int, activation_bits: int) -> int:
    """:return: HAWQ's bit complexity of a layer: operations x the larger bit width."""
    return layer.macs * max(weight_bits, activation_bits)


def int8_ratio(table: ImportanceTable, bits: Mapping[str, LayerBits]) -> float:
    """:return: complexity of uniform INT8 over that of a policy, fixed layers included."""
    fixed = {layer.cost.name: layer.bits for layer in table.fixed_layers}
    mixed = sum(complexity(cost, *_pair({**bits, **fixed}[cost.name])) for cost in _costs(table))
    return INT8 * sum(cost.macs for cost in _costs(table)) / mixed


def int8_ratio_limit(table: ImportanceTable, ratio: float) -> Limit:
    """
    HAWQ's ``compression_ratio`` as a limit on the searchable layers' complexity.

    :param ratio: complexity of uniform INT8 over that of the policy, at least; fixed layers count in both.
    """
    fixed = sum(complexity(layer.cost, *_pair(layer.bits)) for layer in table.fixed_layers)
    whole = INT8 * sum(cost.macs for cost in _costs(table))
    bound = math.floor((whole / ratio - fixed) * (1 + 1e-12))
    return Limit(NAME, ratio, bound, complexity, lambda used: whole / (used + fixed), lambda value: f"{value:.6g}")


def with_groups(table: ImportanceTable, groups: Mapping[str, str]) -> ImportanceTable:
    """:return: the table with other activation groups, by layer name."""
    layers = (
        replace(layer, cost=replace(layer.cost, activation_group=groups[layer.cost.name])) for layer in table.layers
    )
    return replace(table, layers=tuple(layers))


def with_equal_bits(prepared: Prepared) -> Prepared:
    """:return: the program without choices in which a layer's weight and activation bits differ."""
    weight, activation = np.array(prepared.table.bits), np.array(prepared.activation_bits)
    equal = weight[:, None] == activation[None, :]
    costs = np.where(equal[None], prepared.problem.costs, np.inf)
    return replace(prepared, problem=replace(prepared.problem, costs=costs))


def _pair(bits: LayerBits) -> tuple[int, int]:
    return bits.weight, bits.activation


def _costs(table: ImportanceTable) -> list[LayerCost]:
    return [*(layer.cost for layer in table.layers), *(layer.cost for layer in table.fixed_layers)]
