"""
A convolution of int8 activations (FakeQuantize -> Convert(i8) -> Convert -> Multiply) on a CPU without VNNI.

Needs numpy and openvino only; run it as ``ONEDNN_MAX_CPU_ISA=AVX2 python int8_activations.py``.
"""

import numpy as np
import openvino as ov
from openvino import opset13 as ops

CHANNELS, SIZE, STEP, WEIGHT_STEP = 24, 16, 0.02, 0.01


def constant(value):
    return ops.constant(np.float32(value))


random = np.random.default_rng(0)
x = random.normal(0, 1, (1, CHANNELS, SIZE, SIZE)).astype(np.float32)
integers = random.integers(-7, 8, (CHANNELS, CHANNELS, 3, 3))
weight = ops.constant(integers.astype(np.int8))
weight = ops.multiply(ops.convert(weight, "f32"), constant(WEIGHT_STEP))
activation = np.clip(np.rint(x.astype(np.float64) / STEP), -100, 100)
windows = np.lib.stride_tricks.sliding_window_view(activation * STEP, (3, 3), (2, 3))
expected = np.einsum("oikl,nihwkl->nohw", integers * WEIGHT_STEP, windows)

for kind, zero in (("i8", 0), ("u8", 128)):
    parameter = ops.parameter(list(x.shape), np.float32)
    bounds = [constant(-128 * STEP), constant(127 * STEP), constant(zero - 128), constant(zero + 127)]
    node = ops.convert(ops.fake_quantize(parameter, *bounds, 256), kind)
    node = ops.clamp(node, zero - 100, zero + 100)
    node = ops.multiply(ops.subtract(ops.convert(node, "f32"), constant(zero)), constant(STEP))
    model = ov.Model([ops.convolution(node, weight, [1, 1], [0, 0], [0, 0], [1, 1])], [parameter])
    got = ov.Core().compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})({0: x})[0]
    off = np.abs(got - expected) / expected.std()
    print(f"{kind}: {(off > 1e-3).mean():.2%} of the elements are off, by {off.mean():.2%} of the deviation on average")
