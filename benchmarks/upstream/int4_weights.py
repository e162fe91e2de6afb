"""
A quantized convolution whose ONNX file holds its weights as int8, int4 or int2: which kernel do the runtimes take?

Needs numpy, ml_dtypes, onnx, onnxruntime and openvino only.
"""

import tempfile
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import onnxruntime
import openvino as ov
from onnx import TensorProto, helper, numpy_helper

CHANNELS, SIZE = 64, 16
TYPES = {"int8": np.int8, "int4": ml_dtypes.int4, "int2": ml_dtypes.int2}
random = np.random.default_rng(0)
x = random.random((1, CHANNELS, SIZE, SIZE), np.float32)
integers = random.integers(-2, 2, (CHANNELS, CHANNELS, 3, 3)).astype(np.int8)


def convolution(kind, cast):
    """QuantizeLinear -> DequantizeLinear -> Conv -> QuantizeLinear -> DequantizeLinear."""
    constants = {
        "step": np.float32(0.02),
        "zero": np.uint8(0),
        "weight": integers.astype(TYPES[kind]),
        "weight_step": np.full(CHANNELS, 0.01, np.float32),
    }
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "step", "zero"], ["a"]),
        helper.make_node("DequantizeLinear", ["a", "step", "zero"], ["b"]),
        helper.make_node("DequantizeLinear", ["cast" if cast else "weight", "weight_step"], ["w"], axis=0),
        helper.make_node("Conv", ["b", "w"], ["c"]),
        helper.make_node("QuantizeLinear", ["c", "step", "zero"], ["d"]),
        helper.make_node("DequantizeLinear", ["d", "step", "zero"], ["y"]),
    ]
    if cast:
        nodes.insert(2, helper.make_node("Cast", ["weight"], ["cast"], to=TensorProto.INT8))
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in "xy"]
    values[0] = helper.make_tensor_value_info("x", TensorProto.FLOAT, x.shape)
    initializers = [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()]
    graph = helper.make_graph(nodes, "convolution", values[:1], values[1:], initializers)
    opset = helper.make_opsetid("", 25 if kind == "int2" else 21)
    return helper.make_model(graph, opset_imports=[opset], ir_version=helper.find_min_ir_version_for([opset]))


def in_onnxruntime(path):
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.optimized_model_filepath = f"{path}.optimized"
    onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return next(n.op_type for n in onnx.load(options.optimized_model_filepath).graph.node if "Conv" in n.op_type)


def in_openvino(path):
    compiled = ov.Core().compile_model(path, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    nodes = [op.get_rt_info() for op in compiled.get_runtime_model().get_ops()]
    return next(str(n["primitiveType"].astype(str)) for n in nodes if n["layerType"].astype(str) == "Convolution")


for kind, cast in (("int8", False), ("int4", False), ("int4", True), ("int2", False), ("int2", True)):
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder) / "model.onnx")
        onnx.save(convolution(kind, cast), path)
        found = []
        for run in (in_onnxruntime, in_openvino):
            try:
                found.append(run(path))
            except Exception:
                found.append("refused")
        size = Path(path).stat().st_size
    print(f"{kind}{' and Cast' if cast else ''}: {size} bytes, ONNX Runtime {found[0]}, OpenVINO {found[1]}")
