"""
NNCF 3: quantizer placement, freezing to NNCF's own quantizers, saving and loading.

This module and those named after it are the only ones that use NNCF 3's internals; :data:`PRIVATE_NAMES` lists them.
"""

from __future__ import annotations

import contextlib
import copy
import fnmatch
import io
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import nncf
import torch
from nncf.quantization.advanced_parameters import AdvancedQuantizationParameters
from nncf.torch.function_hook import get_hook_storage
from nncf.torch.function_hook.nncf_graph.nncf_graph_builder import build_nncf_graph
from nncf.torch.quantization.layers import PTQuantizerSpec, QuantizationMode, SymmetricQuantizer
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from nncf_mpq_plugin.adapters.base import replace_hook
from nncf_mpq_plugin.adapters.folding import Activation, affine, make_identity, place_steps
from nncf_mpq_plugin.adapters.nncf3_graph import (
    WEIGHTED_FUNCTIONS,
    LayerSite,
    ceilings_of,
    check_static,
    hook_name,
    position_of,
    read_graph,
)
from nncf_mpq_plugin.adapters.nncf3_passes import SharedPasses, function_of, stem_of
from nncf_mpq_plugin.adapters.plan import Op, Plan, Position, make_plan, reads_input
from nncf_mpq_plugin.errors import InputError, UnsupportedModelError
from nncf_mpq_plugin.files import written_atomically
from nncf_mpq_plugin.placement import PlacedLayer, QuantizedModel, resolve_fixed
from nncf_mpq_plugin.quantizer import MultiBitQuantizer, quantizers_of
from nncf_mpq_plugin.requirements import check_versions
from nncf_mpq_plugin.training import observe
from nncf_mpq_plugin.types import LayerBits, LayerCost, read_json, write_json

check_versions()  # adapters/__init__.py lets NNCF 2.19 pass

# NNCF compiles a CPU extension on first use and gives up after 60 s, which a busy machine exceeds
os.environ.setdefault("NNCF_EXTENSION_LOAD_TIMEOUT", "900")

# What this package uses of NNCF. tests/test_nncf3_names.py looks each name up, and at the code for names left out here.
PUBLIC_NAMES = (
    "nncf.Dataset",
    "nncf.IgnoredScope",
    "nncf.InternalError",
    "nncf.QuantizationPreset.PERFORMANCE",
    "nncf.quantization.advanced_parameters.AdvancedQuantizationParameters",
    "nncf.quantize",
    "nncf.torch.get_config",
    "nncf.torch.load_from_config",
)
PRIVATE_NAMES = (
    "nncf.common.graph.graph.NNCFGraph.get_all_nodes",
    "nncf.common.graph.graph.NNCFGraph.get_input_edges",
    "nncf.common.graph.graph.NNCFGraph.get_output_edges",
    "nncf.common.graph.graph.NNCFGraph.topological_sort",
    "nncf.common.graph.graph.NNCFNode.metatype",
    "nncf.common.graph.graph.NNCFNode.node_name",
    "nncf.torch.function_hook.get_hook_storage",
    "nncf.torch.function_hook.hook_executor_mode.FunctionHookMode._get_wrapped_call",
    "nncf.torch.function_hook.hook_executor_mode.FunctionHookMode.execute_post_hooks",
    "nncf.torch.function_hook.hook_executor_mode.FunctionHookMode.execute_pre_hooks",
    "nncf.torch.function_hook.hook_executor_mode.FunctionHookMode.get_current_relative_name",
    "nncf.torch.function_hook.hook_executor_mode.FunctionHookMode.get_next_op_call_name",
    "nncf.torch.function_hook.hook_executor_mode.FunctionHookMode.process_model_inputs",
    "nncf.torch.function_hook.hook_executor_mode.FunctionHookMode.process_model_outputs",
    "nncf.torch.function_hook.hook_storage.HookStorage.delete_hook",
    "nncf.torch.function_hook.hook_storage.HookStorage.insert_hook_by_name",
    "nncf.torch.function_hook.hook_storage.HookStorage.named_hooks",
    "nncf.torch.function_hook.nncf_graph.nncf_graph_builder.build_nncf_graph",
    "nncf.torch.graph.operator_metatypes.PTConstNoopMetatype",
    "nncf.torch.quantization.default_quantization.DEFAULT_PT_QUANT_TRAIT_TO_OP_DICT",
    "nncf.torch.quantization.default_quantization.QuantizationTrait.CONCAT",
    "nncf.torch.quantization.default_quantization.QuantizationTrait.QUANTIZATION_AGNOSTIC",
    "nncf.torch.quantization.layers.PTQuantizerSpec",
    "nncf.torch.quantization.layers.QuantizationMode.SYMMETRIC",
    "nncf.torch.quantization.layers.SymmetricQuantizer.level_high",
    "nncf.torch.quantization.layers.SymmetricQuantizer.level_low",
    "nncf.torch.quantization.layers.SymmetricQuantizer.scale",
    "nncf.torch.quantization.layers.SymmetricQuantizer.signed",
)
# Attributes that only objects have: class -> names. Hooks are called "pre_hooks.OPERATION__PORT.NUMBER", see
# nncf3_graph.position_of.
PRIVATE_ATTRIBUTES = {
    "nncf.common.graph.graph.NNCFGraphEdge": (
        "from_node",
        "input_port_id",
        "output_port_id",
        "tensor_shape",
        "to_node",
    ),
    "nncf.torch.function_hook.hook_executor_mode.FunctionHookMode": (
        "enabled",
        "module_call_stack",
        "nested_enter_count",
        "op_calls",
    ),
    "nncf.torch.function_hook.hook_executor_mode.OpMeta": ("op_name",),
    "nncf.torch.function_hook.wrapper.ForwardWithHooks": ("orig_forward",),
    "nncf.torch.quantization.layers.SymmetricQuantizer": ("_scale_param_storage",),
}

