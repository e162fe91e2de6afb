"""
NNCF 2.19's quantizers as the core's :class:`QuantizedModel`.

NNCF has decided where quantizers stand and which of them are one module (unified scales). This module keeps all of it:
it says which bit widths each may have, and puts a multi-bit quantizer in the place of each while it is trained.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from nncf_mpq_plugin.errors import ConfigError, UnsupportedModelError
from nncf_mpq_plugin.placement import PlacedLayer, QuantizedModel, resolve_fixed
from nncf_mpq_plugin.quantizer import MultiBitQuantizer
from nncf_mpq_plugin.training import observe
from nncf_mpq_plugin.types import ImportanceTable, LayerBits, LayerCost

STORED_BITS = 8  # of a tensor that no weighted layer reads, and of layers that cannot be searched
DEFAULT_BITS = (2, 3, 4, 5, 6)  # as in this package's own config


class LimitedQuantizer(MultiBitQuantizer):
    """
    A :class:`MultiBitQuantizer` inside an ``NNCFNetwork``, with candidate bit widths of its own.

    Hardware gives quantizers different lists. Where joint training asks all of them for one bit width, each takes the
    nearest that it has: the next higher one, or its highest.
    """

    def select(self, bits: int) -> None:
        """Make ``bits``, or the nearest candidate above it, or else the highest, the active bit width."""
        super().select(min((b for b in self.bits if b >= bits), default=self.bits[-1]))

    def forward(self, x: Tensor, ceiling: float = math.inf) -> Tensor:
        """As the parent's, one operation of NNCF's tracing."""
        from nncf_mpq_plugin.adapters.nncf2_graph import traced

        return traced(x, functools.partial(super().forward, ceiling=ceiling))

    def trained_step(self, bits: int) -> Tensor:
        """:return: the step at ``bits`` that training ended with, moved to a power of two at the network's input."""
        step = self.scale(bits).detach().cpu()
        return torch.exp2(step.log2().round()) if self.power_of_two else step.clone()

    def initialize(self, x: Tensor) -> None:
        """As the parent's; scales of transposed convolutions lie along the weight's second dimension."""
        shape = self.scale().shape
        axis = next((axis for axis, size in enumerate(shape) if size > 1), 0)
        if axis:
            first = (axis, *(other for other in range(len(shape)) if other != axis))
            turned = LimitedQuantizer(self.bits, signed=self.signed, scale_shape=tuple(shape[i] for i in first))
            turned.initialize(x.permute(first))
            for bits, scale in self.scales.items():
                scale.data.copy_(turned.scales[bits].data.reshape(shape))
        else:
            super().initialize(x)


class _Unquantized(nn.Module):
    """Stands for a quantizer that is left out."""

    def forward(self, x: Tensor) -> Tensor:
        return x


