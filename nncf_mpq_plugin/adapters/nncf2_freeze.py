"""
From a model compressed by NNCF 2.19 to a frozen one, which :mod:`nncf_mpq_plugin.deploy` exports and verifies.

NNCF 2.19 does not place quantizers for exact deployment, as :func:`nncf_mpq_plugin.adapters.nncf3.place` does. What can
be mended without training is mended here; docs/migrating-from-hawq.md says what that changes.
"""

from __future__ import annotations

import copy
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
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
from nncf_mpq_plugin.adapters.folding import Activation, affine, make_identity, place_steps
from nncf_mpq_plugin.adapters.nncf2_graph import hook_name, is_held, operations, position_of, traced
from nncf_mpq_plugin.adapters.plan import Op, Position, before_additions, input_grids, reads_input
from nncf_mpq_plugin.errors import InputError, UnsupportedModelError

LAYERS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)  # weights of others are exported as they are on their grid
STORAGE = "frozen_quantizers"
LARGEST_PAIR = 2**15 - 1  # sum of two products in vpmaddubsw
ZERO_POINT = 128  # that kernels add to signed activations


class GridQuantizer(nn.Module):
    """
    Rounds to ``level_low .. level_high`` times the step ``scale / level_high``, as integer kernels do.

    :param step: one element, or a weight's steps by output channel, shaped to broadcast.
    :param low: smallest integer.
    :param high: largest integer.
    :param zero_point: added before the rounding, as the exported quantizer of the network's input does; the sum is
        itself rounded, to float32.
    """

    scale: Tensor

    def __init__(self, step: Tensor, low: int, high: int, zero_point: int = 0):
        super().__init__()
        self.level_low, self.level_high, self.zero_point = low, high, zero_point
        self.register_buffer("scale", (step.detach() * high).float())

    @property
    def step(self) -> Tensor:
        """Step size, shaped as ``scale``."""
        return self.scale / self.level_high

    def forward(self, x: Tensor) -> Tensor:
        """:param x: any shape. :return: the nearest values on the grid."""
        integers = ((x + self.step * self.zero_point) / self.step).round() - self.zero_point
        return integers.clamp(self.level_low, self.level_high) * self.step


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


@dataclass
class _Layer:
    """
    A weighted layer on its way to integers.

    :param module: convolution or linear layer of the frozen model.
    :param norm: the batch norm that alone reads its output, if any.
    :param integers: shaped as the weight.
    :param low: smallest integer that its quantizer has.
    :param high: largest.
    :param step: weight steps ``[out]`` with the batch norm's factors, in float64.
    :param bias: ``[out]`` with the batch norm's offsets, in float64.
    """

    module: Any
    norm: Any
    integers: Tensor
    low: int
    high: int
    step: Tensor
    bias: Tensor