SMALLEST_GAMMA = 1e-4


@dataclass(frozen=True)
class NNCFQuantizedModel(QuantizedModel):
    """
    A :class:`QuantizedModel` in NNCF's hook storage.

    :param sites: layer name -> where it lives.
    :param plan: positions of the activation quantizers.
    :param ops: the model's operations in topological order.
    :param norms: operation -> module of each batch norm that no layer takes in.
    :param ceilings: ReLUs and their like that a quantizer behind them can stand for -> what they cut off at, above 0.
    """

    sites: Mapping[str, LayerSite] = None  # type: ignore[assignment]
    plan: Plan = None  # type: ignore[assignment]
    ops: tuple[Op, ...] = ()
    norms: Mapping[str, str] = field(default_factory=dict)
    ceilings: Mapping[str, float] = field(default_factory=dict)

    def several_passes(self) -> contextlib.AbstractContextManager[None]:
        return SharedPasses(self.model, self.ceilings)

    @property
    def floating_parameters(self) -> tuple[str, ...]:
        """Names of matrices and larger parameters that no quantizer is on, so that they stay in floating point."""
        quantized = {site.weight for site in self.sites.values()}
        scales = {id(scale) for quantizer in quantizers_of(self.model) for scale in quantizer.parameters()}
        named = self.model.named_parameters()
        return tuple(n for n, p in named if p.dim() > 1 and n not in quantized and id(p) not in scales)


