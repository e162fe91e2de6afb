"""
Layer norm under ``ONEDNN_MAX_CPU_ISA=AVX2`` on a CPU with AVX512: the process crashes at some widths.

Needs numpy and openvino only; run it as ``ONEDNN_MAX_CPU_ISA=AVX2 python limited_isa_layer_norm.py``.
"""

import signal
import subprocess
import sys

import numpy as np
import openvino as ov
from openvino import opset13 as ops


def run(width):
    parameter = ops.parameter([1, width], np.float32)
    model = ov.Model([ops.mvn(parameter, np.array([1]), True, 1e-5, "inside_sqrt")], [parameter])
    ov.Core().compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})([np.ones((1, width), np.float32)])


if len(sys.argv) > 1:
    run(int(sys.argv[1]))
else:
    for width in (12, 16):
        code = subprocess.run([sys.executable, __file__, str(width)]).returncode
        print(f"{width} values: {'runs' if code == 0 else f'killed by {signal.Signals(-code).name}'}")
