"""
OpenVINO IR whose weights take exactly their bits on disk.

The IR is the conversion of the ONNX file. Each int8 weight constant is then stored as ``u2``, ``u3``, ``u4`` or ``u6``
(5 bits: a ``u4`` and a ``u1`` plane; 7 bits, and 8 in half range: ``u6`` and ``u1``), unpacked to int8 by constant
folding when the model is compiled. Where a layer reads floating point, its weights are unpacked to i4 (up to 4 bits; 4
are stored so) or i8, which linear layers keep compressed in memory. With a zero point (u2, u4) they would take a third
longer in bfloat16.
"""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import openvino as ov
from onnx import numpy_helper
from openvino import opset13 as ops

from nncf_mpq_plugin.deploy.attention import simplify_attention
from nncf_mpq_plugin.deploy.onnx import TRANSPARENT, weights_of_float_layers
from nncf_mpq_plugin.errors import InputError
from nncf_mpq_plugin.files import written_atomically

_PLANES = {1: (1,), 2: (2,), 3: (3,), 4: (4,), 5: (4, 1), 6: (6,), 7: (6, 1)}
_TYPES = {1: ov.Type.u1, 2: ov.Type.u2, 3: ov.Type.u3, 4: ov.Type.u4, 6: ov.Type.u6}


def to_openvino(onnx_path: str | Path) -> ov.Model:
    """
    Convert the deployable ONNX file and pack its weights.

    :param onnx_path: what :func:`nncf_mpq_plugin.deploy.export` wrote.
    :raises InputError: if OpenVINO cannot read the file.
    """
    try:
        source = onnx.load(onnx_path)
        _clip_before_rounding(source)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "model.onnx"
            onnx.save(source, path)
            model = ov.convert_model(str(path))
    except Exception as error:
        msg = f"{onnx_path}: OpenVINO cannot read it ({error})."
        raise InputError(msg) from error
    compressed = weights_of_float_layers(source)
    for node in model.get_ordered_ops():
        if node.get_type_name() == "Constant" and node.get_element_type() == ov.Type.i8 and len(node.shape) > 1:
            _pack(node, compressed)
        elif node.get_type_name() == "Constant" and node.get_element_type() == ov.Type.i32:
            _fold_bias(node)
    simplify_attention(model)
    model.validate_nodes_and_infer_types()
    return model


def save_ir(model: ov.Model, path: str | Path) -> None:
    """
    Write ``path`` (.xml) and the .bin beside it; the .xml appears last and both only whole.

    :param path: ends in ``.xml``.
    """
    with written_atomically(path) as temporary, written_atomically(Path(path).with_suffix(".bin")):
        ov.save_model(model, str(temporary), compress_to_fp16=False)


def _clip_before_rounding(model: onnx.ModelProto) -> None:
    """
    Make Clip -> QuantizeLinear of QuantizeLinear -> Clip: the same integers, in fewer kernels of OpenVINO where a
    stored tensor is quantized again. (The file keeps the other order: ONNX Runtime would leave the integer kernels.)
    Two kinds keep that order here, too: behind a layer norm, OpenVINO's values would be further from exact ones; a
    stored tensor that is signed would be converted to float32 and back.

    A ReLU or ReLU6 that nothing else reads becomes part of the Clip, but not behind these: OpenVINO would run both.
    """
    reads = Counter(name for node in model.graph.node for name in node.input)
    reads.update(item.name for item in model.graph.output)
    producers = {output: node for node in model.graph.node for output in node.output}
    constants = {item.name: numpy_helper.to_array(item) for item in model.graph.initializer}
    nodes, unread = list(model.graph.node), set()

    def origin(tensor: str) -> str:
        producer = producers.get(tensor)
        while producer is not None and producer.op_type in TRANSPARENT:
            producer = producers.get(producer.input[0])
        return producer.op_type if producer is not None else ""

    for index, clip in enumerate(nodes):
        around = [node.op_type for node in nodes[index - 1 : index + 2]]
        if around != ["QuantizeLinear", "Clip", "DequantizeLinear"] or nodes[index - 1].output[0] != clip.input[0]:
            continue
        rounding, dequantized = nodes[index - 1], nodes[index + 1]
        shifted = rounding.input[0] == f"{dequantized.output[0]}.shifted"
        first = index - 2 if shifted else index - 1
        step, zero_point = (constants[name].astype(np.float32) for name in dequantized.input[1:])
        kind = origin(nodes[first].input[0])
        if kind == "LayerNormalization" or (kind == "DequantizeLinear" and zero_point):
            continue
        low, high = (step * (constants[name].astype(np.float32) - zero_point) for name in clip.input[1:])
        clip.input[0], nodes[first].input[0] = nodes[first].input[0], clip.output[0]
        before = producers.get(clip.input[0])
        bounds = None if before is None or reads[clip.input[0]] > 1 else _bounds(before, constants)
        kinds = ("LayerNormalization", "DequantizeLinear")
        if before is not None and bounds is not None and origin(before.input[0]) not in kinds:
            low, high = np.maximum(low, bounds[0]).astype(np.float32), np.minimum(high, bounds[1]).astype(np.float32)
            clip.input[0] = before.input[0]
            unread.add(before.output[0])
        for port, value in ((1, low), (2, high)):
            clip.input[port] += ".value"
            model.graph.initializer.append(numpy_helper.from_array(value, clip.input[port]))
        dequantized.input[0] = rounding.output[0]
        nodes.insert(first, nodes.pop(index))
    del model.graph.node[:]
    model.graph.node.extend(node for node in nodes if node.output[0] not in unread)


