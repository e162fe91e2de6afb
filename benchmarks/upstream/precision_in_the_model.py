"""
A model cannot carry the property that it must not run in bfloat16.

Needs numpy and openvino only; shows something on CPUs with AVX512-BF16 or AMX.
"""

import tempfile
from pathlib import Path

import numpy as np
import openvino as ov
from openvino import opset13 as ops

parameter = ops.parameter([1, 16, 8, 8], np.float32)
weight = ops.constant(np.full((16, 16, 1, 1), 1.001, np.float32))
model = ov.Model([ops.convolution(parameter, weight, [1, 1], [0, 0], [0, 0], [1, 1])], [parameter])
model.set_rt_info("f32", ["runtime_options", "INFERENCE_PRECISION_HINT"])
with tempfile.TemporaryDirectory() as folder:
    path = str(Path(folder) / "model.xml")
    ov.save_model(model, path, compress_to_fp16=False)
    for name, properties in (
        ("in the model's runtime_options", {}),
        ("at compile time", {"INFERENCE_PRECISION_HINT": "f32"}),
    ):
        compiled = ov.Core().compile_model(path, "CPU", properties)
        got = compiled({0: np.ones((1, 16, 8, 8), np.float32)})[0][0, 0, 0, 0]
        print(f"f32 {name}: runs in {compiled.get_property('INFERENCE_PRECISION_HINT')}, {got:.5f}, expected 16.01600")
