"""Policies to compare with, under the same budget: what learned importance has to beat."""

from __future__ import annotations

import random as random_module
import time
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from nncf_mpq_plugin.allocation.search import objective_of, prepare, search, solution_of
from nncf_mpq_plugin.costs import LatencyTable, Limit, limits_of
from nncf_mpq_plugin.errors import InfeasibleBudgetError, InputError
from nncf_mpq_plugin.types import Budget, ImportanceTable, LayerBits, Policy

METHODS = ("learned", "uniform", "random", "reversed", "shuffled", "inverse_size")


def _policy(table: ImportanceTable, bits: Mapping[str, LayerBits], method: str) -> Policy:
    return Policy(bits, {layer.cost.name: layer.bits for layer in table.fixed_layers}, {"method": method})


def fits(table: ImportanceTable, limits: tuple[Limit, ...], bits: Mapping[str, LayerBits]) -> bool:
    """:return: whether bit widths of the searchable layers keep every limit."""
    costs = [layer.cost for layer in table.layers]
    return all(
        sum(limit.cost(cost, bits[cost.name].weight, bits[cost.name].activation) for cost in costs) <= limit.bound
        for limit in limits
    )


def policy_by_name(
    name: str,
    table: ImportanceTable,
    budget: Budget,
    *,
    seed: int = 0,
    latency: LatencyTable | None = None,
    alpha: float | None = None,
    out_of_order: str = "ban",
) -> Policy:
    """
    A policy within the budget by one of the methods in :data:`METHODS`.

    :param seed: of ``random`` and ``shuffled``.
    :param latency: measured times, for a latency budget.
    :param alpha: as :func:`nncf_mpq_plugin.allocation.search`; likewise ``out_of_order``.
    :return: the policy; its summary names the method, and gives the policy's objective by the table's own importances,
        whatever the policy was chosen by.
    :raises InputError: for an unknown name.
    :raises InfeasibleBudgetError: if no policy (of that kind) is within the budget.
    """
    if name not in METHODS:
        msg = f"method: unknown name {name!r}; known are {', '.join(METHODS)}."
        raise InputError(msg)
    blind = {"uniform": lambda: uniform(table, budget, latency), "random": lambda: random(table, budget, seed, latency)}
    searched = {
        "learned": lambda: table,
        "reversed": lambda: reversed_importance(table),
        "shuffled": lambda: shuffled_importance(table, seed),
        "inverse_size": lambda: inverse_size_importance(table),
    }
    begin = time.perf_counter()
    if name in blind:
        bits = blind[name]().layers
        kept = prepare(table, budget, alpha=alpha, out_of_order="keep", latency=latency)
        policy = solution_of(kept, bits, begin).policy
    else:
        policy = search(searched[name](), budget, alpha=alpha, out_of_order=out_of_order, latency=latency).policy
    label = f"{name}({seed})" if name in ("random", "shuffled") else name
    objective = objective_of(table, policy.layers, table.default_alpha if alpha is None else alpha)
    summary = {**policy.summary, "method": label, "objective": objective}
    if name != "learned":
        summary["corrections"] = []  # they would name layers by the importances of others
    return replace(policy, summary=summary)


def uniform(table: ImportanceTable, budget: Budget, latency: LatencyTable | None = None) -> Policy:
    """
    One weight and one activation bit width for all searchable layers: of the pairs within the budget the one with the
    largest product, and of those the most even one with more activation bits.

    :raises InfeasibleBudgetError: if no pair is within the budget.
    """
    limits = limits_of(table, budget, latency)
    pairs = [(w, a) for w in table.bits for a in table.bits]
    for w, a in sorted(pairs, key=lambda pair: (-pair[0] * pair[1], abs(pair[0] - pair[1]), pair[0])):
        bits = {layer.cost.name: LayerBits(w, a) for layer in table.layers}
        if fits(table, limits, bits):
            return _policy(table, bits, "uniform")
    search(table, budget, out_of_order="keep", latency=latency)  # where no policy does, it names the nearest
    msg = "No uniform policy meets the budget; only mixed ones can."
    raise InfeasibleBudgetError(msg, limits[0].name, limits[0].requested)


def random(table: ImportanceTable, budget: Budget, seed: int = 0, latency: LatencyTable | None = None) -> Policy:
    """
    A random policy that no single step up keeps within the budget: from the lowest bits, tensors in random order are
    raised one bit width at a time as long as some can be.

    :raises InfeasibleBudgetError: if not even the lowest bits are within the budget.
    """
    limits = limits_of(table, budget, latency)
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
        search(table, budget, out_of_order="keep", latency=latency)  # where no policy does, it names the nearest
        msg = "The lowest bits everywhere exceed the budget, so that no random policy can begin."
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


def shuffled_importance(table: ImportanceTable, seed: int = 0) -> ImportanceTable:
    """
    Layers swap their importances at random, weights and activations apart: what is left is that importances differ.

    :return: a table to search with as usual.
    """
    generator = random_module.Random(seed)
    changed = list(table.layers)
    for tensor in ("weight", "activation"):
        values = [getattr(layer, tensor) for layer in table.layers]
        generator.shuffle(values)
        changed = [replace(layer, **{tensor: value}) for layer, value in zip(changed, values, strict=True)]
    return replace(table, layers=tuple(changed), source=f"{table.source} (shuffled, seed {seed})")


def inverse_size_importance(table: ImportanceTable) -> ImportanceTable:
    """
    Weight importances are the mean curve of all layers times 1 / number of weights (mean 1 over the layers); activation
    importances are the mean curve in every layer: what is left is that small layers get more bits.

    :return: a table to search with as usual.
    """
    mean = {
        tensor: {b: sum(getattr(layer, tensor)[b] for layer in table.layers) / len(table.layers) for b in table.bits}
        for tensor in ("weight", "activation")
    }
    average = sum(1 / layer.cost.weights for layer in table.layers) / len(table.layers)
    layers = tuple(
        replace(
            layer,
            weight={b: value / layer.cost.weights / average for b, value in mean["weight"].items()},
            activation=dict(mean["activation"]),
        )
        for layer in table.layers
    )
    return replace(table, layers=layers, source=f"{table.source} (1 / number of weights)")
