"""NNCF 2.19's graph in the terms of :mod:`nncf_mpq_plugin.adapters.plan`."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Sequence
from typing import Any

import numpy as np
from nncf.torch.dynamic_graph.patch_pytorch import register_operator
from nncf.torch.quantization.default_quantization import DEFAULT_PT_QUANT_TRAIT_TO_OP_DICT, QuantizationTrait
from torch import Tensor, nn

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


def operations(model: Any, folded: Collection[str] = (), norms: Collection[str] = ()) -> list[Op]:
    """
    :param model: the ``NNCFNetwork``.
    :param folded: names of batch norms that are folded into the layer before them.
    :param norms: names of other batch norms.
    :return: the model's operations in topological order, by NNCF's names. ``linear_output`` is true behind ReLU as
        well, which is fused into a layer: OpenVINO loses the rounding behind it before an addition, too.
    """
    graph = model.nncf.get_original_graph()
    ops: list[Op] = []
    linear: set[str] = set()
    for node in graph.topological_sort():
        name, incoming, outgoing = node.node_name, graph.get_input_edges(node), graph.get_output_edges(node)
        inputs = {edge.input_port_id: (edge.from_node.node_name, edge.output_port_id) for edge in incoming}
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
            linear.add(name)
        averaged: int | None = 1 if kind == TRANSPARENT or name in folded else None
        bounds: tuple[float, ...] = ()
        if kind == OTHER and name not in folded and incoming and outgoing:
            shapes = [edges[0].tensor_shape for edges in (incoming, outgoing)]
            averaged, bounds = _averaged(node.node_type, model.nncf.get_containing_module(name), *shapes)
        channels = outgoing[0].tensor_shape[1] if outgoing and len(outgoing[0].tensor_shape) > 1 else 0
        ops.append(Op(name, kind, inputs, name in linear, averaged, bounds, channels, scales_channels=name in norms))
    return ops


def _averaged(
    function: str, module: Any, before: Sequence[int], after: Sequence[int]
) -> tuple[int | None, tuple[float, ...]]:
    """
    :param module: that called the function; NNCF 2 does not know a function's arguments, a module's are its attributes.
    :param before: shape of the input.
    :param after: shape of the output.
    :return: :attr:`Op.averaged` and :attr:`Op.bounds` of an operation that NNCF does not list as transparent.
    """
    function = function.removesuffix("_").lower()
    if function == "relu":
        return 1, ()
    if function == "relu6":
        return 1, (0.0, 6.0)
    if function == "hardtanh" and isinstance(module, nn.Hardtanh):
        return 1, (float(module.min_val), float(module.max_val))
    if function == "mean" or function.startswith("adaptive_avg_pool"):
        count, rest = divmod(math.prod(before), math.prod(after))
        return (None if rest else count), ()
    if isinstance(module, (nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d)):
        uneven = module.ceil_mode or getattr(module, "divisor_override", None)
        padded = np.any(module.padding) and not module.count_include_pad
        sizes = np.broadcast_to(module.kernel_size, len(before) - 2)
        return (None if uneven or padded else int(sizes.prod())), ()
    return None, ()


def position_of(point: Any) -> Position:
    """:return: where an activation quantizer stands; ``point`` is NNCF's insertion point in a setup or in a model."""
    if point.input_port_id is None:
        return Position("post", point.target_node_name, 0)
    return Position("pre", point.target_node_name, point.input_port_id)


def hold(native: Any) -> None:
    """
    Keep a quantizer's step from being trained, also by who restores the model from NNCF's state: the multiplier of the
    step's gradient, which NNCF saves, is 0.

    :param native: NNCF's quantizer.
    """
    native.disable_gradients()
    native._qspec.compression_lr_multiplier = 0.0


def is_held(native: Any) -> bool:
    """:return: whether :func:`hold` was called on NNCF's quantizer, or on the one that it was restored from."""
    return bool(native._qspec.compression_lr_multiplier == 0.0)


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