def place(
    model: nn.Module,
    example_input: Tensor,
    calibration: Sequence[Tensor],
    *,
    bits: Sequence[int],
    fixed_bits: Mapping[str, int] | None = None,
    ignored_scopes: Sequence[str] = (),
    target: str = "openvino",
) -> NNCFQuantizedModel:
    """
    Put multi-bit quantizers into a copy of ``model`` and initialise their scales.

    :param model: a floating-point model; it is not changed.
    :param example_input: one batch, ``[N, ...]``, for tracing and for counting MACs.
    :param calibration: batches that activation statistics come from.
    :param bits: candidate bit widths.
    :param fixed_bits: ``first``, ``last`` or a layer name pattern (``*`` and ``?``) -> bit width of layers that are
        not searched. Default: first and last at 8 bits.
    :param ignored_scopes: layer names, name patterns, or NNCF's ``{re}...`` regular expressions of operation names,
        to be kept in floating point.
    :param target: ``openvino`` or ``onnxruntime``.
    :return: the quantized copy, in evaluation mode.
    :raises UnsupportedModelError: if NNCF cannot trace the model, finds nothing to quantize in it, or its operations
        depend on the data.
    :raises InputError: if a pattern in ``fixed_bits`` fits no layer.
    """
    fixed_bits = {"first": 8, "last": 8} if fixed_bits is None else fixed_bits
    quantized = _quantize_by_nncf(model, calibration, ignored_scopes)
    signs, weight_hooks = _take_out_quantizers(quantized)
    graph = build_nncf_graph(quantized, example_input)
    check_static(graph, quantized, example_input, calibration)
    ops, sites, costs, norms = read_graph(graph, quantized, weight_hooks, example_input.shape[0])
    if not costs:
        msg = "NNCF finds no layer to quantize in the model (convolution or linear with a weight), or all are ignored."
        raise UnsupportedModelError(msg)
    fixed = resolve_fixed(list(costs), fixed_bits)
    plan = make_plan(ops, signs, {sites[name].op: width for name, width in fixed.items()}, target)
    ceilings = ceilings_of(ops, quantized, example_input)

    storage = get_hook_storage(quantized)
    name_of = {site.op: name for name, site in sites.items()}
    by_position: dict[Position, MultiBitQuantizer] = {}
    for tensor in plan.stored:
        by_position[tensor.position] = MultiBitQuantizer((8,), signed=tensor.signed)
        by_position[tensor.position].power_of_two = reads_input(tensor.position, ops)
        storage.insert_hook_by_name(hook_name(tensor.position), by_position[tensor.position])
    stored = {hook_name(tensor.position): by_position[tensor.position] for tensor in plan.stored}
    activations: dict[str, MultiBitQuantizer] = {}
    layers: dict[str, PlacedLayer] = {}
    for reader in plan.readers:
        group = name_of[reader.layers[0]]
        behind = by_position[reader.stored] if reader.stored else None
        if not reader.positions:
            assert behind is not None
            activations[group] = behind
        else:
            quantizer = MultiBitQuantizer(bits if reader.bits is None else (reader.bits,), signed=reader.signed)
            quantizer.behind = behind
            quantizer.power_of_two = reads_input(reader.positions[0], ops)
            for position in reader.positions:
                storage.insert_hook_by_name(hook_name(position), quantizer)
            activations[group] = quantizer
        for op in reader.layers:
            name = name_of[op]
            cost = LayerCost(name, *costs[name], activation_group=group)
            layers[name] = PlacedLayer(cost, LayerBits(fixed[name], fixed[name]) if name in fixed else None)
    weights: dict[str, MultiBitQuantizer] = {}
    for name in [name for name in costs if name in layers]:
        candidates = (fixed[name],) if name in fixed else bits
        weights[name] = MultiBitQuantizer(candidates, signed=True, half_range=True, weight=True)
        storage.insert_hook_by_name(weight_hooks[sites[name].op], weights[name])
    if not any(layer.fixed is None for layer in layers.values()):
        msg = (
            "The model has no layer whose bit widths could be searched: NNCF quantizes "
            f"{len(layers)} layers, and fixed_bits or ignored_scopes cover all of them."
        )
        raise UnsupportedModelError(msg)
    positive = _make_gammas_positive(quantized, [sites[name] for name in weights])
    first = next(iter(costs))
    result = NNCFQuantizedModel(
        quantized,
        tuple(layers[name] for name in costs if name in layers),
        weights,
        activations,
        stored,
        positive=positive,
        stem=stem_of(quantized, sites[first].op, ops, ceilings) if first in layers and first in fixed else (),
        sites={name: sites[name] for name in weights},
        plan=plan,
        ops=tuple(ops),
        norms=norms,
        ceilings=ceilings,
    )
    _calibrate(result, calibration)
    return result


