"""
A CPU with BF16 under ``ONEDNN_MAX_CPU_ISA=AVX2``: models cannot be compiled at default properties.

Needs numpy and openvino only; run it as ``ONEDNN_MAX_CPU_ISA=AVX2 python limited_isa.py``.
"""

import numpy as np
import openvino as ov
from openvino import opset13 as ops


def convolution():
    parameter = ops.parameter([1, 16, 8, 8], np.float32)
    weight = ops.constant(np.ones((16, 16, 1, 1), np.float32))
    return ov.Model([ops.convolution(parameter, weight, [1, 1], [0, 0], [0, 0], [1, 1])], [parameter])


def softmax():
    parameter = ops.parameter([1, 8], np.float32)
    weight = ops.constant(np.eye(8, dtype=np.float32))
    inner = ops.softmax(ops.matmul(parameter, weight, False, False), 1)
    return ov.Model([ops.matmul(inner, weight, False, False)], [parameter])


for build in (convolution, softmax):
    for name, properties in (("f32", {"INFERENCE_PRECISION_HINT": "f32"}), ("default", {})):
        try:
            ov.Core().compile_model(build(), "CPU", properties)
            print(f"{build.__name__}, {name}: compiles")
        except RuntimeError as error:
            print(f"{build.__name__}, {name}: {[line for line in str(error).splitlines() if line][-1]}")
