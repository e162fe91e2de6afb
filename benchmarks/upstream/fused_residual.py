"""
Convolution -> FakeQuantize -> Add -> FakeQuantize: the fused INT8 kernel loses the inner rounding.

Needs numpy and openvino only. The branch has two convolutions, since the CPU plugin fuses the addition into the last
one only where the other summand is not its own input.
"""

import numpy as np
import openvino as ov
from openvino import opset13 as ops

CHANNELS, POSITIONS = 16, 256
INPUT_STEP, MIDDLE_STEP, BRANCH_STEP, OUTPUT_STEP, WEIGHT_STEP = 0.0217, 0.02, 0.0257, 0.0311, 0.01


def quantize(x, step, low, high):
    return np.clip(np.rint(x / step), low, high) * step


def fake_quantize(node, step, low, high):
    bounds = [ops.constant(np.float32(step * bound)) for bound in (low, high)]
    return ops.fake_quantize(node, *bounds, *bounds, high - low + 1)


def convolve(node, integers):
    constant = ops.constant(integers.astype(np.int8).reshape(CHANNELS, CHANNELS, 1, 1))
    weight = ops.multiply(ops.convert(constant, "f32"), ops.constant(np.float32(WEIGHT_STEP)))
    return ops.convolution(node, weight, [1, 1], [0, 0], [0, 0], [1, 1])


random = np.random.default_rng(0)
x = random.normal(0, 1, (1, CHANNELS, 1, POSITIONS)).astype(np.float32)
first, second = random.integers(-63, 64, (2, CHANNELS, CHANNELS))

parameter = ops.parameter([1, CHANNELS, 1, POSITIONS], np.float32)
stored = fake_quantize(parameter, INPUT_STEP, -128, 127)
branch = fake_quantize(ops.relu(convolve(stored, first)), MIDDLE_STEP, 0, 255)
branch = fake_quantize(convolve(branch, second), BRANCH_STEP, -128, 127)
model = ov.Model([fake_quantize(ops.relu(ops.add(branch, stored)), OUTPUT_STEP, 0, 255)], [parameter])

stored = quantize(x.astype(np.float64), INPUT_STEP, -128, 127)
branch = np.einsum("oi,nihw->nohw", first * WEIGHT_STEP, stored)
branch = np.einsum("oi,nihw->nohw", second * WEIGHT_STEP, quantize(np.maximum(branch, 0), MIDDLE_STEP, 0, 255))
clipped = np.clip(branch, -128 * BRANCH_STEP, 127 * BRANCH_STEP)
expected = quantize(quantize(branch, BRANCH_STEP, -128, 127) + stored, OUTPUT_STEP, 0, 255)
not_rounded = quantize(clipped + stored, OUTPUT_STEP, 0, 255)

for name, properties in (
    ("f32", {"INFERENCE_PRECISION_HINT": "f32"}),
    ("f32, LP_TRANSFORMS_MODE=NO", {"INFERENCE_PRECISION_HINT": "f32", "LP_TRANSFORMS_MODE": "NO"}),
):
    got = ov.Core().compile_model(model, "CPU", properties)({0: x})[0]
    off = [(np.abs(got - reference) > OUTPUT_STEP / 2).mean() for reference in (expected, not_rounded)]
    print(f"{name}: {off[0]:.2%} of the elements are off; {off[1]:.2%} if the inner FakeQuantize only clips")