def freeze(quantized: NNCFQuantizedModel) -> nn.Module:
    """
    Make the deployable model: NNCF's own quantizers at the active bit widths, with the trained scales.

    Batch norm behind a layer is folded into the layer's weights, weight scales and bias; weights lie on their grid and
    biases on the accumulator's (multiples of weight step x input step), as integer kernels compute. The batch norm
    modules stay, as identities that carry the bias, so that the names in the state dict are the original model's.

    Steps then move by less than half a percent, so that no rounding tie can be reached; see
    :mod:`nncf_mpq_plugin.adapters.ties`.

    :param quantized: a fine-tuned model; it is not changed.
    :return: a copy in evaluation mode; the outputs equal ``quantized``'s but for these changes of steps and biases.
    """
    quantized = copy.deepcopy(quantized)
    model = quantized.model.eval()
    storage = get_hook_storage(model)
    for quantizer in quantizers_of(model):
        quantizer.snap = True
    with torch.no_grad():
        integers, folded, biases = {}, {}, {}
        for layer in quantized.layers:
            name = layer.cost.name
            integers[name], folded[name], biases[name] = _fold(quantized, name)
        steps, activations = _tie_free_steps(quantized, folded)
        for layer in quantized.layers:
            site = quantized.sites[layer.cost.name]
            weight = model.get_parameter(site.weight)
            quantizer = quantized.weight_quantizers[layer.cost.name]
            step = steps[layer.cost.name].reshape((-1,) + (1,) * (weight.dim() - 1))
            weight.copy_(integers[layer.cost.name].float() * step)
            norm: Any = None if site.batch_norm is None else model.get_submodule(site.batch_norm)
            source = _input_quantizer(quantized, layer)
            rounded = bias = biases[layer.cost.name]
            if source is not None:  # an integer kernel's bias lies on the accumulator's grid
                unit = step.flatten().double() * activations[source].double()
                rounded = (bias / unit).round() * unit
            if norm is not None:
                make_identity(norm, rounded)
                if site.bias:
                    model.get_parameter(site.bias).zero_()
            elif site.bias:
                model.get_parameter(site.bias).copy_(rounded)
            hook = next(name for name, hook in storage.named_hooks() if hook is quantizer)
            replace_hook(storage, hook, _native(quantizer, step))
        for name, hook in list(storage.named_hooks(remove_duplicate=False)):
            if isinstance(hook, MultiBitQuantizer) and hook.enabled:
                replace_hook(storage, name, _native(hook, activations[hook]))
            elif isinstance(hook, MultiBitQuantizer):
                storage.delete_hook(name)
    return model


def _fold(quantized: NNCFQuantizedModel, name: str) -> tuple[Tensor, Tensor, Tensor]:
    """:return: a layer's integers, and its weight steps ``[out]`` and bias with the batch norm behind it folded in."""
    model, site, quantizer = quantized.model, quantized.sites[name], quantized.weight_quantizers[name]
    weight = model.get_parameter(site.weight)
    low, high = quantizer.integer_range()
    step = quantizer.effective_scale().expand((weight.shape[0],) + (1,) * (weight.dim() - 1))
    integers = (weight / step).round().clamp(low, high)
    step = step.flatten().double()
    bias = model.get_parameter(site.bias).double() if site.bias else torch.zeros_like(step)
    if site.batch_norm is not None:
        factor, offset = affine(model.get_submodule(site.batch_norm), site.batch_norm)
        bias, step = bias * factor + offset, step * factor
    return integers, step, bias


def _input_quantizer(quantized: NNCFQuantizedModel, layer: PlacedLayer) -> MultiBitQuantizer | None:
    reader = quantized.activation_quantizers[layer.cost.activation_group]
    source = reader if reader.enabled else reader.behind
    return source if source is not None and source.enabled else None