@dataclass(frozen=True)
class LegacyModel(QuantizedModel):
    """
    :param modules: NNCF's quantizer id -> the multi-bit quantizer that stands for it.
    :param natives: NNCF's quantizer id -> NNCF's quantizer.
    :param dropped: ids of NNCF's quantizers that are left out.
    :param unread: names of layers whose input is not quantized; they are neither trained nor counted.
    :param several: names of layers that are called behind several quantizers; they are not searched.
    :param equal: groups of quantizer ids that get one bit width.
    :param equal_groups: layer name -> activation group that holds every layer of such a group.
    """

    modules: Mapping[Any, LimitedQuantizer] = None  # type: ignore[assignment]
    natives: Mapping[Any, nn.Module] = None  # type: ignore[assignment]
    dropped: tuple[Any, ...] = ()
    unread: tuple[str, ...] = ()
    several: tuple[str, ...] = ()
    equal: tuple[tuple[Any, ...], ...] = ()
    equal_groups: Mapping[str, str] = field(default_factory=dict)

    @property
    def bits(self) -> tuple[int, ...]:
        """Candidate bit widths of any weight or activation, ascending."""
        quantizers = [self.weight_quantizers[layer.cost.name] for layer in self.searchable]
        quantizers += [self.activation_quantizers[group] for group in self.searchable_groups]
        return tuple(sorted({b for quantizer in quantizers for b in quantizer.bits}))

    @contextlib.contextmanager
    def in_place(self) -> Iterator[None]:
        """Inside, the multi-bit quantizers are in the model; NNCF's are back afterwards, whatever happens."""
        pairs = [(self.natives[key], self.modules.get(key, _Unquantized())) for key in self.natives]
        _swap(self.model, dict(pairs))
        try:
            with _torch_functions_seen():
                yield
        finally:
            _swap(self.model, {module: native for native, module in pairs})

    def calibrate(self, batches: Sequence[Tensor]) -> None:
        """
        Initialise every scale by the statistics of its tensor in the floating-point model.

        :param batches: inputs.
        :raises UnsupportedModelError: if a quantizer is not met in a forward pass.
        """
        observe(self.model, self.modules.values(), batches)
        for key, module in self.modules.items():
            try:
                module.finish_observing()
            except ValueError as error:
                msg = f"The quantizer {key} was not met in a forward pass. Name its operation in ignored_scopes."
                raise UnsupportedModelError(msg) from error

    def possible(self, table: ImportanceTable) -> ImportanceTable:
        """:return: the table without bit widths that a layer's quantizers do not have."""
        layers = []
        for layer in table.layers:
            weight = self.weight_quantizers[layer.cost.name].bits
            activation = self.activation_quantizers[layer.cost.activation_group].bits
            layers.append(
                replace(
                    layer,
                    weight={b: layer.weight[b] for b in weight},
                    activation={b: layer.activation[b] for b in activation},
                )
            )
        every = sorted({b for layer in layers for b in (*layer.weight, *layer.activation)})
        return replace(table, bits=tuple(every), layers=tuple(layers))


def place(
    algo: Any,
    hardware: Mapping[Any, Sequence[int]],
    bits: Sequence[int] | None,
    fixed_bits: Mapping[str, int],
    equal: Sequence[Sequence[Any]] = (),
    dropped: Sequence[Any] = (),
    half_range: bool = False,
    inputs: Collection[Any] = (),
) -> LegacyModel:
    """
    Read NNCF's placement.

    :param algo: the controller that the initialiser is given.
    :param hardware: quantizer id -> bit widths that the target device allows; empty where it allows any.
    :param bits: candidate bit widths; None for all that the device allows.
    :param fixed_bits: as in the config.
    :param equal: groups of quantizer ids that have to get one bit width each; groups may overlap.
    :param dropped: ids of quantizers to leave out; no layer reads them.
    :param half_range: keep 8-bit weights to half of their range.
    :param inputs: ids of quantizers of the network's input, whose steps become powers of two.
    :return: a model whose multi-bit quantizers are not in place yet.
    :raises UnsupportedModelError: if there is nothing to search, or an activation quantizer is asymmetric.
    :raises ConfigError: if a fixed bit width is not allowed by the device.
    :raises InputError: if a pattern in ``fixed_bits`` fits no layer.
    """
    setup = algo.get_quantizer_setup_for_current_state()
    natives = dict(algo.all_quantizations)
    for key, native in natives.items():
        if not hasattr(native, "_scale_param_storage"):
            msg = (
                f'The quantizer {key} is asymmetric; learned scales are symmetric. Leave out "preset": "mixed", or '
                'set "activations": {"mode": "symmetric"}.'
            )
            raise UnsupportedModelError(msg)
    sites = _sites(algo, setup)
    unread = tuple(site.name for site in sites if not site.activations)
    sites = [site for site in sites if site.activations]
    joined = _joined(equal)
    allowed = _allowed(natives, sites, hardware, bits, fixed_bits, joined)
    weights, read = {site.weight for site in sites}, {key for site in sites for key in site.activations}
    kept = {key: native for key, native in natives.items() if key not in dropped}
    modules = {key: _stand_in(native, allowed[key], _is_weight(key), half_range) for key, native in kept.items()}
    for key in inputs:
        modules[key].power_of_two = True
    group_of: dict[Any, str] = {}
    layers, equal_groups = [], {}
    for site in sites:
        key = site.activations[0]
        group = group_of.setdefault(key, site.name)
        equal_groups[site.name] = next((str(keys[0]) for keys in joined if key in keys), group)
        pair = allowed[site.weight], allowed[key]
        single = LayerBits(pair[0][0], pair[1][0]) if len(pair[0]) == len(pair[1]) == 1 else None
        layers.append(PlacedLayer(LayerCost(site.name, site.macs, site.weights, group), single))
    if not any(layer.fixed is None for layer in layers):
        raise UnsupportedModelError(_nothing_to_search(hardware, len(layers)))
    return LegacyModel(
        algo._model,
        tuple(layers),
        {site.name: modules[site.weight] for site in sites},
        {name: modules[key] for key, name in group_of.items()},
        {str(key): module for key, module in modules.items() if key not in read | weights},
        modules=modules,
        natives=natives,
        dropped=tuple(dropped),
        unread=unread,
        several=tuple(site.name for site in sites if len(site.activations) > 1),
        equal=joined,
        equal_groups=equal_groups,
    )