def freeze(controller: Any) -> nn.Module:
    """
    Make the model that :func:`nncf_mpq_plugin.deploy.export` takes, and that the exported files are verified against.

    Weights lie on their grids, batch norm is folded into weight steps and biases, steps move by less than half a
    percent so that no rounding tie can be reached (:mod:`nncf_mpq_plugin.adapters.ties`), and biases are rounded to
    multiples of weight step x input step. Quantizers between a weighted layer and an addition are left out (OpenVINO
    would not round there), and 8-bit weights whose products could saturate on CPUs without VNNI get steps twice as
    large; the log names both.

    :param controller: what ``create_compressed_model`` returned beside the model, which is not changed.
    :return: a copy of the model on the CPU, in evaluation mode.
    :raises InputError: if it is not a controller of quantization.
    :raises UnsupportedModelError: for quantizers that are asymmetric or have one scale per channel of activations,
        padding that was adjusted for an NPU, and layers with a bias that are called behind several quantizers.
    """
    if not hasattr(controller, "non_weight_quantizers"):
        msg = f"{type(controller).__name__}: pass the controller that create_compressed_model returned."
        raise InputError(msg)
    _check(controller)
    frozen: Any = copy.deepcopy(controller.model).cpu().eval()
    nodes = {
        point.target_node_name: info.quantizer_module_ref
        for info in controller.weight_quantizers.values()
        for point in info.affected_insertions
        if info.quantizer_module_ref.is_enabled_quantization()
    }
    norms = _norms(frozen)
    folded = {
        node: norm
        for node in nodes
        if isinstance(frozen.nncf.get_containing_module(node), LAYERS) and (norm := _behind(frozen, node)) in norms
    }
    others = norms.keys() - set(folded.values())
    ops = operations(frozen, set(folded.values()), others)
    activations = _activations(controller, ops)
    grids = input_grids(ops, {position: native.signed for position, native in activations.items()})
    frozen.nncf.get_clean_shallow_copy()
    frozen.nncf.disable_dynamic_graph_building()
    with torch.no_grad():
        layers = _fold(frozen, nodes, {node: norms[norm] for node, norm in folded.items()})
        calls = {node: _calls(frozen, node) for node in layers}
        inputs = {node: [grids.get(call, ()) for call in calls[node]] for node in layers}
        _leave_room(layers, inputs, activations)
        powers = _powers_of_two(ops, activations)
        names = {native: hook_name(position) for position, native in reversed(activations.items())}
        steps, found = place_steps(
            ops,
            {
                position: Activation(names[native], powers.get(native, float(_step(native))), native.level_high)
                for position, native in activations.items()
            },
            {node: layer.step for node, layer in layers.items() if len(calls[node]) == 1},
            {norm: norms[norm] for norm in others},
        )
        storage: Any = nn.ModuleDict({PRE_HOOKS: nn.ModuleDict(), POST_HOOKS: nn.ModuleDict()})
        frozen.add_module(STORAGE, storage)
        addresses = frozen.nncf.get_node_to_op_address_mapping()
        for position, native in activations.items():
            step = torch.tensor([found[names[native]]], dtype=torch.float64)
            zero_point = max(-native.level_low, 0) if reads_input(position, ops) else 0
            quantizer = GridQuantizer(step, native.level_low, native.level_high, zero_point)
            kind = TargetType.OPERATOR_PRE_HOOK if position.side == "pre" else TargetType.OPERATOR_POST_HOOK
            place = PTInsertionPoint(kind, addresses[position.op], position.port)
            frozen.nncf.insert_at_point(place, _Call(_add(storage, position, quantizer)))
        for node, layer in layers.items():
            layer.step = steps.get(node, layer.step)
            sources = [{p.op: found[names[activations[p]]] for p in positions} for positions in inputs[node]]
            quantizer = _write(layer, _integer_input(node, layer, sources))
            layer.module.register_pre_forward_operation(
                UpdateWeight(_Call(_add(storage, Position("pre", node, 1), quantizer)))
            )
    result: nn.Module = frozen.eval()
    return result


def _activations(controller: Any, ops: Sequence[Op]) -> dict[Position, Any]:
    """:return: positions of NNCF's activation quantizers that are exported."""
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
    return {position: native for position, native in activations.items() if position not in dropped}


def _powers_of_two(ops: Sequence[Op], activations: Mapping[Position, Any]) -> dict[Any, float]:
    """
    :return: NNCF's quantizers whose step ``learned_importance`` has made a power of two -> the one next to their step:
        in a model that was restored from NNCF's state, weight decay moves it.
    """
    if all(is_held(native) for native in activations.values()):
        return {}  # the config's own compression_lr_multiplier
    steps = {
        native: float(_step(native))
        for position, native in activations.items()
        if is_held(native) and reads_input(position, ops)
    }
    powers = {native: 2.0 ** round(math.log2(step)) if 0 < step < math.inf else step for native, step in steps.items()}
    if powers != steps:
        nncf_logger.warning(
            f"Weight decay has moved the step at the input to {[*steps.values()]}; exported at {[*powers.values()]}"
        )
    return powers


def _fold(frozen: Any, nodes: Mapping[str, Any], norms: Mapping[str, Any]) -> dict[str, _Layer]:
    """
    Put weights on their grids.

    :param nodes: weighted operation -> NNCF's quantizer of its weight.
    :param norms: weighted operation -> the batch norm to fold.
    :return: weighted operation -> layer, of layers with integer kernels; one that is called several times has one.
    """
    layers: dict[str, _Layer] = {}
    done: set[int] = set()
    for node, native in nodes.items():
        module: Any = frozen.nncf.get_containing_module(node)
        if id(module) in done:
            continue
        done.add(id(module))
        weight = module.weight
        weight.copy_(copy.deepcopy(native).cpu()(weight))
        if not isinstance(module, LAYERS):
            continue
        columns = (-1, *[1] * (weight.dim() - 1))
        step = _step(native).expand(weight.shape[0], *columns[1:]).clone()
        integers, step = (weight.double() / step).round(), step.flatten()
        low, high = native.level_low, native.level_high
        bias = torch.zeros_like(step) if module.bias is None else module.bias.double()
        norm = norms.get(node)
        if norm is not None:
            factor, offset = affine(norm, f"behind {node}")
            bias = bias * factor + offset
            integers *= factor.sign().reshape(columns)  # a factor of 0 makes the integers 0, at any step
            step *= torch.where(factor == 0, 1.0, factor.abs())
            if (factor < 0).any():
                low, high = min(low, -high), max(high, -low)
        layers[node] = _Layer(module, norm, integers, low, high, step, bias)
    return layers


