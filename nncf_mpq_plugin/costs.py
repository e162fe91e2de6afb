"""What a policy costs: BitOps, weight bits and time, as integer limits that the search and its check share."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from nncf_mpq_plugin.errors import InputError
from nncf_mpq_plugin.types import (
    SCHEMA_VERSION,
    SUPPORTED_BITS,
    Budget,
    ImportanceTable,
    LayerBits,
    LayerCost,
    read_json,
    write_json,
)

FLOAT_BITS = 32
INT8 = 8


class CostModel(Protocol):
    """A layer's part of a sum that a budget limits, as an integer."""

    def __call__(self, layer: LayerCost, weight_bits: int, activation_bits: int, /) -> int:
        """:return: the cost of a layer at these bit widths."""


@dataclass(frozen=True)
class LatencyTable:
    """
    Measured time of each layer at pairs of weight and activation bit widths.

    Low-precision kernels work on 8-bit carriers (INT8), so that a pair of 8 bits or less that is not listed takes the
    time of 8 and 8.

    :param nanoseconds: layer name -> (weight bits, activation bits) -> time of one inference.
    :param device: where it was measured, for people.
    """

    nanoseconds: Mapping[str, Mapping[tuple[int, int], int]]
    device: str = ""

    def __call__(self, layer: LayerCost, weight_bits: int, activation_bits: int) -> int:
        """
        :return: nanoseconds.
        :raises InputError: naming the layer and the bit widths that the table lacks.
        """
        times = self.nanoseconds.get(layer.name, {})
        pair = (weight_bits, activation_bits)
        if pair not in times and max(pair) <= INT8:
            pair = (INT8, INT8)
        if pair not in times:
            msg = f"latency table: no time for layer {layer.name!r} at {pair[0]} weight and {pair[1]} activation bits."
            raise InputError(msg)
        return times[pair]

    def to_json(self) -> dict[str, Any]:
        """:return: a JSON-serialisable object; pairs are written as ``"8x8"``."""
        layers = {
            name: {f"{weight}x{activation}": time for (weight, activation), time in times.items()}
            for name, times in self.nanoseconds.items()
        }
        return {"schema_version": SCHEMA_VERSION, "device": self.device, "nanoseconds": layers}

    @classmethod
    def from_json(cls, value: Any, place: str = "latency table") -> LatencyTable:
        """:raises InputError: with the place in the file, for another version, a misnamed pair or a senseless time."""
        version = value.get("schema_version") if isinstance(value, dict) else None
        if version != SCHEMA_VERSION:
            msg = f"{place}.schema_version: {version!r} is not supported, this version reads {SCHEMA_VERSION}."
            raise InputError(msg)
        layers = value.get("nanoseconds")
        if not isinstance(layers, dict) or not layers:
            msg = f"{place}.nanoseconds: expected an object of layers with their times."
            raise InputError(msg)
        known = {f"{w}x{a}": (w, a) for w in SUPPORTED_BITS for a in SUPPORTED_BITS}
        result: dict[str, dict[tuple[int, int], int]] = {}
        for name, times in layers.items():
            if not isinstance(times, dict):
                msg = f"{place}.nanoseconds[{name!r}]: expected an object such as {{'8x8': 51000}}."
                raise InputError(msg)
            for pair, time in times.items():
                if pair not in known or not isinstance(time, int) or isinstance(time, bool) or time <= 0:
                    msg = (
                        f"{place}.nanoseconds[{name!r}][{pair!r}]: expected weight x activation bits, such as '8x8', "
                        f"and a positive integer, got {time!r}."
                    )
                    raise InputError(msg)
            result[name] = {known[pair]: time for pair, time in times.items()}
        return cls(result, str(value.get("device", "")))

    def save(self, path: str | Path) -> None:
        """Write the table as JSON; the file appears only whole."""
        write_json(path, self.to_json())

    @classmethod
    def load(cls, path: str | Path) -> LatencyTable:
        """:raises InputError: if the file cannot be read or is not a valid table."""
        return cls.from_json(read_json(path), str(path))


@dataclass(frozen=True)
class Limit:
    """
    One budget as a bound on a sum of integers over the searchable layers.

    :param name: the budget's name.
    :param requested: the number the user asked for, in the budget's own unit.
    :param bound: the sum may not exceed this.
    :param cost: a layer's part at given bit widths.
    :param achieved: a sum in the budget's own unit.
    :param show: a value in the budget's own unit for people, in the terms that it was asked for.
    """

    name: str
    requested: float
    bound: int
    cost: CostModel
    achieved: Callable[[int], float]
    show: Callable[[float], str]


