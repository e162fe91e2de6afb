"""
NNCF 3's graph of a model as the plugin plans with it: operations, layers and their costs, batch norms, activation
functions.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from nncf.torch.function_hook import get_hook_storage
from nncf.torch.function_hook.nncf_graph.nncf_graph_builder import build_nncf_graph
from nncf.torch.quantization.default_quantization import DEFAULT_PT_QUANT_TRAIT_TO_OP_DICT, QuantizationTrait
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from nncf_mpq_plugin.adapters.nncf3_passes import IN_PLACE_ADDITIONS, function_of
from nncf_mpq_plugin.adapters.plan import (
    ADD,
    ADD_FUNCTIONS,
    CONCAT,
    FLOAT,
    OTHER,
    TRANSPARENT,
    WEIGHTED,
    Op,
    Position,
    consumers_of,
)
from nncf_mpq_plugin.errors import UnsupportedModelError

WEIGHTED_FUNCTIONS = ("conv1d", "conv2d", "conv3d", "linear")
FUSED_FUNCTIONS = ("batch_norm", "relu", "relu_")  # runtimes make them part of the layer before them
FLOAT_FUNCTIONS = (
    "layer_norm",
    "group_norm",
    "instance_norm",
    "scaled_dot_product_attention",
    "matmul",
    "bmm",
    "softmax",
)
CLIPS = {"relu6": (0.0, 6.0), "hardtanh": (-1.0, 1.0), "clamp": (None, None), "clip": (None, None)}
ENDING_CLIPS = ("relu6", "hardtanh")  # no gradient at the bounds themselves, where clamp has one
WINDOWS = ("kernel_size", "stride", "padding", "ceil_mode", "count_include_pad", "divisor_override")

_TRANSPARENT = frozenset(DEFAULT_PT_QUANT_TRAIT_TO_OP_DICT[QuantizationTrait.QUANTIZATION_AGNOSTIC])
_CONCAT = frozenset(DEFAULT_PT_QUANT_TRAIT_TO_OP_DICT[QuantizationTrait.CONCAT])


@dataclass(frozen=True)
class LayerSite:
    """
    Where a weighted layer lives in the model.

    :param op: NNCF's name of the operation.
    :param weight: name of the weight parameter.
    :param bias: name of the bias parameter, if any.
    :param batch_norm: name of the batch norm module that alone reads the layer's output, if any.
    """

    op: str
    weight: str
    bias: str | None
    batch_norm: str | None


def check_static(graph: Any, model: nn.Module, example_input: Tensor, calibration: Sequence[Tensor]) -> None:
    """:raises UnsupportedModelError: if other data go through other operations than those that were traced."""
    traced = {node.node_name for node in graph.get_all_nodes()}
    batch = calibration[0] if len(calibration) else example_input
    for sample in (batch[:1], batch[-1:], torch.zeros_like(batch[:1])):
        sample = sample.expand_as(example_input).to(example_input.device)
        odd = sorted(traced ^ {node.node_name for node in build_nncf_graph(model, sample).get_all_nodes()})
        if odd:
            msg = (
                f"The model's operations depend on the data: {odd[0]!r} and {len(odd) - 1} others run for some inputs "
                "only. Quantizers would be missing there, and the exported graph would hold one branch. Replace "
                "if and loops over tensor values by operations such as torch.where."
            )
            raise UnsupportedModelError(msg)


def read_graph(
    graph: Any, model: nn.Module, weight_hooks: Mapping[str, str], batch: int
) -> tuple[list[Op], dict[str, LayerSite], dict[str, tuple[int, int]], dict[str, str]]:
    """
    :return: operations, layer name -> site, layer name -> (MACs, weights), all in the graph's order, and operation ->
        module of the batch norms that no layer takes in.
    """
    ops: list[Op] = []
    sites: dict[str, LayerSite] = {}
    costs: dict[str, tuple[int, int]] = {}
    linear: set[str] = set()
    folded: set[str] = set()
    constants = {n.node_name for n in graph.get_all_nodes() if n.metatype.__name__ == "PTConstNoopMetatype"}
    norms = _foldable_norms(graph, model, constants)
    for node in graph.topological_sort():
        if node.node_name in constants:
            continue
        edges = sorted(graph.get_input_edges(node), key=lambda edge: edge.input_port_id)
        parameters = {e.input_port_id: e.from_node.node_name for e in edges if e.from_node.node_name in constants}
        inputs = {
            e.input_port_id: (e.from_node.node_name, e.output_port_id)
            for e in edges
            if e.from_node.node_name not in constants
        }
        function = function_of(node.node_name)
        kind = OTHER
        if node.node_name in weight_hooks:
            kind = WEIGHTED
        elif node.metatype in _TRANSPARENT:
            kind = TRANSPARENT
        elif node.metatype in _CONCAT:
            kind = CONCAT
        elif function in ADD_FUNCTIONS and len(inputs) == 2:
            kind = ADD
        elif function in FLOAT_FUNCTIONS:
            kind = FLOAT
        producers = [tensor[0] for tensor in inputs.values()]
        is_linear = kind == WEIGHTED or (function in FUSED_FUNCTIONS and all(p in linear for p in producers))
        if is_linear:
            linear.add(node.node_name)
        averaged, bounds = (1, ()) if kind == TRANSPARENT else _averaged(node, graph)
        shapes = [edge.tensor_shape for edge in graph.get_output_edges(node)]
        channels = shapes[0][1] if shapes and len(shapes[0]) > 1 else 0
        ops.append(Op(node.node_name, kind, inputs, is_linear, averaged, bounds, channels))
        if kind == WEIGHTED:
            weight_name = parameters.get(1)
            name = (weight_name or "").removesuffix(".weight")
            if weight_name is None or name in sites:
                msg = (
                    f"Operation {node.node_name!r}: its weight {'is computed' if weight_name is None else name!r} "
                    f"{'in the forward pass' if weight_name is None else 'is used by another operation as well'}; "
                    "such a layer cannot get bit widths of its own. Name it in ignored_scopes."
                )
                raise UnsupportedModelError(msg)
            outputs = graph.get_output_edges(node)
            consumers = [edge.to_node for edge in outputs]
            weight = model.get_parameter(weight_name)
            elements = torch.Size(outputs[0].tensor_shape).numel() if outputs else 0
            costs[name] = (elements // batch * (weight.numel() // weight.shape[0]), weight.numel())
            norm_name = norms.get(consumers[0].node_name) if len(consumers) == 1 else None
            sites[name] = LayerSite(node.node_name, weight_name, parameters.get(2), norm_name)
            if norm_name is not None:
                folded.add(consumers[0].node_name)
    norms = {operation: name for operation, name in norms.items() if operation not in folded}
    for index, op in enumerate(ops):
        ops[index] = replace(op, averaged=1 if op.name in folded else op.averaged, scales_channels=op.name in norms)
    return ops, sites, costs, norms


def _averaged(node: Any, graph: Any) -> tuple[int | None, tuple[float, ...]]:
    """:return: :attr:`Op.averaged` and :attr:`Op.bounds` of an operation that NNCF does not list as transparent."""
    function = function_of(node.node_name).removesuffix("_")
    positional = list(node.layer_attributes.op_args)[1:] if node.layer_attributes is not None else []
    named = node.layer_attributes.op_kwargs if node.layer_attributes is not None else {}
    if function == "relu":
        return 1, ()
    if function in CLIPS:
        bounds = list(CLIPS[function])
        bounds[: len(positional)] = positional[:2]
        values = [
            named.get(f"{end}_val", named.get(end, bound)) for end, bound in zip(("min", "max"), bounds, strict=True)
        ]
        if all(value is None or isinstance(value, (int, float)) for value in values):
            return 1, tuple(float(value) for value in values if value is not None)
    if function == "mean" or function.startswith("adaptive_avg_pool"):
        before = torch.Size(graph.get_input_edges(node)[0].tensor_shape).numel()
        after = torch.Size(graph.get_output_edges(node)[0].tensor_shape).numel()
        return (before // after if before % after == 0 else None), ()
    if function in ("avg_pool1d", "avg_pool2d", "avg_pool3d"):
        window = {**dict(zip(WINDOWS, positional, strict=False)), **named}
        uneven = window.get("ceil_mode") or window.get("divisor_override")
        padded = np.any(window.get("padding", 0)) and not window.get("count_include_pad", True)
        sizes = np.broadcast_to(window["kernel_size"], int(function[-2]))
        return (None if uneven or padded else int(sizes.prod())), ()
    return None, ()


def _foldable_norms(graph: Any, model: nn.Module, constants: Collection[str]) -> dict[str, str]:
    """
    :return: operation -> module of each batch norm that can be folded into the layer before it. The module is that of
        the operation's parameters: NNCF's names of operations do not always have the whole path of their module.
    """
    modules: dict[str, str] = {}
    for node in graph.get_all_nodes():
        if function_of(node.node_name) == "batch_norm":
            tensors = {edge.from_node.node_name for edge in graph.get_input_edges(node)} & set(constants)
            owners = {name.rpartition(".")[0] for name in tensors}
            if len(owners) == 1:
                modules[node.node_name] = owners.pop()
    uses = Counter(modules.values())
    return {
        operation: name
        for operation, name in modules.items()
        if uses[name] == 1
        and isinstance(module := model.get_submodule(name), _BatchNorm)
        and module.affine
        and module.running_mean is not None
    }


def ceilings_of(ops: Sequence[Op], model: nn.Module, example_input: Tensor) -> dict[str, float]:
    """:return: :attr:`NNCFQuantizedModel.ceilings`, of a model without hooks."""
    by_name = {op.name: op for op in ops}
    consumers = consumers_of(ops)

    def read_by_nobody_else(tensor: tuple[str, int]) -> bool:
        """:return: whether it can stay as it is where a function would have changed it in place."""
        producer = by_name[tensor[0]]
        if len(consumers[tensor]) != 1:
            return False
        if producer.kind == ADD and function_of(producer.name) in IN_PLACE_ADDITIONS:
            return 0 in producer.inputs and read_by_nobody_else(producer.inputs[0])
        return producer.kind in (WEIGHTED, ADD) or function_of(producer.name) == "batch_norm"  # others may give views

    found = {}
    for op in ops:
        function = function_of(op.name).removesuffix("_")
        clips = function in ENDING_CLIPS and op.bounds[:1] == (0.0,)
        if (function == "relu" or clips) and all(map(read_by_nobody_else, op.inputs.values())):
            found[op.name] = op.bounds[1] if clips else math.inf
    if not found:
        return found

    # Who reads the variable that a function in place has changed reads its output, in NNCF's eyes, but not what a hook
    # behind it makes of that.
    storage = get_hook_storage(model)
    hooks = [hook_name(Position("post", name, 0)) for name in found]
    for hook in hooks:
        storage.insert_hook_by_name(hook, _Copy())
    graph = build_nncf_graph(model, example_input)
    for hook in hooks:
        storage.delete_hook(hook)
    for node in graph.get_all_nodes():
        targets = [edge.to_node.node_name for edge in graph.get_output_edges(node)]
        if node.node_name in found and not (len(targets) == 1 and "post_hook__" in targets[0]):
            del found[node.node_name]
    return found


class _Copy(nn.Module):
    """A hook that NNCF's graph shows."""

    def forward(self, x: Tensor) -> Tensor:
        return x * 1


def hook_name(position: Position) -> str:
    """:return: what NNCF's hook storage calls the first hook there."""
    return f"{position.side}_hooks.{position.op.replace('.', ':')}__{position.port}.0"


def position_of(name: str) -> Position:
    """:param name: of a hook, as :func:`hook_name` makes it."""
    side, key, _ = name.rsplit(".", 2)
    op, port = key.rsplit("__", 1)
    return Position(side.removesuffix("_hooks"), op.replace(":", "."), int(port))
