"""Damage an exported model, so that there is something to find."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx


def negate_weights(source: Path, target: Path, layer: str) -> None:
    """Write the ONNX file ``source`` with the weights of a layer negated to ``target``."""
    model = onnx.load(source)
    producers = {node.output[0]: node for node in model.graph.node}
    node = next(node for node in model.graph.node if node.name == layer)
    name = node.input[1]
    while name in producers:  # DequantizeLinear, and Cast of int4
        name = producers[name].input[0]
    weight = next(item for item in model.graph.initializer if item.name == name)
    data = onnx.numpy_helper.to_array(weight)
    negated = (-np.maximum(data.astype(np.int16), -7 if data.dtype != np.int8 else -127)).astype(data.dtype)
    weight.CopyFrom(onnx.numpy_helper.from_array(negated, weight.name))
    onnx.save(model, target)
