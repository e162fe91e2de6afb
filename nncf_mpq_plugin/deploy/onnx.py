"""
The deployable form: ONNX of standard operators whose arithmetic integer kernels compute exactly.

* An activation at b bits is ``QuantizeLinear`` to uint8, ``Clip`` to the b-bit range, ``DequantizeLinear``: an INT8
  carrier, for which runtimes have kernels, holding b-bit values. Signed ones have zero point 2^(b-1): OpenVINO's
  kernels for int8 activations are wrong on CPUs without VNNI, and it adds the zero point in float32 before it rounds,
  which costs digits in proportion.
* A weight is a constant on the b-bit grid with one scale per output channel: int4 up to 4 bits, int8 above. A ``Cast``
  to int8, which runtimes fold when they load the file, stands behind the former: without it they would compute in
  floating point.
* A bias is an int32 constant in units of weight step x input step, the accumulator's grid.

A layer that reads activations in floating point has ``Cast`` and ``Mul`` behind its integers and a float bias.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
from onnx import NodeProto, helper, numpy_helper

from nncf_mpq_plugin.deploy.graph import is_marker
from nncf_mpq_plugin.errors import UnsupportedModelError
from nncf_mpq_plugin.files import written_atomically

OPSET = 21  # the first with int4; it changes nothing else in what torch writes
TRANSPARENT = {"MaxPool", "Reshape", "Transpose", "Flatten", "Squeeze", "Unsqueeze", "Identity", "Pad", "Gather"}
_IDENTITY_TOLERANCE = 1e-5
_INT32 = 2**31 - 1


class _Rewriter:
    def __init__(self, model: onnx.ModelProto):
        self.graph = model.graph
        self.constants = {item.name: numpy_helper.to_array(item) for item in self.graph.initializer}
        self.nodes: list[NodeProto] = list(self.graph.node)
        for node in [node for node in self.nodes if node.op_type == "Constant" and len(node.attribute) == 1]:
            if node.attribute[0].name == "value":
                self.constants[node.output[0]] = numpy_helper.to_array(node.attribute[0].t)
                self.nodes.remove(node)
        for node in [node for node in self.nodes if node.op_type == "Identity" and node.input[0] in self.constants]:
            self.constants[node.output[0]] = self.constants[node.input[0]]
            self.nodes.remove(node)
        self.inputs = {item.name for item in self.graph.input}
        self.scales: dict[str, float] = {}  # tensor on an activation grid -> step
        self.weight_scales: dict[str, np.ndarray] = {}  # dequantized weight -> step by output channel

    def consumers(self, name: str) -> list[NodeProto]:
        return [node for node in self.nodes if name in node.input]

    def constant(self, name: str, value: np.ndarray | np.generic) -> str:
        self.constants[name] = np.asarray(value)
        return name

    def run(self) -> None:
        self.fold_identity_batch_norms()
        self.reshapes_before_quantizers()
        self.quantizers_to_standard_operators()
        self.strides_out_of_pointwise_convolutions()
        self.weights_of_float_layers()
        self.biases_to_integers()
        self.small_weights_to_int4()
        self.repeated_constants_by_values()
        read, kept = {item.name for item in self.graph.output}, []
        for node in reversed(self.nodes):
            if read.intersection(node.output):
                kept.append(node)
                read.update(node.input)
        del self.graph.node[:], self.graph.initializer[:], self.graph.value_info[:]
        self.graph.node.extend(reversed(kept))
        self.graph.initializer.extend(
            numpy_helper.from_array(value, name) for name, value in self.constants.items() if name in read
        )

    def fold_identity_batch_norms(self) -> None:
        """Freezing left batch norms as identities that carry the bias: move it into the layer."""
        producers = {output: node for node in self.nodes for output in node.output}
        for norm in [node for node in self.nodes if node.op_type == "BatchNormalization"]:
            layer = producers.get(norm.input[0])
            gamma, beta, mean, variance = (self.constants[name] for name in norm.input[1:5])
            epsilon = next((a.f for a in norm.attribute if a.name == "epsilon"), 1e-5)
            is_identity = np.abs(gamma / np.sqrt(variance + epsilon) - 1).max() < _IDENTITY_TOLERANCE and not mean.any()
            if layer is None or layer.op_type not in ("Conv", "Gemm") or not is_identity:
                continue
            if len(self.consumers(layer.output[0])) != 1:
                continue
            if len(layer.input) > 2:
                beta = beta + self.constants[layer.input[2]]
                layer.input.pop()
            layer.input.append(self.constant(f"{layer.output[0]}.bias", beta.astype(np.float32)))
            layer.output[0] = norm.output[0]
            self.nodes.remove(norm)

    def reshapes_before_quantizers(self) -> None:
        """ONNX Runtime makes an integer kernel of a linear layer only where DequantizeLinear stands next to it."""
        fixed = {*self.constants, *self.inputs, *(item.name for item in self.graph.output)}
        for node in [node for node in self.nodes if is_marker(node) and node.input[0] not in fixed]:
            readers = self.consumers(node.output[0])
            if len(readers) != 1 or readers[0].op_type not in ("Flatten", "Reshape", "Squeeze"):
                continue
            (reshape,) = readers
            if reshape.output[0] in fixed or any(name not in self.constants for name in reshape.input[1:]):
                continue
            for reader in self.consumers(reshape.output[0]):
                reader.input[:] = [node.output[0] if name == reshape.output[0] else name for name in reader.input]
            reshape.input[0], node.input[0] = node.input[0], reshape.output[0]
            first, second = self.nodes.index(node), self.nodes.index(reshape)
            self.nodes.insert(first, self.nodes.pop(second))

    def quantizers_to_standard_operators(self) -> None:
        result: list[NodeProto] = []
        skipped: set[int] = set()
        for node in self.nodes:
            if id(node) in skipped:
                continue
            if is_marker(node):
                attributes = {a.name: a.i for a in node.attribute}
                low, high, step = attributes["low"], attributes["high"], self.constants[node.input[1]]
                _check_numbers(node.input[0], step, self.constants.get(node.input[0], np.zeros(1)))
                if node.input[0] in self.constants:
                    replacement, transposed = self.weight(node, low, high, step)
                    skipped.update(id(item) for item in transposed)
                else:
                    replacement = self.activation(node, low, high, float(step[0]))
                result.extend(replacement)
            else:
                if node.op_type in TRANSPARENT and node.input and node.input[0] in self.scales:
                    self.scales[node.output[0]] = self.scales[node.input[0]]
                elif node.op_type == "Concat" and all(name in self.scales for name in node.input):
                    steps = {self.scales[name] for name in node.input}
                    if len(steps) == 1:  # unified scales: all on one grid
                        self.scales[node.output[0]] = steps.pop()
                result.append(node)
        self.nodes = result

    def weight(self, node: NodeProto, low: int, high: int, step: np.ndarray) -> tuple[list[NodeProto], list[NodeProto]]:
        """:return: the nodes that replace the marker, and transpositions that the constant has taken in."""
        name, output = node.input[0], node.output[0]
        value = self.constants[name].astype(np.float32)
        step = np.broadcast_to(step.astype(np.float32), (value.shape[0],)).copy()
        columns = step.reshape(-1, *[1] * (value.ndim - 1))
        integers = np.clip(np.rint(value / columns), low, high).astype(np.int8)
        replacement, transposed = [], []
        outputs = [(output, 0, integers)]
        for consumer in self.consumers(output):
            if consumer.op_type == "Transpose" and value.ndim == 2:
                transposed.append(consumer)
                outputs.append((consumer.output[0], 1, np.ascontiguousarray(integers.T)))
        if transposed and len(transposed) == len(self.consumers(output)):
            outputs = outputs[1:]
        for tensor, axis, data in outputs:
            inputs = [
                self.constant(f"{tensor}.integers", data),
                self.constant(f"{tensor}.scale", step),
                self.constant(f"{tensor}.zero_point", np.zeros(len(step), np.int8)),
            ]
            replacement.append(helper.make_node("DequantizeLinear", inputs, [tensor], name=tensor, axis=axis))
            self.weight_scales[tensor] = step
        return replacement, transposed

    def activation(self, node: NodeProto, low: int, high: int, step: float) -> list[NodeProto]:
        output, zero = node.output[0], max(-low, 0)
        low, high = low + zero, high + zero
        scale = self.constant(f"{output}.scale", np.float32(step))
        zero_point = self.constant(f"{output}.zero_point", np.uint8(zero))
        source, zero_before = node.input[0], zero_point
        nodes = []
        if zero and source in self.inputs:  # NNCF adds the zero point before it rounds, which rounds the sum itself
            offset = self.constant(f"{output}.offset", np.float32(step * zero))
            zero_before = self.constant(f"{output}.no_zero_point", np.uint8(0))
            nodes.append(helper.make_node("Add", [source, offset], [f"{output}.shifted"], f"{output}.shifted"))
            source = f"{output}.shifted"
        nodes += [
            helper.make_node("QuantizeLinear", [source, scale, zero_before], [f"{output}.q"], f"{output}.q"),
            helper.make_node("DequantizeLinear", [f"{output}.q", scale, zero_point], [output], output),
        ]
        if (low, high) != (0, 255):
            bounds = [self.constant(f"{output}.low", np.uint8(low)), self.constant(f"{output}.high", np.uint8(high))]
            clip = helper.make_node("Clip", [f"{output}.q", *bounds], [f"{output}.clip"], f"{output}.clip")
            nodes.insert(-1, clip)
            nodes[-1].input[0] = f"{output}.clip"
        self.scales[output] = step
        return nodes

    def strides_out_of_pointwise_convolutions(self) -> None:
        """
        A strided 1x1 convolution over an odd multiple of 8 channels becomes one without stride behind a ``MaxPool`` of
        single pixels. oneDNN's AVX2 kernel for the former copies the pixels it reads to a buffer of its thread, 16
        channels at a time, and so writes over another thread's pixels (docs/upstream.md).
        """
        result: list[NodeProto] = []
        for node in self.nodes:
            attributes = {a.name: list(a.ints) for a in node.attribute}
            strides = attributes.get("strides", [])
            if (
                node.op_type == "Conv"
                and node.input[0] in self.scales
                and node.input[1] in self.weight_scales
                and self.constants[f"{node.input[1]}.integers"].shape[1] % 16 == 8
                and set(attributes["kernel_shape"]) == {1}
                and not any(attributes.get("pads", []))
                and max(strides) > 1
            ):
                pixels = f"{node.output[0]}.pixels"
                kernel = [1] * len(strides)
                result.append(
                    helper.make_node("MaxPool", node.input[:1], [pixels], pixels, kernel_shape=kernel, strides=strides)
                )
                self.scales[pixels] = self.scales[node.input[0]]
                node.input[0] = pixels
                next(a for a in node.attribute if a.name == "strides").ints[:] = kernel
            result.append(node)
        self.nodes = result

    def weights_of_float_layers(self) -> None:
        """
        Cast and Mul in place of DequantizeLinear where the activations are not quantized: ONNX Runtime makes a kernel
        of the latter (MatMulNBits) that rounds the activations to 8 bits.
        """
        integer = {n.input[1] for n in self.nodes if len(n.input) > 1 and n.input[0] in self.scales}
        result: list[NodeProto] = []
        for node in self.nodes:
            tensor = node.output[0]
            if node.op_type != "DequantizeLinear" or tensor not in self.weight_scales or tensor in integer:
                result.append(node)
                continue
            shape = [1] * self.constants[node.input[0]].ndim
            shape[node.attribute[0].i] = -1
            scale = self.constant(f"{tensor}.scale", self.weight_scales[tensor].reshape(shape))
            cast = f"{tensor}.cast"
            result.append(helper.make_node("Cast", [node.input[0]], [cast], cast, to=onnx.TensorProto.FLOAT))
            result.append(helper.make_node("Mul", [cast, scale], [tensor], name=tensor))
        self.nodes = result

    def biases_to_integers(self) -> None:
        result: list[NodeProto] = []
        for node in self.nodes:
            quantized = node.op_type in ("Conv", "Gemm") and len(node.input) > 2
            if quantized and node.input[0] in self.scales and node.input[1] in self.weight_scales:
                step = np.float32(self.scales[node.input[0]])
                unit = (self.weight_scales[node.input[1]] * step).astype(np.float32)
                bias = self.constants[node.input[2]]
                with np.errstate(all="ignore"):
                    integers = np.rint(bias.astype(np.float64) / unit)
                if not (np.abs(integers) <= _INT32).all():  # so NaN is refused, too
                    msg = (
                        f"Layer {node.name!r}: a bias is no number or over 2^31 accumulator units. Its scales have "
                        "collapsed or training has diverged; train with a lower learning rate, or keep the layer at 8 "
                        "bits."
                    )
                    raise UnsupportedModelError(msg)
                name = f"{node.output[0]}.bias"
                inputs = [
                    self.constant(f"{name}.integers", integers.astype(np.int32)),
                    self.constant(f"{name}.scale", unit),
                    self.constant(f"{name}.zero_point", np.zeros(len(unit), np.int32)),
                ]
                result.append(helper.make_node("DequantizeLinear", inputs, [f"{name}.dq"], f"{name}.dq", axis=0))
                node.input[2] = f"{name}.dq"
            result.append(node)
        self.nodes = result

    def small_weights_to_int4(self) -> None:
        result: list[NodeProto] = []
        for node in self.nodes:
            name = node.input[0] if node.input else ""
            value = self.constants.get(name, np.zeros(0))
            if value.dtype == np.int8 and value.ndim > 1 and value.min() >= -8 and value.max() <= 7:
                packed = self.constant(f"{name}.int4", value.astype(ml_dtypes.int4))
                result.append(helper.make_node("Cast", [packed], [name], name, to=onnx.TensorProto.INT8))
                del self.constants[name]
            result.append(node)
        self.nodes = result

    def repeated_constants_by_values(self) -> None:
        """
        A constant that is repeated over the batch and joined to a tensor (the class token of a vision transformer)
        takes the batch from that tensor's values, times 0: OpenVINO loses the bias of the convolution before it where
        its shape is read (docs/upstream.md).
        """
        producers = {output: node for node in self.nodes for output in node.output}
        reads = Counter(name for node in self.nodes for name in node.input)
        repeated = {
            name
            for name, node in producers.items()
            if node.op_type == "Expand" and reads[name] == 1 and self.only_first_grows(node, producers)
        }
        result: list[NodeProto] = []
        for node in self.nodes:
            if node.op_type == "Concat":
                (axis,) = (a.i for a in node.attribute)
                others = [name for name in node.input if name not in repeated]
                for output in [name for name in node.input if name in repeated and axis > 0 and others]:
                    result.remove(producers[output])
                    token, row, zeros = producers[output].input[0], f"{output}.row", f"{output}.zeros"
                    bounds = [
                        self.constant(f"{output}.{key}", np.array([value], np.int64))
                        for key, value in (("first", 0), ("end", 1), ("axis", axis))
                    ]
                    nothing = self.constant(f"{output}.nothing", np.float32(0))
                    result.append(helper.make_node("Slice", [others[0], *bounds], [row], row))
                    result.append(helper.make_node("Mul", [row, nothing], [zeros], zeros))
                    result.append(helper.make_node("Add", [token, zeros], [output], output))
            result.append(node)
        self.nodes = result

    def only_first_grows(self, expand: NodeProto, producers: Mapping[str, NodeProto]) -> bool:
        """:return: whether a float constant is seen to keep all dimensions but the first, which is 1."""
        token = self.constants.get(expand.input[0])
        if token is None or token.dtype != np.float32:
            return False
        before = {"Where": 2, "Reshape": 0}  # torch replaces -1 in the shape behind its Concat
        node = producers.get(expand.input[1])
        while node is not None and node.op_type in before:
            node = producers.get(node.input[before[node.op_type]])
        if node is None or node.op_type != "Concat" or len(node.input) != token.ndim or token.shape[0] != 1:
            return False
        sizes = [self.constants.get(name) for name in node.input[1:]]
        return all(
            size is not None and size.tolist() in ([-1], [length])
            for size, length in zip(sizes, token.shape[1:], strict=True)
        )


def _check_numbers(tensor: str, step: np.ndarray, values: np.ndarray) -> None:
    """:raises UnsupportedModelError: for steps or weights that are no numbers."""
    usable = np.isfinite(step).all() and (step > 0).all()
    if not (usable and np.isfinite(values).all()):
        what = "a weight" if usable else "its quantizer's scale"
        msg = (
            f"{tensor!r}: {what} is zero, infinite or no number. Training has diverged; train with a lower learning "
            "rate (fine_tuning.learning_rate, scale_learning_rate)."
        )
        raise UnsupportedModelError(msg)


def to_standard_operators(marked: onnx.ModelProto) -> onnx.ModelProto:
    """
    Replace the marker nodes.

    :param marked: what :func:`nncf_mpq_plugin.deploy.graph.marked_graph` returned; it is changed in place.
    :return: a checked model of standard operators only.
    """
    _Rewriter(marked).run()
    del marked.opset_import[:]
    marked.opset_import.append(helper.make_opsetid("", OPSET))
    marked.producer_name = "nncf-mpq-plugin"
    onnx.checker.check_model(marked, full_check=True)
    return marked


def weights_of_float_layers(model: onnx.ModelProto) -> set[str]:
    """:return: names of the dequantized weights whose layers read activations in floating point."""
    types = (onnx.TensorProto.INT8, onnx.TensorProto.INT4)
    integers = {item.name for item in model.graph.initializer if item.data_type in types}
    for node in model.graph.node:
        if node.op_type == "Cast" and node.input[0] in integers and node.attribute[0].i == onnx.TensorProto.INT8:
            integers.add(node.output[0])
    casts = {node.output[0] for node in model.graph.node if node.op_type == "Cast" and node.input[0] in integers}
    return {node.output[0] for node in model.graph.node if node.op_type == "Mul" and node.input[0] in casts}


def save_onnx(model: onnx.ModelProto, path: str | Path) -> None:
    """Write the model; the file appears only whole."""
    with written_atomically(path) as temporary:
        onnx.save(model, temporary)


def count_operators(model: onnx.ModelProto) -> dict[str, int]:
    """:return: operator type -> how often it occurs."""
    counts: dict[str, int] = defaultdict(int)
    for node in model.graph.node:
        counts[node.op_type] += 1
    return dict(counts)