def _allowed(
    natives: Mapping[Any, Any],
    sites: Sequence[_Site],
    hardware: Mapping[Any, Sequence[int]],
    bits: Sequence[int] | None,
    fixed_bits: Mapping[str, int],
    joined: Sequence[Sequence[Any]],
) -> dict[Any, tuple[int, ...]]:
    """:return: quantizer id -> its candidate bit widths, ascending."""
    wanted = set(DEFAULT_BITS if bits is None and not hardware else bits or ())
    read = {key for site in sites for key in (site.weight, *site.activations)}
    allowed: dict[Any, tuple[int, ...]] = {}
    for key in natives:
        widths = set(hardware[key]) if hardware else wanted
        allowed[key] = tuple(sorted(widths & wanted or widths))
        if key not in read:
            allowed[key] = (max(hardware[key]) if hardware else STORED_BITS,)
    fixed = resolve_fixed([site.name for site in sites], fixed_bits)
    for site in sites:
        if len(site.activations) > 1:  # called several times on different tensors
            fixed.setdefault(site.name, max(hardware[site.weight]) if hardware else STORED_BITS)
    narrowed: dict[Any, str] = {}
    for site in sites:
        for key in (site.weight, *site.activations) if site.name in fixed else ():
            width = fixed[site.name]
            if hardware and width not in hardware[key]:
                msg = (
                    f"Layer {site.name!r} is to have {width} bits (fixed_bits), but the target device allows "
                    f"{sorted(hardware[key])} for {key}."
                )
                raise ConfigError(msg)
            if allowed[key] != (width,) and key in narrowed:
                msg = f"fixed_bits: layers {narrowed[key]!r} and {site.name!r} share {key} and ask for different bits."
                raise ConfigError(msg)
            allowed[key], narrowed[key] = (width,), site.name
    for keys in joined:
        members = [key for key in keys if key in read]
        if members:
            common = set.intersection(*(set(allowed[key]) for key in members))
            if hardware:
                common = common.intersection(*(hardware[key] for key in keys))
            if not common:
                msg = (
                    'bitwidth_assignment_mode "strict": no bit width is common to '
                    f'{", ".join(map(str, keys[:4]))}. Use "liberal", or other fixed_bits.'
                )
                raise ConfigError(msg)
            allowed.update(dict.fromkeys(keys, tuple(sorted(common))))
    return allowed