def _tie_free_steps(
    quantized: NNCFQuantizedModel, weights: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], dict[MultiBitQuantizer, Tensor]]:
    """
    Find steps without ties, and put batch norms that no layer takes in on their lattices.

    :param weights: layer -> weight steps ``[out]`` as trained.
    :return: layer -> weight steps ``[out]``, activation quantizer -> step ``[1]``.
    """
    hooks = get_hook_storage(quantized.model).named_hooks(remove_duplicate=False)
    positions = {
        position_of(name): hook
        for name, hook in hooks
        if isinstance(hook, MultiBitQuantizer) and hook.enabled and not hook.weight
    }
    names = {hook: hook_name(position) for position, hook in reversed(positions.items())}
    found = {
        hook: Activation(name, float(hook.effective_scale()), hook.integer_range()[1]) for hook, name in names.items()
    }
    steps, activations = place_steps(
        quantized.ops,
        {position: found[hook] for position, hook in positions.items()},
        {site.op: weights[name] for name, site in quantized.sites.items()},
        {op: quantized.model.get_submodule(name) for op, name in quantized.norms.items()},
    )
    return (
        {name: steps[site.op].float() for name, site in quantized.sites.items()},
        {hook: hook.scale().new_tensor([activations[name]]) for hook, name in names.items()},
    )


def save_model(directory: str | Path, frozen: nn.Module) -> None:
    """
    Save a frozen model: ``model.safetensors`` (its state) and ``nncf_config.json`` (its quantizers).

    :param frozen: what :func:`freeze` returned.
    """
    directory = Path(directory)
    state = {name: value.detach().cpu().contiguous().clone() for name, value in frozen.state_dict().items()}
    with written_atomically(directory / "model.safetensors") as temporary:
        save_file(state, temporary, metadata={"format": "pt"})
    write_json(directory / "nncf_config.json", nncf.torch.get_config(frozen))


def load_model(directory: str | Path, model: nn.Module) -> nn.Module:
    """
    Restore a frozen model.

    :param directory: where :func:`save_model` wrote it.
    :param model: the user's model, freshly built; it is wrapped and filled.
    :return: the frozen model in evaluation mode, with the outputs and bit widths of the saved one.
    :raises InputError: if files are missing or unreadable, or do not fit the model.
    """
    directory = Path(directory)
    config = read_json(directory / "nncf_config.json")
    try:
        state = load_file(directory / "model.safetensors")
    except Exception as error:
        msg = f"{directory / 'model.safetensors'}: cannot be read ({error}). Export the model again."
        raise InputError(msg) from error
    try:
        restored = nncf.torch.load_from_config(model, config)
        restored.load_state_dict(state)
    except (RuntimeError, KeyError, TypeError, nncf.InternalError) as error:
        msg = f"{directory}: the saved quantized model does not fit this model ({error})."
        raise InputError(msg) from error
    return restored.eval()


def quantize_to_int8(model: Any, calibration: Sequence[Any], ignored_scopes: Sequence[str] = ()) -> Any:
    """
    NNCF's post-training quantization at its defaults: the uniform INT8 model to compare with.

    :param model: a torch module or an OpenVINO model.
    :param calibration: inputs, as the model takes them.
    :param ignored_scopes: as for :func:`place`, of a torch module.
    :return: a quantized model of the same kind.
    """
    options = {"subset_size": len(calibration), "ignored_scope": _ignored_scope(ignored_scopes)}
    with quiet(), contextlib.redirect_stdout(io.StringIO()):  # its progress bar
        return nncf.quantize(model, nncf.Dataset(list(calibration)), **options)


def _ignored_scope(ignored_scopes: Sequence[str]) -> nncf.IgnoredScope | None:
    names, patterns = [], []
    for scope in ignored_scopes:
        if scope.startswith("{re}"):
            patterns.append(scope.removeprefix("{re}"))
        elif "/" in scope:
            names.append(scope)
        else:
            patterns.append(fnmatch.translate(scope.replace(".", "/") + "/*").removesuffix("\\Z").removesuffix("\\z"))
    return nncf.IgnoredScope(names=names, patterns=patterns) if names or patterns else None


