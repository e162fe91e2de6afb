"""
Self-attention with as many tokens as heads, whose output is transposed, in a model without dynamic dimensions.

Needs numpy and openvino only.
"""

import numpy as np
import openvino as ov
from openvino import opset13 as ops

HEADS, WIDTH = 4, 8
random = np.random.default_rng(0)


def integers(values):
    return ops.constant(np.int64(values))


def network(tokens, dynamic):
    """[batch, tokens, 3 x heads x width] -> [batch, tokens, heads, width]"""
    parameter = ops.parameter([-1 if dynamic else 1, tokens, 3 * HEADS * WIDTH], np.float32)
    parts = ops.transpose(
        ops.reshape(parameter, integers([0, 0, 3, HEADS, WIDTH]), special_zero=True), integers([2, 0, 3, 1, 4])
    )
    query, key, value = (ops.gather(parts, integers(part), integers(0)) for part in range(3))
    attention = ops.matmul(ops.softmax(ops.matmul(query, key, False, True), -1), value, False, False)
    return ov.Model([ops.transpose(attention, integers([0, 2, 1, 3]))], [parameter])


def expected(x, tokens):
    query, key, value = x.reshape(1, tokens, 3, HEADS, WIDTH).transpose(2, 0, 3, 1, 4)
    weights = np.exp(query @ key.swapaxes(-1, -2))
    return (weights / weights.sum(-1, keepdims=True) @ value).transpose(0, 2, 1, 3)


for tokens, dynamic in ((5, False), (4, False), (4, True)):
    x = random.standard_normal((1, tokens, 3 * HEADS * WIDTH)).astype(np.float32)
    compiled = ov.Core().compile_model(network(tokens, dynamic), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    off = np.abs(compiled([x])[0] - expected(x, tokens)) > 1e-4
    kind = f"{tokens} tokens, {HEADS} heads{', dynamic batch' if dynamic else ''}"
    print(f"{kind}: {off.mean():.0%} of the elements are off")
