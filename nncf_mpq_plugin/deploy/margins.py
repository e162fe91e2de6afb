"""
A certificate that no runtime can round otherwise than torch.

Between two quantizers, an exported network computes sums of integers times units (accumulators, stored integers, their
averages), which lie on a lattice. For each quantizer this module finds the lattice in the numbers of the exported
graph, and the smallest distance of its points from a rounding tie: with units ``p/q`` steps and one odd q it is
``1/2q`` steps (:mod:`nncf_mpq_plugin.adapters.ties` places steps so). Where that exceeds the error of float32
arithmetic, every runtime and torch itself round every reachable value alike, for all inputs.

The error bound, in steps, is ``S (e + (4 + sqrt(n)) 2^-24) + 4 T 2^-24``. T is the largest value that the channel
reaches within the quantizer's range, S the same plus the bias and plus what summands of an addition may cancel, e the
relative distance of the units, as float32 has them, from their fractions. 4 stands for the operations between
accumulator and sum, and again for those between sum and integer, and sqrt(n) for torch's float32 sum of n products,
whose roundings are independent (Higham and Mary, "A new approach to probabilistic rounding error analysis", 2019);
integer kernels have no such sum.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import onnx
from onnx import NodeProto, numpy_helper

LARGEST_DENOMINATOR = 2**18
FIRST_SEARCH = 2**11  # denominators that are tried before all others
SAME = 2.0**-20  # relative difference under which a unit is taken for a fraction; it counts as an error
UNIT_ROUNDOFF = 2.0**-24
ROUNDINGS = 4

_KEEPING = ("MaxPool", "Reshape", "Flatten", "Transpose", "Squeeze", "Unsqueeze", "Identity", "Gather", "Slice", "Pad")


@dataclass(frozen=True)
class Margin:
    """
    How safely one tensor is rounded.

    :param tensor: a quantized activation.
    :param margin: smallest distance of a reachable value from a rounding tie, in steps; None for the network's input,
        which is exact at a step that is a power of two, and where there is no certificate.
    :param error: bound of the floating-point error, in steps.
    :param reason: why there is no certificate; None if there is one.
    """

    tensor: str
    margin: float | None
    error: float | None
    reason: str | None = None


@dataclass(frozen=True)
class Certificate:
    """:param margins: of every quantized activation, in the order of computation."""

    margins: tuple[Margin, ...]

    @property
    def complete(self) -> bool:
        """Whether it covers every quantized activation: then all runtimes agree on all inputs."""
        return all(margin.reason is None for margin in self.margins)

    def to_json(self) -> dict[str, Any]:
        """:return: a JSON-serialisable object."""
        measured = [m for m in self.margins if m.reason is None and m.margin is not None and m.error]
        return {
            "complete": self.complete,
            "tensors": len(self.margins),
            "certified": sum(margin.reason is None for margin in self.margins),
            "smallest_margin_steps": min((m.margin for m in measured if m.margin is not None), default=None),
            "smallest_margin_to_error": min(
                (m.margin / m.error for m in measured if m.margin and m.error), default=None
            ),
            "not_certified": {m.tensor: m.reason for m in self.margins if m.reason is not None},
        }


@dataclass(frozen=True)
class _Values:
    """
    What one channel range of a tensor can hold: sums of integers times ``units``, within ``low`` to ``high``.

    :param units: arrays ``[C]`` or ``[1]``; of a constant the constant, which ``low`` and ``high`` are as well.
    :param bias: magnitude of what is added to accumulators and may cancel, ``[C]`` or ``[1]``.
    :param products: number of products in the longest sum.
    :param integers: range of the integers, where this is a quantized tensor.
    """

    units: tuple[np.ndarray, ...]
    low: np.ndarray
    high: np.ndarray
    bias: np.ndarray
    products: int = 1
    integers: tuple[int, int] | None = None


_Known = list[_Values] | str
"""Alternatives (channels of a concatenation, clipped values); or why nothing is known."""


def certify(model: onnx.ModelProto) -> Certificate:
    """
    :param model: what :func:`nncf_mpq_plugin.deploy.onnx.to_standard_operators` returned, or such a file.
    """
    return _Walk(onnx.shape_inference.infer_shapes(model)).run()


class _Walk:
    def __init__(self, model: onnx.ModelProto):
        self.graph = model.graph
        self.constants = {item.name: numpy_helper.to_array(item) for item in self.graph.initializer}
        for node in self.graph.node:
            if node.op_type == "Cast" and node.input[0] in self.constants:  # of int4 weights
                self.constants[node.output[0]] = self.constants[node.input[0]]
        self.shapes = {
            item.name: [dim.dim_value for dim in item.type.tensor_type.shape.dim]
            for item in (*self.graph.value_info, *self.graph.input)
        }
        self.inputs = {item.name for item in self.graph.input}
        self.makers = {output: node for node in self.graph.node for output in node.output}
        self.known: dict[str, _Known] = dict.fromkeys(self.inputs, "the network's input")
        self.sizes: dict[str, list[int]] = {}  # tensor -> channels of each alternative, where they are a concatenation
        self.margins: list[Margin] = []

    def run(self) -> Certificate:
        for node in self.graph.node:
            if node.op_type == "DequantizeLinear" and node.input[0] not in self.constants:
                self.quantized(node)
            elif any(name in self.known for name in node.input):
                self.known[node.output[0]] = self.made(node)
        return Certificate(tuple(self.margins))

    def quantized(self, node: NodeProto) -> None:
        step, zero = float(self.constants[node.input[1]]), int(self.constants[node.input[2]])
        before = self.makers[node.input[0]]
        low, high = 0, 255
        if before.op_type == "Clip":
            low, high = int(self.constants[before.input[1]]), int(self.constants[before.input[2]])
            before = self.makers[before.input[0]]
        source = before.input[0]
        if source == f"{node.output[0]}.shifted":  # the network's input, with the zero point added first
            source = self.makers[source].input[0]
        low, high = low - zero, high - zero
        known = self.known[source]
        if source in self.inputs:
            exact = math.frexp(step)[0] == 0.5
            reason = None if exact else "the network's input, at a step that is no power of two"
            self.margins.append(Margin(node.output[0], None, 0.0 if exact else None, reason))
        elif isinstance(known, str):
            self.margins.append(Margin(node.output[0], None, None, f"computed from {known}"))
        else:
            found = [_margin(values, step, low, high) for values in known]
            margin, error = min(found, key=lambda pair: pair[0] / pair[1])
            reason = (
                None if margin > error else f"a value may lie {margin:.2g} steps from a tie, the error is {error:.2g}"
            )
            self.margins.append(Margin(node.output[0], margin, error, reason))
        unit = np.array([step])
        self.sizes[node.output[0]] = self.shapes.get(source, [0, 0])[1:2]
        self.known[node.output[0]] = [_Values((unit,), unit * low, unit * high, np.zeros(1), integers=(low, high))]

    def made(self, node: NodeProto) -> _Known:
        read = node.input[:1] if node.op_type in _KEEPING else node.input  # the others are shapes and indices
        arrived = [self.known[name] for name in read if name in self.known]
        for known in arrived:
            if isinstance(known, str):
                return known
        alternatives = [known for known in arrived if not isinstance(known, str)]
        kind = node.op_type
        if kind in ("Conv", "Gemm", "MatMul") and len(alternatives) == 1:
            return self.layer(node, alternatives[0])
        if kind == "Add" and len(alternatives) == 2 and _fit(alternatives):
            return [_sum(one, other) for one in alternatives[0] for other in alternatives[1]]
        if kind == "Concat" and len(alternatives) == len(node.input):
            self.sizes[node.output[0]] = [size for name in node.input for size in self.sizes.get(name, [0])]
            return [values for known in alternatives for values in known]
        if len(alternatives) != 1:
            return f"{kind} {node.name}"
        values = alternatives[0]
        if kind == "BatchNormalization":
            return self.normalized(node, values)
        if kind == "Transpose" and any(len(unit) > 1 for item in values for unit in item.units):
            return f"{kind} {node.name}"  # the channels are on another axis now
        if kind in _KEEPING:
            if kind in ("MaxPool", "Identity") and node.input[0] in self.sizes:
                self.sizes[node.output[0]] = self.sizes[node.input[0]]
            return values
        if kind == "Relu":
            return [_clipped(item, 0.0, math.inf) for item in values]
        if kind == "Clip":
            bounds = [float(self.constants[name]) if name else None for name in [*node.input[1:3], "", ""][:2]]
            low, high = (-math.inf if bounds[0] is None else bounds[0]), (math.inf if bounds[1] is None else bounds[1])
            points = [np.array([bound]) for bound in bounds if bound]
            return [_clipped(item, low, high) for item in values] + [_Values((p,), p, p, 0 * p) for p in points]
        count = self.averaged(node)
        if count is not None:
            return _averages(values, count)
        return f"{kind} {node.name}"

    def layer(self, node: NodeProto, values: list[_Values]) -> _Known:
        integers = values[0].integers
        weight = self.makers.get(node.input[1])
        bias = self.makers.get(node.input[2]) if len(node.input) > 2 else None
        if len(values) > 1 or integers is None or weight is None or weight.op_type != "DequantizeLinear":
            return f"layer {node.name} of unquantized numbers"
        data = self.constants[weight.input[0]].astype(np.float64)
        axis = next((a.i for a in weight.attribute if a.name == "axis"), 1)
        rows = np.moveaxis(data, axis, 0).reshape(data.shape[axis], -1)
        unit = self.constants[weight.input[1]].astype(np.float64) * values[0].units[0]
        offset = np.zeros(len(rows))
        if bias is not None:
            offset = self.constants[bias.input[0]].astype(np.float64)
        elif len(node.input) > 2:
            return f"layer {node.name} with a bias off the accumulator's grid"
        ends = np.stack([rows * integers[0], rows * integers[1]])
        low, high = ends.min(0).sum(1) + offset, ends.max(0).sum(1) + offset
        return [_Values((unit,), low * unit, high * unit, np.abs(offset * unit), rows.shape[1])]

    def normalized(self, node: NodeProto, values: list[_Values]) -> _Known:
        """A factor and an offset for each channel; the alternatives are the channels of a concatenation in order."""
        scale, offset, mean, variance = (self.constants[name].astype(np.float64) for name in node.input[1:5])
        epsilon = next((a.f for a in node.attribute if a.name == "epsilon"), 1e-5)
        factor = scale / np.sqrt(variance + epsilon)
        offset = offset - mean * factor
        sizes = self.sizes.get(node.input[0], [])
        if len(sizes) != len(values) or sum(sizes) != len(factor) or any(len(item.units) != 1 for item in values):
            return f"{node.op_type} {node.name}"
        result = []
        for item, start, size in zip(values, np.cumsum([0, *sizes]), sizes, strict=False):
            part = slice(start, start + size)
            unit, shift = np.abs(item.units[0] * factor[part]), offset[part]
            ends = np.stack([item.low * factor[part] + shift, item.high * factor[part] + shift])
            result.append(_Values((unit, np.abs(shift)), ends.min(0), ends.max(0), np.abs(shift)))
        return result

    def averaged(self, node: NodeProto) -> int | None:
        attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
        shape = self.shapes.get(node.input[0], [])
        if node.op_type == "GlobalAveragePool" and all(shape[2:]):
            return math.prod(shape[2:])
        if node.op_type == "ReduceMean" and len(node.input) == 2 and node.input[1] in self.constants and shape:
            return math.prod(shape[axis] for axis in self.constants[node.input[1]]) or None
        if node.op_type == "AveragePool" and not attributes.get("ceil_mode"):
            padded = any(attributes.get("pads", ())) and not attributes.get("count_include_pad")
            return None if padded else math.prod(attributes["kernel_shape"])
        return None


def _fit(alternatives: Sequence[Sequence[_Values]]) -> bool:
    lengths = {len(array) for values in alternatives for item in values for array in (*item.units, item.low, item.bias)}
    return len(lengths - {1}) <= 1


def _sum(one: _Values, other: _Values) -> _Values:
    # summands may be large and cancel: beyond the sum, one reaches no further than either does, nor than the other
    # does in the opposite direction
    reaches = [np.maximum(np.abs(values.low), np.abs(values.high)) for values in (one, other)]
    reaches.append(np.maximum(0.0, np.maximum(-one.low, -other.low)))
    reaches.append(np.maximum(0.0, np.maximum(one.high, other.high)))
    return _Values(
        (*one.units, *other.units),
        one.low + other.low,
        one.high + other.high,
        one.bias + other.bias + functools.reduce(np.minimum, reaches),
        max(one.products, other.products),
    )


def _clipped(values: _Values, low: float, high: float) -> _Values:
    return replace(values, low=np.clip(values.low, low, high), high=np.clip(values.high, low, high), integers=None)


def _averages(values: Sequence[_Values], count: int) -> list[_Values]:
    """Means of ``count`` values, in which clipped values (constants) and others meet."""
    constants = [item for item in values if (item.low == item.high).all()]
    result = []
    others = [item for item in values if not any(item is constant for constant in constants)]
    for item in others or constants[:1]:
        low = np.minimum.reduce(np.broadcast_arrays(item.low, *[constant.low for constant in constants]))
        high = np.maximum.reduce(np.broadcast_arrays(item.high, *[constant.high for constant in constants]))
        units = [*item.units, *[unit for constant in constants if constant is not item for unit in constant.units]]
        result.append(_Values(tuple(unit / count for unit in units), low, high, item.bias, item.products + count))
    return result


def _margin(values: _Values, step: float, low: int, high: int) -> tuple[float, float]:
    """:return: smallest distance of a value from a tie, and the error bound, of the channel where they are closest."""
    channels = max(len(array) for array in (*values.units, values.low, values.bias))
    starts, ends, bias = (np.broadcast_to(a / step, channels) for a in (values.low, values.high, values.bias))
    ratios = np.array([np.broadcast_to(np.abs(unit) / step, channels) for unit in values.units])
    worst = (math.inf, 1.0)
    for channel in range(channels):
        reach = max(abs(starts[channel]), abs(ends[channel]))
        within = float(max(-low, high) if low < 0 else min(high, max(reach, 1.0)))
        summands, total = within + float(bias[channel]), float(high - low if low < 0 else within)
        error = ((ROUNDINGS + math.sqrt(values.products)) * summands + ROUNDINGS * total) * UNIT_ROUNDOFF
        margin = _distance(starts[channel], ends[channel], low, high)
        if margin <= error:
            largest = min(int(0.5 / error), LARGEST_DENOMINATOR)
            margin, mismatch = _lattice_margin(ratios[:, channel], min(largest, FIRST_SEARCH))
            if not margin:
                margin, mismatch = _lattice_margin(ratios[:, channel], largest)
            error += mismatch * summands
        if margin / error < worst[0] / worst[1]:
            worst = (margin, error)
    return worst


def _distance(start: float, end: float, low: int, high: int) -> float:
    """:return: distance of an interval from the nearest tie between ``low`` and ``high``; 0 if it holds one."""
    ties = np.arange(low, high) + 0.5
    outside = np.maximum(start - ties, ties - end)
    return float(max(outside.min(), 0.0)) if len(ties) else math.inf


def _lattice_margin(ratios: np.ndarray, largest: int) -> tuple[float, float]:
    """:return: 1/2q for the smallest odd q of which all ratios are multiples of 1/q, and how far they are from it."""
    odd = np.arange(1, largest + 1, 2)
    scaled = np.outer(ratios, odd)
    numerators = np.rint(scaled)
    off = np.abs(scaled - numerators) / np.maximum(numerators, 1)
    fits = ((off <= SAME) & ((numerators > 0) | (scaled == 0))).all(0)
    if not fits.any():
        return 0.0, 0.0
    first = int(fits.argmax())
    return 0.5 / float(odd[first]), float(off[:, first].max())