def _quantize_by_nncf(model: nn.Module, calibration: Sequence[Tensor], ignored_scopes: Sequence[str]) -> nn.Module:
    try:
        with quiet(), contextlib.redirect_stdout(io.StringIO()):  # its progress bar
            return nncf.quantize(
                model.eval(),
                nncf.Dataset(list(calibration)),
                subset_size=len(calibration),
                preset=nncf.QuantizationPreset.PERFORMANCE,
                ignored_scope=_ignored_scope(ignored_scopes),
                advanced_parameters=AdvancedQuantizationParameters(disable_bias_correction=True),
            )
    except Exception as error:
        msg = (
            f"NNCF could not quantize the model ({type(error).__name__}: {error}). It has to be traceable: a forward "
            "without control flow that depends on the data, called with one tensor. Check ignored_scopes as well."
        )
        raise UnsupportedModelError(msg) from error


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep log lines of NNCF, and of torch when NNCF compiles its extension, to errors."""
    loggers = [logging.getLogger(name) for name in ("nncf", "torch.utils.cpp_extension")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _take_out_quantizers(quantized: nn.Module) -> tuple[dict[Position, bool], dict[str, str]]:
    """Remove NNCF's quantizers. :return: position -> signed, and operation -> hook name of its weight quantizer."""
    storage = get_hook_storage(quantized)
    positions, weights = {}, {}
    for name, hook in list(storage.named_hooks(remove_duplicate=False)):
        position = position_of(name)
        if position.side == "pre" and position.port == 1 and function_of(position.op) in WEIGHTED_FUNCTIONS:
            weights[position.op] = name
        else:
            positions[position] = bool(hook.signed)
        storage.delete_hook(name)
    return positions, weights


def _make_gammas_positive(model: nn.Module, sites: Sequence[LayerSite]) -> tuple[nn.Parameter, ...]:
    """
    Negate channels whose batch norm weight is negative (an identical function), so that folding keeps the sign of the
    weights: the b-bit grid is not symmetric.

    :return: the batch norm weights that have to stay positive in training.
    """
    gammas = []
    with torch.no_grad():
        for site in sites:
            if site.batch_norm is None:
                continue
            norm: Any = model.get_submodule(site.batch_norm)
            negative = norm.weight < 0
            model.get_parameter(site.weight)[negative] *= -1
            if site.bias:
                model.get_parameter(site.bias)[negative] *= -1
            norm.weight[negative] *= -1
            norm.running_mean[negative] *= -1
            norm.weight.clamp_(min=SMALLEST_GAMMA)
            gammas.append(norm.weight)
    return tuple(gammas)


def _calibrate(quantized: QuantizedModel, calibration: Sequence[Tensor]) -> None:
    """Initialise every scale by the statistics of its tensor in the floating-point model."""
    quantizers = list(
        dict.fromkeys(
            [
                *quantized.weight_quantizers.values(),
                *quantized.activation_quantizers.values(),
                *quantized.stored_quantizers.values(),
            ]
        )
    )
    observe(quantized.model, quantizers, calibration)
    for quantizer in quantizers:
        quantizer.finish_observing()


def _native(quantizer: MultiBitQuantizer, step: Tensor) -> SymmetricQuantizer:
    """:return: NNCF's quantizer with the same integers and steps. NNCF's scale is the full range: step x level_high."""
    spec = PTQuantizerSpec(
        num_bits=quantizer.active,
        mode=QuantizationMode.SYMMETRIC,
        signedness_to_force=quantizer.signed,
        narrow_range=False,
        half_range=quantizer.half_range and quantizer.active == 8,
        scale_shape=tuple(step.shape),
        logarithm_scale=False,
    )
    native = SymmetricQuantizer(spec)
    native._scale_param_storage.data.copy_(step.detach() * native.level_high)
    return native.to(step.device)