def _joined(groups: Sequence[Sequence[Any]]) -> tuple[tuple[Any, ...], ...]:
    """:return: the groups, those that overlap as one."""
    joined: list[dict[Any, None]] = []
    for group in groups:
        overlapping = [other for other in joined if any(key in other for key in group)]
        rest = [other for other in joined if all(other is not found for found in overlapping)]
        merged = dict.fromkeys(key for keys in (*overlapping, group) for key in keys)
        joined = [*rest, merged]
    return tuple(tuple(group) for group in joined if group)


@dataclass(frozen=True)
class _Site:
    """A weighted layer: name, quantizer of its weight, those that its inputs are read through, MACs and weights."""

    name: str
    weight: Any
    activations: tuple[Any, ...]
    macs: int
    weights: int


def _sites(algo: Any, setup: Any) -> list[_Site]:
    """:return: layers in the order of execution; a module that is called several times is one layer."""
    model = algo._model
    graph = model.nncf.get_original_graph()
    flops = model.nncf.get_flops_per_module()
    names = {id(module): name for name, module in model.named_modules()}
    reader_of = algo.groups_of_adjacent_quantizers.weight_qp_id_per_activation_qp_id
    ids = algo.setup_to_module_id_translation_dict
    points: dict[Any, list[tuple[int, int]]] = {}
    for point_id, point in setup.quantization_points.items():
        if point.is_weight_quantization_point():
            node = graph.get_node_by_name(point.insertion_point.target_node_name)
            points.setdefault(ids[point_id], []).append((node.node_id, point_id))
    sites = []
    for key, calls in sorted(points.items(), key=lambda item: min(item[1])):
        nodes = [setup.quantization_points[point].insertion_point.target_node_name for _, point in sorted(calls)]
        module = model.nncf.get_containing_module(nodes[0])
        readers = dict.fromkeys(ids[reader_of[point]] for _, point in sorted(calls) if point in reader_of)
        macs = sum(int(flops.get(node, 0)) // 2 for node in nodes)
        sites.append(_Site(names[id(module)], key, tuple(readers), max(1, macs), module.weight.numel()))
    return sites


def _stand_in(native: Any, bits: tuple[int, ...], is_weight: bool, half_range: bool) -> LimitedQuantizer:
    shape = tuple(native.scale_shape) if is_weight else (1,)
    signed = True if is_weight else bool(native.signed)
    half_range = native.is_half_range or (is_weight and half_range)
    module = LimitedQuantizer(bits, signed=signed, scale_shape=shape, half_range=half_range, weight=is_weight)
    return module.to(native._scale_param_storage.device)


def _is_weight(key: Any) -> bool:
    return type(key).__name__ == "WeightQuantizerId"


def _nothing_to_search(hardware: Mapping[Any, Sequence[int]], layers: int) -> str:
    if hardware and {b for widths in hardware.values() for b in widths} == {STORED_BITS}:
        return (
            "The target device allows 8 bits only, so there is nothing for learned_importance to choose. Set "
            '"target_device": "TRIAL" for any bit widths, or "NPU" for its own (weights 2, 4, 8, activations 4, 8).'
        )
    return (
        f"No layer's bit widths could be searched: NNCF quantizes {layers} layers with quantized inputs, and bits, "
        "fixed_bits, ignored_scopes and the target device leave one choice for each."
    )


@contextlib.contextmanager
def _torch_functions_seen() -> Iterator[None]:
    """
    Inside, NNCF's hooks work under a ``TorchFunctionMode``, which importance is measured in.

    NNCF wraps every function of ``torch.nn.functional``, by mistake also the one that calls the mode; what ``relu``
    and the like do then counts as the inside of an operation, and their quantizers are left out.
    """
    functional: Any = torch.nn.functional
    wrapped = functional.handle_torch_function
    functional.handle_torch_function = getattr(wrapped, "_original_op", wrapped)
    try:
        yield
    finally:
        functional.handle_torch_function = wrapped


def _swap(model: nn.Module, replacements: Mapping[nn.Module, nn.Module]) -> None:
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):
            if child is not None and child in replacements:
                parent._modules[name] = replacements[child]
