"""Certificates of hand-made ONNX graphs: what they find must be what exact arithmetic finds."""

from __future__ import annotations

import json

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper

from nncf_mpq_plugin.deploy.margins import UNIT_ROUNDOFF, certify


class Graph:
    """Builds a network as the exporter writes it."""

    def __init__(self, step: float = 2.0**-6):
        self.nodes, self.constants = [], []
        self.x = self.quantize("x", step, "in")

    def constant(self, name, value):
        self.constants.append(numpy_helper.from_array(np.asarray(value), name))
        return name

    def node(self, kind, inputs, output, **attributes):
        self.nodes.append(helper.make_node(kind, inputs, [output], output, **attributes))
        return output

    def quantize(self, source, step, name, high=255):
        scale = self.constant(f"{name}.scale", np.float32(step))
        zero = self.constant(f"{name}.zero", np.uint8(0))
        found = self.node("QuantizeLinear", [source, scale, zero], f"{name}.q")
        if high != 255:
            bounds = [self.constant(f"{name}.low", np.uint8(0)), self.constant(f"{name}.high", np.uint8(high))]
            found = self.node("Clip", [found, *bounds], f"{name}.clip")
        return self.node("DequantizeLinear", [found, scale, zero], name)

    def convolution(self, source, source_step, steps, name, integers=1, bias=0):
        data = np.full((len(steps), 3, 1, 1), integers, np.int8)
        step = np.asarray(steps, np.float32)
        inputs = [self.constant(f"{name}.w", data), self.constant(f"{name}.scale", step)]
        inputs.append(self.constant(f"{name}.zero", np.zeros(len(step), np.int8)))
        weight = self.node("DequantizeLinear", inputs, f"{name}.weight", axis=0)
        unit = (step * np.float32(source_step)).astype(np.float32)
        inputs = [self.constant(f"{name}.b", np.full(len(step), bias, np.int32)), self.constant(f"{name}.unit", unit)]
        inputs.append(self.constant(f"{name}.bzero", np.zeros(len(step), np.int32)))
        offset = self.node("DequantizeLinear", inputs, f"{name}.bias", axis=0)
        return self.node("Conv", [source, weight, offset], name)

    def certificate(self):
        shape = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 3, 4, 4])
        output = helper.make_tensor_value_info(self.nodes[-1].output[0], TensorProto.FLOAT, None)
        graph = helper.make_graph(self.nodes, "g", [shape], [output], self.constants)
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])
        return certify(model)


def layer(ratio, step=2.0**-6, out=0.125, integers=100, bias=0):
    graph = Graph(step)
    made = graph.convolution(graph.x, step, np.atleast_1d(ratio) * out / step, "conv", integers, bias)
    graph.quantize(made, out, "y")
    return graph.certificate()


@pytest.mark.parametrize(("p", "q"), [(1, 3), (2, 7), (5, 201), (1, 1001), (7, 5)])
def test_an_odd_denominator_gives_its_margin(p, q):
    margin = layer(p / q).margins[1]
    assert margin.reason is None
    assert margin.margin == pytest.approx(0.5 / q)
    assert UNIT_ROUNDOFF * 64 < margin.error < margin.margin


@pytest.mark.parametrize("ratio", [1 / 2, 3 / 4, 5 / 202, 0.0123416])
def test_an_even_denominator_or_none_gives_no_certificate(ratio):
    certificate = layer([1 / 3, ratio])
    assert not certificate.complete
    assert set(certificate.to_json()["not_certified"]) == {"y"}


def test_the_channel_with_the_smallest_margin_counts():
    assert layer([1 / 3, 1 / 301, 1 / 5]).margins[1].margin == pytest.approx(1 / 602)


def test_values_that_reach_no_tie_need_no_lattice():
    """Three products of at most 255 times a millionth of a step, and half of them after a bias."""
    margin = layer(1e-6, integers=1).margins[1]
    assert margin.reason is None
    assert margin.margin == pytest.approx(0.5 - 3 * 255e-6, rel=1e-3)
    assert layer(1e-6, integers=1, bias=500_000).margins[1].reason is not None


def test_the_input_is_exact_at_a_power_of_two_only():
    assert layer(1 / 3).margins[0].reason is None
    assert "power of two" in layer(1 / 3, step=0.01).margins[0].reason


def test_added_paths_share_their_denominators():
    graph = Graph()
    stored = graph.quantize(graph.convolution(graph.x, 2.0**-6, [8.0 / 3], "first"), 0.125, "stored")
    branch = graph.convolution(stored, 0.125, [1 / 7], "branch")  # 1/7 of a stored step
    graph.quantize(graph.node("Add", [branch, stored], "sum"), 0.125 * 5 / 4, "y")
    margins = graph.certificate().margins
    assert [m.margin for m in margins[1:]] == pytest.approx([1 / 6, 1 / (2 * 35)])  # units 4/35 and 4/5


def test_summands_that_cannot_cancel_add_no_error():
    def error(*integers):
        graph = Graph()
        paths = [graph.convolution(graph.x, 2.0**-6, [8.0 / 3], f"conv{k}", weight) for k, weight in integers]
        graph.quantize(graph.node("Add", paths, "sum"), 0.125, "y")
        return graph.certificate().margins[1].error

    assert error((0, 127), (1, 127)) < 2 * UNIT_ROUNDOFF * 255 * (8 + 3**0.5)
    assert error((0, 127), (1, -127)) > 50 * error((0, 127), (1, 127))


def test_averages_divide_the_unit():
    graph = Graph()
    stored = graph.quantize(graph.convolution(graph.x, 2.0**-6, [8.0 / 3], "first"), 0.125, "stored")
    graph.quantize(graph.node("GlobalAveragePool", [stored], "pool"), 0.125 * 17 / 16, "odd")
    graph.quantize("pool", 0.125, "even")
    found = {m.tensor: m for m in graph.certificate().margins}
    assert found["odd"].margin == pytest.approx(1 / 34)
    assert found["even"].reason is not None  # sixteenths


def test_a_clipping_bound_is_a_value_like_others():
    def bounded(bound, high=15):
        graph = Graph()
        made = graph.convolution(graph.x, 2.0**-6, [8.0 / 3], "conv")
        limits = [graph.constant("low", np.float32(0)), graph.constant("high", np.float32(bound))]
        graph.quantize(graph.node("Clip", [made, *limits], "clipped"), 0.125, "y", high)
        return graph.certificate()

    assert bounded(0.125 * 4).complete
    assert not bounded(0.125 * 4.5).complete
    assert bounded(0.125 * 16.5).complete  # above the quantizer's range


def test_functions_that_make_other_values_are_named():
    graph = Graph()
    made = graph.node("HardSwish", [graph.convolution(graph.x, 2.0**-6, [0.1], "conv")], "swish")
    graph.quantize(made, 0.125, "y")
    found = graph.certificate().to_json()
    assert (found["tensors"], found["certified"]) == (2, 1)
    assert "HardSwish" in found["not_certified"]["y"]
    json.dumps(found, allow_nan=False)


def test_a_constant_that_the_network_adds_to_its_input_is_no_zero_point():
    graph = Graph()
    graph.nodes, graph.constants = [], []
    total = graph.node("Add", ["x", graph.constant("c", np.float32(0.3))], "total")
    graph.quantize(total, 2.0**-6, "in")
    (margin,) = graph.certificate().margins
    assert margin.margin is None
    assert margin.reason == "computed from the network's input"