def _bounds(node: onnx.NodeProto, constants: Mapping[str, np.ndarray]) -> tuple[Any, Any] | None:
    """:return: what a ReLU or a ReLU6 cuts off at; None for what is neither."""
    if node.op_type == "Relu":
        return 0, np.inf
    if node.op_type == "Clip" and len(node.input) == 3 and all(name in constants for name in node.input[1:]):
        return constants[node.input[1]], constants[node.input[2]]
    return None


def _pack(constant: ov.Node, compressed: set[str]) -> None:
    """Replace Constant(i8), which Convert [-> Subtract 0] -> Multiply(step) dequantize, by packed planes."""
    convert = _only_consumer(constant.output(0), "Convert")
    after = convert and _only_consumer(convert.output(0), None)
    if after is not None and after.get_type_name() == "Subtract":
        after = _only_consumer(after.output(0), None)
    if convert is None or after is None or after.get_type_name() != "Multiply":
        return
    integers = constant.data.astype(np.int16)
    bits = max(_bits_for(int(integers.min()), int(integers.max())), 1)
    if bits > 7:
        return
    floating = after.get_friendly_name() in compressed
    if floating and bits == 4:  # there is nothing to unpack
        weight = ops.constant(integers.astype(np.int8), dtype=ov.Type.i4)
    else:
        offset = 2 ** (bits - 1)
        centred = ops.subtract(_planes(integers + offset, bits), ops.constant(np.float32(offset)))
        weight = ops.convert(centred, "i4" if floating and bits <= 4 else "i8")
    for target in constant.output(0).get_target_inputs():
        target.replace_source_output(weight.output(0))


def _planes(unsigned: np.ndarray, bits: int) -> ov.Node:
    """:return: constants at exactly ``bits`` and what puts them together, in float32: it folds in the least memory."""
    value, shift = None, 0
    for plane_bits in _PLANES[bits]:
        plane = ((unsigned >> shift) & (2**plane_bits - 1)).astype(np.uint8)
        part = ops.convert(ops.constant(plane, dtype=_TYPES[plane_bits]), "f32")
        if shift:
            part = ops.multiply(part, ops.constant(np.float32(2**shift)))
        value = part if value is None else ops.add(value, part)
        shift += plane_bits
    return value


def _fold_bias(constant: ov.Node) -> None:
    """Replace Constant(i32) -> Convert -> Multiply(unit) by the product: four bytes a channel instead of eight."""
    convert = _only_consumer(constant.output(0), "Convert")
    after = convert and _only_consumer(convert.output(0), "Multiply")
    unit = _constant_value(after.input_value(1)) if after else None
    if after is None or unit is None:
        return
    value = ops.constant(constant.data.astype(np.float32) * unit.astype(np.float32))
    value.set_friendly_name(after.get_friendly_name())
    for target in after.output(0).get_target_inputs():
        target.replace_source_output(value.output(0))


def _bits_for(low: int, high: int) -> int:
    return next(bits for bits in range(1, 9) if -(2 ** (bits - 1)) <= low and high <= 2 ** (bits - 1) - 1)


def _only_consumer(output: ov.Output, kind: str | None) -> ov.Node | None:
    consumers = [target.get_node() for target in output.get_target_inputs()]
    if len(consumers) != 1 or (kind is not None and consumers[0].get_type_name() != kind):
        return None
    return consumers[0]


def _constant_value(output: ov.Output) -> np.ndarray | None:
    """:return: the value of a constant, looking through reshapes of it."""
    node = output.get_node()
    if node.get_type_name() == "Constant":
        return np.asarray(node.data)
    if node.get_type_name() in ("Reshape", "Unsqueeze", "Convert"):
        value = _constant_value(node.input_value(0))
        return None if value is None else value.reshape(tuple(node.get_output_shape(0)))
    return None
