"""
A strided 1x1 INT8 convolution in two threads, on a CPU without VNNI.

Needs numpy and openvino only; run it as ``ONEDNN_MAX_CPU_ISA=AVX2 python strided_pointwise.py``.
"""

import numpy as np
import openvino as ov
from openvino import opset13 as ops

OUTPUTS, SIZE, BATCH, RUNS, STEP, WEIGHT_STEP = 32, 8, 64, 50, 0.02, 0.01
random = np.random.default_rng(0)


def constant(value):
    return ops.constant(np.float32(value))


def quantized(node):
    bounds = [constant(0), constant(255 * STEP)] * 2
    return ops.fake_quantize(node, *bounds, 256)


def network(channels, pixels_first):
    integers = random.integers(-64, 64, (OUTPUTS, channels, 1, 1)).astype(np.int8)
    weight = ops.multiply(ops.convert(ops.constant(integers), "f32"), constant(WEIGHT_STEP))
    parameter = ops.parameter([BATCH, channels, SIZE, SIZE], np.float32)
    node, strides = quantized(parameter), [2, 2]
    if pixels_first:
        node = ops.max_pool(node, [2, 2], [1, 1], [0, 0], [0, 0], [1, 1]).output(0)
        strides = [1, 1]
    node = ops.convolution(node, weight, strides, [0, 0], [0, 0], [1, 1])
    return ov.Model([quantized(ops.relu(node))], [parameter])


for channels, pixels_first in ((16, False), (24, False), (24, True)):
    model = network(channels, pixels_first)
    x = (random.random((BATCH, channels, SIZE, SIZE)) * 255 * STEP).astype(np.float32)
    one, two = (
        ov.Core().compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": threads})
        for threads in (1, 2)
    )
    expected = np.array(one(x)[0])
    off = sum(not np.array_equal(two(x)[0], expected) for _ in range(RUNS))
    kind = f"{channels} channels{', MaxPool in front' if pixels_first else ''}"
    print(f"{kind}: {off} of {RUNS} runs with two threads differ from one thread")
