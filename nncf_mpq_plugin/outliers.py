"""
Importances out of order: an importance that rises with more bits contradicts what it stands for.

The published search leaves such a choice out (``ban``: 2 of the 520 of the published ResNet-50 table).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from nncf_mpq_plugin.errors import InputError
from nncf_mpq_plugin.types import ImportanceTable

OUT_OF_ORDER = ("ban", "isotonic", "keep")


@dataclass(frozen=True)
class Correction:
    """
    One importance out of order and what became of it.

    :param layer: layer name.
    :param tensor: ``weight`` or ``activation``.
    :param bits: the bit width.
    :param importance: the value in the table, above that of the next lower bit width.
    :param used: the value used instead, None where the choice was banned.
    """

    layer: str
    tensor: str
    bits: int
    importance: float
    used: float | None


def put_in_order(table: ImportanceTable, rule: str = "ban") -> tuple[ImportanceTable, tuple[Correction, ...]]:
    """
    Apply a rule to importances out of order.

    :param rule: ``ban`` removes the choice; ``isotonic`` replaces values by the nearest (least squares) that fall with
        the bits; ``keep`` changes nothing and only lists.
    :return: a table whose layers may lack bit widths (``ban``), and the corrections.
    :raises InputError: for an unknown rule.
    """
    if rule not in OUT_OF_ORDER:
        msg = f"out_of_order: unknown rule {rule!r}; known are {', '.join(OUT_OF_ORDER)}."
        raise InputError(msg)
    corrections: list[Correction] = []
    layers = []
    for layer in table.layers:
        changed: dict[str, Any] = {}
        for tensor in ("weight", "activation"):
            values: Mapping[int, float] = getattr(layer, tensor)
            rising = _rising(values)
            fitted = _falling_fit(values) if rule == "isotonic" else dict(values)
            for bits in rising:
                used = None if rule == "ban" else fitted[bits]
                corrections.append(Correction(layer.cost.name, tensor, bits, values[bits], used))
            changed[tensor] = {b: v for b, v in fitted.items() if rule != "ban" or b not in rising}
        layers.append(replace(layer, **changed))
    return replace(table, layers=tuple(layers)), tuple(corrections)


def _rising(values: Mapping[int, float]) -> list[int]:
    """Bit widths whose importance is above that of the nearest lower bit width that is in order."""
    result, last = [], float("inf")
    for bits in sorted(values):
        if values[bits] > last:
            result.append(bits)
        else:
            last = values[bits]
    return result


def _falling_fit(values: Mapping[int, float]) -> dict[int, float]:
    """Pool adjacent violators (Barlow et al. 1972) for values that fall with the bits."""
    blocks: list[tuple[float, list[int]]] = []
    for bits in sorted(values):
        blocks.append((values[bits], [bits]))
        while len(blocks) > 1 and blocks[-1][0] > blocks[-2][0]:
            (b, bits_b), (a, bits_a) = blocks.pop(), blocks.pop()
            together = bits_a + bits_b
            blocks.append(((a * len(bits_a) + b * len(bits_b)) / len(together), together))
    return {bits: mean for mean, members in blocks for bits in members}
