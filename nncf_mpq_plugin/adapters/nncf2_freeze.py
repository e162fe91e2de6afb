"""
From a model compressed by NNCF 2.19 to a frozen one, which :mod:`nncf_mpq_plugin.deploy` exports and verifies.

NNCF 2.19 does not place quantizers for exact deployment, as :func:`nncf_mpq_plugin.adapters.nncf3.place` does. What can
be mended without training is mended here; docs/migrating-from-hawq.md says what that changes.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from nncf.common.graph.transformations.commands import TargetType
from nncf.common.logging import nncf_logger
from nncf.torch.dynamic_graph.context import get_current_context
from nncf.torch.module_operations import UpdateWeight
from nncf.torch.nncf_network import PTInsertionPoint
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from nncf_mpq_plugin.adapters.base import POST_HOOKS, PRE_HOOKS
from nncf_mpq_plugin.adapters.nncf2_graph import hook_name, operations, position_of, traced
from nncf_mpq_plugin.adapters.plan import Position, before_additions, input_grids
from nncf_mpq_plugin.errors import InputError, UnsupportedModelError

LAYERS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)  # weights of others are exported as they are on their grid
STORAGE = "frozen_quantizers"


class GridQuantizer(nn.Module):
    """
    Rounds to ``level_low .. level_high`` times the step ``scale / level_high``, as integer kernels do.

    :param step: one element, or a weight's steps by output channel, shaped to broadcast.
    :param low: smallest integer.
    :param high: largest integer.
    """

    scale: Tensor

    def __init__(self, step: Tensor, low: int, high: int):
        super().__init__()
        self.level_low, self.level_high = low, high
        self.register_buffer("scale", (step.detach() * high).float())

    @property
    def step(self) -> Tensor:
        """Step size, shaped as ``scale``."""
        return self.scale / self.level_high

    def forward(self, x: Tensor) -> Tensor:
        """:param x: any shape. :return: the nearest values on the grid."""
        return (x / self.step).round().clamp(self.level_low, self.level_high) * self.step


class _Call:
    """
    A hook that calls a quantizer of the model that is running, which may be a copy of the one that it was made for.

    :param name: the quantizer's hook name.
    """

    def __init__(self, name: str):
        self.name = name

    def __call__(self, x: Tensor) -> Tensor:
        model = get_current_context().base_module_thread_local_replica
        return traced(x, model.get_submodule(f"{STORAGE}.{self.name}"))


def freeze(controller: Any) -> nn.Module:
    """
    Make the model that :func:`nncf_mpq_plugin.deploy.export` takes, and that the exported files are verified against.

    Weights lie on their grids, batch norm is folded into weight steps and biases, biases are rounded to multiples of
    weight step x input step, and quantizers between a weighted layer and an addition are left out (OpenVINO would not
    round there); the log names these.

    :param controller: what ``create_compressed_model`` returned beside the model, which is not changed.
    :return: a copy of the model on the CPU, in evaluation mode.
    :raises InputError: if it is not a controller of quantization.
    :raises UnsupportedModelError: for quantizers that are asymmetric or have one scale per channel of activations, and
        padding that was adjusted for an NPU.
    """
    if not hasattr(controller, "non_weight_quantizers"):
        msg = f"{type(controller).__name__}: pass the controller that create_compressed_model returned."
        raise InputError(msg)
    _check(controller)
    graph = controller.model.nncf.get_original_graph()
    ops = operations(graph)
    activations = {
        position_of(point): info.quantizer_module_ref
        for info in controller.non_weight_quantizers.values()
        for point in info.affected_insertions
        if info.quantizer_module_ref.is_enabled_quantization()
    }
    dropped = before_additions(ops, {position: native.signed for position, native in activations.items()})
    if dropped:
        nncf_logger.warning(
            "Not exported, since OpenVINO would not round there (compressed by learned_importance, the model is "
            f"trained without them): the quantizers of {', '.join(position.op for position in dropped)}"
        )
    weights = {
        point.target_node_name: info.quantizer_module_ref
        for info in controller.weight_quantizers.values()
        for point in info.affected_insertions
        if info.quantizer_module_ref.is_enabled_quantization()
    }
    frozen: Any = copy.deepcopy(controller.model).cpu().eval()
    frozen.nncf.get_clean_shallow_copy()
    frozen.nncf.disable_dynamic_graph_building()
    storage: Any = nn.ModuleDict({PRE_HOOKS: nn.ModuleDict(), POST_HOOKS: nn.ModuleDict()})
    frozen.add_module(STORAGE, storage)
    addresses = frozen.nncf.get_node_to_op_address_mapping()
    placed: dict[Position, GridQuantizer] = {}
    with torch.no_grad():
        for position, native in activations.items():
            if position not in dropped:
                placed[position] = GridQuantizer(_step(native), native.level_low, native.level_high)
                kind = TargetType.OPERATOR_PRE_HOOK if position.side == "pre" else TargetType.OPERATOR_POST_HOOK
                place = PTInsertionPoint(kind, addresses[position.op], position.port)
                frozen.nncf.insert_at_point(place, _Call(_add(storage, position, placed[position])))
        grids = input_grids(ops, {position: quantizer.level_low < 0 for position, quantizer in placed.items()})
        done: set[int] = set()
        for node, native in weights.items():
            layer: Any = frozen.nncf.get_containing_module(node)
            if id(layer) in done:
                continue
            done.add(id(layer))
            layer.weight.copy_(copy.deepcopy(native).cpu()(layer.weight))
            has_kernels = isinstance(layer, LAYERS)
            if has_kernels:
                steps = {float(placed[position].step) for position in grids.get(node, ())}
                source = steps.pop() if len(steps) == 1 else None
                quantizer = _freeze_layer(layer, native, _batch_norm(frozen, graph, node), source)
                name = _add(storage, Position("pre", node, 1), quantizer)
                layer.register_pre_forward_operation(UpdateWeight(_Call(name)))
    result: nn.Module = frozen.eval()
    return result


def _freeze_layer(layer: Any, native: Any, norm: Any, source: float | None) -> GridQuantizer:
    """
    Fold batch norm and round the bias, in place.

    :param layer: its weight is on the grid of ``native`` already.
    :param norm: the batch norm that alone reads its output, if any.
    :param source: step of the layer's input; None where it is in floating point.
    :return: the quantizer of the folded weight.
    """
    weight = layer.weight
    columns = (-1, *[1] * (weight.dim() - 1))
    step = _step(native).double().expand(weight.shape[0], *columns[1:]).clone()
    integers = (weight.double() / step).round()
    low, high = native.level_low, native.level_high
    bias = torch.zeros(weight.shape[0]).double() if layer.bias is None else layer.bias.double()
    if norm is not None:
        factor = norm.weight.double() / (norm.running_var.double() + norm.eps).sqrt()
        bias = norm.bias.double() + (bias - norm.running_mean.double()) * factor
        integers *= factor.sign().reshape(columns)  # a channel that batch norm scales by 0 has integers 0, and any step
        step *= torch.where(factor == 0, 1.0, factor.abs()).reshape(columns)
        if (factor < 0).any():
            low, high = min(low, -high), max(high, -low)
    quantizer = GridQuantizer(step, low, high)
    weight.copy_(integers.float() * quantizer.step)
    if source is not None:
        unit = quantizer.step.flatten().double() * source
        bias = (bias / unit).round() * unit
    if norm is not None:  # it stays as an identity that carries the bias
        norm.running_mean.zero_()
        norm.running_var.fill_(1.0 - norm.eps)
        norm.weight.fill_(1.0)
        norm.bias.copy_(bias)
        bias = torch.zeros_like(bias)
    if layer.bias is not None:
        layer.bias.copy_(bias)
    return quantizer


def _check(controller: Any) -> None:
    for key, native in controller.all_quantizations.items():
        if not hasattr(native, "level_low") or not hasattr(native, "scale"):
            msg = (
                f"The quantizer {key} is asymmetric, which is not exported. Compress the model with "
                '"preset": "performance" (the default) or "mode": "symmetric".'
            )
            raise UnsupportedModelError(msg)
        if key in controller.non_weight_quantizers and native.scale.numel() > 1:
            msg = (
                f"The quantizer {key} has one scale per channel of activations, for which there are no "
                'integer kernels. Compress the model with "activations": {"per_channel": false}.'
            )
            raise UnsupportedModelError(msg)
    for name, module in controller.model.named_modules():
        if type(module).__name__ == "UpdatePaddingValue":
            msg = (
                f"{name.split('.pre_ops')[0]}: NNCF has changed its padding for an NPU; CPUs pad with zeros. Compress "
                'the model with "target_device": "TRIAL" for a CPU.'
            )
            raise UnsupportedModelError(msg)


def _step(native: Any) -> Tensor:
    """:return: step size in float64, shaped as the quantizer's scale."""
    step: Tensor = native.scale.detach().cpu().abs().double() / native.level_high
    return step


def _add(storage: Any, position: Position, quantizer: GridQuantizer) -> str:
    name = hook_name(position)
    hooks, key, place = name.split(".")
    storage[hooks][key] = nn.ModuleDict({place: quantizer})
    return name


def _batch_norm(frozen: Any, graph: Any, node: str) -> Any:
    """:return: the batch norm that alone reads a layer's output, where both run once in a forward pass; else None."""
    layer, readers = graph.get_node_by_name(node), graph.get_next_nodes(graph.get_node_by_name(node))
    if len(readers) != 1 or readers[0].node_type != "batch_norm":
        return None
    for name in (layer.layer_name, readers[0].layer_name):
        if len([other for other in graph.get_all_nodes() if other.layer_name == name]) != 1:
            return None
    module = frozen.nncf.get_containing_module(readers[0].node_name)
    return module if isinstance(module, _BatchNorm) and module.affine and module.running_mean is not None else None
