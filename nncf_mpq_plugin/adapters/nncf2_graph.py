"""NNCF 2.19's graph in the terms of :mod:`nncf_mpq_plugin.adapters.plan`."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from nncf.torch.dynamic_graph.patch_pytorch import register_operator
from nncf.torch.quantization.default_quantization import DEFAULT_PT_QUANT_TRAIT_TO_OP_DICT, QuantizationTrait
from torch import Tensor

from nncf_mpq_plugin.adapters.plan import ADD, ADD_FUNCTIONS, CONCAT, OTHER, TRANSPARENT, WEIGHTED, Op, Position

WEIGHTED_FUNCTIONS = (
    "conv1d",
    "conv2d",
    "conv3d",
    "linear",
    "conv_transpose1d",
    "conv_transpose2d",
    "conv_transpose3d",
)
FUSED_FUNCTIONS = ("batch_norm", "relu", "relu_", "relu6", "relu6_", "hardtanh", "hardtanh_")

_TRANSPARENT = frozenset(DEFAULT_PT_QUANT_TRAIT_TO_OP_DICT[QuantizationTrait.QUANTIZATION_AGNOSTIC])
_CONCAT = frozenset(DEFAULT_PT_QUANT_TRAIT_TO_OP_DICT[QuantizationTrait.CONCAT])


def operations(graph: Any) -> list[Op]:
    """
    :param graph: ``model.nncf.get_original_graph()``.
    :return: the model's operations in topological order, by NNCF's names. ``linear_output`` is true behind ReLU as
        well, which is fused into a layer: OpenVINO loses the rounding behind it before an addition, too.
    """
    ops: list[Op] = []
    linear: set[str] = set()
    for node in graph.topological_sort():
        inputs = {
            edge.input_port_id: (edge.from_node.node_name, edge.output_port_id) for edge in graph.get_input_edges(node)
        }
        kind = OTHER
        if node.node_type in WEIGHTED_FUNCTIONS:
            kind = WEIGHTED
        elif node.metatype in _TRANSPARENT:
            kind = TRANSPARENT
        elif node.metatype in _CONCAT:
            kind = CONCAT
        elif node.node_type in ADD_FUNCTIONS and len(inputs) == 2:
            kind = ADD
        behind_layer = node.node_type in FUSED_FUNCTIONS and all(tensor[0] in linear for tensor in inputs.values())
        if kind == WEIGHTED or behind_layer:
            linear.add(node.node_name)
        ops.append(Op(node.node_name, kind, inputs, node.node_name in linear))
    return ops


def position_of(point: Any) -> Position:
    """:return: where an activation quantizer stands; ``point`` is NNCF's insertion point in a setup or in a model."""
    if point.input_port_id is None:
        return Position("post", point.target_node_name, 0)
    return Position("pre", point.target_node_name, point.input_port_id)


def hook_name(position: Position) -> str:
    """
    :return: the name that NNCF 3 gives a hook there: ``post_hooks.layer1/0/relu/relu_/0__0.0`` for an operation that
        NNCF 2 calls ``ResNet/Sequential[layer1]/BasicBlock[0]/ReLU[relu]/relu__0``.
    """
    *scope, operation = position.op.split("/")
    function, _, call = operation.rpartition("_")
    path = [match[1] for part in scope if (match := re.search(r"\[([^\]]+)\]$", part))]
    return f"{position.side}_hooks.{'/'.join([*path, function, call])}__{position.port}.0"


@register_operator("quantize")
def traced(x: Tensor, quantize: Callable[[Tensor], Tensor]) -> Tensor:
    """
    Call a quantizer as one operation of NNCF's tracing: it does not look in, and the result is a tensor that it goes on
    tracing. On any other tensor ``+`` and methods such as ``mean`` run unseen, and quantizers behind them not at all.
    """
    return quantize(x)
