"""
Self-attention in the IR with one transposition, and its scale in the layer that makes queries, keys and values.

``nn.MultiheadAttention`` turns the output of one linear layer into queries, keys and values by seven reshapes and
transpositions, and scales the queries twice. OpenVINO runs most of these as kernels of their own.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import openvino as ov
from openvino import opset13 as ops

from nncf_mpq_plugin.deploy.compiling import EXACT, shared_core

_MOVES = {"Gather", "Multiply", "Reshape", "Slice", "Squeeze", "Transpose", "Unsqueeze", "VariadicSplit"}
_BATCHES = (3, 5)  # that are tried: what depends on the batch or on its values in another way differs
_QUERY, _KEY, _VALUE, _SCALE = 0, 1, 2, 4
_TOLERANCE = 1e-6


def simplify_attention(model: ov.Model) -> None:
    """
    Rewire each self-attention whose queries, keys and values come from one linear layer that nothing else reads:
    the same values in fewer kernels. Others stay as they are.
    """
    attentions = _attentions(model)
    try:
        twins = [_attentions(_with_known_shapes(model, batch)) for batch in _BATCHES] if attentions else []
    except RuntimeError:  # the model cannot have batches of these sizes
        return
    for name, attention in attentions.items():
        _simplify(attention, [twin[name] for twin in twins])


def _attentions(model: ov.Model) -> dict[str, ov.Node]:
    """:return: by name; with an input for the scale."""
    nodes = [node for node in model.get_ordered_ops() if node.get_type_name() == "ScaledDotProductAttention"]
    return {node.get_friendly_name(): node for node in nodes if len(node.inputs()) > _SCALE}


def _with_known_shapes(model: ov.Model, batch: int) -> ov.Model:
    """:return: a copy for one size of batches, in which nothing is computed from shapes."""
    twin = model.clone()
    shapes = {port: port.get_partial_shape() for port in twin.inputs}
    twin.reshape({port: [batch if d.is_dynamic else d.get_length() for d in shape] for port, shape in shapes.items()})
    for node in twin.get_ops():
        if node.get_type_name() == "ShapeOf" and node.get_input_partial_shape(0).is_static:
            shape = ops.constant(np.array(node.get_input_shape(0)), node.get_element_type())
            for target in node.output(0).get_target_inputs():
                target.replace_source_output(shape.output(0))
    return twin


def _simplify(attention: ov.Node, twins: Sequence[ov.Node]) -> None:
    """:param twins: ``attention`` in models with known shapes."""
    source = _source(attention.input_value(_QUERY))
    shape, query = source.get_partial_shape(), attention.input_value(_QUERY).get_partial_shape()
    ranks = [s.rank.get_length() if s.rank.is_static else None for s in (shape, query)]
    if ranks != [3, 4] or source.get_element_type() != ov.Type.f32 or not _alone_reads(attention, source):
        return
    if any(size.is_dynamic for size in list(query)[1:]) or shape[0].is_static == shape[1].is_static:
        return
    if any(attention.get_input_partial_shape(port)[0].get_max_length() >= 0 for port in (_KEY, _VALUE, _QUERY)):
        return  # the first samples of a batch
    heads, tokens, width = (size.get_length() for size in list(query)[1:])
    axes = [2, 1, 3, 0, 4] if shape[0].is_static else [2, 0, 3, 1, 4]  # tokens first, or the batch
    factors = [_probed_scale(twin, [3, heads, width], axes, seed) for seed, twin in enumerate(twins)]
    if not np.allclose(factors, factors[0], _TOLERANCE, 0):  # nor if any is not a number
        return

    by_channel = np.repeat(np.array([factors[0], 1, 1], np.float32), heads * width)
    scale = np.array(1 if _scale_layer(source, by_channel) else factors[0], np.float32)
    split = ops.reshape(source, np.array([0, 0, 3, heads, width]), special_zero=True)
    if tokens != heads:
        moved = ops.transpose(split, np.array(axes))
        parts = [ops.gather(moved, np.array(part), np.array(0)) for part in range(3)]
    else:  # OpenVINO would confuse the two in models for one size of batches: docs/upstream.md
        order = [axis if axis < 2 else axis - 1 for axis in axes if axis != 2]
        parts = [ops.transpose(ops.gather(split, np.array(part), np.array(2)), np.array(order)) for part in range(3)]
    for port, part in zip((_QUERY, _KEY, _VALUE), parts, strict=True):
        attention.input(port).replace_source_output(part.output(0))
    attention.input(_SCALE).replace_source_output(ops.constant(scale).output(0))


def _probed_scale(attention: ov.Node, split: Sequence[int], axes: Sequence[int], seed: int) -> float:
    """
    Try whether queries, keys and values are parts of their source, transposed and scaled.

    :param attention: in a model that is not needed any more.
    :param split: sizes that the source's last dimension is split into: parts, heads and features.
    :param axes: the order of dimensions behind the transposition.
    :param seed: of the values that are tried.
    :return: the scale of the products of queries and keys; not a number if the three are something else.
    """
    source = _source(attention.input_value(_QUERY))
    if source.get_partial_shape().is_dynamic:  # its shape depends on values
        return math.nan
    shape = list(source.get_shape())
    if shape[-1] != np.prod(split):
        return math.nan
    probe = np.random.default_rng(seed).standard_normal(shape).astype(np.float32)
    parameter = ops.parameter(shape, np.float32)
    for target in source.get_target_inputs():
        target.replace_source_output(parameter.output(0))
    results = [ops.result(attention.input_value(port)) for port in (_QUERY, _KEY, _VALUE, _SCALE)]
    try:
        compiled = shared_core().compile_model(ov.Model(results, [parameter]), "CPU", EXACT)
    except RuntimeError:  # they depend on something else as well
        return math.nan
    query, *others, scale = (np.array(value) for value in compiled([probe]).values())
    expected = probe.reshape(*shape[:2], *split).transpose(axes)
    if query.shape != expected[0].shape or not np.array_equal(others, expected[1:]):
        return math.nan
    factor = np.median(query / expected[0])
    return float(factor * scale.item()) if np.allclose(query, factor * expected[0], _TOLERANCE, 0) else math.nan


def _source(output: ov.Output) -> ov.Output:
    """:return: what moves of values, and their scaling, begin with."""
    while output.get_node().get_type_name() in _MOVES:
        output = output.get_node().input_value(0)
    return output


def _alone_reads(attention: ov.Node, source: ov.Output) -> bool:
    """:return: whether ``source`` ends up in the attention's queries, keys and values only, but for shapes."""
    pending, seen = [source], set()
    while pending:
        for target in pending.pop().get_target_inputs():
            reader, port = target.get_node(), target.get_index()
            if reader.get_type_name() == "ShapeOf" or (reader == attention and port in (_QUERY, _KEY, _VALUE)):
                continue
            if reader.get_type_name() not in _MOVES or port != 0:
                return False
            if reader.get_name() not in seen:
                seen.add(reader.get_name())
                pending.extend(reader.outputs())
    return True


