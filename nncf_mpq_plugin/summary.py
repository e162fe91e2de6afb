"""What a run came to: accuracies, BitOps and sizes against floating point and uniform bits, and every layer's part."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from nncf_mpq_plugin.allocation import achieved_by
from nncf_mpq_plugin.costs import FLOAT_BITS, INT8, Limit, total_bitops, weight_bits
from nncf_mpq_plugin.errors import InputError
from nncf_mpq_plugin.types import SCHEMA_VERSION, ImportanceTable, LayerBits, LayerCost, Policy


def layer_rows(table: ImportanceTable, policy: Policy) -> list[dict[str, Any]]:
    """
    One entry a layer, searchable and fixed.

    :return: ``name``, ``weight`` and ``activation`` (bits), ``bitops``, ``bitops_share`` (of all layers), ``bytes``,
        ``searched``, and for searched layers ``weight_importance`` and ``activation_importance`` at the chosen bits.
    :raises InputError: if table and policy name different layers.
    """
    costs, bits = _costs(table), _bits(table, policy)
    total = total_bitops(costs, bits)
    importances = {layer.cost.name: layer for layer in table.layers}
    rows = []
    for cost in costs:
        chosen = bits[cost.name]
        row = {
            "name": cost.name,
            "weight": chosen.weight,
            "activation": chosen.activation,
            "bitops": total_bitops([cost], bits),
            "bitops_share": total_bitops([cost], bits) / total,
            "bytes": weight_bits(cost, chosen.weight, 0) / 8,
            "searched": cost.name in importances,
        }
        if cost.name in importances:
            row["weight_importance"] = importances[cost.name].weight.get(chosen.weight)
            row["activation_importance"] = importances[cost.name].activation.get(chosen.activation)
        rows.append(row)
    return rows


def totals(table: ImportanceTable, policy: Policy) -> dict[str, Any]:
    """
    :return: ``bitops`` and ``average_bits`` (searchable layers), ``all_bitops``, ``weight_bytes`` and
        ``compression_ratio`` (all layers).
    """
    costs, bits = _costs(table), _bits(table, policy)
    searched = [layer.cost for layer in table.layers]
    stored = sum(weight_bits(cost, bits[cost.name].weight, 0) for cost in costs)
    weights, macs = sum(cost.weights for cost in searched), sum(cost.macs for cost in searched)
    return {
        "bitops": total_bitops(searched, bits),
        "all_bitops": total_bitops(costs, bits),
        "average_bits": {
            "weight": sum(cost.weights * bits[cost.name].weight for cost in searched) / weights,
            "activation": sum(cost.macs * bits[cost.name].activation for cost in searched) / macs,
        },
        "weight_bytes": stored / 8,
        "compression_ratio": FLOAT_BITS * sum(cost.weights for cost in costs) / stored,
    }


def compare(table: ImportanceTable, policy: Policy, uniform: Policy | None) -> dict[str, dict[str, Any]]:
    """
    :param uniform: the uniform policy within the same budget, where there is one.
    :return: ``float``, ``int8``, ``uniform`` and ``mixed`` -> :func:`totals`.
    """

    def same(bits: int) -> Policy:
        return Policy({cost.name: LayerBits(bits, bits) for cost in _costs(table)})

    policies = {"float": same(FLOAT_BITS), "int8": same(INT8), "uniform": uniform, "mixed": policy}
    return {name: totals(table, found) for name, found in policies.items() if found is not None}


def summarize(
    table: ImportanceTable,
    policy: Policy,
    uniform: Policy | None,
    metrics: Mapping[str, Mapping[str, Any]],
    verification: Mapping[str, Any] | None,
    limits: Sequence[Limit],
) -> dict[str, Any]:
    """
    :param uniform: the uniform policy within the same budget, where there is one.
    :param metrics: ``float``, ``mixed`` and, where they were measured, ``int8`` and ``uniform`` -> accuracy, loss,
        samples.
    :param verification: content of verify.json.
    :param limits: the budgets; what the policy reaches is computed anew, for it may have been edited by hand.
    :return: a JSON-serialisable object.
    """
    entries = compare(table, policy, uniform)
    return {
        "schema_version": SCHEMA_VERSION,
        "model": table.model,
        "results": {name: {**dict(metrics.get(name, {})), **entry} for name, entry in entries.items()},
        "budgets": _budgets(table, policy, limits),
        "importance_unit": table.unit,
        "layers": layer_rows(table, policy),
        "verification": verification,
    }


def _budgets(table: ImportanceTable, policy: Policy, limits: Sequence[Limit]) -> dict[str, Any]:
    reached = achieved_by(table, limits, policy.layers)
    return {
        limit.name: {
            "requested": limit.requested,
            "achieved": limit.achieved(reached[limit.name]),
            "asked": limit.show(limit.requested),
            "reached": limit.show(limit.achieved(reached[limit.name])),
        }
        for limit in limits
    }


def _costs(table: ImportanceTable) -> list[LayerCost]:
    return [layer.cost for layer in table.layers] + [layer.cost for layer in table.fixed_layers]


def _bits(table: ImportanceTable, policy: Policy) -> dict[str, LayerBits]:
    bits = {**{layer.cost.name: layer.bits for layer in table.fixed_layers}, **policy.fixed_layers, **policy.layers}
    missing = [cost.name for cost in _costs(table) if cost.name not in bits]
    unknown = sorted(set(bits) - {cost.name for cost in _costs(table)})
    if missing or unknown:
        msg = f"Policy and importance table are of different models: missing {missing[:3]}, unknown {unknown[:3]}."
        raise InputError(msg)
    return bits
