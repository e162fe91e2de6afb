"""
A linear layer of uint8 activations and full-range int8 weights: kernels without VNNI saturate in between.

Needs numpy and openvino only; run it as ``ONEDNN_MAX_CPU_ISA=AVX2 python saturation.py``.
"""

import numpy as np
import openvino as ov
from openvino import opset13 as ops

CHANNELS, POSITIONS = 16, 64
INPUT_STEP, WEIGHT_STEP = 1 / 64, 1 / 64

random = np.random.default_rng(0)
for largest in (127, 63):
    integers = random.integers(-largest, largest + 1, (CHANNELS, CHANNELS))
    x = (random.integers(0, 256, (1, CHANNELS, 1, POSITIONS)) * INPUT_STEP).astype(np.float32)
    parameter = ops.parameter(list(x.shape), np.float32)
    low, high = ops.constant(np.float32(0)), ops.constant(np.float32(255 * INPUT_STEP))
    activation = ops.fake_quantize(parameter, low, high, low, high, 256)
    constant = ops.constant(integers.astype(np.int8).reshape(CHANNELS, CHANNELS, 1, 1))
    weight = ops.multiply(ops.convert(constant, "f32"), ops.constant(np.float32(WEIGHT_STEP)))
    result = ops.convolution(activation, weight, [1, 1], [0, 0], [0, 0], [1, 1])
    model = ov.Model([result], [parameter])
    expected = np.einsum("oi,nihw->nohw", integers * WEIGHT_STEP, x.astype(np.float64))
    got = ov.Core().compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})({0: x})[0]
    off = np.abs(got - expected)
    print(f"weights up to {largest}: {(off > 1e-3).mean():.2%} of the elements are off, the largest by {off.max():.3f}")