def _scale_layer(output: ov.Output, factors: np.ndarray) -> bool:
    """
    Multiply a linear layer's outputs, through the steps of its weights and its bias.

    :param factors: by output channel.
    :return: whether ``output`` is such a layer's.
    """
    add = output.get_node()
    if add.get_type_name() != "Add":
        return False
    order = (0, 1) if add.input_value(0).get_node().get_type_name() == "Constant" else (1, 0)
    bias, product = (add.input_value(port).get_node() for port in order)
    if product.get_type_name() != "MatMul" or len(product.output(0).get_target_inputs()) != 1:
        return False
    weight = product.input_value(1).get_node()
    if weight.get_type_name() != "Multiply" or len(weight.output(0).get_target_inputs()) != 1:
        return False
    steps = weight.input_value(1).get_node()
    channels = -2 if product.get_attributes()["transpose_b"] else -1  # their dimension in the weight
    for node, axis in ((bias, -1), (steps, channels)):
        if node.get_type_name() != "Constant" or node.data.size != factors.size:
            return False
        if node.data.ndim < -axis or node.data.shape[axis] != factors.size:
            return False
    for node, constant, port in ((add, bias, order[0]), (weight, steps, 1)):
        scaled = ops.constant(constant.data * factors.reshape(constant.data.shape))
        node.input(port).replace_source_output(scaled.output(0))
    return True