def bitops(layer: LayerCost, weight_bits: int, activation_bits: int) -> int:
    """:return: BitOps of a layer: MACs x weight bits x activation bits (LIMPQ, section 3.4)."""
    return layer.macs * weight_bits * activation_bits


def weight_bits(layer: LayerCost, weight_bits: int, activation_bits: int) -> int:
    """:return: bits that the layer's weights take."""
    return layer.weights * weight_bits


def total_bitops(layers: Iterable[LayerCost], bits: Mapping[str, LayerBits]) -> int:
    """:return: BitOps of layers at the bit widths of a policy."""
    return sum(bitops(layer, bits[layer.name].weight, bits[layer.name].activation) for layer in layers)


def limits_of(table: ImportanceTable, budget: Budget, latency: LatencyTable | None = None) -> tuple[Limit, ...]:
    """
    Translate budgets.

    :param latency: measured times of the searchable layers, for ``latency_ratio``.
    :raises InputError: for no budget at all, one that is not a positive number, or a latency budget without a table.
    """
    layers = [layer.cost for layer in table.layers]
    macs = sum(layer.macs for layer in layers)
    weights = sum(layer.weights for layer in layers)
    fixed = sum(layer.cost.weights * layer.bits.weight for layer in table.fixed_layers)
    all_weights = weights + sum(layer.cost.weights for layer in table.fixed_layers)
    limits = []

    def add(
        name: str,
        requested: float,
        bound: float,
        cost: CostModel,
        achieved: Callable[[int], float],
        show: Callable[[float], str],
    ) -> None:
        if not (math.isfinite(requested) and requested > 0):
            msg = f"budgets.{name}: must be a finite number above 0, got {requested}."
            raise InputError(msg)
        # a budget computed in floating point may fall short of the integer it means by rounding
        limits.append(Limit(name, requested, math.floor(bound * (1 + 1e-12)), cost, achieved, show))

    def bits(value: float) -> str:
        return f"{value:.5g} bits"

    def times(value: float) -> str:
        return f"{value:.5g}x"

    if budget.bitops is not None:
        add("bitops", budget.bitops, budget.bitops, bitops, float, lambda n: f"{n:.6g} BitOps")
    if budget.bitops_ratio is not None:
        int8_bitops = macs * INT8 * INT8
        bound = budget.bitops_ratio * int8_bitops
        add("bitops_ratio", budget.bitops_ratio, bound, bitops, lambda n: n / int8_bitops, times)
    if budget.average_bits is not None:
        weight, activation = budget.average_bits.weight, budget.average_bits.activation
        if weight is not None and activation is not None:
            product = weight * activation

            def uniform(value: float) -> str:
                scale = math.sqrt(value / product)
                return f"{weight * scale:.5g} / {activation * scale:.5g} bits"

            add("average_bits", product, product * macs, bitops, lambda n: n / macs, uniform)
        elif weight is not None:
            add("average_bits.weight", weight, weight * weights, weight_bits, lambda n: n / weights, bits)
        elif activation is not None:
            cost = lambda layer, w, a: layer.macs * a  # noqa: E731
            add("average_bits.activation", activation, activation * macs, cost, lambda n: n / macs, bits)
    if budget.compression_ratio is not None:
        float_bits = FLOAT_BITS * all_weights
        bound = float_bits / budget.compression_ratio - fixed
        ratio = lambda n: float_bits / (n + fixed)  # noqa: E731
        add("compression_ratio", budget.compression_ratio, bound, weight_bits, ratio, times)
    if budget.model_size_bytes is not None:
        size = budget.model_size_bytes
        show = lambda n: f"{n:.8g} bytes"  # noqa: E731
        add("model_size_bytes", size, 8 * size - fixed, weight_bits, lambda n: (n + fixed) / 8, show)
    if budget.latency_ratio is not None:
        if latency is None:
            msg = "budgets.latency_ratio: no latency table was given. Use bitops_ratio, or leave it out."
            raise InputError(msg)
        int8 = sum(latency(layer, INT8, INT8) for layer in layers)
        add("latency_ratio", budget.latency_ratio, budget.latency_ratio * int8, latency, lambda n: n / int8, times)
    if not limits:
        msg = "budgets: at least one budget is needed."
        raise InputError(msg)
    return tuple(limits)