def _leave_room(
    layers: Mapping[str, _Layer],
    inputs: Mapping[str, Sequence[Sequence[Position]]],
    activations: Mapping[Position, Any],
) -> None:
    """
    Double the steps of weights whose products could saturate: CPUs without VNNI add two of them in 16 bits.

    :param inputs: weighted operation -> the quantizers of its input, of each call.
    :param activations: where NNCF's quantizers stand.
    """
    doubled = []
    for node, layer in layers.items():
        read = [[activations[position] for position in positions] for positions in inputs[node]]
        read = [natives for natives in read if len({float(_step(native)) for native in natives}) == 1]  # integer calls
        largest = max(
            (native.level_high + (ZERO_POINT if native.level_low < 0 else 0) for natives in read for native in natives),
            default=0,
        )
        rows = layer.integers.flatten(1).abs()
        pairs = rows.topk(min(2, rows.shape[1]), 1).values.sum(1)
        if float(pairs.max()) * largest > LARGEST_PAIR:
            layer.integers = (layer.integers / 2).round()
            layer.step = layer.step * 2
            layer.low, layer.high = -(-layer.low // 2), layer.high // 2
            layer.integers.clamp_(layer.low, layer.high)
            doubled.append(node)
    if doubled:
        nncf_logger.warning(
            "Exported with weights of 7 bits, since products of 8-bit ones saturate on CPUs without VNNI (compressed "
            f"by learned_importance, the model is trained so): {', '.join(doubled)}"
        )


def _integer_input(node: str, layer: _Layer, sources: Sequence[Mapping[str, float]]) -> float | None:
    """
    :param node: NNCF's name of the layer's first call.
    :param sources: operation -> step of the quantizers of its input, of each call.
    :return: step of the layer's input; None where it reads floating point, or where that does not matter.
    :raises UnsupportedModelError: if it adds a bias to accumulators with different units.
    """
    in_integers = [steps for steps in sources if len(set(steps.values())) == 1]
    distinct = {step for steps in in_integers for step in steps.values()}
    if len(distinct) > 1 and layer.bias.any():
        quantizers = dict.fromkeys(name for steps in in_integers for name in steps)
        msg = (
            f"{node.rpartition('/')[0]} has a bias and is called behind quantizers with different steps "
            f"(of {', '.join(quantizers)}): integer kernels would round its bias differently in each call. Name it in "
            "ignored_scopes, give each call a module of its own, or leave out its bias."
        )
        raise UnsupportedModelError(msg)
    return distinct.pop() if len(distinct) == 1 else None


def _write(layer: _Layer, source: float | None) -> GridQuantizer:
    """
    Write weight and bias into the layer.

    :param source: step of the layer's input; None where it is in floating point.
    :return: the quantizer of the weight.
    """
    weight, module = layer.module.weight, layer.module
    quantizer = GridQuantizer(layer.step.reshape(-1, *[1] * (weight.dim() - 1)), layer.low, layer.high)
    weight.copy_(layer.integers.float() * quantizer.step)
    bias = layer.bias
    if source is not None:  # an integer kernel's bias lies on the accumulator's grid
        unit = quantizer.step.flatten().double() * source
        bias = (bias / unit).round() * unit
    if layer.norm is not None:  # it stays as an identity that carries the bias
        make_identity(layer.norm, bias)
        bias = torch.zeros_like(bias)
    if module.bias is not None:
        module.bias.copy_(bias)
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


def _norms(frozen: Any) -> dict[str, Any]:
    """:return: operation -> module of each batch norm with factor and offset that runs once in a forward pass."""
    graph = frozen.nncf.get_original_graph()
    nodes = [node for node in graph.get_all_nodes() if node.node_type == "batch_norm"]
    uses = Counter(node.layer_name for node in nodes)
    modules = {
        node.node_name: frozen.nncf.get_containing_module(node.node_name)
        for node in nodes
        if uses[node.layer_name] == 1
    }
    return {
        name: module
        for name, module in modules.items()
        if isinstance(module, _BatchNorm) and module.affine and module.running_mean is not None
    }


def _behind(frozen: Any, name: str) -> str | None:
    """:return: the operation that alone reads a layer's output, where the layer runs once in a forward pass."""
    graph = frozen.nncf.get_original_graph()
    readers = graph.get_next_nodes(graph.get_node_by_name(name))
    return readers[0].node_name if len(readers) == len(_calls(frozen, name)) == 1 else None


def _calls(frozen: Any, name: str) -> list[str]:
    """:return: the operations of a layer's module; NNCF lists its weight's quantizer at the first only."""
    graph = frozen.nncf.get_original_graph()
    layer = graph.get_node_by_name(name).layer_name
    return [node.node_name for node in graph.get_all_nodes() if node.layer_name == layer]
