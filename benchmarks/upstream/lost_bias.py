"""
The first layers of a vision transformer in ONNX: a quantized convolution, and a class token repeated over the batch.

Needs numpy, onnx and openvino only.
"""

import tempfile
from pathlib import Path

import numpy as np
import onnx
import openvino as ov
from onnx import TensorProto, helper, numpy_helper

CHANNELS, STEP = 16, np.float32(0.05)
random = np.random.default_rng(0)
weight = random.normal(0, 0.1, (CHANNELS, 3, 4, 4)).astype(np.float32)
bias = np.arange(CHANNELS, dtype=np.float32) / 2
x = random.normal(0, 1, (2, 3, 16, 16)).astype(np.float32)

floats = {"weight": weight, "bias": bias, "step": STEP, "token": np.ones((1, 1, CHANNELS), np.float32)}
floats |= {"nothing": np.float32(0)}
shapes = {"patches": [0, CHANNELS, 16], "rest": [1, CHANNELS], "from": [0], "to": [1], "axis": [1]}
constants = floats | {name: np.array(value) for name, value in shapes.items()} | {"zero": np.uint8(64)}
layers = [
    helper.make_node("Conv", ["x", "weight", "bias"], ["y"], strides=[4, 4]),
    helper.make_node("QuantizeLinear", ["y", "step", "zero"], ["q"]),
    helper.make_node("DequantizeLinear", ["q", "step", "zero"], ["z"]),
    helper.make_node("Reshape", ["z", "patches"], ["r"]),
    helper.make_node("Transpose", ["r"], ["t"], perm=[0, 2, 1]),
]
by_shape = [
    helper.make_node("Shape", ["t"], ["shape"], end=1),
    helper.make_node("Concat", ["shape", "rest"], ["size"], axis=0),
    helper.make_node("Expand", ["token", "size"], ["tokens"]),
]
by_values = [
    helper.make_node("Slice", ["t", "from", "to", "axis"], ["row"]),
    helper.make_node("Mul", ["row", "nothing"], ["zeros"]),
    helper.make_node("Add", ["token", "zeros"], ["tokens"]),
]
windows = x.reshape(2, 3, 4, 4, 4, 4)
expected = np.einsum("oikl,nihkwl->nohw", weight, windows) + bias[:, None, None]
expected = np.clip(np.rint(expected / STEP), -64, 191) * STEP

for kind, tokens in (("by its shape", by_shape), ("by its values", by_values)):
    graph = helper.make_graph(
        [*layers, *tokens, helper.make_node("Concat", ["tokens", "t"], ["output"], axis=1)],
        "tokens",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 3, 16, 16])],
        [helper.make_tensor_value_info("output", TensorProto.FLOAT, ["batch", 17, CHANNELS])],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)
    onnx.checker.check_model(model, full_check=True)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        onnx.save(model, path)
        got = {"read": ov.Core().read_model(path), "converted": ov.convert_model(path)}
    for how, read in got.items():
        result = ov.Core().compile_model(read, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})({0: x})[0]
        off = abs(result[:, 1:].transpose(0, 2, 1).reshape(expected.shape) - expected).mean((0, 2, 3))
        print(f"batch {kind}, ONNX {how}: channels 1 and 15 are off by {off[1]:.2f} and {off[15]:.2f}")
